"""Rotary position embeddings: frequencies, tables of cosines and sines, and the rotation itself."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import RopeConfig

ROPE_SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")


def rope_frequencies(rope: RopeConfig | None, head_dim: int) -> np.ndarray:
    """Returns the rotation per position, in radians, of each of the head_dim / 2 pairs, as float32; 0 without RoPE."""
    if rope is None:
        return np.zeros(head_dim // 2, np.float32)
    unscaled = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope.scaling == "llama3":
        scaled = llama3_frequencies(rope, unscaled)
    elif rope.scaling == "yarn":
        scaled = yarn_frequencies(rope, unscaled, head_dim)
    elif rope.scaling == "longrope":
        scaled = unscaled / np.asarray(rope.divisors)
    else:
        scaled = unscaled / rope.factor
    return scaled.astype(np.float32)


def llama3_frequencies(rope: RopeConfig, unscaled: np.ndarray) -> np.ndarray:
    """Scales frequencies as Llama 3.1 does: divides low ones by the factor, keeps high ones, interpolates between."""
    rotations = rope.original_max_positions * unscaled / (2 * math.pi)  # full turns over the original context
    keep = np.clip((rotations - rope.low_freq_bound) / (rope.high_freq_bound - rope.low_freq_bound), 0, 1)
    return (1 - keep) * unscaled / rope.factor + keep * unscaled


def yarn_frequencies(rope: RopeConfig, unscaled: np.ndarray, head_dim: int) -> np.ndarray:
    """Scales frequencies as YaRN does (arXiv 2309.00071, section 3.2), interpolating linearly in the pair's index."""

    def pair_index(rotations: float) -> float:
        """Returns the fractional index of the pair that makes this many full turns over the original context."""
        inverse_frequency = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(inverse_frequency) / (2 * math.log(rope.theta))

    first, last = pair_index(rope.high_freq_bound), pair_index(rope.low_freq_bound)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    interpolate = np.clip((np.arange(head_dim // 2) - first) / (last - first or 0.001), 0, 1)
    return interpolate * unscaled / rope.factor + (1 - interpolate) * unscaled


def yarn_attention_factor(factor: float, weight: float) -> float:
    """Returns YaRN's growth of the attention scale with the context (its eq. 22, with DeepSeek's weight `mscale`)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_tables(
    rope: RopeConfig | None, head_dim: int, positions: Int[Array, "N L"]
) -> tuple[Float[Array, "N L 1 Z"], Float[Array, "N L 1 Z"]]:
    """Returns the cosines and sines of the rotation angles at `positions`, with Z = head_dim / 2."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    factor = rope.attention_factor if rope else 1.0
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def query_scale(rope: RopeConfig | None, positions: Int[Array, "N L"]) -> Float[Array, "N L 1 1"] | None:
    """Returns the factor of the rotated queries at `positions`, as in Ministral 3, or None if there is none."""
    if rope is None or not rope.query_growth:
        return None
    periods = (positions // rope.original_max_positions)[..., None, None]
    return 1 + rope.query_growth * jnp.log1p(periods.astype(jnp.float32))


def apply_rope(x: Float[Array, "N L heads E"], tables, *, interleave: bool = False) -> Float[Array, "N L heads E"]:
    """Rotates the first 2Z dimensions of each head by `rope_tables`, and leaves the others as they are.

    Args:
        x: Query or key heads.
        tables: Cosines and sines [N, L, 1, Z].
        interleave: Whether pairs are adjacent, (x[2i], x[2i + 1]), instead of (x[i], x[i + Z]), the layout of most
            Hugging Face checkpoints. Either way they are returned in the latter layout, which leaves the products of
            queries and keys as they are.
    """
    cos, sin = tables
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        rotated = apply_rope(x[..., :rotary_dim], tables, interleave=interleave)
        return jnp.concatenate([rotated, x[..., rotary_dim:]], axis=-1)
    a, b = jnp.split((deinterleave(x) if interleave else x).astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def deinterleave(x: Float[Array, "N L heads E"]) -> Float[Array, "N L heads E"]:
    """Moves adjacent pairs (x[2i], x[2i + 1]) to (x[i], x[i + E/2])."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2), -1, -2).reshape(x.shape)
