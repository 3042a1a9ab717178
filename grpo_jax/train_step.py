"""Learning: rollouts become experience, the reference scores it, and a sharded jitted update learns from it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.architecture import ModelConfig
from grpo_jax.grpo import k3, token_weights, weighted_loss
from grpo_jax.mesh import ROWS, constrain, path_name, shardings
from grpo_jax.score import score_completions
from grpo_jax.types import Experience, Prompts, Rollout, TrainState


def make_schedule(optim) -> optax.Schedule:
    """Linear warm-up that reaches `optim.lr` at update `optim.warmup_steps`, then constant."""
    return lambda step: optim.lr * jnp.minimum(1.0, (step + 1) / max(1, optim.warmup_steps))


def make_optimizer(optim) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm, from a config's `optim` section."""
    return optax.chain(
        optax.clip_by_global_norm(optim.grad_clip),
        optax.adamw(
            make_schedule(optim), b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, mask=decays))


def decays(params):
    """Which leaves weight decay draws to 0: not norms, biases and the correction of a router."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).split("/")[-1] not in ("scale", "bias", "correction"), params)


def state_shardings(mesh: Mesh, params, optimizer: optax.GradientTransformation) -> TrainState:
    """Where each leaf of a train state lives; optimizer moments lie as their parameters do."""
    opt_state = jax.eval_shape(optimizer.init, params)
    return TrainState(
        step=NamedSharding(mesh, P()), params=shardings(mesh, params), opt_state=shardings(mesh, opt_state))


def fresh_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


def state_shapes(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes and dtypes of a train state, from those of its parameters."""
    return jax.eval_shape(lambda params: fresh_state(params, optimizer), params)


def init_state(mesh: Mesh, params, optimizer: optax.GradientTransformation) -> TrainState:
    """`fresh_state` on the mesh; `params` are taken over (donated)."""
    places = state_shardings(mesh, params, optimizer)
    return jax.jit(lambda params: fresh_state(params, optimizer), out_shardings=places, donate_argnums=0)(params)


def join(prompts: Prompts, rollout: Rollout) -> tuple[Int[Array, "N L"], Int[Array, " N"]]:
    """Each row's prompt and completion with nothing in between, padded on the right; and the prompts' lengths."""
    samples, sampled = rollout.tokens.shape[1:]
    width = prompts.tokens.shape[1]
    prompt = jnp.pad(jnp.repeat(jnp.asarray(prompts.tokens), samples, axis=0), ((0, 0), (0, sampled)))
    lengths = jnp.repeat(jnp.asarray(prompts.lengths), samples)
    columns = jnp.arange(width + sampled) - lengths[:, None]  # index in the completion
    completion = rollout.rows()["tokens"]
    drawn = jnp.take_along_axis(completion, jnp.clip(columns, 0, sampled - 1), axis=1)
    return jnp.where(columns < 0, prompt, jnp.where(columns < sampled, drawn, 0)), lengths


@jax.jit
def make_experience(
    prompts: Prompts, rollout: Rollout, advantages: Float[Array, "B G"], ref_logps: Float[Array, "N S"] | None
) -> Experience:
    """All that the updates of a rollout need, by row."""
    tokens, lengths = join(prompts, rollout)
    rows = rollout.rows()
    mask = jnp.arange(rows["tokens"].shape[1]) < rows["lengths"][:, None]
    return Experience(
        tokens=tokens, prompt_lengths=lengths, mask=mask, sampler_logps=rows["logps"],
        ref_logps=jnp.zeros_like(rows["logps"]) if ref_logps is None else ref_logps,
        advantages=jnp.asarray(advantages).reshape(-1))


def slices(tree, count: int):
    """Rows [N, ...] as [count, N / count, ...]; every slice takes rows from all over, so that shards stay even."""
    split = lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
    return jax.tree.map(lambda x: constrain(split(x), None, ROWS), tree)


@partial(jax.jit, static_argnames=("config", "temperature", "micro_batches"))
def score_reference(
    config: ModelConfig, params, prompts: Prompts, rollout: Rollout, *, temperature: float, micro_batches: int
) -> Float[Array, "N S"]:
    """log pi_ref of the completions, with the function and at the temperature that the update scores pi with."""
    sampled = rollout.tokens.shape[2]
    parts = slices(join(prompts, rollout), micro_batches)
    logps = jax.lax.map(
        lambda part: score_completions(config, params, *part, sampled, temperature)[0], parts)
    return jnp.swapaxes(logps, 0, 1).reshape(-1, sampled)


@partial(jax.jit, static_argnames=("count",))
def minibatch(experience: Experience, key, index, *, count: int) -> Experience:
    """Part `index` of `count` of the rows, in an order drawn with `key`."""
    rows = experience.advantages.shape[0]
    order = jax.lax.dynamic_slice_in_dim(jax.random.permutation(key, rows), index * (rows // count), rows // count)
    return jax.tree.map(lambda x: constrain(x[order], ROWS), experience)


LARGEST = ("policy/ratio_max", "policy/logp_gap/max")  # metrics of which the largest of all parts counts


def loss_and_metrics(
    config: ModelConfig, params, part: Experience, weights: Float[Array, "N S"], *, temperature: float, loss
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The GRPO loss of some rows under `params`, and its metrics; both sum over parts (those in LARGEST do not)."""
    sampled = part.mask.shape[1]
    logps, entropies = score_completions(config, params, part.tokens, part.prompt_lengths, sampled, temperature)
    value, metrics = weighted_loss(
        logps, part.sampler_logps, part.ref_logps if loss.kl_coef else None,
        jnp.broadcast_to(part.advantages[:, None], logps.shape), weights,
        clip_low=loss.clip_low, clip_high=loss.clip_high, kl_coef=loss.kl_coef)
    drift = jnp.sum(weights * k3(part.sampler_logps, jnp.where(weights > 0, logps, 0.0)))
    entropy = jnp.sum(jnp.where(weights > 0, weights * entropies, 0.0))
    gap = jnp.where(weights > 0, jnp.abs(logps - part.sampler_logps), 0.0)
    return value, metrics | jax.lax.stop_gradient({
        "policy/kl_sampler": drift, "policy/logp_gap/mean": jnp.sum(weights * gap), "policy/logp_gap/max": gap.max(),
        "policy/entropy": entropy})


def gradients(
    config: ModelConfig, params, batch: Experience, *, temperature: float, loss, micro_batches: int
) -> tuple[dict, dict[str, Float[Array, ""]]]:
    """The gradient of the loss of a whole minibatch and its metrics, summed over micro-batches in float32.

    The weights are those of the whole minibatch, so the number of micro-batches does not change the result.
    """
    weights = token_weights(batch.mask)
    grad = jax.grad(partial(loss_and_metrics, config, temperature=temperature, loss=loss), has_aux=True)

    def add(total, part):
        grads, metrics = grad(params, *part)
        most = {name: jnp.maximum(total[1][name], metrics[name]) for name in LARGEST}
        return (jax.tree.map(lambda a, g: a + g.astype(a.dtype), total[0], grads),
                jax.tree.map(jnp.add, total[1], metrics) | most), None

    if micro_batches == 1:
        return grad(params, batch, weights)
    parts = slices((batch, weights), micro_batches)
    shapes = jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], parts))
    zeros = (jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params),  # placed like the parameters
             jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes[1]))
    return jax.lax.scan(add, zeros, parts)[0]


def make_update(
    config: ModelConfig, train_config, mesh: Mesh, params, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Experience], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """The jitted update (state, minibatch) -> (state, metrics); the old state is donated.

    Args:
      params: the policy's parameters, or their shapes.
    """
    schedule = make_schedule(train_config.optim)

    def update(state: TrainState, batch: Experience):
        grads, metrics = gradients(
            config, state.params, batch, temperature=train_config.rollout.temperature, loss=train_config.loss,
            micro_batches=train_config.update.micro_batches)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics |= {"optim/grad_norm": optax.tree.norm(grads), "optim/lr": jnp.asarray(schedule(state.step))}
        return TrainState(state.step + 1, optax.apply_updates(state.params, changes), opt_state), metrics

    places = state_shardings(mesh, params, optimizer)
    everywhere = NamedSharding(mesh, P())
    return jax.jit(update, donate_argnums=0, in_shardings=(places, None), out_shardings=(places, everywhere))
