"""Token sampling: exact draws from softmax(logits), top-k/top-p/min-p filtering, and greedy decoding."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


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


def gumbel_stages(
    keys: Key[Array, " N"], logits: Float[Array, "N V"]
) -> tuple[Float[Array, "N blocks width"], Float[Array, "N blocks"], Float[Array, "N blocks"], Float[Array, "N width"]]:
    """Prepares a two-stage draw.

    Returns:
        The logits split into blocks (padded with -inf), the logsumexp of each block, the Gumbel noise that selects the
        block, and the Gumbel noise that selects the token within it.
    """
    rows, vocab_size = logits.shape
    width = vocab_block_width(vocab_size)
    num_blocks = -(-vocab_size // width)
    padded = jnp.pad(logits, ((0, 0), (0, num_blocks * width - vocab_size)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, num_blocks, width)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (num_blocks + width,)))(keys)
    return blocks, jax.nn.logsumexp(blocks, axis=-1), noise[:, :num_blocks], noise[:, num_blocks:]


def draw_tokens(keys: Key[Array, " N"], logits: Float[Array, "N V"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Samples one token per row from softmax(logits) and returns it with its log-probability.

    The draw has two stages: the Gumbel-max trick over the blocks' logsumexps selects a block, then the trick over the
    logits of that block selects a token. The result is exact and takes about 2 sqrt(V) random numbers instead of V.
    """
    blocks, block_logits, block_noise, token_noise = gumbel_stages(keys, logits)
    block = jnp.argmax(block_logits + block_noise, axis=-1)
    token_logits = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token = jnp.argmax(token_logits + token_noise, axis=-1)
    chosen_logit = jnp.take_along_axis(token_logits, token[:, None], axis=-1)[:, 0]
    return block * blocks.shape[-1] + token, chosen_logit - jax.nn.logsumexp(block_logits, axis=-1)


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
    if not greedy and filter == NO_FILTER:
        return draw_tokens(keys, logits)
    if greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        token, _ = draw_tokens(keys, jnp.where(keep_mask(logits, filter), logits, -jnp.inf))
    return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
