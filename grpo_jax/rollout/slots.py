"""The compiled part of sampling: sequences run through a fixed number of slots.

    start   prefills each distinct prompt once; the slots take the first sequences
    decode  draws a token for every slot, again and again; a slot whose sequence ends takes the next one of the queue

Taking a sequence copies its prompt's keys and values into the slot and steps back by one token: the prompt's last token
is decoded again, which gives the first token of the completion like any other. Column c of a slot's cache holds the token
at position c, so prompts of different lengths need no padding.

On a mesh each shard of rows has its own prompts, queue and slots. Its rows never leave it: all that shards exchange for a
token is how long the longest sequence is, which says when to stop.

Randomness is counter-based: the key of a token is folded from (key, prompt id, sample id, index in the completion). A
completion therefore does not depend on its slot, on the others or on the number of hosts, and can be drawn again.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.attention import KV, choose_kernel
from grpo_jax.model.blockwise import BLOCK_SIZE
from grpo_jax.model.decoder import hidden_states, sampling_logits
from grpo_jax.model.mask import single_sequence
from grpo_jax.parallel.mesh import ROW_AXES, constrain, num_row_shards, path_name
from grpo_jax.rollout.draws import TokenFilter, choose_tokens
from grpo_jax.text.problem import Prompts
from grpo_jax.text.stops import STOPPED

PREFILL_TOKENS = 8192  # that a shard prefills at a time, and the bytes of their attention scores; at least one prompt
PREFILL_SCORE_BYTES = 2**28


@flax.struct.dataclass
class RolloutQueue:
    """What a rollout draws, of all shards of rows one after another; constant while it lasts."""

    prompts: Prompts  # those that the shard's sequences have
    kv: tuple[KV, ...]  # their keys and values, one KV [1, prompts, ...] of T columns a layer
    prompt: Int[Array, " N"]  # of each sequence: which of the shard's prompts
    limit: Int[Array, " N"]  # tokens to draw at most; 0 fills the last shards up and is no sequence
    keys: Key[Array, " N"]


@flax.struct.dataclass
class DecodeState:
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


def per_shard(function, *args):
    """function(*args) of each shard's own rows, on the mesh in force. It returns what its first argument is.

    Every leaf but `longest` has rows, which are split; a cache has layers in front of them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*args)
    leaves, tree = jax.tree_util.tree_flatten_with_path(args)
    names = [path_name(path) for path, _ in leaves]
    specs = tuple(
        P() if name.endswith("longest") else P(None, ROW_AXES) if "/kv/" in name else P(ROW_AXES) for name in names
    )

    def run(*leaves):
        return tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))

    out, out_tree = jax.tree.flatten(args[0])
    made = jax.shard_map(run, in_specs=specs, out_specs=specs[: len(out)], axis_names=set(ROW_AXES), check_vma=False)(
        *(leaf for _, leaf in leaves)
    )
    return jax.tree.unflatten(out_tree, made)


def score_columns(model_cfg: ModelConfig, width: int) -> int:
    """How many columns of scores a row of a prompt of T columns holds at most."""
    return width if choose_kernel(model_cfg, width, cached=False) == "plain" else BLOCK_SIZE


def prefill_batch_size(model_cfg: ModelConfig, width: int) -> int:
    """How many prompts of T columns a shard prefills at a time. Scores and their softmax are float32."""
    scores = 8 * model_cfg.num_heads * width * score_columns(model_cfg, width)
    return max(1, min(PREFILL_TOKENS // width, PREFILL_SCORE_BYTES // scores))


def prefill_prompts(model_cfg: ModelConfig, params, prompts: Prompts) -> tuple[KV, ...]:
    """The keys and values of prompts, T columns."""
    count, width = prompts.tokens.shape

    def run(tokens):
        rows = tokens.shape[0]
        positions = jnp.broadcast_to(jnp.arange(width), (rows, width))
        return hidden_states(model_cfg, params, tokens, single_sequence(positions), layout="rollout")[1]

    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else num_row_shards(mesh)
    at_once = prefill_batch_size(model_cfg, width) * shards
    if count <= at_once:
        return run(prompts.tokens)
    pieces = -(-count // at_once)
    padded = jnp.pad(prompts.tokens, ((0, pieces * at_once - count), (0, 0)))
    # Every piece takes prompts from all shards, so that all of them work.
    split = constrain(jnp.swapaxes(padded.reshape(-1, pieces, width), 0, 1), None, ROW_AXES, None)
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(1, pieces * at_once, *x.shape[3:])[:, :count]
    return jax.tree.map(join, jax.lax.map(run, split))


def refill_slots(slots: DecodeState, work: RolloutQueue) -> DecodeState:
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


def append_tokens(
    slots: DecodeState, work: RolloutQueue, token: Int[Array, " M"], logp: Float[Array, " M"], state: Int[Array, " M"]
) -> DecodeState:
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


def update_longest(slots: DecodeState) -> DecodeState:
    """Sets `longest`, of all shards."""
    return slots.replace(longest=jnp.max(jnp.where(slots.sequence >= 0, slots.position + 1, 0)))


@partial(jax.jit, static_argnames=("model_cfg", "slots", "columns", "sampled"))
def init_decode(
    model_cfg: ModelConfig,
    params,
    prompts: Prompts,
    prompt,
    limit,
    ids: Int[Array, "N 2"],
    key,
    *,
    slots: int,
    columns: int,
    sampled: int,
) -> tuple[DecodeState, RolloutQueue]:
    """Prefills the prompts and fills `slots` slots with caches of `columns` columns.

    Args:
      prompts, prompt, limit: as in Work.
      ids: prompt id and sample id of each sequence.
    """
    keys = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(ids)
    prompts, prompt, limit, keys = jax.tree.map(lambda x: constrain(x, ROW_AXES), (prompts, prompt, limit, keys))
    work = RolloutQueue(
        prompts=prompts, kv=prefill_prompts(model_cfg, params, prompts), prompt=prompt, limit=limit, keys=keys
    )
    empty = lambda x, c: constrain(
        jnp.zeros((1, slots, *x.shape[2:-2], *c), x.dtype), None, ROW_AXES, "tensor", None, None
    )
    cache = [KV(empty(kv.k, (kv.k.shape[-2], columns)), empty(kv.v, (columns, kv.v.shape[-1]))) for kv in work.kv]
    mesh = jax.sharding.get_abstract_mesh()
    zeros = lambda *shape, dtype=jnp.int32: constrain(jnp.zeros(shape, dtype), ROW_AXES)
    state = DecodeState(
        kv=tuple(cache),
        sequence=zeros(slots) - 1,
        last=zeros(slots),
        position=zeros(slots),
        index=zeros(slots),
        stop_state=zeros(slots),
        taken=zeros(1 if mesh.empty else num_row_shards(mesh)),
        longest=jnp.int32(0),
        tokens=zeros(len(limit), sampled),
        logps=zeros(len(limit), sampled, dtype=jnp.float32),
        lengths=zeros(len(limit)),
        stopped=zeros(len(limit)),
    )
    return update_longest(per_shard(refill_slots, state, work)), work


@partial(jax.jit, static_argnames=("model_cfg", "greedy", "filter"), donate_argnames=("slots",))
def decode_tokens(
    model_cfg: ModelConfig,
    params,
    slots: DecodeState,
    work: RolloutQueue,
    table,
    temperature,
    floor,
    count,
    *,
    greedy: bool,
    filter: TokenFilter,
) -> DecodeState:
    """Draws up to `count` tokens a slot; ends early when all is done, the cache is full, or `floor` columns would do."""
    columns = slots.kv[0].k.shape[-1]

    def going(carry):
        slots, steps = carry
        return (slots.longest > floor) & (slots.longest <= columns) & (steps < count)

    def own_keys(sequence, work):
        return work.keys[jnp.maximum(sequence, 0)]

    def step(carry):
        slots, steps = carry
        position = slots.position[:, None]
        hidden, kv = hidden_states(
            model_cfg, params, slots.last[:, None], single_sequence(position), slots.kv, layout="rollout"
        )
        logits = sampling_logits(model_cfg, params, hidden[:, 0], 1.0 if greedy else temperature)
        keys = jax.vmap(jax.random.fold_in)(per_shard(own_keys, slots.sequence, work), slots.index)
        token, logp = choose_tokens(keys, constrain(logits, ROW_AXES, None), greedy, filter)
        state = table[slots.stop_state, token].astype(jnp.int32)
        slots = per_shard(append_tokens, slots.replace(kv=kv), work, token, logp, state)
        return update_longest(per_shard(refill_slots, slots, work)), steps + 1

    return jax.lax.while_loop(going, step, (slots, jnp.int32(0)))[0]


@partial(jax.jit, static_argnames=("columns",))
def resize_cache(kv: KV, columns: int) -> KV:
    """A layer's cache with another number of columns; the first are kept."""

    def fit(x, axis):
        if columns <= x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, columns, axis=axis)
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, columns - x.shape[axis])
        return jnp.pad(x, pad)

    return KV(fit(kv.k, 4), fit(kv.v, 3))
