"""The tiny base model that the package carries, from nothing.

    python -m grpo_jax.main --config=configs/pretrain_tiny.py --workdir=runs/pretrain_tiny
    cp runs/pretrain_tiny/model/* grpo_jax/tiny/base/

853,120 parameters; 800 steps of 64 x 192 tokens of the synthetic corpus (grpo_jax/corpus.py), seed 0. On two CPU cores:
26 minutes beside other work (about 1 s a step alone), loss 0.256 nats a token over the last 50 steps. On 256 held-out
questions at temperature 1 the model it made has accuracy 0.25, format 0.80 and 22 tokens a response.
"""

from grpo_jax import config as grpo_config
from grpo_jax.errors import UserError


def get_config(preset: str = ""):
    if preset:
        raise UserError(f"expected no preset of configs/pretrain_tiny.py; found {preset!r}")
    return grpo_config.pretrain_default()
