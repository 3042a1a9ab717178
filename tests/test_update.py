"""The learning step: its gradient does not depend on how the batch is split, padded, ordered or sharded.

Compiling takes nearly all of the time, so the tests share programs: `GRADIENTS` and `SCORE` below, for two shapes of
packed rows, `[1, 88]` (`packed(batch)`) and `[8, 16]` (`packed(batch, 16)` and `padded(batch)`).
"""

from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax.learn.logprobs
import grpo_jax.learn.update
from grpo_jax import forward, sample
from grpo_jax.config.schema import Config, LogSection, LossSection, OptimSection, RolloutSection, TrainSection
from grpo_jax.learn.grpo import SampledTokens, inclusive_clip, token_weights
from grpo_jax.learn.logprobs import logprobs_from_hidden, packed_logprobs
from grpo_jax.learn.optimizer import init_train_state
from grpo_jax.learn.packing import packed_shape, unpack_completions
from grpo_jax.learn.update import (
    make_experience,
    make_update,
    minibatch_gradients,
    minibatch_rows,
    pack_minibatch,
    score_completions,
    take_rows,
)
from grpo_jax.model.decoder import head_matmul, temperature_logits
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import make_mesh, num_data_shards, shard_rows
from grpo_jax.rollout.sampler import pad_prompts
from tests.outside import losses
from tests.tiny import CONFIG, experience, packed, padded, params

SLOW = pytest.mark.slow
TEMPERATURE = 0.9
LOSS = LossSection(kl_coef=0.05, clip_low=0.2, clip_high=0.3)
CFG = Config(
    rollout=RolloutSection(temperature=TEMPERATURE),
    loss=LOSS,
    optim=OptimSection(lr=1.0),
    train=TrainSection(chunk_tokens=5),
)
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10], [12], [13, 14]]  # with 2 completions of up to 6 tokens: the shape [1, 88]


def gradients_of(model_cfg, loss=LOSS):
    """Returns a jitted function (params, batch) -> (gradients, metrics)."""
    return jax.jit(
        lambda params, batch: minibatch_gradients(model_cfg, params, batch, temperature=TEMPERATURE, loss=loss)
    )


GRADIENTS = gradients_of(CONFIG)
SCORE = jax.jit(lambda params, batch: packed_logprobs(CONFIG, params, batch, TEMPERATURE))


def assert_same(actual, expected):
    """Compares gradients, each leaf within 1e-5 of its largest entry, and metrics."""
    for (path, want), have in zip(
        jax.tree_util.tree_leaves_with_path(expected[0]), jax.tree.leaves(actual[0]), strict=True
    ):
        difference = np.abs(np.asarray(have) - np.asarray(want)).max()
        assert difference <= 1e-5 * np.abs(want).max(), (path, difference)
    assert_same_metrics(actual[1], expected[1])


def assert_same_metrics(actual, expected):
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


def unpack(values, rows, batch):
    """Returns packed values by completion, [N, S]."""
    return unpack_completions(np.asarray(values), np.asarray(rows.flat_index), batch.mask.shape)


def exact_scores(batch):
    """Returns log-probs and entropies of a batch's completions, [N, S]."""
    rows = packed(batch)
    return tuple(unpack(values, rows, batch) for values in SCORE(params(), rows))


def on_policy():
    """Returns experience whose sampler and reference log-probs are those of the policy."""
    logps = exact_scores(experience())[0]
    return experience().replace(sampler_logps=logps, ref_logps=logps)


@cache
def sampled():
    return sample(
        CONFIG,
        params(),
        PROMPTS,
        jax.random.key(0),
        samples=2,
        max_tokens=6,
        temperature=TEMPERATURE,
        stop_ids=(7, 20, 31),
    )


@pytest.mark.parametrize("micro_tokens, micro_batches", [(1, 4), pytest.param(30, 2, marks=SLOW)])
def test_micro_batches_do_not_change_the_gradient(micro_tokens, micro_batches):
    """Completions have 1 to 6 tokens: dividing by the tokens of each micro-batch would give another gradient."""
    batch = packed(experience(), micro_tokens)
    assert batch.num_micro_batches == micro_batches < len(batch.tokens)  # the last rows are empty
    assert_same(GRADIENTS(params(), batch), GRADIENTS(params(), packed(experience())))


def test_padding_packing_and_row_order_do_not_change_the_gradient():
    expected = GRADIENTS(params(), padded(experience()))
    assert_same(GRADIENTS(params(), packed(experience())), expected)
    order = np.asarray([3, 1, 7, 0, 2, 6, 5, 4])
    assert_same(GRADIENTS(params(), packed(jax.tree.map(lambda x: x[order], experience()), 16)), expected)


def test_token_order_within_a_row_does_not_change_the_gradient():
    """Which keys a query attends to depends on the segments only."""
    batch = packed(experience())
    order = np.random.default_rng(0).permutation(batch.tokens.shape[1])
    moved = jax.tree.map(lambda x: x[..., order] if x.ndim else x, batch)
    moved = moved.replace(predict_from=np.argsort(order)[moved.predict_from])
    assert_same(GRADIENTS(params(), moved), GRADIENTS(params(), batch))


def test_tokens_behind_a_completion_carry_no_gradient():
    batch = experience()
    behind = np.arange(batch.tokens.shape[1]) >= (batch.prompt_lengths + batch.mask.sum(axis=1))[:, None]
    assert behind.any()
    other = batch.replace(tokens=np.where(behind, 9, batch.tokens))
    assert_same(GRADIENTS(params(), packed(other)), GRADIENTS(params(), packed(batch)))


def test_empty_micro_batches_are_not_run():
    """If they were run, they would turn everything into NaN."""
    batch = packed(experience(), 16)
    unused = np.arange(len(batch.tokens)) >= batch.num_micro_batches
    assert unused.any()
    poisoned = batch.replace(
        advantages=jnp.where(unused[:, None], jnp.nan, batch.advantages),
        sampler_logps=jnp.where(unused[:, None], jnp.nan, batch.sampler_logps),
        weights=jnp.where(unused[:, None], 1.0, batch.weights),
    )
    assert_same(GRADIENTS(params(), poisoned), GRADIENTS(params(), batch))


def test_the_update_uses_token_weights_from_grpo(monkeypatch):
    """With twice the weights, the gradient is twice as large."""
    grads, metrics = GRADIENTS(params(), packed(experience()))
    assert grpo_jax.learn.update.token_weights is grpo_jax.learn.grpo.token_weights
    monkeypatch.setattr(grpo_jax.learn.update, "token_weights", lambda *args: 2 * token_weights(*args))
    doubled, doubled_metrics = GRADIENTS(params(), packed(experience()))
    jax.tree.map(np.testing.assert_array_equal, doubled, jax.tree.map(lambda x: 2 * x, grads))
    assert doubled_metrics["loss/total"] == 2 * metrics["loss/total"]


def sequence_loss(logps, entropies, tokens, loss):
    """Clips one ratio per completion, the geometric mean of its tokens' ratios, and favors later groups."""

    def mean_by_sequence(x):
        sums = [
            jax.ops.segment_sum(y.ravel(), tokens.sequence.ravel(), tokens.num_sequences) for y in (x, jnp.ones_like(x))
        ]
        return (sums[0] / jnp.maximum(sums[1], 1))[tokens.sequence]

    # The 9 has an effect if index -1 is not dropped.
    log_ratio = jnp.where(tokens.sequence < 0, 9.0, logps - tokens.old_logps)
    ratio = jnp.exp(mean_by_sequence(log_ratio))
    A = tokens.advantages * (1 + tokens.group)
    objective = jnp.minimum(ratio * A, inclusive_clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high) * A)
    largest = jnp.max(ratio, where=tokens.weights > 0, initial=0.0)
    counts = dict.fromkeys(("tokens/weight", "tokens/count", "tokens/ratio", "tokens/ratio_squared"), jnp.float32(1))
    return -jnp.sum(tokens.weights * objective), {"policy/ratio_max": largest} | counts


@cache
def sequence_loss_gradient():
    """Returns the gradient of `sequence_loss` on padded completions [N, S]."""
    batch = experience()
    columns = np.clip(batch.prompt_lengths[:, None] + np.arange(batch.mask.shape[1]), 0, batch.tokens.shape[1] - 1)
    targets = np.take_along_axis(batch.tokens, columns, axis=1)
    tokens = SampledTokens(
        old_logps=batch.sampler_logps,
        ref_logps=None,
        advantages=np.repeat(batch.advantages[:, None], targets.shape[1], axis=1),
        weights=token_weights(jnp.asarray(batch.mask)),
        sequence=np.where(batch.mask, np.arange(8)[:, None], -1),
        group=np.where(batch.mask, np.arange(8)[:, None] // 2, -1),
        num_sequences=8,
    )

    def loss(params):
        by_column = jnp.take_along_axis(plain_logps(params, jnp.asarray(batch.tokens)), columns[..., None] - 1, axis=1)
        logps = jnp.take_along_axis(by_column, targets[..., None], axis=2)[..., 0]
        return sequence_loss(logps, None, tokens, LOSS)

    grads, sums = jax.jit(jax.grad(loss, has_aux=True))(params())
    return grads, {"policy/ratio_max": sums["policy/ratio_max"]}


@pytest.mark.parametrize(
    "micro_tokens, sizes", [(16, (1, 2, 4)), *(pytest.param(x, None, marks=SLOW) for x in (16, 1000))]
)
def test_a_loss_with_sequence_ratios_does_not_depend_on_packing(micro_tokens, sizes, monkeypatch):
    """The test replaces `weighted_loss`, which finds all tokens of a completion in one row, micro-batch and device."""
    monkeypatch.setattr(grpo_jax.learn.update, "weighted_loss", sequence_loss)
    mesh = make_mesh(*sizes) if sizes else None
    with jax.set_mesh(mesh) if sizes else nullcontext():
        rows = packed(experience(), micro_tokens, num_data_shards())
        assert rows.num_micro_batches > 1 or micro_tokens == 1000
        actual = gradients_of(CONFIG)(params(), shard_rows(mesh, rows) if sizes else rows)
    assert_same(actual, sequence_loss_gradient())


def test_a_token_that_overflows_its_ratios_does_not_make_the_gradient_nan():
    """Its log-ratios are beyond 20 and have no gradient. The other tokens have the gradient as if its weight were 0."""
    batch = experience()
    for sign in (1, -1):
        logps = batch.sampler_logps.copy(), batch.ref_logps.copy()
        for x, far in zip(logps, (-sign * 150, sign * 150), strict=True):
            x[3, 0] = far
        rows = packed(batch.replace(sampler_logps=logps[0], ref_logps=logps[1]))
        grads, metrics = GRADIENTS(params(), rows)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, metrics)))
        left_out = rows.replace(weights=jnp.where(rows.flat_index == 3 * 6, 0.0, rows.weights))
        assert_same((grads, {}), (GRADIENTS(params(), left_out)[0], {}))


def test_kl_and_entropy_are_logged_only_if_they_are_computed():
    def names(kl_coef, entropy):
        options = dict(temperature=TEMPERATURE, loss=LossSection(kl_coef=kl_coef), entropy=entropy)
        run = partial(minibatch_gradients, CONFIG, **options)
        return set(jax.eval_shape(run, params(), packed(experience()))[1])

    assert names(0.1, True) - names(0.1, False) == {"policy/entropy"}
    assert names(0.1, True) - names(0.0, True) == {"policy/kl_ref"}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8), (8, 1, 1), (1, 4, 2), (1, 2, 4)])
def test_gradients_agree_on_one_and_eight_devices(sizes):
    """With 4 heads, 2 KV heads and 48 tokens, some axes do not divide. With fewer than 8 shards, micro-batches too."""
    mesh = make_mesh(*sizes)
    sharded = jax.device_put(params(), tree_shardings(mesh, params()))
    with jax.set_mesh(mesh):
        rows = packed(experience(), 16, num_data_shards(mesh))
        actual = gradients_of(CONFIG)(sharded, shard_rows(mesh, rows))
    assert_same(actual, GRADIENTS(params(), packed(experience())))


@cache
def sgd_update(sizes):
    """Returns a mesh, a function that makes a train state, and the jitted update, which takes SGD steps of rate 1."""
    mesh, optimizer = make_mesh(*sizes), optax.identity()
    shardings = tree_shardings(mesh, params())

    def new_state():
        return init_train_state(mesh, jax.device_put(params(), shardings), optimizer)

    with jax.set_mesh(mesh):
        return mesh, new_state, make_update(replace(CONFIG, remat="layers"), CFG, mesh, params(), optimizer)


REPRESENTATIVE = (2, 2, 2)


@pytest.mark.parametrize("sizes", [REPRESENTATIVE, *(pytest.param(x, marks=SLOW) for x in ((1, 8, 1), (1, 4, 2)))])
def test_one_sgd_step_agrees_on_one_and_eight_devices(sizes):
    """A step of rate 1 subtracts the gradient, so this also compares all gradients, with rematerialized layers."""
    grads, metrics = GRADIENTS(params(), packed(experience()))
    mesh, new_state, update = sgd_update(sizes)
    state = new_state()
    with jax.set_mesh(mesh):
        after, made = update(state, shard_rows(mesh, packed(experience(), 16, num_data_shards(mesh))))
    assert after.step == 1
    expected = jax.tree.map(jnp.subtract, params(), grads)
    for want, grad, have in zip(*map(jax.tree.leaves, (expected, grads, after.params)), strict=True):
        assert np.abs(np.asarray(have) - want).max() <= 1e-5 * np.abs(grad).max() + 1e-6
    assert_same_metrics(made, metrics)
    np.testing.assert_allclose(made["optim/grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert jax.tree.map(lambda x: x.sharding, after.params) == tree_shardings(mesh, params())


def test_update_compiles_once():
    """Completions of other lengths do not change the packed shape."""
    mesh, new_state, update = sgd_update(REPRESENTATIVE)
    state = new_state()
    with jax.set_mesh(mesh):
        for seed in range(3):
            state, _ = update(state, shard_rows(mesh, packed(experience(seed=seed), 16, num_data_shards(mesh))))
    assert update._cache_size() == 1 and int(state.step) == 3


def plain_logps(params, tokens):
    """Returns log-softmax of full logits at the temperature, over the ids of the tokenizer."""
    logits = forward(CONFIG, params, tokens)[..., : CONFIG.tokenizer_vocab_size]
    return jax.nn.log_softmax(logits / TEMPERATURE)


def test_first_step_gradient_is_the_policy_gradient():
    """At ratio 1 the gradient is that of -sum w A log pi. Where policy and reference agree, that of k3 is 0."""
    batch = on_policy()
    rows, columns = np.nonzero(batch.mask)
    token_columns = batch.prompt_lengths[rows] + columns
    weights = token_weights(jnp.asarray(batch.mask))[rows, columns] * batch.advantages[rows]

    @jax.jit
    @jax.grad
    def policy_gradient(params):
        logps = plain_logps(params, jnp.asarray(batch.tokens))
        return -jnp.sum(weights * logps[rows, token_columns - 1, batch.tokens[rows, token_columns]])

    grads, metrics = GRADIENTS(params(), packed(batch))
    for have, want in zip(jax.tree.leaves(grads), jax.tree.leaves(policy_gradient(params())), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-6)
    np.testing.assert_allclose(metrics["policy/ratio_max"], 1, rtol=1e-6)
    assert metrics["policy/clip_frac"] == 0 and abs(metrics["policy/kl_sampler"]) < 1e-9


# (ratio, aggregate, KL estimator, corrected, dual clip, entropy coefficient): all pairs of values of the first five.
SETTINGS = [
    ("token", "sequence", "k1", False, 0.0, 0.0),
    ("token", "token", "k2", False, 0.0, 0.02),
    ("token", "prompt", "k3", False, 0.0, 0.0),
    ("token", "constant", "k1", True, 1.5, 0.0),
    ("sequence", "sequence", "k2", False, 0.0, 0.0),
    ("sequence", "token", "k3", False, 1.5, 0.0),
    ("sequence", "prompt", "k1", True, 1.5, 0.0),
    ("sequence", "constant", "k2", False, 0.0, 0.02),
    ("sequence_token", "sequence", "k3", True, 1.5, 0.02),
    ("sequence_token", "token", "k1", True, 0.0, 0.0),
    ("sequence_token", "prompt", "k2", False, 1.5, 0.0),
    ("sequence_token", "constant", "k3", False, 1.5, 0.0),
    ("detached", "sequence", "k1", False, 0.0, 0.0),
    ("detached", "token", "k2", True, 0.0, 0.0),
    ("detached", "prompt", "k3", True, 0.0, 0.02),
    ("detached", "constant", "k1", False, 0.0, 0.0),
    ("difference", "sequence", "k2", True, 0.0, 0.0),
    ("difference", "token", "k3", True, 0.0, 0.0),
    ("difference", "prompt", "k1", False, 0.0, 0.02),
    ("difference", "constant", "k2", False, 0.0, 0.0),
]
FAST = [("sequence", "prompt", "k1", True, 1.5, 0.0), ("token", "token", "k2", False, 0.0, 0.02)]


def test_the_settings_have_every_pair_of_values():
    values = [sorted({setting[place] for setting in SETTINGS}) for place in range(5)]
    assert list(map(len, values)) == [5, 4, 3, 2, 2]
    has_dual_clip = ("token", "sequence", "sequence_token")
    allowed = [setting for setting in product(*values) if not setting[4] or setting[0] in has_dual_clip]

    def pairs(settings):
        return {pair for setting in settings for pair in combinations(enumerate(setting[:5]), 2)}

    assert pairs(SETTINGS) == pairs(allowed)


@cache
def off_policy():
    """Returns 12 completions of 3 prompts whose ratios are on both sides of every bound, for both signs of advantage.

    The log-probs of the sampler differ from those of the policy per completion and per token, in a few cases by far.
    """
    batch, draw = experience(12, samples=4, seed=13), np.random.default_rng(0)
    logps, shape = exact_scores(batch)[0], batch.mask.shape
    distance = 0.3 * draw.standard_normal((shape[0], 1)) + 0.4 * draw.standard_normal(shape)
    distance[[0, 3, 5], [0, 0, 0]] = [3.2, -2.5, 3.0]
    ref_logps = logps + 0.5 * draw.standard_normal(shape)
    ref_logps[6, 0] -= 21.0
    advantages = np.asarray([1.3, -0.4, 0.2, -1.1, 0.7, -0.9, 1.6, -0.5, -1.4, 0.3, 0.9, -0.6], np.float32)
    return batch.replace(
        sampler_logps=np.minimum(logps + distance, -0.1).astype(np.float32),
        ref_logps=ref_logps.astype(np.float32),
        advantages=advantages,
    )


@jax.jit
def pull_back(params, batch, logps_slope, entropies_slope):
    """Returns the gradient in the parameters from that in log-probs and entropies `[N, S]`, with full logits."""

    def scores(params):
        columns = batch.prompt_lengths[:, None] + jnp.arange(batch.mask.shape[1])
        distributions = jnp.take_along_axis(plain_logps(params, batch.tokens), columns[..., None] - 1, axis=1)
        targets = jnp.take_along_axis(batch.tokens, columns, axis=1)
        logps = jnp.take_along_axis(distributions, targets[..., None], axis=-1)[..., 0]
        return logps, -jnp.sum(jnp.exp(distributions) * distributions, axis=-1)

    scores, pull = jax.vjp(scores, params)
    return pull((logps_slope, entropies_slope))[0], scores


def expected_gradient(batch, loss):
    """Returns the gradient and the metrics of a minibatch on padded rows `[N, S]`, with `tests.outside.losses`."""
    zeros = jnp.zeros(batch.mask.shape)
    logps, entropies = (np.asarray(x, np.float64) for x in pull_back(params(), batch, zeros, zeros)[1])
    settings = asdict(loss) | {"clip_dual": loss.clip_dual or None, "groups": batch.prompt_ids.tolist()}
    coefficient = settings.pop("entropy_coef")
    del settings["kl_in"]
    total, slope, metrics = losses.loss(
        logps, batch.sampler_logps, batch.ref_logps, batch.advantages, batch.mask, **settings
    )
    weights = losses.token_weights(batch.mask, loss.aggregate, loss.constant_length, groups=batch.prompt_ids.tolist())
    slopes = jnp.asarray(slope, jnp.float32), jnp.asarray(-coefficient * weights, jnp.float32)
    metrics |= {
        "loss/total": total - coefficient * np.sum(weights * entropies),
        "policy/entropy": np.sum(weights * entropies) / weights.sum(),
    }
    return pull_back(params(), batch, *slopes)[0], metrics


def pack_with(batch, loss, micro_tokens, shards=1):
    """Packs a batch with the token weights of a loss."""
    shape = packed_shape(len(batch.mask), 4, 5, 6, micro_tokens, shards)
    return pack_minibatch(batch, loss, shape, shards)


@pytest.mark.parametrize(
    "setting, ways",
    [*((x, ("mesh",)) for x in FAST), *(pytest.param(x, ("one row", "split", "mesh"), marks=SLOW) for x in SETTINGS)],
    ids=lambda value: "-".join(map(str, value)),
)
def test_each_setting_has_the_same_gradient_packed_split_and_on_eight_devices(setting, ways):
    """Groups of 4 completions are spread over micro-batches and shards. The reference has one row per completion."""
    ratio, aggregate, kl, kl_corrected, clip_dual, entropy_coef = setting
    loss = LossSection(
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.3,
        clip_dual=clip_dual,
        clip_difference=0.01,
        aggregate=aggregate,
        constant_length=4,
        kl=kl,
        kl_corrected=kl_corrected,
        kl_coef=0.05,
        entropy_coef=entropy_coef,
    )
    batch, gradients = off_policy(), gradients_of(CONFIG, loss)
    expected = expected_gradient(batch, loss)
    assert 0.05 < expected[1]["policy/clip_frac"] < 0.95
    for way in ways:
        mesh = make_mesh(*REPRESENTATIVE) if way == "mesh" else None
        with jax.set_mesh(mesh) if mesh else nullcontext():
            rows = pack_with(batch, loss, 1000 if way == "one row" else 16, num_data_shards())
            groups = rows.group.reshape(num_data_shards() if mesh else len(rows.tokens), -1)
            spread = [np.count_nonzero((groups == group).any(axis=1)) > 1 for group in range(3)]
            assert len(rows.tokens) == 1 or (rows.num_micro_batches > 1 and all(spread))
            if mesh:
                weights = jax.device_put(params(), tree_shardings(mesh, params()))
                assert_same(gradients(weights, shard_rows(mesh, rows)), expected)
            else:
                assert_same(gradients(params(), jax.tree.map(jnp.asarray, rows)), expected)


def test_a_minibatch_without_completions_has_finite_metrics_and_no_gradient():
    """No completion is kept. The empty minibatch has the shapes of any other, so nothing is compiled again."""
    full = packed(experience(), 16)
    shape = packed_shape(8, 1, 5, 6, 16, 1)
    rows = pack_minibatch(take_rows(experience(), np.arange(0)), LOSS, shape, 1).replace(num_sequences=8)
    assert rows.tokens.shape == full.tokens.shape
    grads, metrics = GRADIENTS(params(), jax.tree.map(jnp.asarray, rows))
    for grad in jax.tree.leaves(grads):
        assert not np.any(grad)
    assert all(np.isfinite(list(metrics.values()))) and metrics["loss/total"] == 0


def test_an_update_without_advantages_has_no_signal_while_the_policy_is_the_reference():
    """Afterwards, the KL term has a gradient, unless the minibatch is empty."""
    mesh, new_state, update = sgd_update(REPRESENTATIVE)
    with jax.set_mesh(mesh):
        rows = packed(experience(), 16, num_data_shards(mesh))
        without = packed(experience().replace(advantages=np.zeros(8, np.float32)), 16, num_data_shards(mesh))
        nothing = take_rows(experience(), np.arange(0))
        empty = pack_minibatch(
            nothing, LOSS, packed_shape(8, 1, 5, 6, 16, num_data_shards(mesh)), num_data_shards(mesh)
        )
        empty = empty.replace(num_sequences=8)

        def one_update(state, batch):
            old = jax.tree.map(np.asarray, state.params)
            state, metrics = update(state, shard_rows(mesh, batch))
            moved = any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (old, state.params)), strict=True))
            assert metrics["optim/skipped"] == 0 and np.isfinite(metrics["optim/grad_norm"])
            return state, (float(metrics["optim/no_signal"]), moved)

        state, seen = one_update(new_state(), without)
        assert seen == (1, False) and state.step == 1 and state.is_reference
        state, seen = one_update(state, rows)
        assert seen == (0, True) and not state.is_reference
        state, seen = one_update(state, without)
        assert seen == (0, True)
        state, seen = one_update(state, empty)
        assert seen == (1, False) and not state.is_reference
        state = state.replace(is_reference=jax.device_put(True, state.is_reference.sharding))
        _, seen = one_update(state, without)
        assert seen == (1, False)  # the policy has become the reference
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    "loss, has_signal",
    [
        (LossSection(kl_coef=0.1, kl_in="reward"), False),  # the penalty is part of the advantages
        pytest.param(LossSection(kl_coef=0.0), False, marks=SLOW),
        pytest.param(LossSection(kl_coef=0.0, entropy_coef=0.01), True, marks=SLOW),
        pytest.param(LossSection(kl_coef=0.1, kl_in="reward", entropy_coef=0.01), True, marks=SLOW),
        pytest.param(LossSection(kl_coef=0.1), True, marks=SLOW),
    ],
)
def test_which_loss_terms_are_a_signal_without_advantages(loss, has_signal):
    """The policy differs from the reference. The entropy bonus works without log.entropy."""
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), optax.identity()
    with jax.set_mesh(mesh):
        state = init_train_state(mesh, jax.tree.map(jnp.array, params()), optimizer)
        state = state.replace(is_reference=jax.device_put(False, state.is_reference.sharding))
        cfg = replace(CFG, loss=loss, log=LogSection(entropy=False))
        update = make_update(CONFIG, cfg, mesh, params(), optimizer)
        rows = packed(experience().replace(advantages=np.zeros(8, np.float32)))
        state, metrics = update(state, shard_rows(mesh, rows))
    assert (metrics["optim/no_signal"], metrics["optim/skipped"]) == (not has_signal, 0)
    assert (metrics["optim/grad_norm"] > 0) == has_signal  # a penalty in the reward is not in the loss as well
    moved = any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (params(), state.params)), strict=True))
    assert moved == has_signal
    assert ("policy/kl_ref" in metrics) == (loss.kl_coef > 0)  # also where the penalty is in the reward
    assert ("policy/entropy" in metrics) == (loss.entropy_coef > 0)


@pytest.mark.parametrize("micro_tokens", [16, 1000])
def test_logp_gap_is_between_sampler_and_trainer(micro_tokens):
    """Two tokens, in two micro-batches, differ by 0.5 and 0.3: the largest is 0.5, and the mean their weighted sum."""
    batch = on_policy()
    moved = batch.sampler_logps.copy()
    moved[5, 0] += 0.5
    moved[5, -1] += 9.0
    moved[0, 1] -= 0.3
    assert batch.mask[5, 0] and batch.mask[0, 1] and not batch.mask[5, -1]  # 9.0 is behind the completion
    _, metrics = GRADIENTS(params(), packed(batch.replace(sampler_logps=moved), micro_tokens))
    np.testing.assert_allclose(metrics["policy/logp_gap/max"], 0.5, atol=1e-5)
    expected = token_weights(jnp.asarray(batch.mask))[[5, 0], [0, 1]] @ jnp.asarray([0.5, 0.3])
    np.testing.assert_allclose(metrics["policy/logp_gap/mean"], expected, atol=1e-5)


def test_logps_and_entropies_match_full_logits():
    batch = experience()
    logps, entropies = exact_scores(batch)
    expected = np.asarray(jax.jit(plain_logps)(params(), jnp.asarray(batch.tokens)))
    for n, t in np.argwhere(batch.mask):
        column = int(batch.prompt_lengths[n]) + t
        distribution = expected[n, column - 1]
        np.testing.assert_allclose(logps[n, t], distribution[batch.tokens[n, column]], atol=2e-5)
        np.testing.assert_allclose(entropies[n, t], -np.sum(np.exp(distribution) * distribution), atol=2e-5)


@pytest.mark.slow
def test_entropy_is_not_computed_when_it_is_off():
    rows = packed(experience())
    logps, entropies = packed_logprobs(CONFIG, params(), rows, TEMPERATURE, entropy=False)
    assert (entropies == 0).all()
    np.testing.assert_allclose(logps, SCORE(params(), rows)[0], atol=2e-6)

    def flops(entropy):
        run = jax.jit(lambda params: packed_logprobs(CONFIG, params, rows, TEMPERATURE, entropy=entropy))
        return run.lower(params()).compile().cost_analysis()["flops"]

    vocabulary = rows.tokens.size * CONFIG.vocab_size  # of which the entropy takes a product and a sum
    assert flops(True) - flops(False) > 2 * vocabulary


@pytest.mark.parametrize("micro_tokens", [1000, pytest.param(16, marks=SLOW)])
def test_reference_is_scored_like_the_policy(micro_tokens):
    batch = experience()
    rows = packed(batch, micro_tokens)
    logps = score_completions(CONFIG, params(), rows, temperature=TEMPERATURE, chunk_tokens=5)
    np.testing.assert_allclose(unpack(logps, rows, batch), exact_scores(batch)[0], atol=1e-5)


@pytest.mark.parametrize("sizes", [REPRESENTATIVE, pytest.param((1, 1, 8), marks=SLOW)])
def test_reference_scores_agree_on_one_and_eight_devices(sizes):
    """On fewer than 8 data shards, the scores are computed in a loop over micro-batches."""
    batch, mesh = experience(), make_mesh(*sizes)
    sharded = jax.device_put(params(), tree_shardings(mesh, params()))
    with jax.set_mesh(mesh):
        rows = packed(batch, 16, num_data_shards(mesh))
        logps = score_completions(CONFIG, sharded, shard_rows(mesh, rows), temperature=TEMPERATURE, chunk_tokens=5)
    np.testing.assert_allclose(unpack(logps, rows, batch), exact_scores(batch)[0], atol=1e-5)


@pytest.mark.parametrize("micro_tokens", [16, pytest.param(1000, marks=SLOW)])
def test_bfloat16_gradients_are_near_and_accumulated_in_float32(micro_tokens):
    batch = packed(on_policy(), micro_tokens)
    grads = gradients_of(replace(CONFIG, compute_dtype="bfloat16"))(params(), batch)[0]
    expected = GRADIENTS(params(), batch)[0]
    for have, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert have.dtype == jnp.float32
        assert np.abs(have - want).max() < 0.1 * np.abs(want).max()
    kernel = np.asarray(grads["layers"][0]["mlp"]["up"]["kernel"])
    assert (kernel != kernel.astype(jnp.bfloat16).astype(np.float32)).mean() > 0.5  # not rounded to bfloat16 anywhere


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["layers", "matmuls"])
def test_rematerialization_does_not_change_the_gradient(remat):
    batch = packed(experience())
    assert_same(gradients_of(replace(CONFIG, remat=remat))(params(), batch), GRADIENTS(params(), batch))


@pytest.mark.slow
def test_rematerialization_costs_flops():
    def flops(remat):
        run = gradients_of(replace(CONFIG, remat=remat))
        return run.lower(params(), packed(experience())).compile().cost_analysis()["flops"]

    assert flops("none") < flops("matmuls") < flops("layers")


HEAD_TEMPERATURE = 0.7


def score_full_logits(model_cfg, weights, hidden, targets):
    """Returns log-probs and entropies from a log-softmax of the full logits, which JAX differentiates by itself."""
    logits = temperature_logits(model_cfg, head_matmul(model_cfg, weights, hidden), HEAD_TEMPERATURE)
    logps = jax.nn.log_softmax(logits)
    finite_logps = jnp.where(jnp.isfinite(logps), logps, 0.0)
    entropies = -jnp.sum(jnp.exp(logps) * finite_logps, axis=-1)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0], entropies


def scores_and_gradients(score, weights, hidden, counts, used):
    """Returns the scores of the first `counts` columns, and the gradient of a weighted sum of the scores in `used`."""
    coefficients = jax.random.normal(jax.random.key(2), (2, *hidden.shape[:2]))

    def total(weights, hidden):
        scores = [jnp.where(jnp.arange(hidden.shape[1]) < counts[:, None], x, 0) for x in score(weights, hidden)]
        return sum(jnp.sum(coefficients[i] * scores[i]) for i in used), scores

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(weights, hidden)


LOGPS, ENTROPIES, BOTH = (0,), (1,), (0, 1)


@pytest.mark.parametrize(
    "softcap, tied, used, chunk_tokens, vocab_block",
    [
        # 3 columns at a time, the last block padded; 47 ids in blocks of 16, of which the last two overlap.
        (0.0, False, BOTH, 12, 20),
        (3.0, True, BOTH, 12, 20),
        (3.0, False, ENTROPIES, 12, 20),
        pytest.param(3.0, False, LOGPS, 12, 20, marks=SLOW),
        pytest.param(0.0, False, BOTH, 1000, 16384, marks=SLOW),  # a single block, as in the other tests
        pytest.param(3.0, True, BOTH, 1000, 16384, marks=SLOW),
    ],
)
def test_blocks_of_the_head_do_not_change_scores_or_gradients(
    softcap, tied, used, chunk_tokens, vocab_block, monkeypatch
):
    """Compares with log-softmax of full logits under JAX's own derivative. Columns beyond the counts have none."""
    monkeypatch.setattr(grpo_jax.learn.logprobs, "MAX_VOCAB_BLOCK", vocab_block)
    model_cfg = replace(CONFIG, vocab_size=47, logit_softcap=softcap, tie_embeddings=tied)
    hidden = jax.random.normal(jax.random.key(0), (4, 11, 32))
    targets = jax.random.randint(jax.random.key(1), (4, 11), 0, 45)
    counts = jnp.asarray([11, 3, 0, 7])

    def blocks(weights, hidden):
        options = dict(counts=counts, chunk_tokens=chunk_tokens)
        return logprobs_from_hidden(model_cfg, weights, hidden, targets, HEAD_TEMPERATURE, **options)

    def full(weights, hidden):
        return score_full_logits(model_cfg, weights, hidden, targets)

    actual, expected = (scores_and_gradients(x, params(model_cfg), hidden, counts, used) for x in (blocks, full))
    for have, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5)


def test_blocks_of_whole_tiles_do_not_change_scores_or_gradients(monkeypatch):
    """On accelerators: 47 ids in blocks of 18, which is a multiple of 6, of which the last two overlap."""
    monkeypatch.setattr(grpo_jax.learn.logprobs, "mesh_platform", lambda: "tpu")
    monkeypatch.setattr(grpo_jax.learn.logprobs, "LANES", 6)
    assert grpo_jax.learn.logprobs.vocab_blocks(47) == (1, 47)
    test_blocks_of_the_head_do_not_change_scores_or_gradients(3.0, True, BOTH, 12, 20, monkeypatch)
    assert grpo_jax.learn.logprobs.vocab_blocks(47) == (3, 18)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 2, 4), marks=SLOW)])
@pytest.mark.parametrize("tied, used", [(False, BOTH), pytest.param(True, ENTROPIES, marks=SLOW)])
def test_gradients_of_scores_agree_on_eight_devices(sizes, tied, used, monkeypatch):
    """Each device along the tensor axis has a part of the vocabulary, in blocks of at most 10 ids."""
    monkeypatch.setattr(grpo_jax.learn.logprobs, "MAX_VOCAB_BLOCK", 10)
    model_cfg = replace(CONFIG, logit_softcap=3.0, tie_embeddings=tied)
    hidden = jax.random.normal(jax.random.key(0), (4, 6, 32))
    targets = jax.random.randint(jax.random.key(1), (4, 6), 0, 45)
    counts, mesh = jnp.asarray([6, 3, 0, 5]), make_mesh(*sizes)

    def blocks(weights, hidden):
        return logprobs_from_hidden(
            model_cfg, weights, hidden, targets, HEAD_TEMPERATURE, counts=counts, chunk_tokens=2
        )

    def full(weights, hidden):
        return score_full_logits(model_cfg, weights, hidden, targets)

    expected = scores_and_gradients(full, params(model_cfg), hidden, counts, used)
    sharded = jax.device_put(params(model_cfg), tree_shardings(mesh, params(model_cfg)))
    with jax.set_mesh(mesh):
        actual = scores_and_gradients(blocks, sharded, shard_rows(mesh, hidden), counts, used)
    for have, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5)


def test_the_gradient_of_entropies_costs_nothing_if_the_loss_does_not_use_them():
    hidden, targets = jnp.ones((2, 11, 32)), jnp.ones((2, 11), jnp.int32)

    def flops(used):
        def total(hidden):
            scores = logprobs_from_hidden(CONFIG, params(), hidden, targets, 1.0, chunk_tokens=22)
            return sum(scores[i].sum() for i in used), scores

        return jax.jit(jax.grad(total, has_aux=True)).lower(hidden).compile().cost_analysis()["flops"]

    assert flops(BOTH) - flops(LOGPS) > 3 * targets.size * CONFIG.vocab_size


def test_memory_of_the_head_is_that_of_a_chunk():
    """With 2,048 ids and chunks of 512 tokens, twice the tokens add only to the gradient of the hidden states."""
    model_cfg = replace(CONFIG, vocab_size=2048, tokenizer_vocab_size=2048)
    weights = params(model_cfg)

    def temporary_bytes(tokens):
        hidden, targets = jnp.zeros((1, tokens, 32)), jnp.zeros((1, tokens), jnp.int32)

        def loss(weights, hidden):
            return logprobs_from_hidden(model_cfg, weights, hidden, targets, 1.0, chunk_tokens=512)[0].sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunk = 512 * 2048 * 4
    assert temporary_bytes(2048) < 4 * chunk
    assert temporary_bytes(4096) - temporary_bytes(2048) < 0.1 * chunk


def test_sampler_logprobs_match_training_logprobs():
    """The sampler reads the KV cache, whereas training runs whole sequences; prompts have unequal lengths."""
    batch = make_experience(pad_prompts(PROMPTS), sampled())
    logps, _ = exact_scores(batch)
    assert np.abs(np.where(batch.mask, logps - batch.sampler_logps, 0)).max() < 2e-5
    np.testing.assert_array_equal(batch.mask.sum(axis=1), sampled().lengths.reshape(-1))
    assert len(np.unique(batch.mask.sum(axis=1))) > 1


def test_experience_joins_prompt_and_completion_without_a_gap():
    batch = make_experience(pad_prompts(PROMPTS), sampled())
    np.testing.assert_array_equal(batch.prompt_lengths, [3, 3, 5, 5, 1, 1, 2, 2])
    np.testing.assert_array_equal(batch.prompt_ids, [0, 0, 1, 1, 2, 2, 3, 3])
    for n, tokens in enumerate(batch.tokens):
        row = PROMPTS[n // 2] + sampled().tokens[n // 2, n % 2].tolist()
        assert tokens.tolist() == row + [0] * (len(tokens) - len(row))


def test_minibatches_hold_each_sequence_once_and_keep_groups_together():
    batch = experience().replace(advantages=np.arange(8.0))
    minibatches = [take_rows(batch, rows) for rows in minibatch_rows(batch.prompt_ids, jax.random.key(0), 2)]
    assert sorted(np.concatenate([part.advantages for part in minibatches])) == list(range(8))
    for part in minibatches:
        assert len(np.unique(part.prompt_ids)) == 2
    orders = {tuple(minibatch_rows(batch.prompt_ids, jax.random.key(seed), 2)[0]) for seed in range(8)}
    assert len(orders) > 2
