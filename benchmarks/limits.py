"""What the machine allows, measured in the process that also times what is compared with it.

A decode step reads every weight once and multiplies `rows` hidden states with it. So it takes at least as long as the
memory needs to deliver the weights and the rows' keys and values, and as long as its matrix products take with nothing
between them. What a step needs beyond the larger of the two is attention, norms, drawing and overhead.

Learning multiplies many rows with every weight, so that its matrix products are its limit, forwards and backwards.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.rollout.draws import draw_tokens

LITTLE = 1e-6  # of a product goes into the next one: enough to depend on it, too little to grow from step to step
STEPS = 8  # in one compiled loop, so that calling it costs little of what is measured


def seconds(call, repeats: int) -> list[float]:
    """How long `call` took, `repeats` times; a first time that compiles is not counted."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - began)
    return found


def check_measurable(model_cfg: ModelConfig) -> None:
    """Refuses what `measure` does not know.

    Raises:
      UserError: which weights a mixture reads depends on the tokens; latent attention is no chain of projections.
    """
    kind = "a mixture of experts" if model_cfg.experts else "latent attention" if model_cfg.latent else ""
    if kind:
        raise UserError(f"expected a dense model with grouped-query attention; found {kind}, which is not measured")


def read_gb_s(repeats: int) -> float:
    """The best rate of summing a buffer that no cache holds."""
    size = 2**29 if jax.default_backend() == "cpu" else 2**32  # bytes
    buffer = jnp.ones((size // 2**14, 2**12), jnp.float32)  # many short sums, for all cores
    total = jax.jit(lambda x: x.sum(axis=1))
    return size / min(seconds(lambda: total(buffer), repeats)) / 1e9


def square_gflop_s(dtype: str, repeats: int) -> float:
    """The rate of one large matrix product."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * side**3 / statistics.median(seconds(lambda: product(square), repeats)) / 1e9


def head_of(model_cfg: ModelConfig, params) -> Float[Array, "D V"]:
    """The matrix from hidden states to logits."""
    return params["embed"]["embedding"].T if model_cfg.tie_embeddings else params["head"]["kernel"]


def widen(x: Float[Array, "N _"], width: int) -> Float[Array, "N _"]:
    """x repeated or cut to a width."""
    return jnp.tile(x, (1, -(-width // x.shape[1])))[:, :width]


def through(block, last: str, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """x through the products of an attention or an MLP: all take x, but for the last, which takes what they give.

    Args:
      block: its parameters; a kernel is [1, D, *outputs], that of `last` [1, *inputs, D].
    """
    width = x.shape[1]
    first = [leaf["kernel"].reshape(width, -1) for name, leaf in block.items() if "kernel" in leaf and name != last]
    final = block[last]["kernel"].reshape(-1, width)
    inner = sum(widen(x @ kernel, len(final)) for kernel in first)
    return x + LITTLE * (inner @ final)


def matmul_ms(model_cfg: ModelConfig, params, rows: int, repeats: int) -> float:
    """The products of one step, one after another on the weights themselves, without all that is between them."""

    def step(params, start, logits):
        x = start + LITTLE * widen(logits, model_cfg.hidden_size).astype(start.dtype)
        for layer in params["layers"]:
            x = through(layer["mlp"], "down", through(layer["attention"], "o", x))
        return jnp.matmul(x, head_of(model_cfg, params), preferred_element_type=model_cfg.logit_dtype)

    @jax.jit
    def steps(params, start, logits):
        return jax.lax.fori_loop(0, STEPS, lambda _, logits: step(params, start, logits), logits)

    start = jax.random.normal(jax.random.key(0), (rows, model_cfg.hidden_size), model_cfg.compute_dtype)
    logits = jnp.zeros((rows, model_cfg.vocab_size), model_cfg.logit_dtype)
    return 1e3 * statistics.median(seconds(lambda: steps(params, start, logits), repeats)) / STEPS


def matmul_flops(model_cfg: ModelConfig, params, rows: int) -> int:
    """Multiplications and additions of those products."""
    leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
    kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    return 2 * rows * (kernels + model_cfg.hidden_size * model_cfg.vocab_size)


def kv_bytes(model_cfg: ModelConfig, columns: float, *, seen: bool = False) -> float:
    """Bytes of a sequence's keys and values.

    Args:
      seen: count only what a layer with a window looks at.
    """
    held = sum(min(columns, layer.window) if seen and layer.window else columns for layer in model_cfg.layers)
    return held * 2 * model_cfg.num_kv_heads * model_cfg.head_dim * jnp.dtype(model_cfg.compute_dtype).itemsize


def step_bytes(model_cfg: ModelConfig, params, rows: int, columns: float) -> float:
    """Bytes that a step must read: the weights (of a token table only `rows` rows), and the rows' keys and values."""
    table = params["embed"]["embedding"]
    unread = 0 if model_cfg.tie_embeddings else max(0, len(table) - rows) * table.shape[1] * table.dtype.itemsize
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return weights - unread + rows * kv_bytes(model_cfg, columns, seen=True)


def draw_ms(rows: int, vocab: int, repeats: int = 7) -> float:
    """Drawing a token a row from logits that are there, the keys of the tokens included."""

    @jax.jit
    def steps(keys, logits):
        def step(i, last):
            own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
            return draw_tokens(own, logits + LITTLE * last[:, None])[1]

        return jax.lax.fori_loop(0, STEPS, step, jnp.zeros(rows))

    keys = jax.random.split(jax.random.key(0), rows)
    logits = jax.random.normal(jax.random.key(1), (rows, vocab))
    return 1e3 * statistics.median(seconds(lambda: steps(keys, logits), repeats)) / STEPS


def measure(model_cfg: ModelConfig, params, rows: int, columns: float, repeats: int = 7) -> dict[str, float]:
    """The limits of a decode step.

    Args:
      params: placed for rollout, on one device.
      rows: sequences that take part in a step.
      columns: tokens that each of them holds in the cache, on average.
    Returns:
      read_gb_s, square_gflop_s; matmul_ms and matmul_gflop_s of the step's products; bytes_ms to read what a step must
      at read_gb_s; limit_ms, the larger of matmul_ms and bytes_ms. Medians of the repeats, but the best of read_gb_s.
    """
    check_measurable(model_cfg)
    read = read_gb_s(repeats)
    products = matmul_ms(model_cfg, params, rows, repeats)
    needed = step_bytes(model_cfg, params, rows, columns) / read / 1e6
    return {
        "read_gb_s": read,
        "square_gflop_s": square_gflop_s(model_cfg.compute_dtype, repeats),
        "matmul_ms": products,
        "matmul_gflop_s": matmul_flops(model_cfg, params, rows) / products / 1e6,
        "bytes_ms": needed,
        "limit_ms": max(products, needed),
    }


def layer_kernels(model_cfg: ModelConfig, params) -> list[tuple[int, Array]]:
    """The matrices of all layers, each with the number of its inputs.

    Args:
      params: placed for rollout: every layer is on its own.
    """
    return [
        (
            leaf["kernel"].size // model_cfg.hidden_size if name in ("o", "down") else model_cfg.hidden_size,
            leaf["kernel"],
        )
        for layer in params["layers"]
        for block in (layer["attention"], layer["mlp"])
        for name, leaf in block.items()
        if "kernel" in leaf
    ]


def products_s(products: list[tuple[int, int, Array]], repeats: int) -> float:
    """Seconds of matrix products, one after another: [rows, inputs] @ [inputs, outputs].

    Each waits for the one before through a single element of its left side, which costs nothing. No right side is
    transposed, as that may be slow: its numbers, as they lie in memory, are taken for a matrix of the shape asked for.

    Args:
      products: rows, inputs, and an array of inputs * outputs numbers.
    """
    shapes, rights = [(rows, inputs) for rows, inputs, _ in products], [right for *_, right in products]
    lefts = {shape: jax.random.normal(jax.random.key(0), shape, rights[0].dtype) for shape in set(shapes)}

    @jax.jit
    def run(lefts, rights):
        seen = jnp.zeros((), rights[0].dtype)
        for shape, right in zip(shapes, rights):
            left = lefts[shape].at[0, 0].set(seen)
            lefts = lefts | {shape: left}
            seen = LITTLE * (left @ right.reshape(shape[1], -1))[0, 0]
        return seen

    return statistics.median(seconds(lambda: run(lefts, rights), repeats))


def passes_s(kernels: list[tuple[int, Array]], rows: int, repeats: int) -> tuple[float, float]:
    """Seconds of `rows` hidden states through matrices, and of the two products a matrix backwards."""
    outputs = [kernel.size // inputs for inputs, kernel in kernels]
    normal = lambda width: jax.random.normal(jax.random.key(1), (rows, width), kernels[0][1].dtype)
    gradient = {width: normal(width) for width in set(outputs)}
    backward = []
    for (inputs, kernel), width in zip(kernels, outputs):
        backward += [(rows, width, kernel), (inputs, rows, gradient[width])]  # of the hidden states; of the matrix
    return products_s([(rows, *kernel) for kernel in kernels], repeats), products_s(backward, repeats)


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
    """The matrix products of an update, and of scoring by a reference, with nothing between them.

    Args:
      params: placed for rollout, on one device.
      width: hidden states of a micro-batch.
      chunk, chunks: hidden states that go through the head at a time, and how often.
      scored: there is a reference, which is a forward pass more.
    """
    check_measurable(model_cfg)
    table = params["embed"]["embedding"] if model_cfg.tie_embeddings else params["head"]["kernel"]
    layers = passes_s(layer_kernels(model_cfg, params), width, repeats)
    head = passes_s([(model_cfg.hidden_size, table)] * STEPS, chunk, repeats)
    forward, backward = (micro_batches * x + chunks * y / STEPS for x, y in zip(layers, head))
    return (1 + scored) * forward + backward


def forward_flops(model_cfg: ModelConfig, params, positions: Int[np.ndarray, " _"], sampled: int) -> int:
    """Multiplications and additions that a forward pass needs: of the layers, of attention's two products, of the head.

    Args:
      params: placed for rollout.
      positions: of all tokens; a token sees itself and those before it, as far as a layer's window reaches.
      sampled: how many of the tokens belong to completions; these alone go through the head.
    """
    kernels = sum(kernel.size for _, kernel in layer_kernels(model_cfg, params))
    seen = sum(np.minimum(positions + 1, layer.window or model_cfg.max_positions).sum() for layer in model_cfg.layers)
    return 2 * int(
        kernels * len(positions)
        + 2 * model_cfg.num_heads * model_cfg.head_dim * seen
        + model_cfg.hidden_size * model_cfg.vocab_size * sampled
    )
