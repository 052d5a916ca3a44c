"""The scale of a row of weights with the least rounding error.

The finest grid that clips nothing, ``s = max |w| / q_max``, is not the best one where a row has a
few large weights: clipping them makes the steps finer for all others. For each row the ratio ``r``
with the least

    Σ_d (w_d - s_r clip(round(w_d / s_r)))²,   s_r = r max |w| / q_max

is taken from a short list that begins with 1, so the error is never above that of ``r = 1``.

Source: Nagel et al. 2021, "A white paper on neural network quantization", section 3.1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.affine import Affine, Grid, weight_affine

_RATIOS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8)

_CHUNK = 1 << 21
"""Weights treated at a time, which bounds the memory."""


def fitted_affine(matrix: npt.NDArray[np.floating], grid: Grid) -> Affine:
    """Per-row scales with the least squared error.

    Args:
        matrix: Finite weights, [R, D].
        grid: A symmetric grid.

    Returns:
        Scales and zero points, [R].
    """
    rows, columns = matrix.shape
    step = max(1, _CHUNK // max(columns, 1))
    ratios = [_best_ratios(matrix[start : start + step], grid) for start in range(0, rows, step)]
    top = np.abs(matrix).max(axis=1, initial=0.0).astype(np.float64)
    return weight_affine(top * np.concatenate(ratios) if ratios else top, grid)


def _best_ratios(matrix: npt.NDArray[np.floating], grid: Grid) -> npt.NDArray[np.float64]:
    values = matrix.astype(np.float64)
    steps = np.maximum(np.abs(values).max(axis=1, initial=0.0) / (grid.high - grid.middle), 1e-30)
    best, ratios = np.full(len(values), np.inf), np.ones(len(values))
    for ratio in _RATIOS:
        scale = (steps * ratio)[:, None]
        rounded = np.clip(np.rint(values / scale), grid.low - grid.middle, grid.high - grid.middle)
        errors = np.square(values - rounded * scale).sum(axis=1)
        better = errors < best
        best, ratios = np.where(better, errors, best), np.where(better, ratio, ratios)
    return ratios
