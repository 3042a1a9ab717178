"""One decode step of SmolLM2-135M's shape at 32 slots, which launches kernels most of the time, with other XLA flags.

XLA reads XLA_FLAGS once per process, so every variant runs in a process of its own (`python -m parts.flags`), with the
flags that are already set before its own. This process does not touch the device, whose memory they need. The variants,
of which only the first is measured on other platforms than GPUs:

default           the flags that are set, if any
whole loop        with one CUDA graph for the whole loop, which reads nothing back to the host
without graphs    with a launch per kernel

A line per variant:

flags      its name; added_flags are those that it adds
decode_ms  time of a step; tok_s tokens per second; speedup the time of the default variant, relative to it
temp_gib   memory of the compiled program besides its arguments and results; `rollout` has it for a larger model
compile_s  seconds to compile the program
error      instead of these, why the process ended without a result, which may be that XLA knows no such flag
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from learn import temp_gib

from grpo_jax.parallel.mesh import make_mesh
from parts import json_line
from parts.decoding import RolloutSizes, decode_ms, lower_decode, place_random_params
from parts.programs import start_compiling
from parts.shapes import SMOLLM2_135M, require_accelerator, shrink

VARIANTS = {
    "default": "",
    "whole loop": "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_graph_min_graph_size=1",
    "without graphs": "--xla_gpu_enable_command_buffer=",
}
COMMAND = [sys.executable, "-m", "parts.flags"]
SLOTS, STEPS = 32, 80
SMALL_SIZES, SMALL_STEPS = RolloutSizes(8, samples=4, prompt_tokens=32, columns=64), 8
RESERVE = 1.0  # seconds before the end of the part at which a variant is ended


class Variant:
    """The process of a variant, which imports its modules and then waits for `begin`."""

    device = "unknown"  # as the first process that answers calls it

    def __init__(self, flags: str, small: bool):
        """Starts the process."""
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            [*COMMAND, *(["--small"] if small else [])],
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def begin(self) -> None:
        """Lets the process measure."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended; `read` returns None
            pass

    def read(self, seconds: float) -> dict[str, Any] | None:
        """Returns the next answer, or None if the process ends without one. It is ended after `seconds`."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def end(self) -> None:
        """Ends the process, and waits until the device is free."""
        self.process.kill()
        self.process.wait()

    def error(self) -> str:
        """Returns the line of stderr that says why the process ended."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        fatal = [line for line in lines if re.match(r"F\d{4}", line)]  # of XLA; a stack trace may follow
        return (fatal or lines or [f"the process ended with code {self.process.returncode}"])[-1][:1000]


def device_name() -> str:
    """Returns the kind of device, without touching it."""
    return Variant.device


def measure(small: bool, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields a line per variant.

    Raises:
        NotHere: The device is a CPU, and the model is not small.
        RuntimeError: Even the default flags give no result.
    """
    variants, default_ms = {"default": Variant("", small)}, None
    try:
        for name, flags in VARIANTS.items():
            variant = variants[name]
            variant.begin()
            answer = variant.read(seconds_left() - RESERVE)
            if name == "default":
                if answer is None:
                    raise RuntimeError(variant.error())
                Variant.device, platform = answer["device"], answer["platform"]
                require_accelerator(platform, small)
                if platform == "gpu":  # these import their modules in the meantime
                    variants |= {name: Variant(VARIANTS[name], small) for name in VARIANTS if name != "default"}
            result = answer and variant.read(seconds_left() - RESERVE)
            variant.end()
            if result is None and seconds_left() <= RESERVE:
                left_out = ", ".join(list(VARIANTS)[list(VARIANTS).index(name) :])
                yield {"left_out": left_out, "reason": "no time"}
                return
            if result and name == "default":
                default_ms = result["decode_ms"]
            if result and default_ms:
                result["speedup"] = default_ms / result["decode_ms"]
            yield {"flags": name, "added_flags": flags, **(result or {"error": variant.error()})}
            if len(variants) == 1:
                left_out = ", ".join(list(VARIANTS)[1:])
                yield {"left_out": left_out, "reason": f"these flags are for GPUs; found a {platform}"}
                return
    finally:
        for variant in variants.values():
            variant.end()


def measure_variant(small: bool) -> Iterator[dict[str, Any]]:
    """Yields the device, and then what the flags of this process lead to."""
    mesh = make_mesh(devices=jax.devices()[:1])
    jax.set_mesh(mesh)
    yield {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind}
    model_cfg, sizes, steps = SMOLLM2_135M, RolloutSizes(SLOTS), STEPS
    if small:
        model_cfg, sizes, steps = shrink(model_cfg), SMALL_SIZES, SMALL_STEPS
    compiling = start_compiling([lower_decode(model_cfg, sizes)])
    params = place_random_params(model_cfg, mesh)
    program, compile_s = compiling[0].result()
    milliseconds = decode_ms(program, model_cfg, sizes, params, steps)
    yield {
        "slots": sizes.slots,
        "decode_ms": milliseconds,
        "tok_s": 1e3 * sizes.slots / milliseconds,
        "temp_gib": temp_gib(program),
        "compile_s": compile_s,
    }


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    sys.stdin.readline()
    for fields in measure_variant("--small" in sys.argv[1:]):
        answers.write(json_line(fields))
        answers.flush()
