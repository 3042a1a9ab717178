"""Completions that are kept when a run stops in the middle of a rollout."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from grpo_jax.run import drawn
from grpo_jax.run.drawn import DrawnCompletions, merge_completions, remaining_limits
from grpo_jax.text.problem import Prompts
from grpo_jax.types import Rollout

LENGTHS = np.array([[3, 0], [1, 2]], np.int32)
PROMPTS = Prompts(np.zeros((2, 3), np.int32), np.full(2, 3, np.int32), np.arange(2, dtype=np.int32))
INPUTS = {
    "policy": np.ones(3),
    "key": 0,
    "temperature": 1.0,
    "prompts": PROMPTS,
    "stop_table": np.zeros((1, 4), np.int8),
}
OTHER_INPUTS = {
    "policy": np.zeros(3),
    "key": 1,
    "temperature": 0.5,
    "prompts": PROMPTS._replace(tokens=np.ones((2, 3), np.int32)),
    "stop_table": np.ones((1, 4), np.int8),
}


def completions(token, lengths):
    tokens = np.where(np.arange(3) < lengths[..., None], token, 0).astype(np.int32)
    return Rollout(tokens, -tokens.astype(np.float32) / 3, lengths, lengths == 3, PROMPTS.ids)


def kept_completions(workdir, policy, key, temperature, prompts, stop_table):
    cfg = SimpleNamespace(rollout=SimpleNamespace(samples=2, max_tokens=3, temperature=temperature))
    context = SimpleNamespace(stop_table=stop_table)
    return DrawnCompletions(cfg, context, workdir, prompts, jax.random.key(key), {"weight": policy})


def assert_same(rollout, other):
    jax.tree.map(np.testing.assert_array_equal, vars(rollout), vars(other))


@pytest.mark.parametrize("change", ["flip", "cut", *INPUTS])
def test_kept_completions_are_used_only_if_they_are_those_of_this_rollout(tmp_path, change):
    kept, rollout = kept_completions(tmp_path, **INPUTS), completions(7, LENGTHS)
    kept.path.parent.mkdir()
    assert kept.load() is None
    assert kept.save(rollout) == 3
    assert_same(kept_completions(tmp_path, **INPUTS).load(), rollout)
    content = bytearray(kept.path.read_bytes())
    if change == "flip":
        content[len(content) // 2] ^= 1
    elif change == "cut":
        del content[-1]
    else:
        kept = kept_completions(tmp_path, **INPUTS | {change: OTHER_INPUTS[change]})
    kept.path.write_bytes(content)
    assert kept.load() is None and not kept.path.exists()


def test_completions_that_had_been_drawn_take_the_place_of_those_that_were_cut_short(monkeypatch):
    """On a CPU, or where all have slots, they are drawn again in full."""
    before, limits, full = completions(7, LENGTHS), np.array([[1, 3], [1, 1]]), np.full((2, 2), 3)
    monkeypatch.setattr(drawn, "cache_sizes", lambda width, most: [width, most])
    for platform, slots, expected in (("tpu", 3, limits), ("tpu", 4, full), ("cpu", 3, full)):
        monkeypatch.setattr(drawn, "mesh_platform", lambda platform=platform: platform)
        context = SimpleNamespace(rollout_plan=SimpleNamespace(slots=slots))
        np.testing.assert_array_equal(remaining_limits(context, PROMPTS, before), expected)
    now = completions(9, limits)
    both = merge_completions(now, before)
    expected = completions(7, np.where(LENGTHS, LENGTHS, 3))
    expected.tokens[0, 1], expected.logps[0, 1] = 9, -3
    assert_same(both, expected)
    assert merge_completions(now, None) is now
