"""The compiler for TPUs scatters the gradients of matrices instead of adding them up whole on every chip."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.model.layers import linear
from grpo_jax.model.parameters import matrix_spec
from grpo_jax.parallel.mesh import ROW_AXES, make_mesh
from grpo_jax.planning.counts import count_program
from grpo_jax.planning.topology import compiler_environment, topology_devices

WIDTH, HIDDEN = 3584, 18944  # of Qwen2.5-7B
MATRICES = {"mlp/gate/kernel": (WIDTH, HIDDEN), "mlp/down/kernel": (HIDDEN, WIDTH)}


def gradients(specs, rows):
    """Returns the gradients of the matrices, given the inputs and the gradients of the outputs of each."""
    return [
        jax.vjp(partial(lambda spec, x, kernel: linear(x, kernel, spec), spec, x), jnp.zeros(shape))[1](d_out)[0]
        for (x, d_out), spec, shape in zip(rows, specs, MATRICES.values(), strict=True)
    ]


@pytest.mark.parametrize(
    "topology, sizes",
    [
        ("v5e:8x8", dict(fsdp=64)),
        ("v5e:8x8", dict(fsdp=16, tensor=4)),
        ("v5e:16x16", dict(fsdp=256)),
        ("v5p:2x2x2", dict(fsdp=8)),
    ],
)
def test_gradients_are_scattered_whether_or_not_fsdp_spans_the_slice(topology, sizes, monkeypatch):
    for name, value in compiler_environment(topology, os.environ).items():
        monkeypatch.setenv(name, value)
    mesh = make_mesh(**sizes, devices=topology_devices(topology))
    with jax.set_mesh(mesh):
        specs = [matrix_spec(path, shape[:1], shape[1:]) for path, shape in MATRICES.items()]

        def rows(columns, axis):
            sharding = jax.NamedSharding(mesh, jax.P(ROW_AXES, "tensor" if axis == "tensor" else None))
            return jax.ShapeDtypeStruct((512 * mesh.size, columns), jnp.bfloat16, sharding=sharding)

        args = [tuple(map(rows, shape, spec)) for shape, spec in zip(MATRICES.values(), specs, strict=True)]
        out = [jax.NamedSharding(mesh, spec) for spec in specs]
        text = jax.jit(partial(gradients, specs), out_shardings=out).lower(args).compile().as_text()
    counts = count_program(text, mesh.shape, {}, 0)
    whole = WIDTH * HIDDEN * 4 // sizes.get("tensor", 1)
    scattered = [x.count for x in counts.collectives if x.kind == "reduce-scatter" and x.bytes >= whole]
    assert sum(scattered) == len(MATRICES)
    assert not [x for x in counts.collectives if x.kind == "all-reduce"]
