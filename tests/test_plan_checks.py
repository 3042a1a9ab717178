"""Each thing that a plan must not show is found, and nothing else."""

import copy

import pytest

import grpo_jax.planning.checks
from grpo_jax.planning.checks import violations
from tests.tiny import CONFIG

CLEAN = {
    "fits": True,
    "errors": {},
    "peaks": {"rollout": 5},
    "budget_bytes": 9,
    "rollout_mesh": {"tensor": 2},
    "programs": {
        "placement": {
            "counts": {"product_flops": 0.0, "copies": [{"array": "f32[9]", "op_name": ""}], "collectives": []}
        },
        "decode 128": {
            "counts": {"product_flops": 1.0, "copies": [{"array": "f32[9,12800]", "op_name": ""}], "collectives": []},
            "needed_product_flops": 1.0,
        },
        "update": {"counts": {"product_flops": 1.09, "copies": [], "collectives": []}, "needed_product_flops": 1.0},
    },
}
MATRIX = 4 * 32 * 48  # bytes of the largest matrix of a layer and, with 48 tokens, of the embedding


@pytest.fixture(autouse=True)
def no_exchange_is_small(monkeypatch):
    monkeypatch.setattr(grpo_jax.planning.checks, "SMALL_BYTES", 0)
    monkeypatch.setattr(grpo_jax.planning.checks, "MAX_VOCAB_BLOCK", 16)


def exchange(kind, size, axes=("fsdp",)):
    return {"kind": kind, "bytes": size, "axes": axes, "op_name": "dot"}


def report(**changes):
    changed = copy.deepcopy(CLEAN)
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = changed
        for name in parents:
            target = target[name]
        target[last] = value
    return changed


@pytest.mark.parametrize(
    "collectives",
    [
        [],
        [exchange("all-gather", MATRIX), exchange("reduce-scatter", 9 * MATRIX)],
        [exchange("all-reduce", 4 * 32 * 16), exchange("all-reduce", 9 * MATRIX, ("tensor",))],
    ],
)
def test_a_clean_plan_shows_nothing(collectives):
    assert violations(report(programs__update__counts__collectives=collectives), CONFIG) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"fits": False}, "does not fit"),
        ({"errors": {"update": "the compiler ended with signal 6"}}, "update: the compiler ended with signal 6"),
        ({"programs__decode 128__counts__copies": [{"array": "bf16[1,128]", "op_name": "x"}]}, "decode 128: copies"),
        ({"programs__update__counts__product_flops": 1.11}, "update: 1.11 FLOPs of products where 1 are needed"),
        (
            {"programs__update__counts__collectives": [exchange("all-gather", 2 * MATRIX)]},
            "update: all-gather of 12,288",
        ),
        ({"programs__update__counts__collectives": [exchange("all-reduce", MATRIX)]}, "update: all-reduce of 6,144"),
        ({"programs__placement__counts__collectives": [exchange("all-gather", 2 * MATRIX)]}, "placement: all-gather"),
    ],
)
def test_what_a_plan_must_not_show_is_found(changes, line):
    found = violations(report(**changes), CONFIG)
    assert len(found) == 1 and found[0].startswith(line), found


def test_small_arrays_may_be_exchanged_whole(monkeypatch):
    large = report(programs__update__counts__collectives=[exchange("all-gather", 2 * MATRIX)])
    assert len(violations(large, CONFIG)) == 1
    monkeypatch.setattr(grpo_jax.planning.checks, "SMALL_BYTES", 2 * MATRIX)
    assert violations(large, CONFIG) == []
