"""Turns gradients into new parameters: learning-rate schedules, update rules, and the sharding of their state.

With every rule, an update is

    clip the global norm -> rule -> + weight_decay * parameter -> * -learning rate

so `optim.lr` and `optim.weight_decay` mean the same for all of them: before the learning rate, the step of a rule has
a root mean square (RMS) of at most about 1, and weight decay removes a fraction lr * weight_decay of the parameter.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from grpo_jax.config.schema import OptimSection
from grpo_jax.model.parameters import row_for, tree_shardings
from grpo_jax.parallel.mesh import path_name
from grpo_jax.types import TrainState

# Multiplier of the learning rate as a function of progress through the decay, from 0 to 1.
DECAY_SHAPES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + jnp.cos(math.pi * progress)) / 2,
}

MUON_RMS = 0.2  # RMS of Muon's steps, about that of AdamW's, so that the same optim.lr suits both (arXiv 2502.16982)


def make_schedule(optim: OptimSection) -> optax.Schedule:
    """Builds the learning-rate schedule of a config's `optim` section.

    The learning rate warms up linearly and reaches `lr` at update `warmup_steps`. A decaying schedule then falls until
    `end_lr_fraction * lr` is left, from the first update after `decay_steps` on.

    Args:
        optim: The `optim` section.

    Returns:
        A function from the number of earlier updates to the learning rate.
    """
    decay, end = DECAY_SHAPES[optim.schedule], optim.end_lr_fraction

    def schedule(step) -> Float[Array, ""]:
        warmup = jnp.minimum(1.0, (step + 1) / max(1, optim.warmup_steps))
        decay_steps = max(1, optim.decay_steps - optim.warmup_steps)
        progress = jnp.clip((step - optim.warmup_steps) / decay_steps, 0, 1)
        return optim.lr * warmup * (end + (1 - end) * decay(progress))

    return schedule


def muon_dimensions(path) -> MuonDimensionNumbers | None:
    """Returns which axes of a parameter form the matrix that Muon orthogonalizes.

    Args:
        path: The key path of the parameter.

    Returns:
        The input axes and the output axes of the matrix, or None if Adam updates the parameter. Axes are counted from
        the back, because layers and experts are stacked in front, and each of them has a matrix of its own.
    """
    row = row_for(path_name(path))
    axes = tuple(range(-len(row.inputs + row.outputs), 0))
    return MuonDimensionNumbers(axes[: len(row.inputs)], axes[len(row.inputs) :]) if row.muon else None


def muon(b1: float, b2: float, eps: float, mu_dtype: str) -> optax.GradientTransformation:
    """Builds Muon for the matrices of the layers, and Adam for all other parameters.

    `optax.contrib.muon` is not used: its Adam takes Nesterov steps, and it cannot mask that part's weight decay.
    """

    def dimensions(updates):
        return jax.tree_util.tree_map_with_path(lambda path, _: muon_dimensions(path), updates)

    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if muon_dimensions(path) else "adam", params)

    def rescale(path, update):
        inputs, outputs = (math.prod(update.shape[axis] for axis in axes) for axes in muon_dimensions(path))
        return update * MUON_RMS * math.sqrt(max(inputs, outputs))

    orthogonalized = scale_by_muon(beta=b1, mu_dtype=mu_dtype, weight_dimension_numbers=dimensions)
    rescaled = optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(rescale, updates))
    rules = {"muon": optax.chain(orthogonalized, rescaled), "adam": optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)}
    return optax.partition(rules, labels)


def adafactor() -> optax.GradientTransformation:
    """Builds Adafactor without a first moment. The RMS of its step over a leaf (all layers of a stack) is at most 1.

    Unlike `optax.adafactor`, steps are not scaled by the size of the parameter: at the learning rates of the other
    rules that would make them close to 0, and exactly 0 for a bias that is 0.
    """
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def make_optimizer(optim: OptimSection) -> optax.GradientTransformation:
    """Builds the optimizer of a config's `optim` section: all of the steps shown at the top except for the last.

    `apply_gradients` multiplies by the learning rate, because the schedule advances even if an update has no signal.
    """
    rules = {
        "adamw": lambda: optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=optim.mu_dtype),
        "adafactor": adafactor,
        "lion": lambda: optax.scale_by_lion(optim.b1, optim.b2, mu_dtype=optim.mu_dtype),
        "muon": lambda: muon(optim.b1, optim.b2, optim.eps, optim.mu_dtype),
    }
    return optax.chain(
        optax.clip_by_global_norm(optim.grad_clip),
        rules[optim.name](),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
    )


def decay_mask(params):
    """Returns a tree that is True for the parameters that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: row_for(path_name(path)).decay, params)


def to_float32(tree):
    """Casts a tree to float32.

    The optimizer computes and keeps its state in float32: bfloat16 cannot hold an average over 1,000 updates.
    """
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def apply_gradients(
    state: TrainState,
    grads,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    has_signal: Bool[Array, ""] | bool = True,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Applies one update, unless it would not be finite (a skipped update) or there is no signal.

    An update is not finite if the norm of the gradient is not, or if a new parameter is not, for example because of a
    damaged moment. A skipped update and one without a signal leave the parameters and the optimizer state as they are;
    the learning-rate schedule counts only the latter. `optax.apply_if_finite` is not used: after too many skips in a
    row it applies the bad update, and it does not notice a finite gradient whose norm overflows.

    Args:
        state: The state before the update.
        grads: Gradients, a tree like the parameters in any float dtype.
        optimizer: The optimizer, from `make_optimizer`.
        schedule: The learning-rate schedule.
        has_signal: Whether the minibatch has a signal. If not, the gradient is 0 up to rounding.

    Returns:
        The state after the update, and the metrics `optim/grad_norm` (before clipping), `optim/skipped` (0 or 1),
        `optim/no_signal` (0 or 1), `optim/lr` and `optim/changed_frac`.
    """
    grads = to_float32(grads)
    norm, lr = optax.tree.norm(grads), schedule(state.step - state.skipped)
    updates, opt_state = optimizer.update(grads, state.opt_state, to_float32(state.params))
    params = optax.apply_updates(state.params, jax.tree.map(lambda x: -lr * x, updates))
    finite = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(to_float32(params)))
    is_applied = finite & has_signal
    metrics = {"optim/skipped": 1.0 - finite, "optim/no_signal": 1.0 * (finite ^ is_applied)}

    def keep_if_applied(new_tree, old_tree):
        # One select per leaf rather than a single lax.cond: XLA fuses it into the update, which then reuses the memory
        # of the donated state.
        return jax.tree.map(lambda new, old: jnp.where(is_applied, new, old), new_tree, old_tree)

    params = keep_if_applied(params, state.params)
    metrics["optim/changed_frac"] = changed_fraction(params, state.params)
    return TrainState(
        step=state.step + 1,
        params=params,
        opt_state=keep_if_applied(opt_state, state.opt_state),
        skipped=state.skipped + ~finite,
        is_reference=state.is_reference & ~is_applied,
    ), metrics | {"optim/grad_norm": norm, "optim/lr": lr}


def changed_fraction(new_params, params) -> Float[Array, ""]:
    """Returns the fraction of parameters whose stored value differs between two trees.

    If it is far below 1, updates are smaller than the rounding of `model.param_dtype`.
    """
    # Means of means, because a float32 sum over all elements of a leaf would stop growing at 2^24.
    leaves = list(zip(jax.tree.leaves(new_params), jax.tree.leaves(params), strict=True))
    fractions = [jnp.mean(jnp.mean(new != old, axis=-1, dtype=jnp.float32)) for new, old in leaves]
    sizes = [new.size for new, _ in leaves]
    return sum(fraction * (size / sum(sizes)) for fraction, size in zip(fractions, sizes, strict=True))


def moment_spec(kind: str, shape: tuple[int, ...], param_shape: tuple[int, ...], param_spec: P) -> P:
    """Returns the partition spec of an optimizer moment.

    Args:
        kind: The moment's name in the optimizer state. Adafactor's `v_row` and `v_col` are means over the parameter's
            largest and second largest dimension.
        shape: Shape of the moment.
        param_shape: Shape of its parameter.
        param_spec: Partition spec of its parameter.
    """
    if shape == param_shape:
        return param_spec
    if kind in ("v_row", "v_col") and len(param_shape) > 1:
        # The same argsort as in optax, so that dimensions of equal size are told apart in the same way.
        reduced = np.argsort(param_shape)[-1 if kind == "v_row" else -2]
        if shape == (*param_shape[:reduced], *param_shape[reduced + 1 :]):
            return P(*param_spec[:reduced], *param_spec[reduced + 1 :])
    return P()  # optax's placeholder for a moment that the rule does not keep


def train_state_shardings(mesh: Mesh | AbstractMesh, params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the sharding of each leaf of a train state. Optimizer moments are sharded like their parameters.

    Args:
        mesh: The device mesh.
        params: Arrays or `jax.ShapeDtypeStruct`s.
        optimizer: The optimizer.
    """
    shardings = tree_shardings(mesh, params)
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    shapes_and_specs = {path_name(path): (leaf.shape, sharding.spec) for (path, leaf), sharding in leaves}
    replicated = NamedSharding(mesh, P())

    def moment_sharding(path, leaf):
        # The path of a moment ends in the name of the moment and the path of its parameter.
        names = path_name(path).split("/")
        for start in range(1, len(names)):
            param = shapes_and_specs.get("/".join(names[start:]))
            if param:
                return NamedSharding(mesh, moment_spec(names[start - 1], leaf.shape, *param))
        return replicated  # a counter, or Muon's coefficients

    opt_state = jax.tree_util.tree_map_with_path(moment_sharding, train_state_shapes(params, optimizer).opt_state)
    return TrainState(replicated, shardings, opt_state, skipped=replicated, is_reference=replicated)


def new_train_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update."""
    opt_state = optimizer.init(to_float32(params))
    return TrainState(jnp.int32(0), params, opt_state, skipped=jnp.int32(0), is_reference=jnp.bool_(True))


def train_state_shapes(params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the shapes and dtypes of a train state, given the parameters or their shapes."""
    return jax.eval_shape(lambda params: new_train_state(params, optimizer), params)


def init_train_state(mesh: Mesh, params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update, sharded over the mesh. `params` are donated."""
    shardings = train_state_shardings(mesh, params, optimizer)
    return jax.jit(lambda params: new_train_state(params, optimizer), out_shardings=shardings, donate_argnums=0)(params)
