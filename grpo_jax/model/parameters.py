"""The table of parameters, and their placement on the device mesh.

The table has one row for each parameter. The row names the parameter's axes, which determine how a mesh splits it, and
states how it is initialized, which tensors of a checkpoint hold it, whether weight decay applies to it, whether Muon
updates it, and whether rollouts keep its dtype. All code looks up rows with `row_for`: a new parameter needs one new
row, and a parameter without a row is an error everywhere.
"""

import logging
import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.parallel.mesh import drop_indivisible_axes, path_name

# Name of an axis -> the mesh axis that splits it.
AXES = {
    "vocab": "tensor",  # V
    "embed": "fsdp",  # D
    "heads": "tensor",  # H or K
    "head_dim": None,  # E
    "all_heads": None,  # H * E or K * E
    "mlp": "tensor",  # F, of an MLP or of each expert
    "latent": "fsdp",  # the compressed vectors of latent attention
    "experts": "expert",  # X
    "routes": None,  # X, as the outputs of a router
    "shards": "tensor",  # the size of that mesh axis
    "merged": None,  # a shard's outputs of several projections
}

# Where parameters live: "training" splits them over fsdp as well; "rollout" does not, so that decoding a token gathers
# no weights.
Layout = Literal["training", "rollout"]

log = logging.getLogger(__name__)


class ParameterRow(NamedTuple):
    """The facts about one parameter. Within a layer, its axes are [*stacked, *inputs, *outputs]."""

    path: str  # in the parameter tree; for a layer's parameter, the path within its layer stack
    tensor: str  # name in Llama or in a family that has it, without prefix; {i} is the layer, {x} the expert
    inputs: tuple[str, ...]  # the axes that a matrix maps from; () for vectors
    outputs: tuple[str, ...]  # the axes that a matrix maps to, or the axes of a vector
    init: float | str = "fan_in"  # a constant, or normal with a variance of 1 / "fan_in" or 1 / "fan_out"
    transpose: bool = True  # the checkpoint stores [outputs, inputs], as PyTorch's Linear does
    decay: bool = True  # weight decay applies
    muon: bool = True  # Muon updates the matrix; other parameters are left to Adam
    keep_dtype: bool = False  # rollouts do not cast it to the compute dtype: norms and routers compute in float32
    stacked: tuple[str, ...] = ()  # the axes that stack matrices

    @property
    def axes(self) -> tuple[str, ...]:
        """Returns the names of all axes except that of stacked layers."""
        return self.stacked + self.inputs + self.outputs


def matrix_row(path: str, tensor: str, axes: str, **facts) -> ParameterRow:
    """Returns the row of a matrix. `axes` are written like "embed -> heads head_dim"."""
    inputs, outputs = (tuple(side.split()) for side in axes.split("->"))
    return ParameterRow(path, tensor, inputs, outputs, **facts)


def vector_row(path: str, tensor: str, axes: str, init: float, keep_dtype: bool = False) -> ParameterRow:
    """Returns the row of a scale or a bias."""
    row = ParameterRow(path, tensor, (), tuple(axes.split()), init, keep_dtype=keep_dtype)
    return row._replace(transpose=False, decay=False, muon=False)


def linear_rows(path: str, tensor: str, axes: str) -> tuple[ParameterRow, ParameterRow]:
    """Returns the rows of a linear layer: its kernel, and the bias that some models have."""
    kernel = matrix_row(f"{path}/kernel", f"{tensor}.weight", axes)
    return kernel, vector_row(f"{path}/bias", f"{tensor}.bias", axes.split("->")[1], 0.0)


def norm_row(path: str, tensor: str, axis: str = "embed") -> ParameterRow:
    """Returns the row of a norm."""
    return vector_row(f"{path}/scale", f"{tensor}.weight", axis, 1.0, keep_dtype=True)


PARAMETERS = (
    matrix_row("embed/embedding", "embed_tokens.weight", "vocab -> embed", init="fan_out", transpose=False, muon=False),
    norm_row("attention_norm", "layers.{i}.input_layernorm"),
    *linear_rows("attention/q", "layers.{i}.self_attn.q_proj", "embed -> heads head_dim"),
    *linear_rows("attention/k", "layers.{i}.self_attn.k_proj", "embed -> heads head_dim"),
    *linear_rows("attention/v", "layers.{i}.self_attn.v_proj", "embed -> heads head_dim"),
    *linear_rows("attention/o", "layers.{i}.self_attn.o_proj", "heads head_dim -> embed"),
    norm_row("attention/q_norm", "layers.{i}.self_attn.q_norm", "head_dim"),
    norm_row("attention/k_norm", "layers.{i}.self_attn.k_norm", "head_dim"),
    norm_row("attention/q_all_norm", "layers.{i}.self_attn.q_norm", "all_heads"),
    norm_row("attention/k_all_norm", "layers.{i}.self_attn.k_norm", "all_heads"),
    *linear_rows("attention/q_a", "layers.{i}.self_attn.q_a_proj", "embed -> latent"),
    norm_row("attention/q_a_norm", "layers.{i}.self_attn.q_a_layernorm", "latent"),
    matrix_row("attention/q_b/kernel", "layers.{i}.self_attn.q_b_proj.weight", "latent -> heads head_dim"),
    *linear_rows("attention/kv_a", "layers.{i}.self_attn.kv_a_proj_with_mqa", "embed -> latent"),
    norm_row("attention/kv_a_norm", "layers.{i}.self_attn.kv_a_layernorm", "latent"),
    matrix_row("attention/kv_b", "layers.{i}.self_attn.kv_b_proj.weight", "latent -> heads head_dim"),
    norm_row("attention_post_norm", "layers.{i}.post_attention_layernorm"),
    norm_row("mlp_norm", "layers.{i}.post_attention_layernorm"),
    *linear_rows("mlp/gate", "layers.{i}.mlp.gate_proj", "embed -> mlp"),
    *linear_rows("mlp/up", "layers.{i}.mlp.up_proj", "embed -> mlp"),
    *linear_rows("mlp/down", "layers.{i}.mlp.down_proj", "mlp -> embed"),
    matrix_row("moe/router/kernel", "layers.{i}.mlp.gate.weight", "embed -> routes", keep_dtype=True),
    vector_row("moe/router/correction", "layers.{i}.mlp.gate.e_score_correction_bias", "routes", 0.0, keep_dtype=True),
    matrix_row("moe/experts_gate", "layers.{i}.mlp.experts.{x}.gate_proj.weight", "embed -> mlp", stacked=("experts",)),
    matrix_row("moe/experts_up", "layers.{i}.mlp.experts.{x}.up_proj.weight", "embed -> mlp", stacked=("experts",)),
    matrix_row("moe/experts_down", "layers.{i}.mlp.experts.{x}.down_proj.weight", "mlp -> embed", stacked=("experts",)),
    matrix_row("moe/shared/gate/kernel", "layers.{i}.mlp.shared_experts.gate_proj.weight", "embed -> mlp"),
    matrix_row("moe/shared/up/kernel", "layers.{i}.mlp.shared_experts.up_proj.weight", "embed -> mlp"),
    matrix_row("moe/shared/down/kernel", "layers.{i}.mlp.shared_experts.down_proj.weight", "mlp -> embed"),
    norm_row("mlp_post_norm", "layers.{i}.post_feedforward_layernorm"),
    norm_row("final_norm", "norm"),
    matrix_row("head/kernel", "lm_head.weight", "embed -> vocab", muon=False),
    # Only rollouts have these; no checkpoint does (`grpo_jax.model.decoder.merge_projections`).
    *linear_rows("attention/qkv", "", "embed -> shards merged"),
    *linear_rows("mlp/gate_up", "", "embed -> shards merged"),
    matrix_row("moe/shared/gate_up/kernel", "", "embed -> shards merged"),
)
ROWS = {row.path: row for row in PARAMETERS}


def row_for(path: str) -> ParameterRow:
    """Returns the row of a parameter.

    Args:
        path: The path of the parameter, such as "layers/0/attention/q/kernel"; "layers/0/" may be left out.

    Raises:
        ValueError: `PARAMETERS` has no row for it.
    """
    name = path.split("/", 2)[-1] if path.startswith("layers/") else path
    if name not in ROWS:
        raise ValueError(f"PARAMETERS in {__name__} needs a row for each parameter; found none for {path}. Add one.")
    return ROWS[name]


def param_path(module: nn.Module, name: str) -> str:
    """Returns the path of a module's parameter in a layer's parameter tree."""
    return f"{'/'.join(module.path) or module.name}/{name}"


def module_param(module: nn.Module, name: str, *shape: int, offset: float = 0.0) -> jax.Array:
    """Declares a parameter of a module, like `module.param`, with the initializer that its row states.

    Args:
        module: The module. A module without a parent must have the name of its entry in the parameter tree.
        name: The name of the parameter within the module.
        *shape: The shape of the parameter. Its dtype is float32.
        offset: A constant that the module adds to the parameter. It is subtracted from a constant initial value.
    """
    row = row_for(param_path(module, name))

    def init(key):
        if not isinstance(row.init, str):
            return jnp.full(shape, row.init - offset, jnp.float32)
        first, last = len(row.stacked), -len(row.outputs)
        fan = math.prod(shape[first:last] if row.init == "fan_in" else shape[last:])
        return nn.initializers.normal(1 / math.sqrt(fan))(key, shape)

    return module.param(name, init)


def param_spec(path: str, layout: Layout = "training") -> P:
    """Returns the partition spec of a parameter's last dimensions, which are its named axes.

    If several axes map to the same mesh axis, only the first is split. A parameter with a single axis is replicated.

    Raises:
        ValueError: `PARAMETERS` has no row for the parameter.
    """
    axes, spec = row_for(path).axes, []
    for mesh_axis in map(AXES.get, axes):
        whole = len(axes) == 1 or mesh_axis in spec or (layout == "rollout" and mesh_axis == "fsdp")
        spec.append(None if whole else mesh_axis)
    return P(*spec)


def matrix_spec(path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> P:
    """Returns how the current mesh splits a kernel [*inputs, *outputs] as a matrix; P() without a mesh.

    The first axis of the inputs and that of the outputs are the ones that may be split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return P()
    spec = drop_indivisible_axes(param_spec(path), (*inputs, *outputs), mesh)
    return P(spec[0], spec[len(inputs)])


def tree_shardings(mesh: Mesh | AbstractMesh, params, *, layout: Layout = "training"):
    """Returns the `NamedSharding` of every parameter in a tree.

    Args:
        mesh: The mesh to place the tree on. Where an axis does not divide a dimension, the dimension is not split.
        params: Arrays or `jax.ShapeDtypeStruct`s.
        layout: Whether parameters are split over the fsdp axis ("training") or not ("rollout").

    Raises:
        ValueError: `PARAMETERS` has no row for a leaf.
    """

    def leaf_sharding(path, leaf):
        spec = param_spec(path_name(path), layout)
        spec = P(*(None,) * (len(leaf.shape) - len(spec)), *spec)
        return NamedSharding(mesh, drop_indivisible_axes(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(leaf_sharding, params)


def log_indivisible_axes(mesh: Mesh, params) -> None:
    """Logs a warning for each axis and size that the mesh does not divide, with a parameter as an example."""
    unsplit = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        row = row_for(path_name(path))
        for axis, size, mesh_axis in zip(row.axes, leaf.shape[-len(row.axes) :], param_spec(row.path), strict=True):
            if mesh_axis and size % mesh.shape[mesh_axis]:
                unsplit.setdefault((axis, size, mesh_axis), row.path)
    for (axis, size, mesh_axis), path in unsplit.items():
        shards = mesh.shape[mesh_axis]
        log.warning("Axis %s of size %d (as in %s) is not split over mesh.%s=%d", axis, size, path, mesh_axis, shards)
