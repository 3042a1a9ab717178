"""JustRL: GRPO with a higher upper clip and a mean over all tokens, and nothing else, for thousands of rollouts.

    python -m grpo_jax.main --config=configs/justrl.py[:PRESET] --workdir=runs/justrl

Paper: He et al., "JustRL: Scaling a 1.5B LLM with a Simple RL Recipe", arXiv 2512.16649. Script: thunlp/JustRL,
train/examples/justrl/run_scaling_ssh_distill.sh.

    loss = -1/(sum_i |o_i|) sum_i sum_t min(rho A_i, clip(rho, 1 - 0.2, 1 + 0.28) A_i)
    A_i  = (r_i - mean(r)) / sigma(r)

Published (script):

    loss.clip_low, clip_high    0.2, 0.28
    loss.clip_dual              10
    loss.aggregate              token
    loss.kl_coef                0
    loss.entropy_coef           0
    rollout                     256 prompts x 8 completions, 1,024 + 15,360 tokens, temperature 1
    train.minibatches           4, of 64 prompts each
    optim.lr, optim.schedule    1e-6, constant
    optim.warmup_steps          10 rollouts, 40 updates
    optim.weight_decay          0.1
    optim.grad_clip             1
    reward                      accuracy; no penalty on length, no dynamic sampling
    eval                        every 50 rollouts at temperature 0.7 and top-p 0.9
    total_steps                 more than 4,000 rollouts (abstract); ours: 4,000, which are 16,000 updates

Not published: ours are Adam's betas (0.9 and 0.95).

Differences: the script divides by the standard deviation with G - 1; we divide by the one with G. Its evaluations
allow 31,744 tokens and sample 32 completions per problem; ours allow rollout.max_tokens and sample one.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def justrl(cfg):
    """Sets the values of the recipe that do not depend on the model."""
    cfg.loss.clip_low, cfg.loss.clip_high, cfg.loss.clip_dual = 0.2, 0.28, 10.0
    cfg.loss.aggregate = "token"
    cfg.loss.kl_coef = 0.0
    cfg.optim.weight_decay = 0.1
    cfg.train.minibatches = 4
    cfg.reward.parts, cfg.reward.weights = ("accuracy",), (1.0,)
    return cfg


def tiny():
    """Trains the tiny base model that comes with the package.

    python -m grpo_jax.main --config=configs/justrl.py --workdir=runs/justrl

    On 1 device: takes about one minute on two CPU cores. Makes four updates per rollout. Accuracy on held-out problems
    rises from about 0.2 to more than 0.97.
    """
    return tiny_model(justrl(config.default()))


def deepseek_r1_distill_qwen_15b():
    """Trains DeepSeek-R1-Distill-Qwen-1.5B, the first of the paper's two models: 28 GB of state.

    python -m grpo_jax.main --config=configs/justrl.py:deepseek-r1-distill-qwen-1.5b --workdir=runs/justrl-1.5b

    On v5p:2x4x4: rollouts take 32.3 and updates 12.2 of 95.7 GiB, including 0.6 of state; about 68 s a step
    On h100:32: rollouts take 32.2 and updates 6.0 of 79.1 GiB, including 0.6 of state; about 46 s a step
    """
    cfg = hub_model(
        justrl(config.default()),
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        prompts=256,
        samples=8,
        max_prompt_tokens=1024,
        max_tokens=15360,
        lr=1e-6,
        minibatches=4,
        steps=16000,
    )
    cfg.optim.warmup_steps = 10 * 4
    cfg.eval.every_steps, cfg.eval.temperature, cfg.eval.top_p = 50 * 4, 0.7, 0.9
    return cfg


PRESETS = {"tiny": tiny, "deepseek-r1-distill-qwen-1.5b": deepseek_r1_distill_qwen_15b}


def get_config(preset: str = "tiny"):
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/justrl.py")
