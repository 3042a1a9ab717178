"""Sampling: a rollout's sequences run through a fixed number of slots, in one compiled loop.

    start   prefill each distinct prompt once; take the first sequences into the slots
    decode  a token for every slot, again and again; a slot whose sequence ends takes the next one of the queue
    finish  what was drawn, as a Rollout

Taking a sequence copies its prompt's keys and values into the slot and steps back by one token: the prompt's last token
is decoded again, which gives the first token of the completion like any other. Column c of a slot's cache holds the token
at position c, so prompts of different lengths need no padding.

Attention costs as many columns as the cache has. It starts small and the loop is left when the longest sequence has
filled it, or when the longest has ended and a smaller cache would do; there is one compiled program a size (`sizes`).

On a mesh each shard of rows has its own prompts, queue and slots. Its rows never leave it: all that shards exchange for a
token is how long the longest sequence is, which says when to stop.

Randomness is counter-based: the key of a token is folded from (key, prompt id, sample id, index in the completion). A
completion therefore does not depend on its slot, on the others or on the number of hosts, and can be drawn again.
"""

import re
from collections.abc import Sequence
from functools import lru_cache, partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from grpo_jax.architecture import ModelConfig
from grpo_jax.attention import KV
from grpo_jax.draws import Filter, choose
from grpo_jax.mesh import ROWS, constrain, path_name, row_shards, shardings
from grpo_jax.model import causal_mask, hidden_states, param_shapes, token_logits, unstack
from grpo_jax.prompt import load_tokenizer
from grpo_jax.stops import STOPPED, stop_table
from grpo_jax.types import Prompts, Rollout

PREFILL_TOKENS = 8192  # of prompts that a shard prefills at a time


@flax.struct.dataclass
class Work:
    """What a rollout draws, of all shards of rows one after another; constant while it lasts."""

    prompts: Prompts  # those that the shard's sequences have
    kv: tuple[KV, ...]  # their keys and values, one KV [1, prompts, ...] of T columns a layer
    prompt: Int[Array, " N"]  # of each sequence: which of the shard's prompts
    limit: Int[Array, " N"]  # tokens to draw at most; 0 fills the last shards up and is no sequence
    keys: Key[Array, " N"]


@flax.struct.dataclass
class Slots:
    """All that the decode loop carries: M slots and what the N sequences have drawn."""

    kv: tuple[KV, ...]  # the cache, one KV [1, M, ...] of C columns a layer
    sequence: Int[Array, " M"]  # that the slot draws, counted in its shard; -1: the slot is idle
    last: Int[Array, " M"]  # its last token, not yet in the cache
    position: Int[Array, " M"]  # of `last`
    index: Int[Array, " M"]  # of the token to be drawn next, in the completion
    stop_state: Int[Array, " M"]  # in the stop table
    taken: Int[Array, " shards"]  # sequences that have had a slot
    longest: Int[Array, ""]  # columns that the longest sequence needs for its next token; 0: all are done
    tokens: Int[Array, "N S"]
    logps: Float[Array, "N S"]
    lengths: Int[Array, " N"]
    stopped: Int[Array, " N"]  # 1: ended by a stopping token


def row_specs(tree):
    """How the leaves of Work or Slots lie on the mesh: all but `longest` have rows, which are split; a cache has layers
    in front of them."""

    def of(path, leaf):
        name = path_name(path)
        return P() if name == "longest" else P(None, ROWS) if name.startswith("kv/") else P(ROWS)

    return jax.tree_util.tree_map_with_path(of, tree)


def on_each_shard(function, *args):
    """function(*args) of each shard's own rows, on the mesh in force. It returns what its first argument is.

    Every leaf but `longest` has rows, which are split; a cache has layers in front of them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*args)
    leaves, tree = jax.tree_util.tree_flatten_with_path(args)
    names = [path_name(path) for path, _ in leaves]
    specs = tuple(
        P() if name.endswith("longest") else P(None, ROWS) if "/kv/" in name else P(ROWS) for name in names)

    def run(*leaves):
        return tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))

    out, out_tree = jax.tree.flatten(args[0])
    made = jax.shard_map(
        run, in_specs=specs, out_specs=specs[: len(out)], axis_names=set(ROWS), check_vma=False)(
            *(leaf for _, leaf in leaves))
    return jax.tree.unflatten(out_tree, made)


def prefill(config: ModelConfig, params, prompts: Prompts) -> tuple[KV, ...]:
    """The keys and values of prompts, T columns."""
    count, width = prompts.tokens.shape

    def run(tokens):
        rows = tokens.shape[0]
        positions = jnp.broadcast_to(jnp.arange(width), (rows, width))
        return hidden_states(config, params, tokens, positions, causal_mask(rows, width))[1]

    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else row_shards(mesh)
    at_once = max(1, PREFILL_TOKENS // width) * shards
    if count <= at_once:
        return run(prompts.tokens)
    pieces = -(-count // at_once)
    padded = jnp.pad(prompts.tokens, ((0, pieces * at_once - count), (0, 0)))
    # Every piece takes prompts from all shards, so that all of them work.
    split = constrain(jnp.swapaxes(padded.reshape(-1, pieces, width), 0, 1), None, ROWS, None)
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(1, pieces * at_once, *x.shape[3:])[:, :count]
    return jax.tree.map(join, jax.lax.map(run, split))


def refill(slots: Slots, work: Work) -> Slots:
    """The idle slots of a shard take the next sequences of its queue."""
    free = slots.sequence < 0
    turn = slots.taken[0] + jnp.cumsum(free) - 1
    takes = free & (turn < jnp.sum(work.limit > 0))
    sequence = jnp.where(takes, turn, slots.sequence)
    prompt = work.prompt[jnp.where(takes, turn, 0)]
    before_last = work.prompts.lengths[prompt] - 1
    filled = jnp.nonzero(takes, size=len(takes), fill_value=0)[0]

    def copy(i, kv):
        slot = filled[i]

        def put(cache, of_prompts):
            one = jax.lax.dynamic_slice_in_dim(of_prompts, prompt[slot], 1, axis=1)
            return jax.lax.dynamic_update_slice(cache, one, (0, slot, 0, 0, 0))

        return jax.tree.map(put, kv, work.kv)

    return slots.replace(
        kv=jax.lax.fori_loop(0, jnp.sum(takes), copy, slots.kv),
        sequence=sequence,
        last=jnp.where(takes, work.prompts.tokens[prompt, before_last], slots.last),
        position=jnp.where(takes, before_last, jnp.where(sequence < 0, 0, slots.position)),
        index=jnp.where(takes, 0, slots.index),
        stop_state=jnp.where(takes, 0, slots.stop_state),
        taken=slots.taken + jnp.sum(takes),
    )


def record(slots: Slots, work: Work, token: Int[Array, " M"], logp: Float[Array, " M"], state: Int[Array, " M"]) -> Slots:
    """Writes down the tokens that a shard's slots drew, which led to `state`; slots whose sequence ends become idle."""
    live = slots.sequence >= 0
    to = jnp.where(live, slots.sequence, len(work.limit))  # an idle slot writes beyond the end: nowhere
    drawn = slots.index + 1
    ended = (state == STOPPED) | (drawn >= work.limit[jnp.maximum(slots.sequence, 0)])
    return slots.replace(
        sequence=jnp.where(live & ~ended, slots.sequence, -1),
        last=token,
        position=slots.position + 1,
        index=drawn,
        stop_state=jnp.maximum(state, 0),
        tokens=slots.tokens.at[to, slots.index].set(token, mode="drop"),
        logps=slots.logps.at[to, slots.index].set(logp, mode="drop"),
        lengths=slots.lengths.at[to].set(drawn, mode="drop"),
        stopped=slots.stopped.at[to].set((state == STOPPED).astype(jnp.int32), mode="drop"),
    )


def vote(slots: Slots) -> Slots:
    """Sets `longest`, of all shards."""
    return slots.replace(longest=jnp.max(jnp.where(slots.sequence >= 0, slots.position + 1, 0)))


@partial(jax.jit, static_argnames=("config", "slots", "columns", "sampled"))
def start(
    config: ModelConfig, params, prompts: Prompts, prompt, limit, ids: Int[Array, "N 2"], key, *, slots: int,
    columns: int, sampled: int,
) -> tuple[Slots, Work]:
    """Prefills the prompts and fills `slots` slots with caches of `columns` columns.

    Args:
      prompts, prompt, limit: as in Work.
      ids: prompt id and sample id of each sequence.
    """
    keys = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(ids)
    prompts, prompt, limit, keys = jax.tree.map(lambda x: constrain(x, ROWS), (prompts, prompt, limit, keys))
    work = Work(prompts=prompts, kv=prefill(config, params, prompts), prompt=prompt, limit=limit, keys=keys)
    empty = lambda x, c: constrain(jnp.zeros((1, slots, *x.shape[2:-2], *c), x.dtype), None, ROWS, "tensor", None, None)
    cache = [KV(empty(kv.k, (kv.k.shape[-2], columns)), empty(kv.v, (columns, kv.v.shape[-1]))) for kv in work.kv]
    mesh = jax.sharding.get_abstract_mesh()
    zeros = lambda *shape, dtype=jnp.int32: constrain(jnp.zeros(shape, dtype), ROWS)
    state = Slots(
        kv=tuple(cache), sequence=zeros(slots) - 1, last=zeros(slots), position=zeros(slots), index=zeros(slots),
        stop_state=zeros(slots), taken=zeros(1 if mesh.empty else row_shards(mesh)), longest=jnp.int32(0),
        tokens=zeros(len(limit), sampled), logps=zeros(len(limit), sampled, dtype=jnp.float32),
        lengths=zeros(len(limit)), stopped=zeros(len(limit)))
    return vote(on_each_shard(refill, state, work)), work


@partial(jax.jit, static_argnames=("config", "greedy", "filter"), donate_argnames=("slots",))
def decode(
    config: ModelConfig, params, slots: Slots, work: Work, table, temperature, floor, count, *, greedy: bool,
    filter: Filter,
) -> Slots:
    """Draws up to `count` tokens a slot; ends early when all is done, the cache is full, or `floor` columns would do."""
    columns = jnp.arange(slots.kv[0].k.shape[-1])

    def going(carry):
        slots, steps = carry
        return (slots.longest > floor) & (slots.longest <= len(columns)) & (steps < count)

    def own_keys(sequence, work):
        return work.keys[jnp.maximum(sequence, 0)]

    def step(carry):
        slots, steps = carry
        position = slots.position[:, None]
        hidden, kv = hidden_states(
            config, params, slots.last[:, None], position, columns <= position[:, :, None], slots.kv)
        logits = token_logits(config, params, hidden[:, 0], 1.0 if greedy else temperature)
        keys = jax.vmap(jax.random.fold_in)(on_each_shard(own_keys, slots.sequence, work), slots.index)
        token, logp = choose(keys, constrain(logits, ROWS, None), greedy, filter)
        state = table[slots.stop_state, token].astype(jnp.int32)
        slots = on_each_shard(record, slots.replace(kv=kv), work, token, logp, state)
        return vote(on_each_shard(refill, slots, work)), steps + 1

    return jax.lax.while_loop(going, step, (slots, jnp.int32(0)))[0]


def finish(slots: Slots, prompts: Prompts, samples: int) -> Rollout:
    """What was drawn, as B groups of G."""
    count = len(prompts.ids)
    group = lambda x: x[: count * samples].reshape(count, samples, *x.shape[1:])
    return Rollout(
        tokens=group(slots.tokens), logps=group(slots.logps), lengths=group(slots.lengths),
        truncated=group(slots.stopped) == 0, prompt_ids=jnp.asarray(prompts.ids))


def sizes(width: int, most: int) -> list[int]:
    """The numbers of columns that a cache may have: 128, 192, 256, 384, 512, ..., and `most` in the end.

    Args:
      width: T, the columns of a prompt, which every size exceeds.
      most: what the longest sequence can need.
    """
    steps = sorted({step << shift for step in (128, 192) for shift in range(most.bit_length())})
    return [step for step in steps if step > width and step * 1.2 < most] + [most]


def queue(prompts: Prompts, limits: Int[np.ndarray, "B G"], shards: int):
    """The sequences split over shards: (prompts of the shards, and by sequence prompt, limit and ids), numpy.

    Sequence n is sample n % G of prompt n // G; shard w draws the w-th part of them. Each shard has the prompts of its own
    sequences, so a group that is cut has its prompt in two shards.
    """
    count, samples = limits.shape
    each = -(-count * samples // shards)
    number = np.arange(shards * each)
    real = number < count * samples
    prompt = np.minimum(number // samples, count - 1)
    first = prompt.reshape(shards, each)[:, :1]
    local = prompt.reshape(shards, each) - first
    taken = np.minimum(first + np.arange(local.max() + 1), count - 1).reshape(-1)
    of_shards = jax.tree.map(lambda x: np.asarray(x)[taken], prompts)
    limit = np.where(real, limits.reshape(-1)[np.minimum(number, count * samples - 1)], 0)
    ids = np.stack([np.asarray(prompts.ids)[prompt], number % samples], axis=1)
    return of_shards, local.reshape(-1).astype(np.int32), limit.astype(np.int32), ids.astype(np.int32)


def begin(
    config: ModelConfig, params, prompts: Prompts, key, limits: Int[np.ndarray, "B G"], *, slots: int, columns: int,
    sampled: int,
) -> tuple[Slots, Work]:
    """`start` for whole prompts (numpy) and the number of tokens, at most S, that each completion may have."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else row_shards(mesh)
    of_shards, prompt, limit, ids = queue(prompts, limits, shards)
    slots = min(-(-slots // shards) * shards or len(limit), len(limit))
    return start(config, params, of_shards, prompt, limit, ids, key, slots=slots, columns=columns,
                 sampled=sampled)


@partial(jax.jit, static_argnames=("columns",))
def resize(kv: KV, columns: int) -> KV:
    """A layer's cache with another number of columns; the first are kept."""

    def fit(x, axis):
        if columns <= x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, columns, axis=axis)
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, columns - x.shape[axis])
        return jnp.pad(x, pad)

    return KV(fit(kv.k, 4), fit(kv.v, 3))


def generate(
    config: ModelConfig, params, prompts: Prompts, key, *, samples: int, max_tokens: int, temperature: float,
    table: Int[np.ndarray, "A V"], slots: int = 0, limits: Int[np.ndarray, "B G"] | None = None,
    filter: Filter = Filter(),
) -> Rollout:
    """`sample` for prompts that are encoded (numpy) and parameters that are placed (`place_for_rollout`).

    Args:
      table: of stops.stop_table.
      slots: sequences drawn at a time, of all shards of rows together; 0: all of them.
    """
    width = prompts.tokens.shape[1]
    limits = np.full((len(prompts.ids), samples), max_tokens) if limits is None else limits
    ladder, level = sizes(width, width + max_tokens), 0
    state, work = begin(config, params, prompts, key, limits, slots=slots, columns=ladder[0],
                        sampled=max_tokens)
    scale, forever = np.float32(temperature or 1.0), np.int32(2**31 - 1)
    while True:
        # Not right below the smaller size: a resize costs about two steps, and the longest soon grows again.
        smaller = ladder[level - 1] if level else 0
        floor = max(0, smaller - (ladder[level] - smaller) // 4)
        state = decode(config, params, state, work, table, scale, np.int32(floor), forever,
                       greedy=temperature == 0, filter=filter)
        longest = int(state.longest)
        if not longest:
            return finish(state, prompts, samples)
        level += 1 if longest > ladder[level] else -1
        layers, state = list(state.kv), state.replace(kv=())
        for i, kv in enumerate(layers):  # one by one, so that the old and the new cache never exist whole together
            layers[i] = resize(kv, ladder[level])
        state = state.replace(kv=tuple(layers))


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
    max_tokens: int | Int[np.ndarray, "B G"],
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer=None,
    prompt_ids: Sequence[int] | None = None,
    slots: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Rollout:
    """Draws `samples` completions of at most `max_tokens` tokens for each prompt.

    Args:
      prompts: a list of B lists of token ids.
      key: of this rollout; with the prompt's id, the sample's and the token's index it decides a draw.
      max_tokens: of every completion, or an array with that of each.
      temperature: 0 is greedy; log-probabilities are then those at temperature 1.
      stop_ids: a row ends with the first of them, which is part of it. None given, no stop.
      stop_strings: a row ends with the token that completes one of them, however they are cut into tokens.
      tokenizer: for stop_strings; by default that of the folder which the model came from.
      prompt_ids: B integers that name the prompts in the keys, 0 to B - 1 by default.
      slots: sequences drawn at a time; 0: all. It changes speed and memory, not what is drawn.
      top_k, top_p, min_p: as in draws.Filter. The log-probabilities are those of the whole distribution.
    Raises:
      ValueError: an empty prompt, an id that is no row of the embedding, a value out of its range, nothing to draw, or a
        prompt that with its completion exceeds the model's positions.
    """
    padded = pad_prompts(prompts, prompt_ids)
    limits = np.broadcast_to(np.asarray(max_tokens), (len(prompts), max(samples, 0)))
    most = int(limits.max(initial=0))
    longest = int(padded.lengths.max())
    for fine, expected, found in (
        (limits.size and limits.min() > 0, "samples and max_tokens of 1 or more", (samples, max_tokens)),
        (temperature >= 0, "a temperature of 0 or more", temperature),
        (0 <= padded.tokens.min() and padded.tokens.max() < model_config.vocab_size,
         f"token ids from 0 to {model_config.vocab_size - 1}", (padded.tokens.min(), padded.tokens.max())),
        (longest + most <= model_config.max_positions,
         f"prompt + max_tokens of at most {model_config.max_positions} positions", f"{longest} + {most}"),
        (slots >= 0, "slots of 0 or more", slots),
        (not isinstance(stop_strings, str), "a list of stop_strings", repr(stop_strings)),
        (top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1, "top_k of 0 or more, top_p in (0, 1] and min_p in [0, 1]",
         (top_k, top_p, min_p)),
    ):
        if not fine:
            raise ValueError(f"expected {expected}; found {found}")
    if stop_strings and tokenizer is None:
        tokenizer = load_tokenizer(model_config.source)
    table = stop_table(model_config.vocab_size, [int(i) for i in stop_ids], stop_strings, tokenizer)
    if len(params["layers"]) < model_config.num_layers:
        params = place_for_rollout(model_config, params)
    return generate(model_config, params, padded, key, samples=samples, max_tokens=most, temperature=temperature,
                    table=table, slots=slots, limits=limits, filter=Filter(top_k, top_p, min_p))
