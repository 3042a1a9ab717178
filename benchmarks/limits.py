"""Measures the limits of the machine, in the process that also times the work compared with them.

A decode step reads every weight once and multiplies `rows` hidden states by it. It therefore takes at least as long as
memory takes to deliver the weights and the rows' KV cache, and at least as long as its matmuls take on their own. The
time beyond the larger of the two goes to attention, norms, sampling and overhead.

Learning multiplies many rows by every weight, so its limit is the time of its matmuls, forward and backward.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import head_kernel
from grpo_jax.rollout.draws import draw_tokens

EPSILON = 1e-6  # scales a result before it feeds the next matmul: a dependency that does not grow from step to step
STEPS = 8  # steps per compiled loop, so that the overhead of the call is small


def time_calls(call, repeats: int) -> list[float]:
    """Returns the seconds of `repeats` calls, after one that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def check_measurable(model_cfg: ModelConfig) -> None:
    """Raises a UserError for a model whose limits are not implemented.

    The weights that a mixture of experts reads depend on the tokens, and latent attention is no chain of projections.
    """
    kind = "a mixture of experts" if model_cfg.experts else "latent attention" if model_cfg.latent else ""
    if kind:
        raise UserError(
            f"The benchmarks measure dense models with grouped-query attention; found {kind}. Pass another --model."
        )


def read_gb_s(repeats: int) -> float:
    """Returns the best rate in GB/s of summing a buffer that is larger than any processor cache."""
    size = 2**29 if jax.default_backend() == "cpu" else 2**32  # bytes
    buffer = jnp.ones((size // 2**14, 2**12), jnp.float32)  # many short sums, which occupy all cores
    sum_rows = jax.jit(lambda x: x.sum(axis=1))
    return size / min(time_calls(lambda: sum_rows(buffer), repeats)) / 1e9


def copy_gb_s(repeats: int) -> float:
    """Returns the best rate in GB/s of copying a large buffer, counting the bytes that are read and written."""
    size = 2**28 if jax.default_backend() == "cpu" else 2**32  # bytes
    buffer = jax.random.bits(jax.random.key(0), (size // 4,))
    copy = jax.jit(jnp.copy)
    return 2 * size / min(time_calls(lambda: copy(buffer), repeats)) / 1e9


def square_gflop_s(dtype: str, repeats: int) -> float:
    """Returns the rate in GFLOP/s of one large matmul."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    matmul = jax.jit(lambda x: x @ x)
    return 2 * side**3 / statistics.median(time_calls(lambda: matmul(square), repeats)) / 1e9


def tile_columns(x: Float[Array, "N _"], width: int) -> Float[Array, "N _"]:
    """Repeats or cuts the columns of `x` to `width`."""
    return jnp.tile(x, (1, -(-width // x.shape[1])))[:, :width]


def block_matmuls(block, output: str, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Applies the matmuls of an attention or MLP block to `x`.

    Args:
        block: Parameters of the block: kernels [1, D, *outputs], except that of the output projection, [1, *inputs, D].
        output: Name of the output projection, whose input is the sum of the other projections of `x`.
        x: Hidden states.
    """
    width = x.shape[1]
    inputs = [leaf["kernel"].reshape(width, -1) for name, leaf in block.items() if "kernel" in leaf and name != output]
    output_kernel = block[output]["kernel"].reshape(-1, width)
    inner = sum(tile_columns(x @ kernel, len(output_kernel)) for kernel in inputs)
    return x + EPSILON * (inner @ output_kernel)


def matmul_ms(model_cfg: ModelConfig, params, rows: int, repeats: int) -> float:
    """Returns the milliseconds of a decode step's matmuls on their own, one after another, with the real weights."""

    def step(params, start, logits):
        x = start + EPSILON * tile_columns(logits, model_cfg.hidden_size).astype(start.dtype)
        for layer in params["layers"]:
            x = block_matmuls(layer["mlp"], "down", block_matmuls(layer["attention"], "o", x))
        return jnp.matmul(x, head_kernel(model_cfg, params), preferred_element_type=model_cfg.logit_dtype)

    @jax.jit
    def steps(params, start, logits):
        return jax.lax.fori_loop(0, STEPS, lambda _, logits: step(params, start, logits), logits)

    start = jax.random.normal(jax.random.key(0), (rows, model_cfg.hidden_size), model_cfg.compute_dtype)
    logits = jnp.zeros((rows, model_cfg.vocab_size), model_cfg.logit_dtype)
    return 1e3 * statistics.median(time_calls(lambda: steps(params, start, logits), repeats)) / STEPS


def matmul_flops(model_cfg: ModelConfig, params, rows: int) -> int:
    """Returns the floating-point operations of the matmuls that `matmul_ms` times."""
    leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
    kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    return 2 * rows * (kernels + model_cfg.hidden_size * model_cfg.vocab_size)


def kv_bytes(model_cfg: ModelConfig, columns: float, *, windowed: bool = False) -> float:
    """Returns the bytes of a sequence's keys and values.

    Args:
        model_cfg: The model.
        columns: Length of the sequence.
        windowed: Count only the columns within the attention window of each layer.
    """
    total = sum(min(columns, layer.window) if windowed and layer.window else columns for layer in model_cfg.layers)
    return total * 2 * model_cfg.num_kv_heads * model_cfg.head_dim * jnp.dtype(model_cfg.compute_dtype).itemsize


def step_bytes(model_cfg: ModelConfig, params, rows: int, columns: float) -> float:
    """Returns the bytes that a decode step has to read: the weights, and the keys and values of its rows.

    Of an embedding table that is not tied to the head, it reads only `rows` rows.
    """
    table = params["embed"]["embedding"]
    unread = 0 if model_cfg.tie_embeddings else max(0, len(table) - rows) * table.shape[1] * table.dtype.itemsize
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return weights - unread + rows * kv_bytes(model_cfg, columns, windowed=True)


def draw_ms(rows: int, vocab: int, repeats: int = 7) -> float:
    """Returns the milliseconds of sampling a token per row from given logits, including the keys of the tokens."""

    @jax.jit
    def steps(keys, logits):
        def step(i, last_logps):
            token_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
            return draw_tokens(token_keys, logits + EPSILON * last_logps[:, None])[1]

        return jax.lax.fori_loop(0, STEPS, step, jnp.zeros(rows))

    keys = jax.random.split(jax.random.key(0), rows)
    logits = jax.random.normal(jax.random.key(1), (rows, vocab))
    return 1e3 * statistics.median(time_calls(lambda: steps(keys, logits), repeats)) / STEPS


def measure_decode_limits(
    model_cfg: ModelConfig, params, rows: int, columns: float, repeats: int = 7
) -> dict[str, float]:
    """Measures the limits of a decode step.

    Args:
        model_cfg: The model.
        params: Parameters placed for the rollout, on one device.
        rows: Sequences in a step.
        columns: Mean number of tokens that each of them has in the KV cache.
        repeats: Number of measurements. Times are medians, and read_gb_s is the best.

    Returns:
        read_gb_s and square_gflop_s, rates of the machine; matmul_ms and matmul_gflop_s of the step's matmuls;
        bytes_ms, the time to read the step's bytes at read_gb_s; limit_ms, the larger of matmul_ms and bytes_ms.
    """
    check_measurable(model_cfg)
    bandwidth = read_gb_s(repeats)
    matmuls = matmul_ms(model_cfg, params, rows, repeats)
    reads = step_bytes(model_cfg, params, rows, columns) / bandwidth / 1e6
    return {
        "read_gb_s": bandwidth,
        "square_gflop_s": square_gflop_s(model_cfg.compute_dtype, repeats),
        "matmul_ms": matmuls,
        "matmul_gflop_s": matmul_flops(model_cfg, params, rows) / matmuls / 1e6,
        "bytes_ms": reads,
        "limit_ms": max(matmuls, reads),
    }


def layer_kernels(model_cfg: ModelConfig, params) -> list[tuple[int, Array]]:
    """Returns the number of inputs and the kernel of every matmul in layers that are placed for the rollout."""
    kernels = []
    for layer in params["layers"]:
        for name, leaf in [*layer["attention"].items(), *layer["mlp"].items()]:
            if "kernel" in leaf:
                outputs_hidden = name in ("o", "down")
                inputs = leaf["kernel"].size // model_cfg.hidden_size if outputs_hidden else model_cfg.hidden_size
                kernels.append((inputs, leaf["kernel"]))
    return kernels


def matmuls_s(matmuls: list[tuple[int, int, Array]], repeats: int) -> float:
    """Returns the seconds of matmuls [rows, inputs] @ [inputs, outputs] run one after another.

    Each depends on the one before through a single element of its left side, which costs nothing. Right sides are
    reshaped instead of transposed, because a transpose may be slow; the values do not matter.

    Args:
        matmuls: Tuples of rows, inputs, and an array of inputs * outputs numbers.
        repeats: Number of measurements, of which the median is returned.
    """
    shapes, rights = [(rows, inputs) for rows, inputs, _ in matmuls], [right for *_, right in matmuls]
    lefts = {shape: jax.random.normal(jax.random.key(0), shape, rights[0].dtype) for shape in set(shapes)}

    @jax.jit
    def run(lefts, rights):
        previous = jnp.zeros((), rights[0].dtype)
        for shape, right in zip(shapes, rights, strict=True):
            left = lefts[shape].at[0, 0].set(previous)
            lefts = lefts | {shape: left}
            previous = EPSILON * (left @ right.reshape(shape[1], -1))[0, 0]
        return previous

    return statistics.median(time_calls(lambda: run(lefts, rights), repeats))


def passes_s(kernels: list[tuple[int, Array]], rows: int, repeats: int) -> tuple[float, float]:
    """Returns the seconds of the forward matmuls of `rows` hidden states, and of the two backward matmuls of each."""
    outputs = [kernel.size // inputs for inputs, kernel in kernels]
    dtype = kernels[0][1].dtype
    gradients = {width: jax.random.normal(jax.random.key(1), (rows, width), dtype) for width in set(outputs)}
    backward = []
    for (inputs, kernel), width in zip(kernels, outputs, strict=True):
        # The gradients of the hidden states and of the kernel.
        backward += [(rows, width, kernel), (inputs, rows, gradients[width])]
    return matmuls_s([(rows, *kernel) for kernel in kernels], repeats), matmuls_s(backward, repeats)


def learn_limit_s(
    model_cfg: ModelConfig,
    params,
    *,
    width: int,
    micro_batches: int,
    chunk: int,
    chunks: int,
    scored: bool,
    repeats: int,
) -> float:
    """Returns the seconds of the matmuls of an update and of scoring by a reference.

    Args:
        model_cfg: The model.
        params: Parameters placed for the rollout, on one device.
        width: Hidden states per micro-batch.
        micro_batches: Number of micro-batches.
        chunk: Hidden states that go through the head at once.
        chunks: Number of such chunks.
        scored: Whether there is a reference, which takes another forward pass.
        repeats: Number of measurements, of which the median is used.
    """
    check_measurable(model_cfg)
    table = params["embed"]["embedding"] if model_cfg.tie_embeddings else params["head"]["kernel"]
    layers = passes_s(layer_kernels(model_cfg, params), width, repeats)
    head = passes_s([(model_cfg.hidden_size, table)] * STEPS, chunk, repeats)
    forward, backward = (micro_batches * x + chunks * y / STEPS for x, y in zip(layers, head, strict=True))
    return (1 + scored) * forward + backward


def forward_flops(model_cfg: ModelConfig, params, positions: Int[np.ndarray, " _"], sampled: int) -> int:
    """Returns the floating-point operations of a forward pass: layers, attention's two matmuls, and head.

    Args:
        model_cfg: The model.
        params: Parameters placed for the rollout.
        positions: Positions of all tokens. A token attends to itself and to earlier ones within the layer's window.
        sampled: Number of completion tokens; only these go through the head.
    """
    kernels = sum(kernel.size for _, kernel in layer_kernels(model_cfg, params))
    keys = sum(np.minimum(positions + 1, layer.window or model_cfg.max_positions).sum() for layer in model_cfg.layers)
    return 2 * int(
        kernels * len(positions)
        + 2 * model_cfg.num_heads * model_cfg.head_dim * keys
        + model_cfg.hidden_size * model_cfg.vocab_size * sampled
    )
