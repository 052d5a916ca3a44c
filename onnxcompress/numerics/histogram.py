"""Histograms whose bins never lose the zero, and what rounding to a grid costs on them.

The bins are ``[i w, (i + 1) w)`` for ``-H <= i < H`` with a width ``w`` that is a power of two, so
0 is an edge. A value outside doubles the width: two neighbouring bins become one, exactly, and the
result does not depend on the order in which values came. Exact zeros (what a Relu leaves) are
counted beside the bins, since they cost nothing on any grid that holds 0.

Within a bin values count as evenly spread. Rounding ``x`` to the grid ``s (q - z)``, ``q`` in
``[low, high]``, with ends ``a <= 0 <= b``, has the error ``e(x) = x - s round(x / s)`` inside and
``x - a``, ``x - b`` outside, so ``|e(x)|ᵖ`` has the antiderivative

    F(x) = (2 n (s / 2)ᵖ⁺¹ + [t]ᵖ⁺¹ + [min(x - a, 0)]ᵖ⁺¹ + [max(x - b, 0)]ᵖ⁺¹) / (p + 1),

with ``c = clip(x, a, b)``, ``n = round(c / s)``, ``t = c - s n`` and ``[y]ᵖ = sign(y) |y|ᵖ``; its
mean over a bin is ``(F(right) - F(left)) / w``, exactly, however fine or coarse the bins are
against the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.affine import Affine

FloatArray = npt.NDArray[np.float64]
CountArray = npt.NDArray[np.int64]

_LEAST_EXPONENT, _GREATEST_EXPONENT = -120, 127
"""Widths whose reciprocal is a normal float32; smaller values count as next to 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """How often which values were seen.

    Attributes:
        counts: Values per bin, int64 [2 H], exact zeros left out.
        width: ``w``; bin ``i`` (from 0) is ``[(i - H) w, (i + 1 - H) w)``.
        zeros: Exact zeros.
    """

    counts: CountArray
    width: float
    zeros: int

    @property
    def count(self) -> int:
        """All values."""
        return int(self.counts.sum()) + self.zeros

    def occupied(self) -> tuple[FloatArray, FloatArray]:
        """The bins between the first and the last that is not empty.

        Returns:
            Their edges, [n + 1], and counts, [n].
        """
        places = np.flatnonzero(self.counts)
        if not len(places):
            return np.zeros(1), np.zeros(0)
        first, last = int(places[0]), int(places[-1]) + 1
        half = len(self.counts) // 2
        edges = np.arange(first - half, last - half + 1, dtype=np.float64) * self.width
        return edges, self.counts[first:last].astype(np.float64)

    def rounding_error(self, affine: Affine, power: float = 2.0) -> float:
        """Mean of ``|error|ᵖ`` of rounding all values to a grid; squared errors by default.

        Args:
            affine: The grid, one scale for the whole tensor.
            power: ``p``, positive.
        """
        edges, counts = self.occupied()
        if not len(counts):
            return 0.0
        means = np.diff(_error_integral(edges, affine, power)) / self.width
        return float(np.maximum(means, 0.0) @ counts) / self.count

    def divergence(self, affine: Affine) -> float:
        """Kullback-Leibler divergence of what a grid leaves of the values, in nats.

        ``P`` is the distribution over the bins inside the grid, with all values outside added to
        the bins at its ends; ``Q`` spreads the values inside evenly over the occupied bins of each
        step. ``KL(P || Q) = Σ p log(p / q)`` weighs the shape lost within steps against what is
        cut off. Exact zeros are left out: every grid holds them.

        Args:
            affine: The grid; infinite if its steps are finer than the bins, which cannot be judged.

        Source: Migacz 2017, "8-bit inference with TensorRT" (there for symmetric grids).
        """
        edges, counts = self.occupied()
        scale = float(affine.scale)
        if not counts.sum():
            return 0.0
        if scale < self.width:
            return math.inf
        centres = (edges[:-1] + edges[1:]) / 2
        inside = (centres >= float(affine.minimum) - scale / 2) & (
            centres <= float(affine.maximum) + scale / 2
        )
        if not inside.any():
            return math.inf
        steps = np.rint(centres[inside] / scale).astype(np.int64)
        steps -= steps.min()
        kept = counts[inside]
        mass = np.bincount(steps, kept)
        occupied = np.bincount(steps, kept > 0)
        q = np.where(kept > 0, (mass / np.maximum(occupied, 1))[steps], 0.0)
        p = kept.copy()
        first, last = np.flatnonzero(inside)[[0, -1]]
        p[0] += counts[:first].sum()
        p[-1] += counts[last + 1 :].sum()
        if not q.sum():
            return math.inf
        p, q = p / p.sum(), q / q.sum()
        there = p > 0
        # A bin that holds only what was cut off has no counterpart in Q: as one value would.
        least = 1.0 / counts.sum()
        return float(np.sum(p[there] * np.log(p[there] / np.maximum(q[there], least))))

    def quantile(self, share: float) -> float:
        """The value that ``share`` of all values lie below, to the width of a bin.

        Args:
            share: In [0, 1].
        """
        edges, counts = self.occupied()
        if not len(counts):
            return 0.0
        place = int(np.searchsorted(edges, 0.0))  # bins before it hold negative values
        below = float(counts[:place].sum())
        wanted = share * self.count
        if below < wanted <= below + self.zeros:
            return 0.0
        rest = wanted if wanted <= below else wanted - self.zeros
        return float(np.interp(rest, np.concatenate([[0.0], np.cumsum(counts)]), edges))


def _error_integral(x: FloatArray, affine: Affine, power: float) -> FloatArray:
    """``F`` of the module's description."""
    s = float(affine.scale)
    a, b = float(affine.minimum), float(affine.maximum)
    inside = np.clip(x, a, b)
    n = np.rint(inside / s)
    parts = _signed_power(inside - s * n, power + 1)
    parts += _signed_power(x - inside, power + 1)
    return np.asarray((2 * (s / 2) ** (power + 1) * n + parts) / (power + 1))


def _signed_power(y: FloatArray, power: float) -> FloatArray:
    if power == 3.0:  # of squared errors; powers in general take ten times as long
        return y * y * y
    return np.asarray(np.sign(y) * np.abs(y) ** power)


class HistogramSums:
    """A histogram that grows with what it sees.

    Args:
        bins: ``2 H``, a multiple of 4.
    """

    def __init__(self, bins: int) -> None:
        if bins < 4 or bins % 4:
            raise ValueError(f"the number of bins must be a multiple of 4, not {bins}")
        self._half = bins // 2
        self._counts: CountArray = np.zeros(bins, np.int64)
        self._exponent: int | None = None
        self._zeros = 0

    def update(self, values: npt.NDArray[np.floating]) -> None:
        """Count more values.

        Args:
            values: Any shape.

        Raises:
            ValueError: If a value is not finite.
        """
        flat = values.ravel()
        if not len(flat):
            return
        peak = max(-float(flat.min()), float(flat.max()))
        if not math.isfinite(peak):
            raise ValueError("values are not finite")
        zeros = len(flat) - int(np.count_nonzero(flat))
        self._zeros += zeros
        if peak == 0.0:
            return
        self._reach(peak)
        places = flat * np.asarray(1.0 / self._width, flat.dtype)
        np.floor(places, out=places)
        places += self._half
        found = np.bincount(places.astype(np.int64), minlength=2 * self._half)
        found[self._half] -= zeros
        self._counts += found[: 2 * self._half]

    @property
    def _width(self) -> float:
        return math.ldexp(1.0, self._exponent or 0)

    def _reach(self, peak: float) -> None:
        """Widen the bins until ``peak`` is inside: ``peak < (H - 1) w``."""
        needed = math.frexp(peak / (self._half - 1))[1]
        self._coarsen(min(max(needed, _LEAST_EXPONENT), _GREATEST_EXPONENT))

    def _coarsen(self, exponent: int) -> None:
        """Let bins be at least ``2 ** exponent`` wide."""
        if self._exponent is None:
            self._exponent = exponent
        while self._exponent < exponent:
            pairs = self._counts.reshape(-1, 2).sum(axis=1)
            quarter = self._half // 2
            self._counts = np.zeros_like(self._counts)
            self._counts[quarter : quarter + self._half] = pairs
            self._exponent += 1

    def merge(self, other: Self) -> None:
        """Take what another accumulator of as many bins has seen."""
        self._zeros += other._zeros
        if other._exponent is None:
            return
        if self._exponent is None:
            self._exponent, self._counts = other._exponent, other._counts.copy()
            return
        theirs = type(self)(2 * self._half)
        theirs._counts, theirs._exponent = other._counts.copy(), other._exponent
        self._coarsen(other._exponent)
        theirs._coarsen(self._exponent)
        self._counts += theirs._counts

    def finish(self) -> Histogram:
        """The histogram of everything seen."""
        return Histogram(self._counts.copy(), self._width, self._zeros)
