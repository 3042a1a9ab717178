"""GRPO in JAX: a pretrained language model learns to reason from rule-based rewards alone.

Importing the package does no device work and does not import JAX: the public functions below are loaded when they are
first used.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_jax.learn.advantages import advantages
    from grpo_jax.learn.grpo import grpo_loss
    from grpo_jax.model.decoder import forward
    from grpo_jax.rollout.sampler import sample
    from grpo_jax.run.train import train
    from grpo_jax.weights.reading import load
    from grpo_jax.weights.writing import save

__version__ = "0.2.0"
__all__ = ["advantages", "forward", "grpo_loss", "load", "sample", "save", "train"]

# Keeps `transformers` from advising to install torch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

PUBLIC_MODULES = {
    "advantages": "grpo_jax.learn.advantages",
    "grpo_loss": "grpo_jax.learn.grpo",
    "forward": "grpo_jax.model.decoder",
    "sample": "grpo_jax.rollout.sampler",
    "load": "grpo_jax.weights.reading",
    "save": "grpo_jax.weights.writing",
    "train": "grpo_jax.run.train",
}


def __getattr__(name: str):
    """Imports a public function on first use (PEP 562)."""
    if name not in PUBLIC_MODULES:
        raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(PUBLIC_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public functions although they are not loaded yet."""
    return sorted({*globals(), *__all__})
