"""Scales and levels of codebooks in half precision, where that is exact enough."""

from __future__ import annotations

import numpy as np

from onnxcompress.numerics.feedback import FloatArray

_DIGITS = 2.0**-10
"""Relative error up to which a number of half precision stands for another."""
_SMALL_LEVEL = 2.0**-4
"""Part of the largest level below which a level need not be any more exact."""


def half_scales(scales: FloatArray) -> FloatArray:
    """Scales in half precision; as they are where some are out of its range."""
    return _halves(scales, np.abs(scales))


def half_levels(levels: FloatArray) -> FloatArray:
    """Levels in half precision; as they are where they are out of its range."""
    size = np.abs(levels)
    return _halves(levels, np.maximum(size, _SMALL_LEVEL * size.max(initial=0.0)))


def _halves(values: FloatArray, size: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        near = values.astype(np.float16).astype(np.float64)
    return near if np.all(np.abs(near - values) <= _DIGITS * size) else values
