"""The verdicts of the part `right`: bounds, and the precision in which they hold."""

from contextlib import nullcontext
from typing import Any

import jax

Result = dict[str, Any]

DTYPES = ("float32", "bfloat16")
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}


def precision(dtype: str):
    """Returns a context in which matrix products of float32 are not computed in a shorter format."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()


def verdict(check: str, dtype: str, error: float, bound: float, **fields) -> Result:
    """Returns a result. An error that is not a number is out of bounds."""
    result = {"check": check, "dtype": dtype, **fields}
    return result | {"error": float(error), "bound": bound, "ok": bool(error <= bound)}
