"""What a run needs by formula, per chip: the bytes that it holds, the FLOPs of its programs, the least decode bytes.

FLOPs count a multiplication and an addition. All completions are taken to be as long as `rollout.max_tokens` allows,
and all prompts as long as `rollout.max_prompt_tokens`. A matrix of the layers costs 2 FLOPs per parameter and token in
the forward pass and 4 in the backward pass. `train.remat=layers` adds 2 for what the backward pass recomputes:
everything but attention and the MLP's last matrix, whose output no gradient needs. The head costs 2 in the forward pass
and 6 in the backward pass, which recomputes the logits. Attention multiplies twice per query and key in the forward
pass, and five times in the backward pass of a flash kernel.
"""

import dataclasses
import math
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from grpo_jax.config.schema import Config
from grpo_jax.learn.logprobs import MAX_VOCAB_BLOCK
from grpo_jax.learn.optimizer import make_optimizer, train_state_shapes, train_state_shardings
from grpo_jax.learn.packing import assign_rows
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import head_path, param_shapes
from grpo_jax.model.parameters import row_for, tree_shardings
from grpo_jax.parallel.mesh import MESH_AXES, num_data_shards, path_name
from grpo_jax.planning.programs import RunShapes, rollout_sizes
from grpo_jax.rollout.memory import bytes_per_device, kv_bytes_per_token, training_room
from grpo_jax.rollout.sampler import needed_room, rollout_placement
from grpo_jax.run.stages import batch_shape

BACKWARD_ATTENTION = 2.5  # FLOPs of attention's backward pass by those of its forward pass


# A plan asks for these many times, and tracing a model takes a good part of a second.
cached_shapes = lru_cache(param_shapes)


class Work(NamedTuple):
    """The FLOPs of a program on one chip."""

    products: float  # of matrix products with weights
    attention: float

    @property
    def flops(self) -> float:
        """Returns all of them."""
        return self.products + self.attention

    def times(self, count: float) -> "Work":
        """Returns the work of doing the same `count` times."""
        return Work(count * self.products, count * self.attention)


class Matrices(NamedTuple):
    """The parameters that a token is multiplied with on one chip, where fsdp is gathered and tensor is not."""

    layers: float  # of all layers; of a mixture, only the experts that a token passes through
    recomputed: float  # those whose products the backward pass computes again
    prefilled: float  # those that the keys and values depend on: of the last layer, only their own projections
    head: float


def abstract_mesh(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> AbstractMesh:
    """Returns a mesh of these sizes without devices."""
    return AbstractMesh((data, fsdp, expert, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def is_recomputed(model_cfg: ModelConfig, path: str) -> bool:
    """Returns whether the backward pass multiplies with this matrix of a layer once more, as in the forward pass."""
    if model_cfg.remat == "layers":
        # With post-norms, the output of the last matrix is normalized, and the norm's gradient needs it.
        return model_cfg.post_norms or path not in ("mlp/down/kernel", "moe/shared/down/kernel")
    # `matmuls` keeps what linear layers compute; experts, routers and latent keys and values are computed otherwise.
    is_linear = path.endswith("/kernel") and path != "moe/router/kernel"
    return model_cfg.remat == "matmuls" and not is_linear


@lru_cache
def matrices(model_cfg: ModelConfig, tensor: int) -> Matrices:
    """Returns the parameters that a token is multiplied with, when the tensor axis has the given size."""
    shapes = cached_shapes(model_cfg)
    shardings = tree_shardings(abstract_mesh(tensor=tensor), shapes)
    layers = recomputed = prefilled = head = 0.0
    last_stack = f"layers/{len(model_cfg.layer_stacks) - 1}/"
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        name, row = path_name(path), row_for(path_name(path))
        size = math.prod(sharding.shard_shape(leaf.shape))
        if name == head_path(model_cfg):
            head = size
        elif name.startswith("layers/") and row.inputs:
            if row.stacked:
                size *= model_cfg.experts.num_experts_per_token / model_cfg.experts.num_experts
            layers += size
            recomputed += size if is_recomputed(model_cfg, row.path) else 0
            is_cached = row.path in ("attention/k/kernel", "attention/v/kernel", "attention/kv_a/kernel")
            is_last = name.startswith(last_stack) and not is_cached
            prefilled += size * (1 - is_last / leaf.shape[0])
    return Matrices(layers, recomputed, prefilled, head)


def attended_keys(model_cfg: ModelConfig, first: int, last: int) -> int:
    """Returns how many keys the queries at positions `first` to `last` - 1 attend to, over all layers."""
    positions = np.arange(first + 1, last + 1)
    windows = [layer.window for layer in model_cfg.layers]
    return sum(
        windows.count(window) * int(np.minimum(positions, window or last).sum()) for window in dict.fromkeys(windows)
    )


def flops_per_key(model_cfg: ModelConfig, tensor: int, *, cached: bool = False) -> float:
    """Returns the FLOPs of all heads on one chip for a query and a key in the forward pass of one layer."""
    heads = model_cfg.num_heads // (tensor if model_cfg.num_heads % tensor == 0 else 1)
    widths = 2 * model_cfg.head_dim
    if latent := model_cfg.latent:  # in a cache, the compressed vectors are both keys and values
        widths = latent.qk_nope_head_dim + latent.v_head_dim if not cached else 2 * latent.kv_lora_rank
        widths += latent.qk_rope_head_dim
    return 2 * heads * widths


class FullBatch(NamedTuple):
    """A batch of completions of full length, packed into rows."""

    width: int  # tokens of a row
    micro_batches: int  # rows that a data shard computes, one after another
    tokens: int  # real tokens of all rows, including the copies of prompts
    completion_tokens: int  # of all rows
    prompts: int  # copies of prompts in all rows


@lru_cache
def full_batch(cfg: Config, shards: int, completions: int) -> FullBatch:
    """Packs this many completions of full length as training would."""
    prompt, completion = cfg.rollout.max_prompt_tokens, cfg.rollout.max_tokens
    width = batch_shape(cfg, shards, completions).width
    prompt_ids = np.arange(completions) // cfg.rollout.samples
    rows = assign_rows(prompt_ids, np.full(completions, prompt), np.full(completions, completion), width)
    prompts = sum(len(groups) for groups in rows)
    tokens = prompts * prompt + completions * completion
    return FullBatch(width, -(-len(rows) // shards), tokens, completions * completion, prompts)


def scored_batch(run: RunShapes) -> FullBatch:
    """Returns the batch that the reference scores: a whole rollout."""
    return full_batch(run.cfg, num_data_shards(run.mesh), run.cfg.rollout.prompts * run.cfg.rollout.samples)


def updated_batch(run: RunShapes) -> FullBatch:
    """Returns the batch of an update."""
    completions = run.cfg.rollout.prompts * run.cfg.rollout.samples // run.cfg.train.minibatches
    return full_batch(run.cfg, num_data_shards(run.mesh), completions)


def forward_work(run: RunShapes, batch: FullBatch) -> Work:
    """Returns the work of computing the log-probs of a batch, including that on padding but for attention."""
    model_cfg, tensor, rollout = run.model_cfg, run.mesh.shape["tensor"], run.cfg.rollout
    weights, tokens = matrices(model_cfg, tensor), batch.width * batch.micro_batches
    shards = num_data_shards(run.mesh)
    scored = batch.completion_tokens / shards
    length = rollout.max_prompt_tokens + rollout.max_tokens
    keys = batch.prompts * attended_keys(model_cfg, 0, rollout.max_prompt_tokens)
    completions = batch.completion_tokens // rollout.max_tokens
    keys += completions * attended_keys(model_cfg, rollout.max_prompt_tokens, length)
    attention = keys / shards * flops_per_key(model_cfg, tensor)
    return Work(2 * weights.layers * tokens + 2 * weights.head * scored, attention)


def update_work(run: RunShapes, *, remat: bool = True) -> Work:
    """Returns the work of one update.

    Args:
        run: The run.
        remat: Whether to count what the backward pass recomputes. Without it, these are the FLOPs of the model's
            definition, which model FLOPs utilization (MFU) counts.
    """
    batch = updated_batch(run)
    forward, weights = forward_work(run, batch), matrices(run.model_cfg, run.mesh.shape["tensor"])
    if not remat:
        return forward.times(3)
    again = 2 * weights.head * batch.completion_tokens / num_data_shards(run.mesh)
    again += 2 * weights.recomputed * batch.width * batch.micro_batches
    return Work(3 * forward.products + again, (1 + BACKWARD_ATTENTION) * forward.attention)


def shard_slots(run: RunShapes) -> int:
    """Returns the decode slots of one data shard."""
    shards = num_data_shards(run.rollout_mesh)
    sequences = run.cfg.rollout.prompts * run.cfg.rollout.samples
    return min(-(-run.slots // shards), -(-sequences // shards))


def shard_vocabulary(run: RunShapes) -> int:
    """Returns the token ids whose logits one chip computes while it decodes."""
    vocab_size, tensor = run.model_cfg.vocab_size, run.rollout_mesh.shape["tensor"]
    return vocab_size // tensor if vocab_size % tensor == 0 else vocab_size


def shard_prompts(run: RunShapes) -> int:
    """Returns the most prompts that one data shard prefills in a rollout of training."""
    rollout = run.cfg.rollout
    return needed_room(rollout.prompts, rollout.samples, num_data_shards(run.rollout_mesh)).prompts


def prefill_work(run: RunShapes) -> Work:
    """Returns the work of prefilling the prompts of a rollout."""
    model_cfg, tensor, width = run.model_cfg, run.rollout_mesh.shape["tensor"], run.cfg.rollout.max_prompt_tokens
    keys = attended_keys(dataclasses.replace(model_cfg, layers=model_cfg.layers[:-1]), 0, width)
    work = Work(2 * matrices(model_cfg, tensor).prefilled * width, keys * flops_per_key(model_cfg, tensor))
    return work.times(shard_prompts(run))


def decode_work(run: RunShapes, columns: int) -> Work:
    """Returns the work of one decode step, in which every slot attends to `columns` columns."""
    model_cfg, tensor = run.model_cfg, run.rollout_mesh.shape["tensor"]
    weights = matrices(model_cfg, tensor)
    attention = model_cfg.num_layers * columns * flops_per_key(model_cfg, tensor, cached=True)
    return Work(2 * (weights.layers + weights.head), attention).times(shard_slots(run))


class Memory(NamedTuple):
    """The bytes that one chip holds for a run, without the temporaries of its programs."""

    state: int  # the policy and the optimizer's state
    reference: int  # 0 without a KL penalty
    gradients: int  # in float32, during an update
    rollout_weights: int
    cache: int  # at its largest
    prompt_kv: int  # keys and values of the prompts, from which slots are filled
    completions: int  # tokens and log-probs


@lru_cache
def training_memory(cfg: Config, model_cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> tuple[int, int, int]:
    """Returns the bytes of the state, of the reference and of the gradients on one chip of the mesh of the updates."""
    param_dtype, reference_dtype = cfg.model.param_dtype, cfg.model.reference_dtype
    shapes, optimizer = cached_shapes(model_cfg, param_dtype), make_optimizer(cfg.optim)
    shardings = tree_shardings(mesh, shapes)
    state = train_state_shapes(shapes, optimizer), train_state_shardings(mesh, shapes, optimizer)
    reference = bytes_per_device(cached_shapes(model_cfg, reference_dtype), shardings) if cfg.loss.kl_coef else 0
    return bytes_per_device(*state), reference, bytes_per_device(cached_shapes(model_cfg, "float32"), shardings)


def run_memory(run: RunShapes) -> Memory:
    """Returns the bytes that one chip holds."""
    cfg, model_cfg, rollout = run.cfg, run.model_cfg, run.cfg.rollout
    token_bytes = kv_bytes_per_token(model_cfg, run.rollout_mesh.shape["tensor"])
    room = training_room(cfg, run.slots, num_data_shards(run.rollout_mesh))
    return Memory(
        *training_memory(cfg, model_cfg, run.mesh),
        rollout_weights=sum(placed_bytes(model_cfg, run.rollout_mesh, cfg.model.param_dtype).values()),
        cache=shard_slots(run) * rollout_sizes(run)[-1] * token_bytes,
        prompt_kv=room.prompts * rollout.max_prompt_tokens * token_bytes,
        completions=8 * room.sequences * rollout.max_tokens,
    )


@lru_cache
def placed_bytes(model_cfg: ModelConfig, mesh: Mesh | AbstractMesh, param_dtype: str) -> dict[str, int]:
    """Returns the bytes of each parameter that a rollout holds on one chip of its mesh, by path."""
    shapes = jax.eval_shape(rollout_placement(model_cfg, mesh), cached_shapes(model_cfg, param_dtype))
    shardings = jax.tree.leaves(tree_shardings(mesh, shapes, layout="rollout"))
    leaves = zip(jax.tree_util.tree_leaves_with_path(shapes), shardings, strict=True)
    return {path_name(path): bytes_per_device(leaf, sharding) for (path, leaf), sharding in leaves}


def decode_bytes(run: RunShapes, columns: int) -> int:
    """Returns the least bytes that one decode step moves on one chip.

    The weights and the cache are read once, and the float32 logits are written once and read once. Of an embedding
    table that is not the head, and of experts, only what the slots' tokens need is read.
    """
    model_cfg, slots, mesh = run.model_cfg, shard_slots(run), run.rollout_mesh
    total = 0.0
    for name, size in placed_bytes(model_cfg, mesh, run.cfg.model.param_dtype).items():
        if name == "embed/embedding" and not model_cfg.tie_embeddings:
            total += size * min(1, slots / model_cfg.vocab_size)
        elif row_for(name).stacked:
            chosen = model_cfg.experts.num_experts_per_token / model_cfg.experts.num_experts
            # The chips along the expert axis compute each other's tokens.
            total += size * (1 - (1 - chosen) ** (slots * mesh.shape["expert"]))
        else:
            total += size
    token_bytes = kv_bytes_per_token(model_cfg, mesh.shape["tensor"])
    return int(total) + slots * (columns * token_bytes + 2 * 4 * shard_vocabulary(run))


# Trees of float32 gradients that an update holds at its peak, in the programs that we compiled.
GRADIENT_TREES = 3


def update_temporaries(run: RunShapes) -> int:
    """Estimates the temporaries of an update on one chip, within 20% of TPU programs that we compiled; GPUs need less.

    They are float32 gradients, what the backward pass keeps of each layer, and the activations, gathered weights and
    whole gradient of one layer and of a block of the head.
    """
    model_cfg, tensor = run.model_cfg, run.mesh.shape["tensor"]
    gradients = training_memory(run.cfg, model_cfg, run.mesh)[2]
    tokens, size = updated_batch(run).width, 2 if model_cfg.compute_dtype == "bfloat16" else 4
    width, heads = model_cfg.hidden_size, flops_per_key(model_cfg, tensor) / 4  # queries of one chip
    mlp = model_cfg.intermediate_size / tensor
    kept_per_layer = {
        "layers": width + heads,
        "matmuls": 2 * width + 4 * heads + 3 * mlp,
        "none": 8 * width + 6 * heads + 5 * mlp,
    }[model_cfg.remat]
    kept = model_cfg.num_layers * tokens * kept_per_layer * size
    layer = 4 * tokens * (4 * mlp + 6 * width + 3 * heads)
    layer += (2 * size + 4) * matrices(model_cfg, tensor).layers / model_cfg.num_layers
    block = min(MAX_VOCAB_BLOCK, model_cfg.vocab_size / tensor)
    head = block * ((8 + size) * width + 16 * run.cfg.train.chunk_tokens)
    return int(GRADIENT_TREES * gradients + kept + layer + head)


def phase_peaks(run: RunShapes) -> dict[str, int]:
    """Estimates the most bytes that one chip holds while it samples, and while it updates."""
    memory = run_memory(run)
    held, logits = memory.state + memory.reference, 12 * shard_vocabulary(run) * shard_slots(run)
    rollout = memory.rollout_weights + memory.cache + memory.prompt_kv + memory.completions + logits
    return {"rollout": held + rollout, "update": held + update_temporaries(run)}
