"""R1-Zero: reinforcement from rule-based rewards alone.

    python -m grpo_jax.main --config=configs/r1zero.py --workdir=runs/r1zero

preset (default) tiny: the tiny base model of the package learns to work additions out.
"""

from grpo_jax import config as grpo_config
from grpo_jax.types import UserError


def get_config(preset: str = "tiny"):
    if preset != "tiny":
        raise UserError(f"expected a preset of configs/r1zero.py: tiny; found {preset!r}")
    return grpo_config.default()
