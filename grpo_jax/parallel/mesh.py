"""The device mesh, and helpers that shard arrays over it.

Mesh axes:

    data    splits rows; parameters are replicated
    fsdp    splits rows and parameters; parameters are gathered layer by layer
    expert  splits rows and the experts of a mixture; other parameters are replicated
    tensor  splits attention heads, MLP columns and the vocabulary

All axes are `AxisType.Auto`: XLA's partitioner inserts the collectives, and `constrain` pins the sharding of
activations. An axis that does not divide a dimension is dropped for that dimension.
"""

import math
from functools import partial

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor")
ROW_AXES = ("data", "fsdp", "expert")  # the axes that a dimension of rows (or prompts) is split over


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1, devices=None) -> Mesh:
    """Returns a mesh of the given sizes over `devices`, by default all of them.

    One size may be -1; it becomes the number of devices divided by the other sizes.

    Raises:
        UserError: The product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, expert, tensor]
    given = f"mesh.data={data} mesh.fsdp={fsdp} mesh.expert={expert} mesh.tensor={tensor} on {len(devices)} device(s)"
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"Mesh sizes must be at least 1, except for one that may be -1; found {given}. Change mesh.*.")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // math.prod(size for size in sizes if size != -1))
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"The product of the mesh sizes must be the number of devices; found {given}. "
            "Set one of mesh.data, mesh.fsdp, mesh.expert, mesh.tensor to -1."
        )
    try:
        # A physical axis of a TPU slice may have to be divided between two axes of the mesh.
        ordered = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except NotImplementedError:  # no assignment of physical axes was found
        ordered = np.asarray(devices).reshape(sizes)
    return Mesh(ordered, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def make_rollout_mesh(mesh: Mesh, tensor: int, expert: int) -> Mesh:
    """Returns the mesh of a rollout: the devices of `mesh` in the same order.

    The order must be the same because one program, which places the weights, has inputs on one mesh and outputs on the
    other.

    Args:
        mesh: The mesh of the updates.
        tensor: Size of the axis `tensor`.
        expert: Size of the axis `expert`.
    """
    sizes = rollout_axis_sizes(mesh, tensor, expert)
    return Mesh(mesh.devices.reshape(sizes), MESH_AXES, axis_types=mesh.axis_types)


def rollout_axis_sizes(mesh: Mesh | AbstractMesh, tensor: int, expert: int) -> tuple[int, int, int, int]:
    """Returns the sizes of the axes of a rollout's mesh; `tensor` times `expert` must divide the number of devices."""
    rest = mesh.size // (expert * tensor)
    data = math.gcd(mesh.shape["data"], rest)
    return data, rest // data, expert, tensor


def num_data_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Returns the number of data shards, the parts that a dimension of rows is split into.

    Args:
        mesh: The mesh; by default the current one (`jax.set_mesh`). Without a current mesh there is 1 shard.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)


def drop_indivisible_axes(spec: P, shape: tuple[int, ...], mesh) -> P:
    """Returns `spec` for an array of `shape`, replicating each dimension that its mesh axes do not divide."""
    kept = []
    for size, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=False):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        kept.append(None if size % math.prod(mesh.shape[axis] for axis in names) else axes)
    return P(*kept)


def path_name(path) -> str:
    """Formats a `jax.tree_util` key path like `layers/0/attention/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def constrain(x: jax.Array, *spec) -> jax.Array:
    """Constrains the sharding of an activation on the current mesh (`jax.set_mesh`); returns `x` if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, drop_indivisible_axes(P(*spec), x.shape, mesh))


def row_spec(rows: int) -> P:
    """Returns the spec of an array with this many rows on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return P(None) if mesh.empty else drop_indivisible_axes(P(ROW_AXES), (rows,), mesh)


def shard_map_on_mesh(function, in_specs, out_specs):
    """Returns `function` mapped over the shards of the current mesh; without a mesh, `function` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def scatter_sum(x: jax.Array, dim: int) -> jax.Array:
    """Sums x over the fsdp axis and returns this device's part of dimension `dim`. For use in `shard_map`.

    The compiler for TPUs may turn a reduce-scatter over a whole slice, or over more than 32 chips, into an all-reduce
    of the whole array. Two reduce-scatters over smaller groups of chips send the same number of bytes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = mesh.shape["fsdp"]
    group = min(size, 32, max(4, mesh.size // 2))
    scatter = partial(jax.lax.psum_scatter, axis_name="fsdp", scatter_dimension=dim, tiled=True)
    if mesh_platform() != "tpu" or group == size or size % group:
        return scatter(x)
    devices = np.arange(size).reshape(group, -1)
    return scatter(scatter(x, axis_index_groups=devices.T.tolist()), axis_index_groups=devices.tolist())


def mesh_platform() -> str:
    """Returns the platform that a program is traced for: "cpu", "gpu" or "tpu".

    It is that of the current mesh, or of the default devices if there is none or it has no devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device else jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def row_shardings(mesh: Mesh, tree):
    """Returns a tree of `NamedSharding`s that split the first dimension of every array over the data shards."""
    return jax.tree.map(lambda x: NamedSharding(mesh, drop_indivisible_axes(P(ROW_AXES), x.shape, mesh)), tree)


def shard_rows(mesh: Mesh, tree):
    """Places host arrays on the mesh, splitting their first dimension. Every process must pass the same values.

    Each process copies the rows of its own devices. `jax.device_put` would gather the whole array from every process
    in order to compare them.
    """

    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, row_shardings(mesh, tree))


def gather_to_host(tree):
    """Returns the tree with every array whole, as numpy, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
