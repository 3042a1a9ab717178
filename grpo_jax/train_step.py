"""Learning: rollouts become experience, the reference scores it, and a sharded jitted update learns from it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from grpo_jax.architecture import ModelConfig
from grpo_jax.grpo import k3, weighted_loss
from grpo_jax.mesh import ROWS, constrain, row_shards
from grpo_jax.optimizer import apply_gradients, make_schedule, state_shardings
from grpo_jax.score import CHUNK_TOKENS, score
from grpo_jax.types import Experience, Packed, Prompts, Rollout, TrainState


def make_experience(
    prompts: Prompts, rollout: Rollout, advantages: Float[np.ndarray, "B G"], ref_logps: Float[np.ndarray, "N S"] | None
) -> Experience:
    """All that the updates of a rollout need, by row, from arrays on the host."""
    rows = {name: np.asarray(x) for name, x in rollout.rows().items()}
    samples, sampled = rollout.tokens.shape[1:]
    width = prompts.tokens.shape[1]
    prompt = np.pad(np.repeat(np.asarray(prompts.tokens), samples, axis=0), ((0, 0), (0, sampled)))
    lengths = np.repeat(np.asarray(prompts.lengths), samples)
    columns = np.arange(width + sampled) - lengths[:, None]  # index in the completion
    drawn = np.take_along_axis(rows["tokens"], np.clip(columns, 0, sampled - 1), axis=1)
    return Experience(
        tokens=np.where(columns < 0, prompt, np.where(columns < sampled, drawn, 0)).astype(np.int32),
        prompt_lengths=lengths, mask=np.arange(sampled) < rows["lengths"][:, None], sampler_logps=rows["logps"],
        ref_logps=np.zeros_like(rows["logps"]) if ref_logps is None else np.asarray(ref_logps),
        advantages=np.asarray(advantages, np.float32).reshape(-1), prompt_ids=rows["prompt_ids"])


def minibatch(experience: Experience, key, index: int, *, count: int) -> Experience:
    """Part `index` of `count` of the rows. Groups are in an order drawn with `key`; the cuts may split some."""
    groups, group = np.unique(experience.prompt_ids, return_inverse=True)
    rank = np.asarray(jax.random.permutation(key, len(groups)))[group]
    rows = len(rank) // count
    taken = np.argsort(rank, kind="stable")[index * rows : (index + 1) * rows]
    return jax.tree.map(lambda x: np.asarray(x)[taken], experience)


def micro_batch(batch: Packed, index) -> Packed:
    """Micro-batch `index`: a row of every shard."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else row_shards(mesh)

    def take(x):
        if not x.shape:
            return x
        by_shard = constrain(x.reshape(shards, x.shape[0] // shards, *x.shape[1:]), ROWS)
        return constrain(jax.lax.dynamic_index_in_dim(by_shard, index, 1, keepdims=False), ROWS)

    return jax.tree.map(take, batch)


def micro_batches(batch: Packed) -> int:
    """The most micro-batches that a batch of that shape may hold."""
    mesh = jax.sharding.get_abstract_mesh()
    return batch.tokens.shape[0] // (1 if mesh.empty else row_shards(mesh))


@partial(jax.jit, static_argnames=("config", "temperature", "chunk_tokens"))
def score_reference(
    config: ModelConfig, params, batch: Packed, *, temperature: float, chunk_tokens: int
) -> Float[Array, "P W"]:
    """log pi_ref of the completions, with the function and at the temperature that the update scores pi with."""
    count = micro_batches(batch)
    score_one = lambda part: score(
        config, params, part, temperature, entropy=False, chunk_tokens=chunk_tokens)[0]
    if count == 1:
        return score_one(batch)
    found = jnp.zeros((batch.tokens.shape[0] // count, *batch.tokens.shape[1:]), jnp.float32)
    found = constrain(jnp.repeat(found[:, None], count, axis=1), ROWS)

    def body(index, found):
        return jax.lax.dynamic_update_index_in_dim(found, score_one(micro_batch(batch, index)), index, 1)

    return jax.lax.fori_loop(0, batch.micro_batches, body, found).reshape(batch.tokens.shape)


LARGEST = ("policy/ratio_max", "policy/logp_gap/max")  # metrics of which the largest of all parts counts


def loss_and_metrics(
    config: ModelConfig, params, part: Packed, *, temperature: float, loss, entropy: bool, chunk_tokens: int
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The GRPO loss of some rows under `params`, and its metrics; both sum over parts (those in LARGEST do not)."""
    logps, entropies = score(config, params, part, temperature, entropy=entropy, chunk_tokens=chunk_tokens)
    weights = part.weights
    value, metrics = weighted_loss(
        logps, part.sampler_logps, part.ref_logps if loss.kl_coef else None, part.advantages, weights,
        clip_low=loss.clip_low, clip_high=loss.clip_high, kl_coef=loss.kl_coef)
    gap = jnp.where(weights > 0, jnp.abs(logps - part.sampler_logps), 0.0)
    metrics |= {
        "policy/kl_sampler": jnp.sum(weights * k3(part.sampler_logps, jnp.where(weights > 0, logps, 0.0))),
        "policy/logp_gap/mean": jnp.sum(weights * gap), "policy/logp_gap/max": gap.max()}
    if entropy:
        metrics["policy/entropy"] = jnp.sum(weights * entropies)
    return value, jax.lax.stop_gradient(metrics)


def gradients(
    config: ModelConfig, params, batch: Packed, *, temperature: float, loss, entropy: bool = True,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[dict, dict[str, Float[Array, ""]]]:
    """The gradient of the loss of a whole minibatch and its metrics, summed over micro-batches in float32.

    The weights are those of the whole minibatch, so neither micro-batches nor packing change the result. It is one
    compiled loop; micro-batches that hold nothing are not run.
    """
    grad = jax.grad(partial(
        loss_and_metrics, config, temperature=temperature, loss=loss, entropy=entropy, chunk_tokens=chunk_tokens),
        has_aux=True)
    if micro_batches(batch) == 1:
        return grad(params, batch)
    first = micro_batch(batch, 0)
    shapes = jax.eval_shape(grad, params, first)[1]

    def add(index, total):
        grads, metrics = grad(params, micro_batch(batch, index))
        most = {name: jnp.maximum(total[1][name], metrics[name]) for name in LARGEST}
        return (jax.tree.map(lambda a, g: a + g.astype(a.dtype), total[0], grads),
                jax.tree.map(jnp.add, total[1], metrics) | most)

    zeros = (jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params),  # placed like the parameters
             jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes))
    return jax.lax.fori_loop(0, batch.micro_batches, add, zeros)


def make_update(
    config: ModelConfig, train_config, mesh: Mesh, params, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Packed], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """The jitted update (state, minibatch) -> (state, metrics); the old state is donated.

    Args:
      params: the policy's parameters, or their shapes.
    """
    schedule = make_schedule(train_config.optim)
    places = state_shardings(mesh, params, optimizer)

    def update(state: TrainState, batch: Packed):
        grads, metrics = gradients(
            config, state.params, batch, temperature=train_config.rollout.temperature, loss=train_config.loss,
            entropy=train_config.log.entropy, chunk_tokens=train_config.update.chunk_tokens)
        grads = jax.lax.with_sharding_constraint(grads, places.params)
        state, about_step = apply_gradients(state, grads, optimizer, schedule)
        return state, metrics | about_step

    everywhere = NamedSharding(mesh, P())
    return jax.jit(update, donate_argnums=0, in_shardings=(places, None), out_shardings=(places, everywhere))
