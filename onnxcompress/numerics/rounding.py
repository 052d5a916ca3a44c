"""Rounding weights to a grid so that the *output* of the layer changes least.

A layer ``y = W x`` with rounded weights ``Ŵ = s Q`` has the expected squared error, per output
``o``,

    E(Δy_o²) = (W - Ŵ)_o C (W - Ŵ)_oᵀ        (the *C-norm*)

where ``C`` is the covariance of ``x`` (the mean's share goes into the bias). Rounding each weight
to its nearest neighbour minimizes the plain norm; GPTQ rounds the columns one after another and
lets those that are left make up for the error made so far. With the Cholesky factor ``C + λI =
LLᵀ`` the error is ``Σ_j (Σ_{k >= j} L_kj δ_k)²``, so when the columns are rounded from the last to
the first, the errors ``δ_k = w_k - ŵ_k`` made so far ask of the next one

    w_j ← w_j + Σ_{k > j} δ_k L_kj / L_jj

which makes its term as small as rounding allows. (The same rounding as with the factor of the
inverse ``(C + λI)⁻¹`` in the papers, without the inverse.) Columns with the largest variance go
first, while there are most others to repair them.

Source: Frantar and Alistarh 2022, "Optimal Brain Compression"; Frantar et al. 2023, "GPTQ: accurate
post-training quantization for generative pre-trained transformers"; Chen et al. 2025, "The geometry
of LLM quantization: GPTQ as Babai's nearest plane algorithm".
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.affine import Grid
from onnxcompress.numerics.least_squares import UNDERFLOW
from onnxcompress.numerics.positive import cholesky

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
    nearest = round_to_nearest(weight, scale, grid)
    groups = len(covariance)
    mean = np.diagonal(covariance, axis1=1, axis2=2).mean(axis=1)
    alive = np.flatnonzero(np.isfinite(mean) & (mean > UNDERFLOW))
    if not len(alive):
        return nearest
    fed = nearest.reshape(groups, -1, weight.shape[1]).copy()
    fed[alive] = _feedback(
        weight.reshape(fed.shape)[alive],
        scale.reshape(groups, -1)[alive],
        grid,
        covariance if len(alive) == groups else covariance[alive],
        damp * mean[alive],
    )
    rounded = fed.reshape(weight.shape)
    better = _error(weight, scale, rounded, covariance) < _error(weight, scale, nearest, covariance)
    return np.where(better[:, None], rounded, nearest)


def _error(
    weight: FloatArray, scale: FloatArray, integers: FloatArray, covariance: FloatArray
) -> FloatArray:
    return output_error(weight - integers * scale[:, None], covariance)


def _feedback(
    weight: FloatArray,
    scale: FloatArray,
    grid: Grid,
    covariance: FloatArray,
    damp: FloatArray,
) -> FloatArray:
    """GPTQ over all groups at once.

    Args:
        weight: [G, o, D].
        scale: [G, o].
        grid: As for :func:`round_with_feedback`.
        covariance: [G, D, D].
        damp: Added to the diagonal, [G].
    """
    size = covariance.shape[1]
    # Rounded last to first, so the column of the largest variance stands last.
    order = np.argsort(np.diagonal(covariance, axis1=1, axis2=2), axis=1, kind="stable")
    across = order[:, None, :]
    damped = np.take_along_axis(np.take_along_axis(covariance, order[:, :, None], 1), across, 2)
    damped[:, np.arange(size), np.arange(size)] += damp[:, None]
    # Row j of Lᵀ, over its diagonal: what an error of column k > j asks of column j.
    factor = cholesky(damped)
    factor /= np.diagonal(factor, axis1=1, axis2=2)[:, None, :]
    wanted = np.take_along_axis(weight, across, 2)
    left = wanted.copy()
    integers = np.empty_like(left)
    for stop in range(size, 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        # Columns first in memory: each step below touches whole ones.
        block = np.ascontiguousarray(left[:, :, start:stop].transpose(2, 0, 1))
        errors = np.ascontiguousarray(wanted[:, :, start:stop].transpose(2, 0, 1))
        inner = factor[:, start:stop, start:stop].transpose(1, 2, 0)[:, :, :, None]
        for j in range(stop - start - 1, -1, -1):
            column = np.clip(np.rint(block[j] / scale), grid.low, grid.high)
            errors[j] -= column * scale
            integers[:, :, start + j] = column
            if j:
                block[:j] += inner[j, :j] * errors[j]
        if start:
            left[:, :, :start] += errors.transpose(1, 2, 0) @ factor[:, start:stop, :start]
    result = np.empty_like(integers)
    np.put_along_axis(result, across, integers, 2)
    return result
