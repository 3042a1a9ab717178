"""Token sampling: exact draws from softmax(logits), top-k/top-p/min-p filtering, and greedy decoding."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from grpo_jax.parallel.mesh import ROW_AXES, constrain, drop_indivisible_axes, row_spec, shard_map_on_mesh


class TokenFilter(NamedTuple):
    """Restricts sampling to the tokens that satisfy all three criteria. The most likely token is always kept.

    Intended for evaluation. A policy sampled through a filter is not the policy that the trainer scores, so the
    probability ratio would be biased.
    """

    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches top_p (arXiv 1904.09751)
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the most likely one (arXiv 2407.01082)


NO_FILTER = TokenFilter()


def vocab_block_width(vocab_size: int) -> int:
    """Returns the number of tokens in a vocabulary block: the power of two nearest to sqrt(V), on a log scale."""
    return 2 ** round(math.log2(vocab_size) / 2)


def gumbel_noise(keys: Key[Array, " N"], vocab_size: int) -> tuple[Float[Array, "N blocks"], Float[Array, "N width"]]:
    """Returns the Gumbel noise that selects a block and the noise that selects a token within it."""
    width = vocab_block_width(vocab_size)
    num_blocks = -(-vocab_size // width)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (num_blocks + width,)))(keys)
    return noise[:, :num_blocks], noise[:, num_blocks:]


def split_into_blocks(
    logits: Float[Array, "N _"], width: int, offset: int | Int[Array, ""] = 0
) -> Float[Array, "N blocks width"]:
    """Splits consecutive logits into blocks, padded with -inf.

    Args:
        logits: Logits of the whole vocabulary, or of a part of it.
        width: Number of tokens in a block.
        offset: Position of the first logit within its block. Not 0 if a part starts in the middle of a block.
    """
    rows, size = logits.shape
    num_blocks = -(-size // width)
    if not isinstance(offset, int):
        empty = jnp.full((rows, (num_blocks + 1) * width), -jnp.inf)
        return jax.lax.dynamic_update_slice(empty, logits, (0, offset)).reshape(rows, -1, width)
    padding = (0, 0), (offset, num_blocks * width - size - offset)
    return jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(rows, -1, width)


def draw_on_shard(
    keys: Key[Array, " N"], logits: Float[Array, "N _"], vocab_size: int, greedy: bool
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Computes `draw_tokens` for the logits of a shard's part of the vocabulary, or of all of it.

    The shards exchange a number per block, and the logits of the chosen block.
    """
    width = vocab_block_width(vocab_size)
    num_blocks, part = -(-vocab_size // width), logits.shape[-1]
    first = 0 if part == vocab_size else jax.lax.axis_index("tensor") * part
    blocks = split_into_blocks(logits, width, first % width if part % width else 0)

    def of_all_blocks(function):
        values = function(blocks, axis=-1)
        if part == vocab_size:
            return values
        # A block that spans two shards is on both, with -inf for the logits of the other.
        everywhere = jnp.full((len(values), num_blocks + 1), -jnp.inf)
        everywhere = jax.lax.dynamic_update_slice(everywhere, values, (0, first // width))
        return function(jax.lax.all_gather(everywhere, "tensor"), axis=0)[:, :num_blocks]

    block_logits = of_all_blocks(jax.nn.logsumexp)
    if greedy:
        block, token_noise = jnp.argmax(of_all_blocks(jnp.max), axis=-1), 0.0
    else:
        block_noise, token_noise = gumbel_noise(keys, vocab_size)
        block = jnp.argmax(block_logits + block_noise, axis=-1)
    local = block - first // width
    token_logits = jnp.take_along_axis(blocks, local[:, None, None], axis=1, mode="fill", fill_value=-jnp.inf)[:, 0]
    if part < vocab_size:
        token_logits = jax.lax.pmax(jnp.where(local[:, None] < 0, -jnp.inf, token_logits), "tensor")
    token = jnp.argmax(token_logits + token_noise, axis=-1)
    chosen_logit = jnp.take_along_axis(token_logits, token[:, None], axis=-1)[:, 0]
    return block * width + token, chosen_logit - jax.nn.logsumexp(block_logits, axis=-1)


def draw_tokens(
    keys: Key[Array, " N"], logits: Float[Array, "N V"], greedy: bool = False
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Samples one token per row from softmax(logits) and returns it with its log-probability.

    The draw has two stages: the Gumbel-max trick over the blocks' logsumexps selects a block, then the trick over the
    logits of that block selects a token. The result is exact and takes about 2 sqrt(V) random numbers instead of V.
    On a mesh, the logits may be split over `tensor`; they are not gathered.

    Args:
        keys: A random key per row.
        logits: The logits.
        greedy: Return the most likely token instead.
    """
    mesh, (rows, vocab_size) = jax.sharding.get_abstract_mesh(), logits.shape
    spec = P() if mesh.empty else drop_indivisible_axes(P(ROW_AXES, "tensor"), logits.shape, mesh)
    draw = partial(draw_on_shard, vocab_size=vocab_size, greedy=greedy)
    return shard_map_on_mesh(draw, (row_spec(rows), spec), (row_spec(rows),) * 2)(keys, logits)


def keep_mask(logits: Float[Array, "N V"], filter: TokenFilter) -> Bool[Array, "N V"]:
    """Returns True for the tokens that the filter keeps, including ties with the least likely of them."""
    probs = jax.nn.softmax(logits, axis=-1)
    threshold = filter.min_p * probs.max(axis=-1)
    if filter.top_k or filter.top_p < 1:
        ordered = jnp.sort(probs, axis=-1, descending=True)
        mass_before = jnp.cumsum(ordered, axis=-1) - ordered  # the total probability of the more likely tokens
        dropped = mass_before >= filter.top_p
        if filter.top_k:
            dropped = dropped | (jnp.arange(ordered.shape[-1]) >= filter.top_k)
        threshold = jnp.maximum(threshold, jnp.min(jnp.where(dropped, jnp.inf, ordered), axis=-1))
    return probs >= threshold[:, None]


def choose_tokens(
    keys: Key[Array, " N"], logits: Float[Array, "N V"], greedy: bool, filter: TokenFilter
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Returns the next token of each row and its log-probability under the unfiltered softmax(logits)."""
    if greedy or filter == NO_FILTER:
        return draw_tokens(keys, logits, greedy)
    logits = constrain(logits, ROW_AXES, None)
    token, _ = draw_tokens(keys, jnp.where(keep_mask(logits, filter), logits, -jnp.inf))
    return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]


def draw_margin(
    key: Key[Array, ""],
    logits: Float[Array, " V"],
    token: int | Int[Array, ""],
    other: int | Int[Array, ""],
    greedy: bool,
    filter: TokenFilter,
) -> Float[Array, ""]:
    """Returns the margin, in nats, by which `token` beats `other` in the draw of `choose_tokens` with this key.

    Both stages of a draw compare scores. The margin is the difference of the scores in the stage in which the two
    tokens compete: of their blocks, or of the tokens themselves if they are in the same block.
    """
    if greedy:
        return logits[token] - logits[other]
    if filter != NO_FILTER:
        logits = jnp.where(keep_mask(logits[None], filter)[0], logits, -jnp.inf)
    width = vocab_block_width(len(logits))
    block_noise, token_noise = (noise[0] for noise in gumbel_noise(key[None], len(logits)))
    blocks, (block, other_block) = split_into_blocks(logits[None], width)[0], (token // width, other // width)
    block_scores = jax.nn.logsumexp(blocks, axis=-1) + block_noise
    token_scores = blocks[block] + token_noise
    of_tokens = token_scores[token % width] - token_scores[other % width]
    return jnp.where(block == other_block, of_tokens, block_scores[block] - block_scores[other_block])
