"""Pretraining of the tiny base: the corpus, the loss, and a model folder that the rest of the package reads."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from grpo_jax import forward, load
from grpo_jax.config.pretrain_schema import PretrainConfig
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import init_params, param_shapes
from grpo_jax.tasks.addition import is_held_out
from grpo_jax.tiny.corpus import corpus_text, train_tokenizer
from grpo_jax.tiny.pretrain import corpus_batch, next_token_loss, pretrain
from grpo_jax.weights.tokenizer import load_tokenizer
from tests.tiny import CONFIG

TOKENS = np.asarray([[5, 9, 2, 7], [3, 3, 0, 0]], np.int32)
MASK = np.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], bool)

loss = jax.jit(next_token_loss, static_argnums=0)


def small_config() -> PretrainConfig:
    """Returns the default config with a smaller model, fewer rows and 12 steps."""
    cfg = PretrainConfig()
    return dataclasses.replace(
        cfg,
        total_steps=12,
        batch=dataclasses.replace(cfg.batch, rows=8),
        log=dataclasses.replace(cfg.log, every_steps=4),
        optim=dataclasses.replace(cfg.optim, warmup_steps=2),
        model=dataclasses.replace(cfg.model, hidden_size=32, intermediate_size=32, num_layers=1, head_dim=8),
    )


def test_the_corpus_never_holds_a_held_out_pair():
    """Pairs are written `a + b`; the steps of a solution have no spaces."""
    texts = [corpus_text(0, i, 3, digits) for i in range(200) for digits in (2, 3)]
    pairs = [tuple(map(int, pair)) for text in texts for pair in re.findall(r"(\d+) \+ (\d+)", text)]
    assert len(pairs) >= 400  # at least one per text
    assert not [pair for pair in pairs if is_held_out(*pair)]


def test_the_corpus_depends_on_seed_and_index_alone():
    assert corpus_text(0, 5, 3, 3) == corpus_text(0, 5, 3, 3)
    assert len({corpus_text(seed, index, 3, 3) for seed in range(3) for index in range(3)}) == 9


def test_the_loss_of_equal_logits_is_the_log_of_the_number_of_token_ids():
    """Only 45 of the 48 rows of the embedding are token ids."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(CONFIG))
    np.testing.assert_allclose(loss(CONFIG, zeros, TOKENS, MASK), np.log(45), rtol=1e-6)


def test_the_loss_is_the_mean_over_real_tokens_but_the_first_of_each_row():
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(CONFIG))
    logits = np.asarray(jax.jit(forward, static_argnums=0)(CONFIG, weights, TOKENS))[..., :45]
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(logps[0, 0, 9] + logps[0, 1, 2] + logps[0, 2, 7] + logps[1, 0, 3]) / 4
    np.testing.assert_allclose(loss(CONFIG, weights, TOKENS, MASK), expected, rtol=1e-5)
    other_padding = np.where(MASK, TOKENS, 44)
    np.testing.assert_allclose(loss(CONFIG, weights, other_padding, MASK), expected, rtol=1e-5)


def test_pretraining_lowers_the_loss_and_writes_a_model_folder(tmp_path, capsys, monkeypatch):
    # Pretraining calls init_params eagerly, which would compile about a hundred programs here.
    monkeypatch.setattr("grpo_jax.tiny.pretrain.init_params", jax.jit(init_params, static_argnums=0))
    cfg = small_config()
    folder = pretrain(cfg, tmp_path)
    losses = [float(value) for value in re.findall(r"step \d+: loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[0] > losses[-1] + 0.1
    model_cfg, weights = load(folder)
    tokenizer = load_tokenizer(folder)
    assert model_cfg.eos_ids == (tokenizer.eos_token_id,) and model_cfg.tokenizer_vocab_size == len(tokenizer)
    tokens = np.asarray([tokenizer("What is 3?")["input_ids"]])
    assert np.isfinite(jax.jit(forward, static_argnums=0)(model_cfg, weights, tokens)).all()
    with pytest.raises(UserError, match="neither a model nor a run"):
        pretrain(cfg, tmp_path)


def test_each_step_has_its_own_rows():
    cfg = small_config()
    tokenizer = train_tokenizer([corpus_text(1, i, 3, 3) for i in range(50)], 512)
    first, again, second = (corpus_batch(tokenizer, cfg, step) for step in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[0] != second[0]).any(axis=1).all()
    assert first[1].any() and (first[0][~first[1]] == 0).all()
