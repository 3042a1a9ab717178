"""The penalty for completions that are truncated or close to the maximum length."""

import numpy as np
from jaxtyping import Float, Int


def overlong_penalty(lengths: Int[np.ndarray, " N"], limit: int, cache: int) -> Float[np.ndarray, " N"]:
    """Computes DAPO's soft penalty for overlong completions, float32[N] (arXiv 2503.14476, equation 13).

    The penalty is 0 up to `limit - cache` tokens, falls linearly to -1 at `limit` tokens, and is -1 above.

    Args:
        lengths: The length of each completion in tokens.
        limit: The maximum length in tokens.
        cache: The number of tokens over which the penalty falls, at least 1.
    """
    return np.clip((limit - cache - np.asarray(lengths, np.float64)) / cache, -1, 0).astype(np.float32)
