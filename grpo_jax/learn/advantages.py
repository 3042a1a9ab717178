"""Advantages: how much better the reward of a completion is than the rewards it is compared with.

For rewards r of B groups of G completions, the advantage of a completion is

    A = (r - mean) / (std + eps)

GRPO uses the mean and the standard deviation of the completion's group (DeepSeekMath, arXiv 2402.03300, section 4.1.2).
Dr. GRPO does not divide by a standard deviation (arXiv 2503.20783, section 3.2). Nor does RLOO, which subtracts the
mean of the other G - 1 completions (arXiv 2402.14740, section 2.2).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from grpo_jax.config.keys import require_choices
from grpo_jax.config.schema import AdvantageSection


def advantages(
    rewards: Num[Array, "B G"], *, mean: str = "group", std: str = "group", ddof: int = 0, eps: float = 0.0
) -> Float[Array, "B G"]:
    """Computes advantages, A = (r - mean) / (std + eps).

    Args:
        rewards: One reward per completion; each row is a group.
        mean: The mean to subtract: of the "group", of the whole "batch", or, with "leave_one_out", of the other
            completions of the group.
        std: The standard deviation to divide by: of the "group" or of the whole "batch", or "none".
        ddof: Delta degrees of freedom: the variance divides by the number of rewards minus `ddof`.
        eps: Added to the standard deviation.

    Returns:
        Advantages in float32. They are 0 where all rewards of the group (with mean="batch", of the batch) are equal,
        and where std + eps is 0.

    Raises:
        ValueError: `rewards` does not have two axes, or `mean` or `std` is not one of these names.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape [B, G]; found {rewards.shape}. Reshape them to one row per group.")
    require_choices(AdvantageSection(mean=mean, std=std))
    centered = rewards - jnp.mean(rewards, axis=None if mean == "batch" else 1, keepdims=True)
    if mean == "leave_one_out":
        centered = centered * (rewards.shape[1] / max(rewards.shape[1] - 1, 1))
    # Compare rewards instead of testing for std == 0: the mean of equal numbers may differ from them by rounding.
    equal_group, equal_batch = jnp.ptp(rewards, axis=1, keepdims=True) == 0, jnp.ptp(rewards) == 0
    centered = jnp.where(equal_batch if mean == "batch" else equal_group, 0.0, centered)
    if std == "none":
        return centered
    axis, count = (None, rewards.size) if std == "batch" else (1, rewards.shape[1])
    variance = jnp.var(rewards, axis=axis, keepdims=True) * (count / max(count - ddof, 1))
    scale = jnp.where(equal_group if std == "group" else equal_batch, 0.0, jnp.sqrt(variance)) + eps
    return jnp.where(scale == 0, 0.0, centered / jnp.where(scale == 0, 1.0, scale))
