"""The page of mathematics: group advantages, the k3 estimator, the clipped surrogate.

DeepSeekMath (arXiv 2402.03300, section 4.1) and DeepSeek-R1 (arXiv 2501.12948, section 2.2). For a question, the old
policy draws G answers o_1 ... o_G with rewards r_1 ... r_G. The policy then maximises

    1/N sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i) - kl_coef * k3 ]

    rho  = pi(o_it) / pi_old(o_it)
    A_i  = (r_i - mean(r)) / sigma(r)
    k3   = pi_ref / pi - log(pi_ref / pi) - 1

over the N answers of the batch. The losses below work on weights per token, w_it = 1 / (N |o_i|): whoever splits or
packs a batch passes the weights of the whole, so no split can change a gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num


def advantages(rewards: Num[Array, "B G"]) -> Float[Array, "B G"]:
    """(r - mean of the group) / sigma of the group, sigma being the population standard deviation (divided by G).

    A group of equal rewards has advantages 0.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 2:
        raise ValueError(f"expected rewards [B, G]; found shape {rewards.shape}")
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    sigma = jnp.sqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True))
    # Equality is asked of the rewards: the mean of equal numbers may be rounded off them.
    equal = jnp.max(rewards, axis=1, keepdims=True) == jnp.min(rewards, axis=1, keepdims=True)
    return jnp.where(equal, 0.0, centred / jnp.where(equal, 1.0, sigma))


def k3(logps: Float[Array, "..."], other_logps: Float[Array, "..."]) -> Float[Array, "..."]:
    """The estimate of KL(pi || other) at a token drawn from pi: never negative, 0 where both agree.

    Schulman's k3 (joschu.net/blog/kl-approx.html); DeepSeekMath's equation 4.
    """
    delta = other_logps - logps
    return jnp.expm1(delta) - delta


def token_weights(
    mask: Num[Array, "N S"] | Bool[Array, "N S"], denominator: float | Float[Array, ""] | None = None
) -> Float[Array, "N S"]:
    """1 / (denominator |o_i|) on the tokens of answer i, 0 elsewhere; the denominator is N by default."""
    mask = jnp.asarray(mask, jnp.float32)
    lengths = jnp.sum(mask, axis=1, keepdims=True)
    return mask / jnp.maximum(lengths, 1.0) / (mask.shape[0] if denominator is None else denominator)


def weighted_loss(
    logps: Float[Array, "..."],
    old_logps: Float[Array, "..."],
    ref_logps: Float[Array, "..."] | None,
    advantages: Float[Array, "..."],
    weights: Float[Array, "..."],
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The negated objective as a sum over tokens, whatever their arrangement; all arguments have one shape.

    Args:
      weights: w_it; 0 on tokens that do not count, which may hold anything finite.
    Returns:
      The loss, and metrics that are sums weighted like it, but for `policy/ratio_max`.
    """
    counts = weights > 0
    # Where nothing counts the difference is made 0 before exp, so that no overflow there can become 0 * inf.
    log_ratio = jnp.where(counts, logps - jax.lax.stop_gradient(old_logps), 0.0)
    ratio = jnp.exp(log_ratio)
    # min(rho A, clip(rho) A) is clip(rho) A just where rho has left the range in the direction that A rewards.
    cut = (ratio > 1 + clip_high) & (advantages > 0) | (ratio < 1 - clip_low) & (advantages < 0)
    objective = jnp.where(cut, jnp.clip(ratio, 1 - clip_low, 1 + clip_high), ratio) * advantages
    kl = jnp.zeros(())
    if ref_logps is not None:
        kl_tokens = k3(jnp.where(counts, logps, 0.0), jnp.where(counts, ref_logps, 0.0))
        kl = jnp.sum(weights * kl_tokens)
        objective = objective - kl_coef * kl_tokens
    loss = -jnp.sum(weights * objective)
    metrics = {
        "loss/total": loss,
        "policy/kl_ref": kl,
        "policy/clip_frac": jnp.sum(weights * cut),
        "policy/ratio_max": jnp.max(ratio),
    }
    return loss, jax.lax.stop_gradient(metrics)


def grpo_loss(
    logps: Float[Array, "N S"],
    old_logps: Float[Array, "N S"],
    ref_logps: Float[Array, "N S"] | None,
    advantages: Float[Array, " N"],
    mask: Num[Array, "N S"] | Bool[Array, "N S"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.001,
    denominator: float | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """GRPO's loss (see the top of this file) of N answers, and its metrics.

    Args:
      logps: log pi of the sampled tokens; the argument to differentiate.
      old_logps, ref_logps: log pi_old and log pi_ref; `ref_logps` may be None when `kl_coef` is 0.
      mask: 1 on the answers' tokens, the stopping token included.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      denominator: what the sum over answers is divided by: N of the whole batch, when these are a part of it.
    Raises:
      ValueError: `kl_coef` is not 0 and there is no `ref_logps`, or the shapes disagree.
    """
    if ref_logps is None and kl_coef:
        raise ValueError(f"expected ref_logps, as kl_coef is {kl_coef}; found None; pass them or kl_coef=0")
    logps, old_logps, advantages = jnp.asarray(logps), jnp.asarray(old_logps), jnp.asarray(advantages)
    shapes = {jnp.shape(x) for x in (logps, old_logps, logps if ref_logps is None else ref_logps, mask)}
    if len(shapes) > 1 or logps.ndim != 2 or advantages.shape != logps.shape[:1]:
        raise ValueError(
            f"expected log-probs and mask of one shape [N, S] and advantages [N]; "
            f"found {sorted(shapes)} and {advantages.shape}"
        )
    return weighted_loss(
        logps,
        old_logps,
        ref_logps,
        jnp.broadcast_to(advantages[:, None], logps.shape),
        token_weights(mask, denominator),
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coef=kl_coef,
    )
