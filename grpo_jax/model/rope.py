"""Rotary positions: frequencies, tables, rotation."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import RopeConfig

ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


def rope_frequencies(rope: RopeConfig, width: int) -> np.ndarray:
    """The angle per position of each of width / 2 rotating pairs, float32."""
    plain = rope.theta ** (-np.arange(0, width, 2) / width)
    if rope.scaling == "llama3":
        scaled = llama3_frequencies(rope, plain)
    elif rope.scaling == "yarn":
        scaled = yarn_frequencies(rope, plain, width)
    else:
        scaled = plain / rope.factor
    return scaled.astype(np.float32)


def llama3_frequencies(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1's stretching: slow pairs are divided by the factor, fast ones kept, those between interpolated."""
    turns = rope.original_max_positions * plain / (2 * math.pi)  # within the original length
    keep = np.clip((turns - rope.low_freq_bound) / (rope.high_freq_bound - rope.low_freq_bound), 0, 1)
    return (1 - keep) * plain / rope.factor + keep * plain


def yarn_frequencies(rope: RopeConfig, plain: np.ndarray, width: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): the same with a ramp that is linear in the index of the pair."""

    def pair(turns):  # the (fractional) index of the pair that turns so often within the original length
        return width * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.high_freq_bound), pair(rope.low_freq_bound)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (np.arange(width // 2) - first) / (last - first or 0.001)
    stretch = np.clip(ramp, 0, 1)
    return stretch * plain / rope.factor + (1 - stretch) * plain


def yarn_attention_factor(factor: float, weight: float) -> float:
    """YaRN's growth of the scores' scale with the length (its eq. 22, with DeepSeek's weight)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_tables(
    rope: RopeConfig, width: int, positions: Int[Array, "N L"]
) -> tuple[Float[Array, "N L 1 Z"], Float[Array, "N L 1 Z"]]:
    """cos and sin of the angles, Z = width / 2."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(rope, width)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def apply_rope(x: Float[Array, "N L heads E"], tables) -> Float[Array, "N L heads E"]:
    """Rotates the pairs (x[i], x[i + E/2]), the pairing of most Hugging Face checkpoints."""
    cos, sin = tables
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def deinterleave(x: Float[Array, "N L heads E"]) -> Float[Array, "N L heads E"]:
    """Neighbouring pairs (x[2i], x[2i + 1]) moved to where `rotate` expects a pair's two halves."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2), -1, -2).reshape(x.shape)
