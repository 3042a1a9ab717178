"""The axis legend, and the values that travel along the data's way.

Axes, one letter each, everywhere in the package:

    B  prompts (distinct questions)     T  prompt length, padded
    G  samples per prompt               S  sampled length, padded
    N  rows, N = B * G                  L  row length, L = T + S
    V  vocabulary (embedding rows)      D  model width
    F  hidden width of the MLP          C  cache length
    H  query heads                      K  key/value heads
    E  width of one head
    R  query heads on one key/value head  Z  rotating pairs of a head
    X  experts of a layer                 k  experts that a token takes
    M  slots of the sampler               A  states of a stop table
    P  packed rows                        W  columns of a packed row

A row is a prompt, its completion and then padding, with nothing in between: the column of a token in
a row is its position in the sequence. Alignment: `logps[n, t]` is the log-probability of `tokens[n, t]`.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Rollout:
    """G completions for each of B prompts, as the sampler drew them."""

    tokens: Int[Array, "B G S"]  # the stopping token included; 0 after it
    logps: Float[Array, "B G S"]  # float32, at the sampling temperature; 0 after the stopping token
    lengths: Int[Array, "B G"]  # tokens drawn, the stopping token included
    truncated: Bool[Array, "B G"]  # True where S tokens were drawn and none of them stops
    prompt_ids: Int[Array, " B"]

    def rows(self) -> dict[str, jax.Array]:
        """The same values by row: tokens[N,S], logps[N,S], lengths[N], truncated[N], prompt_ids[N], sample_ids[N]."""
        prompts, samples, _ = self.tokens.shape
        merged = {
            name: getattr(self, name).reshape(prompts * samples, *getattr(self, name).shape[2:])
            for name in ("tokens", "logps", "lengths", "truncated")
        }
        return merged | {
            "prompt_ids": jnp.repeat(self.prompt_ids, samples),
            "sample_ids": jnp.tile(jnp.arange(samples), prompts),
        }


class Segments(NamedTuple):
    """Whose tokens these are. Prompts and completions lie in a row one after another, in any order.

    A completion's tokens see their prompt and what stands before them in the completion (grpo_jax.model.mask.sees).
    """

    position: Int[Array, "N L"]  # in the sequence of prompt and completion, from 0
    prompt: Int[Array, "N L"]  # which prompt of the row, from 1; 0: padding, which nothing sees
    completion: Int[Array, "N L"]  # which completion in the row, from 1; 0: the prompt itself


@flax.struct.dataclass
class Experience:
    """N rows ready to be learned from, on the host. Completion arrays are aligned with the completion, not the row."""

    tokens: Int[Array, "N L"]  # prompt, completion, padding
    prompt_lengths: Int[Array, " N"]  # the completion's first token stands in this column
    mask: Bool[Array, "N S"]  # True on completion tokens, the stopping token included
    sampler_logps: Float[Array, "N S"]  # log pi_old, from the sampler
    ref_logps: Float[Array, "N S"]  # log pi_ref; zeros when no reference is used
    advantages: Float[Array, " N"]
    prompt_ids: Int[Array, " N"]  # rows with one id have one prompt


@flax.struct.dataclass
class PackedBatch:
    """Completions as the update computes on them: several in a row, after a prompt that they share.

    A row is what one shard of a mesh works on at a time. In each array the value at a column belongs to its token.
    """

    tokens: Int[Array, "P W"]
    segments: Segments  # [P, W]
    predict_from: Int[Array, "P W"]  # the column whose hidden state predicts the token, if it belongs to a completion
    flat_index: Int[Array, "P W"]  # n * S + t for token t of completion n of the experience; -1 on prompts and padding
    weights: Float[Array, "P W"]  # of a token in the loss (grpo.token_weights); 0 on prompts and padding
    sampler_logps: Float[Array, "P W"]
    ref_logps: Float[Array, "P W"]
    advantages: Float[Array, "P W"]
    micro_batches: Int[Array, ""]  # that hold a token; the rows after them are padding


@flax.struct.dataclass
class TrainState:
    """All that an update replaces."""

    step: Int[Array, ""]  # updates done, those left out included
    params: Any  # the policy
    opt_state: Any
    skipped: Int[Array, ""]  # updates left out so far, as their gradient was not finite
