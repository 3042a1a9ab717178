"""Stub."""

from collections.abc import Callable, Iterator
from typing import Any

from parts.shapes import device_name  # noqa: F401


def measure(small: bool, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields."""
    yield {"left": seconds_left()}
