"""The mathematics of GRPO: group-relative advantages, the k3 KL estimator and the clipped surrogate loss.

For each question the old policy samples a group of G completions o_1 ... o_G with rewards r_1 ... r_G. The policy is
trained to maximize

    J = 1/N sum_i 1/|o_i| sum_t [ min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i) - kl_coef * k3_it ]

    rho_it = pi(o_it) / pi_old(o_it)                     probability ratio of token t of completion i
    A_i    = (r_i - mean(r)) / std(r)                    advantage within the group
    k3_it  = pi_ref / pi - log(pi_ref / pi) - 1          estimate of KL(pi || pi_ref)

where i runs over all N completions of the batch. The objective is equation 3 of DeepSeekMath (arXiv 2402.03300, section
4.1), which DeepSeek-R1 (arXiv 2501.12948, section 2.2) uses as well, with separate lower and upper clip bounds. The
log-ratios log rho and log(pi_ref / pi) are limited to [-20, 20], with zero gradient outside, so that no token can
overflow.

The loss weights each token by w_it = 1 / (N |o_i|). Token weights are computed over the full batch before it is split
or packed, so the gradient does not depend on how the batch is divided. Training calls the functions of this module:
`advantages` on each rollout, `token_weights` when a minibatch is packed, and `weighted_loss` on packed rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

MAX_LOG_RATIO = 20.0  # in nats; exp(20) is 4.9e8, and float32 overflows at exp(88.8)


class SampledTokens(NamedTuple):
    """What the loss knows about each sampled token, in padded rows `[N, S]`, packed rows `[P, W]` or any other shape.

    All tokens of a completion are passed in one call. Those of a group may be spread over several micro-batches, whose
    losses are added. There are at most N groups.

    `sums = jax.ops.segment_sum(x.ravel(), tokens.sequence.ravel(), tokens.num_sequences)` sums x over each completion
    and drops the tokens whose index is -1. `sums[tokens.sequence]` gives each token the sum of its completion. In this
    lookup, index -1 wraps around to the last completion, which is harmless because these tokens have weight 0.
    """

    old_logps: Float[Array, "*tokens"]  # log pi_old
    ref_logps: Float[Array, "*tokens"] | None  # log pi_ref; None to leave out the KL term
    advantages: Float[Array, "*tokens"]  # the advantage of the token's completion
    weights: Float[Array, "*tokens"]  # the weight w_it; tokens of weight 0 do not count, whatever their other values
    sequence: Int[Array, "*tokens"]  # index of the token's completion in the batch, 0 to N - 1; -1 on other tokens
    group: Int[Array, "*tokens"] | None  # index of its group in the batch; -1 on other tokens; None if unknown
    num_sequences: int  # N, of the whole batch


def advantages(rewards: Num[Array, "B G"]) -> Float[Array, "B G"]:
    """Computes group-relative advantages, A = (r - mean(r)) / std(r) (DeepSeekMath, section 4.1.2).

    Args:
        rewards: One reward per completion; each row is a group.

    Returns:
        Advantages in float32. `std` is the population standard deviation, which divides by G. The advantages of a
        group whose rewards are all equal are 0.

    Raises:
        ValueError: `rewards` does not have two axes.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape [B, G]; found {rewards.shape}. Reshape them to one row per group.")
    centered = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    std = jnp.sqrt(jnp.mean(jnp.square(centered), axis=1, keepdims=True))
    # Compare the rewards rather than test for std == 0: the mean of equal numbers may differ from them by rounding.
    all_equal = jnp.max(rewards, axis=1, keepdims=True) == jnp.min(rewards, axis=1, keepdims=True)
    return jnp.where(all_equal, 0.0, centered / jnp.where(all_equal, 1.0, std))


def inclusive_clip(x: Float[Array, "*shape"], low: float, high: float) -> Float[Array, "*shape"]:
    """Limits x to [low, high]. The gradient is 1 within the limits, which include low and high, and 0 outside.

    At a limit, the gradient of `jnp.clip` is only 0.5. This matters because with a clip bound of 0, the ratio of every
    on-policy token is at the limit. NaN stays NaN, in the gradient too.
    """
    return jnp.where((x < low) | (x > high), jnp.clip(x, low, high), x)


def k3(logps: Float[Array, "*tokens"], other_logps: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """Estimates KL(pi || other) from tokens sampled from pi (DeepSeekMath, equation 4).

    This is the estimator that Schulman calls k3 (http://joschu.net/blog/kl-approx.html).

    Args:
        logps: Log-probs of the tokens under pi.
        other_logps: Their log-probs under the other distribution.

    Returns:
        One estimate per token, in nats. It is never negative, and 0 where the two log-probs agree. The log-ratio is
        limited to +-MAX_LOG_RATIO, so the estimate is at most 4.9e8, and its gradient is 0 outside these limits.
    """
    log_ratio = inclusive_clip(other_logps - logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(log_ratio) - log_ratio


def token_weights(
    mask: Num[np.ndarray | Array, "N S"] | Bool[np.ndarray | Array, "N S"], denominator: float | None = None
) -> Float[np.ndarray | Array, "N S"]:
    """Computes the weight of each token in the loss, w_it = 1 / (denominator * |o_i|).

    Packing passes a NumPy array while an update may be in flight, for which operations of JAX would wait. Operators and
    methods such as `sum` work on the arrays of both.

    Args:
        mask: 1 on the tokens of each completion, 0 elsewhere.
        denominator: The number that the sum over completions is divided by; N by default.

    Returns:
        Weights in float32, 0 where `mask` is 0.

    Raises:
        ValueError: `mask` does not have two axes.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must have shape [N, S]; found {mask.shape}. Pass one row per completion.")
    mask = mask.astype(jnp.float32)
    lengths = mask.sum(axis=1, keepdims=True)
    return mask / lengths.clip(1) / (mask.shape[0] if denominator is None else denominator)


def weighted_loss(
    logps: Float[Array, "*tokens"],
    entropies: Float[Array, "*tokens"] | None,
    tokens: SampledTokens,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the GRPO loss as a weighted sum over tokens in any arrangement, such as padded or packed rows.

    Args:
        logps: Log-probs of the sampled tokens under the policy, pi; the argument to differentiate.
        entropies: Entropy of the policy at each token's position, in nats, also differentiable; None if unknown.
        tokens: Everything else that is known about the tokens.
        clip_low: The ratio is clipped from below at 1 - clip_low.
        clip_high: The ratio is clipped from above at 1 + clip_high.
        kl_coef: Coefficient of the KL term.

    Returns:
        The loss, -J, and a dict of metrics without gradient. `policy/kl_ref` is present only if `tokens.ref_logps` is
        given, and `policy/entropy` only if `entropies` is. All metrics are weighted sums like the loss, except
        `policy/ratio_max`, which is a maximum.

    Raises:
        ValueError: The arrays do not all have the same shape.
    """
    shapes = [jnp.shape(x) for x in (logps, entropies, *tokens[:-1]) if x is not None]
    if len(set(shapes)) > 1:
        raise ValueError(f"log-probs, advantages and weights must have one shape; found {shapes}. Pass one per token.")

    def counted(x):  # tokens of weight 0 get 0 before exp, which could otherwise overflow and make 0 * inf = NaN
        return jnp.where(tokens.weights != 0, x, 0.0)

    logps, A = counted(logps), counted(tokens.advantages)
    old_logps = jax.lax.stop_gradient(counted(tokens.old_logps))
    ratio = jnp.exp(inclusive_clip(logps - old_logps, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped_ratio = inclusive_clip(ratio, 1 - clip_low, 1 + clip_high)
    objective = jnp.minimum(ratio * A, clipped_ratio * A)
    metrics = {
        "policy/clip_frac": jnp.sum(tokens.weights * (clipped_ratio * A < ratio * A)),
        "policy/ratio_max": jnp.max(ratio),
    }
    if tokens.ref_logps is not None:
        kl = k3(logps, counted(tokens.ref_logps))
        objective = objective - kl_coef * kl
        metrics["policy/kl_ref"] = jnp.sum(tokens.weights * kl)
    if entropies is not None:
        metrics["policy/entropy"] = jnp.sum(tokens.weights * counted(entropies))
    loss = -jnp.sum(tokens.weights * objective)
    return loss, jax.lax.stop_gradient({"loss/total": loss} | metrics)


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
    """Computes the GRPO loss of N completions (see the top of this module) and its metrics.

    Args:
        logps: Log-probs of the sampled tokens under the policy, pi; the argument to differentiate.
        old_logps: Their log-probs under pi_old.
        ref_logps: Their log-probs under pi_ref; may be None if `kl_coef` is 0.
        advantages: One advantage per completion.
        mask: 1 on completion tokens, including the stopping token, and 0 elsewhere.
        clip_low: The ratio is clipped from below at 1 - clip_low.
        clip_high: The ratio is clipped from above at 1 + clip_high.
        kl_coef: Coefficient of the KL term.
        denominator: The number that the sum over completions is divided by; N by default. If these completions are only
            part of a batch, pass the N of the whole batch.

    Returns:
        The loss and a dict of scalar metrics (see `weighted_loss`).

    Raises:
        ValueError: `ref_logps` is None although `kl_coef` is not 0, or the shapes do not match.
    """
    if ref_logps is None and kl_coef:
        raise ValueError(f"ref_logps must be given, because kl_coef is {kl_coef}; found None. Pass it or kl_coef=0.")
    logps, old_logps, advantages = jnp.asarray(logps), jnp.asarray(old_logps), jnp.asarray(advantages)
    if logps.ndim != 2 or jnp.shape(mask) != logps.shape or advantages.shape != logps.shape[:1]:
        raise ValueError(
            "logps and mask must have one shape [N, S], and advantages must have shape [N]; found "
            f"{logps.shape}, {jnp.shape(mask)} and {advantages.shape}. Pass one row and one advantage per completion."
        )
    tokens = SampledTokens(
        old_logps,
        ref_logps,
        jnp.broadcast_to(advantages[:, None], logps.shape),
        token_weights(jnp.asarray(mask), denominator),
        sequence=jnp.where(jnp.asarray(mask) != 0, jnp.arange(len(logps))[:, None], -1),
        group=None,
        num_sequences=len(logps),
    )
    return weighted_loss(logps, None, tokens, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef)
