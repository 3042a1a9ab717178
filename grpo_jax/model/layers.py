"""The building blocks of decoder layers: projections, norms, the embedding table and the MLP."""

import itertools
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.parameters import Layout, matrix_spec, module_param, param_path, param_spec
from grpo_jax.parallel.mesh import (
    ROW_AXES,
    constrain,
    drop_indivisible_axes,
    mesh_platform,
    row_spec,
    scatter_sum,
    shard_map_on_mesh,
)

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Float[Array, "tokens _"], kernel: Float[Array, "_ _"], spec: P) -> Float[Array, "tokens _"]:
    """Computes `x @ kernel` in the dtype of x.

    The kernel's gradient is accumulated in float32, also when the devices of a mesh add up their shares of it.

    Args:
        x: The inputs.
        kernel: The matrix.
        spec: How the current mesh splits the matrix.
    """
    return x @ kernel.astype(x.dtype)


def scattered_gradient(x, d_out, spec: P):
    """Returns the float32 gradient of the kernel of `linear`, of which each device only ever receives its own part."""
    dim = spec.index("fsdp")
    columns = [axis if axis == "tensor" else None for axis in spec]

    def add_up(x, d_out):
        # The compiler for TPUs scatters rows of any number, but columns only in multiples of 128.
        product = jnp.matmul(*((d_out.T, x) if dim else (x.T, d_out)), preferred_element_type=jnp.float32)
        total = jax.lax.psum(scatter_sum(product, 0), ("data", "expert"))
        return total.T if dim else total

    rows = row_spec(x.shape[0])[0]
    return shard_map_on_mesh(add_up, (P(rows, columns[0]), P(rows, columns[1])), spec)(x, d_out)


def linear_bwd(spec, residuals, d_out):
    """Returns the gradients of `linear` with respect to x and the kernel."""
    x, kernel = residuals
    if "fsdp" in spec and row_spec(x.shape[0])[0] and mesh_platform() == "tpu":
        d_kernel = scattered_gradient(x, d_out, spec)
    else:
        d_kernel = jnp.matmul(x.T, d_out, preferred_element_type=jnp.float32)
    return d_out @ kernel.T.astype(x.dtype), d_kernel.astype(kernel.dtype)


linear.defvjp(lambda x, kernel, spec: (linear(x, kernel, spec), (x, kernel)), linear_bwd)


class Projection(nn.Module):
    """A linear map from [..., *inputs] to [..., *outputs], computed as one matrix product over [tokens, features]."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        """Returns the projection of x [..., *inputs] in the dtype of x."""
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        kernel = module_param(self, "kernel", *self.inputs, *self.outputs)
        lead = x.shape[: x.ndim - len(self.inputs)]
        # Two-dimensional, because the backward pass of the same product on [N, L, D] takes twice as long on a CPU.
        spec = matrix_spec(param_path(self, "kernel"), self.inputs, self.outputs)
        out = checkpoint_name(linear(x.reshape(-1, fan_in), kernel.reshape(fan_in, fan_out), spec), "matmul")
        out = out.reshape(*lead, *self.outputs)
        if self.bias:
            out = out + module_param(self, "bias", *self.outputs).astype(x.dtype)
        return out


class MergedProjection(nn.Module):
    """Several linear maps of the same input, merged by `grpo_jax.model.decoder.merge_projections` for a rollout."""

    outputs: tuple[tuple[int, ...], ...]
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        """Returns the projections of x [..., D], each [..., *outputs], in the dtype of x."""
        shards = self.get_variable("params", "kernel").shape[-2]
        sizes = [math.prod(output) // shards for output in self.outputs]
        out = jnp.tensordot(x, module_param(self, "kernel", x.shape[-1], shards, sum(sizes)).astype(x.dtype), axes=1)
        if self.bias:
            out = out + module_param(self, "bias", shards, sum(sizes)).astype(x.dtype)
        parts = jnp.split(out, list(itertools.accumulate(sizes))[:-1], axis=-1)
        return [part.reshape(*x.shape[:-1], *output) for part, output in zip(parts, self.outputs, strict=True)]


class RMSNorm(nn.Module):
    """RMS normalization (arXiv 1910.07467) in float32: x / rms(x) * scale, or * (1 + scale) with `unit_offset`."""

    eps: float
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x):
        """Returns x normalized over its last dimension, in the dtype of x."""
        scale = module_param(self, "scale", x.shape[-1], offset=float(self.unit_offset)).astype(jnp.float32)
        # Two-dimensional, because the backward pass then sums ten times faster on a CPU.
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        flat = flat * jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + self.eps)
        return (flat * (1.0 + scale if self.unit_offset else scale)).astype(x.dtype).reshape(x.shape)


def make_norm(model_cfg: ModelConfig, name: str) -> RMSNorm:
    """Returns the `RMSNorm` that a model uses."""
    return RMSNorm(model_cfg.norm_eps, model_cfg.unit_offset, name=name)


def embed_tokens(
    table: Float[Array, "V D"], tokens: Int[Array, "N L"], *, layout: Layout = "training"
) -> Float[Array, "N L D"]:
    """Looks tokens up in an embedding table that is sharded over the current mesh.

    The table is never gathered: each device looks up all tokens of its fsdp group in its own columns of the table, and
    the devices of the group exchange the results.

    Args:
        table: The embedding table [V, D].
        tokens: Token ids [N, L].
        layout: How the table is placed on the mesh. With "rollout" it is not split over fsdp, and nothing is exchanged
            over that axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table[tokens]
    table_spec = drop_indivisible_axes(param_spec("embed/embedding", layout), table.shape, mesh)
    rows = row_spec(tokens.shape[0])
    ids_split = table_spec[0] is not None and mesh.shape["tensor"] > 1
    columns_split = table_spec[1] is not None and mesh.shape["fsdp"] > 1
    rows_split = rows[0] is not None

    def embed_shard(table, tokens):
        if columns_split and rows_split:
            tokens = jax.lax.all_gather(tokens, "fsdp", tiled=True)
        if ids_split:
            tokens = tokens - jax.lax.axis_index("tensor") * table.shape[0]
            local = (tokens >= 0) & (tokens < table.shape[0])
            vectors = jnp.where(local[..., None], table[jnp.where(local, tokens, 0)], 0)
            vectors = jax.lax.psum(vectors, "tensor")
        else:
            vectors = table[tokens]
        if columns_split and rows_split:
            return jax.lax.all_to_all(vectors, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.all_gather(vectors, "fsdp", axis=2, tiled=True) if columns_split else vectors

    return shard_map_on_mesh(embed_shard, (table_spec, rows), rows)(table, tokens)


class Embed(nn.Module):
    """The embedding table [vocab_size, width]."""

    vocab_size: int
    width: int
    layout: Layout = "training"

    @nn.compact
    def __call__(self, tokens):
        """Returns the embeddings [N, L, width] of token ids [N, L]."""
        return embed_tokens(module_param(self, "embedding", self.vocab_size, self.width), tokens, layout=self.layout)


class MLP(nn.Module):
    """The gated MLP (arXiv 2002.05202) with a hidden width of `width`."""

    model_cfg: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x):
        """Returns the MLP's output [N, L, D] for x [N, L, D]."""
        d_model, bias = self.model_cfg.hidden_size, self.model_cfg.mlp_bias
        if self.has_variable("params", "gate_up"):
            gate, up = MergedProjection(((self.width,),) * 2, bias, name="gate_up")(x)
        else:
            gate = Projection((d_model,), (self.width,), bias, name="gate")(x)
            up = Projection((d_model,), (self.width,), bias, name="up")(x)
        hidden = constrain(ACTIVATIONS[self.model_cfg.activation](gate) * up, ROW_AXES, None, "tensor")
        return Projection((self.width,), (d_model,), bias, name="down")(hidden)
