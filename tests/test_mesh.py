"""Meshes and the table of partition specs."""

import logging

import jax
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax.config import check, default
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes, unstack_layers
from grpo_jax.parallel.mesh import constrain, drop_indivisible_axes, log_indivisible_axes, make_mesh, tree_shardings
from grpo_jax.run.context import build_context
from tests.tiny import CONFIG


def test_minus_one_becomes_the_remaining_devices():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert dict(make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    assert dict(make_mesh(1, 2, 1, -1).shape) == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 8, 1), (-2, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, 16, 1)])
def test_sizes_that_do_not_match_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match=f"mesh.data={sizes[0]}.*8 device"):
        make_mesh(*sizes)


def test_every_parameter_has_a_spec():
    mesh = make_mesh(1, 4, 2)
    shardings = tree_shardings(mesh, param_shapes(CONFIG))
    attention = shardings["layers"][0]["attention"]
    assert attention["q"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert attention["o"]["kernel"].spec == P(None, "tensor", None, "fsdp")
    assert shardings["embed"]["embedding"].spec == P("tensor", "fsdp")
    rollout = tree_shardings(mesh, param_shapes(CONFIG), layout="rollout")
    assert all("fsdp" not in leaf.spec for leaf in jax.tree.leaves(rollout))


def test_an_axis_that_does_not_divide_a_dimension_is_dropped_and_logged_once(caplog):
    """2 KV heads cannot be split over a tensor axis of 4. Keys and values of both layers share one warning."""
    mesh, shapes = make_mesh(1, 2, 4), jax.eval_shape(unstack_layers, param_shapes(CONFIG))
    layers = tree_shardings(mesh, shapes)["layers"]
    assert layers[1]["attention"]["k"]["kernel"].spec == P(None, "fsdp", None, None)
    assert layers[1]["attention"]["q"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert not caplog.messages
    log_indivisible_axes(mesh, shapes)
    assert caplog.messages == ["attention/[qkv]/kernel: a dimension of size 2 is not split over mesh.tensor=4"]


def test_a_run_logs_each_dropped_axis_once(caplog):
    cfg = default()
    cfg.mesh.data, cfg.mesh.tensor = 1, 8
    with caplog.at_level(logging.WARNING, logger="grpo_jax"):
        build_context(check(cfg), training=True)
    dropped = [message for message in caplog.messages if "is not split over" in message]
    assert dropped and len(dropped) == len(set(dropped))


def test_all_axes_of_a_dimension_must_divide_it_together():
    mesh = make_mesh(2, 2, 2)
    assert drop_indivisible_axes(P(("data", "fsdp"), "tensor"), (4, 3), mesh) == P(("data", "fsdp"), None)
    assert drop_indivisible_axes(P(("data", "fsdp")), (6, 3), mesh) == P(None, None)


def test_an_unknown_parameter_is_named_in_the_error():
    with pytest.raises(ValueError, match="layers/new/thing"):
        tree_shardings(make_mesh(8), {"layers": {"new": {"thing": jax.ShapeDtypeStruct((4, 4), "float32")}}})


def test_constrain_without_a_mesh_changes_nothing():
    x = jax.numpy.ones((3, 5))
    assert constrain(x, "data", None) is x
