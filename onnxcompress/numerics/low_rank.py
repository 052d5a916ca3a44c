"""Low-rank chains in the place of one linear layer, chosen by the inputs it really sees.

A layer ``y = W x`` with unfolded inputs ``x`` (``D`` columns: channels times kernel taps) and ``O``
outputs becomes a chain of two or three smaller ones. Four chains are known; with ``k`` taps:

    OUTPUT   W ≈ U P                   P [r, D], U [O, r]                  r (D + O) weights
    INPUT    W ≈ V (Q ⊗ I_k)           Q [r, C], V [O, r·k]                r (C + O·k)
    SPATIAL  W ≈ V (Q ⊗ I_w)           Q [r, C·h], V [O, r·w]              r (C·h + O·w)
    TUCKER   W ≈ U G (Q ⊗ I_k)         Q [s, C], G [r, s·k], U [O, r]      s C + r s k + r O

The error that counts is ``E‖W x - W' x‖² = tr((W - W') C (W - W')ᵀ)`` with ``C`` the second moment
of ``x``; with ``C = I`` this is plain truncation of the weights.

- *OUTPUT* is output PCA: with ``U`` the first ``r`` eigenvectors of ``Cov(y) = W C Wᵀ`` and
  ``P = Uᵀ W`` the error is the sum of the discarded eigenvalues, the least there is for rank ``r``.
- *INPUT* and *SPATIAL* first project (the channels; channels and kernel rows) onto the principal
  subspace of the whitened weights, then ``V`` is the least-squares fit on what is left,
  ``V = W C Tᵀ (T C Tᵀ)⁻¹`` for ``T = Q ⊗ I``. One Cholesky factorization of ``T C Tᵀ`` for the full
  basis gives fit and error for every ``r``.
- *TUCKER* is output PCA on the outputs of that fit.

Source: Eckart and Young 1936; Denil et al. 2013 and Zhang et al. 2016, "Accelerating very deep
convolutional networks for classification and detection" (output PCA); Jaderberg et al. 2014
(spatial); Kim et al. 2016 (Tucker-2); Wang et al. 2024, "SVD-LLM" (whitening).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.least_squares import damping, solve_lower, solve_transposed
from onnxcompress.numerics.positive import cholesky

Array = npt.NDArray[np.float64]

_RIDGE = 1e-6
"""Damping of second moments, relative to the mean diagonal."""
_FLOOR = 1e-10
"""Eigenvalues are taken as at least this part of the largest one before a root is divided by."""


class Form(enum.Enum):
    """The chains."""

    OUTPUT = "output"
    INPUT = "input"
    SPATIAL = "spatial"
    TUCKER = "tucker"


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a layer's weight is: ``O`` outputs, ``C`` input channels, the taps of each axis.

    Attributes:
        outputs: ``O``.
        channels: ``C``.
        taps: Length of each kernel axis; empty for matrices.
    """

    outputs: int
    channels: int
    taps: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Taps in all, ``k``."""
        return math.prod(self.taps)

    @property
    def width(self) -> int:
        """Columns ``D = C k``."""
        return self.channels * self.size

    @property
    def forms(self) -> tuple[Form, ...]:
        """The chains that differ for this kernel."""
        if self.size == 1:
            return (Form.OUTPUT,)
        if len(self.taps) == 2 and min(self.taps) > 1:
            return (Form.OUTPUT, Form.INPUT, Form.SPATIAL, Form.TUCKER)
        return (Form.OUTPUT, Form.INPUT, Form.TUCKER)

    def split(self, form: Form) -> tuple[int, int]:
        """Columns that the first factor mixes, and those it leaves apart: ``D = I · J``."""
        if form is Form.SPATIAL:
            return self.channels * self.taps[0], self.taps[1]
        return self.channels, self.size

    def parameters(self, form: Form, ranks: tuple[int, ...]) -> int:
        """Weights of a chain.

        Args:
            form: Which chain.
            ranks: ``(r,)``; for TUCKER ``(s, r)``.
        """
        first, last = ranks[0], ranks[-1]
        if form is Form.OUTPUT:
            return first * (self.width + self.outputs)
        inside, outside = self.split(form)
        if form is Form.TUCKER:
            return first * inside + last * first * outside + last * self.outputs
        return first * (inside + self.outputs * outside)

    def most(self, form: Form) -> int:
        """The highest first rank that means anything."""
        if form is Form.OUTPUT:
            return min(self.outputs, self.width)
        return self.split(form)[0]


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """The factors of one layer, first applied first.

    Attributes:
        form: Which chain.
        kernel: The layer's weight.
        factors: As in the table of the module, in the order of their application.
    """

    form: Form
    kernel: Kernel
    factors: tuple[Array, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Lengths between the factors."""
        return tuple(len(f) for f in self.factors[:-1])

    def dense(self) -> Array:
        """The weight that the chain stands for, [O, D]."""
        first, *rest = self.factors
        if self.form is Form.OUTPUT:
            return np.asarray(rest[0] @ first)
        _, outside = self.kernel.split(self.form)
        merged = rest[0] if len(rest) == 1 else rest[1] @ rest[0]
        cube = merged.reshape(self.kernel.outputs, len(first), outside)
        dense = np.einsum("orj,ri->oij", cube, first)
        return np.asarray(dense).reshape(self.kernel.outputs, -1)


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """How errors ``e`` of the outputs count: as ``eᵀ M e`` with ``M = R R``.

    Attributes:
        root: ``R``, symmetric, [O, O].
        inverse: ``R⁻¹``.
    """

    root: Array
    inverse: Array

    @classmethod
    def of(cls, matrix: Array) -> Metric:
        """The metric of a symmetric positive definite ``M``."""
        values, vectors = _falling(matrix)
        roots = np.sqrt(np.maximum(values, _FLOOR * values.max()))
        return cls((vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T)

    def undo(self, chain: Chain) -> Chain:
        """The chain for ``y`` from one for ``R y``."""
        *rest, last = chain.factors
        return Chain(chain.form, chain.kernel, (*rest, self.inverse @ last))


class Spectrum:
    """What every chain and every rank costs for one layer.

    Args:
        weight: ``W``, [O, D].
        kernel: Its geometry.
        moment: ``C`` of the inputs, [D, D]; None for plain truncation.
        outputs: ``E[y yᵀ]``, [O, O], where that is known instead of ``C``; only OUTPUT chains then.
        metric: How errors of the outputs count; None: all alike.
    """

    def __init__(
        self,
        weight: Array,
        kernel: Kernel,
        moment: Array | None = None,
        *,
        outputs: Array | None = None,
        metric: Metric | None = None,
    ) -> None:
        self._kernel, self._metric = kernel, metric
        self._weight, self._outputs = weight, outputs
        if metric is not None:
            self._weight = metric.root @ weight
            if outputs is not None:
                self._outputs = metric.root @ outputs @ metric.root
        self._moment = moment
        if moment is not None:
            self._moment = moment + damping(moment, _RIDGE) * np.eye(len(moment))
        self._bases: dict[tuple[int, int], _Basis] = {}

    @property
    def forms(self) -> tuple[Form, ...]:
        """The chains it can make."""
        return (Form.OUTPUT,) if self._outputs is not None else self._kernel.forms

    @property
    def energy(self) -> float:
        """``E‖W x‖²``."""
        return float(np.sum(self._principal[0]))

    def loss(self, form: Form, ranks: tuple[int, ...]) -> float:
        """``E‖W x - W' x‖² / E‖W x‖²``; 0 where there is no signal."""
        if self.energy <= 0:
            return 0.0
        return min(max(1.0 - self._explained(form, ranks) / self.energy, 0.0), 1.0)

    def _explained(self, form: Form, ranks: tuple[int, ...]) -> float:
        first, last = ranks[0], ranks[-1]
        if form is Form.OUTPUT:
            return float(np.sum(self._principal[0][:first]))
        basis = self._basis(form)
        if form is Form.TUCKER:
            return float(np.sum(basis.outputs(first)[0][:last]))
        return float(basis.gains[: first * basis.outside].sum())

    def chain(self, form: Form, ranks: tuple[int, ...]) -> Chain:
        """The factors; outputs of a factor are scaled to the square root of their deviation.

        That spreads the singular values evenly over neighbouring factors, which later rounding
        likes.
        """
        chain = self._chain(form, ranks)
        return chain if self._metric is None else self._metric.undo(chain)

    def _chain(self, form: Form, ranks: tuple[int, ...]) -> Chain:
        first, last = ranks[0], ranks[-1]
        if form is Form.OUTPUT:
            values, vectors = self._principal
            u = vectors[:, :first]
            scale = _fourth_root(values[:first])
            p = (u.T.astype(self._weight.dtype) @ self._weight) / scale[:, None]
            return Chain(form, self._kernel, (p, u * scale))
        basis = self._basis(form)
        scale = _fourth_root(basis.variances[:first])
        project, fitted = basis.project[:first] / scale[:, None], basis.fit(first)
        fitted = (fitted.reshape(-1, first, basis.outside) * scale[:, None]).reshape(
            len(fitted), -1
        )
        if form is not Form.TUCKER:
            return Chain(form, self._kernel, (project, fitted))
        values, vectors = basis.outputs(first)
        u, outer = vectors[:, :last], _fourth_root(values[:last])
        return Chain(form, self._kernel, (project, (u.T @ fitted) / outer[:, None], u * outer))

    @cached_property
    def _principal(self) -> tuple[Array, Array]:
        """Eigenvalues, falling, and eigenvectors of ``Cov(y)``; no more than its rank can be."""
        if self._outputs is not None:
            return _falling(self._outputs)
        weight = np.asarray(self._weight, np.float64)
        if len(weight) <= weight.shape[1]:
            right = weight.T if self._moment is None else self._moment @ weight.T
            return _falling(weight @ right)
        root = weight if self._moment is None else weight @ cholesky(self._moment)
        values, right = _falling(root.T @ root)
        lengths = np.sqrt(np.maximum(values, _FLOOR * max(values.max(initial=0.0), _FLOOR)))
        return values, (root @ right) / lengths

    def _basis(self, form: Form) -> _Basis:
        split = self._kernel.split(form)
        if split not in self._bases:
            moment = self._moment
            if moment is None:
                moment = np.eye(self._kernel.width)
            self._bases[split] = _Basis(np.asarray(self._weight, np.float64), moment, *split)
        return self._bases[split]


class _Basis:
    """Projections of one side of the columns, all ranks at once.

    Args:
        weight: ``W``, [O, I·J].
        moment: ``C``, [I·J, I·J], positive definite.
        inside: ``I``, columns that are mixed.
        outside: ``J``, columns that stay apart.

    Attributes:
        project: ``Q`` for the full rank, orthonormal rows, [I, I]; the first ``r`` rows are the
            basis of rank ``r``.
        variances: Mean square of each row's output, [I].
        gains: Energy of ``y`` that each column of ``T x`` adds to the fit, [I·J].
    """

    def __init__(self, weight: Array, moment: Array, inside: int, outside: int) -> None:
        self.outside = outside
        cube = weight.reshape(-1, inside, outside)
        grid = moment.reshape(inside, outside, inside, outside)
        own = np.einsum("ajbj->ab", grid) / outside
        values, vectors = _falling(own)
        roots = np.sqrt(np.maximum(values, _FLOOR * values.max()))
        half, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
        sides = np.ascontiguousarray(np.moveaxis(cube, 1, 0)).reshape(inside, -1)
        directions = _falling(half @ (sides @ sides.T) @ half)[1]
        # The span of the first rows is what matters: orthonormal rows are best conditioned.
        self.project = np.linalg.qr(inverse @ directions)[0].T
        half_way = np.tensordot(self.project, grid, axes=(1, 0))  # [I', J, I, J]
        full = np.tensordot(half_way, self.project, axes=(2, 1)).transpose(0, 1, 3, 2)
        full = np.ascontiguousarray(full).reshape(moment.shape)
        self.variances = full.diagonal().reshape(inside, outside).mean(axis=1)
        mixed = half_way.reshape(moment.shape) @ weight.T
        self._factor = cholesky((full + full.T) / 2)
        self._scores = solve_lower(self._factor, mixed)  # [I·J, O]
        self.gains = np.einsum("do,do->d", self._scores, self._scores)

    def fit(self, rank: int) -> Array:
        """``V``, the least-squares weights on the first ``rank`` projections, [O, rank·J]."""
        size = rank * self.outside
        return solve_transposed(self._factor[:size, :size], self._scores[:size]).T

    def outputs(self, rank: int) -> tuple[Array, Array]:
        """Eigenvalues, falling, and eigenvectors of the second moment of ``V T x``."""
        scores = self._scores[: rank * self.outside]
        return _falling(scores.T @ scores)


def _falling(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues from the largest down, not below 0, and their eigenvectors as columns."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def _fourth_root(variances: Array) -> Array:
    """``σ^½`` for each variance ``σ²``, with a floor for those without signal."""
    largest = float(variances.max(initial=0.0))
    return np.asarray(np.maximum(variances, _FLOOR * largest if largest > 0 else 1.0) ** 0.25)
