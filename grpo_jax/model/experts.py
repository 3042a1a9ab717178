"""Mixtures of experts without a capacity limit: no token is dropped, whichever experts the tokens choose.

Tokens are sorted by expert and go through `jax.lax.ragged_dot`. On a mesh whose `expert` axis splits the experts, the
tokens of that axis are gathered, each device applies its own experts to the tokens that chose them, and the sum over
devices is scattered back to the rows.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import ExpertsConfig, ModelConfig
from grpo_jax.model.layers import ACTIVATIONS, MLP
from grpo_jax.model.parameters import module_param, param_spec
from grpo_jax.parallel.mesh import drop_indivisible_axes, row_spec, shard_map_on_mesh


def choose_experts(
    experts: ExpertsConfig, logits: Float[Array, "T X"], correction: Float[Array, " X"] | None
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """Chooses the experts of T tokens.

    Args:
        experts: The mixture's config. With `sigmoid_gate`, DeepSeek-V3's gate (arXiv 2412.19437, eq. 12-16) is used;
            otherwise a softmax over all experts.
        logits: The router's logits [T, X].
        correction: The sigmoid gate's bias [X], which affects which experts are chosen but not their weights.

    Returns:
        The indices of the chosen experts [T, k] and their float32 weights [T, k].
    """
    if experts.sigmoid_gate:
        scores = jax.nn.sigmoid(logits)
        biased = scores + jax.lax.stop_gradient(correction)
        grouped = biased.reshape(-1, experts.num_groups, experts.num_experts // experts.num_groups)
        group_scores = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
        best_groups = jax.lax.top_k(group_scores, experts.num_top_groups)[1]
        keep_mask = jax.nn.one_hot(best_groups, experts.num_groups).sum(axis=1)
        ranking = jnp.where(keep_mask[..., None] > 0, grouped, -jnp.inf).reshape(logits.shape)
    else:
        scores = ranking = jax.nn.softmax(logits, axis=-1)
    chosen = jax.lax.top_k(ranking, experts.num_experts_per_token)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalize_weights:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * experts.routed_scale


def run_experts(x: Float[Array, "T D"], chosen, weights, gate, up, down, first, activation) -> Float[Array, "T D"]:
    """Returns the weighted sum of expert outputs for each token, over a contiguous range of the experts.

    The sum is float32, so that it does not depend on the order in which a token's experts are added.

    Args:
        x: Tokens [T, D].
        chosen: The indices of each token's experts [T, k].
        weights: The weights of each token's experts [T, k].
        gate: Gate kernels [X, D, F] of the experts `first` to `first + X - 1`.
        up: Up kernels [X, D, F] of the same experts.
        down: Down kernels [X, F, D] of the same experts.
        first: The index of the first of these experts.
        activation: The activation function of the gate.
    """
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < gate.shape[0]), local, gate.shape[0])  # other experts sort to the end
    order = jnp.argsort(local)
    token = order // chosen.shape[1]
    sizes = jnp.bincount(local, length=gate.shape[0]).astype(jnp.int32)
    # The output of ragged_dot is undefined beyond the sum of the sizes, so it must reach neither result nor gradient.
    valid = (jnp.arange(len(order)) < sizes.sum())[:, None]
    rows = jnp.where(valid, x[token], 0)
    hidden = activation(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jnp.where(valid, jax.lax.ragged_dot(hidden, down, sizes), 0).astype(jnp.float32)
    return jnp.zeros(x.shape, jnp.float32).at[token].add(out * weights.reshape(-1)[order][:, None])


def experts_on_mesh(x: Float[Array, "N L D"], chosen, weights, gate, up, down, activation) -> Float[Array, "N L D"]:
    """Returns `run_experts` over all experts, computed on the current mesh, in the dtype of x.

    Args:
        x: Tokens [N, L, D].
        chosen: The indices of each token's experts [N, L, k].
        weights: The weights of each token's experts [N, L, k].
        gate: Gate kernels [X, D, F].
        up: Up kernels [X, D, F].
        down: Down kernels [X, F, D].
        activation: The activation function of the gate.
    """

    def run_flat(x, chosen, weights, gate, up, down, first=0):
        flat = [y.reshape(-1, y.shape[-1]) for y in (x, chosen, weights)]
        return run_experts(*flat, gate, up, down, first, activation).reshape(x.shape)  # float32

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run_flat(x, chosen, weights, gate, up, down).astype(x.dtype)
    rows = row_spec(x.shape[0])
    kernel_spec = drop_indivisible_axes(param_spec("moe/experts_gate", "rollout"), gate.shape, mesh)
    rows_split = rows[0] is not None
    experts_split = kernel_spec[0] is not None and mesh.shape["expert"] > 1
    columns_split = kernel_spec[2] is not None and mesh.shape["tensor"] > 1

    def run_shard(x, chosen, weights, gate, up, down):
        if experts_split and rows_split:
            x, chosen, weights = (jax.lax.all_gather(y, "expert", tiled=True) for y in (x, chosen, weights))
        first = jax.lax.axis_index("expert") * gate.shape[0] if experts_split else 0
        out = run_flat(x, chosen, weights, gate, up, down, first)
        if columns_split:
            out = jax.lax.psum(out, "tensor")
        if experts_split:
            out = jax.lax.psum_scatter(out, "expert", tiled=True) if rows_split else jax.lax.psum(out, "expert")
        return out.astype(x.dtype)

    in_specs = rows, rows, rows, kernel_spec, kernel_spec, P(kernel_spec[0], kernel_spec[2])
    return shard_map_on_mesh(run_shard, in_specs, rows)(x, chosen, weights, gate, up, down)


class Router(nn.Module):
    """The gate of a mixture of experts. It is always float32: rounding would send tokens to other experts."""

    model_cfg: ModelConfig

    @nn.compact
    def __call__(self, x):
        """Returns the indices and weights of the experts of each token of x [N, L, D], both [N, L, k]."""
        experts, width = self.model_cfg.experts, self.model_cfg.hidden_size
        kernel = module_param(self, "kernel", width, experts.num_experts)
        correction = module_param(self, "correction", experts.num_experts) if experts.sigmoid_gate else None
        flat = x.reshape(-1, width).astype(jnp.float32)
        logits = jnp.matmul(flat, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

        def choose(logits, correction):
            chosen_and_weights = choose_experts(experts, logits.reshape(-1, experts.num_experts), correction)
            return tuple(y.reshape(*logits.shape[:-1], -1) for y in chosen_and_weights)

        # Without shard_map the partitioner would gather the rows for top_k.
        rows = row_spec(x.shape[0])
        return shard_map_on_mesh(choose, (rows, P()), (rows, rows))(logits.reshape(*x.shape[:-1], -1), correction)


class MixtureOfExperts(nn.Module):
    """A mixture of routed experts, plus a shared expert if the model has one."""

    model_cfg: ModelConfig

    @nn.compact
    def __call__(self, x):
        """Returns the mixture's output [N, L, D] for x [N, L, D]."""
        model_cfg, experts = self.model_cfg, self.model_cfg.experts
        chosen, weights = Router(model_cfg, name="router")(x)
        count, d_model, width = experts.num_experts, model_cfg.hidden_size, experts.intermediate_size
        gate = module_param(self, "experts_gate", count, d_model, width).astype(x.dtype)
        up = module_param(self, "experts_up", count, d_model, width).astype(x.dtype)
        down = module_param(self, "experts_down", count, width, d_model).astype(x.dtype)
        out = experts_on_mesh(x, chosen, weights, gate, up, down, ACTIVATIONS[model_cfg.activation])
        if experts.shared_intermediate_size:
            out = out + MLP(model_cfg, experts.shared_intermediate_size, name="shared")(x)
        return out
