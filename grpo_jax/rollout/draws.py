"""Drawing tokens: exactly from softmax(logits), from what filters leave of it, or the likeliest."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class TokenFilter(NamedTuple):
    """Which tokens may be drawn: those that every one of the three keeps. The likeliest always stays.

    For evaluation. A policy sampled through a filter is not the policy that is scored, and its ratio is biased.
    """

    top_k: int = 0  # the k likeliest; 0 keeps all
    top_p: float = 1.0  # the fewest that have probability top_p together (arXiv 1904.09751)
    min_p: float = 0.0  # those with min_p times the largest probability (arXiv 2407.01082)


def vocab_block_width(vocab: int) -> int:
    """How many tokens a draw chooses among in its second stage: about the root of the vocabulary, a power of two."""
    return 2 ** round(math.log2(vocab) / 2)


def gumbel_stages(
    keys: Key[Array, " N"], logits: Float[Array, "N V"]
) -> tuple[Float[Array, "N blocks width"], Float[Array, "N blocks"], Float[Array, "N blocks"], Float[Array, "N width"]]:
    """What a draw is made of: the logits in blocks, the blocks' logsumexps, and the noise of either stage."""
    rows, vocab = logits.shape
    width = vocab_block_width(vocab)
    blocks = -(-vocab // width)
    padded = jnp.pad(logits, ((0, 0), (0, blocks * width - vocab)), constant_values=-jnp.inf)
    padded = padded.reshape(rows, blocks, width)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (blocks + width,)))(keys)
    return padded, jax.nn.logsumexp(padded, axis=-1), noise[:, :blocks], noise[:, blocks:]


def draw_tokens(keys: Key[Array, " N"], logits: Float[Array, "N V"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """One token a row from softmax(logits), and its log-probability.

    Hierarchical: a block of tokens by the Gumbel-max trick over the blocks' logsumexps, then a token in the block.
    Exact, and with about 2 sqrt(V) random numbers instead of V.
    """
    padded, masses, noise, noise_inside = gumbel_stages(keys, logits)
    block = jnp.argmax(masses + noise, axis=-1)
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    token = jnp.argmax(inside + noise_inside, axis=-1)
    chosen = jnp.take_along_axis(inside, token[:, None], axis=-1)[:, 0]
    return block * padded.shape[-1] + token, chosen - jax.nn.logsumexp(masses, axis=-1)


def runner_up_margin(keys: Key[Array, " N"], logits: Float[Array, "N V"]) -> Float[Array, " N"]:
    """How near a draw was to another: between the two largest perturbed scores, of the nearer stage.

    Rounding that moves logits by less cannot change the token.
    """
    padded, masses, noise, noise_inside = gumbel_stages(keys, logits)
    scores = masses + noise
    inside = jnp.take_along_axis(padded, jnp.argmax(scores, axis=-1)[:, None, None], axis=1)[:, 0] + noise_inside
    between = lambda x: -jnp.diff(jax.lax.top_k(x, 2)[0], axis=-1)[:, 0] if x.shape[-1] > 1 else jnp.inf
    return jnp.minimum(between(scores), between(inside))


def keep_mask(logits: Float[Array, "N V"], filter: TokenFilter) -> Bool[Array, "N V"]:
    """The tokens that a filter keeps; those as likely as the last one kept are kept too."""
    probs = jax.nn.softmax(logits, axis=-1)
    least = filter.min_p * probs.max(axis=-1)
    if filter.top_k or filter.top_p < 1:
        ordered = jnp.sort(probs, axis=-1, descending=True)
        before = jnp.cumsum(ordered, axis=-1) - ordered  # the probability of the likelier ones
        enough = before >= filter.top_p
        if filter.top_k:
            enough = enough | (jnp.arange(ordered.shape[-1]) >= filter.top_k)
        least = jnp.maximum(least, jnp.min(jnp.where(enough, jnp.inf, ordered), axis=-1))
    return probs >= least[:, None]


def choose_tokens(
    keys: Key[Array, " N"], logits: Float[Array, "N V"], greedy: bool, filter: TokenFilter
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """The next token of each row, and its log-probability in softmax(logits), whatever the filter."""
    if not greedy and filter == TokenFilter():
        return draw_tokens(keys, logits)
    if greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        token, _ = draw_tokens(keys, jnp.where(keep_mask(logits, filter), logits, -jnp.inf))
    return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
