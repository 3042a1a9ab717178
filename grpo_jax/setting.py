"""What the entry points set up alike: model, tokenizer, stops and mesh of a config."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.architecture import ModelConfig
from grpo_jax.checkpoint import restore_policy
from grpo_jax.memory import Plan, placed_bytes, plan_rollout
from grpo_jax.mesh import make_mesh, shardings
from grpo_jax.model import param_shapes
from grpo_jax.optimizer import make_optimizer, state_shapes, state_shardings
from grpo_jax.prompt import encode_prompts, eos_ids, load_tokenizer
from grpo_jax.source import count_ids, find_model, read_model_config
from grpo_jax.stops import stop_table
from grpo_jax.tasks import held_out_problems, make_task, read_questions
from grpo_jax.types import UserError
from grpo_jax.weights import load, open_checkpoint

# What a run's key is folded with first, so that no two uses share a key.
SAMPLING, EVALUATION, SHUFFLING, GENERATION = range(4)


class Setting(NamedTuple):
    """What a run is made with, besides its config: all of it is known before any device works."""

    source: Path  # of the base model: a folder or a GGUF file
    model: ModelConfig
    tokenizer: Any
    stop_ids: tuple[int, ...]
    stop_table: np.ndarray  # of stop_ids and rollout.stop_strings
    mesh: Mesh
    plan: Plan  # of the rollout's memory


def prepare(config, *, training: bool = False) -> Setting:
    """Finds model, tokenizer and mesh of a checked config, and what of a rollout fits in memory.

    Args:
      training: besides the policy, the optimizer's state and the reference take memory.
    Raises:
      UserError: one of them is not as the config says.
    """
    source = find_model(config.model.path)
    model = read_model_config(source)
    tokenizer = load_tokenizer(source)
    count = count_ids(tokenizer.get_vocab())
    model = replace(
        model, token_count=count, compute_dtype=config.model.compute_dtype, logit_dtype=config.model.logit_dtype,
        attention=config.model.attention if training else "auto", remat=config.update.remat)
    if count > model.vocab_size:
        raise UserError(f"expected a row of the embedding for each of the tokenizer's {count} ids in {source}; found "
                        f"{model.vocab_size} rows; this tokenizer is not the model's")
    open_checkpoint(source, model)
    needs = {"splash": "tpu", "cudnn": "gpu"}.get(model.attention, jax.default_backend())
    if needs != jax.default_backend():
        raise UserError(f"expected devices of kind {needs} for model.attention={model.attention}; found "
                        f"{jax.default_backend()}; set --config.model.attention=auto")
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.expert)
    stop_ids = eos_ids(tokenizer, model.eos_ids)
    table = stop_table(model.vocab_size, stop_ids, config.rollout.stop_strings, tokenizer)
    shapes = param_shapes(model, config.model.param_dtype)
    held = placed_bytes(shapes, shardings(mesh, shapes))
    if training:
        optimizer = make_optimizer(config.optim)
        if config.loss.kl_coef:
            reference = param_shapes(model, config.model.reference_dtype)
            held += placed_bytes(reference, shardings(mesh, reference))
        held += placed_bytes(state_shapes(shapes, optimizer).opt_state, state_shardings(mesh, shapes, optimizer).opt_state)
    plan = plan_rollout(config, model, mesh, held, strict=training)
    return Setting(source, model, tokenizer, stop_ids, table, mesh, plan)


def check_prompts(config, tokenizer) -> None:
    """Encodes the questions: all of a file, or some of each stream of a task that is computed. None may be too long.

    Raises:
      UserError: a line of the file is no question, nothing can be held out, or a prompt is longer than
        `rollout.max_prompt_tokens`.
    """
    if config.task.name == "jsonl":
        sources = [read_questions(path) for path in (config.task.path, config.task.eval_path) if path]
    else:
        problem = make_task(config.task, config.seed, "train")
        sources = [[problem(i) for i in range(256)]]
    for problems in [*sources, held_out_problems(config.task, config.eval.questions)]:
        encode_prompts(tokenizer, problems, range(len(problems)), config.rollout.max_prompt_tokens)


def load_policy(config, setting: Setting, workdir: Path, base: bool) -> tuple[int, Any]:
    """A run's newest policy, or with `base` the model it began with; its step, and the parameters on the mesh."""
    if base:
        return 0, load(setting.source, mesh=setting.mesh, param_dtype=config.model.param_dtype)[1]
    shapes = param_shapes(setting.model, config.model.param_dtype)
    return restore_policy(workdir, shapes, shardings(setting.mesh, shapes))
