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

from grpo_jax.config.schema import Config, LossSection
from grpo_jax.learn.grpo import k3, weighted_loss
from grpo_jax.learn.logprobs import DEFAULT_CHUNK_TOKENS, packed_logprobs
from grpo_jax.learn.optimizer import apply_gradients, make_schedule, train_state_shardings
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.parallel.mesh import ROW_AXES, constrain, num_row_shards
from grpo_jax.text.problem import Prompts
from grpo_jax.types import Experience, PackedBatch, Rollout, TrainState


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
        prompt_lengths=lengths,
        mask=np.arange(sampled) < rows["lengths"][:, None],
        sampler_logps=rows["logps"],
        ref_logps=np.zeros_like(rows["logps"]) if ref_logps is None else np.asarray(ref_logps),
        advantages=np.asarray(advantages, np.float32).reshape(-1),
        prompt_ids=rows["prompt_ids"],
    )


def take_minibatch(experience: Experience, key, index: int, *, count: int) -> Experience:
    """Part `index` of `count` of the rows. Groups are in an order drawn with `key`; the cuts may split some."""
    groups, group = np.unique(experience.prompt_ids, return_inverse=True)
    rank = np.asarray(jax.random.permutation(key, len(groups)))[group]
    rows = len(rank) // count
    taken = np.argsort(rank, kind="stable")[index * rows : (index + 1) * rows]
    return jax.tree.map(lambda x: np.asarray(x)[taken], experience)


def take_micro_batch(batch: PackedBatch, index) -> PackedBatch:
    """Micro-batch `index`: a row of every shard."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else num_row_shards(mesh)

    def take(x):
        if not x.shape:
            return x
        by_shard = constrain(x.reshape(shards, x.shape[0] // shards, *x.shape[1:]), ROW_AXES)
        return constrain(jax.lax.dynamic_index_in_dim(by_shard, index, 1, keepdims=False), ROW_AXES)

    return jax.tree.map(take, batch)


def num_micro_batches(batch: PackedBatch) -> int:
    """The most micro-batches that a batch of that shape may hold."""
    mesh = jax.sharding.get_abstract_mesh()
    return batch.tokens.shape[0] // (1 if mesh.empty else num_row_shards(mesh))


@partial(jax.jit, static_argnames=("model_cfg", "temperature", "chunk_tokens"))
def score_reference(
    model_cfg: ModelConfig, params, batch: PackedBatch, *, temperature: float, chunk_tokens: int
) -> Float[Array, "P W"]:
    """log pi_ref of the completions, with the function and at the temperature that the update scores pi with."""
    count = num_micro_batches(batch)
    score_one = lambda part: packed_logprobs(
        model_cfg, params, part, temperature, entropy=False, chunk_tokens=chunk_tokens
    )[0]
    if count == 1:
        return score_one(batch)
    found = jnp.zeros((batch.tokens.shape[0] // count, *batch.tokens.shape[1:]), jnp.float32)
    found = constrain(jnp.repeat(found[:, None], count, axis=1), ROW_AXES)

    def body(index, found):
        return jax.lax.dynamic_update_index_in_dim(found, score_one(take_micro_batch(batch, index)), index, 1)

    return jax.lax.fori_loop(0, batch.micro_batches, body, found).reshape(batch.tokens.shape)


MAX_REDUCED_METRICS = ("policy/ratio_max", "policy/logp_gap/max")  # metrics of which the largest of all parts counts


def loss_and_metrics(
    model_cfg: ModelConfig,
    params,
    part: PackedBatch,
    *,
    temperature: float,
    loss: LossSection,
    entropy: bool,
    chunk_tokens: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The GRPO loss of some rows under `params`, and its metrics; both sum over parts (those in LARGEST do not)."""
    logps, entropies = packed_logprobs(model_cfg, params, part, temperature, entropy=entropy, chunk_tokens=chunk_tokens)
    weights = part.weights
    value, metrics = weighted_loss(
        logps,
        part.sampler_logps,
        part.ref_logps if loss.kl_coef else None,
        part.advantages,
        weights,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        kl_coef=loss.kl_coef,
    )
    gap = jnp.where(weights > 0, jnp.abs(logps - part.sampler_logps), 0.0)
    metrics |= {
        "policy/kl_sampler": jnp.sum(weights * k3(part.sampler_logps, jnp.where(weights > 0, logps, 0.0))),
        "policy/logp_gap/mean": jnp.sum(weights * gap),
        "policy/logp_gap/max": gap.max(),
    }
    if entropy:
        metrics["policy/entropy"] = jnp.sum(weights * entropies)
    return value, jax.lax.stop_gradient(metrics)


def minibatch_gradients(
    model_cfg: ModelConfig,
    params,
    batch: PackedBatch,
    *,
    temperature: float,
    loss: LossSection,
    entropy: bool = True,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> tuple[dict, dict[str, Float[Array, ""]]]:
    """The gradient of the loss of a whole minibatch and its metrics, summed over micro-batches in float32.

    The weights are those of the whole minibatch, so neither micro-batches nor packing change the result. It is one
    compiled loop; micro-batches that hold nothing are not run.
    """
    grad = jax.grad(
        partial(
            loss_and_metrics, model_cfg, temperature=temperature, loss=loss, entropy=entropy, chunk_tokens=chunk_tokens
        ),
        has_aux=True,
    )
    if num_micro_batches(batch) == 1:
        return grad(params, batch)
    first = take_micro_batch(batch, 0)
    shapes = jax.eval_shape(grad, params, first)[1]

    def add(index, total):
        grads, metrics = grad(params, take_micro_batch(batch, index))
        most = {name: jnp.maximum(total[1][name], metrics[name]) for name in MAX_REDUCED_METRICS}
        return (
            jax.tree.map(lambda a, g: a + g.astype(a.dtype), total[0], grads),
            jax.tree.map(jnp.add, total[1], metrics) | most,
        )

    zeros = (
        jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params),  # placed like the parameters
        jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes),
    )
    return jax.lax.fori_loop(0, batch.micro_batches, add, zeros)


def make_update(
    model_cfg: ModelConfig, cfg: Config, mesh: Mesh, params, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """The jitted update (state, minibatch) -> (state, metrics); the old state is donated.

    Args:
      params: the policy's parameters, or their shapes.
    """
    schedule = make_schedule(cfg.optim)
    places = train_state_shardings(mesh, params, optimizer)

    def update(state: TrainState, batch: PackedBatch):
        grads, metrics = minibatch_gradients(
            model_cfg,
            state.params,
            batch,
            temperature=cfg.rollout.temperature,
            loss=cfg.loss,
            entropy=cfg.log.entropy,
            chunk_tokens=cfg.train.chunk_tokens,
        )
        grads = jax.lax.with_sharding_constraint(grads, places.params)
        state, about_step = apply_gradients(state, grads, optimizer, schedule)
        return state, metrics | about_step

    everywhere = NamedSharding(mesh, P())
    return jax.jit(update, donate_argnums=0, in_shardings=(places, None), out_shardings=(places, everywhere))
