"""The tiny base model that the package carries, from nothing.

    python -m grpo_jax.main --config=configs/pretrain_tiny.py --workdir=runs/pretrain_tiny
"""

from grpo_jax import config as grpo_config
from grpo_jax.types import UserError


def get_config(preset: str = ""):
    if preset:
        raise UserError(f"expected no preset of configs/pretrain_tiny.py; found {preset!r}")
    return grpo_config.pretrain_default()
