"""Checks that results are right: compares the tiny base model with values from a CPU, and attention with a reference.

In float32, all matmuls have the highest precision, which accelerators do not use by default; bfloat16 is computed as in
training. The checks run in parallel, because they spend most of their time on compilation, but their lines are always
in the same order, the most important first. A line has

check   what was computed, in `dtype`
error   the largest difference from the expected values; `bound` is the largest that is allowed
ok      whether the error is within the bound. If the check raised an exception, `reason` says which

Checks of the tiny base model, whose expected values are in `cpu_values.npz`:

logits           error relative to the largest logit
greedy tokens    error in logits: at the first token of a completion that differs, the margin by which the logit of the
                 expected token exceeds all others. Rounding changes a token only if this is small. `differing` of all
                 `completions` have such a token, and `same` is the fraction of tokens before it
sampled tokens   the same at temperature 1, with the Gumbel noise of the draw added to the logits
log-probs        of the sampled tokens, up to the first that differs: error relative to the largest logit
update metrics   error relative to each metric. `worst` is the one with the largest error, here and below
update gradient  error relative to the largest entry of each parameter's gradient, in both of Adam's moments
update step      error relative to the learning rate, in `entries` with a gradient so large that its sign is certain

Other checks:

attention        one `kernel`, forward and backward, in a row of `length` tokens with heads of `head_dim` (see
                 `parts/kernels.py`): error relative to the largest entry of the output, or of the gradient of the
                 queries, keys or values. `token_attention` decodes: forward only, in a cache of `length` columns
depth            drift of completions that end at `depth` (see `parts/depths.py`), relative to the largest log-prob;
                 `mean_gap` and `max_gap` are the mean and the largest drift of a token in nats
"""

import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from cpu_values import Values, decode, first_logits, read_values, update
from jax.sharding import Mesh
from transformers import CONFIG_MAPPING, AutoTokenizer  # noqa: F401  (imported here, because it takes seconds)

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.parallel.mesh import make_mesh, path_name
from grpo_jax.weights.reading import load
from parts.depths import check_depth
from parts.kernels import check_attention, check_token_attention
from parts.shapes import QWEN_1_5B, SMOLLM2_135M, device_name  # noqa: F401
from parts.verdicts import BOUNDS, DTYPES, Result, precision, verdict

# An error of the logits, as a fraction of the largest, becomes about 40 times as large a fraction of a gradient, and
# 100 times of a metric that is a difference of log-probs. Devices sum in different orders: two versions of XLA on a CPU
# differ by 7e-7 of the largest logit in float32. In bfloat16, metrics differ from float32 by up to 0.10 on a CPU, and
# gradients by up to 0.06.
METRIC_BOUNDS = {"float32": 1e-3, "bfloat16": 0.25}
GRADIENT_BOUNDS = {"float32": 2e-4, "bfloat16": 0.15}
# Adam's first step is the learning rate times the sign of the gradient. The sign is certain where the gradient exceeds
# this fraction of its largest entry.
CERTAIN_GRADIENT = {"float32": 1e-3, "bfloat16": 0.3}
STEP_BOUND = 1e-4  # rounding the new parameters to float32 changes a step by about 1e-5 learning rates

MAX_THREADS = 8  # with more, the first results come later, because only one thread can trace at a time


class TinyBase(NamedTuple):
    """The tiny base model on the first device, and the values that it computes on a CPU."""

    mesh: Mesh
    model_cfg: ModelConfig
    params: Any
    values: Values

    def config_for(self, dtype: str) -> ModelConfig:
        """Returns the model's config with this compute dtype."""
        return replace(self.model_cfg, compute_dtype=dtype)

    @property
    def largest_logit(self) -> float:
        """Returns the largest absolute logit in the file."""
        return float(np.abs(self.values["logits"]).max())


def load_tiny_base() -> TinyBase:
    """Loads the model and the values.

    Raises:
        ValueError: The values were computed with another base model.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    return TinyBase(mesh, *load("tiny", mesh=mesh), read_values())


def check_logits(base: TinyBase, dtype: str) -> Iterator[Result]:
    """Compares logits."""
    with precision(dtype):
        logits = first_logits(base.config_for(dtype), base.params, base.values)
    error = np.abs(logits - base.values["logits"]).max() / base.largest_logit
    yield verdict("logits", dtype, error, BOUNDS[dtype])


def check_tokens(base: TinyBase, dtype: str) -> Iterator[Result]:
    """Compares greedy and sampled tokens, and the log-probs of the sampled ones."""
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        with precision(dtype):
            rollout = decode(base.config_for(dtype), base.params, base.values, temperature)
        tokens, lengths, margins = (base.values[f"{kind}_{name}"] for name in ("tokens", "lengths", "margins"))
        columns = np.arange(tokens.shape[-1])
        expected, got = (
            np.where(columns < length[..., None], ids, -1)
            for ids, length in ((tokens, lengths), (rollout.tokens, rollout.lengths))
        )
        differs = expected != got
        is_first, is_same = differs & (np.cumsum(differs, axis=-1) == 1), ~np.logical_or.accumulate(differs, axis=-1)
        is_counted = is_same & (expected >= 0)
        # If a completion only ends earlier or later than the expected one, no near-tie explains the difference.
        margins = np.where((expected >= 0) & (got >= 0), margins, np.inf)
        yield verdict(
            f"{kind} tokens",
            dtype,
            margins.max(initial=0.0, where=is_first),
            2 * BOUNDS[dtype] * base.largest_logit,  # the logits of both tokens may be off
            same=float(is_counted.sum() / lengths.sum()),
            differing=int(is_first.sum()),
            completions=lengths.size,
        )
    gaps = np.abs(rollout.logps - base.values["sampled_logps"])
    error = gaps.max(initial=0.0, where=is_counted) / base.largest_logit
    yield verdict("log-probs", dtype, error, BOUNDS[dtype])


def check_update(base: TinyBase, dtype: str) -> Iterator[Result]:
    """Compares the metrics, the gradient and the parameter changes of one update."""
    expected = base.values
    with precision(dtype):
        got = update(base.config_for(dtype), base.params, base.mesh, expected)

    def worst(check: str, errors, names, bounds: dict[str, float]) -> Result:
        index = int(np.argmax(errors))  # the first NaN, if there is one
        return verdict(check, dtype, errors[index], bounds[dtype], worst=names[index])

    names, want = expected["metric_names"].tolist(), expected["metrics"]
    metrics = np.array([got["metrics"][got["metric_names"].tolist().index(name)] for name in names])
    errors = np.abs(metrics - want) / np.where(want == 0, 1.0, np.abs(want))
    yield worst("update metrics", errors, names, METRIC_BOUNDS)

    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(base.params)]
    largest = expected["largest_gradients"][:, None]
    errors = [np.abs(got[moment] - expected[moment]) / largest for moment in ("gradients", "gradient_sizes")]
    yield worst("update gradient", np.max(errors, axis=(0, 2)), names, GRADIENT_BOUNDS)

    is_certain = np.abs(expected["gradients"]) > CERTAIN_GRADIENT[dtype] * largest
    error = np.abs(got["steps"] - expected["steps"]).max(initial=0.0, where=is_certain)
    yield verdict("update step", dtype, error, STEP_BOUND, entries=int(is_certain.sum()))


def list_checks(base: TinyBase, small: bool) -> dict[str, Callable[[], Iterable[Result]]]:
    """Returns the checks by name, the most important first."""
    checks = {}
    for name, check in (("logits", check_logits), ("tokens", check_tokens), ("update", check_update)):
        for dtype in DTYPES[:1] if small and name != "logits" else DTYPES:
            checks[f"{name} {dtype}"] = partial(check, base, dtype)
    heads = replace(QWEN_1_5B, num_heads=4) if small else QWEN_1_5B
    for length in (256, 2048) if small else (256, 2048, 8192):
        checks[f"attention {length}"] = partial(check_attention, heads, length)
    if not small:
        checks["attention 256, heads of 64"] = partial(check_attention, SMOLLM2_135M, 256)
        for name, model_cfg in (("Qwen2.5-1.5B", QWEN_1_5B), ("SmolLM2-135M", SMOLLM2_135M)):
            checks[f"attention of {name}'s tokens"] = partial(check_token_attention, model_cfg)
    depths = [(depth, dtype) for depth in (512, 2048, 8192) for dtype in DTYPES]
    for depth, dtype in [(512, "float32"), (1024, "bfloat16")] if small else depths:
        checks[f"depth {depth} {dtype}"] = partial(check_depth, base.config_for(dtype), base.params, depth)
    return checks


def run_side_by_side(
    checks: dict[str, Callable[[], Iterable[Result]]], mesh: Mesh, seconds_left: Callable[[], float]
) -> Iterator[Result]:
    """Runs checks in parallel and yields their results in order. A check that raises an exception is not `ok`."""

    def run(check) -> list[Result]:
        with jax.set_mesh(mesh):
            return list(check())

    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    futures = {name: pool.submit(run, check) for name, check in checks.items()}
    for name, future in futures.items():
        try:
            yield from future.result(max(0, seconds_left() - 1))
        except TimeoutError:
            yield {"left_out": name, "reason": "no time"}
        except Exception as error:
            traceback.print_exception(error)
            yield {"check": name, "ok": False, "reason": f"{type(error).__name__}: {error}"[:1000]}
    pool.shutdown(wait=False, cancel_futures=True)


def measure(small: bool, seconds_left: Callable[[], float]) -> Iterator[Result]:
    """Yields the results of all checks.

    Raises:
        ValueError: The values from a CPU were computed with another base model.
    """
    base = load_tiny_base()
    yield from run_side_by_side(list_checks(base, small), base.mesh, seconds_left)
