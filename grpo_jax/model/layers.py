"""The parts that every decoder layer is built from: projections, norms, the token table, the MLP."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.parallel.mesh import ROW_AXES, Layout, constrain, drop_indivisible_axes

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


@jax.custom_vjp
def linear(x: Float[Array, "tokens _"], kernel: Float[Array, "_ _"]) -> Float[Array, "tokens _"]:
    """x kernel in x's dtype. The kernel's gradient is float32 from the start: devices add their shares up in it."""
    return x @ kernel.astype(x.dtype)


def linear_bwd(saved, gradient):
    x, kernel = saved
    of_kernel = jnp.matmul(x.T, gradient, preferred_element_type=jnp.float32)
    return gradient @ kernel.T.astype(x.dtype), of_kernel.astype(kernel.dtype)


linear.defvjp(lambda x, kernel: (linear(x, kernel), (x, kernel)), linear_bwd)


class Projection(nn.Module):
    """x[..., *inputs] -> [..., *outputs], as one matrix product over [tokens, features]."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        init = nn.initializers.normal(1 / math.sqrt(fan_in))
        kernel = self.param("kernel", init, (*self.inputs, *self.outputs))
        lead = x.shape[: x.ndim - len(self.inputs)]
        # Two dimensions: the backward pass of the same product on [N, L, D] is over twice slower on a CPU.
        out = checkpoint_name(linear(x.reshape(-1, fan_in), kernel.reshape(fan_in, fan_out)), "matmul")
        out = out.reshape(*lead, *self.outputs)
        if self.bias:
            out = out + self.param("bias", nn.initializers.zeros, self.outputs).astype(x.dtype)
        return out


class RMSNorm(nn.Module):
    """x / rms(x) * scale (or 1 + scale), in float32."""

    eps: float
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],))
        wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # two dimensions: sums backwards are ten times faster
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32)
        return (wide * (1.0 + scale if self.unit_offset else scale)).astype(x.dtype).reshape(x.shape)


def make_norm(model_cfg: ModelConfig, name: str | None = None) -> RMSNorm:
    """The norm of a config."""
    return RMSNorm(model_cfg.norm_eps, model_cfg.unit_offset, name=name)


def embed_tokens(
    table: Float[Array, "V D"], tokens: Int[Array, "N L"], *, layout: Layout = "training"
) -> Float[Array, "N L D"]:
    """The tokens' rows of a table that lies split over the mesh in force.

    Not the table travels but what is asked of it: each device looks all tokens of the fsdp axis up in its own columns,
    and the answers are exchanged.

    Args:
      layout: How the table is placed on the mesh; see `tree_shardings`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table[tokens]
    split = drop_indivisible_axes(P("tensor", "fsdp" if layout == "training" else None), table.shape, mesh)
    rows = drop_indivisible_axes(P(ROW_AXES), tokens.shape, mesh)
    by_id = split[0] is not None and mesh.shape["tensor"] > 1
    by_column = split[1] is not None and mesh.shape["fsdp"] > 1

    def on_device(table, tokens):
        if by_column and rows[0]:
            tokens = jax.lax.all_gather(tokens, "fsdp", tiled=True)
        if by_id:
            tokens = tokens - jax.lax.axis_index("tensor") * table.shape[0]
            mine = (tokens >= 0) & (tokens < table.shape[0])
            found = jnp.where(mine[..., None], table[jnp.where(mine, tokens, 0)], 0)
            found = jax.lax.psum(found, "tensor")
        else:
            found = table[tokens]
        if by_column and rows[0]:
            return jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.all_gather(found, "fsdp", axis=2, tiled=True) if by_column else found

    return jax.shard_map(on_device, in_specs=(split, rows), out_specs=P(rows[0]), check_vma=False)(table, tokens)


class Embed(nn.Module):
    """The token table."""

    vocab_size: int
    width: int
    layout: Layout = "training"

    @nn.compact
    def __call__(self, tokens):
        init = nn.initializers.normal(1 / math.sqrt(self.width))
        return embed_tokens(self.param("embedding", init, (self.vocab_size, self.width)), tokens, layout=self.layout)


class MLP(nn.Module):
    """The gated MLP (arXiv 2002.05202), F wide."""

    model_cfg: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x):
        c = self.model_cfg
        gate = Projection((c.hidden_size,), (self.width,), c.mlp_bias, name="gate")(x)
        up = Projection((c.hidden_size,), (self.width,), c.mlp_bias, name="up")(x)
        hidden = constrain(ACTIVATIONS[c.activation](gate) * up, ROW_AXES, None, "tensor")
        return Projection((self.width,), (c.hidden_size,), c.mlp_bias, name="down")(hidden)
