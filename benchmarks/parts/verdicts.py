"""Compares errors with bounds, for the part `right`."""

from contextlib import nullcontext
from typing import Any

import jax

Result = dict[str, Any]

DTYPES = ("float32", "bfloat16")
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}


def precision(dtype: str):
    """Returns a context in which float32 matmuls are computed in full precision."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()


def verdict(check: str, dtype: str, error: float, bound: float, **fields) -> Result:
    """Returns a result, which is `ok` if the error is at most the bound. NaN is not."""
    result = {"check": check, "dtype": dtype, **fields}
    return result | {"error": float(error), "bound": bound, "ok": bool(error <= bound)}
