"""The learning step: one gradient, however the batch is split, padded, ordered or placed."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax.score
from grpo_jax import forward, sample
from grpo_jax.grpo import token_weights
from grpo_jax.mesh import make_mesh, shardings, split_rows
from grpo_jax.sampler import pad_prompts
from grpo_jax.score import score_completions, score_hidden
from grpo_jax.train_step import gradients, init_state, join, make_experience, make_schedule, make_update, minibatch
from tests.tiny import CONFIG, experience, params

LOSS = SimpleNamespace(kl_coef=0.05, clip_low=0.2, clip_high=0.3)
OPTIM = SimpleNamespace(lr=1.0, warmup_steps=0)


def grads_of(batch, weights=None, micro_batches=1, temperature=0.9):
    run = jax.jit(lambda p, b: gradients(
        CONFIG, p, b, temperature=temperature, loss=LOSS, micro_batches=micro_batches))
    return run(params() if weights is None else weights, batch)


def assert_same(made, expected):
    """Each leaf within 1e-5 of its largest entry, and the metrics."""
    for (path, want), have in zip(jax.tree_util.tree_leaves_with_path(expected[0]), jax.tree.leaves(made[0])):
        gap = np.abs(np.asarray(have) - np.asarray(want)).max()
        assert gap <= 1e-5 * np.abs(want).max(), (path, gap)
    for name in expected[1]:
        np.testing.assert_allclose(made[1][name], expected[1][name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_split_batch_has_same_gradient(micro_batches):
    """Rows of 1 to 6 tokens: dividing by each slice's own tokens would give another gradient."""
    batch = experience()
    assert_same(grads_of(batch, micro_batches=micro_batches), grads_of(batch))


def test_padding_and_order_of_rows_change_nothing():
    batch = experience()
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 7))) if x.ndim == 2 else x, batch)
    assert_same(grads_of(wider), grads_of(batch))
    order = jnp.asarray([3, 1, 7, 0, 2, 6, 5, 4])
    assert_same(grads_of(jax.tree.map(lambda x: x[order], batch)), grads_of(batch))


SLOW = pytest.mark.slow
MESHES = [(1, 8, 1), (2, 2, 2), (1, 1, 8), *(pytest.param(x, marks=SLOW) for x in ((8, 1, 1), (1, 4, 2), (1, 2, 4)))]


@pytest.mark.parametrize("sizes", MESHES)
def test_same_loss_and_grads_on_one_and_eight_devices(sizes):
    """4 heads, 2 KV heads, 48 tokens: some axes do not divide."""
    expected = grads_of(experience())
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params(), shardings(mesh, params()))
        made = grads_of(split_rows(mesh, experience()), placed, micro_batches=1)
    assert_same(made, expected)


@pytest.mark.parametrize("sizes", [(1, 4, 2), *(pytest.param(x, marks=SLOW) for x in ((1, 8, 1), (2, 2, 2)))])
def test_same_parameters_after_one_sgd_step(sizes):
    batch, train = experience(), SimpleNamespace(
        rollout=SimpleNamespace(temperature=0.9), loss=LOSS, optim=OPTIM, update=SimpleNamespace(micro_batches=1))
    grads, metrics = grads_of(batch)
    expected = jax.tree.map(jnp.subtract, params(), grads)
    mesh, optimizer = make_mesh(*sizes), optax.sgd(1.0)
    with jax.set_mesh(mesh):
        weights = jax.device_put(params(), shardings(mesh, params()))
        state = init_state(mesh, weights, optimizer)
        update = make_update(CONFIG, train, mesh, state.params, optimizer)
        after, made = update(state, split_rows(mesh, batch))
    assert after.step == 1
    for want, grad, have in zip(*map(jax.tree.leaves, (expected, grads, after.params))):
        assert np.abs(np.asarray(have) - want).max() <= 1e-5 * np.abs(grad).max() + 1e-6
    np.testing.assert_allclose(made["loss/total"], metrics["loss/total"], rtol=1e-5)
    np.testing.assert_allclose(made["optim/grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    # Parameters stay where the table puts them, and so do the moments of an optimizer that has some.
    assert jax.tree.map(lambda x: x.sharding, after.params) == shardings(mesh, params())
    moments = init_state(mesh, after.params, optax.adam(1.0)).opt_state[0].mu
    assert jax.tree.map(lambda x: x.sharding, moments) == shardings(mesh, params())


def on_policy(weights, temperature=0.9):
    """Experience whose sampler log-probs are the policy's own."""
    batch = experience()
    logps, _ = score_completions(CONFIG, weights, batch.tokens, batch.prompt_lengths, 6, temperature)
    return batch.replace(sampler_logps=logps)


def test_first_step_gradient_equals_policy_gradient():
    """At ratio 1 and without KL the gradient is that of -sum w A log pi."""
    weights = params()
    batch = on_policy(weights)

    def plain(weights):
        logps, _ = score_completions(CONFIG, weights, batch.tokens, batch.prompt_lengths, 6, 0.9)
        return -jnp.sum(token_weights(batch.mask) * batch.advantages[:, None] * logps)

    loss = SimpleNamespace(kl_coef=0.0, clip_low=0.2, clip_high=0.2)
    made, metrics = gradients(CONFIG, weights, batch, temperature=0.9, loss=loss, micro_batches=1)
    for have, want in zip(jax.tree.leaves(made), jax.tree.leaves(jax.grad(plain)(weights))):
        np.testing.assert_allclose(have, want, atol=1e-6)
    np.testing.assert_allclose(metrics["policy/ratio_max"], 1, rtol=1e-6)
    assert metrics["policy/clip_frac"] == 0 and abs(metrics["policy/kl_sampler"]) < 1e-9


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_gap_between_sampler_and_trainer_is_that_of_the_tokens(micro_batches):
    """Tokens of 0.5 and 0.3, in two parts, among log-probs that agree: the largest is 0.5, the mean their shares."""
    batch = on_policy(params())
    moved = batch.replace(sampler_logps=batch.sampler_logps.at[5, 0].add(0.5).at[5, -1].add(9.0).at[0, 1].add(-0.3))
    assert batch.mask[5, 0] and not batch.mask[5, -1]  # the second stands behind the completion and is no token
    loss = SimpleNamespace(kl_coef=0.0, clip_low=0.2, clip_high=0.2)
    _, metrics = gradients(CONFIG, params(), moved, temperature=0.9, loss=loss, micro_batches=micro_batches)
    np.testing.assert_allclose(metrics["policy/logp_gap/max"], 0.5, atol=1e-5)
    np.testing.assert_allclose(
        metrics["policy/logp_gap/mean"], token_weights(batch.mask)[[5, 0], [0, 1]] @ jnp.asarray([0.5, 0.3]), atol=1e-5)


def test_prompt_and_padding_carry_no_gradient():
    """Only the hidden states before a completion's tokens matter: other padding, the same gradient."""
    batch = experience()
    columns = jnp.arange(batch.tokens.shape[1])
    behind = columns >= (batch.prompt_lengths + batch.mask.sum(axis=1))[:, None]
    assert behind.any()
    assert_same(grads_of(batch.replace(tokens=jnp.where(behind, 9, batch.tokens))), grads_of(batch))


def test_scores_match_a_plain_computation():
    """log-softmax of full logits at the temperature, over the tokenizer's ids alone; and the entropy by its sum."""
    weights, batch = params(), experience()
    logps, entropies = score_completions(CONFIG, weights, batch.tokens, batch.prompt_lengths, 6, 0.7)
    plain = jax.nn.log_softmax(forward(CONFIG, weights, batch.tokens)[..., : CONFIG.token_count] / 0.7)
    for n, t in np.argwhere(np.asarray(batch.mask)):
        column = int(batch.prompt_lengths[n]) + t
        at = plain[n, column - 1]
        np.testing.assert_allclose(logps[n, t], at[batch.tokens[n, column]], atol=2e-5)
        np.testing.assert_allclose(entropies[n, t], -jnp.sum(jnp.exp(at) * at), atol=2e-5)


def test_chunks_of_the_head_change_nothing(monkeypatch):
    weights = params()
    hidden = jax.random.normal(jax.random.key(0), (4, 11, 32))
    targets = jax.random.randint(jax.random.key(1), (4, 11), 0, 45)

    def both():
        score = lambda p, h: score_hidden(CONFIG, p, h, targets, 0.8)[0].sum()
        return score_hidden(CONFIG, weights, hidden, targets, 0.8), jax.grad(score, argnums=(0, 1))(weights, hidden)

    whole = both()
    monkeypatch.setattr(grpo_jax.score, "CHUNK_TOKENS", 12)  # 3 columns at a time, the last chunk padded
    for have, want in zip(jax.tree.leaves(both()), jax.tree.leaves(whole)):
        np.testing.assert_allclose(have, want, atol=2e-5)


def test_no_logits_of_all_tokens_exist():
    """16 x 512 tokens and 2,048 ids would be 67 MB of logits; forward and backward need less than a third of that."""
    from dataclasses import replace

    config = replace(CONFIG, vocab_size=2048, token_count=2048)
    weights = params(config)
    hidden, targets = jnp.zeros((16, 512, 32)), jnp.zeros((16, 512), jnp.int32)
    loss = lambda p, h: score_hidden(config, p, h, targets, 1.0)[0].sum()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, hidden).compile()
    whole = 16 * 512 * 2048 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole


def test_sampler_logprobs_match_training_logprobs():
    """From the sampler's cache and from the training graph, at a temperature; prompts of unequal length."""
    weights, prompts = params(), [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12]]
    rollout = sample(CONFIG, weights, prompts, jax.random.key(0), samples=4, max_tokens=8, temperature=0.7, stop_ids=(7, 20))
    made = make_experience(pad_prompts(prompts), rollout, jnp.zeros((3, 4)), None)
    logps, _ = score_completions(CONFIG, weights, made.tokens, made.prompt_lengths, 8, 0.7)
    assert np.abs(jnp.where(made.mask, logps - made.sampler_logps, 0)).max() < 2e-5
    np.testing.assert_array_equal(made.mask.sum(axis=1), rollout.lengths.reshape(-1))


def test_rows_join_prompt_and_completion_without_a_gap():
    rollout = sample(CONFIG, params(), [[3, 4, 5], [6]], jax.random.key(0), samples=2, max_tokens=4)
    tokens, lengths = join(pad_prompts([[3, 4, 5], [6]]), rollout)
    np.testing.assert_array_equal(lengths, [3, 3, 1, 1])
    for n, (prompt, drawn) in enumerate([([3, 4, 5], rollout.tokens[0, 0]), ([3, 4, 5], rollout.tokens[0, 1]),
                                         ([6], rollout.tokens[1, 0]), ([6], rollout.tokens[1, 1])]):
        row = prompt + drawn.tolist()
        assert tokens[n].tolist() == row + [0] * (tokens.shape[1] - len(row))


def test_minibatches_of_an_epoch_hold_each_row_once():
    batch = experience().replace(advantages=jnp.arange(8.0))
    key = jax.random.key(0)
    parts = [minibatch(batch, key, i, count=4).advantages for i in range(4)]
    assert sorted(np.concatenate(parts)) == list(range(8))
    other = [minibatch(batch, jax.random.key(1), i, count=4).advantages for i in range(4)]
    assert not np.array_equal(np.concatenate(parts), np.concatenate(other))


def test_step_compiles_once():
    mesh, optimizer = make_mesh(8), optax.sgd(0.1)
    train = SimpleNamespace(
        rollout=SimpleNamespace(temperature=1.0), loss=LOSS, optim=OPTIM, update=SimpleNamespace(micro_batches=1))
    with jax.set_mesh(mesh):
        state = init_state(mesh, jax.device_put(params(), shardings(mesh, params())), optimizer)
        update = make_update(CONFIG, train, mesh, state.params, optimizer)
        for seed in range(3):
            state, _ = update(state, split_rows(mesh, experience(seed=seed)))
    assert update._cache_size() == 1 and int(state.step) == 3


def test_warm_up_is_linear_then_constant():
    schedule = make_schedule(SimpleNamespace(lr=2.0, warmup_steps=4))
    np.testing.assert_allclose([schedule(i) for i in (0, 1, 3, 9)], [0.5, 1, 2, 2])  # no update without effect
    assert make_schedule(SimpleNamespace(lr=2.0, warmup_steps=0))(0) == 2
