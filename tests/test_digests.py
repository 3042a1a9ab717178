"""Digests of arrays: the same on every mesh and on the host, and another one after any change of an element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.run import digests
from grpo_jax.run.digests import digest_arrays, digest_text, named_leaves, sum_on_devices, sum_on_host

DTYPES = ("float32", "bfloat16", "int32", "uint8", "bool", "int64")


def draw(shape, dtype, seed=0):
    values = 100 * np.random.default_rng(seed).standard_normal(shape)
    return values > 0 if dtype == "bool" else values.astype(jnp.dtype(dtype))


def host_digest(*blocks):
    return digest_text(sum_on_host(blocks))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_and_every_exchange_changes_a_digest(dtype):
    x = draw((5, 7), dtype)
    seen = {host_digest(x)}
    bits = range(1) if dtype == "bool" else range(8 * x.itemsize)
    for index in range(x.size):
        for bit in bits:
            data = bytearray(x.tobytes())
            data[index * x.itemsize + bit // 8] ^= 1 << bit % 8
            seen.add(host_digest(np.frombuffer(data, x.dtype).reshape(x.shape)))
    assert len(seen) == 1 + x.size * len(bits)
    exchanged = x.copy().ravel()
    first, second = 0, int(np.flatnonzero(exchanged != exchanged[0])[0])
    exchanged[[first, second]] = exchanged[[second, first]]
    assert host_digest(exchanged.reshape(x.shape)) not in seen


def test_a_digest_is_what_older_checkpoints_have():
    assert host_digest(np.arange(5, dtype=np.float32)) == "f39493ddb3ec87be"
    assert digest_text(np.array([1, 2**32 - 1], np.uint32)) == "00000001ffffffff"


def test_a_digest_does_not_depend_on_the_blocks(monkeypatch):
    x = draw((300, 11), "float32")
    monkeypatch.setattr(digests, "HOST_WORDS", 1000)
    assert host_digest(x) == host_digest(x[:7], x[7:130], x[130:]) == host_digest(x.T.copy().T)


@pytest.mark.parametrize(
    "shape, dtype, specs",
    [
        (
            (8, 6, 4),
            "float32",
            (P(), P(None, None, "tensor"), P(("data", "fsdp"), None, "tensor"), P("fsdp", "tensor")),
        ),
        pytest.param((53, 8), "bfloat16", (P(), P(None, ("fsdp", "tensor"))), marks=pytest.mark.slow),
        pytest.param((64,), "bool", (P("data"),), marks=pytest.mark.slow),
        pytest.param((), "int32", (P(),), marks=pytest.mark.slow),
    ],
)
def test_a_digest_on_devices_is_that_on_the_host(monkeypatch, shape, dtype, specs):
    """The blocks of an array on a device are so small here that there are several, and a rest."""
    monkeypatch.setattr(digests, "DEVICE_WORDS", 20)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    x = draw(shape, dtype)
    for spec in specs:
        on_devices = jax.device_put(x, NamedSharding(mesh, spec))
        assert digest_text(np.asarray(sum_on_devices(on_devices, on_devices.sharding))) == host_digest(x), spec


def test_arrays_have_the_names_that_orbax_gives_them(monkeypatch):
    monkeypatch.setattr(digests, "SMALL", 10)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    large = jax.device_put(draw((4, 8), "float32"), NamedSharding(mesh, P(None, "data")))
    tree = {"b": (None, {"c": large}), "a": np.int64(7)}
    assert digest_arrays(tree) == {"b.1.c": host_digest(np.asarray(large)), "a": host_digest(np.array(7))}
    assert set(named_leaves(tree)) == {"b.1.c", "a"}
