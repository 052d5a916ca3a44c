"""Whether a constant keeps its meaning in float16."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_SMALL = 1024
"""A constant with fewer elements may be a divisor or an epsilon, where an exact 0 does harm."""


def as_half(array: npt.NDArray[np.generic]) -> npt.NDArray[np.float16] | str:
    """``array`` in float16, or why that would not stand for it.

    Args:
        array: float32, any shape.
    """
    with np.errstate(over="ignore", under="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        finite = array[np.isfinite(array)]
        top = float(np.abs(finite).max(initial=0))
        return (
            f"it overflows float16 (a magnitude of {top:.3g})"
            if top > 65504
            else ("it holds numbers that are not finite")
        )
    if array.size < _SMALL and np.any((half == 0) & (array != 0)):
        return "numbers of it would become 0 in float16"
    flat = array.astype(np.float64).reshape(-1)
    error = half.astype(np.float64).reshape(-1)
    error -= flat
    if float(error @ error) > 2.0**-20 * float(flat @ flat):
        return "most of it is too small for float16 (below 6.1e-5)"
    return half
