"""Adaptive rounding: change rounded weights one column at a time until no change helps the output.

The expected squared output error of a row, ``E = δ C δᵀ`` with ``δ = w - s q`` (the C-norm of
:mod:`onnxcompress.numerics.rounding`), is a parabola in each integer ``q_j``. With ``g = δ C``,
adding ``t`` to ``q_j`` changes it by

    ΔE = -2 s t g_j + s² t² C_jj

so the best integer is ``t = round(g_j / (s C_jj))``, cut to the grid, and ``ΔE <= 0`` always.
Columns are gone through in turns until hardly anything is gained. Started from error feedback
(GPTQ), which decides each column before those after it are known, this never makes a row worse, and
ends where no change of a single weight is much better. AdaRound (Nagel et al. 2020) minimizes the
same objective by gradients of a relaxation, within one step of nearest rounding; here every integer
of the grid may be taken.

Source: Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization" (the
objective); Zhang et al. 2023, "COMQ: a backpropagation-free algorithm for post-training
quantization" and Behdin et al. 2023, "QuantEase" (coordinate descent on it).
"""

from __future__ import annotations

import numpy as np

from onnxcompress.numerics.affine import Grid
from onnxcompress.numerics.least_squares import UNDERFLOW
from onnxcompress.numerics.rounding import FloatArray, output_error

_BLOCK = 64
"""Columns gone through before the gradient of the others is brought up to date."""

_SWEEPS = 20
"""Most turns through the columns; a turn costs about as much as error feedback."""

_LEAST_GAIN = 1e-3
"""A turn that lowers the error by less than this share is the last one."""


def descend(
    weight: FloatArray,
    scale: FloatArray,
    grid: Grid,
    covariance: FloatArray,
    start: FloatArray,
    *,
    sweeps: int = _SWEEPS,
    least_gain: float = _LEAST_GAIN,
) -> FloatArray:
    """Round better than ``start``; no row is worse in the C-norm.

    Args:
        weight: ``W``, [O, D].
        scale: ``s``, [O].
        grid: A symmetric grid with zero point 0.
        covariance: ``C``, [G, D, D], symmetric positive semidefinite; rows ``g * O / G`` to
            ``(g + 1) * O / G`` use group ``g``.
        start: ``Q`` to begin with, integers in float64, [O, D].
        sweeps: Most turns through the columns.
        least_gain: A turn that lowers the error by less than this share is the last one; with 0
            the end is where no change of a single weight is better.

    Returns:
        ``Q``, integers in float64, [O, D].
    """
    groups = len(covariance)
    shape = (groups, -1, weight.shape[1])
    parts = [
        _descend(w, s, grid, c, q, sweeps, least_gain)
        for w, s, c, q in zip(
            weight.reshape(shape),
            scale.reshape(groups, -1),
            covariance,
            start.reshape(shape),
            strict=True,
        )
    ]
    made = np.concatenate(parts)
    # Sums in another order may differ in the last digits: what is not better keeps its start.
    before = output_error(weight - start * scale[:, None], covariance)
    better = output_error(weight - made * scale[:, None], covariance) < before
    return np.where(better[:, None], made, start)


def _descend(
    weight: FloatArray,
    scale: FloatArray,
    grid: Grid,
    covariance: FloatArray,
    start: FloatArray,
    sweeps: int,
    least_gain: float,
) -> FloatArray:
    """One group: [o, D], [o], [D, D], [o, D]."""
    power = np.diagonal(covariance)
    mean = float(power.mean()) if len(power) else 0.0
    if not np.isfinite(mean) or mean <= UNDERFLOW:
        return start
    # A column without signal has no best value.
    curvature = scale[:, None] * np.where(power > 1e-9 * mean, power, np.inf)
    integers = start.copy()
    columns = weight.shape[1]
    last = np.inf
    for _ in range(sweeps):
        delta = weight - integers * scale[:, None]
        gradient = delta @ covariance
        error = float(np.einsum("od,od->", gradient, delta))
        if not error < last * (1 - least_gain):
            break
        last = error
        for first in range(0, columns, _BLOCK):
            stop = min(first + _BLOCK, columns)
            own = slice(first, stop)
            # Columns first in memory: each step below touches whole ones.
            inner = np.ascontiguousarray(gradient[:, own].T)
            moved = np.zeros_like(inner)
            for j in range(stop - first):
                now = integers[:, first + j]
                best = np.clip(
                    now + np.rint(inner[j] / curvature[:, first + j]), grid.low, grid.high
                )
                step = (best - now) * scale
                if step.any():
                    integers[:, first + j] = best
                    moved[j] = step
                    inner -= covariance[own, first + j][:, None] * step
            if moved.any():
                gradient -= moved.T @ covariance[own]
    return integers
