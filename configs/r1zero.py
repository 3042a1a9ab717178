"""R1-Zero: reinforcement from rule-based rewards alone.

    python -m grpo_jax.main --config=configs/r1zero.py --workdir=runs/r1zero

preset tiny (the default): the tiny base model of the package learns to work additions out. Two CPU cores, 3 min 10 s.
Accuracy on 256 held-out questions at temperature 1 goes from about 0.25 to over 0.95, format from 0.8 to 0.99, response
length from 22 to 46 tokens; the reward passes 1.75 of 2 at update 10.
"""

from grpo_jax import config as grpo_config
from grpo_jax.types import UserError


def get_config(preset: str = "tiny"):
    if preset != "tiny":
        raise UserError(f"expected a preset of configs/r1zero.py: tiny; found {preset!r}")
    return grpo_config.default()
