"""CISPO: the ratio is bounded and detached, so that every token keeps its gradient.

    python -m grpo_jax.main --config=configs/cispo.py[:PRESET] --workdir=runs/cispo

Paper: MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", arXiv 2506.13585, section
3.1.

    loss = -1/(sum_i |o_i|) sum_i sum_t sg(min(rho, 1 + clip_high)) A_i log pi        per group, then averaged
    A_i  = (r_i - mean(r)) / sigma(r)

Published, in section 3:

    loss.ratio                  detached
    loss.aggregate              prompt
    loss.kl_coef                0
    groups.equal                drop, then refill, as in DAPO
    rollout.overlong            soft, as in DAPO
    train.minibatches           16
    optim.b1, b2, eps           0.9, 0.95, 1e-15
    model.logit_dtype           float32, which is the default

Not published: ours are loss.clip_high (0.28, so that the weight is at most 1.28), the learning rate (1e-6), the batch
(512 x 16), the lengths (2,048 + 20,480 tokens), rollout.overlong_cache (4,096), weight decay (0), warm-up (none), the
gradient clip (1), the number of updates (8,000) and the reward of the run on Qwen2.5-32B (accuracy).

Differences: there is no lower bound, because the paper disables its own. Implementations define the upper bound
differently: an epsilon of 5 gives a largest weight of 5 in TRL, but 6 here, because clip_high is an offset. This
package does not support the attention of MiniMax-M1 itself, so the preset trains the model on which the paper compares
CISPO with DAPO. Dropped groups are not refilled. Unlike the paper, we do not stop a completion after 3,000 tokens in a
row with a probability above 0.99.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def cispo(cfg):
    """Sets the values of the recipe that do not depend on the model, except rollout.overlong_cache."""
    cfg.loss.ratio, cfg.loss.clip_high = "detached", 0.28
    cfg.loss.aggregate = "prompt"
    cfg.loss.kl_coef = 0.0
    cfg.groups.equal = "drop"
    cfg.rollout.overlong = "soft"
    cfg.optim.b1, cfg.optim.b2, cfg.optim.eps = 0.9, 0.95, 1e-15
    cfg.reward.parts, cfg.reward.weights = ("accuracy",), (1.0,)
    return cfg


def tiny():
    """Trains the tiny base model that comes with the package.

    python -m grpo_jax.main --config=configs/cispo.py --workdir=runs/cispo

    On 1 device: takes about one minute on two CPU cores. Makes four updates per rollout. The last 8 of 56 tokens cost
    reward (ours). Accuracy on held-out problems rises from about 0.2 to more than 0.97.
    """
    cfg = tiny_model(cispo(config.default()))
    cfg.optim.lr = 1e-4
    cfg.rollout.overlong_cache = 8
    return cfg


def qwen25_32b():
    """Trains Qwen2.5-32B, on which the paper compares CISPO with GRPO and DAPO: 524 GB of state.

    python -m grpo_jax.main --config=configs/cispo.py:qwen2.5-32b --workdir=runs/cispo-qwen2.5-32b

    On v5p:4x4x8: rollouts take 78.7 and updates 34.5 of 95.7 GiB, including 2.9 of state; about 343 s a step
    On h100:128: rollouts take 64.8 and updates 26.4 of 79.1 GiB, including 2.9 of state; about 236 s a step
    """
    cfg = hub_model(
        cispo(config.default()),
        "Qwen/Qwen2.5-32B",
        prompts=512,
        samples=16,
        max_prompt_tokens=2048,
        max_tokens=20480,
        lr=1e-6,
        minibatches=16,
        steps=8000,
        tensor=4,
    )
    cfg.rollout.overlong_cache = 4096
    return cfg


PRESETS = {"tiny": tiny, "qwen2.5-32b": qwen25_32b}


def get_config(preset: str = "tiny"):
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/cispo.py")
