"""GSPO: one ratio per completion, the geometric mean of the ratios of its tokens, with a narrow clip.

    python -m grpo_jax.main --config=configs/gspo.py[:PRESET] --workdir=runs/gspo

Paper: Zheng et al., "Group Sequence Policy Optimization", arXiv 2507.18071, equations 5 to 7.

    loss = -1/N sum_i min(s_i A_i, clip(s_i, 1 - 3e-4, 1 + 4e-4) A_i),   s_i = exp(mean_t log rho_it)
    A_i  = (r_i - mean(r)) / sigma(r)

--config.loss.ratio=sequence_token selects the token form, whose ratio has the same value but a separate gradient for
each token. The two forms are equal here, because all tokens of a completion have the same advantage.

Published, in section 5.1:

    loss.ratio                  sequence
    loss.clip_low, clip_high    3e-4, 4e-4
    train.minibatches           4
    loss.kl_coef                0: equation 5 has no KL term

Not published: ours are the learning rate (1e-6), the batch (128 x 16), the lengths (512 + 8,192 tokens), Adam's betas
(0.9 and 0.95), weight decay (0), warm-up (none), the gradient clip (1), the number of updates (1,000) and the reward
(accuracy).

Differences: the paper starts from a fine-tuned Qwen3-30B-A3B-Base, we start from the base model. The clip is so narrow
because a mean of log-ratios varies far less than a single one; still, the paper reports that it clips 15% of the
tokens, against 0.13% with GRPO.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def gspo(cfg):
    """Sets the values of the recipe that do not depend on the model."""
    cfg.loss.ratio = "sequence"
    cfg.loss.clip_low, cfg.loss.clip_high = 3e-4, 4e-4
    cfg.loss.kl_coef = 0.0
    cfg.train.minibatches = 4
    cfg.reward.parts, cfg.reward.weights = ("accuracy",), (1.0,)
    return cfg


def tiny():
    """Trains the tiny base model that comes with the package.

    python -m grpo_jax.main --config=configs/gspo.py --workdir=runs/gspo

    On 1 device: takes about one minute on two CPU cores. Makes four updates per rollout. Accuracy on held-out problems
    rises from about 0.2 to more than 0.97.
    """
    return tiny_model(gspo(config.default()))


def qwen3_30b_a3b():
    """Trains Qwen3-30B-A3B-Base, from which the model of the paper was fine-tuned: 489 GB of state.

    python -m grpo_jax.main --config=configs/gspo.py:qwen3-30b-a3b --workdir=runs/gspo-qwen3-30b-a3b

    On 64 devices of 80 GB or more (64 x H100, TPU v5p-128): experts are sharded 8 ways, and so are their matrices.
    """
    return hub_model(
        gspo(config.default()),
        "Qwen/Qwen3-30B-A3B-Base",
        prompts=128,
        samples=16,
        max_tokens=8192,
        lr=1e-6,
        minibatches=4,
        expert=8,
    )


PRESETS = {"tiny": tiny, "qwen3-30b-a3b": qwen3_30b_a3b}


def get_config(preset: str = "tiny"):
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/gspo.py")
