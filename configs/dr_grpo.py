"""Dr. GRPO: divides neither advantages by the standard deviation nor losses by the length of a completion.

    python -m grpo_jax.main --config=configs/dr_grpo.py[:PRESET] --workdir=runs/dr_grpo

Paper: Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv 2503.20783, section 3. Script:
sail-sg/understand-r1-zero, examples/qwen2.5-math-7b.sh.

    loss = -1/N sum_i 1/L sum_t min(rho A_i, clip(rho, 1 - 0.2, 1 + 0.2) A_i)        L is a constant
    A_i  = r_i - mean(r)

Published (paper and script):

    advantage.std               none
    loss.aggregate              constant; L is the longest completion, 3,000 tokens
    loss.clip_low, clip_high    0.2
    loss.kl_coef                0 (--beta)
    rollout                     128 prompts x 8 completions, 1,024 + 3,000 tokens, temperature 1
    rollout.overlong            zero: a truncated completion has reward 0
    train.minibatches           8, of 128 completions each; one epoch
    optim.lr, optim.schedule    1e-6, constant
    reward                      accuracy, 0 or 1
    eval                        greedy, every 16 rollouts

Not published: ours are Adam's betas (0.9 and 0.95), weight decay (0), warm-up (none) and the gradient clip (1).

Differences: the script makes 20 passes over its 8,500 problems (MATH, levels 3 to 5), which is about 1,330 rollouts;
total_steps is 8 times that. The script supports R1's template and Qwen-Math's; we use R1's, and completions end at
</answer>.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def dr_grpo(cfg):
    """Sets the values of the recipe that do not depend on the model; loss.constant_length is the longest completion."""
    cfg.advantage.std = "none"
    cfg.loss.aggregate, cfg.loss.constant_length = "constant", cfg.rollout.max_tokens
    cfg.loss.kl_coef = 0.0
    cfg.rollout.overlong = "zero"
    cfg.reward.parts, cfg.reward.weights = ("accuracy",), (1.0,)
    return cfg


def tiny():
    """Trains the tiny base model that comes with the package.

    python -m grpo_jax.main --config=configs/dr_grpo.py --workdir=runs/dr_grpo

    On 1 device: takes about one minute on two CPU cores. Makes four updates per rollout. Accuracy on held-out problems
    rises from about 0.2 to more than 0.97.
    """
    return tiny_model(dr_grpo(config.default()))


def qwen25_math_7b():
    """Trains Qwen2.5-Math-7B, the model of the script: 122 GB of state.

    python -m grpo_jax.main --config=configs/dr_grpo.py:qwen2.5-math-7b --workdir=runs/qwen2.5-math-7b

    On v5p:2x2x2: rollouts take 54.8 and updates 27.7 of 95.7 GiB, including 10.6 of state; about 22 s a step
    On h100:8: rollouts take 54.2 and updates 21.3 of 79.1 GiB, including 10.6 of state; about 12 s a step

    The paper used 8 x A100 for 27 hours.
    """
    cfg = hub_model(
        dr_grpo(config.default()),
        "Qwen/Qwen2.5-Math-7B",
        prompts=128,
        samples=8,
        max_prompt_tokens=1024,
        max_tokens=3000,
        lr=1e-6,
        minibatches=8,
        steps=8 * 1330,
    )
    cfg.loss.constant_length = cfg.rollout.max_tokens
    cfg.eval.every_steps, cfg.eval.temperature = 8 * 16, 0.0
    return cfg


PRESETS = {"tiny": tiny, "qwen2.5-math-7b": qwen25_math_7b}


def get_config(preset: str = "tiny"):
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/dr_grpo.py")
