"""Pretraining of the tiny base: the loss, and a folder that everything else reads."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import config as configs
from grpo_jax import forward, load
from grpo_jax.errors import UserError
from grpo_jax.tiny.pretrain import corpus_batch, next_token_loss, pretrain
from grpo_jax.weights.tokenizer import load_tokenizer
from tests.tiny import CONFIG, params

TOKENS = jnp.asarray([[5, 9, 2, 7], [3, 3, 0, 0]])
MASK = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], bool)


def test_loss_of_equal_logits_is_the_log_of_the_ids():
    """45 ids that can be drawn, of 48 rows."""
    flat = jax.tree.map(jnp.zeros_like, params())
    np.testing.assert_allclose(next_token_loss(CONFIG, flat, TOKENS, MASK), np.log(45), rtol=1e-6)


def test_loss_is_the_mean_over_real_tokens_but_the_first():
    """3 tokens of the first row, 1 of the second."""
    logps = jax.nn.log_softmax(forward(CONFIG, params(), TOKENS)[..., :45])
    expected = -(logps[0, 0, 9] + logps[0, 1, 2] + logps[0, 2, 7] + logps[1, 0, 3]) / 4
    np.testing.assert_allclose(next_token_loss(CONFIG, params(), TOKENS, MASK), expected, rtol=1e-5)
    other = TOKENS.at[1, 2:].set(44)
    np.testing.assert_allclose(next_token_loss(CONFIG, params(), other, MASK), expected, rtol=1e-5)


def small():
    raw = configs.pretrain_default()
    raw.total_steps, raw.batch.rows, raw.log.every_steps, raw.optim.warmup_steps = 12, 8, 4, 2
    raw.model.hidden_size, raw.model.intermediate_size, raw.model.num_layers, raw.model.head_dim = 32, 32, 1, 8
    return configs.check_pretrain(raw)


def test_it_learns_and_writes_a_model_folder(tmp_path, capsys):
    cfg = small()
    folder = pretrain(cfg, tmp_path)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[0] > losses[-1] + 0.1
    model, weights = load(folder)
    tokenizer = load_tokenizer(folder)
    assert model.eos_ids == (tokenizer.eos_token_id,) and model.tokenizer_vocab_size == len(tokenizer)
    assert np.isfinite(forward(model, weights, jnp.asarray([tokenizer("What is 3?")["input_ids"]]))).all()
    with pytest.raises(UserError, match="without a model"):
        pretrain(cfg, tmp_path)


def test_rows_of_a_step_are_its_own():
    from grpo_jax.tiny.corpus import corpus_text, train_tokenizer

    cfg = small()
    tokenizer = train_tokenizer([corpus_text(1, i, 3, 3) for i in range(50)], 512)
    first, again, second = (corpus_batch(tokenizer, cfg, step) for step in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[0] != second[0]).any(axis=1).all()
    assert first[1].any() and (first[0][~first[1]] == 0).all()
