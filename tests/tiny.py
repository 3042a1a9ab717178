"""A random model of a few thousand parameters, its experience, compiled programs, and the metadata of a checkpoint."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config.schema import LossSection
from grpo_jax.learn.packing import PackedShape, packed_shape
from grpo_jax.learn.update import pack_minibatch
from grpo_jax.model.architecture import LayerConfig, ModelConfig
from grpo_jax.model.decoder import init_params
from grpo_jax.run.checkpoint import hash_meta
from grpo_jax.types import Experience, PackedBatch

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    layers=(LayerConfig(),) * 2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    tie_embeddings=False,
    tokenizer_vocab_size=45,
    eos_ids=(0,),
)


@partial(jax.jit, static_argnames=("model_cfg", "seed"))  # one program compiles faster than each of its operations
def params(model_cfg=CONFIG, seed=0):
    """Draws parameters. The scales of norms are not all 1, so that leaving out a norm shows."""

    def perturb_scale(path, x):
        if "scale" not in str(path):
            return x
        return x + 0.2 * jax.random.normal(jax.random.key(len(str(path))), x.shape)

    return jax.tree_util.tree_map_with_path(perturb_scale, init_params(model_cfg, jax.random.key(seed)))


def experience(rows=8, prompt=5, sampled=6, seed=0, model_cfg=CONFIG, samples=2) -> Experience:
    """Draws sequences of unequal lengths, `samples` per prompt, off-policy log-probs and advantages of both signs."""
    draw = np.random.default_rng(seed)
    group = np.arange(rows) // samples
    prompt_lengths = draw.integers(2, prompt + 1, rows)[group]
    lengths = draw.integers(1, sampled + 1, rows)
    prompts = draw.integers(1, model_cfg.tokenizer_vocab_size, (rows, prompt + sampled))[group]
    completions = draw.integers(1, model_cfg.tokenizer_vocab_size, (rows, prompt + sampled))
    columns = np.arange(prompt + sampled)
    tokens = np.where(columns < (prompt_lengths + lengths)[:, None], completions, 0)
    tokens = np.where(columns < prompt_lengths[:, None], prompts, tokens)
    logps = -2 - draw.random((rows, sampled))
    return Experience(
        tokens=tokens.astype(np.int32),
        prompt_lengths=prompt_lengths,
        mask=np.arange(sampled) < lengths[:, None],
        sampler_logps=logps.astype(np.float32),
        ref_logps=(logps + 0.3 * draw.standard_normal(logps.shape)).astype(np.float32),
        advantages=draw.standard_normal(rows).astype(np.float32),
        prompt_ids=7 + group,
        kept=np.ones(rows, bool),
    )


def packed(batch: Experience, micro_tokens=1000, shards=1) -> PackedBatch:
    """Packs a batch into rows of about `micro_tokens` tokens, or of one sequence if it is longer."""
    longest = batch.tokens.shape[1] - batch.mask.shape[1], batch.mask.shape[1]
    shape = packed_shape(len(batch.advantages), 1, *longest, micro_tokens, shards)
    return jax.tree.map(jnp.asarray, pack_minibatch(batch, LossSection(), shape, shards))


def padded(batch: Experience) -> PackedBatch:
    """Puts every completion into its own row, after its own copy of the prompt; shaped like `packed(batch, 1)`."""
    single = batch.replace(prompt_ids=np.arange(len(batch.advantages)))
    width = -(-batch.tokens.shape[1] // 8) * 8
    return jax.tree.map(
        jnp.asarray, pack_minibatch(single, LossSection(), PackedShape(len(batch.advantages), width), 1)
    )


def all_gather_shapes(hlo: str) -> list[tuple[int, ...]]:
    """Returns the output shapes of all all-gathers in the text of a compiled program."""
    outputs = re.findall(r"= \(?(.*?)\)? all-gather(?:-start)?\(", hlo)
    return [tuple(map(int, dims.split(","))) for output in outputs for dims in re.findall(r"\[([\d,]+)\]", output)]


def write_meta(workdir, step, trained, line=None):
    """Writes the metadata of a checkpoint of a run that was trained with some values of keys; `line` is its metrics."""
    folder = workdir / "checkpoints" / str(step) / "meta"
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"step": step, "config": trained, "line": line}
    (folder / "metadata").write_text(json.dumps(meta | {"sha256": hash_meta(meta)}))
