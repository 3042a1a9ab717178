"""Makes the models that the parts measure, with random weights in published shapes, and names the device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from common import Learner

from grpo_jax.config import Config, check, default
from grpo_jax.config.presets import hub_model
from grpo_jax.learn.optimizer import init_train_state, make_optimizer
from grpo_jax.learn.update import make_update
from grpo_jax.model.architecture import LayerConfig, ModelConfig, RopeConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import make_mesh, path_name
from parts import NotHere

# https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
SMOLLM2_135M = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    layers=(LayerConfig(rope=RopeConfig(theta=100000.0)),) * 30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_positions=8192,
    tie_embeddings=True,
    compute_dtype="bfloat16",
)

# https://huggingface.co/Qwen/Qwen2.5-1.5B/blob/main/config.json
QWEN_1_5B = ModelConfig(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    layers=(LayerConfig(rope=RopeConfig(theta=1000000.0)),) * 28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    max_positions=131072,
    norm_eps=1e-6,
    qkv_bias=True,
    tie_embeddings=True,
    family="qwen2",
    compute_dtype="bfloat16",
)


def require_accelerator(platform: str, small: bool) -> None:
    """Raises NotHere on a CPU, where these models would take hours, unless `small` is set."""
    if platform == "cpu" and not small:
        raise NotHere("models of this size need an accelerator; found a CPU. Pass --small")


def shrink(model_cfg: ModelConfig) -> ModelConfig:
    """Returns a model that two CPU cores can handle: two narrow layers and a small vocabulary, in float32."""
    return replace(
        model_cfg,
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        layers=model_cfg.layers[:2],
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        compute_dtype="float32",
    )


def random_params(model_cfg: ModelConfig, dtype: str) -> dict:
    """Returns random parameters in `dtype`, drawn on the device.

    They are uniform with a standard deviation of 0.02; scales of norms are 1 plus that. For large models, the TPU
    compiler takes minutes for `init_params` and seconds for this.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(model_cfg, dtype))

    @jax.jit
    def draw(key):
        keys, bound = jax.random.split(key, len(leaves)), 0.02 * 3**0.5
        return [
            jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound) + path_name(path).endswith("scale")
            for key, (path, leaf) in zip(keys, leaves, strict=True)
        ]

    return jax.block_until_ready(jax.tree.unflatten(tree, draw(jax.random.key(0, impl="rbg"))))


def training_config(
    *, prompts: int, samples: int, max_prompt_tokens: int, max_tokens: int, micro_tokens: int = 4096
) -> Config:
    """Returns the config of `configs/r1zero.py:qwen2.5-1.5b` for one device, with these sizes."""
    sizes = dict(prompts=prompts, samples=samples, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens)
    raw = hub_model(default(), "Qwen/Qwen2.5-1.5B", lr=1e-6, fsdp=1, **sizes)
    raw.train.micro_tokens = micro_tokens
    return check(raw)


def random_learner(model_cfg: ModelConfig, cfg: Config) -> Learner:
    """Builds a policy with random weights, its reference and its update on the first device.

    The caller has to set the mesh before it calls the update.
    """
    model_cfg = replace(model_cfg, remat=cfg.train.remat)
    mesh, params = make_mesh(devices=jax.devices()[:1]), random_params(model_cfg, cfg.model.param_dtype)
    reference = None
    if cfg.loss.kl_coef:
        reference = jax.tree.map(lambda x: jnp.array(x, cfg.model.reference_dtype), params)
    optimizer = make_optimizer(cfg.optim)
    state = init_train_state(mesh, params, optimizer)
    return Learner(cfg, model_cfg, mesh, state, reference, make_update(model_cfg, cfg, mesh, state.params, optimizer))


def device_name() -> str:
    """Returns the kind of the first device."""
    return jax.devices()[0].device_kind
