"""Sampling: a rollout's sequences are split over the shards of rows and drawn through slots (slots.py).

Attention costs as many columns as the cache has. It starts small and the compiled loop is left when the longest sequence
has filled it, or when that has ended and a smaller cache would do; there is one compiled program a size (`sizes`).
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes, unstack_layers
from grpo_jax.parallel.mesh import num_row_shards, path_name, tree_shardings
from grpo_jax.rollout.draws import TokenFilter
from grpo_jax.rollout.slots import DecodeState, RolloutQueue, decode_tokens, init_decode, resize_cache
from grpo_jax.text.problem import Prompts
from grpo_jax.text.stops import build_stop_table
from grpo_jax.types import Rollout
from grpo_jax.weights.tokenizer import load_tokenizer


def to_rollout(slots: DecodeState, prompts: Prompts, samples: int) -> Rollout:
    """What was drawn, as B groups of G."""
    count = len(prompts.ids)
    group = lambda x: x[: count * samples].reshape(count, samples, *x.shape[1:])
    return Rollout(
        tokens=group(slots.tokens),
        logps=group(slots.logps),
        lengths=group(slots.lengths),
        truncated=group(slots.stopped) == 0,
        prompt_ids=jnp.asarray(prompts.ids),
    )


def cache_sizes(width: int, most: int) -> list[int]:
    """The numbers of columns that a cache may have: 128, 192, 256, 384, 512, ..., and `most` in the end.

    Args:
      width: T, the columns of a prompt, which every size exceeds.
      most: what the longest sequence can need.
    """
    steps = sorted({step << shift for step in (128, 192) for shift in range(most.bit_length())})
    return [step for step in steps if step > width and step * 1.2 < most] + [most]


def split_over_shards(prompts: Prompts, limits: Int[np.ndarray, "B G"], shards: int):
    """The sequences split over shards: (prompts of the shards, and by sequence prompt, limit and ids), numpy.

    Sequence n is sample n % G of prompt n // G; shard w draws the w-th part of them. Each shard has the prompts of its own
    sequences, so a group that is cut has its prompt in several.

    Raises:
      ValueError: a sequence of no tokens.
    """
    if limits.min() < 1:
        raise ValueError(f"expected limits of 1 or more; found {limits.min()}")
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


def start_rollout(
    model_cfg: ModelConfig,
    params,
    prompts: Prompts,
    key,
    limits: Int[np.ndarray, "B G"],
    *,
    slots: int,
    columns: int,
    sampled: int,
) -> tuple[DecodeState, RolloutQueue]:
    """`start` for whole prompts (numpy) and the number of tokens, at most S, that each completion may have."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else num_row_shards(mesh)
    of_shards, prompt, limit, ids = split_over_shards(prompts, limits, shards)
    slots = min(-(-slots // shards) * shards or len(limit), len(limit))
    return init_decode(
        model_cfg, params, of_shards, prompt, limit, ids, key, slots=slots, columns=columns, sampled=sampled
    )


def generate_rollout(
    model_cfg: ModelConfig,
    params,
    prompts: Prompts,
    key,
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    table: Int[np.ndarray, "A V"],
    slots: int = 0,
    limits: Int[np.ndarray, "B G"] | None = None,
    filter: TokenFilter = TokenFilter(),
) -> Rollout:
    """`sample` for prompts that are encoded (numpy) and parameters that are placed (`place_for_rollout`).

    Args:
      table: of stops.stop_table.
      slots: sequences drawn at a time, of all shards of rows together; 0: all of them.
    """
    width = prompts.tokens.shape[1]
    limits = np.full((len(prompts.ids), samples), max_tokens) if limits is None else limits
    ladder, level = cache_sizes(width, width + max_tokens), 0
    state, work = start_rollout(
        model_cfg, params, prompts, key, limits, slots=slots, columns=ladder[0], sampled=max_tokens
    )
    scale, forever = np.float32(temperature or 1.0), np.int32(2**31 - 1)
    while True:
        # Not right below the smaller size: a resize costs about two steps, and the longest soon grows again.
        smaller = ladder[level - 1] if level else 0
        floor = max(0, smaller - (ladder[level] - smaller) // 4)
        state = decode_tokens(
            model_cfg,
            params,
            state,
            work,
            table,
            scale,
            np.int32(floor),
            forever,
            greedy=temperature == 0,
            filter=filter,
        )
        longest = int(state.longest)
        if not longest:
            return to_rollout(state, prompts, samples)
        level += 1 if longest > ladder[level] else -1
        layers, state = list(state.kv), state.replace(kv=())
        for i in range(len(layers)):  # one by one, so that the old and the new cache never exist whole together
            layers[i] = resize_cache(layers[i], ladder[level])
        state = state.replace(kv=tuple(layers))


@lru_cache
def rollout_placement(model_cfg: ModelConfig, mesh: Mesh | None):
    """The compiled copy of `place_for_rollout`, one a model and mesh."""

    def place(params):
        def cast(path, leaf):  # not what is computed in float32: norms and routers
            return leaf if re.search("scale$|router/", path_name(path)) else leaf.astype(model_cfg.compute_dtype)

        return jax.tree_util.tree_map_with_path(cast, unstack_layers(params))

    if mesh is None:
        return jax.jit(place)
    places = tree_shardings(mesh, jax.eval_shape(place, param_shapes(model_cfg)), layout="rollout")
    return jax.jit(place, out_shardings=places)


def place_for_rollout(model_cfg: ModelConfig, params, mesh: Mesh | None = None):
    """A copy of stacked parameters as decoding wants it: layers apart, compute dtype, no fsdp axis to gather over.

    Made once a rollout; free it afterwards.
    """
    return rollout_placement(model_cfg, mesh)(params)


def pad_prompts(prompts: Sequence[Sequence[int]], prompt_ids: Sequence[int] | None = None) -> Prompts:
    """Lists of token ids as Prompts, T rounded up to a multiple of 32 so that few shapes are compiled."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or not lengths.all():
        raise ValueError(f"expected prompts of one token or more; found lengths {lengths.tolist()}")
    ids = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids)
    if ids.shape != lengths.shape or ids.min() < 0 or ids.max() >= 2**31 or len(set(ids.tolist())) < len(ids):
        raise ValueError(f"expected {len(lengths)} different prompt ids from 0 to 2**31 - 1; found {ids.tolist()}")
    tokens = np.zeros((len(prompts), -(-int(lengths.max()) // 32) * 32), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return Prompts(tokens=tokens, lengths=lengths, ids=ids.astype(np.int32))


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
    longest = int((padded.lengths[:, None] + limits).max(initial=0))
    for fine, expected, found in (
        (
            limits.size and limits.min() > 0 and limits.dtype.kind in "iu",
            "samples and max_tokens of 1 or more",
            (samples, max_tokens),
        ),
        (temperature >= 0, "a temperature of 0 or more", temperature),
        (
            0 <= padded.tokens.min() and padded.tokens.max() < model_cfg.vocab_size,
            f"token ids from 0 to {model_cfg.vocab_size - 1}",
            (padded.tokens.min(), padded.tokens.max()),
        ),
        (
            longest <= model_cfg.max_positions,
            f"prompt + max_tokens of at most {model_cfg.max_positions} positions",
            longest,
        ),
        (slots >= 0, "slots of 0 or more", slots),
        (not isinstance(stop_strings, str), "a list of stop_strings", repr(stop_strings)),
        (
            top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1,
            "top_k of 0 or more, top_p in (0, 1] and min_p in [0, 1]",
            (top_k, top_p, min_p),
        ),
    ):
        if not fine:
            raise ValueError(f"expected {expected}; found {found}")
    if stop_strings and tokenizer is None:
        tokenizer = load_tokenizer(model_cfg.source)
    table = build_stop_table(model_cfg.vocab_size, [int(i) for i in stop_ids], stop_strings, tokenizer)
    if len(params["layers"]) < model_cfg.num_layers:
        params = place_for_rollout(model_cfg, params)
    return generate_rollout(
        model_cfg,
        params,
        padded,
        key,
        samples=samples,
        max_tokens=most,
        temperature=temperature,
        table=table,
        slots=slots,
        limits=limits,
        filter=TokenFilter(top_k, top_p, min_p),
    )
