"""Tests runs with settings of published recipes: reference replacement, updates without a signal, left-out groups."""

import json
import os
import shutil
import warnings
from itertools import chain, pairwise

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import grpo_jax
from grpo_jax.config import check, default
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.run.stages import pack_rows
from grpo_jax.run.state import RunState, replace_reference
from grpo_jax.text.problem import Problem
from grpo_jax.types import Experience, TrainState
from grpo_jax.weights.reading import load
from grpo_jax.weights.source import find_model

PROBLEMS = [Problem(f"What is {a} + 1?", str(a + 1), {"a": a}) for a in range(4)]
COMPLETIONS = 16  # per rollout; an evaluation has 8
# All runs of this module share the shapes of rollouts, so that the sampler compiles once. Two minibatches and two
# epochs make four updates per rollout.
SHAPES = {
    "rollout.prompts": 4,
    "rollout.samples": 4,
    "rollout.max_tokens": 14,
    "rollout.slots": 8,
    "train.minibatches": 2,
    "train.epochs": 2,
    "eval.questions": 8,
    "log.every_steps": 1,
    "log.samples": -1,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
}


def train(workdir, part, keys):
    cfg = default()
    cfg.update_from_flattened_dict(SHAPES | keys)
    grpo_jax.train(cfg, workdir=workdir, problems=PROBLEMS, rewards={"part": part})


def constant(value):
    """Returns a reward part that gives every completion the same reward."""
    return lambda problems, texts, lengths: np.full(len(texts), value)


def vary_first(*rollouts):
    """Returns a reward part with the given rewards in the first rollouts, and 0 in later ones and in evaluations."""
    left = list(rollouts)

    def part(problems, texts, lengths):
        return left.pop(0) if left and len(texts) == COMPLETIONS else np.zeros(len(texts))

    return part


def by_length(problems, texts, lengths):
    return lengths / 14


def read_rows(workdir):
    """Returns the lines of metrics.jsonl after step 0, without times and speeds."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][1:]
    return [{name: row[name] for name in row if name[:5] != "time/" and name[-6:] != "_per_s"} for row in rows]


def column(workdir, name):
    return [row[name] for row in read_rows(workdir)]


def read_records(workdir, step):
    lines = (workdir / "samples" / f"train-{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def restore(workdir, *path):
    """Restores one item of a checkpoint as a list of numpy arrays."""
    with ocp.StandardCheckpointer() as checkpointer:
        return jax.tree.leaves(checkpointer.restore((workdir / "checkpoints").joinpath(*map(str, path)).absolute()))


def are_equal(leaves, others):
    return all(np.array_equal(a, b) for a, b in zip(leaves, others, strict=True))


# Reference replacement. The policy replaces the reference in the middle of a rollout, after updates 3 and 6, and after
# the first update of another rollout, 9.
REPLACED = {
    "loss.kl_coef": 0.1,
    "reference.every_updates": 3,
    "total_steps": 10,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 100,
}


@pytest.fixture(scope="module")
def replaced_run(tmp_path_factory):
    """Returns the workdir of an uninterrupted run. Tests must not change it."""
    workdir = tmp_path_factory.mktemp("replaced") / "run"
    with warnings.catch_warnings(record=True) as caught:
        train(workdir, by_length, REPLACED)
    assert not [warning.message for warning in caught if "donated" in str(warning.message)]
    return workdir


@pytest.mark.slow
def test_every_checkpoint_holds_the_reference_of_its_step(replaced_run):
    base = jax.tree.leaves(load(find_model("tiny"))[1])
    assert are_equal(restore(replaced_run, "reference"), base)
    for step in range(1, 11):
        expected = base if step < 3 else restore(replaced_run, step - step % 3, "policy")
        assert (replaced_run / "checkpoints" / str(step) / "reference").exists() == (step >= 3)
        found = restore(replaced_run, step, "reference") if step >= 3 else restore(replaced_run, "reference")
        assert are_equal(found, expected), step
        assert not are_equal(
            restore(replaced_run, step, "policy"), restore(replaced_run, step - 1, "policy") if step > 1 else base
        )


@pytest.mark.slow
def test_a_rollout_keeps_the_reference_that_it_was_scored_with(replaced_run):
    """Only the first rollout was sampled by the reference itself; the others began at steps 5 and 9."""
    for first, is_reference in ((1, True), (5, False), (9, False)):
        records = read_records(replaced_run, first)
        gap = max(np.abs(np.subtract(r["ref_logps"], r["policy_logps"])).max() for r in records)
        assert (gap < 1e-5) == is_reference


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        2,  # before the first replacement
        3,  # at the replacement, in the middle of a rollout that was scored with the former reference
        4,  # after the replacement, between two rollouts
        7,  # in the middle of a rollout, after the second replacement
        9,
    ],
)
def test_a_resumed_run_continues_with_the_reference_of_its_checkpoint(replaced_run, tmp_path, step):
    workdir = shutil.copytree(replaced_run, tmp_path / "run")
    for later in range(step + 1, 11):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    train(workdir, by_length, REPLACED | {"checkpoint.keep": 1})
    assert sorted(os.listdir(workdir / "checkpoints")) == ["10", "reference"]
    for item in ("policy", "optimizer", "reference"):
        assert are_equal(restore(workdir, 10, item), restore(replaced_run, 10, item)), item
    assert read_rows(workdir) == read_rows(replaced_run)
    for first in (1, 5, 9):
        assert read_records(workdir, first) == read_records(replaced_run, first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_policy_is_copied_into_the_memory_of_the_reference(dtype):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P("data", "tensor"))
    policy = {"x": jax.device_put(jnp.linspace(0.0, 1.0, 4096).reshape(64, 64), sharding)}
    old, values = {"x": jnp.zeros((64, 64), dtype, device=sharding)}, np.asarray(policy["x"])
    is_reference = jax.device_put(np.False_, jax.NamedSharding(mesh, jax.P()))
    state = TrainState(jnp.int32(6), policy, None, jnp.int32(0), is_reference)
    raw = default()
    raw.reference.every_updates = 3
    cfg, run = check(raw), RunState(6, state, old, None, {}, 0, "")

    assert replace_reference(cfg, run._replace(step=5)).reference is old
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replaced = replace_reference(cfg, run)
    assert old["x"].is_deleted() and replaced.train.params is policy
    assert replaced.reference["x"].dtype == dtype and replaced.reference["x"].sharding == sharding
    jax.jit(lambda x: x + 1, donate_argnums=0)(policy["x"])  # as the next update does
    np.testing.assert_array_equal(replaced.reference["x"], values.astype(dtype))


# Updates without a signal.


@pytest.mark.parametrize(
    "reward, keys",
    [
        (0.0, {"loss.kl_coef": 0.1, "reference.every_updates": 3}),  # also in the middle of rollouts, which have 4
        pytest.param(0.0, {"loss.kl_coef": 0.0}, marks=pytest.mark.slow),
        pytest.param(0.0, {"loss.kl_coef": 0.1, "loss.kl_in": "reward", "loss.kl": "k1"}, marks=pytest.mark.slow),
        # In float32, the mean of 16 rewards of 0.7 is not 0.7.
        pytest.param(0.7, {"advantage.mean": "batch", "advantage.std": "none"}, marks=pytest.mark.slow),
    ],
)
def test_without_a_signal_25_updates_change_nothing_but_the_learning_rate(tmp_path, reward, keys):
    schedule = {"optim.lr": 0.01, "optim.schedule": "linear", "optim.warmup_steps": 5, "optim.decay_steps": 55}
    others = {"optim.weight_decay": 0.1, "total_steps": 25, "checkpoint.every_steps": 25}
    train(tmp_path, constant(reward), keys | schedule | others)
    assert are_equal(restore(tmp_path, 25, "policy"), jax.tree.leaves(load(find_model("tiny"))[1]))
    assert not any(np.any(leaf) for leaf in restore(tmp_path, 25, "optimizer"))  # zero moments, and no gradient counted
    assert column(tmp_path, "optim/no_signal") == [1] * 25
    assert column(tmp_path, "optim/skipped") == [0] * 25
    # Updates t = 1 ... 5 have t / 5 of the peak learning rate, which then falls by 1 / 50 of the peak per update.
    rates = [0.002, 0.004, 0.006, 0.008, 0.01] + [0.01 * (1 - t / 50) for t in range(20)]
    np.testing.assert_allclose(column(tmp_path, "optim/lr"), rates, rtol=1e-6)
    if keys.get("loss.kl_in") == "reward":
        assert column(tmp_path, "reward/kl") == [0] * 25


@pytest.mark.parametrize("kl_in, resumed", [("loss", 7), pytest.param("reward", 12, marks=pytest.mark.slow)])
def test_the_penalty_is_a_signal_while_the_policy_is_not_the_reference(tmp_path, kl_in, resumed):
    """Rewards differ only in the first of four rollouts. The policy replaces the reference after updates 6 and 12.

    Update 6 is in the middle of the second rollout, whose last updates still use the base model as the reference. The
    reference of the third rollout is the policy after update 6; that of the fourth is the policy that sampled it.
    A resumed run continues with its reference, and knows whether the policy is equal to it.
    """
    keys = {"loss.kl_coef": 0.1, "loss.kl_in": kl_in, "reference.every_updates": 6}
    differ = np.arange(COMPLETIONS) % 4
    keys |= {"total_steps": 16, "checkpoint.every_steps": 1, "checkpoint.keep": 16}
    train(tmp_path, vary_first(differ), keys)
    assert column(tmp_path, "optim/no_signal") == [0] * 12 + [1] * 4
    policies = [restore(tmp_path, step, "policy") for step in (4, 8, 12, 16)]
    ends = {item: restore(tmp_path, 16, item) for item in ("policy", "optimizer", "reference")}
    assert [are_equal(a, b) for a, b in pairwise(policies)] == [False, False, True]
    assert are_equal(restore(tmp_path, 12, "optimizer"), restore(tmp_path, 16, "optimizer"))
    assert not (tmp_path / "checkpoints" / "5" / "reference").exists()
    for step in (6, 11):
        assert are_equal(restore(tmp_path, step, "reference"), restore(tmp_path, 6, "policy"))
    assert are_equal(restore(tmp_path, 16, "reference"), policies[2])
    assert max(column(tmp_path, "policy/kl_ref")[:12]) > 1e-6 > max(column(tmp_path, "policy/kl_ref")[12:])
    if kl_in == "reward":
        kl = column(tmp_path, "reward/kl")
        assert kl[:4] == [0] * 4 and min(kl[4:12]) > 1e-4 and kl[12:] == [0] * 4
        advantages = np.array([record["advantage"] for record in read_records(tmp_path, 5)])
        assert advantages.all() and not any(record["reward"] for record in read_records(tmp_path, 5))

    rows, records = read_rows(tmp_path), read_records(tmp_path, 9)
    for step in range(resumed + 1, 17):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    train(tmp_path, constant(0.0), keys | {"checkpoint.keep": 1})
    assert read_rows(tmp_path) == rows and read_records(tmp_path, 9) == records
    for item in ("policy", "optimizer", "reference"):
        assert are_equal(restore(tmp_path, 16, item), ends[item]), item


@pytest.mark.slow
def test_an_entropy_bonus_is_always_a_signal(tmp_path):
    train(tmp_path, constant(0.0), {"loss.entropy_coef": 0.01, "loss.kl_coef": 0.0, "total_steps": 2})
    assert column(tmp_path, "optim/no_signal") == [0, 0]
    assert not are_equal(restore(tmp_path, 2, "policy"), jax.tree.leaves(load(find_model("tiny"))[1]))


@pytest.mark.parametrize("std", ["none", "batch", "group"])
def test_rewards_that_are_equal_in_the_whole_batch_have_no_advantage(std):
    """In float32, the mean of equal values may be another value; divided by eps, the difference would be about 0.06."""
    candidates = [jnp.full((4, 3), value) for value in (0.7, 0.1, 0.3, 0.6, 0.9, 1.1, 1.3)]
    rewards = next(rewards for rewards in candidates if jnp.mean(rewards) != rewards[0, 0])
    assert not grpo_jax.advantages(rewards, mean="batch", std=std, eps=1e-6).any()


# Completions that are left out.


def test_an_empty_minibatch_changes_nothing_and_kept_completions_are_divided_evenly(tmp_path):
    """Rewards differ in two of four groups of the first rollout and in none of the second. There are eight minibatches.

    The KL term is a signal only if the minibatch has a completion: otherwise momentum and weight decay would still act.
    """
    keys = {"groups.equal": "drop", "rollout.overlong": "mask", "loss.kl_coef": 0.1, "optim.weight_decay": 0.1}
    keys |= {"train.minibatches": 8, "train.epochs": 1, "total_steps": 10}
    differ = np.where(np.arange(COMPLETIONS) < 8, np.arange(COMPLETIONS) % 4, 1.0)
    train(
        tmp_path, vary_first(differ, np.ones(COMPLETIONS)), keys | {"checkpoint.every_steps": 1, "checkpoint.keep": 10}
    )
    records = read_records(tmp_path, 1)
    kept = [n for n, record in enumerate(records) if n < 8 and not record["truncated"]]
    count = len(kept)
    assert 2 <= count <= 7
    steps = [record["update_steps"] for record in records]
    assert [n for n in range(COMPLETIONS) if steps[n]] == kept
    assert sorted(chain(*steps)) == list(range(1, count + 1))  # one completion each, until none is left
    assert not any(record["update_steps"] for record in read_records(tmp_path, 9))

    rows = read_rows(tmp_path)
    assert [row["optim/no_signal"] for row in rows] == [0] * count + [1] * (10 - count)
    assert [row["groups/zero_variance_frac"] for row in rows] == [0.5] * 8 + [1] * 2
    for row in rows[count:]:
        assert row["loss/total"] == row["optim/grad_norm"] == row["policy/kl_ref"] == row["policy/ess_frac"] == 0
    assert not any(row["optim/skipped"] for row in rows)
    for item in ("policy", "optimizer"):
        saved = [restore(tmp_path, step, item) for step in (count - 1, count, 8, 10)]
        assert [are_equal(saved[1], others) for others in saved] == [False, True, True, True], item


@pytest.mark.parametrize(
    "key, value, minibatches, groups",
    [
        ("rollout.overlong", "mask", 2, [0, 1, 2, 3, 4, 5, 6]),  # one completion is left of each of seven groups
        ("groups.equal", "drop", 4, [0, 0, 0, 1, 1, 1]),  # three groups of four are left, and the first minibatch ends
    ],
)
def test_parts_of_many_groups_fit_into_packed_rows(key, value, minibatches, groups):
    """With prompts of 100 tokens and completions of 4, a minibatch of whole groups needs fewer tokens."""
    count, mesh = len(groups), make_mesh(devices=jax.devices()[:1])
    experience = Experience(
        tokens=np.ones((count, 104), np.int32),
        prompt_lengths=np.full(count, 100),
        mask=np.ones((count, 4), bool),
        sampler_logps=np.zeros((count, 4), np.float32),
        ref_logps=np.zeros((count, 4), np.float32),
        advantages=np.zeros(count, np.float32),
        prompt_ids=np.array(groups),
        kept=np.ones(count, bool),
    )
    raw, sequences = default(), {2: 64, 4: 32}[minibatches]
    sizes = {"rollout.prompts": sequences // 8, "rollout.samples": 8, "train.minibatches": minibatches, key: value}
    raw.update_from_flattened_dict(sizes | {"rollout.max_prompt_tokens": 100, "rollout.max_tokens": 4})
    batch = pack_rows(check(raw), mesh, experience, sequences // minibatches)
    assert np.count_nonzero(batch.weights) == 4 * count
