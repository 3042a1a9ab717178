"""The programs of a training run, lowered with the very functions and argument shapes that training passes.

placement   copies the policy into the form that a rollout needs
prefill     computes the keys and values of the prompts and fills the slots
decode      samples tokens until the cache is full; one program for each size of the cache
scoring     computes log-probs under the reference
update      computes gradients and applies them
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config.schema import Config
from grpo_jax.learn.optimizer import make_optimizer, train_state_shapes, train_state_shardings
from grpo_jax.learn.update import make_update, score_completions
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import num_data_shards, row_shardings
from grpo_jax.rollout.draws import NO_FILTER
from grpo_jax.rollout.memory import training_room
from grpo_jax.rollout.sampler import UNLIMITED_STEPS, cache_sizes, rollout_placement, split_over_shards
from grpo_jax.rollout.slots import decode_shardings, decode_tokens, init_decode
from grpo_jax.run.stages import pack_rows
from grpo_jax.text.problem import Prompts
from grpo_jax.text.stops import build_byte_table
from grpo_jax.types import Experience, PackedBatch


class RunShapes(NamedTuple):
    """What determines the programs of a run."""

    cfg: Config  # checked, with rollout.max_prompt_tokens set
    model_cfg: ModelConfig
    mesh: Mesh  # of the updates
    rollout_mesh: Mesh  # of the rollouts: the same devices
    slots: int  # decode slots over all devices


def abstract(shapes, shardings):
    """Returns a tree of `jax.ShapeDtypeStruct` with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def abstract_rows(mesh: Mesh, tree):
    """Returns what `shard_rows` would return for host arrays, as `jax.ShapeDtypeStruct`s."""
    tree = jax.tree.map(np.asarray, tree)
    return abstract(tree, row_shardings(mesh, tree))


def shard_bytes(tree) -> list[int]:
    """Returns the bytes that one device holds of each array of a tree."""
    return [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)]


def abstract_params(run: RunShapes, dtype: str):
    """Returns the parameters as training holds them."""
    shapes = param_shapes(run.model_cfg, dtype)
    return abstract(shapes, tree_shardings(run.mesh, shapes))


def abstract_placed(run: RunShapes):
    """Returns the parameters as a rollout holds them."""
    placement = rollout_placement(run.model_cfg, run.rollout_mesh)
    shapes = jax.eval_shape(placement, param_shapes(run.model_cfg, run.cfg.model.param_dtype))
    return abstract(shapes, tree_shardings(run.rollout_mesh, shapes, layout="rollout"))


def abstract_key():
    """Returns a random key."""
    return jax.eval_shape(jax.random.key, 0)


def rollout_rows(run: RunShapes):
    """Returns the prompts and sequences of a rollout, divided among the data shards."""
    rollout = run.cfg.rollout
    prompts = Prompts(
        tokens=np.zeros((rollout.prompts, rollout.max_prompt_tokens), np.int32),
        lengths=np.ones(rollout.prompts, np.int32),
        ids=np.arange(rollout.prompts, dtype=np.int32),
    )
    limits = np.full((rollout.prompts, rollout.samples), rollout.max_tokens)
    shards = num_data_shards(run.rollout_mesh)
    room = training_room(run.cfg, run.slots, shards)
    return abstract_rows(run.rollout_mesh, split_over_shards(prompts, limits, shards, room))


def rollout_sizes(run: RunShapes) -> list[int]:
    """Returns the sizes that the KV cache of a rollout may have, in columns."""
    width = run.cfg.rollout.max_prompt_tokens
    with jax.sharding.use_abstract_mesh(run.rollout_mesh.abstract_mesh):
        return cache_sizes(width, width + run.cfg.rollout.max_tokens)


def init_options(run: RunShapes, columns: int) -> dict[str, int]:
    """Returns the static arguments of `init_decode`."""
    shards = num_data_shards(run.rollout_mesh)
    room = training_room(run.cfg, run.slots, shards)
    slots = shards * min(-(-run.slots // shards), room.sequences)
    return dict(slots=slots, columns=columns, max_tokens=run.cfg.rollout.max_tokens, prefill=room.prefill)


def abstract_decode(run: RunShapes, columns: int):
    """Returns the state and the queue that `decode_tokens` takes when the cache has this many columns."""

    def init(params, *args):
        return init_decode(run.model_cfg, params, *args, **init_options(run, columns))

    shapes = jax.eval_shape(init, abstract_placed(run), *rollout_rows(run), abstract_key())
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, abstract(leaves, decode_shardings(run.rollout_mesh, shapes)))


def lower_placement(run: RunShapes):
    """Lowers the placement of the policy for a rollout."""
    params = abstract_params(run, run.cfg.model.param_dtype)
    return rollout_placement(run.model_cfg, run.rollout_mesh).lower(params)


def lower_prefill(run: RunShapes):
    """Lowers the start of a rollout, with the smallest cache."""
    options = init_options(run, rollout_sizes(run)[0])
    args = abstract_placed(run), *rollout_rows(run), abstract_key()
    with jax.set_mesh(run.rollout_mesh):
        return init_decode.lower(run.model_cfg, *args, **options)


def lower_decode(run: RunShapes, columns: int):
    """Lowers the decode loop for a cache of this many columns."""
    states = len(build_byte_table([string.encode() for string in run.cfg.rollout.stop_strings])) - 1
    stop_table = jax.ShapeDtypeStruct((states, run.model_cfg.vocab_size), jnp.int16)
    scalars = np.float32(run.cfg.rollout.temperature), np.int32(0), UNLIMITED_STEPS
    with jax.set_mesh(run.rollout_mesh):
        args = abstract_placed(run), *abstract_decode(run, columns), stop_table, *scalars
        return decode_tokens.lower(run.model_cfg, *args, greedy=False, filter=NO_FILTER)


def abstract_batch(run: RunShapes, completions: int) -> PackedBatch:
    """Returns the packed batch of this many completions."""
    width = run.cfg.rollout.max_prompt_tokens + run.cfg.rollout.max_tokens
    zeros, ones = np.zeros((1, run.cfg.rollout.max_tokens), np.float32), np.ones(1, np.int32)
    experience = Experience(
        tokens=np.zeros((1, width), np.int32),
        prompt_lengths=ones,
        mask=zeros == 1,
        sampler_logps=zeros,
        ref_logps=zeros,
        advantages=zeros[:, 0],
        prompt_ids=ones,
        kept=ones == 1,
    )
    return abstract_rows(run.mesh, pack_rows(run.cfg, run.mesh, experience, completions))


def lower_scoring(run: RunShapes):
    """Lowers the scoring of a rollout's completions with the reference."""
    batch = abstract_batch(run, run.cfg.rollout.prompts * run.cfg.rollout.samples)
    params = abstract_params(run, run.cfg.model.reference_dtype)
    options = dict(temperature=run.cfg.rollout.temperature, chunk_tokens=run.cfg.train.chunk_tokens)
    with jax.set_mesh(run.mesh):
        return score_completions.lower(run.model_cfg, params, batch, **options)


def lower_update(run: RunShapes):
    """Lowers the update."""
    batch = abstract_batch(run, run.cfg.rollout.prompts * run.cfg.rollout.samples // run.cfg.train.minibatches)
    optimizer, shapes = make_optimizer(run.cfg.optim), param_shapes(run.model_cfg, run.cfg.model.param_dtype)
    shardings = train_state_shardings(run.mesh, shapes, optimizer)
    state = abstract(train_state_shapes(shapes, optimizer), shardings)
    with jax.set_mesh(run.mesh):
        return make_update(run.model_cfg, run.cfg, run.mesh, shapes, optimizer).lower(state, batch)


def run_programs(run: RunShapes) -> dict[str, Callable[[], "jax.stages.Lowered"]]:
    """Returns functions that lower the programs of a run, by name, in the order in which training runs them."""
    sizes = rollout_sizes(run)
    programs = {"placement": lambda: lower_placement(run), "prefill": lambda: lower_prefill(run)}
    programs[f"decode {sizes[0]}"] = lambda: lower_decode(run, sizes[0])
    programs[f"decode {sizes[-1]}"] = lambda: lower_decode(run, sizes[-1])
    if run.cfg.loss.kl_coef:
        programs["scoring"] = lambda: lower_scoring(run)
    programs["update"] = lambda: lower_update(run)
    return programs
