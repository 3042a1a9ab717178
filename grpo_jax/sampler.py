"""Sampling: prefill each distinct prompt once, then decode all its completions in one compiled loop.

    start   prefill B prompts, give each prompt's keys and values to its G rows, draw the first token
    decode  up to k more tokens a row; stops when all rows are done. Takes and returns its state
    finish  the state's arrays as a Rollout

Column c of a row's cache holds the keys and values of its token at position c, so a row sees the columns below its own
position and nothing else: prompts of different lengths need no padding mask.

Randomness is counter-based: the key of a token is folded from (key, prompt id, sample id, index in the completion). A
completion therefore does not depend on its row, on the batch or on the number of hosts, and can be drawn again.
"""

import re
from collections.abc import Sequence
from functools import lru_cache, partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from grpo_jax.architecture import ModelConfig
from grpo_jax.attention import KV
from grpo_jax.mesh import ROWS, constrain, path_name, shardings
from grpo_jax.model import Past, causal_mask, hidden_states, param_shapes, token_logits, unstack
from grpo_jax.types import Prompts, Rollout

BLOCK = 256  # tokens a draw chooses among at a time


@flax.struct.dataclass
class DecodeState:
    """All that the decode loop carries. Rows are ordered by prompt, then by sample."""

    kv: tuple[KV, ...]  # the cache, one KV [1, N, K, C, E] a layer
    last: Int[Array, " N"]  # the token drawn last, not yet in the cache
    prompt_lengths: Int[Array, " N"]
    keys: Key[Array, " N"]  # of the row; a token's key is folded from it and the token's index
    time: Int[Array, ""]  # tokens drawn so far by a row that is not done
    done: Bool[Array, " N"]  # a stopping token was drawn
    tokens: Int[Array, "N S"]
    logps: Float[Array, "N S"]
    lengths: Int[Array, " N"]


def draw(keys: Key[Array, " N"], logits: Float[Array, "N V"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """One token a row from softmax(logits), and its log-probability.

    Hierarchical: a block of tokens by the Gumbel-max trick over the blocks' logsumexps, then a token in the block.
    Exact, and V / 256 + 256 random numbers instead of V.
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    padded = jnp.pad(logits, ((0, 0), (0, blocks * BLOCK - vocab)), constant_values=-jnp.inf)
    padded = padded.reshape(rows, blocks, BLOCK)
    masses = jax.nn.logsumexp(padded, axis=-1)
    pair = jax.vmap(jax.random.split)(keys)
    block = jnp.argmax(masses + jax.vmap(lambda key: jax.random.gumbel(key, (blocks,)))(pair[:, 0]), axis=-1)
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    token = jnp.argmax(inside + jax.vmap(lambda key: jax.random.gumbel(key, (BLOCK,)))(pair[:, 1]), axis=-1)
    chosen = jnp.take_along_axis(inside, token[:, None], axis=-1)[:, 0]
    return block * BLOCK + token, chosen - jax.nn.logsumexp(masses, axis=-1)


def choose(config: ModelConfig, params, hidden: Float[Array, "N D"], keys, temperature, greedy: bool):
    """The next token of each row and its log-probability: at the temperature, or the likeliest, scored at 1."""
    logits = constrain(token_logits(config, params, hidden, 1.0 if greedy else temperature), ROWS, None)
    if not greedy:
        return draw(keys, logits)
    token = jnp.argmax(logits, axis=-1)
    return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]


def record(state: DecodeState, token, logp, stop_ids: tuple[int, ...]) -> DecodeState:
    """Writes the drawn tokens at index `time` of the rows that are not done."""
    token = jnp.where(state.done, 0, token)
    return state.replace(
        last=token,
        time=state.time + 1,
        tokens=state.tokens.at[:, state.time].set(token),
        logps=state.logps.at[:, state.time].set(jnp.where(state.done, 0.0, logp)),
        lengths=state.lengths + ~state.done,
        done=state.done | jnp.isin(token, jnp.asarray(stop_ids, jnp.int32)),
    )


@partial(jax.jit, static_argnames=("config", "samples", "max_tokens", "greedy", "stop_ids"))
def start(
    config: ModelConfig, params, prompts: Prompts, key, temperature, *, samples: int, max_tokens: int, greedy: bool,
    stop_ids: tuple[int, ...],
) -> DecodeState:
    """Prefills B prompts and draws the first token of B * G rows."""
    count, width = prompts.tokens.shape
    rows = count * samples
    positions = jnp.broadcast_to(jnp.arange(width), (count, width))
    hidden, new = hidden_states(config, params, prompts.tokens, positions, causal_mask(count, width))
    last_hidden = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0]

    def to_cache(x):  # [1, B, K, T, E] -> [1, N, K, C, E]
        x = jnp.pad(jnp.repeat(x, samples, axis=1), ((0, 0),) * 3 + ((0, max_tokens), (0, 0)))
        return constrain(x, None, ROWS, "tensor", None, None)

    ids = jnp.stack([jnp.repeat(prompts.ids, samples), jnp.tile(jnp.arange(samples), count)], axis=1)
    keys = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(ids)
    state = DecodeState(
        kv=jax.tree.map(to_cache, new),
        last=jnp.zeros(rows, jnp.int32),
        prompt_lengths=jnp.repeat(prompts.lengths, samples),
        keys=keys,
        time=jnp.int32(0),
        done=jnp.zeros(rows, bool),
        tokens=jnp.zeros((rows, max_tokens), jnp.int32),
        logps=jnp.zeros((rows, max_tokens), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
    )
    token, logp = choose(
        config, params, jnp.repeat(last_hidden, samples, axis=0), token_keys(state), temperature, greedy
    )
    return record(state, token, logp, stop_ids)


def token_keys(state: DecodeState):
    """The keys of the tokens to be drawn next."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.time)


@partial(jax.jit, static_argnames=("config", "greedy", "stop_ids"), donate_argnames=("state",))
def decode(
    config: ModelConfig, params, state: DecodeState, count, temperature, *, greedy: bool, stop_ids: tuple[int, ...]
) -> DecodeState:
    """Draws up to `count` more tokens for each row that is not done; ends early when all rows are."""
    rows, capacity = state.tokens.shape
    until = jnp.minimum(state.time + count, capacity)
    row_index = jnp.arange(rows)
    columns = jnp.broadcast_to(jnp.arange(state.kv[0].k.shape[-2]), (rows, state.kv[0].k.shape[-2]))
    itself = jnp.ones((rows, 1, 1), bool)

    def unfinished(state):
        return (state.time < until) & ~jnp.all(state.done)

    def step(state):
        position = state.prompt_lengths + state.time - 1  # of `last`
        past = Past(state.kv, (columns < position[:, None])[:, None, :], columns)
        hidden, new = hidden_states(config, params, state.last[:, None], position[:, None], itself, past)
        put = lambda cache, x: cache.at[0, row_index, :, position].set(x[0, :, :, 0])
        state = state.replace(kv=jax.tree.map(put, state.kv, new))
        token, logp = choose(config, params, hidden[:, 0], token_keys(state), temperature, greedy)
        return record(state, token, logp, stop_ids)

    return jax.lax.while_loop(unfinished, step, state)


def finish(state: DecodeState, prompts: Prompts) -> Rollout:
    """The rows of a state as B groups of G."""
    count = len(prompts.ids)
    group = lambda x: x.reshape(count, -1, *x.shape[1:])
    return Rollout(
        tokens=group(state.tokens), logps=group(state.logps), lengths=group(state.lengths),
        truncated=~group(state.done), prompt_ids=jnp.asarray(prompts.ids),
    )


def generate(
    config: ModelConfig, params, prompts: Prompts, key, *, samples: int, max_tokens: int, temperature: float,
    stop_ids: tuple[int, ...],
) -> Rollout:
    """`sample` for prompts that are encoded and parameters that are placed (`place_for_rollout`)."""
    how = dict(greedy=temperature == 0, stop_ids=tuple(stop_ids))
    scale = np.float32(temperature or 1.0)
    state = start(config, params, prompts, key, scale, samples=samples, max_tokens=max_tokens, **how)
    return finish(decode(config, params, state, np.int32(max_tokens), scale, **how), prompts)


@lru_cache
def placer(config: ModelConfig, mesh: Mesh | None):
    """The compiled copy of `place_for_rollout`, one a model and mesh."""

    def place(params):
        def cast(path, leaf):  # not what is computed in float32: norms and routers
            return leaf if re.search("scale$|router/", path_name(path)) else leaf.astype(config.compute_dtype)

        return jax.tree_util.tree_map_with_path(cast, unstack(params))

    if mesh is None:
        return jax.jit(place)
    places = shardings(mesh, jax.eval_shape(place, param_shapes(config)), gathered=True)
    return jax.jit(place, out_shardings=places)


def place_for_rollout(config: ModelConfig, params, mesh: Mesh | None = None):
    """A copy of stacked parameters as decoding wants it: layers apart, compute dtype, no fsdp axis to gather over.

    Made once a rollout; free it afterwards.
    """
    return placer(config, mesh)(params)


def pad_prompts(prompts: Sequence[Sequence[int]], prompt_ids: Sequence[int] | None = None) -> Prompts:
    """Lists of token ids as Prompts, T rounded up to a multiple of 32 so that few shapes are compiled."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or not lengths.all():
        raise ValueError(f"expected prompts of one token or more; found lengths {lengths.tolist()}")
    ids = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids)
    if ids.shape != lengths.shape or ids.min() < 0 or ids.max() >= 2**31:
        raise ValueError(f"expected {len(lengths)} prompt ids from 0 to 2**31 - 1; found {ids.tolist()}")
    tokens = np.zeros((len(prompts), -(-int(lengths.max()) // 32) * 32), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return Prompts(tokens=tokens, lengths=lengths, ids=ids.astype(np.int32))


def sample(
    model_config: ModelConfig,
    params,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    samples: int,
    max_tokens: int,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
    prompt_ids: Sequence[int] | None = None,
) -> Rollout:
    """Draws `samples` completions of at most `max_tokens` tokens for each prompt.

    Args:
      prompts: a list of B lists of token ids.
      key: of this rollout; with the prompt's id, the sample's and the token's index it decides a draw.
      temperature: 0 is greedy; log-probabilities are then those at temperature 1.
      stop_ids: a row ends with the first of them, which is part of it. None given, no stop.
      prompt_ids: B integers that name the prompts in the keys, 0 to B - 1 by default.
    Raises:
      ValueError: an empty prompt, an id that is no row of the embedding, a temperature below 0, nothing to draw, or a
        prompt that with its completion exceeds the model's positions.
    """
    padded = pad_prompts(prompts, prompt_ids)
    longest = int(padded.lengths.max())
    for fine, expected, found in (
        (samples > 0 and max_tokens > 0, "samples and max_tokens of 1 or more", (samples, max_tokens)),
        (temperature >= 0, "a temperature of 0 or more", temperature),
        (0 <= padded.tokens.min() and padded.tokens.max() < model_config.vocab_size,
         f"token ids from 0 to {model_config.vocab_size - 1}", (padded.tokens.min(), padded.tokens.max())),
        (longest + max_tokens <= model_config.max_positions,
         f"prompt + max_tokens of at most {model_config.max_positions} positions", f"{longest} + {max_tokens}"),
    ):
        if not fine:
            raise ValueError(f"expected {expected}; found {found}")
    if len(params["layers"]) < model_config.num_layers:
        params = place_for_rollout(model_config, params)
    return generate(model_config, params, padded, key, samples=samples, max_tokens=max_tokens,
                    temperature=temperature, stop_ids=tuple(int(i) for i in stop_ids))
