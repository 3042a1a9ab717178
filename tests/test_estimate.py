"""Estimated seconds follow from what a chip can do, by hand."""

import dataclasses

import pytest

from grpo_jax.planning import estimate, needs
from grpo_jax.planning.estimate import (
    COLLECTIVE_SECONDS,
    HOST_READ_SECONDS,
    LAUNCH_SECONDS,
    LINK_FRACTION,
    MEMORY_FRACTION,
    PRODUCT_FRACTION,
    Load,
    Sent,
    decode_load,
    estimate_run,
    link_speed,
    placement_load,
    prefill_load,
    time_load,
    training_load,
)
from grpo_jax.planning.programs import rollout_sizes
from grpo_jax.planning.topology import Chip
from tests.test_needs import COMPLETION, run_of

TPU = Chip("tpu", 2**30, bandwidth=1e9, flops=1e12, link_bandwidth=1e8, network_bandwidth=1e6)
GPU = TPU._replace(platform="gpu")
SIZES = dict(data=1, fsdp=8, expert=1, tensor=4)


def counts_of(**given) -> dict:
    zeros = dict(product_flops=0.0, attention_flops=0.0, bytes=0.0, kernels=0.0, host_reads=0.0, collectives=[])
    return {"counts": zeros | given}


def test_the_slowest_limit_determines_the_time():
    load = Load(flops=6e12, bytes=4e9, sent=(Sent(("fsdp",), 1e8, 2),), kernels=1e6, host_reads=1e5)
    on_tpu = time_load(TPU, SIZES, load)
    assert on_tpu.products == 6 / PRODUCT_FRACTION
    assert on_tpu.memory == 4 / MEMORY_FRACTION
    assert on_tpu.links == pytest.approx(2 / LINK_FRACTION + 2 * COLLECTIVE_SECONDS)
    assert (on_tpu.launches, on_tpu.limit, on_tpu.total) == (0, "products", on_tpu.products)
    apart = time_load(TPU, SIZES, load, overlap=False)
    assert apart.total == on_tpu.products + on_tpu.links
    fast = load._replace(flops=0, bytes=0, sent=())
    launches = 1e6 * LAUNCH_SECONDS + 1e5 * HOST_READ_SECONDS
    assert time_load(GPU, SIZES, fast)[:1] == (launches,) and time_load(GPU, SIZES, fast).limit == "launches"
    assert time_load(TPU, SIZES, load._replace(flops=0)).limit == "memory"
    assert time_load(TPU, SIZES, load._replace(flops=0, bytes=0)).limit == "links"


def test_groups_of_gpus_on_several_hosts_use_the_network():
    """The tensor axis is innermost: 4 neighbors on a host; the 8 groups of fsdp lie on 4 hosts."""
    assert link_speed(GPU, SIZES, ("tensor",)) == LINK_FRACTION * 1e8
    assert link_speed(GPU, SIZES, ("fsdp",)) == LINK_FRACTION * 1e6
    assert link_speed(GPU, SIZES, ("fsdp", "tensor")) == LINK_FRACTION * 1e6
    assert link_speed(TPU, SIZES, ("fsdp",)) == LINK_FRACTION * 1e8
    assert link_speed(GPU, dict(data=1, fsdp=8, expert=1, tensor=1), ("fsdp",)) == LINK_FRACTION * 1e8


def test_a_rollout_takes_its_steps_at_every_size_of_the_cache():
    """4 prompts, 2 completions each, in 4 slots: each of two waves decodes COMPLETION tokens."""
    run = run_of(slots=4)
    seconds = estimate_run(run, TPU).rollout
    counted = {name: counts_of() for name in ("placement", "prefill")}
    first, last = rollout_sizes(run)[0], rollout_sizes(run)[-1]
    assert first == last
    step = time_load(TPU, dict(run.mesh.shape), decode_load(run, last), overlap=False)
    assert estimate_run(run, TPU, counted).rollout.total == pytest.approx(2 * COMPLETION * step.total)
    assert estimate_run(run._replace(slots=8), TPU, counted).rollout.total < seconds.total


def test_steps_between_two_compiled_sizes_are_interpolated():
    run = run_of(slots=8)
    rollout = dataclasses.replace(run.cfg.rollout, max_tokens=1000)
    run = run._replace(cfg=dataclasses.replace(run.cfg, rollout=rollout))
    sizes = rollout_sizes(run)
    results = {name: counts_of() for name in ("placement", "prefill")}
    results[f"decode {sizes[0]}"] = counts_of(bytes=8e8 * sizes[0])
    results[f"decode {sizes[-1]}"] = counts_of(bytes=8e8 * sizes[-1])
    steps = [after - before for before, after in zip([32, *sizes], sizes, strict=False)]
    assert sum(steps) == 1000
    expected = sum(count * size for count, size in zip(steps, sizes, strict=True))
    assert estimate_run(run, TPU, results).rollout.total == pytest.approx(expected)


def test_columns_that_only_fill_the_last_tile_take_no_steps(monkeypatch):
    run = run_of(slots=8)
    columns, counts = rollout_sizes(run)[-1], counts_of(bytes=8e9)
    exact = estimate_run(run, TPU, {f"decode {columns}": counts}).rollout
    monkeypatch.setattr(estimate, "rollout_sizes", lambda run: [columns + 32])
    assert estimate_run(run, TPU, {f"decode {columns + 32}": counts}).rollout == exact


def test_counts_replace_formulas():
    run = run_of()
    results = {"update": counts_of(product_flops=5e12, attention_flops=1e12), "scoring": counts_of(bytes=8e9)}
    made = estimate_run(run, TPU, results)
    assert made.update.total == 6 / PRODUCT_FRACTION
    assert made.scoring.total == 8 / MEMORY_FRACTION
    assert made.mfu == needs.update_work(run, remat=False).flops / (made.update.total * 1e12)
    assert made.step == made.update.total + made.rollout.total + made.scoring.total
    assert made.tokens_per_second == 8 * COMPLETION / made.rollout.total
    assert made.cost(4, 2.0) == pytest.approx(1000 * made.step / 3600 * 4 * 2)


def test_a_rollout_is_shared_by_its_updates_and_without_a_penalty_nothing_is_scored():
    run = run_of(kl_coef=0.0)
    run = run._replace(cfg=dataclasses.replace(run.cfg, train=dataclasses.replace(run.cfg.train, epochs=3)))
    results = {"update": counts_of(bytes=MEMORY_FRACTION * 1e9), "scoring": counts_of(bytes=1e12)}
    made = estimate_run(run, TPU, results)
    assert made.scoring.total == 0
    assert made.step == pytest.approx(1 + made.rollout.total / 3)
    train = dataclasses.replace(run.cfg.train, minibatches=2)
    made = estimate_run(run._replace(cfg=dataclasses.replace(run.cfg, train=train)), TPU, results)
    assert made.step == pytest.approx(1 + made.rollout.total / 6)


def test_the_speed_of_a_rollout_is_that_of_one_chip():
    made = estimate_run(run_of(data=2, tensor=2), TPU)
    assert made.tokens_per_second == 8 * COMPLETION / made.rollout.total / 4


def test_collectives_of_an_update_by_formula():
    """Each micro-batch gathers the weights over fsdp twice and scatters float32 gradients once; 3 parts of 4 move."""
    run = run_of(fsdp=4, tensor=2)
    batch, work = needs.updated_batch(run), needs.update_work(run)
    load = training_load(run, batch, work, backward=True)
    assert load.flops == pytest.approx(work.flops)
    over = {axes: sum(s.bytes * s.count for s in load.sent if s.axes == (axes,)) for axes in ("fsdp", "tensor")}
    weights = needs.matrices(run.model_cfg, 2)
    micro_batches = batch.micro_batches
    assert over["fsdp"] == pytest.approx(micro_batches * 3 / 4 * (weights.layers + weights.head) * 4 * 3)
    assert over["tensor"] == pytest.approx(micro_batches * 6 * 2 * batch.width * 32 * 4)
    forward = training_load(run, batch, work, backward=False)
    assert sum(s.bytes * s.count for s in forward.sent if s.axes == ("fsdp",)) == pytest.approx(over["fsdp"] / 3)


def test_loads_of_a_rollout_by_formula():
    """By hand, on a mesh of its own: 4 float32 activations of width 32 are summed twice in each of 2 layers."""
    run = run_of(fsdp=8, rollout_sizes=dict(data=2, tensor=4))
    memory, ring = needs.run_memory(run), 2 * 3 / 4 * 32 * 4
    decode, prefill, placement = decode_load(run, 96), prefill_load(run), placement_load(run)
    assert decode.sent == (Sent(("tensor",), 4 * ring, 4),)
    assert prefill.sent == (Sent(("tensor",), 2 * 32 * ring, 4),)  # 2 of the 4 prompts, of 32 tokens
    assert (decode.bytes, prefill.bytes) == (needs.decode_bytes(run, 96), memory.rollout_weights)
    assert placement.sent == (Sent(("fsdp",), 7 / 8 * memory.rollout_weights, 1),)
    # A third of the state is the policy, the rest are the moments of AdamW.
    assert placement.bytes == memory.state / 3 + memory.rollout_weights
    assert placement_load(run_of(data=8)).sent == decode_load(run_of(data=8), 96).sent == ()


def test_replicas_sum_their_part_of_the_gradients():
    """The gradients are float32 and split over fsdp; a ring of 2 sends half of them twice. Weights are read 3 times."""
    run = run_of(data=2, fsdp=2)
    batch, weights = needs.updated_batch(run), needs.matrices(run.model_cfg, 1)
    parameters = batch.micro_batches * (weights.layers + weights.head)
    load = training_load(run, batch, needs.update_work(run), backward=True)
    sums = [s.bytes * s.count for s in load.sent if s.axes == ("data",)]
    assert sums == [pytest.approx(parameters / 2 * 4)]
    assert load.bytes == pytest.approx(parameters * (3 * 4 + 8 / 2))
    forward = training_load(run, batch, needs.update_work(run), backward=False)
    assert forward.bytes == pytest.approx(parameters * 4) and {s.axes for s in forward.sent} == {("fsdp",)}
