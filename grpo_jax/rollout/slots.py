"""The compiled part of a rollout: continuous batching over a fixed number of decode slots.

    init_decode    prefills each distinct prompt once and assigns the first sequences to the slots
    decode_tokens  samples one token per slot and step; a slot whose sequence ends takes the next one from the queue

Assigning a sequence to a slot copies the keys and values of its prompt into the slot's cache and steps back by one
token: the prompt's last token is decoded again, which yields the completion's first token like any other. Column c of a
slot's cache holds the token at position c, so prompts of different lengths need no padding.

On a mesh, each data shard has its own prompts, queue and slots, and its rows never leave it. All that the shards
exchange per token is the length of the longest sequence, which decides when the loop ends.

Randomness is counter-based: the key of a token is folded from (rollout key, prompt id, sample id, index in the
completion). A completion therefore does not depend on its slot, on the other sequences or on the number of hosts, and
it can be reproduced.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.attention import choose_kernel
from grpo_jax.model.blockwise import BLOCK_SIZE
from grpo_jax.model.cache import KV, copy_prompt
from grpo_jax.model.decoder import head_matmul, hidden_states, temperature_logits
from grpo_jax.model.mask import single_sequence
from grpo_jax.parallel.mesh import ROW_AXES, constrain, drop_indivisible_axes, mesh_platform, num_data_shards, path_name
from grpo_jax.rollout.draws import TokenFilter, choose_tokens
from grpo_jax.text.problem import Prompts
from grpo_jax.text.stops import STOPPED

# What a shard prefills at once: at most this many prompt tokens and bytes of attention scores, but at least one prompt.
PREFILL_TOKENS = 8192
PREFILL_SCORE_BYTES = 2**28


@flax.struct.dataclass
class RolloutQueue:
    """The sequences of a rollout, shard after shard. Constant throughout the rollout."""

    prompts: Prompts  # the distinct prompts of each shard
    prompt_kv: tuple[KV, ...]  # their keys and values: for each layer one KV [1, prompts, ...] with T columns
    prompt_index: Int[Array, " N"]  # index of the sequence's prompt among the prompts of its shard
    limits: Int[Array, " N"]  # maximum number of completion tokens; 0 marks padding at the end of a shard
    keys: Key[Array, " N"]  # the sequence's random key, to which the index of each token is folded in


@flax.struct.dataclass
class DecodeState:
    """The loop state of decoding: M slots, and the completions of the N sequences so far."""

    kv_cache: tuple[KV, ...]  # for each layer one KV [1, M, ...] with C columns
    sequence: Int[Array, " M"]  # the sequence in the slot, counted within the shard; -1 if the slot is idle
    last_token: Int[Array, " M"]  # the sequence's last token, which is not in the cache yet
    position: Int[Array, " M"]  # position of last_token
    num_sampled: Int[Array, " M"]  # tokens of the completion so far
    stop_state: Int[Array, " M"]  # state in the stop table
    num_started: Int[Array, " shards"]  # sequences that have been assigned to a slot
    longest: Int[Array, ""]  # cache columns that the longest sequence needs for its next token; 0 if all are done
    tokens: Int[Array, "N S"]
    logps: Float[Array, "N S"]
    lengths: Int[Array, " N"]
    stopped: Int[Array, " N"]  # 1 if a stop id or stop string ended the completion


def row_specs(tree, heads: str | None = None) -> list[P]:
    """Returns the partition specs of leaves that split the rows of a `DecodeState` or a `RolloutQueue` over the shards.

    The rows are the leading dimension of every leaf, except that `longest` is replicated and keys and values have a
    layer dimension in front.

    Args:
        tree: The tree. Its leaves are recognized by their paths.
        heads: The mesh axis that splits the heads of keys and values, if one does.
    """

    def leaf_spec(path):
        name = path_name(path)
        return P() if "longest" in name else P(None, ROW_AXES, heads) if "kv" in name else P(ROW_AXES)

    return [leaf_spec(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def decode_shardings(mesh: Mesh | AbstractMesh, tree) -> list[NamedSharding]:
    """Returns the shardings of the leaves of a `DecodeState` or a `RolloutQueue`, as `init_decode` returns them."""
    pairs = zip(jax.tree.leaves(tree), row_specs(tree, heads="tensor"), strict=True)
    return [NamedSharding(mesh, drop_indivisible_axes(spec, x.shape, mesh)) for x, spec in pairs]


def per_shard(function, *args):
    """Applies `function` to the rows of each shard separately, on the current mesh.

    The rows of the arguments are those of `row_specs`. The result has the structure of the first argument.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*args)
    leaves, tree = jax.tree.flatten(args)
    specs = tuple(row_specs(args))

    def apply_to_shard(*leaves):
        return tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))

    out_leaves, out_tree = jax.tree.flatten(args[0])
    sharded = jax.shard_map(
        apply_to_shard, in_specs=specs, out_specs=specs[: len(out_leaves)], axis_names=set(ROW_AXES), check_vma=False
    )
    return jax.tree.unflatten(out_tree, sharded(*leaves))


def num_score_columns(model_cfg: ModelConfig, width: int) -> int:
    """Returns how many columns of attention scores are held at once per query while prefilling T = `width` columns."""
    return width if choose_kernel(model_cfg, width, cached=False) == "plain" else BLOCK_SIZE


def prefill_batch_size(model_cfg: ModelConfig, width: int) -> int:
    """Returns how many prompts of T = `width` columns a shard prefills at once."""
    # Scores and their softmax, 4 bytes each.
    score_bytes = 8 * model_cfg.num_heads * width * num_score_columns(model_cfg, width)
    return max(1, min(PREFILL_TOKENS // width, PREFILL_SCORE_BYTES // score_bytes))


def prefill_prompts(
    model_cfg: ModelConfig, params, prompts: Prompts, batch_size: int, used: Int[Array, ""]
) -> tuple[KV, ...]:
    """Computes the keys and values of prompts: for each layer one KV [1, prompts, ...] with T columns.

    Args:
        model_cfg: The model.
        params: Parameters placed for the rollout.
        prompts: The prompts of each shard, as in `RolloutQueue`.
        batch_size: Number of prompts that a shard prefills at once.
        used: How many of its prompts a shard needs. Batches of other prompts are not computed.
    """
    shards, width = num_data_shards(), prompts.tokens.shape[1]
    count = len(prompts.tokens) // shards
    num_batches = -(-count // batch_size)

    def prefill(tokens):
        rows = tokens.shape[0]
        positions = jnp.broadcast_to(jnp.arange(width), (rows, width))
        segments = single_sequence(positions)
        return hidden_states(model_cfg, params, tokens, segments, layout="rollout", causal=True)[1]

    if num_batches == 1:
        return prefill(prompts.tokens)
    # Every batch takes prompts from all shards, so that no shard is idle.
    padding = (0, 0), (0, num_batches * batch_size - count), (0, 0)
    padded = constrain(jnp.pad(prompts.tokens.reshape(shards, count, width), padding), ROW_AXES)

    def prefill_batch(i, kv):
        tokens = jax.lax.dynamic_slice_in_dim(padded, i * batch_size, batch_size, axis=1)
        new = prefill(constrain(tokens.reshape(-1, width), ROW_AXES))

        def write(x, batch):
            batch = batch.reshape(1, shards, batch_size, *batch.shape[2:])
            return jax.lax.dynamic_update_slice_in_dim(x, batch, i * batch_size, axis=2)

        return jax.tree.map(write, kv, new)

    def empty(x):
        zeros = jnp.zeros((1, shards, num_batches * batch_size, *x.shape[2:]), x.dtype)
        return constrain(zeros, None, ROW_AXES, None, "tensor")

    shapes = jax.eval_shape(prefill, prompts.tokens)
    with jax.named_scope("prompt_batches"):
        kv = jax.lax.fori_loop(0, -(-used // batch_size), prefill_batch, jax.tree.map(empty, shapes))
    return jax.tree.map(lambda x: x[:, :, :count].reshape(1, shards * count, *x.shape[3:]), kv)


def copy_prompts(
    kv_cache: tuple[KV, ...], prompt_kv: tuple[KV, ...], refilled: Bool[Array, " M"], prompt: Int[Array, " M"]
) -> tuple[KV, ...]:
    """Returns a shard's cache with the keys and values of `prompt` in the first columns of the refilled slots.

    The cache is updated in place. A GPU copies the prompts of all refilled slots at once, because the host starts every
    kernel and every turn of a loop. Elsewhere a scatter would become a loop over all slots for each array, so one slot
    is copied at a time; there is rarely more than one.
    """
    at_once, num_slots = mesh_platform() == "gpu", len(refilled)
    targets = jnp.where(refilled, jnp.arange(num_slots), num_slots)  # writes past the last slot are dropped
    refilled_slots = jnp.nonzero(refilled, size=num_slots, fill_value=0)[0]

    def copy_all(cache, kv):
        return cache.at[:, targets, :, : kv.shape[3], : kv.shape[4]].set(kv[:, prompt], mode="drop")

    def copy_turn(i, kv_cache):
        if at_once:
            return jax.tree.map(copy_all, kv_cache, prompt_kv)
        slot = refilled_slots[i]
        pairs = zip(kv_cache, prompt_kv, strict=True)
        return tuple(copy_prompt(cache, prompts, slot, prompt[slot]) for cache, prompts in pairs)

    # A loop of at most one turn takes the place of a conditional, which would copy the cache.
    turns = jnp.any(refilled).astype(jnp.int32) if at_once else jnp.sum(refilled)
    with jax.named_scope("refill"):
        return jax.lax.fori_loop(0, turns, copy_turn, kv_cache)


def refill_slots(state: DecodeState, queue: RolloutQueue) -> DecodeState:
    """Assigns the next sequences of a shard's queue to its idle slots."""
    idle = state.sequence < 0
    candidate = state.num_started[0] + jnp.cumsum(idle) - 1
    refilled = idle & (candidate < jnp.sum(queue.limits > 0))
    sequence = jnp.where(refilled, candidate, state.sequence)
    prompt = queue.prompt_index[jnp.where(refilled, candidate, 0)]
    last_position = queue.prompts.lengths[prompt] - 1
    return state.replace(
        kv_cache=copy_prompts(state.kv_cache, queue.prompt_kv, refilled, prompt),
        sequence=sequence,
        last_token=jnp.where(refilled, queue.prompts.tokens[prompt, last_position], state.last_token),
        position=jnp.where(refilled, last_position, jnp.where(sequence < 0, 0, state.position)),
        num_sampled=jnp.where(refilled, 0, state.num_sampled),
        stop_state=jnp.where(refilled, 0, state.stop_state),
        num_started=state.num_started + jnp.sum(refilled),
    )


def append_tokens(
    state: DecodeState, queue: RolloutQueue, token: Int[Array, " M"], logp: Float[Array, " M"], stops: Int[Array, " M"]
) -> DecodeState:
    """Appends a shard's sampled tokens to their completions and frees the slots of completions that have ended.

    `stops` holds the states in the stop table after the sampled tokens.
    """
    active = state.sequence >= 0
    row = jnp.where(active, state.sequence, len(queue.limits))  # idle slots write past the end, which drops the write
    num_sampled = state.num_sampled + 1
    stopped = stops == STOPPED
    done = stopped | (num_sampled >= queue.limits[jnp.maximum(state.sequence, 0)])
    return state.replace(
        sequence=jnp.where(active & ~done, state.sequence, -1),
        last_token=token,
        position=state.position + 1,
        num_sampled=num_sampled,
        stop_state=jnp.maximum(stops, 0),
        tokens=state.tokens.at[row, state.num_sampled].set(token, mode="drop"),
        logps=state.logps.at[row, state.num_sampled].set(logp, mode="drop"),
        lengths=state.lengths.at[row].set(num_sampled, mode="drop"),
        stopped=state.stopped.at[row].set(stopped.astype(jnp.int32), mode="drop"),
    )


def update_longest(state: DecodeState) -> DecodeState:
    """Recomputes `longest` over the slots of all shards."""
    return state.replace(longest=jnp.max(jnp.where(state.sequence >= 0, state.position + 1, 0)))


@partial(jax.jit, static_argnames=("model_cfg", "slots", "columns", "max_tokens", "prefill"))
def init_decode(
    model_cfg: ModelConfig,
    params,
    prompts: Prompts,
    prompt_index,
    limits,
    ids: Int[Array, "N 2"],
    key,
    *,
    slots: int,
    columns: int,
    max_tokens: int,
    prefill: int,
) -> tuple[DecodeState, RolloutQueue]:
    """Prefills the prompts and assigns the first sequences to the slots.

    Args:
        model_cfg: The model.
        params: Parameters placed for the rollout.
        prompts: The distinct prompts of each shard, as in `RolloutQueue`.
        prompt_index: As in `RolloutQueue`.
        limits: As in `RolloutQueue`; at most `max_tokens`.
        ids: Prompt id and sample id of each sequence.
        key: Random key of the rollout.
        slots: Number of decode slots M over all shards.
        columns: Number of columns C of each slot's KV cache.
        max_tokens: Number of columns S of the completions.
        prefill: Most prompts that a shard prefills at once, if so many fit.
    """
    keys = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(ids)
    by_row = prompts, prompt_index, limits, keys
    prompts, prompt_index, limits, keys = jax.tree.map(lambda x: constrain(x, ROW_AXES), by_row)
    batch_size, used = min(prefill, prefill_batch_size(model_cfg, prompts.tokens.shape[1])), jnp.max(prompt_index) + 1
    prompt_kv = prefill_prompts(model_cfg, params, prompts, batch_size, used)
    queue = RolloutQueue(prompts, prompt_kv, prompt_index, limits, keys)

    def empty_cache(x, last_dims):
        zeros = jnp.zeros((1, slots, *x.shape[2:-2], *last_dims), x.dtype)
        return constrain(zeros, None, ROW_AXES, "tensor", None, None)

    def row_zeros(*shape, dtype=jnp.int32):
        return constrain(jnp.zeros(shape, dtype), ROW_AXES)

    state = DecodeState(
        kv_cache=tuple(
            KV(empty_cache(kv.k, (kv.k.shape[-2], columns)), empty_cache(kv.v, (columns, kv.v.shape[-1])))
            for kv in prompt_kv
        ),
        sequence=row_zeros(slots) - 1,
        last_token=row_zeros(slots),
        position=row_zeros(slots),
        num_sampled=row_zeros(slots),
        stop_state=row_zeros(slots),
        num_started=row_zeros(num_data_shards()),
        longest=jnp.int32(0),
        tokens=row_zeros(len(limits), max_tokens),
        logps=row_zeros(len(limits), max_tokens, dtype=jnp.float32),
        lengths=row_zeros(len(limits)),
        stopped=row_zeros(len(limits)),
    )
    started = update_longest(per_shard(refill_slots, state, queue)), queue
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return started
    leaves, structure = jax.tree.flatten(started)
    return jax.tree.unflatten(structure, jax.lax.with_sharding_constraint(leaves, decode_shardings(mesh, started)))


@partial(jax.jit, static_argnames=("model_cfg", "greedy", "filter"), donate_argnames=("state",))
def decode_tokens(
    model_cfg: ModelConfig,
    params,
    state: DecodeState,
    queue: RolloutQueue,
    stop_table,
    temperature,
    shrink_at,
    max_steps,
    *,
    greedy: bool,
    filter: TokenFilter,
) -> DecodeState:
    """Decodes until every sequence is done, the cache is full or too large, or `max_steps` steps have been taken.

    Args:
        model_cfg: The model.
        params: Parameters placed for the rollout.
        state: The state to continue from. Its buffers are donated.
        queue: The sequences of the rollout.
        stop_table: From `grpo_jax.text.stops.build_stop_table`.
        temperature: Sampling temperature; ignored if `greedy`.
        shrink_at: Return once this many cache columns suffice for every active sequence, so that the caller can
            shrink the cache; 0 never returns early.
        max_steps: Maximum number of tokens to sample per slot.
        greedy: Choose the most likely token.
        filter: Restricts sampling.
    """
    columns = state.kv_cache[0].k.shape[-1]

    def keep_decoding(carry):
        state, steps = carry
        return (state.longest > shrink_at) & (state.longest <= columns) & (steps < max_steps)

    def slot_keys(sequence, queue):
        return queue.keys[jnp.maximum(sequence, 0)]

    def decode_step(carry):
        state, steps = carry
        tokens, segments = state.last_token[:, None], single_sequence(state.position[:, None])
        hidden, kv_cache = hidden_states(model_cfg, params, tokens, segments, state.kv_cache, layout="rollout")
        product = head_matmul(model_cfg, params, hidden[:, 0])
        logits = temperature_logits(model_cfg, product, 1.0 if greedy else temperature)
        keys = jax.vmap(jax.random.fold_in)(per_shard(slot_keys, state.sequence, queue), state.num_sampled)
        token, logp = choose_tokens(keys, constrain(logits, ROW_AXES, "tensor"), greedy, filter)
        stops = stop_table[state.stop_state, token].astype(jnp.int32)
        state = per_shard(append_tokens, state.replace(kv_cache=kv_cache), queue, token, logp, stops)
        return update_longest(per_shard(refill_slots, state, queue)), steps + 1

    with jax.named_scope("tokens"):
        return jax.lax.while_loop(keep_decoding, decode_step, (state, jnp.int32(0)))[0]


@partial(jax.jit, static_argnames=("columns",))
def resize_cache(kv: KV, columns: int) -> KV:
    """Returns a layer's KV cache cut or zero-padded to `columns` columns; the first columns are kept."""

    def resize(x, axis):
        padding = [(0, 0, 0)] * x.ndim
        padding[axis] = (0, columns - x.shape[axis], 0)  # negative padding truncates
        return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)

    return KV(resize(kv.k, 4), resize(kv.v, 3))
