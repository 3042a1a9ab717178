"""The state of a run: everything that changes while it trains, where it comes from and how it is saved."""

import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.config.schema import Config
from grpo_jax.learn.optimizer import init_train_state, make_optimizer, train_state_shapes, train_state_shardings
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.run import checkpoint
from grpo_jax.run.context import RunContext, load_base_model
from grpo_jax.run.progress import phase
from grpo_jax.run.saving import CheckpointStore
from grpo_jax.types import Experience, TrainState


class UpdateInFlight(NamedTuple):
    """An update that has been dispatched; the devices may still be computing it."""

    metrics: dict[str, jax.Array]  # on the devices
    rollout_metrics: dict[str, float] | None  # of the rollout, if this is its first update; otherwise None
    times: dict[str, float]  # the time/ metrics of the step that are already known
    start: float  # when the host began to pack the minibatch, by `time.monotonic`
    packed: float  # when it had packed it
    end: float = 0.0  # when the devices finished; 0 while it is not known


class RunState(NamedTuple):
    """Everything that changes while a run trains. A checkpoint holds all of it."""

    step: int  # updates dispatched so far
    train: TrainState  # the policy and its optimizer, on the devices
    reference: Any  # the parameters of the reference, on the devices; None if `loss.kl_coef` is 0
    experience: Experience | None  # the rollout that the next update learns from; None if it must be sampled first
    rollout_metrics: dict[str, float]  # metrics of the current rollout, repeated on the line of each of its updates
    skipped_in_a_row: int  # skipped updates in a row, up to the last update whose metrics were fetched
    failure: str  # why the run must stop; empty if it may continue
    flight: UpdateInFlight | None = None  # the last update, until its metrics are fetched; None in a checkpoint
    unlogged: dict[str, float] | None = None  # metrics of the last update, if they are fetched but not logged yet


def wait_for_update(run: RunState) -> RunState:
    """Blocks until the devices have finished the update in flight, if there is one, and stores the time."""
    if run.flight is None or run.flight.end:
        return run
    with phase(f"Waiting for update {run.step}"):
        jax.block_until_ready(run.flight.metrics)
    return run._replace(flight=run.flight._replace(end=time.monotonic()))


def describe_failure(cfg: Config, skipped_in_a_row: int, step: int) -> str:
    """Returns why a run must stop after `step`, or an empty string if it may continue."""
    if skipped_in_a_row < cfg.optim.max_skips:
        return ""
    last_change = step - skipped_in_a_row
    return (
        f"Updates were not finite {skipped_in_a_row} times in a row (steps {last_change + 1} to {step}), so they did "
        f"not change the policy of step {last_change}. Look at metrics.jsonl and samples/, then start again "
        "in a new --workdir with a lower optim.lr."
    )


@phase("Loading the weights")
def start_or_resume(cfg: Config, context: RunContext, workdir: Path) -> tuple[RunState, jax.Array]:
    """Restores the newest sound checkpoint of a run, or starts a new run from the base model.

    Returns:
        (run, root_key): The state, and the key that every random key of the run is folded from.

    Raises:
        UserError: The run has checkpoints, but none is sound.
    """
    run = checkpoint.restore_newest(workdir, partial(resume, cfg, context, workdir))
    if run:
        return run
    optimizer = make_optimizer(cfg.optim)
    params = load_base_model(cfg, context)
    reference = as_reference(cfg, params) if cfg.loss.kl_coef else None
    run = RunState(0, init_train_state(context.mesh, params, optimizer), reference, None, {}, 0, "")
    return run, jax.random.key(cfg.seed)


def as_reference(cfg: Config, params: Any) -> Any:
    """Returns a copy of the base model's parameters in the dtype of the reference."""
    return jax.tree.map(lambda x: jnp.array(x, cfg.model.reference_dtype), params)


def resume(cfg: Config, context: RunContext, workdir: Path, step: int) -> tuple[RunState, jax.Array]:
    """Restores the checkpoint of a step as `start_or_resume` does.

    Raises:
        Damaged: It is not sound.
    """
    mesh, optimizer = context.mesh, make_optimizer(cfg.optim)
    shapes = param_shapes(context.model_cfg, cfg.model.param_dtype)
    state_shapes = train_state_shapes(shapes, optimizer), train_state_shardings(mesh, shapes, optimizer)
    state, meta, experience = checkpoint.restore_step(workdir, step, *state_shapes)
    reference = None
    if cfg.loss.kl_coef:
        shapes = param_shapes(context.model_cfg, cfg.model.reference_dtype)

        def load_base():
            return as_reference(cfg, load_base_model(cfg, context))

        digests, shardings = meta["digests"]["reference"], tree_shardings(mesh, shapes)
        is_replaced = is_reference_replaced(cfg, step)
        reference = checkpoint.restore_reference(workdir, step, is_replaced, digests, shapes, shardings, load_base)
    failure = describe_failure(cfg, meta["skipped_in_a_row"], step)
    run = RunState(step, state, reference, experience, meta["rollout"], meta["skipped_in_a_row"], failure)
    run = run._replace(unlogged=meta["unlogged"])
    return run, jax.random.wrap_key_data(jnp.asarray(meta["key"], jnp.uint32))


@partial(jax.jit, donate_argnums=0, keep_unused=True)
def replace_params(old, new):
    """Returns a copy of `new` in the dtypes of `old`, which is donated."""
    return jax.tree.map(lambda x, y: y.astype(x.dtype), old, new)


def replace_reference(cfg: Config, run: RunState) -> RunState:
    """Replaces the reference with the policy if `reference.every_updates` requires it after `run.step`.

    The updates of the current rollout continue to use its log-probs under the former reference.
    """
    every = cfg.reference.every_updates
    if not every or run.step % every:
        return run
    is_reference = run.train.is_reference | (run.experience is None)
    reference = replace_params(run.reference, run.train.params)
    return run._replace(reference=reference, train=run.train.replace(is_reference=is_reference))


def is_reference_replaced(cfg: Config, step: int) -> bool:
    """Returns whether the policy has replaced the initial reference by a step, so that checkpoints hold the new one."""
    return 0 < cfg.reference.every_updates <= step


def checkpoint_bytes(cfg: Config, run: RunState, store: CheckpointStore) -> int:
    """Returns approximately how many bytes the next checkpoint of a run takes."""
    experience = vars(run.experience) if run.experience else None
    reference = run.reference if is_reference_replaced(cfg, run.step) or not store.has_reference else None
    arrays = (run.train.params, run.train.opt_state, experience, reference)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))


@phase("Saving a checkpoint")
def save_run(
    cfg: Config,
    store: CheckpointStore,
    run: RunState,
    root_key: jax.Array,
    started_with: dict[str, Any],
    line: dict[str, Any],
) -> None:
    """Starts saving a checkpoint of a run. As soon as the call returns, the next update may donate the run's arrays.

    Args:
        cfg: The run's config.
        store: The run's checkpoints.
        run: The state.
        root_key: The key that every random key of the run is folded from.
        started_with: The values of config.json by dotted name, which a resume compares (see `check_trained_config`).
        line: The line of the step in metrics.jsonl; empty if it waits for an evaluation.
    """
    meta = {
        "step": run.step,
        "config": started_with,
        "key": jax.random.key_data(root_key).tolist(),
        "rollout": run.rollout_metrics,
        "skipped_in_a_row": run.skipped_in_a_row,
        "line": line,
        "unlogged": run.unlogged,
    }
    store.save(run.train, meta, run.experience, run.reference, is_reference_replaced(cfg, run.step))
