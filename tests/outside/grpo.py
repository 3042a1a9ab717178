"""GRPO in a few plain functions: rewards, advantages, log-probs, loss, learning rate and AdamW."""

import re
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tests.outside import model


def number(text):
    """Returns the value of a written number, or None."""
    try:
        return Fraction(text.strip().rstrip("."))
    except ValueError:
        return None


def accuracy(text, expected):
    """Returns 1 if the last `<answer>...</answer>` of a text holds the expected number, otherwise 0."""
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return float(bool(answers) and number(answers[-1]) == number(expected))


def well_formed(text):
    """Returns 1 if a text is a thought, an answer and nothing else, with each tag once, otherwise 0."""
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    shape = r"\s*<think>.*</think>\s*<answer>.*</answer>\s*"
    return float(once and re.fullmatch(shape, text, re.DOTALL) is not None)


def advantages(rewards):
    """Returns the advantages of rewards `[B, G]`; `np.std` divides by G. A group of equal rewards gives zeros."""
    spread = np.ptp(rewards, axis=1, keepdims=True) > 0
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    return np.where(spread, centered / np.where(spread, rewards.std(axis=1, keepdims=True), 1.0), 0.0)


def score(model_cfg, num_ids, temperature, weights, rows):
    """Computes the log-probs and entropies `[N, S]` of completions at a temperature; 0 after their ends.

    `rows["tokens"]` `[N, L]` holds prompts and completions, `rows["columns"]` `[N, S]` where the completion's tokens
    are, and `rows["mask"]` `[N, S]` which of them exist. Ids from `num_ids` on are padding of the vocabulary.
    """
    logits = jax.vmap(partial(model.logits, model_cfg, weights))(rows["tokens"])
    before = jnp.take_along_axis(logits, rows["columns"][..., None] - 1, axis=1)
    is_token = np.arange(before.shape[-1]) < num_ids
    log_probs = jax.nn.log_softmax(jnp.where(is_token, before / temperature, -jnp.inf))
    targets = jnp.take_along_axis(rows["tokens"], rows["columns"], axis=1)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    entropies = -jnp.sum(jnp.where(is_token, jnp.exp(log_probs) * log_probs, 0.0), axis=-1)
    return jnp.where(rows["mask"], chosen, 0.0), jnp.where(rows["mask"], entropies, 0.0)


def loss(loss_cfg, logps, entropies, old_logps, ref_logps, advantages, mask):
    """Computes the loss of a minibatch and its metrics, including the fraction of tokens that each bound clips."""
    weights = mask / mask.sum(axis=1, keepdims=True) / len(mask)
    A, low, high = advantages[:, None], 1 - loss_cfg["clip_low"], 1 + loss_cfg["clip_high"]
    ratio, ref_ratio = jnp.exp(logps - old_logps), jnp.exp(ref_logps - logps)
    clipped = jnp.clip(ratio, low, high)
    kl = ref_ratio - jnp.log(ref_ratio) - 1
    total = -jnp.sum(weights * (jnp.minimum(ratio * A, clipped * A) - loss_cfg["kl_coef"] * kl))
    return total, {
        "loss/total": total,
        "policy/kl_ref": jnp.sum(weights * kl),
        "policy/clip_frac": jnp.sum(weights * (clipped * A < ratio * A)),
        "policy/ratio_max": jnp.max(ratio),
        "policy/entropy": jnp.sum(weights * entropies),
        "clipped_low": jnp.sum(weights * (clipped * A < ratio * A) * (A < 0)),
        "clipped_high": jnp.sum(weights * (clipped * A < ratio * A) * (A > 0)),
    }


def learning_rate(optim, number):
    """Returns the learning rate of update `number`, counted from 1: linear warm-up, then linear decay."""
    assert optim["schedule"] == "linear"
    warmup, end = optim["warmup_steps"], optim["end_lr_fraction"]
    progress = np.clip((number - 1 - warmup) / (optim["decay_steps"] - warmup), 0, 1)
    return optim["lr"] * min(1, number / warmup) * (1 - (1 - end) * progress)


def global_norm(grads):
    return np.sqrt(sum(np.sum(g * g) for g in grads.values()))


def adamw_moments(optim, mu, nu, grads):
    """Updates Adam's moments with a gradient, which is first clipped to the global norm `grad_clip`."""
    scale = min(1, optim["grad_clip"] / global_norm(grads))
    mu = {name: optim["b1"] * mu[name] + (1 - optim["b1"]) * scale * g for name, g in grads.items()}
    nu = {name: optim["b2"] * nu[name] + (1 - optim["b2"]) * (scale * g) ** 2 for name, g in grads.items()}
    return mu, nu


def adamw_change(optim, weights, mu, nu, number):
    """Returns what update `number` adds to the weights. Weight decay does not apply to norms."""
    change = {}
    for name, x in weights.items():
        step = mu[name] / (1 - optim["b1"] ** number) / (np.sqrt(nu[name] / (1 - optim["b2"] ** number)) + 1e-8)
        decay = 0.0 if "norm" in name else optim["weight_decay"]
        change[name] = -learning_rate(optim, number) * (step + decay * x)
    return change
