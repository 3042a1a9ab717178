"""Advantages and losses of every setting in float64 NumPy, with gradients derived by hand, independent of `grpo_jax`.

`loss` follows the published equations: rho = pi / pi_old, q = log pi_ref - log pi, and the gradient treats sg(x) as a
constant.
"""

import numpy as np

LIMIT = 20.0  # log rho and q are limited to +-20, without a gradient outside


def advantages(rewards, mean="group", std="group", ddof=0, eps=0.0):
    """Computes (reward - mean) / (std + eps) of rewards `[B, G]`, one completion at a time."""
    rewards = np.asarray(rewards, np.float64)
    result = np.zeros(rewards.shape)

    def deviation(values):  # exactly 0 where all values are equal
        return 0.0 if np.all(values == values.flat[0]) else np.std(values, ddof=ddof)

    for b, g in np.ndindex(rewards.shape):
        group, others = rewards[b], np.delete(rewards[b], g)
        if mean != "batch" and np.all(group == group[0]):
            continue  # equal rewards have advantages of 0
        center = {"group": np.mean(group), "leave_one_out": np.mean(others), "batch": np.mean(rewards)}[mean]
        if std == "none":
            result[b, g] = rewards[b, g] - center
        else:
            divisor = deviation({"group": group, "batch": rewards}[std]) + eps
            result[b, g] = (rewards[b, g] - center) / divisor if divisor else 0.0
    return result


def token_weights(mask, aggregate, constant_length=None, groups=None, denominator=None):
    """Computes the weight of each token, one token at a time; 0 where `mask` is 0."""
    weights = np.zeros(mask.shape)
    for i, t in np.argwhere(mask):
        if aggregate == "sequence":
            weights[i, t] = 1 / mask[i].sum() / (denominator or len(mask))
        elif aggregate == "token":
            weights[i, t] = 1 / (denominator or mask.sum())
        elif aggregate == "prompt":
            tokens = sum(mask[j].sum() for j in range(len(mask)) if groups[j] == groups[i])
            weights[i, t] = 1 / tokens / (denominator or len(set(groups)))
        elif aggregate == "constant":
            weights[i, t] = 1 / constant_length / (denominator or len(mask))
    return weights


def cut(x):
    """Returns x limited to +-20 and the derivative: 1 within the limits and 0 outside."""
    return np.clip(x, -LIMIT, LIMIT), (np.abs(x) <= LIMIT).astype(float)


def estimator(kl, q):
    """Returns the estimate k of KL(pi || ref) and dk/dq."""
    return {"k1": (-q, -np.ones_like(q)), "k2": (q**2 / 2, q), "k3": (np.exp(q) - q - 1, np.exp(q) - 1)}[kl]


def row_means(x, mask):
    """Replaces each token by the mean over its completion's tokens."""
    return np.where(mask, (x * mask).sum(axis=1, keepdims=True) / np.maximum(mask.sum(axis=1, keepdims=True), 1), 0.0)


def loss(
    logps,
    old_logps,
    ref_logps,
    advantages,
    mask,
    *,
    ratio,
    clip_low,
    clip_high,
    clip_dual,
    clip_difference,
    kl,
    kl_corrected,
    kl_coef,
    aggregate,
    constant_length=None,
    groups=None,
    denominator=None,
    held=None,
):
    """Computes the loss, its gradient in `logps` and its metrics.

    `held` is the value of sg(log pi). Pass it only to take finite differences of this function; it defaults to `logps`.
    """
    held = logps if held is None else held
    mask = np.asarray(mask, bool)
    A = np.where(mask, advantages[:, None], 0.0)
    log_rho, in_rho = cut(np.where(mask, logps - old_logps, 0.0))
    held_log_rho, _ = cut(np.where(mask, held - old_logps, 0.0))
    rho = np.exp(log_rho)

    # The surrogate of each token. `slope` is its derivative in log w, and log w differs between the ratios.
    if ratio == "detached":
        w = np.exp(held_log_rho)
        surrogate, slope = np.minimum(w, 1 + clip_high) * A * logps, np.minimum(w, 1 + clip_high) * A
        is_cut = w > 1 + clip_high
    elif ratio == "difference":
        step = np.exp(held) - np.exp(old_logps)
        is_cut = ((A > 0) & (step > clip_difference)) | ((A < 0) & (step < -clip_difference))
        surrogate, slope = np.where(is_cut, 0.0, rho * A), np.where(is_cut, 0.0, rho * A)
    else:
        log_w = {
            "token": log_rho,
            "sequence": row_means(log_rho, mask),
            "sequence_token": row_means(held_log_rho, mask) + logps - held,
        }[ratio]
        w = np.exp(log_w)
        clipped = np.minimum(np.maximum(w, 1 - clip_low), 1 + clip_high)
        is_cut = clipped * A < w * A
        surrogate = np.where(is_cut, clipped * A, w * A)
        if clip_dual is not None:
            too_low = (A < 0) & (surrogate < clip_dual * A)
            surrogate, is_cut = np.where(too_low, clip_dual * A, surrogate), is_cut | too_low
        slope = np.where(is_cut, 0.0, w * A)

    # The KL term of each token, and its derivative in log pi: dq / dlog pi is -1, and drho / dlog pi is rho.
    q, in_q = cut(np.where(mask, ref_logps - logps, 0.0))
    k, dk = estimator(kl, q)
    penalty, penalty_slope = k, -dk * in_q
    if kl_corrected:
        penalty, penalty_slope = rho * k, rho * k * in_rho - rho * dk * in_q

    weights = token_weights(mask, aggregate, constant_length, groups, denominator)
    total = np.sum(weights * (-surrogate + kl_coef * penalty))
    grad = weights * kl_coef * penalty_slope
    if ratio == "sequence":  # the log-ratio of a completion changes by 1 / |o_i| with that of each token
        lengths = np.maximum(mask.sum(axis=1, keepdims=True), 1)
        grad -= np.sum(weights * slope, axis=1, keepdims=True) / lengths * in_rho * mask
    else:
        grad -= weights * slope * (in_rho if ratio in ("token", "difference") else 1.0)

    counted = rho[mask]
    return (
        total,
        grad,
        {
            "policy/clip_frac": np.sum(weights * is_cut) / weights.sum(),
            "policy/kl_ref": np.sum(weights * estimator("k3", q)[0]) / weights.sum(),
            "policy/ratio_max": counted.max(),
            "policy/ess_frac": counted.sum() ** 2 / (len(counted) * np.sum(counted**2)),
        },
    )
