"""Attention by the library kernels of accelerators: splash on TPU, cuDNN on NVIDIA.

Both mean what grpo_jax.model.mask.plain means, and keep no scores. Of arrays [N, L, C] there is only the mask, which splash
reads as int32 and cuDNN adds to the scores, in their dtype, and so differentiates. A query that sees nothing gets
something finite, and gradients of 0 where its cotangent is 0.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as tables
from jaxtyping import Array, Bool, DTypeLike, Float

TILE_SIZES = (512, 384, 256, 128)  # lengths of a tile of the mask; what no query of a tile sees is not computed


class SplashMasks(NamedTuple):
    """The masks of N rows as splash reads them: which tiles are empty, and all tiles. Every array begins with N."""

    forward: tables.MaskInfo  # for the output and the queries' gradient
    backward: tables.MaskInfo  # for the gradients of keys and values, which go through the tiles by key


def tile_size(length: int) -> int:
    """The longest of TILES that divides the length."""
    return next(tile_size for tile_size in TILE_SIZES if length % tile_size == 0)


def splash_supports(length: int) -> bool:
    """Whether splash takes rows of that length."""
    return length % TILE_SIZES[-1] == 0


def make_splash_masks(mask: Bool[Array, "N L L"]) -> SplashMasks:
    """What `splash` needs of a mask, to be made once for all layers that share it."""
    # Where all tiles of a query are empty the kernel divides 0 by 0. A query that sees nothing therefore sees itself.
    mask = mask | ~jnp.any(mask, axis=-1, keepdims=True) & jnp.eye(mask.shape[-1], dtype=bool)
    shape = (tile_size(mask.shape[-1]),) * 2

    def of_row(mask):  # the kernel's first axis is that of heads; a single mask serves them all
        forward, _ = tables.process_dynamic_mask(mask[None], shape)
        backward, _ = tables.process_dynamic_mask_dkv(mask[None], shape)
        return SplashMasks(*(info._replace(is_dynamic_mask=None) for info in (forward, backward)))  # arrays alone

    return jax.vmap(of_row)(mask)


def splash_attention(
    q: Float[Array, "N L H E"],
    keys: Float[Array, "N K E L"],
    values: Float[Array, "N K L _"],
    masks: SplashMasks,
    *,
    divisor: float,
    cap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "N L H _"]:
    """attend.plain on a TPU; the mask is the one that `splash_masks` was given.

    Args:
      interpret: run the kernel's program operation by operation, on any device.
    """
    size = tile_size(q.shape[1])
    # The library's other kernel for the backward pass finds all gradients at once, but writes the queries' once for
    # every tile of keys, L / size times the queries in their dtype, and adds up those rounded parts.
    sizes = library.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )
    q = (q.astype(jnp.float32) / divisor).astype(q.dtype)

    def of_row(row):  # the tables of empty tiles steer what the kernel loads, so it cannot be mapped by vmap
        q, keys, values, masks = row
        forward, backward = (info._replace(is_dynamic_mask=True) for info in masks)
        kernel = library.SplashAttentionKernel(
            forward,
            forward,
            backward,
            block_sizes=sizes,
            is_mqa=False,
            attn_logits_soft_cap=cap or None,
            mask_value=library.DEFAULT_MASK_VALUE,
            mask_function=None,
            save_residuals=False,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
        return kernel(q, keys, values)

    out = jax.lax.map(of_row, (jnp.moveaxis(q, 1, 2), jnp.swapaxes(keys, 2, 3), values, masks))
    return jnp.moveaxis(out, 1, 2)


def cudnn_supports(dtype: DTypeLike, width: int, value_width: int, cap: float) -> bool:
    """Whether cuDNN takes such heads; it also wants even L and C. (Widths up to 256 need a GPU from Hopper on.)"""
    return (
        jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and width == value_width <= 128 and width % 8 == 0 and not cap
    )


def cudnn_attention(
    q: Float[Array, "N L H E"],
    keys: Float[Array, "N K E C"],
    values: Float[Array, "N K C E"],
    mask: Bool[Array, "N L C"],
    *,
    divisor: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "N L H E"]:
    """attend.plain by cuDNN's flash attention, or with the same arguments by XLA, which keeps the scores."""
    return jax.nn.dot_product_attention(
        q,
        jnp.moveaxis(keys, -1, 1),
        jnp.swapaxes(values, 1, 2),
        mask=mask[:, None],
        scale=1 / divisor,
        implementation=implementation,
    )
