"""The optimizer: gradients become new parameters. Schedules, update rules, and where their state lies.

Whatever the rule, an update is

    clip the global norm -> rule -> + weight_decay * parameter -> * -learning rate

so that `optim.lr` and `optim.weight_decay` mean the same for all of them: the rules' steps have a root mean square of
at most about 1 before the learning rate, and decay is a part lr * weight_decay of the parameter.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from grpo_jax.config.schema import OptimSection
from grpo_jax.parallel.mesh import path_name, tree_shardings
from grpo_jax.types import TrainState

# What is left of the learning rate at a part 0 ... 1 of the way down to its end.
DECAY_SHAPES = {
    "constant": lambda part: 1.0,
    "linear": lambda part: 1 - part,
    "cosine": lambda part: (1 + jnp.cos(math.pi * part)) / 2,
}

# The end of a leaf's path -> the matrix that Muon orthogonalizes: which axes it multiplies its input with, and which
# its output has. Counted from the back, as layers, and experts, are stacked in front: each is a matrix of its own.
# None: no matrix between hidden states; Adam's.
MUON_TABLE = (
    (r"attention/([qkv]/kernel|q_b/kernel|kv_b)$", MuonDimensionNumbers((-3,), (-2, -1))),
    (r"attention/o/kernel$", MuonDimensionNumbers((-3, -2), (-1,))),
    (r"attention/(q_a|kv_a)/kernel$", MuonDimensionNumbers((-2,), (-1,))),
    (r"(mlp|shared)/(gate|up|down)/kernel$", MuonDimensionNumbers((-2,), (-1,))),
    (r"experts_(gate|up|down)$", MuonDimensionNumbers((-2,), (-1,))),
    (r"router/kernel$", MuonDimensionNumbers((-2,), (-1,))),
    (r"(embedding|head/kernel|scale|bias|correction)$", None),
)
MUON_RMS = 0.2  # root mean square of Muon's steps, about that of AdamW's (arXiv 2502.16982): both have one optim.lr


def make_schedule(optim: OptimSection) -> optax.Schedule:
    """The learning rate by the number of updates done before.

    A linear warm-up reaches `optim.lr` at update `optim.warmup_steps`. A schedule that decays goes down from there;
    from the first update after `optim.decay_steps` on, `optim.end_lr_fraction` of `optim.lr` is left.
    """
    shape, end = DECAY_SHAPES[optim.schedule], optim.end_lr_fraction

    def schedule(step) -> Float[Array, ""]:
        warm = jnp.minimum(1.0, (step + 1) / max(1, optim.warmup_steps))
        part = jnp.clip((step - optim.warmup_steps) / max(1, optim.decay_steps - optim.warmup_steps), 0, 1)
        return optim.lr * warm * (end + (1 - end) * shape(part))

    return schedule


def muon_dimensions(path) -> MuonDimensionNumbers | None:
    """The row of MATRICES for a leaf.

    Raises:
      ValueError: the table has none.
    """
    name = path_name(path)
    for pattern, numbers in MUON_TABLE:
        if re.search(pattern, name):
            return numbers
    raise ValueError(f"grpo_jax.learn.optimizer.MATRICES has no row for the parameter {name}")


def muon(b1: float, b2: float, mu_dtype: str) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, Adam for everything else.

    Not optax.contrib.muon: it has Nesterov's step in its Adam, and no mask for that part's weight decay.
    """
    numbers = lambda updates: jax.tree_util.tree_map_with_path(lambda path, _: muon_dimensions(path), updates)
    labels = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if muon_dimensions(path) else "adam", params
    )

    def resize(path, update):
        inputs, outputs = (math.prod(update.shape[axis] for axis in axes) for axes in muon_dimensions(path))
        return update * MUON_RMS * math.sqrt(max(inputs, outputs))

    orthogonal = scale_by_muon(beta=b1, mu_dtype=mu_dtype, weight_dimension_numbers=numbers)
    resized = optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(resize, updates))
    rules = {"muon": optax.chain(orthogonal, resized), "adam": optax.scale_by_adam(b1, b2, mu_dtype=mu_dtype)}
    return optax.partition(rules, labels)


def adafactor() -> optax.GradientTransformation:
    """Adafactor without a first moment, its steps at most 1 in root mean square over a leaf (all layers of a run).

    They are not scaled by the parameter's own size, as optax.adafactor's are: with the other rules' learning rates
    that would be next to no step, and none for a bias at 0.
    """
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def make_optimizer(optim: OptimSection) -> optax.GradientTransformation:
    """The update rule `optim.name` behind a clip of the global gradient norm, from a config's `optim` section."""
    rules = {
        "adamw": lambda: optax.scale_by_adam(optim.b1, optim.b2, mu_dtype=optim.mu_dtype),
        "adafactor": adafactor,
        "lion": lambda: optax.scale_by_lion(optim.b1, optim.b2, mu_dtype=optim.mu_dtype),
        "muon": lambda: muon(optim.b1, optim.b2, optim.mu_dtype),
    }
    return optax.chain(
        optax.clip_by_global_norm(optim.grad_clip),
        rules[optim.name](),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(make_schedule(optim)),
    )


def decay_mask(params):
    """Which leaves weight decay draws to 0: not norms, biases and the correction of a router."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).split("/")[-1] not in ("scale", "bias", "correction"), params
    )


def to_float32(tree):
    """The optimizer computes in float32 and keeps its state so, as bfloat16 cannot hold an average over 1,000 steps."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def apply_gradients(
    state: TrainState, grads, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update. If the gradient's norm is not finite, it is left out: all but `step` and `skipped` stay as they are.

    Args:
      grads: a tree like the parameters, in any float dtype.
      schedule: what `optimizer` was made with, for the metric.
    Returns:
      the next state; and the norm before the clip, whether the update was left out (1 or 0), and its learning rate.
    """
    grads = to_float32(grads)
    norm = optax.tree.norm(grads)
    fine = jnp.isfinite(norm)
    metrics = {"optim/grad_norm": norm, "optim/skipped": 1.0 - fine, "optim/lr": schedule(state.step - state.skipped)}
    changes, opt_state = optimizer.update(grads, state.opt_state, to_float32(state.params))
    # A choice for each leaf and not one lax.cond: XLA fuses it into the update, which then works in the donated state.
    choose = lambda new, old: jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, old)
    return TrainState(
        step=state.step + 1,
        params=choose(optax.apply_updates(state.params, changes), state.params),
        opt_state=choose(opt_state, state.opt_state),
        skipped=state.skipped + ~fine,
    ), metrics


def moment_spec(kind: str, shape: tuple[int, ...], whole: tuple[int, ...], spec: P) -> P:
    """How a leaf of the optimizer's state is split, from the shape and the spec of its parameter.

    Args:
      kind: the state's name for it. Adafactor's `v_row` and `v_col` are means of the parameter's shape over its largest
        and its second largest dimension.
    """
    if shape == whole:
        return spec
    if kind in ("v_row", "v_col") and len(whole) > 1:
        gone = np.argsort(whole)[-1 if kind == "v_row" else -2]  # as optax does, also among equal sizes
        if shape == (*whole[:gone], *whole[gone + 1 :]):
            return P(*spec[:gone], *spec[gone + 1 :])
    return P()  # optax's placeholder for what the rule does not keep


def train_state_shardings(mesh: Mesh | AbstractMesh, params, optimizer: optax.GradientTransformation) -> TrainState:
    """Where each leaf of a train state lives; optimizer moments lie as their parameters do.

    Args:
      params: arrays or jax.ShapeDtypeStruct.
    """
    places = tree_shardings(mesh, params)
    known = {
        path_name(path): (leaf.shape, place.spec)
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(places), strict=True
        )
    }
    everywhere = NamedSharding(mesh, P())

    def of(path, leaf):
        """The path of a moment ends in that of its parameter, and the moment's name stands before it."""
        names = path_name(path).split("/")
        for first in range(1, len(names)):
            found = known.get("/".join(names[first:]))
            if found:
                return NamedSharding(mesh, moment_spec(names[first - 1], leaf.shape, *found))
        return everywhere  # a count, or Muon's coefficients

    opt_state = jax.tree_util.tree_map_with_path(of, train_state_shapes(params, optimizer).opt_state)
    return TrainState(step=everywhere, params=places, opt_state=opt_state, skipped=everywhere)


def new_train_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(
        step=jnp.int32(0), params=params, opt_state=optimizer.init(to_float32(params)), skipped=jnp.int32(0)
    )


def train_state_shapes(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes and dtypes of a train state, from those of its parameters."""
    return jax.eval_shape(lambda params: new_train_state(params, optimizer), params)


def init_train_state(mesh: Mesh, params, optimizer: optax.GradientTransformation) -> TrainState:
    """`fresh_state` on the mesh; `params` are taken over (donated)."""
    places = train_state_shardings(mesh, params, optimizer)
    return jax.jit(lambda params: new_train_state(params, optimizer), out_shardings=places, donate_argnums=0)(params)
