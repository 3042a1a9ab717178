"""Log-probabilities and entropies of given tokens. The policy and the reference are both scored by this module.

Logits are computed for one block of tokens and one block of the vocabulary at a time, in the forward and the backward
pass, so the full logits never exist. On a mesh, only the part of the head for one vocabulary block is gathered at a
time. Prompt tokens and padding do not go through the head: the number of token blocks is decided when the program runs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import head_kernel, head_path, hidden_states, temperature_logits
from grpo_jax.model.parameters import param_spec
from grpo_jax.parallel.mesh import (
    drop_indivisible_axes,
    mesh_platform,
    num_data_shards,
    row_spec,
    scatter_sum,
    shard_map_on_mesh,
)
from grpo_jax.types import PackedBatch

DEFAULT_CHUNK_TOKENS = 512  # tokens per data shard that have logits at the same time
MAX_VOCAB_BLOCK = 16384  # the most vocabulary ids for which these tokens have logits at the same time
LANES = 128  # numbers in a row of a TPU's tile
MIN_LOGIT = -1e30  # below every logit, but finite


class ScoreSpec(NamedTuple):
    """The compile-time parameters of `chunked_logprobs`."""

    model_cfg: ModelConfig
    temperature: float  # sampling temperature
    block_columns: int  # columns per block of tokens
    entropy: bool  # whether to compute entropies
    fsdp_sharded: bool  # the fsdp axis splits D in the head, which is gathered one vocabulary block at a time
    tensor_sharded: bool  # the tensor axis splits the vocabulary, so each device has a part of it
    vocab_axis: int  # 1 if the head is a kernel [D, V], 0 if it is an embedding table [V, D]


def sum_over_tensor(spec: ScoreSpec, x):
    """Sums over the devices that share the vocabulary."""
    return jax.lax.psum(x, "tensor") if spec.tensor_sharded else x


def slice_columns(spec: ScoreSpec, x, index):
    """Returns token block `index` of x `[N, S, ...]`."""
    return jax.lax.dynamic_slice_in_dim(x, index * spec.block_columns, spec.block_columns, axis=1)


def update_columns(spec: ScoreSpec, x, block, index):
    """Returns x `[N, S, ...]` with token block `index` replaced by `block`."""
    return jax.lax.dynamic_update_slice_in_dim(x, block, index * spec.block_columns, axis=1)


def fused_sum_last(*arrays):
    """Sums each array over its last axis, in a single pass over all of them."""
    zeros = (jnp.float32(0),) * len(arrays)

    def add(left, right):
        return tuple(x + y for x, y in zip(left, right, strict=True))

    return jax.lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,))


def vocab_blocks(ids: int) -> tuple[int, int]:
    """Returns the number and the width of the vocabulary blocks of a device's part of the head, which has `ids` ids.

    On accelerators, the width of several blocks is a multiple of `LANES`, which TPUs need in order to scatter a block's
    gradient, and GPUs for products without padding. Then the blocks need not divide the vocabulary.
    """
    multiple = 1 if mesh_platform() == "cpu" else LANES
    fewest = -(-ids // MAX_VOCAB_BLOCK)
    if fewest == 1:
        return 1, ids
    numbers = (number for number in range(fewest, 2 * fewest) if ids % number == 0 and ids // number % multiple == 0)
    number = next(numbers, fewest)
    return number, -(-ids // (number * multiple)) * multiple


def take_vocab_block(spec: ScoreSpec, head, block, dtype):
    """Returns the part of the head for one vocabulary block, gathered over fsdp.

    If the blocks do not divide the vocabulary, the last one starts early enough to be as wide as the others. The ids
    that it shares with the block before it must be skipped.

    Args:
        spec: Compile-time parameters.
        head: This device's part of the head.
        block: Index of the vocabulary block.
        dtype: Dtype of the result.

    Returns:
        The part, with the axes of the head; the index of its first id in `head` and in the whole vocabulary; and how
        many ids to skip, which is None if the blocks divide the vocabulary.
    """
    axis = spec.vocab_axis
    number, width = vocab_blocks(head.shape[axis])
    local_start = jnp.minimum(block * width, head.shape[axis] - width)
    skip = None if number * width == head.shape[axis] else block * width - local_start
    part = jax.lax.dynamic_slice_in_dim(head, local_start, width, axis=axis).astype(dtype)
    if spec.fsdp_sharded:
        part = jax.lax.all_gather(part, "fsdp", axis=1 - axis, tiled=True)
    device_start = jax.lax.axis_index("tensor") * head.shape[axis] if spec.tensor_sharded else 0
    return part, local_start, local_start + device_start, skip


def transpose_in_memory(x):
    """Returns the transpose of a matrix, contiguous in memory.

    The barrier keeps XLA from folding the transpose into a matrix product, which on a CPU takes many times as long if
    its operands are not contiguous in memory.
    """
    return jax.lax.optimization_barrier(x.T)


def block_logits(spec: ScoreSpec, columns, hidden, first_id, skip):
    """Returns the logits of a token block for a vocabulary block, -inf for its first `skip` ids."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    raw_logits = jnp.matmul(flat, columns, preferred_element_type=spec.model_cfg.logit_dtype)
    logits = temperature_logits(spec.model_cfg, raw_logits.reshape(*hidden.shape[:-1], -1), spec.temperature, first_id)
    return logits if skip is None else jnp.where(jnp.arange(logits.shape[-1]) < skip, -jnp.inf, logits)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_logprobs(spec: ScoreSpec, head, hidden, targets, counts):
    """Computes log-probs and entropies `[N, S]` on one device, for the first `counts[n]` columns of each row.

    Args:
        spec: Compile-time parameters; S must be a multiple of `spec.block_columns`.
        head: This device's part of the head.
        hidden: Hidden states `[N, S, D]`.
        targets: Token ids `[N, S]`.
        counts: Number of columns per row to score `[N]`; the results of later columns are finite but undefined.

    Returns:
        Log-probs and entropies in float32.
    """
    logps, entropies, _ = streaming_logprobs(spec, head, hidden, targets, counts)
    return logps, entropies


def streaming_logprobs(spec: ScoreSpec, head, hidden, targets, counts):
    """Returns the log-probs and entropies of `chunked_logprobs`, and the log-sum-exp of the logits.

    A streaming log-sum-exp over vocabulary blocks: the largest logit so far, the sum of exp(logit - largest), and for
    the entropy the sum of exp(logit - largest) * (logit - largest), are rescaled whenever the largest logit grows.
    """
    num_blocks, width = vocab_blocks(head.shape[spec.vocab_axis])
    num_token_blocks = -(-counts.max() // spec.block_columns)

    def vocab_block(block, totals):
        part, _, first_id, skip = take_vocab_block(spec, head, block, hidden.dtype)
        columns = part if spec.vocab_axis else transpose_in_memory(part)

        def token_block(index, totals):
            target_logit, largest, mass, *moment = (slice_columns(spec, x, index) for x in totals)
            logits = block_logits(spec, columns, slice_columns(spec, hidden, index), first_id, skip)
            local_target = slice_columns(spec, targets, index) - first_id
            in_block = (local_target >= (0 if skip is None else skip)) & (local_target < width)
            block_target = jnp.take_along_axis(logits, jnp.clip(local_target, 0, width - 1)[..., None], axis=-1)[..., 0]
            new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
            shifted = logits - new_largest[..., None]
            exps = jnp.exp(shifted)
            scale = jnp.exp(largest - new_largest)
            terms, rescaled = [exps], [mass * scale]
            if spec.entropy:  # ids of probability 0 may have a logit of -inf; they add 0 instead of 0 * -inf = NaN
                terms.append(exps * jnp.where(exps > 0, shifted, 0.0))
                rescaled.append((moment[0] + mass * (largest - new_largest)) * scale)
            sums = [x + y for x, y in zip(rescaled, fused_sum_last(*terms), strict=True)]
            new_totals = (target_logit + jnp.where(in_block, block_target, 0.0), new_largest, *sums)
            return tuple(update_columns(spec, x, y, index) for x, y in zip(totals, new_totals, strict=True))

        with jax.named_scope("token_blocks"):
            return jax.lax.fori_loop(0, num_token_blocks, token_block, totals)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    totals = (zeros, zeros + MIN_LOGIT, zeros, zeros) if spec.entropy else (zeros, zeros + MIN_LOGIT, zeros)
    target_logit, largest, mass, *moment = jax.lax.fori_loop(0, num_blocks, vocab_block, totals)
    if spec.tensor_sharded:
        global_largest = jax.lax.pmax(largest, "tensor")
        scale = jnp.exp(largest - global_largest)
        moment = [sum_over_tensor(spec, (x + mass * (largest - global_largest)) * scale) for x in moment]
        mass, target_logit = sum_over_tensor(spec, mass * scale), sum_over_tensor(spec, target_logit)
        largest = global_largest
    mass = jnp.where(mass > 0, mass, 1.0)  # 0 in columns that were not scored, where the log would be -inf
    log_mass = largest + jnp.log(mass)
    entropies = jnp.log(mass) - moment[0] / mass if spec.entropy else zeros
    return target_logit - log_mass, entropies, log_mass


def chunked_logprobs_fwd(spec: ScoreSpec, *primals):
    """Returns the result of `chunked_logprobs` and the residuals for its backward pass."""
    inputs = [primal.value for primal in primals]
    logps, entropies, log_mass = streaming_logprobs(spec, *inputs)
    return (logps, entropies), (*inputs, log_mass, entropies)


def chunked_logprobs_bwd(spec: ScoreSpec, residuals, cotangents):
    """Returns the cotangents of the head and the hidden states.

    The derivative of log pi(target) with respect to the logits is one_hot(target) - pi, and that of the entropy H is
    -pi (log pi + H). A result that the loss does not use has a symbolic zero as its cotangent, and costs nothing.
    """
    head, hidden, targets, counts, log_mass, entropies = residuals
    # Each device holds its share of a replicated output's cotangent.
    d_logps, d_entropies = (None if isinstance(x, SymbolicZero) else sum_over_tensor(spec, x) for x in cotangents)
    num_blocks, width = vocab_blocks(head.shape[spec.vocab_axis])
    num_token_blocks = -(-counts.max() // spec.block_columns)

    def vocab_block(block, totals):
        d_head, d_hidden = totals
        part, local_start, first_id, skip = take_vocab_block(spec, head, block, hidden.dtype)
        transposed = transpose_in_memory(part)
        columns, columns_t = (part, transposed) if spec.vocab_axis else (transposed, part)

        def token_block(index, totals):
            d_columns, d_hidden = totals
            x = slice_columns(spec, hidden, index)
            flat = x.reshape(-1, x.shape[-1])
            raw_logits = jnp.matmul(flat, columns, preferred_element_type=spec.model_cfg.logit_dtype)
            logits, logits_vjp = jax.vjp(
                lambda raw: temperature_logits(spec.model_cfg, raw, spec.temperature, first_id),
                raw_logits.reshape(*x.shape[:-1], -1),
            )
            ids = jnp.arange(width)
            is_target = ids == (slice_columns(spec, targets, index) - first_id)[..., None]
            logps = logits - slice_columns(spec, log_mass, index)[..., None]
            probs, d_logits = jnp.exp(logps), 0.0
            if d_logps is not None:
                d_logits += slice_columns(spec, d_logps, index)[..., None] * (is_target - probs)
            if d_entropies is not None:  # ids of probability 0 may have a log-prob of -inf
                centered = jnp.where(probs > 0, logps, 0.0) + slice_columns(spec, entropies, index)[..., None]
                d_logits -= slice_columns(spec, d_entropies, index)[..., None] * probs * centered
            (d_raw,) = logits_vjp(d_logits if skip is None else jnp.where(ids < skip, 0.0, d_logits))
            d_raw = d_raw.reshape(-1, width).astype(hidden.dtype)
            d_columns += jnp.matmul(transpose_in_memory(flat), d_raw, preferred_element_type=jnp.float32)
            d_x = jnp.matmul(d_raw, columns_t, preferred_element_type=jnp.float32).reshape(x.shape)
            return d_columns, update_columns(spec, d_hidden, slice_columns(spec, d_hidden, index) + d_x, index)

        start = jnp.zeros(columns.shape, jnp.float32), d_hidden
        with jax.named_scope("token_blocks"):
            d_columns, d_hidden = jax.lax.fori_loop(0, num_token_blocks, token_block, start)
        if spec.fsdp_sharded:
            d_columns = scatter_sum(d_columns, 0)
        d_part = d_columns if spec.vocab_axis else d_columns.T
        d_part = jax.lax.dynamic_slice_in_dim(d_head, local_start, width, axis=spec.vocab_axis) + d_part
        return jax.lax.dynamic_update_slice_in_dim(d_head, d_part, local_start, axis=spec.vocab_axis), d_hidden

    zeros = jnp.zeros(head.shape, jnp.float32), jnp.zeros(hidden.shape, jnp.float32)
    d_head, d_hidden = jax.lax.fori_loop(0, num_blocks, vocab_block, zeros)
    return d_head.astype(head.dtype), d_hidden.astype(hidden.dtype), None, None


chunked_logprobs.defvjp(chunked_logprobs_fwd, chunked_logprobs_bwd, symbolic_zeros=True)


def logprobs_from_hidden(
    model_cfg: ModelConfig,
    params: dict,
    hidden: Float[Array, "N S D"],
    targets: Int[Array, "N S"],
    temperature: float,
    *,
    counts: Int[Array, " N"] | None = None,
    entropy: bool = True,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """Computes log pi(target) and the entropy of pi at each hidden state, at the sampling temperature.

    Args:
        model_cfg: The architecture.
        params: Parameters of the model, for its head.
        hidden: Final hidden states.
        targets: The token that each hidden state predicts.
        temperature: Sampling temperature.
        counts: Number of columns per row to score; the results of later columns are finite but undefined. By default
            all columns are scored.
        entropy: Whether to compute entropies; if False, zeros are returned in their place.
        chunk_tokens: Number of tokens per data shard that go through the head at a time.

    Returns:
        Log-probs and entropies in nats, in float32. Both are differentiable.
    """
    mesh, length = jax.sharding.get_abstract_mesh(), hidden.shape[1]
    # A CPU would hold the transposes of a tied embedding and of its gradient; other compilers choose layouts.
    is_table = model_cfg.tie_embeddings and model_cfg.vocab_size > MAX_VOCAB_BLOCK and mesh_platform() == "cpu"
    head = params["embed"]["embedding"] if is_table else head_kernel(model_cfg, params)
    rows, head_spec = row_spec(targets.shape[0]), P(None, None)
    if not mesh.empty:
        head_spec = param_spec(head_path(model_cfg))
        if model_cfg.tie_embeddings and not is_table:  # the kernel is the transposed embedding table
            head_spec = P(*reversed(head_spec))
        head_spec = drop_indivisible_axes(head_spec, head.shape, mesh)
    local_rows = targets.shape[0] // (num_data_shards(mesh) if rows[0] else 1)
    counts = jnp.full(targets.shape[:1], length) if counts is None else counts
    block_columns = max(1, min(length, chunk_tokens // local_rows))

    def pad_columns(x):
        return jnp.pad(x, ((0, 0), (0, -length % block_columns)) + ((0, 0),) * (x.ndim - 2))

    def is_split(axis):
        return axis is not None and mesh.shape[axis] > 1

    vocab_axis = 0 if is_table else 1
    splits = is_split(head_spec[1 - vocab_axis]), is_split(head_spec[vocab_axis])
    spec = ScoreSpec(model_cfg, temperature, block_columns, entropy, *splits, vocab_axis)
    run = shard_map_on_mesh(partial(chunked_logprobs, spec), (head_spec, rows, rows, rows), (rows, rows))
    return tuple(x[:, :length] for x in run(head, pad_columns(hidden), pad_columns(targets), counts))


def packed_logprobs(
    model_cfg: ModelConfig,
    params: dict,
    batch: PackedBatch,
    temperature: float,
    *,
    entropy: bool = True,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> tuple[Float[Array, "P W"], Float[Array, "P W"]]:
    """Computes log pi and entropy of the completion tokens in packed rows.

    Args:
        model_cfg: The architecture.
        params: Parameters of the policy or the reference.
        batch: Packed rows.
        temperature: Sampling temperature.
        entropy: Whether to compute entropies; if False, zeros are returned in their place.
        chunk_tokens: Number of tokens per data shard that go through the head at a time.

    Returns:
        Log-probs and entropies in nats, in float32; 0 on prompts and padding.
    """
    hidden, _ = hidden_states(model_cfg, params, batch.tokens, batch.segments)
    is_completion = batch.flat_index >= 0
    order = jnp.argsort(~is_completion, axis=1, stable=True)  # columns of completion tokens first

    def take_columns(x, columns):
        return jnp.take_along_axis(x, columns, axis=1)

    hidden = take_columns(hidden, take_columns(batch.predict_from, order)[..., None])
    targets, counts = take_columns(batch.tokens, order), is_completion.sum(axis=1)
    options = dict(counts=counts, entropy=entropy, chunk_tokens=chunk_tokens)
    results = logprobs_from_hidden(model_cfg, params, hidden, targets, temperature, **options)
    inverse_order = jnp.argsort(order, axis=1)
    return tuple(jnp.where(is_completion, take_columns(x, inverse_order), 0.0) for x in results)
