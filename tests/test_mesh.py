"""Meshes and the table of partition specs."""

import logging

import jax
import pytest
from jax.sharding import PartitionSpec as P

import grpo_jax.parallel.mesh
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import constrain, drop_indivisible_axes, make_mesh, tree_shardings
from tests.tiny import CONFIG


def test_minus_one_takes_what_is_left():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert dict(make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    assert dict(make_mesh(1, 2, 1, -1).shape) == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 8, 1), (-2, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, 16, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match=f"mesh.data={sizes[0]}.*8 device"):
        make_mesh(*sizes)


def test_the_table_places_every_leaf():
    mesh = make_mesh(1, 4, 2)
    placed = tree_shardings(mesh, param_shapes(CONFIG))
    kernel = placed["layers"][0]["attention"]
    assert kernel["q"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert kernel["o"]["kernel"].spec == P(None, "tensor", None, "fsdp")
    assert placed["embed"]["embedding"].spec == P("tensor", "fsdp")
    gathered = tree_shardings(mesh, param_shapes(CONFIG), gathered=True)
    assert all("fsdp" not in leaf.spec for leaf in jax.tree.leaves(gathered))


def test_an_axis_that_does_not_divide_is_dropped_and_logged_once(caplog, monkeypatch):
    """2 KV heads over a tensor axis of 4."""
    monkeypatch.setattr(grpo_jax.parallel.mesh, "_dropped", set())
    mesh = make_mesh(1, 2, 4)
    with caplog.at_level(logging.WARNING):
        placed = [tree_shardings(mesh, param_shapes(CONFIG)) for _ in range(2)][0]
    assert placed["layers"][0]["attention"]["k"]["kernel"].spec == P(None, "fsdp", None, None)
    assert placed["layers"][0]["attention"]["q"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert len([message for message in caplog.messages if "attention/[qkv]" in message and " 2 is not" in message]) == 1


def test_fit_counts_all_axes_of_a_dimension():
    mesh = make_mesh(2, 2, 2)
    assert drop_indivisible_axes(P(("data", "fsdp"), "tensor"), (4, 3), mesh) == P(("data", "fsdp"), None)
    assert drop_indivisible_axes(P(("data", "fsdp")), (6, 3), mesh) == P(None, None)


def test_an_unknown_leaf_is_named():
    with pytest.raises(ValueError, match="layers/new/thing"):
        tree_shardings(make_mesh(8), {"layers": {"new": {"thing": jax.ShapeDtypeStruct((4, 4), "float32")}}})


def test_constrain_without_a_mesh_changes_nothing():
    x = jax.numpy.ones((3, 5))
    assert constrain(x, "data", None) is x
