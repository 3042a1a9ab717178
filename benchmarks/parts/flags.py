"""Times a decode step of a small model with different XLA flags: SmolLM2-135M with 32 slots and random weights.

The kernels of this model are so small that launching them may take most of the time. XLA reads XLA_FLAGS once per
process, so each variant runs in its own process (`python -m parts.flags`), which adds flags to those that are already
set. The process of the part does not use the device, because the variants need its memory. Only the default variant is
measured on platforms other than GPUs. The variants:

default           adds no flags
whole loop        captures the whole decode loop in one CUDA graph, so that the host does not read the loop condition
without graphs    launches kernels one by one, without CUDA graphs

There is one line per variant:

flags      name of the variant; added_flags are the flags that it adds
slots      decode slots
decode_ms  time of a decode step; tok_s is tokens per second, and speedup is relative to the default variant
temp_gib   memory of the compiled program besides its arguments and results; `rollout` reports it for a larger model
compile_s  seconds to compile the program
error      why the process ended without a result; the fields above from slots on are then missing. An XLA that does not
           know a flag ends the process
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
MAX_ERROR_LINES = 50  # how many lines of a variant's stderr are printed
RESERVE = 1.0  # seconds before the end of the part at which a variant is killed


class Variant:
    """The process of a variant, which imports its modules and then waits for `begin`."""

    device = "unknown"  # until the first process names it
    prepared: "Variant | None" = None  # the process of the default variant, if `prepare` has started it

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
        except BrokenPipeError:  # the process has ended, so `read` will return None
            pass

    def read(self, seconds: float) -> dict[str, Any] | None:
        """Returns the next answer, or None if the process ends without one. Kills the process after `seconds`."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def end(self) -> None:
        """Kills the process and waits until it has ended, so that the device is free."""
        self.process.kill()
        self.process.wait()

    def error(self) -> str:
        """Prints the end of stderr. Returns the line that says why the process ended, or else its return code."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        print(*lines[-MAX_ERROR_LINES:], sep="\n", file=sys.stderr)
        fatal = [line for line in lines if re.match(r"F\d{4}", line)]  # from XLA, possibly followed by a stack trace
        return (fatal or lines or [f"the process ended with code {self.process.returncode}"])[-1][:1000]


def device_name() -> str:
    """Returns the kind of the device, without using it."""
    return Variant.device


def prepare(small: bool) -> None:
    """Starts the process of the default variant, which takes seconds to import its modules."""
    Variant.prepared = Variant(VARIANTS["default"], small)


def measure(small: bool, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields a line per variant.

    Raises:
        NotHere: The device is a CPU, and `small` is not set.
        RuntimeError: The process of the default variant ended without naming its device.
    """
    variants, default_ms = {"default": Variant.prepared or Variant(VARIANTS["default"], small)}, None
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
                if platform == "gpu":  # they import their modules while the default is measured
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
    """Yields the platform and the device, and then the measurements with the flags of this process."""
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
    os.dup2(2, 1)  # what libraries print must not get between the answers
    sys.stdin.readline()
    for fields in measure_variant("--small" in sys.argv[1:]):
        answers.write(json_line(fields))
        answers.flush()
