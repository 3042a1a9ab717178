"""The GRPO loss and its published variants.

For each prompt the old policy samples a group of G completions o_1 ... o_G with advantages A_1 ... A_G (see
`grpo_jax.learn.advantages`). By default the policy is trained to maximize

    J = 1/N sum_i 1/|o_i| sum_t [ min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i) - kl_coef * k3_it ]

    rho_it = pi(o_it) / pi_old(o_it)                     probability ratio of token t of completion i
    k3_it  = pi_ref / pi - log(pi_ref / pi) - 1          estimate of KL(pi || pi_ref)

where i runs over all N completions of the batch. The objective is equation 3 of DeepSeekMath (arXiv 2402.03300, section
4.1), which DeepSeek-R1 (arXiv 2501.12948v1, section 2.2) uses as well, with separate lower and upper clip bounds. The
settings of the config's `loss` section replace its terms one by one: `surrogate` implements the ratios, `estimate_kl`
the KL estimators, and `token_weights` the averaging over tokens. docs/algorithms.md lists their equations and sources.

Log-ratios, log rho and log(pi_ref / pi), are limited to [-20, 20], with zero gradient outside, so that no token can
overflow. Token weights are computed over the full batch before it is split or packed, so the gradient does not depend
on how the batch is divided. Training calls the functions of this module: `token_weights` when a minibatch is packed,
and `weighted_loss` on packed rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from grpo_jax.config.keys import require_choices
from grpo_jax.config.schema import LossSection

MAX_LOG_RATIO = 20.0  # in nats; exp(20) is 4.9e8, and float32 overflows at exp(88.8)

# Metrics that are means over tokens, with the token weights of the loss.
TOKEN_MEANS = ("policy/clip_frac", "policy/kl_ref", "policy/entropy", "policy/kl_sampler", "policy/logp_gap/mean")


class SampledTokens(NamedTuple):
    """The inputs of the loss for each sampled token, in padded rows `[N, S]`, packed rows `[P, W]` or any other shape.

    All tokens of a completion are passed in one call. The completions of a group may be spread over several
    micro-batches, whose losses are added up. There are at most N groups.

    `sums = jax.ops.segment_sum(x.ravel(), tokens.sequence.ravel(), tokens.num_sequences)` sums x over each completion
    and drops the tokens whose index is -1. `sums[tokens.sequence]` gives each token the sum of its completion. In this
    lookup, index -1 wraps around to the last completion, which is harmless because these tokens have weight 0.
    """

    old_logps: Float[Array, "*tokens"]  # log pi_old
    ref_logps: Float[Array, "*tokens"] | None  # log pi_ref; None to leave out the KL term
    advantages: Float[Array, "*tokens"]  # the advantage of the token's completion
    weights: Float[Array, "*tokens"]  # the token's weight; tokens of weight 0 are ignored, whatever their other values
    sequence: Int[Array, "*tokens"]  # index of the token's completion in the batch, 0 to N - 1; -1 on other tokens
    group: Int[Array, "*tokens"] | None  # index of its group in the batch; -1 on other tokens; None if unknown
    num_sequences: int  # N, the number of completions in the whole batch


def inclusive_clip(x: Float[Array, "*shape"], low: float, high: float) -> Float[Array, "*shape"]:
    """Limits x to [low, high]. The gradient is 1 within the limits, which include low and high, and 0 outside.

    At a limit, the gradient of `jnp.clip` is only 0.5. This matters because with a clip bound of 0, the ratio of every
    on-policy token is at the limit. NaN stays NaN, in the gradient too.
    """
    return jnp.where((x < low) | (x > high), jnp.clip(x, low, high), x)


def limit_log_ratio(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Limits a log-ratio to +-MAX_LOG_RATIO, with gradient 0 outside."""
    return inclusive_clip(x, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def estimate_kl(
    logps: Float[Array, "*tokens"], other_logps: Float[Array, "*tokens"], kind: str = "k3"
) -> Float[Array, "*tokens"]:
    """Estimates KL(pi || other) from tokens sampled from pi.

    With q = log other - log pi, the estimators are k1 = -q, k2 = q^2 / 2 and k3 = exp(q) - q - 1
    (http://joschu.net/blog/kl-approx.html). DeepSeekMath uses k3 (equation 4).

    Args:
        logps: Log-probs of the tokens under pi.
        other_logps: Their log-probs under the other distribution.
        kind: "k1", "k2" or "k3".

    Returns:
        One estimate per token, in nats; 0 where the two log-probs agree. k2 and k3 are never negative. q is limited to
        +-MAX_LOG_RATIO, so k3 is at most 4.9e8, and the gradient is 0 outside these limits.
    """
    q = limit_log_ratio(other_logps - logps)
    return {"k1": -q, "k2": jnp.square(q) / 2, "k3": jnp.expm1(q) - q}[kind]


def token_weights(
    mask: Num[np.ndarray | Array, "N S"] | Bool[np.ndarray | Array, "N S"],
    denominator: float | None = None,
    aggregate: str = "sequence",
    constant_length: float | None = None,
    groups: Int[np.ndarray | Array, " N"] | None = None,
) -> Float[np.ndarray | Array, "N S"]:
    """Computes the weight of each token in the loss, which turns the sum over tokens into a mean.

    The function accepts NumPy and JAX arrays. Packing passes NumPy arrays, because JAX operations would wait for the
    update in flight.

    Args:
        mask: 1 on the tokens of each completion, 0 elsewhere.
        denominator: Replaces the outer denominator, which is N, the number of all tokens, or the number of groups.
        aggregate: "sequence" for 1 / (N |o_i|), the mean over completions of the means over their tokens; "token" for
            1 / (number of all tokens); "prompt" for the mean over groups of the means over the tokens of each group;
            "constant" for 1 / (N * constant_length).
        constant_length: The constant, in tokens.
        groups: The group of each completion, for "prompt"; equal numbers form a group.

    Returns:
        Weights in float32, 0 where `mask` is 0.

    Raises:
        ValueError: `mask` does not have two axes.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must have shape [N, S]; found {mask.shape}. Pass one row per completion.")
    mask = mask.astype(jnp.float32)
    inner, outer = mask.sum(axis=1, keepdims=True), mask.shape[0]
    if aggregate == "token":
        inner, outer = inner * 0 + 1, mask.sum().clip(1)
    elif aggregate == "prompt":
        same_group = (groups[:, None] == groups[None, :]).astype(jnp.float32)
        inner, outer = same_group @ inner, (1 / same_group.sum(axis=1)).sum()
    elif aggregate == "constant":
        inner = inner * 0 + constant_length
    return mask / inner.clip(1) / (outer if denominator is None else denominator)


def completion_means(x: Float[Array, "*tokens"], tokens: SampledTokens) -> Float[Array, "*tokens"]:
    """Returns for each token the mean of x over the counted tokens of its completion; x must be 0 on other tokens."""
    counted = (tokens.weights != 0).astype(x.dtype)
    index, count = tokens.sequence.ravel(), tokens.num_sequences
    sums, lengths = (jax.ops.segment_sum(values.ravel(), index, count) for values in (x, counted))
    return (sums / jnp.maximum(lengths, 1))[tokens.sequence]


def surrogate(
    logps: Float[Array, "*tokens"],
    old_logps: Float[Array, "*tokens"],
    A: Float[Array, "*tokens"],
    tokens: SampledTokens,
    loss: LossSection,
) -> tuple[Float[Array, "*tokens"], Bool[Array, "*tokens"]]:
    """Computes the objective of each token, without the KL and entropy terms, for the ratio that `loss.ratio` selects.

    Args:
        logps: Log-probs under the policy; like the next two arrays, 0 where the weight is 0.
        old_logps: Log-probs under pi_old.
        A: Advantages.
        tokens: The other inputs of the loss for these tokens.
        loss: A config's `loss` section.

    Returns:
        The objective, and a mask of the tokens that are cut: clipped, bounded or left out.
    """
    log_ratio, low, high = limit_log_ratio(logps - old_logps), 1 - loss.clip_low, 1 + loss.clip_high
    ratio = jnp.exp(log_ratio)
    if loss.ratio == "detached":  # CISPO, arXiv 2506.13585, equations 4 and 5
        return jax.lax.stop_gradient(jnp.minimum(ratio, high)) * A * logps, ratio > high
    if loss.ratio == "difference":  # DPPO, arXiv 2602.04879
        difference = jnp.exp(logps) - jnp.exp(old_logps)
        is_cut = ((A > 0) & (difference > loss.clip_difference)) | ((A < 0) & (difference < -loss.clip_difference))
        return jnp.where(is_cut, 0.0, ratio * A), is_cut
    if loss.ratio == "sequence":  # GSPO, arXiv 2507.18071, equation 7
        ratio = jnp.exp(completion_means(log_ratio, tokens))
    elif loss.ratio == "sequence_token":  # GSPO-token, equation 14
        mean = jax.lax.stop_gradient(completion_means(log_ratio, tokens))
        ratio = jnp.exp(mean + logps - jax.lax.stop_gradient(logps))
    clipped_ratio = inclusive_clip(ratio, low, high)
    objective, is_cut = jnp.minimum(ratio * A, clipped_ratio * A), clipped_ratio * A < ratio * A
    if loss.clip_dual:  # dual clip, arXiv 1912.09729
        bound = loss.clip_dual * A
        is_cut |= (A < 0) & (objective < bound)
        objective = jnp.where(A < 0, jnp.maximum(objective, bound), objective)
    return objective, is_cut


def weighted_loss(
    logps: Float[Array, "*tokens"],
    entropies: Float[Array, "*tokens"] | None,
    tokens: SampledTokens,
    loss: LossSection,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the loss as a weighted sum over tokens in any arrangement, such as padded or packed rows.

    Args:
        logps: Log-probs of the sampled tokens under the policy, pi; the argument to differentiate.
        entropies: Entropy of the policy at each token's position, in nats, also differentiable; None if unknown.
        tokens: The other inputs of the loss for these tokens.
        loss: A config's `loss` section.

    Returns:
        The loss, -J, and a dict of sums without gradient. If a batch is split, add up the sums of its parts
        (`policy/ratio_max` is a maximum); `finish_metrics` turns them into metrics. `policy/kl_ref` is present only if
        `tokens.ref_logps` is given, and `policy/entropy` only if `entropies` is.

    Raises:
        ValueError: The arrays do not all have the same shape.
    """
    shapes = [jnp.shape(x) for x in (logps, entropies, *tokens[:-1]) if x is not None]
    if len(set(shapes)) > 1:
        raise ValueError(f"log-probs, advantages and weights must have one shape; found {shapes}. Pass one per token.")

    def counted(x):  # sets tokens of weight 0 to 0 before exp, which could otherwise overflow and make 0 * inf = NaN
        return jnp.where(tokens.weights != 0, x, 0.0)

    def total(x):
        return jnp.sum(tokens.weights * x)

    logps, A = counted(logps), counted(tokens.advantages)
    old_logps = jax.lax.stop_gradient(counted(tokens.old_logps))
    ratio = jnp.exp(limit_log_ratio(logps - old_logps))
    objective, is_cut = surrogate(logps, old_logps, A, tokens, loss)
    sums = {
        "policy/clip_frac": total(is_cut),
        "policy/ratio_max": jnp.max(counted(ratio)),
        "tokens/weight": total(1.0),
        "tokens/count": jnp.sum(counted(1.0)),
        "tokens/ratio": jnp.sum(counted(ratio)),
        "tokens/ratio_squared": jnp.sum(counted(jnp.square(ratio))),
    }
    if tokens.ref_logps is not None:
        ref_logps = counted(tokens.ref_logps)
        sums["policy/kl_ref"] = total(estimate_kl(logps, ref_logps))
        if loss.kl_in == "loss":
            kl = estimate_kl(logps, ref_logps, loss.kl)
            objective -= loss.kl_coef * (ratio * kl if loss.kl_corrected else kl)
    if entropies is not None:
        objective += loss.entropy_coef * counted(entropies) if loss.entropy_coef else 0.0
        sums["policy/entropy"] = total(counted(entropies))
    value = -total(objective)
    return value, jax.lax.stop_gradient({"loss/total": value} | sums)


def finish_metrics(sums: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """Turns the sums of `weighted_loss` over a whole batch into metrics.

    Token means are divided by the sum of the token weights. `policy/ess_frac` is the effective sample size of the
    ratios, (sum rho)^2 / sum rho^2, as a fraction of the number of tokens.
    """
    tiny = jnp.finfo(jnp.float32).tiny  # makes the metrics 0 if there are no tokens
    metrics = {name: value for name, value in sums.items() if not name.startswith("tokens/")}
    means = {name: metrics[name] / jnp.maximum(sums["tokens/weight"], tiny) for name in TOKEN_MEANS if name in metrics}
    squares = jnp.maximum(sums["tokens/count"] * sums["tokens/ratio_squared"], tiny)
    return metrics | means | {"policy/ess_frac": jnp.square(sums["tokens/ratio"]) / squares}


def check_settings(loss: LossSection, sequences: int, ref_logps, constant_length, groups) -> None:
    """Raises a ValueError if a name is unknown, two settings conflict, or an argument of `grpo_loss` is missing."""
    require_choices(loss)
    if loss.clip_dual and loss.ratio in ("detached", "difference"):
        raise ValueError(f"clip_dual must be None with ratio={loss.ratio!r}; found {loss.clip_dual}. Leave it out.")
    if loss.clip_dual and loss.clip_dual <= 1:
        raise ValueError(f"clip_dual must be more than 1; found {loss.clip_dual}. Pass a ratio such as 3.")
    if loss.aggregate == "constant" and (constant_length is None or constant_length < 1):
        found = f"found {constant_length}. Pass a length in tokens."
        raise ValueError(f"constant_length must be at least 1 with aggregate='constant'; {found}")
    if loss.aggregate == "prompt" and (groups is None or jnp.shape(groups) != (sequences,)):
        found = f"found {groups!r:.40}. Pass one number per completion."
        raise ValueError(f"groups must have shape ({sequences},) with aggregate='prompt'; {found}")
    if ref_logps is None and loss.kl_coef:
        raise ValueError(
            f"ref_logps must be given, because kl_coef is {loss.kl_coef}; found None. Pass them, or pass kl_coef=0."
        )


def grpo_loss(
    logps: Float[Array, "N S"],
    old_logps: Float[Array, "N S"],
    ref_logps: Float[Array, "N S"] | None,
    advantages: Float[Array, " N"],
    mask: Num[Array, "N S"] | Bool[Array, "N S"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = None,
    kl_coef: float = 0.001,
    kl: str = "k3",
    kl_corrected: bool = False,
    ratio: str = "token",
    clip_difference: float = 0.2,
    aggregate: str = "sequence",
    constant_length: float | None = None,
    groups: Int[Array, " N"] | None = None,
    denominator: float | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the GRPO loss of N completions (see the top of this module) and its metrics.

    Args:
        logps: Log-probs of the sampled tokens under the policy, pi; the argument to differentiate.
        old_logps: Their log-probs under pi_old.
        ref_logps: Their log-probs under pi_ref; may be None if `kl_coef` is 0.
        advantages: One advantage per completion.
        mask: 1 on completion tokens, including the stopping token, and 0 elsewhere.
        clip_low: Offset of the lower clip limit: the ratio is clipped to at least 1 - clip_low.
        clip_high: Offset of the upper clip limit: the ratio is clipped to at most 1 + clip_high.
        clip_dual: Where the advantage is negative, the objective is at least clip_dual times the advantage.
        kl_coef: Coefficient of the KL term.
        kl: Estimator of the KL term, "k1", "k2" or "k3".
        kl_corrected: Whether to multiply the estimator by rho.
        ratio: "token", "sequence", "sequence_token", "detached" or "difference" (see `surrogate`).
        clip_difference: The bound of "difference" on pi - pi_old, a difference of probabilities.
        aggregate: "sequence", "token", "prompt" or "constant" (see `token_weights`).
        constant_length: The number of tokens that "constant" divides by.
        groups: The group of each completion, for "prompt"; equal numbers form a group.
        denominator: Replaces the outer denominator: N, or the number of all tokens or groups. If these completions are
            only part of a batch, pass the number for the whole batch.

    Returns:
        The loss and a dict of scalar metrics (see `finish_metrics`).

    Raises:
        ValueError: A name is unknown, two settings conflict, an argument is missing, or the shapes do not match.
    """
    loss = LossSection(
        ratio=ratio,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_dual=clip_dual or 0.0,
        clip_difference=clip_difference,
        aggregate=aggregate,
        kl_coef=kl_coef,
        kl=kl,
        kl_corrected=kl_corrected,
    )
    logps, old_logps, advantages = jnp.asarray(logps), jnp.asarray(old_logps), jnp.asarray(advantages)
    if logps.ndim != 2 or jnp.shape(mask) != logps.shape or advantages.shape != logps.shape[:1]:
        raise ValueError(
            "logps and mask must have one shape [N, S], and advantages must have shape [N]; found "
            f"{logps.shape}, {jnp.shape(mask)} and {advantages.shape}. Pass one row and one advantage per completion."
        )
    check_settings(loss, len(logps), ref_logps, constant_length, groups)
    mask, groups = jnp.asarray(mask), None if groups is None else jnp.asarray(groups)
    tokens = SampledTokens(
        old_logps=old_logps,
        ref_logps=ref_logps,
        advantages=jnp.broadcast_to(advantages[:, None], logps.shape),
        weights=token_weights(mask, denominator, aggregate, constant_length, groups),
        sequence=jnp.where(mask != 0, jnp.arange(len(logps))[:, None], -1),
        group=None,
        num_sequences=len(logps),
    )
    value, sums = weighted_loss(logps, None, tokens, loss)
    return value, finish_metrics(sums)
