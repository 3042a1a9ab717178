"""Attention by vendor kernels: splash attention on TPU, cuDNN on NVIDIA GPUs.

They compute `grpo_jax.model.mask.plain_attention` without holding the scores in memory. The only array of size
[N, L, C] is the mask, which splash reads as int32 and cuDNN adds to the scores as a bias of their dtype. The output of
a query that attends to no key is finite but undefined; it adds nothing to the gradients as long as its cotangent is 0.
"""

import contextlib
import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info
from jaxtyping import Array, Bool, DTypeLike, Float

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's operation, whose results `jax.checkpoint` cannot name
TILE_SIZES = (512, 384, 256, 128)  # tokens along either side of a tile of the mask; empty tiles are skipped


class SplashMasks(NamedTuple):
    """The masks of N rows in the format of splash attention. All arrays have a leading axis N."""

    forward: mask_info.MaskInfo  # for the output and the gradient of the queries
    backward: mask_info.MaskInfo  # for the gradients of keys and values; tiles in the order of keys


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CausalMask:
    """The mask of rows that each hold one sequence from column 0 on, which is known when a program is traced."""

    window: int  # sliding window in tokens, including the query's own; 0: full attention


def tile_size(length: int) -> int:
    """Returns the largest of `TILE_SIZES` that divides the row length."""
    return next(size for size in TILE_SIZES if length % size == 0)


def splash_supports(length: int) -> bool:
    """Returns whether splash attention supports rows of this length."""
    return length % TILE_SIZES[-1] == 0


def make_splash_masks(mask: Bool[Array, "N L L"]) -> SplashMasks:
    """Converts a mask to the format of `splash_attention`. Layers with the same mask can share the result."""
    # The kernel divides 0 by 0 for a query whose tiles are all empty, so a query without keys attends to itself.
    mask = mask | ~jnp.any(mask, axis=-1, keepdims=True) & jnp.eye(mask.shape[-1], dtype=bool)
    shape = (tile_size(mask.shape[-1]),) * 2

    def convert_row(mask):
        # The library expects a leading axis of heads; of size 1, it applies to all heads.
        forward, _ = mask_info.process_dynamic_mask(mask[None], shape)
        backward, _ = mask_info.process_dynamic_mask_dkv(mask[None], shape)
        # vmap maps over arrays only, so the flag is removed here and set again in `splash_attention`.
        return SplashMasks(*(info._replace(is_dynamic_mask=None) for info in (forward, backward)))

    return jax.vmap(convert_row)(mask)


def splash_attention(
    q: Float[Array, "N L H E"],
    keys: Float[Array, "N K E L"],
    values: Float[Array, "N K L _"],
    masks: SplashMasks,
    *,
    divisor: float,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "N L H _"]:
    """Computes `plain_attention` on a TPU.

    Args:
        q: Query heads.
        keys: Key heads.
        values: Value heads.
        masks: The mask, converted by `make_splash_masks`.
        divisor: Divides the scores.
        softcap: As in `weighted_values`.
        interpret: Whether to interpret the kernel operation by operation, which works on any device.
    """
    size = tile_size(q.shape[1])
    # The library's fused backward kernel is not used: it writes the gradient of the queries once per tile of keys
    # (L / size times the size of q), in the dtype of q, and then adds up those rounded parts.
    sizes = splash_kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )
    q = (q.astype(jnp.float32) / divisor).astype(q.dtype)

    def attend_row(row):
        q, keys, values, masks = row
        forward, backward = (info._replace(is_dynamic_mask=True) for info in masks)
        kernel = splash_kernel.SplashAttentionKernel(
            forward,
            forward,
            backward,
            block_sizes=sizes,
            is_mqa=False,
            attn_logits_soft_cap=softcap or None,
            mask_value=splash_kernel.DEFAULT_MASK_VALUE,
            mask_function=None,
            save_residuals=False,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
        return kernel(q, keys, values)

    # vmap does not apply: the kernel decides which tiles to load from the row's own table of empty tiles.
    out = jax.lax.map(attend_row, (jnp.moveaxis(q, 1, 2), jnp.swapaxes(keys, 2, 3), values, masks))
    return jnp.moveaxis(out, 1, 2)


def causal_splash_attention(
    q: Float[Array, "N L H E"],
    keys: Float[Array, "N K E L"],
    values: Float[Array, "N K L _"],
    mask: CausalMask,
    *,
    divisor: float,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "N L H _"]:
    """Computes `splash_attention` for a mask that needs no array. It has no gradient."""
    length, size = q.shape[1], tile_size(q.shape[1])
    one_head = splash_mask.LocalMask((length, length), (mask.window - 1 if mask.window else None, 0), offset=0)
    kernel = splash_kernel.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([one_head] * q.shape[2]),
        block_sizes=splash_kernel.BlockSizes(block_q=size, block_kv=size),
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) / divisor).astype(q.dtype)
    out = jax.vmap(kernel)(jnp.moveaxis(q, 1, 2), jnp.swapaxes(keys, 2, 3), values)
    return jnp.moveaxis(out, 1, 2)


def cudnn_supports(dtype: DTypeLike, key_width: int, value_width: int, softcap: float) -> bool:
    """Returns whether `cudnn_attention` supports heads of these widths. It also requires an even L and C.

    cuDNN supports widths of 136 to 256 on some GPUs only (Hopper and later), so they are not used.
    """
    half_precision = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return half_precision and key_width == value_width <= 128 and key_width % 8 == 0 and not softcap


def cudnn_attention(
    q: Float[Array, "N L H E"],
    keys: Float[Array, "N K E C"],
    values: Float[Array, "N K C E"],
    mask: Bool[Array, "N L C"],
    *,
    divisor: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "N L H E"]:
    """Computes `plain_attention` with cuDNN's flash attention, or in XLA, where the scores are held in memory."""
    keys, values = jnp.moveaxis(keys, -1, 1), jnp.swapaxes(values, 1, 2)
    options = dict(mask=mask[:, None], scale=1 / divisor, implementation=implementation)
    with no_gradient_of_the_mask():
        return jax.nn.dot_product_attention(q, keys, values, **options)


@contextlib.contextmanager
def no_gradient_of_the_mask():
    """Traces cuDNN attention without the gradient of its bias, an array [1, 1, L, C] that older JAX always computes."""
    decides = getattr(cudnn, "should_export_dbias", None)
    if decides:
        cudnn.should_export_dbias = lambda *args: False
    try:
        yield
    finally:
        if decides:
            cudnn.should_export_dbias = decides
