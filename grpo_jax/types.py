"""The legend of axis letters, and the data structures that are passed between packages.

Shape annotations use one letter per axis, with the same meaning throughout the package:

    B  prompts (distinct questions)     T  padded prompt length
    G  completions per prompt           S  padded completion length
    N  sequences, N = B * G             L  sequence length, L = T + S
    V  vocabulary (embedding rows)      D  model width
    F  hidden width of the MLP          C  KV cache length
    H  query heads                      K  key/value heads
    E  head dimension                   Z  rotary pairs per head
    R  query heads per key/value head   A  states of a stop table
    X  experts per layer                k  experts chosen per token
    M  decode slots                     W  width of a packed row, in tokens
    P  packed rows

In an `[N, L]` array each row holds a prompt, then its completion, then padding, so a token's column is its position in
the sequence. Log-probabilities are aligned with tokens: `logps[n, t]` is the log-probability of `tokens[n, t]`.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Rollout:
    """G completions for each of B prompts, as returned by the sampler."""

    tokens: Int[Array, "B G S"]  # sampled tokens, including the stopping token; 0 after it
    logps: Float[Array, "B G S"]  # float32 log-probs at the sampling temperature; 0 after the stopping token
    lengths: Int[Array, "B G"]  # number of sampled tokens, including the stopping token
    truncated: Bool[Array, "B G"]  # True where S tokens were sampled without reaching a stop
    prompt_ids: Int[Array, " B"]  # index of each prompt in the problem stream

    def rows(self) -> dict[str, jax.Array]:
        """Returns the rollout with prompts and samples merged into one axis of N sequences.

        Returns:
            A dict with `tokens` and `logps` `[N, S]`, and `lengths`, `truncated`, `prompt_ids` and `sample_ids` `[N]`.
        """
        prompts, samples, _ = self.tokens.shape
        by_group = {name: x for name, x in vars(self).items() if name != "prompt_ids"}
        return {name: x.reshape(prompts * samples, *x.shape[2:]) for name, x in by_group.items()} | {
            "prompt_ids": jnp.repeat(self.prompt_ids, samples),
            "sample_ids": jnp.tile(jnp.arange(samples), prompts),
        }


class Segments(NamedTuple):
    """Assigns each token of a row to a prompt and a completion.

    A row may hold several prompts and completions, with their tokens in any order. A completion's tokens attend to
    their prompt and to earlier tokens of the same completion (see `grpo_jax.model.mask.attention_mask`).
    """

    position: Int[Array, "N L"]  # position in the sequence (prompt + completion), counted from 0
    prompt: Int[Array, "N L"]  # number of the prompt within the row, counted from 1; 0 for padding
    completion: Int[Array, "N L"]  # number of the completion within the row, counted from 1; 0 for prompt tokens


@flax.struct.dataclass
class Experience:
    """N sequences to train on, as host arrays. Arrays `[N, S]` are aligned with the completion, not with the row."""

    tokens: Int[np.ndarray, "N L"]  # prompt, completion, padding
    prompt_lengths: Int[np.ndarray, " N"]  # prompt length, which is also the column of the completion's first token
    mask: Bool[np.ndarray, "N S"]  # True on completion tokens, including the stopping token
    sampler_logps: Float[np.ndarray, "N S"]  # log pi_old, as computed by the sampler
    ref_logps: Float[np.ndarray, "N S"]  # log pi_ref; zeros until computed, and if no reference is kept
    advantages: Float[np.ndarray, " N"]  # one advantage per completion; zeros until computed
    prompt_ids: Int[np.ndarray, " N"]  # sequences with equal ids share the same prompt
    kept: Bool[np.ndarray, " N"]  # False for completions that are left out of the updates


@flax.struct.dataclass
class PackedBatch:
    """A batch in packed rows, as the update consumes it. Each row holds prompts and their completions.

    Each data shard processes one row at a time. In every `[P, W]` array, the value in a column belongs to the token in
    that column.
    """

    tokens: Int[Array, "P W"]  # token ids; 0 on padding
    segments: Segments  # [P, W], the prompt and the completion that each token belongs to
    predict_from: Int[Array, "P W"]  # column of the hidden state that predicts this completion token
    flat_index: Int[Array, "P W"]  # n * S + t for token t of completion n of the batch; -1 on prompts and padding
    sequence: Int[Array, "P W"]  # n for a token of completion n of the batch; -1 on prompts and padding
    group: Int[Array, "P W"]  # index of that completion's group in the batch; -1 on prompts and padding
    weights: Float[Array, "P W"]  # weight of the token in the loss (`grpo.token_weights`); 0 on prompts and padding
    sampler_logps: Float[Array, "P W"]  # log pi_old of completion tokens
    ref_logps: Float[Array, "P W"]  # log pi_ref of completion tokens
    advantages: Float[Array, "P W"]  # the completion's advantage, repeated for each of its tokens
    num_micro_batches: Int[Array, ""]  # micro-batches that hold a token; all later ones are padding
    num_sequences: int = flax.struct.field(pytree_node=False)  # N, completions in the batch; static under jit


@flax.struct.dataclass
class TrainState:
    """Everything that an update replaces."""

    step: Int[Array, ""]  # number of updates so far, including those that changed nothing
    params: Any  # parameters of the policy
    opt_state: Any  # state of the optax optimizer
    skipped: Int[Array, ""]  # number of updates that were skipped because they were not finite
    is_reference: Bool[Array, ""]  # whether the parameters are still those of the reference
