"""GRPO in JAX: a pretrained language model learns to reason from rule-based rewards alone.

The functions below also serve notebooks and other trainers. Importing the package does no device work.
"""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch, which nothing here needs, is missing

from grpo_jax.grpo import advantages, grpo_loss
from grpo_jax.model import forward
from grpo_jax.sampler import sample
from grpo_jax.weights import load, save

__all__ = ["advantages", "forward", "grpo_loss", "load", "sample", "save"]
