"""Reads the arrays of a checkpoint and compares them with the digests of what was saved.

Each process reads its own part of every array with TensorStore. Unlike with Orbax, it does not wait for other processes
while it reads, so it can report damage that only it sees.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils

from grpo_jax.run.digests import digest_arrays, digest_text, named_leaves, sum_on_host

BLOCK_BYTES = 1 << 26  # read at a time from an array that is only verified
READERS = 4  # arrays that are read in parallel


class Damaged(Exception):
    """Raised if a part of a checkpoint cannot be read or differs from what was saved. The message says which part."""


def error_line(error: Exception) -> str:
    """Returns an exception as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def open_array(item: Path, name: str) -> ts.TensorStore:
    """Opens an array in an item of a checkpoint, as written by Orbax."""
    store = {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()


def read_blocks(array: ts.TensorStore) -> Iterator[np.ndarray]:
    """Yields consecutive blocks of an array in row-major order, so that the array does not have to fit in memory."""
    if array.ndim == 0:
        yield array.read().result()
        return
    chunk = array.chunk_layout.read_chunk.shape[0]  # rows that are read together
    chunk_bytes = chunk * math.prod(array.shape[1:]) * array.dtype.numpy_dtype.itemsize
    rows = chunk * max(1, BLOCK_BYTES // max(1, chunk_bytes))
    for start in range(0, array.shape[0], rows):
        yield array[start : min(start + rows, array.shape[0])].read().result()


def read_onto_devices(item: Path, name: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
    """Reads the parts of an array that the devices of this process hold."""
    array, parts = open_array(item, name), dict[str, np.ndarray]()
    if array.shape != shape:
        raise ValueError(f"{name} has the shape {array.shape} instead of {shape}")

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in parts:  # several devices may hold the same part
            parts[str(index)] = array[index].read().result()
        return parts[str(index)]

    return jax.make_array_from_callback(shape, sharding, read)


def raise_if_damaged(damage: str) -> None:
    """Raises Damaged on every process if `damage` is not "" on some process."""
    is_damaged = np.bool_(damage)
    if jax.process_count() > 1:
        is_damaged = multihost_utils.process_allgather(is_damaged).any()
    if is_damaged:
        raise Damaged(damage or "another process cannot read its part")


def read_sound(item: Path, digests: dict[str, str], read: Callable[[], Any]) -> Any:
    """Calls `read`, compares the tree of arrays that it returns with their digests, and returns the tree.

    Args:
        item: The folder of the item that is read.
        digests: The digest of each of its arrays by name.
        read: Reads the arrays.

    Raises:
        Damaged: An array cannot be read, or differs from what was saved. Every process raises.
    """
    tree, damage = None, ""
    try:
        tree = read()
    except jax.errors.JaxRuntimeError:
        raise  # the devices have no room for it
    except Exception as error:  # TensorStore raises exceptions of many kinds
        damage = f"its {item.name} cannot be read ({error_line(error)})"
    raise_if_damaged(damage)
    raise_if_damaged(describe_difference(item, digest_arrays(tree), digests))
    return tree


def describe_difference(item: Path, found: dict[str, str], saved: dict[str, str]) -> str:
    """Returns which array of an item differs from what was saved, or "" if none does, given their digests by name."""
    names = sorted(name for name in found.keys() | saved.keys() if found.get(name) != saved.get(name))
    return f"{names[0]} in its {item.name} differs from what was saved" if names else ""


def restore_arrays(item: Path, digests: dict[str, str], shapes: Any, shardings: Any) -> Any:
    """Restores an item of a checkpoint onto the mesh.

    Args:
        item: The folder of the item.
        digests: The digest of each of its arrays by name.
        shapes: The arrays as a tree of jax.ShapeDtypeStruct. Arrays saved in another dtype are converted.
        shardings: Their shardings.

    Raises:
        Damaged: An array cannot be read, or differs from what was saved. Every process raises.
    """
    targets = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    arguments = [(item, name, x.shape, s) for name, (x, s) in zip(named_leaves(shapes), targets, strict=True)]

    def read():
        with ThreadPoolExecutor(READERS) as pool:
            leaves = list(pool.map(read_onto_devices, *zip(*arguments, strict=True)))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return jax.tree.map(lambda x, shape: x.astype(shape.dtype), read_sound(item, digests, read), shapes)


def restore_on_host(item: Path, digests: dict[str, str]) -> dict[str, np.ndarray]:
    """Restores an item of a checkpoint, a dict of arrays, on the host. Raises Damaged as `restore_arrays` does."""
    return read_sound(item, digests, lambda: {name: open_array(item, name).read().result() for name in digests})


def find_damage(item: Path, name: str, digest: str) -> str:
    """Reads an array in an item of a checkpoint on the host; returns what is wrong with it, or "" if nothing is."""
    try:
        found = digest_text(sum_on_host(read_blocks(open_array(item, name))))
    except Exception as error:  # TensorStore raises exceptions of many kinds
        return f"its {item.name} cannot be read ({error_line(error)})"
    return describe_difference(item, {name: found}, {name: digest})
