"""The learning step: one gradient, however the batch is split, padded, ordered or placed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax.learn.logprobs
from grpo_jax import forward, sample
from grpo_jax.config.schema import Config, LossSection, OptimSection, RolloutSection, TrainSection
from grpo_jax.learn.grpo import token_weights
from grpo_jax.learn.logprobs import logprobs_from_hidden, packed_logprobs
from grpo_jax.learn.optimizer import init_train_state
from grpo_jax.learn.packing import unpack_completions
from grpo_jax.learn.update import make_experience, make_update, minibatch_gradients, score_reference, take_minibatch
from grpo_jax.model.decoder import sampling_logits
from grpo_jax.parallel.mesh import make_mesh, num_row_shards, shard_rows, tree_shardings
from grpo_jax.rollout.sampler import pad_prompts
from tests.tiny import CONFIG, experience, packed, padded, params

LOSS = LossSection(kl_coef=0.05, clip_low=0.2, clip_high=0.3)
TRAIN = Config(
    rollout=RolloutSection(temperature=0.9), loss=LOSS, optim=OptimSection(lr=1.0), train=TrainSection(chunk_tokens=5)
)
GRADIENTS = jax.jit(lambda params, batch: minibatch_gradients(CONFIG, params, batch, temperature=0.9, loss=LOSS))


def grads_of(batch, weights=None):
    return GRADIENTS(params() if weights is None else weights, batch)


def assert_same(made, expected):
    """Each leaf within 1e-5 of its largest entry, and the metrics."""
    for (path, want), have in zip(jax.tree_util.tree_leaves_with_path(expected[0]), jax.tree.leaves(made[0])):
        gap = np.abs(np.asarray(have) - np.asarray(want)).max()
        assert gap <= 1e-5 * np.abs(want).max(), (path, gap)
    for name in expected[1]:
        np.testing.assert_allclose(made[1][name], expected[1][name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("micro_tokens, micro_batches", [(1, 4), (30, 2)])
def test_micro_batches_have_the_gradient_of_the_whole(micro_tokens, micro_batches):
    """Rows of 1 to 6 tokens: dividing by each part's own tokens would give another gradient. 16 tokens split groups."""
    batch = packed(experience(), micro_tokens)
    assert batch.num_micro_batches == micro_batches < len(batch.tokens)  # the last rows are empty
    assert_same(grads_of(batch), grads_of(packed(experience())))


def test_padding_packing_and_order_of_rows_change_nothing():
    """A row for each completion after its own prompt; all in one row; shuffled."""
    expected = grads_of(padded(experience()))
    assert_same(grads_of(packed(experience())), expected)
    order = np.asarray([3, 1, 7, 0, 2, 6, 5, 4])
    assert_same(grads_of(packed(jax.tree.map(lambda x: x[order], experience()), 30)), expected)


def test_order_of_tokens_in_a_row_changes_nothing():
    """Who sees whom comes from the segments alone."""
    batch = packed(experience())
    order = np.random.default_rng(0).permutation(batch.tokens.shape[1])
    moved = jax.tree.map(lambda x: x[..., order] if x.ndim else x, batch)
    assert_same(grads_of(moved.replace(predict_from=np.argsort(order)[moved.predict_from])), grads_of(batch))


SLOW = pytest.mark.slow
MESHES = [(1, 8, 1), (2, 2, 2), *(pytest.param(x, marks=SLOW) for x in ((1, 1, 8), (8, 1, 1), (1, 4, 2), (1, 2, 4)))]


@pytest.mark.parametrize("sizes", MESHES)
def test_same_loss_and_grads_on_one_and_eight_devices(sizes):
    """4 heads, 2 KV heads, 48 tokens: some axes do not divide. Micro-batches where there are fewer than 8 rows at once."""
    expected = grads_of(packed(experience()))
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params(), tree_shardings(mesh, params()))
        made = jax.jit(lambda params, batch: minibatch_gradients(CONFIG, params, batch, temperature=0.9, loss=LOSS))(
            placed, shard_rows(mesh, packed(experience(), 16, num_row_shards(mesh)))
        )
    assert_same(made, expected)


@pytest.mark.parametrize("sizes", [(1, 4, 2), *(pytest.param(x, marks=SLOW) for x in ((1, 8, 1), (2, 2, 2)))])
def test_same_parameters_after_one_sgd_step(sizes):
    grads, metrics = grads_of(packed(experience()))
    expected = jax.tree.map(jnp.subtract, params(), grads)
    mesh, optimizer = make_mesh(*sizes), optax.sgd(1.0)
    with jax.set_mesh(mesh):
        weights = jax.device_put(params(), tree_shardings(mesh, params()))
        state = init_train_state(mesh, weights, optimizer)
        update = make_update(CONFIG, TRAIN, mesh, state.params, optimizer)
        after, made = update(state, shard_rows(mesh, packed(experience(), 16, num_row_shards(mesh))))
    assert after.step == 1
    for want, grad, have in zip(*map(jax.tree.leaves, (expected, grads, after.params))):
        assert np.abs(np.asarray(have) - want).max() <= 1e-5 * np.abs(grad).max() + 1e-6
    np.testing.assert_allclose(made["loss/total"], metrics["loss/total"], rtol=1e-5)
    np.testing.assert_allclose(made["optim/grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    # Parameters stay where the table puts them, and so do the moments of an optimizer that has some.
    assert jax.tree.map(lambda x: x.sharding, after.params) == tree_shardings(mesh, params())
    moments = init_train_state(mesh, after.params, optax.adam(1.0)).opt_state[0].mu
    assert jax.tree.map(lambda x: x.sharding, moments) == tree_shardings(mesh, params())


def logps_of(batch, weights, temperature=0.9):
    """The policy's log-probs by completion, [N, S]."""
    rows = packed(batch)
    return unpack_completions(
        np.asarray(packed_logprobs(CONFIG, weights, rows, temperature)[0]),
        np.asarray(rows.flat_index),
        batch.mask.shape,
    )


def on_policy(weights):
    """Experience whose sampler log-probs are the policy's own."""
    return experience().replace(sampler_logps=logps_of(experience(), weights))


NO_KL = LossSection(kl_coef=0.0, clip_low=0.2, clip_high=0.2)


def test_first_step_gradient_equals_policy_gradient():
    """At ratio 1 and without KL the gradient is that of -sum w A log pi."""
    weights = params()
    batch = on_policy(weights)

    def plain(weights):
        rows = padded(batch)
        return -jnp.sum(rows.weights * rows.advantages * packed_logprobs(CONFIG, weights, rows, 0.9)[0])

    made, metrics = minibatch_gradients(CONFIG, weights, packed(batch), temperature=0.9, loss=NO_KL)
    for have, want in zip(jax.tree.leaves(made), jax.tree.leaves(jax.grad(plain)(weights))):
        np.testing.assert_allclose(have, want, atol=1e-6)
    np.testing.assert_allclose(metrics["policy/ratio_max"], 1, rtol=1e-6)
    assert metrics["policy/clip_frac"] == 0 and abs(metrics["policy/kl_sampler"]) < 1e-9


@pytest.mark.parametrize("micro_tokens", [16, 1000])
def test_gap_between_sampler_and_trainer_is_that_of_the_tokens(micro_tokens):
    """Tokens of 0.5 and 0.3, in two parts, among log-probs that agree: the largest is 0.5, the mean their shares."""
    batch = on_policy(params())
    moved = batch.sampler_logps.copy()
    moved[5, 0] += 0.5
    moved[5, -1] += 9.0
    moved[0, 1] -= 0.3
    assert batch.mask[5, 0] and not batch.mask[5, -1]  # the second stands behind the completion and is no token
    assert batch.mask[0, 1]
    _, metrics = minibatch_gradients(
        CONFIG, params(), packed(batch.replace(sampler_logps=moved), micro_tokens), temperature=0.9, loss=NO_KL
    )
    np.testing.assert_allclose(metrics["policy/logp_gap/max"], 0.5, atol=1e-5)
    np.testing.assert_allclose(
        metrics["policy/logp_gap/mean"],
        token_weights(jnp.asarray(batch.mask))[[5, 0], [0, 1]] @ jnp.asarray([0.5, 0.3]),
        atol=1e-5,
    )


def test_what_stands_behind_a_completion_carries_no_gradient():
    batch = experience()
    behind = np.arange(batch.tokens.shape[1]) >= (batch.prompt_lengths + batch.mask.sum(axis=1))[:, None]
    assert behind.any()
    other = batch.replace(tokens=np.where(behind, 9, batch.tokens))
    assert_same(grads_of(packed(other)), grads_of(packed(batch)))


def test_scores_match_a_plain_computation():
    """log-softmax of full logits at the temperature, over the tokenizer's ids alone; and the entropy by its sum."""
    weights, batch = params(), experience()
    rows = packed(batch)
    logps, entropies = (
        unpack_completions(np.asarray(x), np.asarray(rows.flat_index), batch.mask.shape)
        for x in packed_logprobs(CONFIG, weights, rows, 0.7)
    )
    plain = jax.nn.log_softmax(
        forward(CONFIG, weights, jnp.asarray(batch.tokens))[..., : CONFIG.tokenizer_vocab_size] / 0.7
    )
    for n, t in np.argwhere(batch.mask):
        column = int(batch.prompt_lengths[n]) + t
        at = plain[n, column - 1]
        np.testing.assert_allclose(logps[n, t], at[batch.tokens[n, column]], atol=2e-5)
        np.testing.assert_allclose(entropies[n, t], -jnp.sum(jnp.exp(at) * at), atol=2e-5)


@pytest.mark.slow
def test_entropy_is_not_computed_when_it_is_off():
    weights, rows = params(), packed(experience())
    off = packed_logprobs(CONFIG, weights, rows, 0.7, entropy=False)
    assert (off[1] == 0).all()
    np.testing.assert_allclose(off[0], packed_logprobs(CONFIG, weights, rows, 0.7)[0], atol=2e-6)
    _, metrics = minibatch_gradients(CONFIG, weights, rows, temperature=0.7, loss=LOSS, entropy=False)
    assert "policy/entropy" not in metrics
    cost = lambda entropy: (
        jax.jit(lambda params: packed_logprobs(CONFIG, params, rows, 0.7, entropy=entropy))
        .lower(weights)
        .compile()
        .cost_analysis()
    )
    vocabulary = rows.tokens.size * CONFIG.vocab_size  # of which the entropy takes a product and a sum
    assert cost(True)["flops"] - cost(False)["flops"] > 2 * vocabulary


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 1, 8), marks=pytest.mark.slow)])
def test_reference_is_scored_the_same_on_every_mesh(sizes):
    batch, mesh = experience(), make_mesh(*sizes)
    with jax.set_mesh(mesh):
        rows = packed(batch, 16, num_row_shards(mesh))
        weights = jax.device_put(params(), tree_shardings(mesh, params()))
        made = score_reference(CONFIG, weights, shard_rows(mesh, rows), temperature=0.9, chunk_tokens=5)
    have = unpack_completions(np.asarray(made), np.asarray(rows.flat_index), batch.mask.shape)
    np.testing.assert_allclose(have, logps_of(batch, params()), atol=1e-5)


def test_rows_that_hold_nothing_are_not_run():
    """They would turn everything into NaN."""
    batch = packed(experience(), 16)
    unused = np.arange(len(batch.tokens)) >= batch.num_micro_batches
    assert unused.any()
    poisoned = batch.replace(
        advantages=jnp.where(unused[:, None], jnp.nan, batch.advantages),
        sampler_logps=jnp.where(unused[:, None], jnp.nan, batch.sampler_logps),
    )
    poisoned = poisoned.replace(weights=jnp.where(unused[:, None], 1.0, batch.weights))
    assert_same(grads_of(poisoned), grads_of(batch))


@pytest.mark.parametrize("micro_tokens", [16, pytest.param(1000, marks=pytest.mark.slow)])
def test_gradients_of_low_precision_are_near_those_of_float32_and_added_up_in_it(micro_tokens):
    low = replace(CONFIG, compute_dtype="bfloat16")
    batch = packed(on_policy(params()), micro_tokens)
    made = minibatch_gradients(low, params(), batch, temperature=0.9, loss=NO_KL)[0]
    expected = minibatch_gradients(CONFIG, params(), batch, temperature=0.9, loss=NO_KL)[0]
    for have, want in zip(jax.tree.leaves(made), jax.tree.leaves(expected)):
        assert have.dtype == jnp.float32
        assert np.abs(have - want).max() < 0.1 * np.abs(want).max()
    kernel = np.asarray(made["layers"][0]["mlp"]["up"]["kernel"])
    assert (kernel != kernel.astype(jnp.bfloat16).astype(np.float32)).mean() > 0.5  # not rounded to bfloat16 anywhere


@pytest.mark.parametrize("remat", ["layers", pytest.param("matmuls", marks=pytest.mark.slow)])
def test_what_is_computed_again_changes_no_gradient(remat):
    batch, cfg = packed(experience()), replace(CONFIG, remat=remat)
    run = jax.jit(lambda p, b: minibatch_gradients(cfg, p, b, temperature=0.9, loss=LOSS))
    assert_same(run(params(), batch), grads_of(batch))


@pytest.mark.slow
def test_less_is_kept_the_more_is_computed_again():
    def flops(remat):
        model_cfg = replace(CONFIG, remat=remat)
        run = jax.jit(lambda p, b: minibatch_gradients(model_cfg, p, b, temperature=0.9, loss=LOSS)[0])
        return run.lower(params(), packed(experience())).compile().cost_analysis()["flops"]

    assert flops("none") < flops("matmuls") < flops("layers")


def test_reference_is_scored_like_the_policy():
    batch = experience()
    for micro_tokens in (16, 1000):
        rows = packed(batch, micro_tokens)
        made = score_reference(CONFIG, params(), rows, temperature=0.9, chunk_tokens=5)
        have = unpack_completions(np.asarray(made), np.asarray(rows.flat_index), batch.mask.shape)
        np.testing.assert_allclose(have, logps_of(batch, params()), atol=1e-5)


@pytest.mark.parametrize("cap, tied", [(0.0, False), (3.0, True)])
def test_blocks_of_the_head_change_nothing(cap, tied, monkeypatch):
    """Against log-softmax of whole logits under jax's own derivative; columns beyond the counts have none."""
    model_cfg = replace(CONFIG, vocab_size=47, logit_softcap=cap, tie_embeddings=tied)
    weights = params(model_cfg)
    hidden = jax.random.normal(jax.random.key(0), (4, 11, 32))
    targets = jax.random.randint(jax.random.key(1), (4, 11), 0, 45)
    counts, weigh = jnp.asarray([11, 3, 0, 7]), jax.random.normal(jax.random.key(2), (4, 11))
    asked = jnp.arange(11) < counts[:, None]

    def plain(weights, hidden):
        logps = jax.nn.log_softmax(sampling_logits(model_cfg, weights, hidden, 0.8))
        return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]

    def both(score):
        total = lambda weights, hidden: jnp.sum(jnp.where(asked, weigh * score(weights, hidden), 0))
        return jnp.where(asked, score(weights, hidden), 0), jax.grad(total, argnums=(0, 1))(weights, hidden)

    expected = jax.tree.leaves(both(plain))
    logits = sampling_logits(model_cfg, weights, hidden, 0.8)
    probs = jax.nn.softmax(logits)
    entropies = -jnp.sum(jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0), axis=-1)
    for chunk_tokens, ids in ((12, 20), (1000, 16384)):  # 3 columns at a time, the last padded; 16 + 16 + 15 of 47 ids
        monkeypatch.setattr(grpo_jax.learn.logprobs, "MAX_VOCAB_BLOCK", ids)
        made = both(
            lambda weights, hidden: logprobs_from_hidden(
                model_cfg, weights, hidden, targets, 0.8, counts=counts, chunk_tokens=chunk_tokens
            )[0]
        )
        for have, want in zip(jax.tree.leaves(made), expected):
            np.testing.assert_allclose(have, want, atol=2e-5)
        found = logprobs_from_hidden(
            model_cfg, weights, hidden, targets, 0.8, counts=counts, chunk_tokens=chunk_tokens
        )[1]
        np.testing.assert_allclose(jnp.where(asked, found, 0), jnp.where(asked, entropies, 0), atol=2e-5)


def test_temporaries_of_the_head_are_those_of_a_chunk():
    """Of 2,048 ids, 512 tokens a chunk: twice the tokens need no more, but for the hidden states' own gradient."""
    model_cfg = replace(CONFIG, vocab_size=2048, tokenizer_vocab_size=2048)
    weights = params(model_cfg)

    def temporaries(tokens):
        hidden, targets = jnp.zeros((1, tokens, 32)), jnp.zeros((1, tokens), jnp.int32)
        loss = lambda p, h: logprobs_from_hidden(model_cfg, p, h, targets, 1.0, chunk_tokens=512)[0].sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunk = 512 * 2048 * 4
    assert temporaries(2048) < 4 * chunk
    assert temporaries(4096) - temporaries(2048) < 0.1 * chunk


def test_sampler_logprobs_match_training_logprobs():
    """From the sampler's cache and from the training graph, at a temperature; prompts of unequal length."""
    weights, prompts = params(), [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12]]
    rollout = sample(
        CONFIG, weights, prompts, jax.random.key(0), samples=4, max_tokens=8, temperature=0.7, stop_ids=(7, 20)
    )
    made = make_experience(pad_prompts(prompts), rollout, np.zeros((3, 4)), None)
    logps = logps_of(made, weights, 0.7)
    assert np.abs(np.where(made.mask, logps - made.sampler_logps, 0)).max() < 2e-5
    np.testing.assert_array_equal(made.mask.sum(axis=1), rollout.lengths.reshape(-1))


def test_rows_join_prompt_and_completion_without_a_gap():
    rollout = sample(CONFIG, params(), [[3, 4, 5], [6]], jax.random.key(0), samples=2, max_tokens=4)
    made = make_experience(pad_prompts([[3, 4, 5], [6]]), rollout, np.zeros((2, 2)), None)
    tokens = made.tokens
    np.testing.assert_array_equal(made.prompt_lengths, [3, 3, 1, 1])
    np.testing.assert_array_equal(made.prompt_ids, [0, 0, 1, 1])
    for n, (prompt, drawn) in enumerate(
        [
            ([3, 4, 5], rollout.tokens[0, 0]),
            ([3, 4, 5], rollout.tokens[0, 1]),
            ([6], rollout.tokens[1, 0]),
            ([6], rollout.tokens[1, 1]),
        ]
    ):
        row = prompt + drawn.tolist()
        assert tokens[n].tolist() == row + [0] * (tokens.shape[1] - len(row))


def test_minibatches_of_an_epoch_hold_each_row_once_and_groups_together():
    batch = experience().replace(advantages=np.arange(8.0))
    key = jax.random.key(0)
    parts = [take_minibatch(batch, key, i, count=2) for i in range(2)]
    assert sorted(np.concatenate([part.advantages for part in parts])) == list(range(8))
    for part in parts:
        assert len(np.unique(part.prompt_ids)) == 2
    orders = {tuple(take_minibatch(batch, jax.random.key(seed), 0, count=2).prompt_ids) for seed in range(8)}
    assert len(orders) > 2


def test_step_compiles_once():
    """Whatever the lengths of the completions are."""
    mesh, optimizer = make_mesh(8), optax.sgd(0.1)
    with jax.set_mesh(mesh):
        state = init_train_state(mesh, jax.device_put(params(), tree_shardings(mesh, params())), optimizer)
        update = make_update(CONFIG, TRAIN, mesh, state.params, optimizer)
        for seed in range(3):
            state, _ = update(state, shard_rows(mesh, packed(experience(seed=seed), 1, 8)))
    assert update._cache_size() == 1 and int(state.step) == 3
