"""Meshes, and the specs of arrays on them."""

import itertools
import logging
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax.config import check, default
from grpo_jax.errors import UserError
from grpo_jax.parallel import mesh as mesh_module
from grpo_jax.parallel.mesh import MESH_AXES, constrain, drop_indivisible_axes, make_mesh, make_rollout_mesh
from grpo_jax.run.context import build_context, read_base_model


def test_minus_one_becomes_the_remaining_devices():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert dict(make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    assert dict(make_mesh(1, 2, 1, -1).shape) == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 8, 1), (-2, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, 16, 1)])
def test_sizes_that_do_not_match_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match=f"mesh.data={sizes[0]}.*8 device"):
        make_mesh(*sizes)


@dataclass(frozen=True)
class TpuChip:
    """What a mesh asks of a TPU device."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    process_index: int
    platform: str = "tpu"
    core_on_chip: int = 0
    slice_index: int = 0

    @property
    def client(self):
        """A mesh compares the clients of its devices."""
        return TpuChip


def tpu_slice(kind: str, *dims: int) -> list[TpuChip]:
    """Returns the chips of a slice, four to a host, in the order in which JAX lists them."""
    dims = dims + (1,) * (3 - len(dims))
    places = itertools.product(*(range(size) for size in reversed(dims)))
    return [TpuChip(i, place[::-1], kind, i // 4) for i, place in enumerate(places)]


def factorizations(count: int, parts: int):
    """Yields all tuples of `parts` sizes whose product is `count`."""
    if parts == 1:
        yield (count,)
        return
    for size in range(1, count + 1):
        if count % size == 0:
            yield from ((size, *rest) for rest in factorizations(count // size, parts - 1))


SLICES = [
    ("TPU v5", 2, 2, 1),
    ("TPU v5", 2, 2, 2),
    ("TPU v5", 4, 4, 4),
    ("TPU v5", 4, 4, 8),
    ("TPU v5", 4, 4, 12),
    ("TPU v5", 8, 8, 8),
    ("TPU v5 lite", 2, 4),
    ("TPU v5 lite", 8, 8),
    ("TPU v5 lite", 16, 16),
    ("TPU v6 lite", 2, 2),
]


@pytest.mark.parametrize("chips", SLICES, ids=lambda chips: f"{chips[0]} {'x'.join(map(str, chips[1:]))}")
def test_any_sizes_whose_product_is_the_slice_make_a_mesh(chips):
    """`jax.make_mesh` refuses, for example, tensor 2 on 4x4x4 and tensor 4 on 8x8x8."""
    devices = tpu_slice(*chips)
    for sizes in factorizations(len(devices), len(MESH_AXES)):
        mesh = make_mesh(**dict(zip(MESH_AXES, sizes, strict=True)), devices=devices)
        assert mesh.devices.shape == sizes and set(mesh.devices.flat) == set(devices)


def hops(a: TpuChip, b: TpuChip) -> int:
    """Returns the number of links between two chips, without those that wrap around."""
    return sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True))


@pytest.mark.parametrize("chips", SLICES, ids=lambda chips: f"{chips[0]} {'x'.join(map(str, chips[1:]))}")
def test_tensor_shards_of_a_rollout_are_neighbors_in_the_slice(chips):
    """Weights that training splits over fsdp alone are split over 4 chips in a rollout, as for 7B on a v5e-64."""
    devices = tpu_slice(*chips)
    mesh = make_mesh(fsdp=-1, devices=devices)
    rollout_mesh = make_rollout_mesh(mesh, tensor=4, expert=1)
    assert [*rollout_mesh.devices.flat] == [*mesh.devices.flat]
    for group in rollout_mesh.devices.reshape(-1, 4):
        assert all(hops(a, b) <= 2 for a, b in itertools.pairwise(group))


def test_a_rollout_mesh_keeps_the_data_axis_where_it_can():
    """With the sizes of the training mesh it is that mesh, so that a rollout is placed and split as before."""
    mesh = make_mesh(2, 2, 2)
    assert make_rollout_mesh(mesh, tensor=2, expert=1) == mesh
    assert make_rollout_mesh(mesh, tensor=4, expert=1).axis_sizes == (2, 1, 1, 4)
    assert make_rollout_mesh(mesh, tensor=4, expert=2).axis_sizes == (1, 1, 2, 4)
    assert make_rollout_mesh(make_mesh(1, 8), tensor=2, expert=1).axis_sizes == (1, 4, 1, 2)


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


@pytest.mark.parametrize("platform, scatters", [("tpu", 2), ("gpu", 1), ("cpu", 1)])
def test_a_sum_over_a_slice_is_scattered_in_two_steps_on_tpus(platform, scatters, monkeypatch):
    """Over groups of 4 and of 2 of 8 devices; each device gets the part that one step would give it."""
    monkeypatch.setattr(mesh_module, "mesh_platform", lambda: platform)
    x = jax.random.normal(jax.random.key(0), (8, 3, 16))
    with jax.set_mesh(make_mesh(1, 8)):
        scatter = jax.shard_map(
            lambda x: mesh_module.scatter_sum(x[0], 1), in_specs=P("fsdp"), out_specs=P(None, "fsdp"), check_vma=False
        )
        np.testing.assert_allclose(jax.jit(scatter)(x), x.sum(axis=0), rtol=1e-5, atol=1e-6)
        assert str(jax.make_jaxpr(scatter)(x)).count("reduce_scatter[") == scatters


@pytest.mark.parametrize("given, expected", [("rocm", "gpu"), ("cuda", "gpu"), ("tpu", "tpu"), ("cpu", "cpu")])
def test_the_platform_of_a_mesh_is_that_of_its_devices(given, expected):
    mesh = make_mesh(1, 8).abstract_mesh
    device = type(mesh.abstract_device)(device_kind=given, num_cores=1, platform=given)
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        assert mesh_module.mesh_platform() == expected
    assert mesh_module.mesh_platform() == "cpu"
