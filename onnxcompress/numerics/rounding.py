"""Rounding weights to a grid so that the *output* of the layer changes least.

A layer ``y = W x`` with rounded weights ``Ŵ = s Q`` has the expected squared error, per output
``o``,

    E(Δy_o²) = (W - Ŵ)_o C (W - Ŵ)_oᵀ        (the *C-norm*)

where ``C`` is the covariance of ``x`` (the mean's share goes into the bias). Rounding each weight
to its nearest neighbour minimizes the plain norm; GPTQ rounds the columns one after another and
lets those that are left make up for the error made so far. With ``U`` the upper Cholesky factor of
``(C + λI)⁻¹ = UᵀU``, column ``j`` rounded with error ``e_j = (w_j - ŵ_j) / U_jj`` updates the
columns after it by

    w_k ← w_k - e_j U_jk,   k > j

Columns with the largest variance go first, while there are most others to repair them.

Source: Frantar and Alistarh 2022, "Optimal Brain Compression"; Frantar et al. 2023, "GPTQ: accurate
post-training quantization for generative pre-trained transformers".
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.affine import Grid
from onnxcompress.numerics.least_squares import UNDERFLOW

FloatArray: TypeAlias = npt.NDArray[np.float64]

_BLOCK = 64
"""Columns rounded before the columns after them are updated by one matrix product."""


def round_to_nearest(weight: FloatArray, scale: FloatArray, grid: Grid) -> FloatArray:
    """``Q = clip(round(W / s))`` as integers in float64.

    Args:
        weight: ``W``, [O, D].
        scale: ``s``, [O].
        grid: A symmetric grid with zero point 0.
    """
    return np.asarray(np.clip(np.rint(weight / scale[:, None]), grid.low, grid.high))


def output_error(delta: FloatArray, covariance: FloatArray) -> FloatArray:
    """``δ_o C δ_oᵀ`` for each row of ``delta``.

    Args:
        delta: [O, D].
        covariance: ``C``, [G, D, D]; rows ``g * O / G`` to ``(g + 1) * O / G`` use group ``g``.

    Returns:
        [O].
    """
    parts = delta.reshape(len(covariance), -1, delta.shape[1])
    return np.asarray(np.einsum("god,god->go", parts @ covariance, parts).reshape(-1))


def round_with_feedback(
    weight: FloatArray,
    scale: FloatArray,
    grid: Grid,
    covariance: FloatArray,
    *,
    damp: float = 0.01,
) -> FloatArray:
    """Round column by column with error feedback; rows where nearest rounding is better keep it.

    The result is therefore never worse than :func:`round_to_nearest` in the C-norm, row by row.

    Args:
        weight: ``W``, [O, D].
        scale: ``s``, [O].
        grid: A symmetric grid with zero point 0.
        covariance: ``C``, [G, D, D], symmetric positive semidefinite.
        damp: ``λ`` relative to the mean diagonal of ``C``.

    Returns:
        ``Q``, integers in float64, [O, D].
    """
    groups = len(covariance)
    nearest = round_to_nearest(weight, scale, grid)
    rows = len(weight) // groups
    fed = np.concatenate(
        [
            _feedback(weight[part], scale[part], grid, covariance[g], damp)
            for g in range(groups)
            for part in [slice(g * rows, (g + 1) * rows)]
        ]
    )
    better = _error(weight, scale, fed, covariance) < _error(weight, scale, nearest, covariance)
    return np.where(better[:, None], fed, nearest)


def _error(
    weight: FloatArray, scale: FloatArray, integers: FloatArray, covariance: FloatArray
) -> FloatArray:
    return output_error(weight - integers * scale[:, None], covariance)


def _feedback(
    weight: FloatArray, scale: FloatArray, grid: Grid, covariance: FloatArray, damp: float
) -> FloatArray:
    """GPTQ over one group: ``weight`` [O, D], ``covariance`` [D, D]."""
    size = len(covariance)
    variance = covariance.diagonal()
    mean = float(variance.mean())
    if mean <= UNDERFLOW or not np.isfinite(mean):
        return round_to_nearest(weight, scale, grid)
    order = np.argsort(-variance, kind="stable")
    damped = covariance[np.ix_(order, order)] + damp * mean * np.eye(size)
    # (C + λI)⁻¹ = UᵀU with U upper triangular: factor the matrix with its order reversed.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    upper = np.linalg.inv(lower)[::-1, ::-1]
    left = weight[:, order].copy()
    integers = np.empty_like(left)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        errors = np.empty((len(left), stop - start))
        for j in range(start, stop):
            column = np.clip(np.rint(left[:, j] / scale), grid.low, grid.high)
            error = (left[:, j] - column * scale) / upper[j, j]
            left[:, j + 1 : stop] -= np.outer(error, upper[j, j + 1 : stop])
            integers[:, j], errors[:, j - start] = column, error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    result = np.empty_like(integers)
    result[:, order] = integers
    return result
