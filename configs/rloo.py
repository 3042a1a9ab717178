"""RLOO: REINFORCE with the mean reward of the other completions as the baseline, and a KL penalty in the reward.

    python -m grpo_jax.main --config=configs/rloo.py[:PRESET] --workdir=runs/rloo

Paper: Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
LLMs", arXiv 2402.14740.

    loss = -1/N sum_i A_i log pi(o_i),   A_i = R_i - mean of the R_j of the group with j != i
    R_i  = r_i - 0.03 (log pi_old(o_i) - log pi_ref(o_i))

Published (appendix C, for TL;DR summaries, as quoted in TRL's index of papers):

    advantage.mean, std         leave_one_out, none
    loss.kl_coef, kl, kl_in     0.03, k1 summed over the completion, in the reward
    rollout                     512 completions, here 256 prompts x 2; the paper also uses 4 completions per prompt
    train.minibatches           2
    optim.lr                    1e-6

Not published: ours are loss.clip_high (0.2), the lengths (512 + 1,024 tokens), Adam's betas (0.9 and 0.95), weight
decay (0), warm-up (none), the gradient clip (1) and the number of updates (1,000).

Differences: the paper has no ratio. loss.ratio=detached gives the same gradient while the policy is the one that
sampled; in later updates, each token is weighted with its ratio, at most 1 + loss.clip_high. log pi(o_i) is a sum over
tokens; we divide it by the constant rollout.max_tokens, which only scales the gradient. The paper uses a model of human
preferences as the reward and starts from fine-tuned policies; we use rule-based rewards.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def rloo(cfg):
    """Sets the values of the recipe that do not depend on the model; loss.constant_length is the longest completion."""
    cfg.advantage.mean, cfg.advantage.std = "leave_one_out", "none"
    cfg.loss.ratio, cfg.loss.clip_high = "detached", 0.2
    cfg.loss.aggregate, cfg.loss.constant_length = "constant", cfg.rollout.max_tokens
    cfg.loss.kl_coef, cfg.loss.kl, cfg.loss.kl_in = 0.03, "k1", "reward"
    return cfg


def tiny():
    """Trains the tiny base model that comes with the package.

    python -m grpo_jax.main --config=configs/rloo.py --workdir=runs/rloo

    On 1 device: takes about one minute on two CPU cores. Makes four updates per rollout. Accuracy on held-out problems
    rises from about 0.2 to more than 0.97.
    """
    return tiny_model(rloo(config.default()))


def llama_7b():
    """Trains Llama-7B, one of the paper's two models: 121 GB of state.

    python -m grpo_jax.main --config=configs/rloo.py:llama-7b --workdir=runs/rloo-llama-7b

    On v5p:2x2x2: rollouts take 68.6 and updates 28.0 of 95.7 GiB, including 11.0 of state; about 24 s a step
    On h100:8: rollouts take 57.5 and updates 21.3 of 79.1 GiB, including 11.0 of state; about 22 s a step

    This package does not support the family of the other model, Pythia-6.9B, for whose runs the batch size and KL
    coefficient were published.
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
