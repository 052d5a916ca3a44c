"""Weights of one of two or three values: binary ``±s`` and ternary ``-s, 0, s``.

A row of ``D`` weights is cut into ``B = ⌈D / b⌉`` blocks of ``b`` with a scale ``s > 0`` each; a
code ``q`` in ``[0, n)`` of ``n`` levels stands for

    w = s t(q),   t(q) = 2 q - 1  (n = 2)   or   q - 1  (n = 3)

:func:`fitted` finds the codes and the scale of least squared error of every block, exactly. For
given codes the best scale is ``s = Σ w t / Σ t²``, which leaves ``Σ w² - (Σ w t)² / Σ t²``. Binary:
``t = sign(w)``, ``s = mean |w|``. Ternary: the nonzero weights are the ``k`` largest in magnitude,
and ``k`` maximizes ``(Σ_{i ≤ k} |w|_(i))² / k`` over the sorted magnitudes.

:func:`with_feedback` rounds again column by column against the second moments of the inputs
(:mod:`onnxcompress.numerics.feedback`) and multiplies the scales of each row by

    α = (w H ŵᵀ) / (ŵ H ŵᵀ)

which is the best factor for the codes found, in turns. The output error of a row never grows.

Source: Rastegari et al. 2016, "XNOR-Net" (binary scale); Li and Liu 2016, "Ternary weight networks"
(whose threshold ``0.7 mean |w|`` approximates the maximum found here by sorting).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.blockwise import split
from onnxcompress.numerics.feedback import Factor

Codes: TypeAlias = npt.NDArray[np.uint8]
Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]

_ROUNDS = 4
"""Turns of codes and scales; more than this changes little."""

_CHUNK = 1 << 21
"""Weights that :func:`fitted` treats at a time, which bounds its memory."""

_TINY = np.float32(2.0**-40)


@dataclass(frozen=True, slots=True, eq=False)
class Signs:
    """A matrix of ``R`` rows and ``D`` columns with two or three levels.

    Attributes:
        codes: ``q``, [R, B, b].
        scale: ``s``, [R, B].
        levels: ``n``, 2 or 3.
        columns: ``D``; ``B b`` minus the filling, whose codes mean nothing.
    """

    codes: Codes
    scale: Float32
    levels: int
    columns: int

    @property
    def middle(self) -> float:
        """``m`` in ``t(q) = (q - m) step``: 0.5 or 1."""
        return (self.levels - 1) / 2

    @property
    def step(self) -> Float32:
        """Difference of neighbouring weights, [R, B]: ``2 s`` or ``s``."""
        return self.scale * np.float32(4 - self.levels)

    @property
    def block(self) -> int:
        """Weights per block, ``b``."""
        return int(self.codes.shape[2])

    def flat(self) -> Codes:
        """The codes without filling, [R, D]."""
        return self.codes.reshape(len(self.codes), -1)[:, : self.columns]

    def dequantized(self) -> Float32:
        """The matrix that the codes stand for, [R, D]."""
        values = (self.codes.astype(np.float32) - np.float32(self.middle)) * self.step[..., None]
        return values.reshape(len(values), -1)[:, : self.columns]

    def rows(self, which: slice) -> Signs:
        """Some of the rows."""
        return Signs(self.codes[which], self.scale[which], self.levels, self.columns)


def joined(parts: list[Signs]) -> Signs:
    """Rows below each other.

    Args:
        parts: At least one, alike in all but their rows.
    """
    first = parts[0]
    codes = np.concatenate([part.codes for part in parts])
    scale = np.concatenate([part.scale for part in parts])
    return Signs(codes, scale, first.levels, first.columns)


def fitted(matrix: Float32, *, levels: int, block: int) -> Signs:
    """The codes and scales of least squared error.

    Args:
        matrix: Finite weights, [R, D].
        levels: 2 or 3.
        block: ``b``.
    """
    step = max(1, _CHUNK // max(matrix.shape[1], 1))
    return joined(
        [
            _fit(matrix[start : start + step], levels, block)
            for start in range(0, max(len(matrix), 1), step)
        ]
    )


def _fit(matrix: Float32, levels: int, block: int) -> Signs:
    columns = matrix.shape[1]
    blocks = split(matrix, block)
    size = np.abs(blocks).astype(np.float64)
    counts = np.minimum(columns - block * np.arange(blocks.shape[1]), block)
    if levels == 2:
        scale = size.sum(-1) / counts
        codes = (blocks >= 0).astype(np.uint8)
    else:
        sums = np.cumsum(-np.sort(-size, axis=-1), axis=-1)
        number = np.arange(1, block + 1)
        best = (sums**2 / number).argmax(-1)[..., None]
        scale = (np.take_along_axis(sums, best, -1) / (best + 1))[..., 0]
        codes = (1 + np.sign(blocks) * (2 * size > scale[..., None])).astype(np.uint8)
    return Signs(codes, np.maximum(scale.astype(np.float32), _TINY), levels, columns)


def with_feedback(matrix: Float32, start: Signs, moment: Float64, *, damp: float = 0.01) -> Signs:
    """Round again so that the outputs change least; rows that do not gain keep what they have.

    Args:
        matrix: The weights, [R, D].
        start: Codes and scales so far.
        moment: ``H = E[x xᵀ]`` of the inputs that meet the columns, [D, D].
        damp: ``λ`` relative to the mean diagonal of ``H``.
    """
    factor = Factor.of(moment, damp=damp)
    if factor is None:
        return start
    weight = matrix.astype(np.float64)
    best = _better(weight, moment, start, _rescaled(weight, moment, start))
    found = best
    for _ in range(_ROUNDS):
        found = _rescaled(weight, moment, _fed(weight, found, factor))
        best = _better(weight, moment, best, found)
    return best


def _fed(weight: Float64, start: Signs, factor: Factor) -> Signs:
    """Codes rounded one column after another at the scales of ``start``."""
    step, top = start.step.astype(np.float64), start.levels - 1
    codes = np.empty(weight.shape, np.uint8)

    def project(places: npt.NDArray[np.int64], columns: Float64) -> Float64:
        width = step[:, places // start.block]
        found = np.clip(np.rint(columns / width + start.middle), 0, top)
        codes[:, places] = found
        return np.asarray(width * (found - start.middle))

    factor.replace(weight, project)
    filled = start.codes.reshape(len(codes), -1).copy()
    filled[:, : start.columns] = codes
    return Signs(filled.reshape(start.codes.shape), start.scale, start.levels, start.columns)


def _rescaled(weight: Float64, moment: Float64, signs: Signs) -> Signs:
    """All scales of a row multiplied by ``α``; rows for which it is not positive stay."""
    values = signs.dequantized().astype(np.float64)
    seen = values @ moment
    power = np.einsum("rd,rd->r", seen, values)
    product = np.einsum("rd,rd->r", seen, weight)
    usable = (power > 0) & (product > 0)
    ratio = np.where(usable, product, 1.0) / np.where(usable, power, 1.0)
    scale = np.maximum(signs.scale * ratio[:, None].astype(np.float32), _TINY)
    return Signs(signs.codes, scale, signs.levels, signs.columns)


def _better(weight: Float64, moment: Float64, first: Signs, second: Signs) -> Signs:
    """The better of two, row by row."""
    wins = output_error(weight, second, moment) < output_error(weight, first, moment)
    return Signs(
        np.where(wins[:, None, None], second.codes, first.codes),
        np.where(wins[:, None], second.scale, first.scale),
        first.levels,
        first.columns,
    )


def output_error(weight: Float64, signs: Signs, moment: Float64) -> Float64:
    """Expected squared error of each output, ``δ H δᵀ`` with ``δ = W - Ŵ``, [R]."""
    delta = weight - signs.dequantized()
    return np.asarray(np.einsum("rd,rd->r", delta @ moment, delta))
