"""Log-probabilities and entropies of given tokens: the one scoring function of training.

The [rows, tokens, vocabulary] array of logits never exists: columns go through the head a few at a time, in the forward
pass and, recomputed, in the backward pass.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.architecture import ModelConfig
from grpo_jax.attend import alone
from grpo_jax.mesh import ROWS, constrain
from grpo_jax.model import hidden_states, token_logits

CHUNK_TOKENS = 2048  # tokens whose logits exist at a time


def score_hidden(
    config: ModelConfig,
    params: dict,
    hidden: Float[Array, "N S D"],
    targets: Int[Array, "N S"],
    temperature: float,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """log pi(target) and the entropy of pi at each hidden state, in nats, float32, at the sampling temperature.

    The entropy has no gradient.

    Padding targets give a finite value that the caller masks.
    """
    rows, length, _ = hidden.shape
    columns = max(1, min(length, CHUNK_TOKENS // rows))
    chunks = -(-length // columns)
    pad = chunks * columns - length

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, columns, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk(hidden, targets):
        logits = constrain(token_logits(config, params, hidden, temperature), ROWS, None, "tensor")
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        # -inf logits belong to rows that are no token: they have probability 0 and add 0.
        finite = jnp.where(jnp.isneginf(logits), 0.0, logits)
        mean = jnp.sum(jnp.exp(logits - total[..., None]) * finite, axis=-1)
        return chosen - total, jax.lax.stop_gradient(total - mean)  # a metric: its backward pass would cost as much

    if chunks == 1:
        return chunk(hidden, targets)
    logps, entropies = jax.lax.map(lambda parts: chunk(*parts), (split(hidden), split(targets)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, chunks * columns)[:, :length]
    return join(logps), join(entropies)


def score_completions(
    config: ModelConfig,
    params: dict,
    tokens: Int[Array, "N L"],
    prompt_lengths: Int[Array, " N"],
    sampled: int,
    temperature: float,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """log pi and entropy of each row's completion: S tokens from the prompt's end on.

    The only place that shifts: column t of the result belongs to the token at column `prompt_lengths + t` of the row,
    which the hidden state one column before it predicts.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Padding stands behind every real token, so causality alone keeps it out of sight.
    hidden, _ = hidden_states(config, params, tokens, alone(positions))
    columns = prompt_lengths[:, None] + jnp.arange(sampled)
    targets = jnp.take_along_axis(tokens, columns, axis=1)
    before = jnp.take_along_axis(hidden, (columns - 1)[..., None], axis=1)
    return score_hidden(config, params, before, targets, temperature)
