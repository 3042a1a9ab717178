"""The inputs and results of deriving config keys; `grpo_jax.run.derive` holds the rules."""

import os
from collections.abc import Collection
from typing import Any, NamedTuple

import jax

from grpo_jax.config.keys import format_as_flag
from grpo_jax.config.schema import Config
from grpo_jax.rollout.memory import device_memory_bytes
from grpo_jax.text.terminal import printable


class Machine(NamedTuple):
    """The devices of a run."""

    platform: str  # "cpu", "gpu" or "tpu"
    name: str  # the kind of the devices
    devices: int
    memory_bytes: int  # of one device
    cores: int  # of this host; CPU devices share them


def find_machine() -> Machine:
    """Returns the devices of this process and of those that it has joined."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    platform = "gpu" if jax.default_backend() in ("cuda", "rocm") else jax.default_backend()
    return Machine(platform, devices[0].device_kind, len(devices), device_memory_bytes(), cores)


class Derivation:
    """Collects derived keys, and a line for each group of them."""

    def __init__(self, cfg: Config, given: Collection[str]):
        """Starts from a checked config; the keys in `given` keep its values."""
        self.cfg, self.given = cfg, frozenset(given)
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []

    def __getitem__(self, name: str) -> Any:
        """Returns the derived value of a key, or the value in the config if none is derived."""
        value: Any = self.cfg
        for part in name.split("."):
            value = getattr(value, part)
        return self.values.get(name, value)

    def choose(self, reason: str, values: dict[str, Any]) -> None:
        """Sets those of the keys that are not given, and adds a line with the reason if there are any."""
        free = {name: value for name, value in values.items() if name not in self.given}
        self.values |= free
        if free:
            flags = " ".join(shorten_flag(format_as_flag(*pair).removeprefix("--config.")) for pair in free.items())
            self.lines.append(f"  {reason} -> {flags}")


def shorten_flag(flag: str) -> str:
    """Returns a flag for the console, cut to 100 characters."""
    return printable(flag if len(flag) <= 100 else f"{flag[:97]}...")
