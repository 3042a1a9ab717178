"""DAPO: a higher upper clip, a mean over all tokens, a penalty for overlong completions, no groups of equal rewards.

    python -m grpo_jax.main --config=configs/dapo.py[:PRESET] --workdir=runs/dapo

Paper: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv 2503.14476. Script: verl,
recipe/dapo/run_dapo_qwen2.5_32b.sh (now in verl-recipe, dapo/).

    loss = -1/(sum_i |o_i|) sum_i sum_t min(rho A_i, clip(rho, 1 - 0.2, 1 + 0.28) A_i)        equation 8
    A_i  = (r_i - mean(r)) / sigma(r)
    r_i  = 1 if the answer is correct, else -1, plus R_len
    R_len falls from 0 to -1 over the last C of L tokens                                      equation 13

Published, in section 4.1 unless noted:

    loss.clip_low, clip_high    0.2, 0.28
    loss.clip_dual              10 (script)
    loss.aggregate              token
    loss.kl_coef                0 (section 2.3)
    groups.equal                drop, then refill (section 3.2)
    rollout                     512 prompts x 16 completions, 2,048 + 20,480 tokens, temperature 1
    rollout.overlong            soft, C = rollout.overlong_cache = 4,096
    train.minibatches           16, of 512 completions each
    optim.lr, optim.schedule    1e-6, constant
    optim.warmup_steps          20 rollouts, 320 updates (10 rollouts in the script)
    optim.weight_decay          0.1 (script)
    optim.grad_clip             1 (script)
    eval                        temperature 1, top-p 0.7

Not published: ours are Adam's betas (0.9 and 0.95) and the number of updates (8,000).

Problems: DAPO-Math-17k. The paper evaluates with 32 completions per problem; we evaluate with one.

Differences: DAPO samples until 512 groups have both correct and wrong answers (dynamic sampling). We drop groups
of equal rewards and do not replace them, so updates have fewer completions; refilling is not implemented. As R_len is
part of the reward, we keep a group of correct completions if some of them are overlong. The reward of -1 or 1 is
implemented as 2 times the accuracy, which differs by a constant that cancels with the group's mean. The script divides
by the standard deviation with G - 1; the paper and this config use the one with G.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def dapo(cfg):
    """Sets the values of the recipe that do not depend on the model, except rollout.overlong_cache."""
    cfg.loss.clip_low, cfg.loss.clip_high, cfg.loss.clip_dual = 0.2, 0.28, 10.0
    cfg.loss.aggregate = "token"
    cfg.loss.kl_coef = 0.0
    cfg.groups.equal = "drop"
    cfg.rollout.overlong = "soft"
    cfg.reward.parts, cfg.reward.weights = ("accuracy",), (2.0,)
    return cfg


def tiny():
    """Trains the tiny base model that comes with the package.

    python -m grpo_jax.main --config=configs/dapo.py --workdir=runs/dapo

    On 1 device: takes about one minute on two CPU cores. Makes four updates per rollout. The penalty falls over the
    last 8 of 56 tokens (ours). Accuracy on held-out problems rises from about 0.2 to more than 0.97.
    """
    cfg = tiny_model(dapo(config.default()))
    cfg.rollout.overlong_cache = 8
    return cfg


def qwen25_32b():
    """Trains Qwen2.5-32B, the model of the paper: 524 GB of state.

    python -m grpo_jax.main --config=configs/dapo.py:qwen2.5-32b --workdir=runs/dapo-qwen2.5-32b

    On v5p:4x4x8: rollouts take 78.7 and updates 34.5 of 95.7 GiB, including 2.9 of state; about 343 s a step
    On h100:128: rollouts take 64.8 and updates 26.4 of 79.1 GiB, including 2.9 of state; about 236 s a step

    The script uses 128 GPUs.
    """
    cfg = hub_model(
        dapo(config.default()),
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
    cfg.optim.warmup_steps, cfg.optim.weight_decay, cfg.optim.grad_clip = 20 * 16, 0.1, 1.0
    cfg.eval.temperature, cfg.eval.top_p = 1.0, 0.7
    return cfg


PRESETS = {"tiny": tiny, "qwen2.5-32b": qwen25_32b}


def get_config(preset: str = "tiny"):
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/dapo.py")
