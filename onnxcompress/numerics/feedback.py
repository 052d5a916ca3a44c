"""Error feedback: replace the columns of a matrix one by one, later ones make up for earlier ones.

A layer ``y = W x`` whose weights become ``Ŵ``, taken from some set of representable numbers, has
the expected squared output error ``tr (W - Ŵ) H (W - Ŵ)ᵀ`` with ``H = E[x xᵀ]``. Column ``j`` is
replaced by what is representable next to it; its error ``e_j = (w_j - ŵ_j) / U_jj``, with ``U`` the
upper Cholesky factor of ``(H + λI)⁻¹ = UᵀU``, moves the columns after it:

    w_k ← w_k - e_j U_jk,   k > j

Columns with the largest ``H_jj`` go first, while there are most others to repair them.

Source: Frantar and Alistarh 2022, "Optimal Brain Compression"; Frantar et al. 2023, "GPTQ: accurate
post-training quantization for generative pre-trained transformers".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.least_squares import UNDERFLOW
from onnxcompress.numerics.positive import cholesky

FloatArray: TypeAlias = npt.NDArray[np.float64]
Project: TypeAlias = Callable[[npt.NDArray[np.int64], FloatArray], FloatArray]
"""From places ``j`` of columns, [n], and their values, [R, n], to what can be stored instead."""

_MANY = 1 << 17
"""Weights from which products with ``H`` are taken in float32."""
_BLOCK = 64
"""Columns replaced before the columns after them are updated by one matrix product."""


@dataclass(frozen=True, slots=True)
class Factor:
    """The order of the columns and how the error of each spreads; made once per ``H``.

    Attributes:
        order: Columns by falling ``H_jj``, [D].
        upper: ``U`` in that order, [D, D].
    """

    order: npt.NDArray[np.int64]
    upper: FloatArray

    @classmethod
    def of(
        cls,
        moment: FloatArray,
        *,
        damp: float = 0.01,
        order: npt.NDArray[np.int64] | None = None,
    ) -> Self | None:
        """Factor ``H + λI``; None if ``H`` holds no signal.

        Args:
            moment: ``H``, [D, D], symmetric positive semidefinite.
            damp: ``λ`` relative to the mean diagonal of ``H``.
            order: The order of the columns, if not by falling ``H_dd``, [D].
        """
        variance = moment.diagonal()
        mean = float(variance.mean())
        if mean <= UNDERFLOW or not np.isfinite(mean):
            return None
        if order is None:
            order = np.argsort(-variance, kind="stable")
        damped = moment[np.ix_(order, order)] + damp * mean * np.eye(len(moment))
        # (H + λI)⁻¹ = UᵀU with U upper triangular: factor the matrix with its order reversed.
        lower = cholesky(damped[::-1, ::-1])
        return cls(order, np.asarray(np.linalg.inv(lower)[::-1, ::-1], np.float64))

    def replace(self, weight: FloatArray, project: Project, *, width: int = 1) -> FloatArray:
        """``Ŵ``, [R, D], column by column.

        Args:
            weight: ``W``, [R, D].
            project: What can be stored in some columns.
            width: Columns replaced at a time; D is a multiple of it.
        """
        size = len(self.order)
        left = weight[:, self.order].astype(np.float64)
        stored = np.empty_like(left)
        block = max(_BLOCK // width, 1) * width
        for start in range(0, size, block):
            stop = min(start + block, size)
            errors = np.empty((len(left), stop - start))
            for first in range(start, stop, width):
                run = slice(first, first + width)
                stored[:, run] = project(self.order[run], left[:, run])
                for j in range(first, first + width):
                    error = (left[:, j] - stored[:, j]) / self.upper[j, j]
                    left[:, j + 1 : stop] -= np.outer(error, self.upper[j, j + 1 : stop])
                    errors[:, j - start] = error
            left[:, stop:] -= errors @ self.upper[start:stop, stop:]
        result = np.empty_like(stored)
        result[:, self.order] = stored
        return result


@dataclass(frozen=True, slots=True, eq=False)
class InputMoments:
    """Second moments of the inputs that meet the rows of a matrix.

    Attributes:
        matrices: ``H`` of each group of inputs, [G, D, D]; grouped convolutions have several.
        owner: The group of each row, ascending, [R].
    """

    matrices: FloatArray
    owner: npt.NDArray[np.int64]

    @classmethod
    def shared(cls, matrices: FloatArray, rows: int) -> Self:
        """``rows`` rows dealt evenly to the groups, as a convolution does."""
        return cls(matrices, np.repeat(np.arange(len(matrices)), rows // len(matrices)))

    def parts(self) -> Iterator[tuple[slice, FloatArray]]:
        """The rows of each group and its ``H``."""
        bounds = np.searchsorted(self.owner, np.arange(len(self.matrices) + 1))
        for g, matrix in enumerate(self.matrices):
            if bounds[g] < bounds[g + 1]:
                yield slice(int(bounds[g]), int(bounds[g + 1])), matrix

    def rows(self, some: slice) -> InputMoments:
        """The same for some of the rows, in their order."""
        return InputMoments(self.matrices, self.owner[some])

    def times(self, weight: FloatArray) -> FloatArray:
        """``w_r H`` for each row, [R, D]; of many weights in float32, which takes half as long."""
        if len(self.matrices) == 1:
            if weight.size < _MANY:
                return np.asarray(weight @ self.matrices[0])
            product = weight.astype(np.float32) @ self.matrices[0].astype(np.float32)
            return np.asarray(product, np.float64)
        return np.concatenate([weight[rows] @ matrix for rows, matrix in self.parts()])

    def diagonal(self) -> FloatArray:
        """``H_dd`` for each row, not below 0, [R, D]."""
        own = np.maximum(np.diagonal(self.matrices, axis1=1, axis2=2), 0)
        return np.asarray(own[self.owner])

    def damped(self, damp: float) -> InputMoments:
        """``H + λI`` with ``λ`` relative to the mean diagonal of each ``H``."""
        mean = np.trace(self.matrices, axis1=1, axis2=2) / self.matrices.shape[1]
        eye = np.eye(self.matrices.shape[1])
        return InputMoments(self.matrices + damp * mean[:, None, None] * eye, self.owner)


def output_error(delta: FloatArray, moments: InputMoments | None) -> FloatArray:
    """``δ_r H δ_rᵀ`` for each row, [R]; without ``H`` the squared length.

    Args:
        delta: ``W - Ŵ``, [R, D].
        moments: ``H``; None for the identity.
    """
    product = delta if moments is None else moments.times(delta)
    return np.asarray(np.einsum("rd,rd->r", product, delta))
