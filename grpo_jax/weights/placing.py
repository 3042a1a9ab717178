"""Assembles parameters on their devices from the tensors of a checkpoint, without a copy of the model on the host.

A tensor is read once, a block of rows at a time, and each block is copied to every part of the parameter that holds
some of it. Large layer stacks are placed one layer at a time. The host therefore holds one layer, or one parameter
outside the layers, besides what is on the devices.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from grpo_jax.errors import UserError
from grpo_jax.weights.tensor_names import ParameterTensors
from grpo_jax.weights.tensors import StoredTensor

BLOCK_NUMBERS = 1 << 17  # values that a thread reads at a time; as float32, they fit in the cache of a core
MAX_READERS = 16  # reader threads
WHOLE_STACK_BYTES = 1 << 25  # larger layer stacks are placed one layer at a time


class ParameterTarget(NamedTuple):
    """A parameter to assemble."""

    parameter: ParameterTensors
    shape: jax.ShapeDtypeStruct
    sharding: Sharding

    @property
    def nbytes(self) -> int:
        """Returns the size of the parameter in bytes."""
        return math.prod(self.shape.shape) * self.shape.dtype.itemsize

    def take_layer(self, index: int) -> "ParameterTarget":
        """Returns the part of a layer stack's parameter that belongs to one of its layers."""
        return ParameterTarget(
            self.parameter._replace(names=self.parameter.names[index : index + 1]),
            jax.ShapeDtypeStruct((1, *self.shape.shape[1:]), self.shape.dtype),
            self.sharding,
        )


class Part(NamedTuple):
    """The part of a parameter that one or more local devices hold."""

    bounds: tuple[tuple[int, int], ...]  # start and stop on each axis of the parameter
    values: np.ndarray
    devices: list[jax.Device]


class Piece(NamedTuple):
    """The part of a tensor that a `Part` holds."""

    bounds: tuple[tuple[int, int], ...]  # start and stop on each axis of the tensor
    values: np.ndarray  # a view of the part's values, with the axes of the tensor


def is_finite(values: np.ndarray) -> bool:
    """Returns whether all values, float32 or bfloat16, are finite."""
    if values.dtype == np.float32:
        return bool(np.isfinite(values).all())
    exponent = np.uint16(0x7F80)  # all ones in NaN and infinity; `isfinite` takes seven times as long for bfloat16
    return not np.any((values.view(np.uint16) & exponent) == exponent)


def allocate_parts(target: ParameterTarget) -> list[Part]:
    """Allocates the parts of a parameter that the devices of this process hold."""
    parts, shape = {}, target.shape.shape
    for device, index in target.sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        if bounds not in parts:
            values = np.empty([stop - start for start, stop in bounds], target.shape.dtype)
            parts[bounds] = Part(bounds, values, [])
        parts[bounds].devices.append(device)
    return list(parts.values())


def list_pieces(parameter: ParameterTensors, parts: Sequence[Part]) -> Iterator[tuple[str, list[Piece]]]:
    """Yields the name of each tensor of which `parts` hold something, with the pieces of it that they hold."""
    stacked_axes = parameter.names.ndim
    for position in np.ndindex(*parameter.names.shape):
        pieces = []
        for part in parts:
            stacked, within = part.bounds[:stacked_axes], part.bounds[stacked_axes:]
            if not all(start <= index < stop for index, (start, stop) in zip(position, stacked, strict=True)):
                continue
            values = part.values[tuple(index - start for index, (start, _) in zip(position, stacked, strict=True))]
            slices = parameter.stored_slices(tuple(slice(*bounds) for bounds in within))
            sizes = [cut.stop - cut.start for cut in slices]
            values = values.reshape(sizes[::-1]).T if parameter.row.transpose else values.reshape(sizes)
            pieces.append(Piece(tuple((cut.start, cut.stop) for cut in slices), values))
        if pieces:
            yield parameter.names[position], pieces


def copy_block(values: np.ndarray, bounds: Sequence[tuple[int, int]], pieces: Sequence[Piece]) -> None:
    """Copies a block of a tensor, whose position is `bounds`, to the pieces that overlap it."""
    for piece in pieces:
        overlap = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, piece.bounds, strict=True)]
        if all(start < stop for start, stop in overlap):
            source, target = (
                tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(overlap, at, strict=True))
                for at in (bounds, piece.bounds)
            )
            piece.values[target] = values[source]


def place_parts(target: ParameterTarget, parts: list[Part]) -> jax.Array:
    """Returns the parameter on its devices. Each part is removed from `parts`, and freed, once it is placed."""
    arrays = []
    while parts:
        part = parts.pop()
        arrays += jax.block_until_ready([jax.device_put(part.values, device) for device in part.devices])
    return jax.make_array_from_single_device_arrays(target.shape.shape, target.sharding, arrays)


class Placer:
    """Reads the tensors of a model with several threads, and places the parameters that they make up."""

    def __init__(
        self,
        source: Path,
        stored: dict[str, StoredTensor],
        total_bytes: int,
        on_progress: Callable[[int, int], None] | None,
    ):
        """Prepares the threads, without reading anything.

        Args:
            source: The model folder or GGUF file, for error messages.
            stored: The tensors by name.
            total_bytes: The size of all parameters in bytes.
            on_progress: Called with the bytes of the parameters read so far, and `total_bytes`.
        """
        self.source = source
        self.stored = stored
        self.done_bytes, self.total_bytes = 0, total_bytes
        self.on_progress = on_progress
        self.threads = ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1), "reader")

    def close(self) -> None:
        """Stops the threads and drops what they have not read yet."""
        self.threads.shutdown(cancel_futures=True)

    def read_block(self, name: str, bounds: Sequence[tuple[int, int]], pieces: Sequence[Piece]) -> None:
        """Reads a block of a tensor into the pieces that overlap it.

        Raises:
            UserError: The block holds a number that is not finite in the dtype of the pieces.
        """
        values, dtype = self.stored[name].read(tuple(slice(*each) for each in bounds)), pieces[0].values.dtype
        with np.errstate(over="ignore"):  # infinity is reported below
            values = values.astype(dtype, copy=False)
        if not is_finite(values):
            raise UserError(
                f"{name} in {self.source} must hold finite numbers; found NaN or infinity in {dtype}. "
                "Download the model again."
            )
        copy_block(values, bounds, pieces)

    def list_blocks(self, target: ParameterTarget, parts: Sequence[Part]) -> Iterator[tuple[int, Callable[[], None]]]:
        """Yields the size of each block of a parameter in bytes, and the function that reads it."""
        for name, pieces in list_pieces(target.parameter, parts):
            hull = [
                (min(start for start, _ in axis), max(stop for _, stop in axis))
                for axis in zip(*(piece.bounds for piece in pieces), strict=True)
            ]
            (first, last), *others = hull
            rows = max(1, BLOCK_NUMBERS // max(1, math.prod(stop - start for start, stop in others)))
            # Counted as if the whole tensor were read, so that each process counts up to the size of all parameters.
            row_bytes = target.shape.dtype.itemsize * math.prod(self.stored[name].shape) // max(1, last - first)
            for start in range(first, last, rows):
                stop = min(start + rows, last)
                yield (stop - start) * row_bytes, partial(self.read_block, name, [(start, stop), *others], pieces)

    def assemble(self, targets: Sequence[ParameterTarget]) -> list[jax.Array]:
        """Reads and places parameters, holding all of them in host memory at the same time."""
        parts = [allocate_parts(target) for target in targets]
        blocks = [*itertools.chain.from_iterable(map(self.list_blocks, targets, parts))]
        for (size, _), _ in zip(blocks, self.threads.map(lambda block: block[1](), blocks), strict=True):
            self.done_bytes += size
            if self.on_progress:
                self.on_progress(self.done_bytes, self.total_bytes)
        return list(map(place_parts, targets, parts))

    def assemble_stack(self, targets: Sequence[ParameterTarget]) -> list[jax.Array]:
        """Reads and places the parameters of a layer stack, one layer at a time if it is large.

        A parameter outside the layers is a stack of its own.
        """
        if not targets[0].parameter.is_stacked or sum(target.nbytes for target in targets) <= WHOLE_STACK_BYTES:
            return self.assemble(targets)
        shapes, shardings = [target.shape for target in targets], [target.sharding for target in targets]

        def make_zeros():
            return [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]

        def write_layer(stack, layer, index):
            return [jax.lax.dynamic_update_slice_in_dim(*pair, index, 0) for pair in zip(stack, layer, strict=True)]

        stack = jax.jit(make_zeros, out_shardings=shardings)()
        write_layer = jax.jit(write_layer, out_shardings=shardings, donate_argnums=0)
        for index in range(shapes[0].shape[0]):
            layer = self.assemble([target.take_layer(index) for target in targets])
            stack = jax.block_until_ready(write_layer(stack, layer, index))
        return stack
