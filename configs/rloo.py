"""RLOO: REINFORCE with the mean reward of the other completions as the baseline, and the KL penalty in the reward.

    python -m grpo_jax.main --config=configs/rloo.py[:PRESET] --workdir=runs/rloo

Paper: Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
LLMs", arXiv 2402.14740.

    loss = -1/N sum_i A_i log pi(o_i),   A_i = R_i - mean of the R_j of the group with j != i
    R_i  = r_i - 0.03 (log pi_old(o_i) - log pi_ref(o_i))

Published (appendix C, for TL;DR summaries, as TRL's index of papers quotes it):

    advantage.mean, std         leave_one_out, none
    loss.kl_coef, kl, kl_in     0.03, k1 summed over the completion, reward
    rollout                     512 completions, here 256 prompts x 2; the paper also has 4 completions per prompt
    train.minibatches           2
    optim.lr                    1e-6

Not published: ours are loss.clip_high (0.2), the lengths (512 + 1,024 tokens), Adam's betas (0.9 and 0.95), weight
decay (0), warm-up (none), the gradient clip (1) and the number of updates (1,000).

What differs: the paper has no ratio. A loss with loss.ratio=detached has the same gradient while the policy is the one
that sampled; in later updates its weight is the ratio of each token, at most 1 + loss.clip_high. log pi(o_i) is a sum
over tokens; we divide it by the constant rollout.max_tokens, which only scales the gradient. The paper's reward is a
model of human preferences, and its policies were fine-tuned before; ours has rule-based rewards.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def rloo(cfg):
    """Sets what the recipe prescribes for any model; loss.constant_length is the longest completion."""
    cfg.advantage.mean, cfg.advantage.std = "leave_one_out", "none"
    cfg.loss.ratio, cfg.loss.clip_high = "detached", 0.2
    cfg.loss.aggregate, cfg.loss.constant_length = "constant", cfg.rollout.max_tokens
    cfg.loss.kl_coef, cfg.loss.kl, cfg.loss.kl_in = 0.03, "k1", "reward"
    return cfg


def tiny():
    """The tiny base model of the package.

    python -m grpo_jax.main --config=configs/rloo.py --workdir=runs/rloo

    On 1 device: two CPU cores, minutes. Four updates per rollout.
    """
    return tiny_model(rloo(config.default()))


def llama_7b():
    """Llama-7B, one of the paper's two models: 121 GB of state.

    python -m grpo_jax.main --config=configs/rloo.py:llama-7b --workdir=runs/rloo-llama-7b

    On 8 devices of 80 GB or more (8 x H100, TPU v5p-16). The other model, Pythia-6.9B, is of a family that this package
    does not load; the published batch and KL coefficient are those of its runs.
    """
    cfg = hub_model(
        rloo(config.default()),
        "huggyllama/llama-7b",
        prompts=256,
        samples=2,
        max_tokens=1024,
        lr=1e-6,
        minibatches=2,
    )
    cfg.loss.constant_length = cfg.rollout.max_tokens
    return cfg


PRESETS = {"tiny": tiny, "llama-7b": llama_7b}


def get_config(preset: str = "tiny"):
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/rloo.py")
