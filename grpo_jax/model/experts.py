"""Mixtures of experts, without capacity: no token is dropped, whatever the others choose.

The tokens are sorted by their experts and go through `jax.lax.ragged_dot`. On a mesh whose `expert` axis splits the
experts, the tokens of that axis are gathered, each device computes what its own experts are asked for, and the sum of
the devices' answers is scattered back to the rows.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import ExpertsConfig, ModelConfig
from grpo_jax.model.layers import ACTIVATIONS, MLP
from grpo_jax.parallel.mesh import ROW_AXES, drop_indivisible_axes


def choose_experts(
    experts: ExpertsConfig, logits: Float[Array, "T X"], correction: Float[Array, " X"] | None
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """The experts of each of T tokens and their weights, float32."""
    if experts.sigmoid_gate:
        scores = jax.nn.sigmoid(logits)
        wanted = scores + jax.lax.stop_gradient(correction)  # decides who is chosen, not with what weight
        by_group = wanted.reshape(-1, experts.num_groups, experts.num_experts // experts.num_groups)
        best_two = jax.lax.top_k(by_group, 2)[0].sum(axis=-1)
        kept = jax.nn.one_hot(jax.lax.top_k(best_two, experts.num_top_groups)[1], experts.num_groups).sum(axis=1)
        wanted = jnp.where(kept[..., None] > 0, by_group, -jnp.inf).reshape(logits.shape)
    else:
        scores = wanted = jax.nn.softmax(logits, axis=-1)
    chosen = jax.lax.top_k(wanted, experts.num_experts_per_token)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalize_weights:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * experts.routed_scale


def run_experts(x: Float[Array, "T D"], chosen, weights, gate, up, down, first, activation) -> Float[Array, "T D"]:
    """The sum over each token's experts of weight * expert(x), for the experts `first` and following that are given.

    In float32: the order in which a token's experts are added must not matter.

    Args:
      chosen, weights: [T, k].
      gate, up: [X, D, F]; down: [X, F, D]: of some of the experts.
    """
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < gate.shape[0]), local, gate.shape[0])  # others' come last
    order = jnp.argsort(local)
    token = order // chosen.shape[1]
    sizes = jnp.bincount(local, length=gate.shape[0]).astype(jnp.int32)
    # What ragged_dot gives for rows beyond the sizes' sum is not defined; it must reach neither result nor gradient.
    mine = (jnp.arange(len(order)) < sizes.sum())[:, None]
    rows = jnp.where(mine, x[token], 0)
    hidden = activation(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jnp.where(mine, jax.lax.ragged_dot(hidden, down, sizes), 0).astype(jnp.float32)
    return jnp.zeros(x.shape, jnp.float32).at[token].add(out * weights.reshape(-1)[order][:, None])


def experts_on_mesh(x: Float[Array, "N L D"], chosen, weights, gate, up, down, activation) -> Float[Array, "N L D"]:
    """`run_experts` for all experts on the mesh in force.

    Args:
      chosen, weights: [N, L, k].
    """

    def run(x, chosen, weights, gate, up, down, first=0):
        flat = [y.reshape(-1, y.shape[-1]) for y in (x, chosen, weights)]
        return run_experts(*flat, gate, up, down, first, activation).reshape(x.shape)  # float32

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(x, chosen, weights, gate, up, down).astype(x.dtype)
    rows = drop_indivisible_axes(P(ROW_AXES), x.shape, mesh)[0]
    columns = drop_indivisible_axes(P("expert", None, "tensor"), gate.shape, mesh)
    by_expert = columns[0] is not None and mesh.shape["expert"] > 1
    by_column = columns[2] is not None and mesh.shape["tensor"] > 1

    def on_device(x, chosen, weights, gate, up, down):
        if by_expert and rows:
            x, chosen, weights = (jax.lax.all_gather(y, "expert", tiled=True) for y in (x, chosen, weights))
        first = jax.lax.axis_index("expert") * gate.shape[0] if by_expert else 0
        out = run(x, chosen, weights, gate, up, down, first)
        if by_column:
            out = jax.lax.psum(out, "tensor")
        if by_expert:
            out = jax.lax.psum_scatter(out, "expert", tiled=True) if rows else jax.lax.psum(out, "expert")
        return out.astype(x.dtype)

    whole = P(rows)
    return jax.shard_map(
        on_device,
        in_specs=(whole, whole, whole, columns, columns, P(columns[0], columns[2])),
        out_specs=whole,
        check_vma=False,
    )(x, chosen, weights, gate, up, down)


class Router(nn.Module):
    """Which experts a token goes to. Always in float32: a rounding would send it elsewhere."""

    model_cfg: ModelConfig

    @nn.compact
    def __call__(self, x):
        experts, width = self.model_cfg.experts, self.model_cfg.hidden_size
        kernel = self.param("kernel", nn.initializers.normal(width**-0.5), (width, experts.num_experts))
        correction = (
            self.param("correction", nn.initializers.zeros, (experts.num_experts,)) if experts.sigmoid_gate else None
        )
        flat = x.reshape(-1, width).astype(jnp.float32)
        logits = jnp.matmul(flat, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

        def choose(logits, correction):
            found = choose_experts(experts, logits.reshape(-1, experts.num_experts), correction)
            return tuple(y.reshape(*logits.shape[:-1], -1) for y in found)

        logits, mesh = logits.reshape(*x.shape[:-1], -1), jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return choose(logits, correction)
        rows = drop_indivisible_axes(P(ROW_AXES), logits.shape, mesh)  # the partitioner would gather the rows for top_k
        return jax.shard_map(choose, in_specs=(rows, P()), out_specs=(rows, rows), check_vma=False)(logits, correction)


class MixtureOfExperts(nn.Module):
    """Routed experts, and the shared one where the model has it."""

    model_cfg: ModelConfig

    @nn.compact
    def __call__(self, x):
        c, experts = self.model_cfg, self.model_cfg.experts
        chosen, weights = Router(c, name="router")(x)

        def kernel(name, inputs, outputs):
            init = nn.initializers.normal(1 / math.sqrt(inputs))
            return self.param(f"experts_{name}", init, (experts.num_experts, inputs, outputs)).astype(x.dtype)

        gate, up = (kernel(name, c.hidden_size, experts.intermediate_size) for name in ("gate", "up"))
        down = kernel("down", experts.intermediate_size, c.hidden_size)
        out = experts_on_mesh(x, chosen, weights, gate, up, down, ACTIVATIONS[c.activation])
        if experts.shared_intermediate_size:
            out = out + MLP(c, experts.shared_intermediate_size, name="shared")(x)
        return out
