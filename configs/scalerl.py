"""ScaleRL: CISPO's loss, advantages divided by the standard deviation of the batch, and a mean over prompts.

    python -m grpo_jax.main --config=configs/scalerl.py[:PRESET] --workdir=runs/scalerl

Paper: Khatri et al., "The Art of Scaling Reinforcement Learning Compute for LLMs", arXiv 2510.13786, appendix A.3.
Code: TRL, ScaleRLTrainer.

    loss = -mean_q [ 1/(sum_i |o_i|) sum_i sum_t sg(min(rho, epsilon)) A_i log pi ]        sums over the group of q
    A_i  = (r_i - mean(r)) / sigma_batch,   r_i = 1 or -1

Published, in appendix A.3 unless noted:

    loss.ratio                  detached; pi_old is the sampler's probability
    loss.clip_high              4, as epsilon = 1 + 4 = 5; values from 4 to 8 perform alike, and TRL uses 5
    advantage.mean, std         group, batch
    loss.aggregate              prompt
    loss.kl_coef                0
    groups.equal                drop
    rollout                     48 prompts x 16 completions, 2,048 + 14,336 (12,288 thinking, 2,048 answer) tokens
    optim.lr, warmup_steps      5e-7, 100
    optim.weight_decay, eps     0.01, 1e-15
    model.logit_dtype           float32, which is the default

Not published: ours are the 8B model (Llama-3.1-8B), Adam's betas (0.9 and 0.95), the gradient clip (1) and the number
of updates (1,000).

Problems: Polaris-53K.

Differences: the paper samples and learns asynchronously, from rollouts that are up to 8 updates old. Here sampling and
learning alternate, so the ratio of the full preset is 1 up to rounding; rollout.prompts=384 and train.minibatches=8
keep 48 prompts per update and make rollouts up to 7 updates old. We divide by the standard deviation of the rollout's
raw rewards; the paper normalizes the centered advantages of the batch, and TRL uses a running average. The paper
interrupts long thinking with a forced sentence, whereas we truncate it. It also drops problems whose pass rate has
reached 0.9, which we do not. The reward of -1 or 1 is implemented as 2 times the accuracy, which differs by a constant
that cancels with the group's mean.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def scalerl(cfg):
    """Sets the values of the recipe that do not depend on the model."""
    cfg.loss.ratio, cfg.loss.clip_high = "detached", 4.0
    cfg.advantage.std = "batch"
    cfg.loss.aggregate = "prompt"
    cfg.loss.kl_coef = 0.0
    cfg.groups.equal = "drop"
    cfg.optim.weight_decay, cfg.optim.eps = 0.01, 1e-15
    cfg.reward.parts, cfg.reward.weights = ("accuracy",), (2.0,)
    return cfg


def tiny():
    """Trains the tiny base model that comes with the package.

    python -m grpo_jax.main --config=configs/scalerl.py --workdir=runs/scalerl

    On 1 device: takes about one minute on two CPU cores. Makes four updates per rollout. Accuracy on held-out problems
    rises from about 0.2 to more than 0.97.
    """
    return tiny_model(scalerl(config.default()))


def llama31_8b():
    """Trains Llama-3.1-8B, a dense model of the paper's size: 128 GB of state.

    python -m grpo_jax.main --config=configs/scalerl.py:llama3.1-8b --workdir=runs/scalerl-llama3.1-8b

    On v5p:2x2x2: rollouts take 83.3 and updates 47.4 of 95.7 GiB, including 11.2 of state; about 2,015 s a step
    On h100:8: rollouts take 68.3 and updates 31.4 of 79.1 GiB, including 11.2 of state; about 1,225 s a step
    """
    cfg = hub_model(
        scalerl(config.default()),
        "meta-llama/Llama-3.1-8B",
        prompts=48,
        samples=16,
        max_prompt_tokens=2048,
        max_tokens=12288 + 2048,
        lr=5e-7,
    )
    cfg.optim.warmup_steps = 100
    return cfg


PRESETS = {"tiny": tiny, "llama3.1-8b": llama31_8b}


def get_config(preset: str = "tiny"):
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/scalerl.py")
