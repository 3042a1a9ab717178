"""Settings that would make a run fit, the cheapest first."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

from grpo_jax.config.keys import flatten, key_specs
from grpo_jax.config.rules import NO_EFFECT
from grpo_jax.config.schema import Config
from grpo_jax.parallel.mesh import rollout_axis_sizes
from grpo_jax.planning import needs
from grpo_jax.planning.programs import RunShapes
from grpo_jax.rollout.memory import best_plan

MAX_TIMES_MORE_CHIPS = 64


class Remedy(NamedTuple):
    """A change of settings."""

    settings: str  # as a user would write it
    saves: dict[str, int]  # bytes by phase, by formula
    suffices: bool  # whether the run would start, and fit, with this change alone


def change_config(run: RunShapes, section: str, **values) -> RunShapes:
    """Returns the run with other values in a section of its config."""
    changed = dataclasses.replace(getattr(run.cfg, section), **values)
    return run._replace(cfg=dataclasses.replace(run.cfg, **{section: changed}))


def set_key(run: RunShapes, name: str, value: Any) -> tuple[str, RunShapes]:
    """Sets a key of the config, and keys that then have no effect to their defaults, which checking a config requires.

    Returns:
        The settings as a user would write them, and the run with them.
    """
    specs, values = key_specs(Config), flatten(dataclasses.asdict(run.cfg))
    idle = [key for switch, offs, keys in NO_EFFECT if switch == name and value in offs for key in keys]
    changes = {name: value} | {key: specs[key].default for key in idle if values[key] != specs[key].default}
    for key, new in changes.items():
        section, _, field = key.partition(".")
        run = change_config(run, section, **{field: new})
    return " ".join(f"{key}={new}" for key, new in changes.items()), run


def resize_mesh(mesh: AbstractMesh, **sizes: int) -> AbstractMesh:
    """Returns a mesh with other sizes of some axes."""
    return mesh.update(axis_sizes=tuple(sizes.get(axis, size) for axis, size in mesh.shape.items()))


def rollout_changes(run: RunShapes) -> Iterator[tuple[str, RunShapes]]:
    """Yields the changes that affect only rollouts: fewer slots, and weights split further."""
    shards, slots = math.prod(run.rollout_mesh.axis_sizes[:3]), needs.shard_slots(run)
    while slots > 1:
        slots //= 2
        fewer = change_config(run, "rollout", slots=slots * shards)
        yield f"rollout.slots={slots * shards}", fewer._replace(slots=slots * shards)
    expert, tensor = run.rollout_mesh.shape["expert"], run.rollout_mesh.shape["tensor"]
    for factor in (2, 4, 8):
        if shards // expert % factor == 0 and run.model_cfg.num_heads % (tensor * factor) == 0:
            mesh = run.mesh.update(axis_sizes=rollout_axis_sizes(run.mesh, tensor * factor, expert))
            split = dataclasses.replace(run.cfg.rollout.mesh, tensor=tensor * factor)
            yield (
                f"rollout.mesh.tensor={split.tensor}",
                change_config(run, "rollout", mesh=split)._replace(rollout_mesh=mesh),
            )


def training_changes(run: RunShapes) -> Iterator[tuple[str, RunShapes]]:
    """Yields the changes to how updates are computed: smaller micro-batches, less that is kept, another mesh."""
    longest = run.cfg.rollout.max_prompt_tokens + run.cfg.rollout.max_tokens
    if needs.updated_batch(run).width > -(-longest // 128) * 128:
        yield f"train.micro_tokens={longest}", change_config(run, "train", micro_tokens=longest)
    if run.model_cfg.remat != "layers":
        model_cfg = dataclasses.replace(run.model_cfg, remat="layers")
        yield "train.remat=layers", change_config(run, "train", remat="layers")._replace(model_cfg=model_cfg)
    data, fsdp, tensor = (run.mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    if data > 1:
        yield f"mesh.data=1 mesh.fsdp={data * fsdp}", run._replace(mesh=resize_mesh(run.mesh, data=1, fsdp=data * fsdp))
    for factor in (2, 4, 8):
        if fsdp % factor == 0 and run.model_cfg.num_heads % (tensor * factor) == 0:
            mesh = resize_mesh(run.mesh, fsdp=fsdp // factor, tensor=tensor * factor)
            yield f"mesh.tensor={tensor * factor} mesh.fsdp={fsdp // factor}", run._replace(mesh=mesh)


def hardware_and_state_changes(run: RunShapes) -> Iterator[tuple[str, RunShapes]]:
    """Yields what costs most: more chips, less precise or smaller state, and no reference."""
    chips, factor = math.prod(run.mesh.axis_sizes), 2
    while factor <= MAX_TIMES_MORE_CHIPS:
        mesh = resize_mesh(run.mesh, fsdp=run.mesh.shape["fsdp"] * factor)
        rollout_mesh = resize_mesh(run.rollout_mesh, data=run.rollout_mesh.shape["data"] * factor)
        yield f"{chips * factor} chips", run._replace(mesh=mesh, rollout_mesh=rollout_mesh)
        factor *= 2
    if run.cfg.optim.name != "adafactor":
        if run.cfg.optim.mu_dtype == "float32":
            yield set_key(run, "optim.mu_dtype", "bfloat16")
        yield set_key(run, "optim.name", "adafactor")
    if run.cfg.loss.kl_coef:
        yield set_key(run, "loss.kl_coef", 0)


def has_room(run: RunShapes, memory_bytes: int) -> bool:
    """Returns whether the slots that the config asks for, or at least one on each data shard, fit beside the state."""
    rollout, (state, reference, _) = run.cfg.rollout, needs.training_memory(run.cfg, run.model_cfg, run.mesh)
    plan = best_plan(run.cfg, run.model_cfg, run.mesh, state + reference, memory_bytes)
    return plan.max_slots >= max(1, min(rollout.slots, rollout.prompts * rollout.samples))


def find_remedies(run: RunShapes, excess: dict[str, int], memory_bytes: int) -> list[Remedy]:
    """Returns the changes that help, the cheapest first.

    Of the changes of one setting, only the smallest that suffices is returned, or the largest if none does.

    Args:
        run: The run.
        excess: The bytes that each phase ("rollout", "update") holds beyond what a chip has; negative if it fits.
        memory_bytes: The memory of a chip, of which training leaves more unused than a plan when it chooses the slots.
    """
    run = run._replace(mesh=run.mesh.abstract_mesh, rollout_mesh=run.rollout_mesh.abstract_mesh)
    before, best = needs.phase_peaks(run), {}
    for changes in (rollout_changes, training_changes, hardware_and_state_changes):
        for settings, changed in changes(run):
            name = "chips" if settings.endswith("chips") else settings.split("=")[0]
            if name in best and best[name].suffices:
                continue
            after = needs.phase_peaks(changed)
            saves = {phase: before[phase] - after[phase] for phase in before}
            if any(saves[phase] > 0 and excess[phase] > 0 for phase in before):
                enough = all(saves[phase] >= excess[phase] for phase in before)
                best[name] = Remedy(settings, saves, suffices=enough and has_room(changed, memory_bytes))
    return list(best.values())
