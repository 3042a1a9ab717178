"""Samples completions with continuous batching: each data shard decodes its share of the sequences in a few slots.

The cost of attention grows with the number of columns in the KV cache. The cache therefore starts small. The compiled
loop (`slots.decode_tokens`) returns when the longest sequence has filled the cache, or when a smaller cache suffices
again, and is called again with a resized cache. Each size in `cache_sizes` compiles once.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import merge_projections, param_shapes, unstack_layers
from grpo_jax.model.parameters import row_for, tree_shardings
from grpo_jax.parallel.mesh import mesh_platform, num_data_shards, path_name, shard_rows
from grpo_jax.rollout.draws import NO_FILTER, TokenFilter
from grpo_jax.rollout.slots import DecodeState, RolloutQueue, decode_tokens, init_decode, resize_cache
from grpo_jax.text.problem import Prompts
from grpo_jax.text.stops import build_stop_table
from grpo_jax.types import Rollout
from grpo_jax.weights.tokenizer import load_tokenizer

UNLIMITED_STEPS = np.int32(2**31 - 1)


class QueueRoom(NamedTuple):
    """The room of one data shard. Rollouts with the same room and slots run the same programs, whatever their size."""

    prompts: int  # distinct prompts
    sequences: int
    prefill: int  # most prompts to prefill at once


def needed_room(count: int, samples: int, shards: int) -> QueueRoom:
    """Returns the least room that a rollout of `count` prompts with `samples` completions each needs."""
    sequences = -(-count * samples // shards)
    first = np.arange(shards) * sequences
    first_prompt, last_prompt = (np.minimum(x // samples, count - 1) for x in (first, first + sequences - 1))
    prompts = int((last_prompt - first_prompt).max()) + 1
    return QueueRoom(prompts, sequences, prefill=prompts)


def finished_lengths(state: DecodeState) -> Int[Array, " N"]:
    """Returns the lengths of the completions in a decode state; 0 for those that are still in a slot."""
    shards, rows, slots = len(state.num_started), len(state.lengths), len(state.sequence)
    first = np.repeat(np.arange(shards) * (rows // shards), slots // shards)  # first sequence of a slot's shard
    unfinished = jnp.where(state.sequence >= 0, first + state.sequence, rows)
    return state.lengths.at[unfinished].set(0, mode="drop")


def to_rollout(state: DecodeState, prompts: Prompts, samples: int) -> Rollout:
    """Returns the completions of a decode state as a `Rollout` of B groups of G."""
    count, shards = len(prompts.ids), len(state.num_started)
    sequences = needed_room(count, samples, shards).sequences

    def group(x):
        rows = x.reshape(shards, -1, *x.shape[1:])[:, :sequences].reshape(-1, *x.shape[1:])
        return rows[: count * samples].reshape(count, samples, *x.shape[1:])

    tokens, logps, lengths, stopped = (group(x) for x in (state.tokens, state.logps, state.lengths, state.stopped))
    return Rollout(tokens, logps, lengths, truncated=stopped == 0, prompt_ids=jnp.asarray(prompts.ids))


def cache_sizes(prompt_columns: int, max_columns: int) -> list[int]:
    """Returns the column counts that a KV cache may have: 128, 192, 256, 384, 512, ... and finally `max_columns`.

    From 1,024 on they double, so that long rollouts compile few programs. On TPUs, the last one is a multiple of 128:
    with other sizes, XLA would hold a second copy of the cache in the layout that the kernels which write it need.

    Args:
        prompt_columns: Columns of a padded prompt, T. Every size is larger.
        max_columns: Columns that the longest possible sequence needs.
    """
    last = -(-max_columns // 128) * 128 if mesh_platform() == "tpu" else max_columns
    sizes = sorted({192, 384, 768} | {128 << shift for shift in range(max_columns.bit_length())})
    return [size for size in sizes if size > prompt_columns and size * 1.2 < max_columns] + [last]


def split_over_shards(prompts: Prompts, limits: Int[np.ndarray, "B G"], shards: int, room: QueueRoom):
    """Divides the sequences of a rollout among data shards, in order.

    Sequence n is sample n % G of prompt n // G. Each shard has its own copy of the prompts that its sequences need, so
    the prompt of a group that spans two shards is in both. The rest of a shard's room is padding.

    Returns:
        NumPy arrays, shard after shard: the prompts; and per sequence the index of its prompt within the shard, its
        limit (0 for padding) and its ids (prompt id, sample id).

    Raises:
        ValueError: A limit is less than 1, or there is not enough room.
    """
    if limits.min() < 1:
        raise ValueError(f"Every completion must be allowed at least 1 token; found a limit of {limits.min()}.")
    count, samples = limits.shape
    total = count * samples
    needed = needed_room(count, samples, shards)
    per_shard = needed.sequences
    if room.prompts < needed.prompts or room.sequences < per_shard:
        raise ValueError(f"Each shard needs room for at least {needed[:2]} prompts and sequences; found {room[:2]}.")
    index = np.arange(room.sequences)
    # Padding repeats the last sequence of its shard.
    sequence = np.arange(shards)[:, None] * per_shard + np.minimum(index, per_shard - 1)
    prompt = np.minimum(sequence // samples, count - 1)
    prompt_index = prompt - prompt[:, :1]
    shard_prompts = np.minimum(prompt[:, :1] + np.arange(room.prompts), count - 1).reshape(-1)
    is_real = (sequence < total) & (index < per_shard)
    shard_limits = np.where(is_real, limits.reshape(-1)[np.minimum(sequence, total - 1)], 0)
    ids = np.stack([np.asarray(prompts.ids)[prompt], sequence % samples], axis=-1)
    prompts = jax.tree.map(lambda x: np.asarray(x)[shard_prompts], prompts)
    rows = prompt_index.reshape(-1), shard_limits.reshape(-1), ids.reshape(-1, 2)
    return prompts, *(x.astype(np.int32) for x in rows)


def place_queue(prompts: Prompts, limits: Int[np.ndarray, "B G"], slots: int, room: QueueRoom) -> tuple[tuple, int]:
    """Divides the sequences among the data shards of the current mesh; see `start_rollout`.

    Returns:
        (rows, slots): The results of `split_over_shards` on the devices, and the number of decode slots of all shards.
    """
    shards = num_data_shards()
    rows = split_over_shards(prompts, limits, shards, room)
    if not jax.sharding.get_abstract_mesh().empty:
        rows = shard_rows(jax.sharding.get_mesh(), rows)
    return rows, shards * min(-(-slots // shards) or room.sequences, room.sequences)


def start_rollout(
    model_cfg: ModelConfig,
    params,
    prompts: Prompts,
    key,
    limits: Int[np.ndarray, "B G"],
    *,
    slots: int,
    columns: int,
    max_tokens: int,
    room: QueueRoom | None = None,
) -> tuple[DecodeState, RolloutQueue]:
    """Divides the sequences among the data shards of the current mesh, prefills and fills the slots.

    The arguments are those of `init_decode`, except that `prompts` are the B prompts of the rollout, `limits` gives the
    maximum number of tokens of each completion, 0 `slots` means one per sequence, and `room` is by default as much as
    the rollout needs.
    """
    room = room or needed_room(*limits.shape, num_data_shards())
    rows, slots = place_queue(prompts, limits, slots, room)
    sizes = dict(slots=slots, columns=columns, max_tokens=max_tokens, prefill=room.prefill)
    return init_decode(model_cfg, params, *rows, key, **sizes)


def generate_rollout(
    model_cfg: ModelConfig,
    params,
    prompts: Prompts,
    key,
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    stop_table: Int[np.ndarray, "A V"],
    slots: int = 0,
    room: QueueRoom | None = None,
    limits: Int[np.ndarray, "B G"] | None = None,
    filter: TokenFilter = NO_FILTER,
    on_progress: Callable[[DecodeState], int] | None = None,
) -> Rollout:
    """Samples completions like `sample`, for prompts that are already encoded and padded.

    Args:
        model_cfg: The model.
        params: Parameters placed for the rollout (`place_for_rollout`).
        prompts: B encoded prompts (NumPy).
        key: Random key of the rollout.
        samples: Number of completions per prompt, G.
        max_tokens: Maximum number of tokens per completion, S.
        temperature: Sampling temperature; 0 decodes greedily.
        stop_table: From `grpo_jax.text.stops.build_stop_table`.
        slots: Number of sequences to decode at once, over all data shards; 0 decodes all of them at once.
        room: Room for prompts and sequences; by default as much as the rollout needs.
        limits: Maximum number of tokens of each completion, at most `max_tokens`, which is the default.
        filter: Restricts sampling; for evaluation.
        on_progress: Called with the state before the first decode step and then whenever the compiled loop returns.
            Returns the maximum number of decode steps until the next call, which must be the same on all hosts. 0 ends
            the rollout, and completions that are still being sampled get length 0.
    """
    width = prompts.tokens.shape[1]
    limits = np.full((len(prompts.ids), samples), max_tokens) if limits is None else limits
    sizes, level = cache_sizes(width, width + max_tokens), 0
    scale, greedy = np.float32(temperature or 1.0), temperature == 0  # scale is unused if greedy
    state, queue = start_rollout(
        model_cfg, params, prompts, key, limits, slots=slots, columns=sizes[0], max_tokens=max_tokens, room=room
    )
    while True:
        # Shrink only when the longest sequence is well below the smaller size: a resize costs about as much as two
        # decode steps, and the longest sequence soon grows again.
        smaller = sizes[level - 1] if level else 0
        shrink_at = np.int32(max(0, smaller - (sizes[level] - smaller) // 4))
        max_steps = np.int32(on_progress(state)) if on_progress else UNLIMITED_STEPS
        if not max_steps:
            return to_rollout(state.replace(lengths=finished_lengths(state)), prompts, samples)
        state = decode_tokens(
            model_cfg, params, state, queue, stop_table, scale, shrink_at, max_steps, greedy=greedy, filter=filter
        )
        longest = int(state.longest)
        if not longest:
            return to_rollout(state, prompts, samples)
        if shrink_at < longest <= sizes[level]:
            continue
        level += 1 if longest > sizes[level] else -1
        # Layer by layer, so that the old and the new cache never exist in full at the same time.
        layers, state = list(state.kv_cache), state.replace(kv_cache=())
        for i in range(len(layers)):
            layers[i] = resize_cache(layers[i], sizes[level])
        state = state.replace(kv_cache=tuple(layers))


@lru_cache
def rollout_placement(model_cfg: ModelConfig, mesh: Mesh | AbstractMesh | None):
    """Returns the jitted function behind `place_for_rollout`, cached per model and mesh."""
    tensor = 1 if mesh is None else mesh.shape["tensor"]

    def place(params):
        def cast(path, leaf):
            return leaf if row_for(path_name(path)).keep_dtype else leaf.astype(model_cfg.compute_dtype)

        params = jax.tree_util.tree_map_with_path(cast, params)
        if mesh is not None:
            # On this mesh, tensor and expert first take the place of fsdp, so that no weight is gathered whole.
            params = jax.lax.with_sharding_constraint(params, tree_shardings(mesh, params))
        params = unstack_layers(params)
        return params | {"layers": tuple(merge_projections(layer, tensor) for layer in params["layers"])}

    if mesh is None:
        return jax.jit(place)
    shapes = jax.eval_shape(place, param_shapes(model_cfg))
    return jax.jit(place, out_shardings=tree_shardings(mesh, shapes, layout="rollout"))


def place_for_rollout(model_cfg: ModelConfig, params, mesh: Mesh | None = None):
    """Copies stacked parameters into the form that decoding needs.

    The copy has separate layers, merged projections, the compute dtype, and no dimension sharded over fsdp, so that no
    weight is gathered while decoding. Make one copy per rollout and free it afterwards.
    """
    return rollout_placement(model_cfg, mesh)(params)


def pad_prompts(prompts: Sequence[Sequence[int]], prompt_ids: Sequence[int] | None = None) -> Prompts:
    """Pads lists of token ids to `Prompts`. T is rounded up to a multiple of 32, so that few shapes are compiled.

    Raises:
        ValueError: A prompt is empty, there are none, or `prompt_ids` are not distinct 31-bit integers.
    """
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or not lengths.all():
        raise ValueError(f"Pass at least one prompt, each of at least one token; found lengths {lengths.tolist()}.")
    ids = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids)
    if ids.shape != lengths.shape or ids.min() < 0 or ids.max() >= 2**31 or len(set(ids.tolist())) < len(ids):
        raise ValueError(f"prompt_ids must be {len(lengths)} different integers in [0, 2**31); found {ids.tolist()}.")
    tokens = np.zeros((len(prompts), -(-int(lengths.max()) // 32) * 32), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return Prompts(tokens=tokens, lengths=lengths, ids=ids.astype(np.int32))


def check_inputs(model_cfg: ModelConfig, prompts: Prompts, limits: Int[np.ndarray, "B G"], filter: TokenFilter) -> None:
    """Raises a ValueError if the model cannot take the prompts, or if the filter's parameters are out of range."""
    tokens, longest = prompts.tokens, int((prompts.lengths[:, None] + limits).max())
    if tokens.min() < 0 or tokens.max() >= model_cfg.vocab_size:
        raise ValueError(f"Token ids must be in [0, {model_cfg.vocab_size}); found {tokens.min()} to {tokens.max()}.")
    if longest > model_cfg.max_positions:
        raise ValueError(
            f"A prompt and its completion may have at most {model_cfg.max_positions} positions together; found "
            f"{longest}. Shorten the prompts or lower max_tokens."
        )
    if filter.top_k < 0 or not 0 < filter.top_p <= 1 or not 0 <= filter.min_p <= 1:
        raise ValueError(f"top_k must be 0 or more, top_p in (0, 1] and min_p in [0, 1]; found {tuple(filter)}.")


def sample(
    model_cfg: ModelConfig,
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
    """Samples `samples` completions of at most `max_tokens` tokens for each prompt.

    A completion depends only on the parameters, its prompt and the key, which is folded with its prompt id, its sample
    id and the index of each token. It does not depend on the other prompts or on `slots`.

    Args:
        model_cfg: The model, as returned by `load`.
        params: Its parameters, as returned by `load` or by `place_for_rollout`.
        prompts: B lists of token ids.
        key: Random key of the rollout.
        samples: Number of completions per prompt, G.
        max_tokens: Maximum number of tokens: an integer, or an array [B, G] with one number per completion.
        temperature: Sampling temperature. 0 decodes greedily and returns log-probabilities at temperature 1.
        stop_ids: A completion ends with the first of these tokens, which it includes. By default none.
        stop_strings: A completion ends with the token that completes one of these strings, however the strings are
            split into tokens.
        tokenizer: Tokenizer for `stop_strings`. Defaults to that of the folder the model was loaded from.
        prompt_ids: B distinct integers to fold into the key. Defaults to 0, ..., B - 1.
        slots: Number of sequences to decode at once; 0 decodes all of them at once. Affects speed and memory only.
        top_k: Sample from the `top_k` most likely tokens; 0 keeps all.
        top_p: Sample from the smallest set of tokens whose probability reaches `top_p`.
        min_p: Sample from the tokens that are at least `min_p` times as likely as the most likely one.

    Returns:
        A `Rollout`. Its log-probabilities are those of the unfiltered distribution at the sampling temperature.

    Raises:
        ValueError: A prompt is empty or contains an id outside the vocabulary, a prompt and its completion would exceed
            the model's positions, or another argument is out of range.
    """
    padded = pad_prompts(prompts, prompt_ids)
    limits = np.broadcast_to(np.asarray(max_tokens), (len(prompts), max(samples, 0)))
    if not limits.size or limits.min() < 1 or limits.dtype.kind not in "iu":
        raise ValueError(f"samples and max_tokens must be integers of at least 1; found {samples} and {max_tokens}.")
    if not temperature >= 0 or slots < 0:
        raise ValueError(f"temperature and slots must be 0 or more; found {temperature} and {slots}.")
    if isinstance(stop_strings, str):
        raise ValueError(f"stop_strings must be a list of strings; found the string {stop_strings!r}.")
    filter = TokenFilter(top_k, top_p, min_p)
    check_inputs(model_cfg, padded, limits, filter)
    if stop_strings and tokenizer is None:
        tokenizer = load_tokenizer(model_cfg.source)
    stop_table = build_stop_table(model_cfg.vocab_size, [int(i) for i in stop_ids], stop_strings, tokenizer)
    if len(params["layers"]) < model_cfg.num_layers:
        params = place_for_rollout(model_cfg, params)
    sampling = dict(temperature=temperature, stop_table=stop_table, filter=filter)
    sizes = dict(samples=samples, max_tokens=int(limits.max()), limits=limits, slots=slots)
    return generate_rollout(model_cfg, params, padded, key, **sampling, **sizes)
