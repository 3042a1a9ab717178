"""Measures decode tokens per second, and which fraction of the memory bandwidth decoding uses.

Weights and prompts are random; the models have published shapes. There is one line per model and number of slots:

model, parameters  name of the model and its number of parameters
slots              decode slots; the sequence in each continues a prompt of 512 tokens
columns            mean number of tokens that a slot has in the KV cache, which has room for `cache_columns`
decode_ms, tok_s   time of a decode step, the median of several runs of the compiled loop; tokens per second
least_gb           what a decode step has to read: every weight once, and the keys and values of these tokens
copy_gb_s          bandwidth of copying a large array, which counts the bytes that are read and those that are written
limit_ms           time to read least_gb at that bandwidth
limit_fraction     limit_ms / decode_ms; 1 is ideal. A model that fits in the processor's cache can exceed it
temp_gib           memory of the compiled program besides its arguments and results. On a GPU, more than 1 for
                   Qwen2.5-1.5B with 128 slots means that XLA concatenates weights again in every decode step
compile_s          seconds to compile the program, at the same time as others; small if an earlier part compiled it
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import jax
from learn import temp_gib
from limits import copy_gb_s, step_bytes

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.parallel.mesh import make_mesh
from parts.decoding import RolloutSizes, decode_ms, live_columns, lower_decode, place_random_params
from parts.programs import is_out_of_memory, start_compiling
from parts.shapes import QWEN_1_5B, SMOLLM2_135M, device_name, require_accelerator, shrink  # noqa: F401

MODELS = {"Qwen2.5-1.5B": QWEN_1_5B, "SmolLM2-135M": SMOLLM2_135M}
# Models and numbers of slots, the most important first. Programs of a batch compile at the same time, which saves time
# but disturbs XLA's autotuning. Programs whose speed has an aim therefore compile alone.
BATCHES = (
    (("Qwen2.5-1.5B", 128),),
    (("Qwen2.5-1.5B", 512),),
    (("Qwen2.5-1.5B", 32), ("SmolLM2-135M", 32)),
    (("SmolLM2-135M", 128), ("SmolLM2-135M", 512)),
)
STEPS = 80  # per run of the compiled loop
AIMS = {("Qwen2.5-1.5B", 128): 0.5, ("Qwen2.5-1.5B", 512): 0.5}
SMALL_BATCHES = ((("Qwen2.5-1.5B", 8),), (("SmolLM2-135M", 8),))
SMALL_STEPS = 8


def choose_shape(name: str, slots: int, small: bool) -> tuple[ModelConfig, RolloutSizes]:
    """Returns the model and the sizes of its rollout."""
    if small:
        return shrink(MODELS[name]), RolloutSizes(slots, samples=4, prompt_tokens=32, columns=64)
    return MODELS[name], RolloutSizes(slots)


def measure_shape(
    name: str, model_cfg: ModelConfig, sizes: RolloutSizes, compiled: tuple[Any, float], params, steps: int, rate: float
) -> dict[str, Any]:
    """Measures a model with a number of slots.

    Args:
        name: The model's name.
        model_cfg: The model.
        sizes: The sizes of the rollout.
        compiled: The compiled program, and the seconds that compiling it took.
        params: Parameters placed for the rollout.
        steps: Number of steps per run.
        rate: Bandwidth of a copy in GB/s.
    """
    program, compile_s = compiled
    milliseconds, columns = decode_ms(program, model_cfg, sizes, params, steps), live_columns(sizes, steps)
    least_gb = step_bytes(model_cfg, params, sizes.slots, columns) / 1e9
    limit_ms = 1e3 * least_gb / rate
    fields = {
        "model": name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "slots": sizes.slots,
        "columns": columns,
        "cache_columns": sizes.columns,
        "decode_ms": milliseconds,
        "tok_s": 1e3 * sizes.slots / milliseconds,
        "least_gb": least_gb,
        "copy_gb_s": rate,
        "limit_ms": limit_ms,
        "limit_fraction": limit_ms / milliseconds,
        "temp_gib": temp_gib(program),
        "compile_s": compile_s,
    }
    if (name, sizes.slots) in AIMS:
        title = f"decoding {sizes.slots} sequences with {name}, as a fraction of the speed of a copy"
        fields["aim"] = {"name": title, "measured": limit_ms / milliseconds, "aim": AIMS[name, sizes.slots]}
    return fields


def measure(small: bool, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields a line per model and number of slots."""
    require_accelerator(jax.default_backend(), small)
    mesh = make_mesh(devices=jax.devices()[:1])
    jax.set_mesh(mesh)
    rate, steps = copy_gb_s(5), SMALL_STEPS if small else STEPS
    params, longest = {}, 0.0
    for batch in SMALL_BATCHES if small else BATCHES:
        start = time.perf_counter()
        if seconds_left() < longest:
            left_out = ", ".join(f"{name} with {slots} slots" for name, slots in batch)
            yield {"left_out": left_out, "reason": "no time"}
            continue
        shapes = [choose_shape(name, slots, small) for name, slots in batch]
        compiling = start_compiling([lower_decode(*shape) for shape in shapes])
        params = {name: weights for name, weights in params.items() if name in dict(batch)}  # frees the other models
        for (name, _), (model_cfg, _) in zip(batch, shapes, strict=True):
            params[name] = params.get(name) or place_random_params(model_cfg, mesh)
        wait(compiling)
        for (name, slots), shape, program in zip(batch, shapes, compiling, strict=True):
            try:
                yield measure_shape(name, *shape, program.result(), params[name], steps, rate)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                yield {"left_out": f"{name} with {slots} slots", "reason": "out of memory"}
        longest = max(longest, time.perf_counter() - start)
