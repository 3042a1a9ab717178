"""Compares attention kernels with the reference implementation: forward and backward in packed rows, and decoding."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.attention import KV, PLATFORM_KERNELS, attend, choose_kernel, make_attention_inputs
from grpo_jax.model.cache import write_cache
from grpo_jax.model.mask import NO_WINDOW, attention_mask, plain_attention, single_sequence
from grpo_jax.model.token_attention import token_attention, token_attention_supports
from grpo_jax.parallel.mesh import mesh_platform
from grpo_jax.types import Segments
from parts.verdicts import BOUNDS, DTYPES, Result, precision, verdict

# Multiplies queries, so that each attends mostly to a few keys, however many it may attend to. Otherwise the output
# would shrink with the depth of the context, and errors there would be small compared with the largest entries.
SHARPNESS = 3.0
# `blocks` keeps scores and sums in float32. In bfloat16 its error is at most 0.006; if either were rounded to bfloat16,
# it would be at least 0.011.
BLOCKS_BOUNDS = BOUNDS | {"bfloat16": 1e-2}
SLOTS, COLUMNS = 64, 1536  # of the cache that decoding attends to
RESULTS = ("output", "q", "keys", "values")  # what is compared: the output, and the gradients of the other three


def packed_row(length: int) -> Segments:
    """Returns a row of prompts with three completions each. The last sixteenth of the row is padding."""
    rng, end = np.random.default_rng(length), length - length // 16
    row = Segments(*np.zeros((3, 1, length), np.int32))
    column, prompt, completion = 0, 0, 0
    while column < end:
        prompt, prompt_length = prompt + 1, rng.integers(length // 64, length // 16)
        lengths = prompt_length, *rng.integers(length // 32, [length // 2, length // 8, length // 16])
        for part, size in enumerate(lengths):
            size = min(size, end - column)
            columns = np.s_[0, column : column + size]
            row.position[columns] = np.arange(size) + (prompt_length if part else 0)
            row.prompt[columns], row.completion[columns] = prompt, completion + part if part else 0
            column += size
        completion += 3
    return row


def random_heads(model_cfg: ModelConfig, segments: Segments) -> list[Float[Array, "..."]]:
    """Returns random queries, keys, values and a cotangent of the output (0 on padding), in the compute dtype."""
    heads, kv_heads, width = model_cfg.num_heads, model_cfg.num_kv_heads, model_cfg.head_dim
    length, rng = segments.prompt.shape[1], np.random.default_rng(0)
    shapes = [(1, length, heads, width), (1, kv_heads, width, length), (1, kv_heads, length, width)]
    q, keys, values, cotangent = (rng.standard_normal(shape, np.float32) for shape in (*shapes, shapes[0]))
    cotangent *= segments.prompt[..., None, None] > 0
    return [jnp.asarray(x, model_cfg.compute_dtype) for x in (SHARPNESS * q, keys, values, cotangent)]


def with_gradients(attention, q, keys, values, cotangent) -> tuple[Array, ...]:
    """Returns the output of an attention function, and the gradients of queries, keys and values."""
    out, vjp = jax.vjp(attention, q, keys, values)
    return out, *vjp(cotangent)


@partial(jax.jit, static_argnums=0)
def define(model_cfg: ModelConfig, heads, segments: Segments) -> tuple[Array, ...]:
    """Computes the output and the gradients with the reference implementation in float32, one key head at a time."""
    plain = partial(plain_attention, mask=attention_mask(segments, segments), divisor=model_cfg.effective_score_divisor)
    q, keys, values, cotangent = (x.astype(jnp.float32) for x in heads)

    def split(x):  # [1, L, H, E] to [K, 1, L, R, E]
        return jnp.moveaxis(x.reshape(*x.shape[:2], model_cfg.num_kv_heads, -1, x.shape[-1]), 2, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 2).reshape(q.shape)

    by_key_head = split(q), jnp.moveaxis(keys, 1, 0)[:, None], jnp.moveaxis(values, 1, 0)[:, None], split(cotangent)
    out, dq, dkeys, dvalues = jax.lax.map(lambda x: with_gradients(plain, *x), by_key_head)
    return join(out), join(dq), jnp.moveaxis(dkeys[:, 0], 0, 1), jnp.moveaxis(dvalues[:, 0], 0, 1)


@partial(jax.jit, static_argnums=0)
def kernel_errors(model_cfg: ModelConfig, heads, segments: Segments, expected) -> Float[Array, " 4"]:
    """Computes attention with the kernel `model_cfg.attention`, as a layer does in training.

    Returns:
        The largest error of each of `RESULTS`, as a fraction of its largest entry.
    """
    inputs = make_attention_inputs(model_cfg, model_cfg.layers[0], segments)

    def attend_in_layer(q, keys, values):
        return attend(model_cfg, q, KV(keys, values), inputs, cached=False)

    def error(got, want, counted=True):
        got, want = (jnp.where(counted, x, 0.0) for x in (got.astype(jnp.float32), want))
        return jnp.abs(got - want).max() / jnp.abs(want).max()

    out, *gradients = with_gradients(attend_in_layer, *heads)
    is_real = segments.prompt[..., None, None] > 0  # the output is undefined on padding
    return jnp.stack([error(out, expected[0], is_real), *map(error, gradients, expected[1:])])


def check_attention(model_cfg: ModelConfig, length: int) -> Iterator[Result]:
    """Compares the kernels of this platform with the reference implementation, in a row of `length` tokens."""
    segments, vendor = packed_row(length), PLATFORM_KERNELS.get(mesh_platform())
    for dtype in DTYPES:
        model_cfg = replace(model_cfg, compute_dtype=dtype)
        heads = random_heads(model_cfg, segments)
        with precision("float32"):
            expected = define(replace(model_cfg, compute_dtype="float32"), heads, segments)
        for kernel in filter(None, (vendor, "blocks")):
            kernel_cfg = replace(model_cfg, attention=kernel)
            if choose_kernel(kernel_cfg, length, cached=False) != kernel:
                used = choose_kernel(replace(model_cfg, attention="auto"), length, cached=False)
                yield {"left_out": f"{kernel} in {dtype}", "reason": f"not supported; training uses {used}"}
                continue
            with precision(dtype):
                errors = np.asarray(kernel_errors(kernel_cfg, heads, segments, expected))
            worst = int(np.argmax(errors))
            fields = dict(kernel=kernel, length=length, head_dim=model_cfg.head_dim, worst=RESULTS[worst])
            bounds = BLOCKS_BOUNDS if kernel == "blocks" else BOUNDS
            yield verdict("attention", dtype, errors[worst], bounds[dtype], **fields)


def check_token_attention(model_cfg: ModelConfig) -> Iterator[Result]:
    """Compares the kernel that decodes on GPUs with the reference implementation, for tokens all over the cache."""
    if not token_attention_supports(model_cfg, SLOTS, 1, COLUMNS):
        yield {"left_out": "token_attention", "reason": "only used on GPUs"}
        return
    rng, heads, width = np.random.default_rng(0), model_cfg.num_kv_heads, model_cfg.head_dim
    last_dims = (width, 1), (1, width), (width, COLUMNS), (COLUMNS, width)
    shapes = (SLOTS, 1, model_cfg.num_heads, width), *((SLOTS, heads, *dims) for dims in last_dims)
    q, *kv = (jnp.asarray(rng.standard_normal(shape, np.float32), model_cfg.compute_dtype) for shape in shapes)
    q, new, cache = SHARPNESS * q, KV(*kv[:2]), KV(*kv[2:])
    position = jnp.linspace(0, COLUMNS - 1, SLOTS).astype(jnp.int32)[:, None]
    options = dict(divisor=model_cfg.effective_score_divisor)
    got, written = jax.jit(partial(token_attention, **options))(q, new, cache, position, jnp.int32(NO_WINDOW))
    expected = write_cache(cache, new, position)
    columns = single_sequence(jnp.broadcast_to(jnp.arange(COLUMNS), (SLOTS, COLUMNS)))
    with precision("float32"):
        inputs = (x.astype(jnp.float32) for x in (q, *expected))
        want = plain_attention(*inputs, attention_mask(single_sequence(position), columns), **options)
    is_same = all((x == y).all() for x, y in zip(written, expected, strict=True))
    error = jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max() if is_same else np.inf
    dtype = model_cfg.compute_dtype
    yield verdict("attention", dtype, error, BOUNDS[dtype], kernel="token_attention", length=COLUMNS, head_dim=width)
