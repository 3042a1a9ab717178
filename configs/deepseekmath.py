"""GRPO as DeepSeekMath introduced it: standardized advantages, a KL penalty in the loss, one update per rollout.

    python -m grpo_jax.main --config=configs/deepseekmath.py[:PRESET] --workdir=runs/deepseekmath

Paper: Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", arXiv
2402.03300, equations 3 and 4.

    loss = -1/N sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i) - 0.04 k3 ]
    A_i  = (r_i - mean(r)) / sigma(r)

Published, in section 4.2:

    loss.kl_coef, loss.kl       0.04, k3
    rollout.samples             64
    rollout.max_tokens          1,024 ("the max length")
    optim.lr                    1e-6
    train.minibatches, .epochs  1, 1: one update per rollout
    batch                       1,024; whether of questions or completions is not published; ours: 16 x 64 completions

Not published: ours are the clip (0.2, which one update per rollout never reaches), Adam's betas (0.9 and 0.95), weight
decay (0), warm-up (none), the gradient clip (1) and the number of updates (1,000).

Differences: the paper uses a trained reward model and questions from its supervised fine-tuning data; we use rule-based
rewards. We reproduce neither its iterative variant, which retrains the reward model and replaces the reference with the
policy, nor process supervision.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def deepseekmath(cfg):
    """Sets the KL coefficient; the other values that do not depend on the model are the defaults."""
    cfg.loss.kl_coef = 0.04
    return cfg


def tiny():
    """Trains the tiny base model that comes with the package.

    python -m grpo_jax.main --config=configs/deepseekmath.py --workdir=runs/deepseekmath

    On 1 device: takes about three minutes on two CPU cores. Makes one update per rollout, as in the paper. Accuracy on
    held-out problems rises from about 0.2 to more than 0.97.
    """
    cfg = tiny_model(deepseekmath(config.default()))
    cfg.rollout.prompts, cfg.train.minibatches = 16, 1
    return cfg


def deepseek_math_7b():
    """Trains DeepSeekMath-Instruct-7B, the model of the paper: 124 GB of state.

    python -m grpo_jax.main --config=configs/deepseekmath.py:deepseek-math-7b --workdir=runs/deepseek-math-7b

    On v5p:2x2x2: rollouts take 74.0 and updates 27.8 of 95.7 GiB, including 11.3 of state; about 99 s a step
    On h100:8: rollouts take 62.8 and updates 21.3 of 79.1 GiB, including 11.3 of state; about 75 s a step

    If the model's repository has no safetensors files, convert its weights first and pass --config.model.path=FOLDER.
    """
    return hub_model(
        deepseekmath(config.default()),
        "deepseek-ai/deepseek-math-7b-instruct",
        prompts=16,
        samples=64,
        max_tokens=1024,
        lr=1e-6,
    )


PRESETS = {"tiny": tiny, "deepseek-math-7b": deepseek_math_7b}


def get_config(preset: str = "tiny"):
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/deepseekmath.py")
