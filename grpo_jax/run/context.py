"""What the entry points set up alike: model, tokenizer, stops and mesh of a config."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.learn.optimizer import make_optimizer, train_state_shapes, train_state_shardings
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import log_indivisible_axes, make_mesh, tree_shardings
from grpo_jax.rollout.memory import RolloutPlan, bytes_per_device, plan_rollout
from grpo_jax.run.checkpoint import restore_policy
from grpo_jax.tasks.problem_file import read_problems
from grpo_jax.tasks.streams import held_out_problems, make_task
from grpo_jax.text.prompt import completion_eos_ids, encode_prompts
from grpo_jax.text.stops import build_stop_table
from grpo_jax.weights.model_io import load, open_model_tensors
from grpo_jax.weights.source import count_token_ids, find_model, read_model_config
from grpo_jax.weights.tokenizer import load_tokenizer

# What a run's key is folded with first, so that no two uses share a key.
SAMPLING_KEY, EVALUATION_KEY, SHUFFLING_KEY, GENERATION_KEY = range(4)


class RunContext(NamedTuple):
    """What a run is made with, besides its config: all of it is known before any device works."""

    source: Path  # of the base model: a folder or a GGUF file
    model_cfg: ModelConfig
    tokenizer: Any
    stop_ids: tuple[int, ...]
    stop_table: np.ndarray  # of stop_ids and rollout.stop_strings
    mesh: Mesh
    rollout_plan: RolloutPlan  # of the rollout's memory


def build_context(cfg: Config, *, training: bool = False) -> RunContext:
    """Finds model, tokenizer and mesh of a checked config, and what of a rollout fits in memory.

    Args:
      training: besides the policy, the optimizer's state and the reference take memory.
    Raises:
      UserError: one of them is not as the config says.
    """
    source = find_model(cfg.model.path)
    model_cfg = read_model_config(source)
    tokenizer = load_tokenizer(source)
    count = count_token_ids(tokenizer.get_vocab())
    model_cfg = replace(
        model_cfg,
        tokenizer_vocab_size=count,
        compute_dtype=cfg.model.compute_dtype,
        logit_dtype=cfg.model.logit_dtype,
        attention=cfg.model.attention if training else "auto",
        remat=cfg.train.remat,
    )
    if count > model_cfg.vocab_size:
        raise UserError(
            f"expected a row of the embedding for each of the tokenizer's {count} ids in {source}; found "
            f"{model_cfg.vocab_size} rows; this tokenizer is not the model's"
        )
    open_model_tensors(source, model_cfg)
    needs = {"splash": "tpu", "cudnn": "gpu"}.get(model_cfg.attention, jax.default_backend())
    if needs != jax.default_backend():
        raise UserError(
            f"expected devices of kind {needs} for model.attention={model_cfg.attention}; found "
            f"{jax.default_backend()}; set --config.model.attention=auto"
        )
    mesh = make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor, cfg.mesh.expert)
    stop_ids = completion_eos_ids(tokenizer, model_cfg.eos_ids)
    table = build_stop_table(model_cfg.vocab_size, stop_ids, cfg.rollout.stop_strings, tokenizer)
    shapes = param_shapes(model_cfg, cfg.model.param_dtype)
    log_indivisible_axes(mesh, shapes)
    held = bytes_per_device(shapes, tree_shardings(mesh, shapes))
    if training:
        optimizer = make_optimizer(cfg.optim)
        if cfg.loss.kl_coef:
            reference = param_shapes(model_cfg, cfg.model.reference_dtype)
            held += bytes_per_device(reference, tree_shardings(mesh, reference))
        held += bytes_per_device(
            train_state_shapes(shapes, optimizer).opt_state, train_state_shardings(mesh, shapes, optimizer).opt_state
        )
    plan = plan_rollout(cfg, model_cfg, mesh, held, strict=training)
    return RunContext(source, model_cfg, tokenizer, stop_ids, table, mesh, plan)


def check_prompt_lengths(cfg: Config, tokenizer) -> None:
    """Encodes the questions: all of a file, or some of each stream of a task that is computed. None may be too long.

    Raises:
      UserError: a line of the file is no question, nothing can be held out, or a prompt is longer than
        `rollout.max_prompt_tokens`.
    """
    if cfg.task.name == "jsonl":
        sources = [read_problems(path) for path in (cfg.task.path, cfg.task.eval_path) if path]
    else:
        problem = make_task(cfg.task, cfg.seed, "train")
        sources = [[problem(i) for i in range(256)]]
    for problems in [*sources, held_out_problems(cfg.task, cfg.eval.questions)]:
        encode_prompts(tokenizer, problems, range(len(problems)), cfg.rollout.max_prompt_tokens)


def load_policy(cfg: Config, context: RunContext, workdir: Path, base: bool) -> tuple[int, Any]:
    """A run's newest policy, or with `base` the model it began with; its step, and the parameters on the mesh."""
    if base:
        return 0, load(context.source, mesh=context.mesh, param_dtype=cfg.model.param_dtype)[1]
    shapes = param_shapes(context.model_cfg, cfg.model.param_dtype)
    return restore_policy(workdir, shapes, tree_shardings(context.mesh, shapes))
