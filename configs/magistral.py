"""Magistral: centered advantages divided by the batch's standard deviation, four reward parts, no KL penalty.

    python -m grpo_jax.main --config=configs/magistral.py[:PRESET] --workdir=runs/magistral

Paper: Mistral AI, "Magistral", arXiv 2506.10910, section 2.

    loss = -1/(sum_i |o_i|) sum_i sum_t min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i)        per group
    A_i  = (r_i - mean(r)) / sigma_batch
    r_i  = 0.1 format + 0.9 accuracy + 0.1 length + 0.1 language;   length falls from 0 to -1 over the last C tokens

Published, in section 2 unless noted:

    advantage.mean, std         group, batch
    loss.clip_high              0.26 to 0.28 for Magistral Medium, 0.3 for Magistral Small
    loss.aggregate              prompt
    loss.kl_coef                0
    groups.equal                drop
    reward.weights              0.1 format, 0.9 accuracy, 0.1 length, 0.1 language
    batch                       8,192, then 4,096, then 2,048 completions, as lengths grow from 16k to 24k to 32k

Not published: ours are loss.clip_low (0.2), G (16), the learning rate (1e-6), rollout.overlong_cache (4,096), one
update per rollout, Adam's betas (0.9 and 0.95), weight decay (0), warm-up (none), the gradient clip (1), and the number
of updates (1,000).

Differences: the paper normalizes the centered advantages over the minibatch; we divide by the standard deviation of
the raw rewards of the whole rollout, which is larger if problems differ in difficulty. In the paper, a completion with
a wrong format gets no reward at all; here the parts are simply added. Batch size and length are those of the last
stage, because they cannot change during a run. The target language is reward.language, identified by its script, and
the part is the fraction of words in it; the paper rewards completions that are entirely in the language of the problem.
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model, tiny_model


def magistral(cfg):
    """Sets the values of the recipe that do not depend on the model, except rollout.overlong_cache."""
    cfg.advantage.std = "batch"
    cfg.loss.clip_high = 0.28
    cfg.loss.aggregate = "prompt"
    cfg.loss.kl_coef = 0.0
    cfg.groups.equal = "drop"
    cfg.reward.parts = ("format", "accuracy", "length", "language")
    cfg.reward.weights = (0.1, 0.9, 0.1, 0.1)
    return cfg


def tiny():
    """Trains the tiny base model that comes with the package.

    python -m grpo_jax.main --config=configs/magistral.py --workdir=runs/magistral

    On 1 device: takes about one minute on two CPU cores. Makes four updates per rollout. The length part falls over the
    last 8 of 56 tokens (ours). Accuracy on held-out problems rises from about 0.2 to more than 0.97.
    """
    cfg = tiny_model(magistral(config.default()))
    cfg.rollout.overlong_cache = 8
    return cfg


def mistral_small_24b():
    """Trains Mistral-Small-24B, the base of Magistral Small, with the upper clip of 0.3: 377 GB of state.

    python -m grpo_jax.main --config=configs/magistral.py:mistral-small-24b --workdir=runs/mistral-small-24b

    On v5p:2x4x4: rollouts take 83.4 and updates 54.4 of 95.7 GiB, including 8.2 of state; about 6,253 s a step
    On h100:32: rollouts take 69.1 and updates 36.9 of 79.1 GiB, including 8.2 of state; about 4,509 s a step

    Completions have up to 32,000 tokens, so that they fit with the prompt into the model's 32,768 positions.
    Magistral Small was first fine-tuned on completions of Magistral Medium.
    """
    cfg = hub_model(
        magistral(config.default()),
        "mistralai/Mistral-Small-24B-Instruct-2501",
        prompts=128,
        samples=16,
        max_tokens=32000,
        lr=1e-6,
        tensor=4,
    )
    cfg.loss.clip_high = 0.3
    cfg.rollout.overlong_cache = 4096
    return cfg


PRESETS = {"tiny": tiny, "mistral-small-24b": mistral_small_24b}


def get_config(preset: str = "tiny"):
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/magistral.py")
