"""Builds what every entry point needs from a config: model config, tokenizer, stop table, meshes and rollout plan."""

import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config.schema import Config, MeshSection, RolloutMeshSection
from grpo_jax.config.workdir import read_config
from grpo_jax.errors import UserError
from grpo_jax.learn.optimizer import make_optimizer, train_state_shapes, train_state_shardings
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import log_indivisible_axes, tree_shardings
from grpo_jax.parallel.mesh import make_mesh, make_rollout_mesh, num_data_shards
from grpo_jax.rewards.parts import RewardPart
from grpo_jax.rewards.pool import Grader
from grpo_jax.rollout.memory import RolloutPlan, bytes_per_device, device_memory_bytes, plan_rollout, training_room
from grpo_jax.rollout.sampler import QueueRoom
from grpo_jax.run.progress import announce, phase, set_bytes
from grpo_jax.text.prompt import PromptFormat, completion_eos_ids
from grpo_jax.text.stops import build_stop_table
from grpo_jax.weights.reading import load, open_model_tensors
from grpo_jax.weights.source import count_token_ids, find_model, read_model_config
from grpo_jax.weights.tokenizer import load_tokenizer

# Each use of the run's random key folds in a constant of its own first, so that no two uses share a key.
SAMPLING_KEY, EVALUATION_KEY, SHUFFLING_KEY, GENERATION_KEY = range(4)


class BaseModel(NamedTuple):
    """The parts of the base model that are read before its weights and before any device work."""

    source: Path  # a Hugging Face folder or a GGUF file
    model_cfg: ModelConfig
    prompt_format: PromptFormat  # which holds the tokenizer


class RunContext(NamedTuple):
    """The objects that a run needs besides its config. All of them are known before any device work."""

    source: Path  # the base model: a Hugging Face folder or a GGUF file
    model_cfg: ModelConfig
    prompt_format: PromptFormat
    tokenizer: Any
    stop_ids: tuple[int, ...]  # the EOS ids that end a completion
    stop_table: np.ndarray  # [A, V], built from stop_ids and rollout.stop_strings
    mesh: Mesh  # of the updates
    rollout_mesh: Mesh  # of rollouts: the same devices, split as the rollout plan says
    rollout_plan: RolloutPlan
    grader: Grader  # without parts if nothing is graded
    room: QueueRoom | None = None  # of all rollouts of a training run; None if each has what it needs


def refit_mesh(cfg: Config, workdir: Path) -> Config:
    """Returns the config of a run with a mesh that fits the devices, if it resumes with its mesh on other devices."""
    sizes, devices = astuple(cfg.mesh), jax.device_count()
    known = math.prod(size for size in sizes if size != -1)
    fits = devices % known == 0 if -1 in sizes else devices == known
    if fits or not (workdir / "config.json").is_file() or read_config(workdir).mesh.to_dict() != asdict(cfg.mesh):
        return cfg
    if jax.process_index() == 0:
        announce(f"The run's mesh does not fit {devices} device(s): mesh.fsdp=-1 and rollout.mesh.* are derived again")
    rollout = replace(cfg.rollout, mesh=RolloutMeshSection())
    return replace(cfg, mesh=MeshSection(data=1, fsdp=-1), rollout=rollout)


@phase("Loading the tokenizer")
def read_base_model(cfg: Config) -> BaseModel:
    """Finds the base model, and reads its config, its tokenizer and the prompt template.

    Raises:
        UserError: One of them cannot be found or read.
    """
    source = find_model(cfg.model.path)
    model_cfg = read_model_config(source)
    return BaseModel(source, model_cfg, make_prompt_format(cfg, load_tokenizer(source), model_cfg))


def make_prompt_format(cfg: Config, tokenizer: Any, model_cfg: ModelConfig) -> PromptFormat:
    """Returns the prompt format of a config's `prompt` section; see `PromptFormat`."""
    options = dict(instruction=cfg.prompt.instruction, examples=cfg.prompt.examples)
    return PromptFormat(tokenizer, cfg.prompt.template, vocab_size=model_cfg.vocab_size, **options)


@phase("Preparing the devices")
def build_context(
    cfg: Config,
    base: BaseModel,
    *,
    reward_parts: Mapping[str, RewardPart] | None = None,
    training: bool = False,
) -> RunContext:
    """Builds the context of a run and checks that the model fits the config and the devices.

    Args:
        cfg: A checked config whose `rollout.max_prompt_tokens` is not 0 (see `grpo_jax.run.prompt_limit`).
        base: The base model, from `read_base_model`.
        reward_parts: The reward parts by label, if completions will be graded.
        training: Whether the optimizer state and the reference take memory besides the policy.

    Returns:
        The context, whose rollout plan says how many decode slots fit in the remaining memory.

    Raises:
        UserError: The model, the tokenizer, the mesh or the memory does not fit the config.
    """
    source, model_cfg, prompt_format = base
    tokenizer = prompt_format.tokenizer
    model_cfg = apply_model_options(cfg, source, model_cfg, tokenizer, training)
    open_model_tensors(source, model_cfg)  # raises here if a tensor is missing or has the wrong shape
    mesh = make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor, cfg.mesh.expert)
    log_indivisible_axes(mesh, param_shapes(model_cfg, cfg.model.param_dtype))
    stop_ids = completion_eos_ids(tokenizer, model_cfg.eos_ids, model_cfg.vocab_size)
    stop_table = build_stop_table(model_cfg.vocab_size, stop_ids, cfg.rollout.stop_strings, tokenizer)
    held_bytes = resident_bytes(cfg, model_cfg, mesh, training)
    plan = plan_rollout(cfg, model_cfg, mesh, held_bytes, device_memory_bytes(), strict=training)
    rollout_mesh = make_rollout_mesh(mesh, plan.tensor, plan.expert)
    return RunContext(
        source,
        model_cfg,
        prompt_format,
        tokenizer,
        stop_ids,
        stop_table,
        mesh,
        rollout_mesh,
        plan,
        Grader(cfg, reward_parts or {}, tokenizer, stop_ids),
        training_room(cfg, plan.slots, num_data_shards(rollout_mesh)) if training else None,
    )


def apply_model_options(cfg: Config, source: Path, model_cfg: ModelConfig, tokenizer, training: bool) -> ModelConfig:
    """Returns the model config with the run's dtypes, attention kernel and rematerialization.

    Raises:
        UserError: The tokenizer belongs to another model, or the attention kernel needs another kind of device.
    """
    token_count = count_token_ids(tokenizer.get_vocab(), tokenizer.get_added_vocab(), model_cfg.vocab_size, source)
    attention = cfg.model.attention if training else "auto"
    backend = {"splash": "tpu", "cudnn": "gpu"}.get(attention, jax.default_backend())
    if backend != jax.default_backend():
        raise UserError(
            f"model.attention={attention} needs {backend} devices; found {jax.default_backend()}. "
            "Set --config.model.attention=auto."
        )
    dtypes = dict(compute_dtype=cfg.model.compute_dtype, logit_dtype=cfg.model.logit_dtype)
    return replace(model_cfg, tokenizer_vocab_size=token_count, attention=attention, remat=cfg.train.remat, **dtypes)


def resident_bytes(cfg: Config, model_cfg: ModelConfig, mesh: Mesh, training: bool) -> int:
    """Returns the bytes per device of the policy and, in training, of the reference and the optimizer state."""
    shapes = param_shapes(model_cfg, cfg.model.param_dtype)
    if not training:
        return bytes_per_device(shapes, tree_shardings(mesh, shapes))
    optimizer = make_optimizer(cfg.optim)
    total = bytes_per_device(train_state_shapes(shapes, optimizer), train_state_shardings(mesh, shapes, optimizer))
    if cfg.loss.kl_coef:
        reference = param_shapes(model_cfg, cfg.model.reference_dtype)
        total += bytes_per_device(reference, tree_shardings(mesh, reference))
    return total


def load_base_model(cfg: Config, context: RunContext) -> dict:
    """Loads the parameters of the model that a run starts from, on the mesh of its updates."""
    _, params = load(context.source, mesh=context.mesh, param_dtype=cfg.model.param_dtype, on_progress=set_bytes)
    return params
