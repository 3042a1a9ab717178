"""GRPO in a few plain functions: rewards, log-probs, learning rate and AdamW; the loss is in `losses`."""

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


def overlong_penalty(length, limit, cache):
    """Returns 0 up to `limit - cache` tokens, and less by 1 / cache for each further token."""
    return -max(0, length - (limit - cache)) / max(cache, 1)


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
    finite = jnp.where(is_token, log_probs, 0.0)  # -inf would make the gradient NaN
    entropies = -jnp.sum(jnp.where(is_token, jnp.exp(finite) * finite, 0.0), axis=-1)
    return jnp.where(rows["mask"], chosen, 0.0), jnp.where(rows["mask"], entropies, 0.0)


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


def adamw_change(optim, weights, mu, nu, count, rate):
    """Returns what an update adds to the weights, given the moments of `count` gradients. Norms do not decay."""
    change = {}
    for name, x in weights.items():
        mean, square = mu[name] / (1 - optim["b1"] ** count), nu[name] / (1 - optim["b2"] ** count)
        decay = 0.0 if "norm" in name else optim["weight_decay"]
        change[name] = -rate * (mean / (np.sqrt(square) + optim["eps"]) + decay * x)
    return change
