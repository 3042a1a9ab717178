"""The learning step: turns rollouts into training data, scores completions, and updates the policy."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.config.schema import Config, LossSection
from grpo_jax.learn.grpo import SampledTokens, estimate_kl, finish_metrics, token_weights, weighted_loss
from grpo_jax.learn.logprobs import DEFAULT_CHUNK_TOKENS, packed_logprobs
from grpo_jax.learn.optimizer import apply_gradients, make_schedule, train_state_shardings
from grpo_jax.learn.packing import PackedShape, pack_completions
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.parallel.mesh import ROW_AXES, constrain, num_data_shards
from grpo_jax.text.problem import Prompts
from grpo_jax.types import Experience, PackedBatch, Rollout, TrainState

MAX_REDUCED_METRICS = ("policy/ratio_max", "policy/logp_gap/max")  # reduced with max over micro-batches; others summed


def make_experience(prompts: Prompts, rollout: Rollout) -> Experience:
    """Assembles the per-sequence training data of a rollout from host arrays.

    The advantages and the log-probs under the reference are zeros, and all completions are kept. Fill in what is known
    later with `experience.replace(advantages=..., ref_logps=..., kept=...)`, in any order.

    Args:
        prompts: The prompts of the rollout.
        rollout: The sampled completions.
    """
    rows = {name: np.asarray(x) for name, x in rollout.rows().items()}
    samples, max_length = rollout.tokens.shape[1:]
    prompt_tokens = np.pad(np.repeat(np.asarray(prompts.tokens), samples, axis=0), ((0, 0), (0, max_length)))
    prompt_lengths = np.repeat(np.asarray(prompts.lengths), samples)
    steps = np.arange(prompt_tokens.shape[1]) - prompt_lengths[:, None]  # index of a column in the completion
    completion_tokens = np.take_along_axis(rows["tokens"], np.clip(steps, 0, max_length - 1), axis=1)
    completion_tokens = np.where(steps < max_length, completion_tokens, 0)
    return Experience(
        tokens=np.where(steps < 0, prompt_tokens, completion_tokens).astype(np.int32),
        prompt_lengths=prompt_lengths,
        mask=np.arange(max_length) < rows["lengths"][:, None],
        sampler_logps=rows["logps"],
        ref_logps=np.zeros_like(rows["logps"]),
        advantages=np.zeros(len(prompt_lengths), np.float32),
        kept=np.ones(len(prompt_lengths), bool),
        prompt_ids=rows["prompt_ids"],
    )


def minibatch_rows(prompt_ids: Int[np.ndarray, " N"], key, count: int) -> list[Int[np.ndarray, " _"]]:
    """Divides the sequences of a rollout into minibatches of equal size, or sizes that differ by 1, for one epoch.

    Args:
        prompt_ids: Sequences with equal ids form a group. Groups are shuffled, and a group may span two minibatches.
        key: The random key of the epoch.
        count: Number of minibatches.

    Returns:
        The indices of the sequences of each minibatch.
    """
    ids, group = np.unique(prompt_ids, return_inverse=True)
    rank = np.asarray(jax.random.permutation(key, len(ids)))[group]
    return np.array_split(np.argsort(rank, kind="stable"), count)


def take_rows(experience: Experience, rows: Int[np.ndarray, " _"]) -> Experience:
    """Returns the sequences with the given indices."""
    return jax.tree.map(lambda x: np.asarray(x)[rows], experience)


def pack_minibatch(experience: Experience, loss: LossSection, shape: PackedShape, shards: int) -> PackedBatch:
    """Packs a minibatch on the host, with the token weights of the whole minibatch.

    Args:
        experience: The minibatch of one update, or completions to score. It may be empty.
        loss: A config's `loss` section, which determines the token weights.
        shape: The shape of the packed rows, from `packed_shape`.
        shards: Number of data shards.
    """
    if not len(experience.mask):  # packing needs at least one completion, here one without tokens
        experience = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), experience)
    weights = token_weights(experience.mask, None, loss.aggregate, loss.constant_length, experience.prompt_ids)
    return pack_completions(experience, np.asarray(weights), shape, shards)


def take_micro_batch(batch: PackedBatch, index) -> PackedBatch:
    """Returns micro-batch `index`, which is one packed row of each data shard."""
    shards = num_data_shards()

    def take_index(x):
        if not x.shape:  # num_micro_batches
            return x
        by_shard = constrain(x.reshape(shards, x.shape[0] // shards, *x.shape[1:]), ROW_AXES)
        return constrain(jax.lax.dynamic_index_in_dim(by_shard, index, 1, keepdims=False), ROW_AXES)

    return jax.tree.map(take_index, batch)


def max_micro_batches(batch: PackedBatch) -> int:
    """Returns how many micro-batches the shape of a packed batch has room for."""
    return batch.tokens.shape[0] // num_data_shards()


@partial(jax.jit, static_argnames=("model_cfg", "temperature", "chunk_tokens"))
def score_completions(
    model_cfg: ModelConfig, params, batch: PackedBatch, *, temperature: float, chunk_tokens: int
) -> Float[Array, "P W"]:
    """Computes the log-probs of packed completions with the same function as the update.

    Args:
        model_cfg: The architecture.
        params: Parameters of the model to score with: the reference, or the policy.
        batch: Packed rows; micro-batches that hold no token are not run.
        temperature: Sampling temperature.
        chunk_tokens: Number of tokens per data shard that have logits at a time.

    Returns:
        Log-probs in float32; 0 on prompts and padding.
    """

    def score(rows):
        return packed_logprobs(model_cfg, params, rows, temperature, entropy=False, chunk_tokens=chunk_tokens)[0]

    count = max_micro_batches(batch)
    if count == 1:
        return score(batch)
    logps = jnp.zeros((batch.tokens.shape[0] // count, *batch.tokens.shape[1:]), jnp.float32)
    logps = constrain(jnp.repeat(logps[:, None], count, axis=1), ROW_AXES)  # [shards, micro-batches, W]

    def body(index, logps):
        return jax.lax.dynamic_update_index_in_dim(logps, score(take_micro_batch(batch, index)), index, 1)

    with jax.named_scope("micro_batches"):
        return jax.lax.fori_loop(0, batch.num_micro_batches, body, logps).reshape(batch.tokens.shape)


def loss_and_metrics(
    model_cfg: ModelConfig,
    params,
    rows: PackedBatch,
    *,
    temperature: float,
    loss: LossSection,
    entropy: bool,
    chunk_tokens: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the loss of packed rows and the sums that `finish_metrics` turns into metrics.

    To combine micro-batches, add up their losses and sums, but take the maximum of those in `MAX_REDUCED_METRICS`. See
    `minibatch_gradients` for the arguments.
    """
    logps, entropies = packed_logprobs(model_cfg, params, rows, temperature, entropy=entropy, chunk_tokens=chunk_tokens)
    tokens = SampledTokens(
        old_logps=rows.sampler_logps,
        ref_logps=rows.ref_logps if loss.kl_coef else None,
        advantages=rows.advantages,
        weights=rows.weights,
        sequence=rows.sequence,
        group=rows.group,
        num_sequences=rows.num_sequences,
    )
    loss_value, sums = weighted_loss(logps, entropies if entropy else None, tokens, loss)
    logp_gap = jnp.where(rows.weights != 0, jnp.abs(logps - rows.sampler_logps), 0.0)
    sums |= {
        "policy/kl_sampler": jnp.sum(rows.weights * estimate_kl(rows.sampler_logps, logps)),
        "policy/logp_gap/mean": jnp.sum(rows.weights * logp_gap),
        "policy/logp_gap/max": logp_gap.max(),
    }
    return loss_value, jax.lax.stop_gradient(sums)


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
    """Computes the gradient of the loss over a minibatch, accumulated over its micro-batches in float32.

    The token weights are those of the whole minibatch, so the result does not depend on micro-batches or packing. The
    loop over micro-batches is compiled once, and those that hold no token are not run.

    Args:
        model_cfg: The architecture.
        params: Parameters of the policy.
        batch: Packed rows of the minibatch.
        temperature: Sampling temperature.
        loss: A config's `loss` section.
        entropy: Whether to compute entropies, for `policy/entropy` and the entropy bonus.
        chunk_tokens: Number of tokens per data shard that have logits at a time.

    Returns:
        The gradients, and a dict of scalar metrics.
    """
    options = dict(temperature=temperature, loss=loss, entropy=entropy, chunk_tokens=chunk_tokens)
    grad = jax.grad(partial(loss_and_metrics, model_cfg, **options), has_aux=True)
    if max_micro_batches(batch) == 1:
        grads, sums = grad(params, batch)
        return grads, finish_metrics(sums)
    sum_shapes = jax.eval_shape(grad, params, take_micro_batch(batch, 0))[1]

    def accumulate(index, totals):
        total_grads, total_sums = totals
        grads, sums = grad(params, take_micro_batch(batch, index))
        largest = {name: jnp.maximum(total_sums[name], sums[name]) for name in MAX_REDUCED_METRICS}
        return (
            jax.tree.map(lambda total, g: total + g.astype(total.dtype), total_grads, grads),
            jax.tree.map(jnp.add, total_sums, sums) | largest,
        )

    zeros = (
        jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params),  # sharded like the parameters
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sum_shapes),
    )
    with jax.named_scope("micro_batches"):
        grads, sums = jax.lax.fori_loop(0, batch.num_micro_batches, accumulate, zeros)
    return grads, finish_metrics(sums)


def make_update(
    model_cfg: ModelConfig, cfg: Config, mesh: Mesh, params, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Builds the jitted update, (state, minibatch) -> (state, metrics). The old state is donated.

    Args:
        model_cfg: The architecture.
        cfg: The run's config.
        mesh: The device mesh.
        params: Parameters of the policy, or their shapes.
        optimizer: The optimizer, from `make_optimizer(cfg.optim)`.
    """
    schedule = make_schedule(cfg.optim)
    shardings = train_state_shardings(mesh, params, optimizer)

    def update(state: TrainState, batch: PackedBatch):
        grads, metrics = minibatch_gradients(
            model_cfg,
            state.params,
            batch,
            temperature=cfg.rollout.temperature,
            loss=cfg.loss,
            entropy=cfg.log.entropy or cfg.loss.entropy_coef > 0,
            chunk_tokens=cfg.train.chunk_tokens,
        )
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        # Without a signal the gradient consists of rounding errors, which Adam would scale up to steps of full size.
        has_signal = jnp.any(batch.advantages != 0) | (cfg.loss.entropy_coef > 0)
        if cfg.loss.kl_coef and cfg.loss.kl_in == "loss":
            has_signal |= ~state.is_reference
        has_signal &= jnp.any(batch.weights != 0)  # in an empty minibatch, momentum must not move the parameters
        state, optimizer_metrics = apply_gradients(state, grads, optimizer, schedule, has_signal)
        return state, metrics | optimizer_metrics

    replicated = NamedSharding(mesh, P())
    return jax.jit(update, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, replicated))
