"""The device mesh, one table from parameter names to partition specs, and one `constrain` helper.

Mesh axes:
    data    rows are split, parameters are copied
    fsdp    rows are split, parameters are split too and gathered layer by layer
    expert  rows are split, and the experts of a mixture; other parameters are copied
    tensor  heads, MLP columns and vocabulary are split

All axes are Auto: XLA's partitioner places the collectives, and activations are pinned by `constrain`. An axis
that does not divide a dimension is dropped for that dimension.
"""

import logging
import math
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor")
ROW_AXES = ("data", "fsdp", "expert")  # what a dimension of rows (or prompts) is split over

# The end of a leaf's path -> the spec of its last dimensions. Stacked layers have one more dimension in front.
# Optimizer moments end in the same paths, so this table places them too.
PARTITION_TABLE = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"attention/[qkv]/kernel$", P("fsdp", "tensor", None)),
    (r"attention/o/kernel$", P("tensor", None, "fsdp")),
    (r"attention/[qkv]/bias$", P("tensor", None)),
    (r"attention/(q_a|kv_a)/kernel$", P("fsdp", None)),
    (r"attention/(q_b/kernel|kv_b)$", P("fsdp", "tensor", None)),
    (r"(mlp|shared)/(gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(mlp|shared)/down/kernel$", P("tensor", "fsdp")),
    (r"experts_(gate|up)$", P("expert", "fsdp", "tensor")),
    (r"experts_down$", P("expert", "tensor", "fsdp")),
    (r"router/kernel$", P("fsdp", None)),
    (r"head/kernel$", P("fsdp", "tensor")),
    (r"(scale|bias|correction)$", P(None)),
)

log = logging.getLogger(__name__)
_dropped: set[tuple] = set()


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1, devices=None) -> Mesh:
    """A mesh of the given sizes; one of them may be -1 and takes what is left of the devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, expert, tensor]
    found = f"mesh.data={data} mesh.fsdp={fsdp} mesh.expert={expert} mesh.tensor={tensor} on {len(devices)} device(s)"
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"expected mesh sizes of 1 or more, at most one of them -1; found {found}; change mesh.*")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // math.prod(s for s in sizes if s != -1))
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"expected mesh sizes whose product is the number of devices; found {found}; "
            "set one of mesh.data, mesh.fsdp, mesh.expert, mesh.tensor to -1"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def num_row_shards(mesh: Mesh) -> int:
    """Into how many parts a dimension of rows is split."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def drop_indivisible_axes(spec: P, shape: tuple[int, ...], mesh, name: str = "") -> P:
    """`spec` without the axes that do not divide their dimension of `shape`; with a name, that is logged, once."""
    kept = []
    for size, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec))):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        shards = math.prod(mesh.shape[axis] for axis in names)
        if size % shards:
            note = (name, size, names, shards)
            if name and note not in _dropped:
                _dropped.add(note)
                log.warning("%s: a dimension of %d is not split over %s (%d devices)", name, size, names, shards)
            axes = None
        kept.append(axes)
    return P(*kept)


def path_name(path) -> str:
    """`layers/attention/q/kernel` from a key path of jax.tree_util."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)


def spec_for(name: str) -> tuple[str, P]:
    """The table's row for the parameter of that path: its pattern, and the spec of the last dimensions.

    Raises:
      ValueError: the table has none.
    """
    for pattern, spec in PARTITION_TABLE:
        if re.search(pattern, name):
            return pattern, spec
    raise ValueError(f"grpo_jax.parallel.mesh.TABLE has no row for the parameter {name}")


def tree_shardings(mesh: Mesh, tree, *, gathered: bool = False):
    """The sharding of every leaf of a tree of parameters, optimizer state or both.

    Args:
      tree: arrays or jax.ShapeDtypeStruct. Scalars are replicated.
      gathered: leave the fsdp axis out: the rollout's placement, where no weight is gathered for a token.
    Raises:
      ValueError: the table has no row for a leaf.
    """

    def of(path, leaf):
        name = path_name(path)
        if not leaf.shape:
            return NamedSharding(mesh, P())
        pattern, spec = spec_for(name)
        if gathered:
            spec = P(*(None if axis == "fsdp" else axis for axis in spec))
        spec = P(*(None,) * (len(leaf.shape) - len(spec)), *spec)
        return NamedSharding(mesh, drop_indivisible_axes(spec, leaf.shape, mesh, pattern.rstrip("$")))

    return jax.tree_util.tree_map_with_path(of, tree)


def constrain(x: jax.Array, *spec) -> jax.Array:
    """Pins an activation's sharding on the mesh in force (`jax.set_mesh`); without one, `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, drop_indivisible_axes(P(*spec), x.shape, mesh))


def mesh_platform() -> str:
    """`cpu`, `gpu` or `tpu`: what a program is traced for, the mesh in force or the default devices."""
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def shard_rows(mesh: Mesh, tree):
    """Places host arrays with their first dimension split over the mesh; every process passes the same values."""
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, drop_indivisible_axes(P(ROW_AXES), x.shape, mesh))), tree
    )


def gather_to_host(tree):
    """Whole numpy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
