"""The mathematics of GRPO: group-relative advantages, the k3 KL estimator and the clipped surrogate loss.

For each question the old policy samples a group of G completions o_1 ... o_G with rewards r_1 ... r_G. The policy is
trained to maximize

    J = 1/N sum_i 1/|o_i| sum_t [ min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i) - kl_coef * k3_it ]

    rho_it = pi(o_it) / pi_old(o_it)                     probability ratio of token t of completion i
    A_i    = (r_i - mean(r)) / std(r)                    advantage within the group
    k3_it  = pi_ref / pi - log(pi_ref / pi) - 1          estimate of KL(pi || pi_ref)

where i runs over all N completions of the batch. The objective is equation 3 of DeepSeekMath (arXiv 2402.03300, section
4.1), which DeepSeek-R1 (arXiv 2501.12948, section 2.2) uses as well, with separate lower and upper clip bounds.

The loss weights each token by w_it = 1 / (N |o_i|). Token weights are computed over the full batch before it is split
or packed, so the gradient does not depend on how the batch is divided.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num


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


def k3(logps: Float[Array, "*tokens"], other_logps: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """Estimates KL(pi || other) from tokens sampled from pi (DeepSeekMath, equation 4).

    This is the estimator that Schulman calls k3 (http://joschu.net/blog/kl-approx.html).

    Args:
        logps: Log-probs of the tokens under pi.
        other_logps: Their log-probs under the other distribution.

    Returns:
        One estimate per token, in nats. It is never negative, and 0 where the two log-probs agree.
    """
    log_ratio = other_logps - logps
    return jnp.expm1(log_ratio) - log_ratio


def token_weights(
    mask: Num[Array, "N S"] | Bool[Array, "N S"], denominator: float | Float[Array, ""] | None = None
) -> Float[Array, "N S"]:
    """Computes the weight of each token in the loss, w_it = 1 / (denominator * |o_i|).

    Args:
        mask: 1 on the tokens of each completion, 0 elsewhere.
        denominator: The number that the sum over completions is divided by; N by default.

    Returns:
        Weights in float32, 0 where `mask` is 0.

    Raises:
        ValueError: `mask` does not have two axes.
    """
    mask = jnp.asarray(mask, jnp.float32)
    if mask.ndim != 2:
        raise ValueError(f"mask must have shape [N, S]; found {mask.shape}. Pass one row per completion.")
    lengths = jnp.sum(mask, axis=1, keepdims=True)
    return mask / jnp.maximum(lengths, 1.0) / (mask.shape[0] if denominator is None else denominator)


def weighted_loss(
    logps: Float[Array, "*tokens"],
    old_logps: Float[Array, "*tokens"],
    ref_logps: Float[Array, "*tokens"] | None,
    advantages: Float[Array, "*tokens"],
    weights: Float[Array, "*tokens"],
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the GRPO loss as a weighted sum over tokens in any arrangement, such as padded or packed rows.

    Args:
        logps: Log-probs of the sampled tokens under the policy, pi; the argument to differentiate.
        old_logps: Their log-probs under pi_old.
        ref_logps: Their log-probs under pi_ref, or None to leave out the KL term.
        advantages: The advantage of each token's completion.
        weights: The weight w_it of each token. Tokens of weight 0 do not count; their other values need only be finite.
        clip_low: The ratio is clipped from below at 1 - clip_low.
        clip_high: The ratio is clipped from above at 1 + clip_high.
        kl_coef: Coefficient of the KL term.

    Returns:
        The loss, -J, and a dict of metrics without gradient. All metrics are weighted sums like the loss, except
        `policy/ratio_max`, which is a maximum.

    Raises:
        ValueError: The arguments do not all have the same shape.
    """
    shapes = [jnp.shape(x) for x in (logps, old_logps, ref_logps, advantages, weights) if x is not None]
    if len(set(shapes)) > 1:
        raise ValueError(f"log-probs, advantages and weights must have one shape; found {shapes}. Pass one per token.")
    counts = weights > 0
    # Tokens that do not count get a ratio of 1 before exp, which could otherwise overflow and make 0 * inf = NaN.
    log_ratio = jnp.where(counts, logps - jax.lax.stop_gradient(old_logps), 0.0)
    ratio = jnp.exp(log_ratio)
    surrogate = ratio * advantages
    clipped_surrogate = jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
    # min(surrogate, clipped_surrogate). At a tie, jnp.minimum and jnp.clip would pass on only part of the gradient, and
    # with a clip bound of 0 every on-policy token, whose ratio is 1, is a tie.
    is_clipped = clipped_surrogate < surrogate
    objective = jnp.where(is_clipped, clipped_surrogate, surrogate)
    kl = jnp.zeros(())
    if ref_logps is not None:
        token_kl = k3(jnp.where(counts, logps, 0.0), jnp.where(counts, ref_logps, 0.0))
        kl = jnp.sum(weights * token_kl)
        objective = objective - kl_coef * token_kl
    loss = -jnp.sum(weights * objective)
    metrics = {
        "loss/total": loss,
        "policy/kl_ref": kl,
        "policy/clip_frac": jnp.sum(weights * is_clipped),
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
