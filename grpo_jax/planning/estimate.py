"""Estimates how long a run's programs take on a chip, which limit binds, and what a run costs.

A program takes as long as its products, its memory traffic, its collectives or its kernel launches, whichever takes
longest. While decoding, nothing overlaps with collectives, so their time is added. What compiled programs were counted
to do is used where it is known, and formulas elsewhere. Work of the host (grading, packing) is not included.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from grpo_jax.parallel.mesh import num_data_shards
from grpo_jax.planning import needs
from grpo_jax.planning.programs import RunShapes, rollout_sizes
from grpo_jax.planning.topology import GPUS_PER_HOST, Chip

# The fractions of a chip's published figures that large programs reach, and the times of small ones. These are
# assumptions, which no run has confirmed yet.
PRODUCT_FRACTION = 0.6
MEMORY_FRACTION = 0.8
LINK_FRACTION = 0.5  # a ring along one mesh axis uses a part of a chip's links
COLLECTIVE_SECONDS = 5e-6  # of a collective that moves next to nothing
LAUNCH_SECONDS = 1.9e-6  # of a GPU's kernel in a graph
KERNELS_PER_LAYER = 12  # that decoding launches on a GPU, if no program was counted
HOST_READ_SECONDS = 15e-6  # of a predicate that a GPU's host waits for


class Sent(NamedTuple):
    """Equal collectives."""

    axes: tuple[str, ...]  # of the mesh
    bytes: float  # that a chip sends in each
    count: float


class Load(NamedTuple):
    """What a program asks of one chip."""

    flops: float
    bytes: float  # of memory traffic
    sent: tuple[Sent, ...] = ()
    kernels: float = 0.0
    host_reads: float = 0.0

    def times(self, count: float) -> "Load":
        """Returns the load of running the program `count` times."""
        sent = tuple(each._replace(count=count * each.count) for each in self.sent)
        return Load(count * self.flops, count * self.bytes, sent, count * self.kernels, count * self.host_reads)


class Seconds(NamedTuple):
    """How long a program takes, and each of the limits by itself."""

    total: float
    products: float
    memory: float
    links: float
    launches: float

    @property
    def limit(self) -> str:
        """Returns the limit that takes longest."""
        return max(("products", "memory", "links", "launches"), key=lambda name: getattr(self, name))

    def then(self, other: "Seconds") -> "Seconds":
        """Returns the seconds of one program after the other."""
        return Seconds(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def times(self, count: float) -> "Seconds":
        """Returns the seconds of `count` runs."""
        return Seconds(*(count * value for value in self))


class Estimate(NamedTuple):
    """What a run is expected to take on its chips."""

    rollout: Seconds  # placement, prefill and decoding of a whole rollout
    scoring: Seconds  # of a whole rollout; 0 without a reference
    update: Seconds  # of one update
    step: float  # seconds of one update with its share of rollout and scoring
    tokens_per_second: float  # that a rollout samples, per chip
    mfu: float  # model FLOPs utilization of the update

    def cost(self, chips: int, price: float, steps: int = 1000) -> float:
        """Returns what this many updates cost at a price per chip and hour."""
        return steps * self.step / 3600 * chips * price


def link_speed(chip: Chip, sizes: Mapping[str, int], axes: tuple[str, ...]) -> float:
    """Returns the bytes per second that a chip sends to others along mesh axes.

    Args:
        chip: The chip.
        sizes: Sizes of the mesh axes. Devices are numbered along the last axis first.
        axes: The axes.
    """
    names = list(sizes)
    reach = max((math.prod(sizes[name] for name in names[names.index(axis) :]) for axis in axes), default=1)
    leaves_host = chip.platform == "gpu" and reach > GPUS_PER_HOST
    return LINK_FRACTION * (chip.network_bandwidth if leaves_host else chip.link_bandwidth)


def time_load(chip: Chip, sizes: Mapping[str, int], load: Load, *, overlap: bool = True) -> Seconds:
    """Returns how long a chip takes for a load.

    Args:
        chip: The chip.
        sizes: Sizes of the axes of the program's mesh.
        load: What the program does.
        overlap: Whether collectives overlap with the rest.
    """
    products = load.flops / (PRODUCT_FRACTION * chip.flops)
    memory = load.bytes / (MEMORY_FRACTION * chip.bandwidth)
    links = sum(
        each.count * (each.bytes / link_speed(chip, sizes, each.axes) + COLLECTIVE_SECONDS) for each in load.sent
    )
    is_gpu = chip.platform == "gpu"
    launches = load.kernels * LAUNCH_SECONDS + load.host_reads * HOST_READ_SECONDS if is_gpu else 0.0
    slowest = max(products, memory, launches)
    return Seconds(max(slowest, links) if overlap else slowest + links, products, memory, links, launches)


def counted_load(counts: Mapping) -> Load:
    """Returns the load that a compiled program was counted to be (the fields of `counts.ProgramCounts`)."""
    sent = tuple(Sent(tuple(each["axes"]), each["sent_bytes"], each["count"]) for each in counts["collectives"])
    flops = counts["product_flops"] + counts["attention_flops"]
    return Load(flops, counts["bytes"], sent, counts["kernels"], counts["host_reads"])


def ring(devices: int) -> float:
    """Returns the part of an array that a device sends when a ring of devices gathers or scatters it."""
    return (devices - 1) / devices


def tensor_sums(run: RunShapes, sizes: Mapping[str, int], tokens: float, per_layer: float) -> tuple[Sent, ...]:
    """Returns the sums over the tensor axis of the activations of this many tokens, `per_layer` in each layer."""
    if sizes["tensor"] == 1:
        return ()
    array = tokens * run.model_cfg.hidden_size * itemsize(run.model_cfg.compute_dtype)
    return (Sent(("tensor",), 2 * ring(sizes["tensor"]) * array, per_layer * run.model_cfg.num_layers),)


def itemsize(dtype: str) -> int:
    """Returns the bytes of a number."""
    return 2 if dtype == "bfloat16" else 4


def decode_load(run: RunShapes, columns: int) -> Load:
    """Returns the least load of one decode step."""
    sent = tensor_sums(run, run.rollout_mesh.shape, needs.shard_slots(run), 2)
    kernels, reads = KERNELS_PER_LAYER * run.model_cfg.num_layers, 2
    return Load(needs.decode_work(run, columns).flops, needs.decode_bytes(run, columns), sent, kernels, reads)


def prefill_load(run: RunShapes) -> Load:
    """Returns the least load of prefilling the prompts of a rollout."""
    tokens = needs.shard_prompts(run) * run.cfg.rollout.max_prompt_tokens
    sent = tensor_sums(run, run.rollout_mesh.shape, tokens, 2)
    return Load(needs.prefill_work(run).flops, needs.run_memory(run).rollout_weights, sent)


def placement_load(run: RunShapes) -> Load:
    """Returns the least load of placing the weights: each chip receives those that it does not hold, and writes all."""
    memory, fsdp = needs.run_memory(run), run.mesh.shape["fsdp"]
    sent = (Sent(("fsdp",), ring(fsdp) * memory.rollout_weights, 1),) if fsdp > 1 else ()
    return Load(0, memory.state / 3 + memory.rollout_weights, sent)


def training_load(run: RunShapes, batch: needs.FullBatch, work: needs.Work, *, backward: bool) -> Load:
    """Returns the least load of the passes over a batch.

    Layers are gathered over fsdp in the compute dtype for each micro-batch, and once more for its backward pass, after
    which their float32 gradients are scattered. Activations are not counted as memory traffic.
    """
    sizes, model_cfg = run.mesh.shape, run.model_cfg
    weights = needs.matrices(model_cfg, sizes["tensor"])
    parameters = weights.layers + weights.head
    size, passes = itemsize(model_cfg.compute_dtype), 3 if backward else 1
    moved = passes * parameters * size + (8 * parameters / sizes["fsdp"] if backward else 0)
    sent = tensor_sums(run, sizes, batch.width, 6 if backward else 2)
    layers = model_cfg.num_layers
    if sizes["fsdp"] > 1:
        gathered = ring(sizes["fsdp"]) * parameters / layers
        sent += (Sent(("fsdp",), gathered * size, (2 if backward else 1) * layers),)
        sent += (Sent(("fsdp",), gathered * 4, layers),) if backward else ()
    if sizes["data"] > 1 and backward:
        sent += (Sent(("data",), 8 * ring(sizes["data"]) * parameters / sizes["fsdp"] / layers, layers),)
    flops = work.flops / batch.micro_batches
    return Load(flops, moved, sent).times(batch.micro_batches)


def rollout_seconds(run: RunShapes, chip: Chip, counted: Mapping[str, Load]) -> Seconds:
    """Returns the seconds of a rollout in which every completion has full length.

    Args:
        run: The run.
        chip: The chip.
        counted: Loads of compiled programs by name; those of `decode` are of one step.
    """
    shapes = dict(run.rollout_mesh.shape)
    placement = time_load(chip, dict(run.mesh.shape), counted.get("placement") or placement_load(run))
    seconds = placement.then(time_load(chip, shapes, counted.get("prefill") or prefill_load(run)))
    sequences = -(-run.cfg.rollout.prompts * run.cfg.rollout.samples // num_data_shards(run.rollout_mesh))
    waves = -(-sequences // needs.shard_slots(run))
    sizes, position = rollout_sizes(run), run.cfg.rollout.max_prompt_tokens
    longest = position + run.cfg.rollout.max_tokens
    ends = [counted.get(f"decode {size}") for size in (sizes[0], sizes[-1])]
    for columns in sizes:
        steps = max(0, min(columns, longest) - position)
        position += steps
        if all(ends):
            smallest, largest = (time_load(chip, shapes, load, overlap=False) for load in ends)
            share = (columns - sizes[0]) / max(1, sizes[-1] - sizes[0])  # all limits are linear in the columns
            step = smallest.times(1 - share).then(largest.times(share))
        else:
            step = time_load(chip, shapes, decode_load(run, columns), overlap=False)
        seconds = seconds.then(step.times(steps * waves))
    return seconds


def estimate_run(run: RunShapes, chip: Chip, results: Mapping[str, Mapping] | None = None) -> Estimate:
    """Estimates the seconds of a run's phases.

    Args:
        run: The run.
        chip: The chip.
        results: What compiling its programs gave, by name. The `counts` of a decode program are those of one step.
    """
    counted = {name: counted_load(each["counts"]) for name, each in (results or {}).items() if each.get("counts")}
    cfg, sizes = run.cfg, dict(run.mesh.shape)
    rollout = rollout_seconds(run, chip, counted)
    scored, updated = needs.scored_batch(run), needs.updated_batch(run)
    scoring = Seconds(0, 0, 0, 0, 0)
    if cfg.loss.kl_coef:
        load = training_load(run, scored, needs.forward_work(run, scored), backward=False)
        scoring = time_load(chip, sizes, counted.get("scoring") or load)
    load = training_load(run, updated, needs.update_work(run), backward=True)
    update = time_load(chip, sizes, counted.get("update") or load)
    step = update.total + (rollout.total + scoring.total) / (cfg.train.minibatches * cfg.train.epochs)
    tokens = cfg.rollout.prompts * cfg.rollout.samples * cfg.rollout.max_tokens
    return Estimate(
        rollout,
        scoring,
        update,
        step,
        tokens_per_second=tokens / rollout.total / math.prod(sizes.values()),
        mfu=needs.update_work(run, remat=False).flops / (update.total * chip.flops),
    )
