"""DPPO: no clip; tokens whose probability has moved too far in the direction of their advantage are left out.

    python -m grpo_jax.main --config=configs/dppo.py[:PRESET] --workdir=runs/dppo

Paper: Qi et al., "Rethinking the Trust Region in LLM Reinforcement Learning", arXiv 2602.04879, the variant Binary-TV.
Script of the authors: verl, examples/dppo_trainer/run_qwen30b_dppo.sh.

    loss = -1/N sum_i 1/L sum_t m_it rho A_i,   A_i = r_i - mean(r)
    m_it = 0 where A_i > 0 and pi - pi_old > delta, or A_i < 0 and pi - pi_old < -delta; else 1

Published, in the script unless noted:

    loss.ratio                  difference (paper); pi_old is the sampler's probability
    loss.clip_difference        0.15, a probability; 0.2 in prime-rl and SkyRL, which adopted the method
    advantage.std               none, as in Dr. GRPO
    loss.aggregate              constant; L is the longest completion
    loss.kl_coef                0
    rollout                     256 prompts x 16 completions, 2,048 + 8,192 tokens, temperature 1
    train.minibatches           8, of 32 prompts each
    optim.lr                    1e-6
    total_steps                 500 rollouts, 4,000 updates
    reward                      1 if the answer is correct, else -1

Not published: ours are Adam's betas (0.9 and 0.95), weight decay (0), warm-up (none) and the gradient clip (1).

Differences: `tiny` uses a bound of 0.2; `qwen3-30b-a3b` uses the script's. The reward of -1 or 1 is implemented as 2
times the accuracy, which differs by a constant that cancels with the group's mean. verl also bounds rho, by default at
20 and in this script at 10,000; we limit log rho to [-20, 20]. Unlike prime-rl, we do not add 1e-3 times the squared
log-ratio.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def dppo(cfg):
    """Sets the values of the recipe that do not depend on the model; loss.constant_length is the longest completion."""
    cfg.loss.ratio, cfg.loss.clip_difference = "difference", 0.2
    cfg.advantage.std = "none"
    cfg.loss.aggregate, cfg.loss.constant_length = "constant", cfg.rollout.max_tokens
    cfg.loss.kl_coef = 0.0
    cfg.reward.parts, cfg.reward.weights = ("accuracy",), (2.0,)
    return cfg


def tiny():
    """Trains the tiny base model that comes with the package.

    python -m grpo_jax.main --config=configs/dppo.py --workdir=runs/dppo

    On 1 device: takes about one minute on two CPU cores. Makes four updates per rollout. Accuracy on held-out problems
    rises from about 0.2 to more than 0.97.
    """
    return tiny_model(dppo(config.default()))


def qwen3_30b_a3b():
    """Trains Qwen3-30B-A3B-Base, the model of the script: 489 GB of state.

    python -m grpo_jax.main --config=configs/dppo.py:qwen3-30b-a3b --workdir=runs/dppo-qwen3-30b-a3b

    On 64 devices of 80 GB or more (64 x H100, TPU v5p-128): experts are sharded 8 ways, and so are their matrices. The
    script uses 16 GPUs and keeps parameters and moments in host memory.
    """
    cfg = hub_model(
        dppo(config.default()),
        "Qwen/Qwen3-30B-A3B-Base",
        prompts=256,
        samples=16,
        max_prompt_tokens=2048,
        max_tokens=8192,
        lr=1e-6,
        minibatches=8,
        steps=4000,
        expert=8,
    )
    cfg.loss.clip_difference, cfg.loss.constant_length = 0.15, cfg.rollout.max_tokens
    return cfg


PRESETS = {"tiny": tiny, "qwen3-30b-a3b": qwen3_30b_a3b}


def get_config(preset: str = "tiny"):
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/dppo.py")
