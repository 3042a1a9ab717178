"""The optimizer: formulas by hand, updates that are left out, float32 state, and where the state lies."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax.config.schema import OptimSection
from grpo_jax.learn.optimizer import (
    apply_gradients,
    init_train_state,
    make_optimizer,
    make_schedule,
    moment_spec,
    muon_dimensions,
    new_train_state,
    train_state_shapes,
    train_state_shardings,
)
from grpo_jax.model.architecture import ExpertsConfig, LatentConfig, LayerConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import make_mesh, path_name, tree_shardings
from tests.tiny import CONFIG

NAMES = ("adamw", "adafactor", "lion", "muon")
SOME = ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "adamw")]
MIXTURE = replace(  # every kind of parameter there is
    CONFIG,
    layers=(LayerConfig(), LayerConfig(use_experts=True), LayerConfig(use_experts=True)),
    num_kv_heads=4,
    mlp_bias=True,
    experts=ExpertsConfig(8, 2, 24, shared_intermediate_size=16, sigmoid_gate=True),
    latent=LatentConfig(16, 8, 8, 4, 8),
)
BIASED = replace(CONFIG, qkv_bias=True, qk_norm=True, tie_embeddings=True)


def section(**values):
    """The `optim` section of the default config with other values."""
    return OptimSection(**values)


@cache
def compiled(items):
    """An optimizer and its jitted update, made once for a section's items."""
    optim = OptimSection(**dict(items))
    optimizer = make_optimizer(optim)
    return optimizer, jax.jit(partial(apply_gradients, optimizer=optimizer, schedule=make_schedule(optim)))


def run(optim, weights, *gradients):
    """The states before and after each update, and the last one's metrics."""
    optimizer, update = compiled(tuple(vars(optim).items()))
    states, metrics = [new_train_state(weights, optimizer)], None
    for grads in gradients:
        state, metrics = update(states[-1], grads)
        states.append(state)
    return states, metrics


def small(seed=0, dtype=jnp.float32):
    """A matrix in two layers, and its bias."""
    key = jax.random.key(seed)
    return {
        "layers": (
            {
                "mlp": {
                    "gate": {
                        "kernel": jax.random.normal(key, (2, 8, 24), dtype),
                        "bias": jax.random.normal(jax.random.fold_in(key, 1), (2, 24), dtype),
                    }
                }
            },
        )
    }


def parts(tree):
    """Kernel and bias of such a tree."""
    gate = tree["layers"][0]["mlp"]["gate"]
    return gate["kernel"], gate["bias"]


def differences(after, before):
    return parts(jax.tree.map(jnp.subtract, after.params, before.params))


def named(tree):
    """{path: leaf}."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_adamw_is_its_formula():
    """Two updates of warm-up, gradients above and below the clip, decay of the kernel only."""
    optim = section(lr=0.1, warmup_steps=2, b1=0.8, b2=0.95, weight_decay=0.3, grad_clip=2.0)
    gradients = [jax.tree.map(lambda x: scale * x, small(seed)) for seed, scale in ((1, 5.0), (2, 0.01), (3, 1.0))]
    states, metrics = run(optim, small(), *gradients)
    value = {name: np.asarray(x, np.float64) for name, x in named(small()).items()}
    first, second = ({name: 0.0 for name in value} for _ in range(2))
    for update, grads in enumerate(gradients, 1):
        grads = {name: np.asarray(x, np.float64) for name, x in named(grads).items()}
        norm = np.sqrt(sum((x**2).sum() for x in grads.values()))
        for name, grad in grads.items():
            grad = grad * min(1, 2.0 / norm)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            change = first[name] / (1 - 0.8**update) / (np.sqrt(second[name] / (1 - 0.95**update)) + 1e-8)
            decay = 0.3 * value[name] if name.endswith("kernel") else 0
            value[name] = value[name] - 0.1 * min(1, update / 2) * (change + decay)
            np.testing.assert_allclose(named(states[update].params)[name], value[name], atol=2e-6)
    assert metrics["optim/lr"] == np.float32(0.1) and metrics["optim/skipped"] == 0 and states[-1].step == 3
    np.testing.assert_allclose(metrics["optim/grad_norm"], norm, rtol=1e-6)  # before the clip


@pytest.mark.parametrize("name", NAMES)
def test_first_step_has_its_size_and_goes_down(name):
    """Whatever the gradient's size: lr in each entry, up to the sign; a matrix of Muon's 0.2 lr in root mean square."""
    grads = jax.tree.map(lambda x: 1e3 * x, small(1))
    (before, after), _ = run(section(name=name, lr=0.01), small(), grads)
    for change, grad, muon in zip(differences(after, before), parts(grads), (name == "muon", False)):
        if muon:
            size = np.sqrt((np.asarray(change) ** 2).mean())
            assert 0.15 * 0.01 < size < 0.25 * 0.01 and (change * grad).sum() < 0
        else:
            np.testing.assert_allclose(change, -0.01 * jnp.sign(grad), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_quadratic_is_lowered(name):
    """The sum of squares, whose gradient is 2x."""
    optimizer, update = compiled(tuple(vars(section(name=name, lr=0.1, b2=0.99)).items()))
    state = new_train_state(small(), optimizer)
    for _ in range(20):
        state, _ = update(state, jax.tree.map(lambda x: 2 * x, state.params))
    for value, start in zip(parts(state.params), parts(small())):
        assert (value**2).sum() < 0.5 * (start**2).sum()


@pytest.mark.parametrize("name", SOME)
def test_decay_is_a_part_of_the_parameter_by_the_learning_rate(name):
    """Without a gradient nothing else moves, and a bias not at all; so for every rule."""
    (before, after), _ = run(
        section(name=name, lr=0.02, weight_decay=0.5), small(), jax.tree.map(jnp.zeros_like, small())
    )
    kernel, bias = differences(after, before)
    np.testing.assert_allclose(kernel, -0.02 * 0.5 * parts(small())[0], atol=1e-6)
    assert not bias.any()


def test_lion_is_its_formula():
    """The step looks b1 back, the moment b2."""
    first, second = ({name: np.asarray(x) for name, x in named(small(seed)).items()} for seed in (1, 2))
    states, _ = run(section(name="lion", lr=0.1, b1=0.5, b2=0.9, grad_clip=1e9), small(), small(1), small(2))
    for name, start in named(small()).items():
        want = start - 0.1 * np.sign(first[name]) - 0.1 * np.sign(0.5 * 0.1 * first[name] + 0.5 * second[name])
        np.testing.assert_allclose(named(states[2].params)[name], want, atol=1e-6)
        moment = next(leaf for path, leaf in named(states[2].opt_state).items() if path.endswith("/mu/" + name))
        np.testing.assert_allclose(moment, 0.9 * 0.1 * first[name] + 0.1 * second[name], atol=1e-6)


def test_moments_of_muon():
    """Of a matrix, the first alone, by b1; of a bias, Adam's."""
    states, _ = run(section(name="muon", b1=0.5, b2=0.9, grad_clip=1e9), small(), small(1))
    kernel, bias = parts(small(1))
    found = {}
    for path, leaf in named(states[1].opt_state).items():
        if leaf.ndim > 1:
            moment, *_, name = path.split("/")[-6:]  # mu/layers/0/mlp/gate/kernel
            found[moment, name] = leaf
    assert found.keys() == {("mu", "kernel"), ("mu", "bias"), ("nu", "bias")}
    np.testing.assert_allclose(found["mu", "kernel"], 0.5 * kernel, atol=1e-6)
    np.testing.assert_allclose(found["mu", "bias"], 0.5 * bias, atol=1e-6)
    np.testing.assert_allclose(found["nu", "bias"], 0.1 * bias**2, atol=1e-6)


def test_adafactor_keeps_rows_and_columns():
    """Squares that are a product of a row's and a column's factor need no more: the step is the sign, as unfactored."""
    key = jax.random.key(0)
    rows, columns = (jnp.exp(jax.random.normal(jax.random.fold_in(key, n), (2, n))) for n in (128, 130))
    grad = rows[:, :, None] * columns[:, None] * jnp.sign(jax.random.normal(key, (2, 128, 130)))
    weights = {"layers": ({"mlp": {"gate": {"kernel": jnp.ones((2, 128, 130)), "bias": jnp.zeros((2, 130))}}},)}
    grads = {"layers": ({"mlp": {"gate": {"kernel": grad, "bias": jnp.zeros((2, 130))}}},)}
    (before, after), _ = run(section(name="adafactor", lr=0.5), weights, grads)
    np.testing.assert_allclose(differences(after, before)[0], -0.5 * jnp.sign(grad), rtol=1e-3)
    sizes = [leaf.size for leaf in jax.tree.leaves(after.opt_state)]
    assert sum(sizes) < grad.size / 10


def test_adafactor_clips_a_leafs_step():
    """A gradient 10 times the last one would be a step of about 1.5 in root mean square; 1 is left of it."""
    grads, optim = small(1), section(name="adafactor", lr=0.1, grad_clip=1e9)
    states, _ = run(optim, small(), grads, jax.tree.map(lambda x: 10 * x, grads))
    change = np.asarray(differences(states[2], states[1])[0])
    np.testing.assert_allclose(np.sqrt((change**2).mean()), 0.1, rtol=1e-3)


STACKS = {  # path -> shape of a stack, and of its matrices
    "mlp/gate/kernel": ((2, 8, 24), (8, 24)),
    "attention/q/kernel": ((2, 8, 4, 5), (8, 20)),
    "attention/o/kernel": ((2, 4, 5, 8), (20, 8)),
    "attention/kv_b": ((2, 6, 4, 5), (6, 20)),
    "attention/q_a/kernel": ((2, 20, 8), (20, 8)),
    "moe/experts_down": ((2, 3, 24, 8), (24, 8)),
    "moe/router/kernel": ((2, 24, 8), (24, 8)),
}


def orthogonal(matrix):
    """Muon's five steps (Jordan 2024) on one matrix: nearly U V^T of its singular value decomposition."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_takes_each_matrix_of_a_stack_for_itself():
    """Gradients of very unequal size in the two layers: both become matrices whose singular values are near 1."""
    draw = np.random.default_rng(0)
    grads = {}
    for path, (shape, _) in STACKS.items():
        leaf = (draw.standard_normal(shape) * np.array([1, 50]).reshape(2, *[1] * (len(shape) - 1))).astype(np.float32)
        for name in reversed(path.split("/")):
            leaf = {name: leaf}
        grads[path] = leaf
    (before, after), _ = run(section(name="muon", lr=1.0, grad_clip=1e9), jax.tree.map(jnp.zeros_like, grads), grads)
    for path, (_, matrix) in STACKS.items():
        steps = -np.asarray(jax.tree.leaves(after.params[path])[0]).reshape(-1, *matrix) / (0.2 * np.sqrt(max(matrix)))
        for step, grad in zip(steps, jax.tree.leaves(grads[path])[0].reshape(-1, *matrix)):
            np.testing.assert_allclose(step, orthogonal(grad), atol=1e-4, err_msg=path)
            values = np.linalg.svd(step, compute_uv=False)
            assert values.min() > 0.6 and values.max() < 1.3, path


@pytest.mark.parametrize("model_cfg", [CONFIG, MIXTURE, BIASED])
def test_muon_has_the_matrices_of_the_layers_and_adam_the_rest(model_cfg):
    """Their axes are all but those that layers and experts are stacked in."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(model_cfg)):
        name, numbers = path_name(path), muon_dimensions(path)
        vector = name.split("/")[-1] in ("scale", "bias", "correction")
        assert (numbers is None) == (vector or not name.startswith("layers")), name
        if numbers:
            axes = [axis % leaf.ndim for axis in (*numbers.reduction_axis, *numbers.output_axis)]
            assert axes == list(range(2 if "experts_" in name else 1, leaf.ndim)), name


def test_parameter_that_muon_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="found none for layers/conv/kernel"):
        make_optimizer(section(name="muon")).init({"layers": {"conv": {"kernel": jnp.ones((2, 3))}}})


@pytest.mark.parametrize(
    "values, rates",
    [
        (dict(), {0: 2, 9: 2}),
        (dict(warmup_steps=4), {0: 0.5, 1: 1, 3: 2, 9: 2}),  # no update without effect
        (dict(warmup_steps=4, end_lr_fraction=0.3, decay_steps=5), {0: 0.5, 3: 2, 9: 2}),
        (dict(schedule="linear", decay_steps=10), {0: 2, 5: 1, 9: 0.2, 10: 0, 99: 0}),
        (
            dict(schedule="linear", warmup_steps=4, decay_steps=12, end_lr_fraction=0.5),
            {0: 0.5, 3: 2, 4: 2, 8: 1.5, 12: 1, 99: 1},
        ),
        (dict(schedule="cosine", decay_steps=9), {0: 2, 3: 1.5, 6: 0.5, 9: 0, 99: 0}),
        (
            dict(schedule="cosine", warmup_steps=2, decay_steps=14, end_lr_fraction=0.1),
            {0: 1, 1: 2, 2: 2, 6: 1.55, 8: 1.1, 14: 0.2, 99: 0.2},
        ),
    ],
)
def test_learning_rates(values, rates):
    schedule = make_schedule(section(lr=2.0, **values))
    np.testing.assert_allclose([schedule(jnp.int32(step)) for step in rates], list(rates.values()), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (np.inf, 1e30))])
def test_gradient_that_is_not_finite_is_left_out(name, bad):
    """As if it had not been: bit by bit, in the schedule and in every count. The norm of 1e30 overflows."""
    optim = section(name=name, lr=0.01, warmup_steps=4, weight_decay=0.1)
    first, second = small(1), small(2)
    broken = jax.tree.map(lambda x: x.at[0, 3].set(bad), second)
    states, metrics = run(optim, small(), first, broken)
    assert metrics["optim/skipped"] == 1 and not np.isfinite(metrics["optim/grad_norm"])
    assert (states[2].step, states[2].skipped, states[1].skipped) == (2, 1, 0)
    for old, new in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in states[1:]), strict=True):
        np.testing.assert_array_equal(old, new)
    states, metrics = run(optim, small(), first, broken, second)
    expected, without = run(optim, small(), first, second)
    assert (states[3].step, states[3].skipped, metrics["optim/skipped"]) == (3, 1, 0)
    assert metrics["optim/lr"] == without["optim/lr"] == np.float32(0.005)  # the second of four updates of warm-up
    for have, want in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in (states[3], expected[2])), strict=True):
        np.testing.assert_array_equal(have, want)


def test_learning_rate_of_the_metrics_is_the_optimizers():
    """A step of Lion is the learning rate, in each entry."""
    optim = section(name="lion", lr=0.5, schedule="linear", decay_steps=5)
    broken = jax.tree.map(lambda x: x * np.nan, small(2))
    states, metrics = run(optim, small(), small(1), broken, broken, small(1))
    change = differences(states[-1], states[-2])[0]
    np.testing.assert_allclose(jnp.abs(change), metrics["optim/lr"], rtol=1e-5)
    np.testing.assert_allclose(metrics["optim/lr"], 0.4, rtol=1e-6)


@pytest.mark.parametrize("name", SOME)
def test_state_of_bfloat16_parameters_is_float32(name):
    """Gradients in bfloat16 too. The state is that of the same values in float32, and the parameters its rounding."""
    weights, grads = small(dtype=jnp.bfloat16), small(1, dtype=jnp.bfloat16)
    wide = partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    optim = section(name=name, lr=0.1, weight_decay=0.1)
    (_, have), metrics = run(optim, weights, grads)
    (_, want), expected = run(optim, wide(weights), wide(grads))
    narrow, full = (train_state_shapes(tree, make_optimizer(optim)).opt_state for tree in (weights, wide(weights)))
    assert narrow == full
    for made, leaf in zip(jax.tree.leaves(have.opt_state), jax.tree.leaves(want.opt_state), strict=True):
        assert made.dtype == leaf.dtype and made.dtype in (jnp.float32, jnp.int32)
        np.testing.assert_allclose(made, leaf, rtol=1e-6)
    for made, leaf in zip(parts(have.params), parts(want.params)):
        assert made.dtype == jnp.bfloat16
        np.testing.assert_allclose(wide(made), leaf, rtol=2**-7, atol=1e-6)
    np.testing.assert_allclose(metrics["optim/grad_norm"], expected["optim/grad_norm"], rtol=1e-6)


def test_second_moment_of_bfloat16_parameters_moves():
    """By a 1,000th an update: a bfloat16 would stand still where the average is near the gradient's square."""
    weights = small(dtype=jnp.bfloat16)
    ones = jax.tree.map(jnp.ones_like, weights)
    states, _ = run(section(grad_clip=1e9), weights, *[ones] * 3)
    moments = {name: leaf for name, leaf in named(states[-1].opt_state).items() if "/nu/" in name}
    assert len(moments) == 2
    for leaf in moments.values():
        np.testing.assert_allclose(leaf, 1 - 0.999**3, rtol=1e-5)


@pytest.mark.parametrize("name, kept", [("adamw", 2), ("lion", 2), ("muon", 2), ("adafactor", 0)])
def test_dtype_of_the_first_moment(name, kept):
    """It holds after an update, and is of no other leaf."""
    optim = section(name=name, mu_dtype="bfloat16", b2=0.99)
    for state in run(optim, small(), small(1))[0]:
        found = named(state.opt_state)
        narrow = [name for name, leaf in found.items() if leaf.dtype == jnp.bfloat16]
        assert len(narrow) == kept and all("/mu/" in name for name in narrow)


WIDE = replace(CONFIG, hidden_size=256, intermediate_size=384, head_dim=128)  # wide enough that Adafactor factors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_cfg", [CONFIG, *(pytest.param(x, marks=pytest.mark.slow) for x in (WIDE, MIXTURE))])
def test_state_is_split_as_its_parameters(name, model_cfg):
    """On 1 x 4 x 2 devices no matrix of the state is on each device as a whole if its parameter is not."""
    mesh, shapes, optimizer = make_mesh(1, 4, 2), param_shapes(model_cfg), make_optimizer(section(name=name))
    places, state = train_state_shardings(mesh, shapes, optimizer), train_state_shapes(shapes, optimizer)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    assert places.params == tree_shardings(mesh, shapes)
    sizes, where = named(shapes), {path: place.spec for path, place in named(places.params).items()}
    count = 0
    for path, place in named(places.opt_state).items():
        leaf, owner = named(state.opt_state)[path], [own for own in sizes if path.endswith("/" + own)]
        place.shard_shape(leaf.shape)  # raises if an axis does not divide its dimension
        if not owner:
            assert leaf.size <= 3 and place.spec == P()
        elif leaf.shape == sizes[owner[0]].shape:
            assert place.spec == where[owner[0]]
            count += 1
        elif leaf.ndim > 1 and any(where[owner[0]]):
            assert any(place.spec), path
            count += 1
    assert count >= len(sizes)


def test_split_of_adafactors_rows_and_columns():
    """Also where the two largest dimensions are equal; optax's own update says which is which."""
    spec = P(None, "fsdp", "tensor")
    assert moment_spec("v_row", (2, 8), (2, 8, 16), spec) == P(None, "fsdp")
    assert moment_spec("v_col", (2, 16), (2, 8, 16), spec) == P(None, "tensor")
    assert moment_spec("v_row", (2, 8), (2, 16, 8), spec) == P(None, "tensor")
    assert moment_spec("v_col", (2, 16), (2, 16, 8), spec) == P(None, "fsdp")
    assert moment_spec("v", (1,), (2, 8, 16), spec) == moment_spec("v_row", (1,), (8, 16), P("fsdp", "tensor")) == P()
    assert moment_spec("v_row", (2, 128), (2, 128, 128), spec) == P(None, "fsdp")
    assert moment_spec("v_col", (2, 128), (2, 128, 128), spec) == P(None, "tensor")
    weights = {"mlp": {"gate": {"kernel": jnp.ones((2, 128, 128))}}}
    rows = jnp.broadcast_to(jnp.arange(128.0)[:, None], (2, 128, 128))
    optimizer = make_optimizer(section(name="adafactor", grad_clip=1e9))
    state = optimizer.update({"mlp": {"gate": {"kernel": rows}}}, optimizer.init(weights), weights)[1]
    found = named(state)
    row, column = (next(leaf for path, leaf in found.items() if kind in path) for kind in ("v_row", "v_col"))
    assert np.ptp(row[0]) > 1 and np.ptp(column[0]) == 0  # v_row is by the first of the two, which fsdp splits


@pytest.mark.slow
@pytest.mark.parametrize("name, model_cfg", [*((name, CONFIG) for name in NAMES), ("adafactor", WIDE)])
def test_same_update_on_eight_devices(name, model_cfg):
    """Made, kept and updated in its place, in the memory of the state before."""
    optim = section(name=name, lr=0.1, weight_decay=0.1)
    optimizer, draw = make_optimizer(optim), np.random.default_rng(0)
    weights, grads = (
        jax.tree.map(lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape), jnp.float32), param_shapes(model_cfg))
        for _ in range(2)
    )
    (_, want), _ = run(optim, weights, grads)
    mesh = make_mesh(1, 4, 2)
    places = train_state_shardings(mesh, weights, optimizer)
    state = init_train_state(mesh, jax.device_put(weights, places.params), optimizer)
    assert jax.tree.map(lambda x: x.sharding, state) == places
    grads = jax.device_put(grads, places.params)
    update = (
        jax.jit(
            partial(apply_gradients, optimizer=optimizer, schedule=make_schedule(optim)),
            donate_argnums=0,
            out_shardings=(places, None),
        )
        .lower(state, grads)
        .compile()
    )
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert update.memory_analysis().alias_size_in_bytes == held
    have = update(state, grads)[0]
    assert jax.tree.map(lambda x: x.sharding, have) == places
    for made, leaf in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(made, leaf, atol=1e-4 * max(1, np.abs(leaf).max()))
