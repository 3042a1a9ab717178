"""Searches for the mesh, the rollout mesh, the decode slots and the micro-batch that make a run fast, by formula."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from jax.sharding import AbstractMesh

from grpo_jax.config.schema import Config
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.parallel.mesh import num_data_shards
from grpo_jax.planning import needs
from grpo_jax.planning.estimate import Estimate, estimate_run
from grpo_jax.planning.programs import RunShapes
from grpo_jax.planning.remedies import change_config, resize_mesh
from grpo_jax.planning.topology import Chip
from grpo_jax.rollout.memory import USABLE_FRACTION, rollout_memory, rollout_meshes

MAX_TENSOR = 8  # of the training mesh, and the GPUs of a host


class Suggestion(NamedTuple):
    """Settings of a run that should fit, and what it should take."""

    run: RunShapes
    estimate: Estimate

    @property
    def settings(self) -> dict[str, int]:
        """Returns the config keys to set."""
        rollout_mesh = self.run.rollout_mesh.shape
        return {
            **{f"mesh.{axis}": size for axis, size in self.run.mesh.shape.items()},
            "rollout.mesh.tensor": rollout_mesh["tensor"],
            "rollout.mesh.expert": rollout_mesh["expert"],
            "rollout.slots": self.run.slots,
            "train.micro_tokens": self.run.cfg.train.micro_tokens,
        }

    @property
    def flags(self) -> list[str]:
        """Returns the settings as a user writes them on the command line."""
        return [f"--config.{name}={value}" for name, value in self.settings.items()]


def divisors(number: int) -> list[int]:
    """Returns the numbers that divide `number`."""
    return [size for size in range(1, number + 1) if number % size == 0]


def training_meshes(model_cfg: ModelConfig, mesh: AbstractMesh) -> Iterator[AbstractMesh]:
    """Yields meshes over the devices of `mesh`: parameters split over all data shards, over a host, or not at all."""
    chips = math.prod(mesh.axis_sizes)
    experts = model_cfg.experts.num_experts if model_cfg.experts else 1
    for tensor in divisors(math.gcd(chips, model_cfg.num_heads)):
        if tensor > MAX_TENSOR:
            continue
        for expert in divisors(math.gcd(chips // tensor, experts)):
            shards = chips // (tensor * expert)
            for fsdp in sorted({1, math.gcd(shards, max(1, MAX_TENSOR // tensor)), shards}):
                yield resize_mesh(mesh, data=shards // fsdp, fsdp=fsdp, expert=expert, tensor=tensor)


def micro_batches(cfg: Config) -> list[int]:
    """Returns the micro-batch sizes to try: the longest sequence, and two and four times as many tokens."""
    longest = cfg.rollout.max_prompt_tokens + cfg.rollout.max_tokens
    return sorted({longest, 2 * longest, 4 * longest, max(longest, cfg.train.micro_tokens)})


def rollout_choices(cfg: Config, model_cfg: ModelConfig, mesh: AbstractMesh, free_bytes: int):
    """Yields pairs of a rollout mesh and the slots that fit on it.

    Args:
        cfg: The config. `rollout.slots` and `rollout.mesh` limit the choice if they are not 0.
        model_cfg: The model.
        mesh: The mesh of the updates.
        free_bytes: What one chip has besides the state and the reference.
    """
    sequences = cfg.rollout.prompts * cfg.rollout.samples
    for rollout_mesh in rollout_meshes(cfg, model_cfg, mesh):
        memory = rollout_memory(cfg, model_cfg, rollout_mesh, mesh.abstract_mesh)
        shards = num_data_shards(rollout_mesh)
        left = free_bytes - memory.weight_bytes
        if left < memory.placement_bytes:
            continue
        slots = max(0, left - memory.prompt_bytes - memory.prefill_bytes) // memory.slot_bytes
        wanted = min(cfg.rollout.slots or sequences, sequences)
        if slots:
            yield rollout_mesh, min(slots, -(-wanted // shards)) * shards


def rank(made: Suggestion) -> tuple[int, int]:
    """Returns what suggestions are sorted by: the seconds of a step in units of 2%, then the memory that they take."""
    return round(50 * math.log(made.estimate.step)), max(needs.phase_peaks(made.run).values())


def suggest_settings(
    cfg: Config, model_cfg: ModelConfig, mesh: AbstractMesh, chip: Chip, count: int = 3
) -> list[Suggestion]:
    """Returns the fastest settings that fit by formula, at most one for each pair of meshes, the fastest first.

    Args:
        cfg: The config of the run, whose mesh and micro-batch are not used.
        model_cfg: The model.
        mesh: A mesh over all devices, of any sizes.
        chip: What one of them can do.
        count: The number of suggestions.
    """
    best: dict[tuple, Suggestion] = {}
    usable = int(USABLE_FRACTION * chip.memory_bytes)
    for training_mesh in training_meshes(model_cfg, mesh):
        for tokens in micro_batches(cfg):
            run = RunShapes(cfg, model_cfg, training_mesh, training_mesh, training_mesh.size)
            run = change_config(run, "train", micro_tokens=tokens)
            state, reference, _ = needs.training_memory(run.cfg, model_cfg, training_mesh)
            held = state + reference
            if held + needs.update_temporaries(run) > usable:
                continue
            for rollout_mesh, slots in rollout_choices(cfg, model_cfg, training_mesh, usable - held):
                tried = run._replace(rollout_mesh=rollout_mesh, slots=slots)
                made = Suggestion(tried, estimate_run(tried, chip))
                key = training_mesh, rollout_mesh
                if key not in best or made.estimate.step < best[key].estimate.step:
                    best[key] = made
    return sorted(best.values(), key=rank)[:count]
