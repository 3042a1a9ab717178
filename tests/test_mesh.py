"""Meshes, and the specs of arrays on them."""

import logging

import jax
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax.config import check, default
from grpo_jax.errors import UserError
from grpo_jax.parallel.mesh import constrain, drop_indivisible_axes, make_mesh
from grpo_jax.run.context import build_context, read_base_model


def test_minus_one_becomes_the_remaining_devices():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert dict(make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    assert dict(make_mesh(1, 2, 1, -1).shape) == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 8, 1), (-2, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, 16, 1)])
def test_sizes_that_do_not_match_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match=f"mesh.data={sizes[0]}.*8 device"):
        make_mesh(*sizes)


def test_a_run_logs_each_dropped_axis_once(caplog):
    cfg = default()
    cfg.mesh.data, cfg.mesh.tensor, cfg.rollout.max_prompt_tokens = 1, 8, 80
    cfg = check(cfg)
    with caplog.at_level(logging.WARNING, logger="grpo_jax"):
        build_context(cfg, read_base_model(cfg), training=True)
    dropped = [message for message in caplog.messages if "is not split over" in message]
    assert dropped and len(dropped) == len(set(dropped))


def test_all_axes_of_a_dimension_must_divide_it_together():
    mesh = make_mesh(2, 2, 2)
    assert drop_indivisible_axes(P(("data", "fsdp"), "tensor"), (4, 3), mesh) == P(("data", "fsdp"), None)
    assert drop_indivisible_axes(P(("data", "fsdp")), (6, 3), mesh) == P(None, None)


def test_constrain_without_a_mesh_changes_nothing():
    x = jax.numpy.ones((3, 5))
    assert constrain(x, "data", None) is x
