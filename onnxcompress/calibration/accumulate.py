"""Sums over batches, in float64 and without keeping samples.

Each accumulator takes what one run of the augmented model gives (``update``) or another accumulator
of its kind (``merge``, associative), and ends in a result (``finish``). Means and covariances are
kept centred and merged exactly,

    n = n_a + n_b,  d = mean_b - mean_a,
    mean = mean_a + d n_b / n,
    M = M_a + M_b + d dᵀ n_a n_b / n,

so that no large sums are subtracted from each other. A batch arrives as sums about a shift ``s``
near its mean, ``m = sum(x - s)`` and ``S = sum((x - s)(x - s)ᵀ)``, from which ``mean_b = s + m /
n_b`` and ``M_b = S - m mᵀ / n_b``.

Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", 1979, equations (1.5); the shifted sums from their "Algorithms for Computing the Sample
Variance: Analysis and Recommendations", The American Statistician 37, 1983.
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np

from onnxcompress.calibration.arrays import Array
from onnxcompress.calibration.statistics import (
    FloatArray,
    MeanResult,
    RangeResult,
    TailResult,
)


class RangeSums:
    """Least and greatest elements."""

    def __init__(self) -> None:
        self.count = 0
        self.minimum: FloatArray | None = None
        self.maximum: FloatArray | None = None

    def update(self, minimum: Array, maximum: Array, count: int) -> None:
        """Take the extremes of ``count`` elements (per index): scalars or [C]."""
        low, high = (np.asarray(a, np.float64) for a in (minimum, maximum))
        self.minimum = low if self.minimum is None else np.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else np.maximum(self.maximum, high)
        self.count += count

    def merge(self, other: Self) -> None:
        """Take what another accumulator has seen."""
        if other.minimum is not None and other.maximum is not None:
            self.update(other.minimum, other.maximum, other.count)

    def finish(self) -> RangeResult:
        """The result over everything seen."""
        if self.minimum is None or self.maximum is None:
            raise ValueError("no elements")
        return RangeResult(self.minimum, self.maximum, self.count)


class MovingExtremes:
    """Moving averages of extremes, one sample after the other.

    Args:
        memory: See :class:`~onnxcompress.calibration.statistics.MovingRangeRequest`.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._seen = 0
        self._low = self._high = 0.0
        self.count = 0

    def update(self, minimum: Array, maximum: Array, count: int) -> None:
        """Take the extremes of each sample, [samples], over ``count`` elements in all."""
        lows, highs = (np.asarray(a, np.float64).ravel() for a in (minimum, maximum))
        for low, high in zip(lows, highs, strict=True):
            self._seen += 1
            share = 1 / min(self._seen, self._memory)
            self._low += (float(low) - self._low) * share
            self._high += (float(high) - self._high) * share
        self.count += count

    def finish(self) -> RangeResult:
        """The averages after everything seen."""
        if not self._seen:
            raise ValueError("no elements")
        return RangeResult(np.array(self._low), np.array(self._high), self.count)


class MeanSums:
    """Mean and variance per index: the diagonal case of :class:`CrossSums`."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: FloatArray = np.zeros(0)
        self.squares: FloatArray = np.zeros(0)

    def update(self, mean: Array, squares: Array, count: int) -> None:
        """Take the mean [C] and the squares about it [C] of ``count`` elements per index."""
        if not count:
            return
        other_mean, other_squares = (np.asarray(a, np.float64) for a in (mean, squares))
        if not self.count:
            self.count, self.mean, self.squares = count, other_mean, other_squares
            return
        total = self.count + count
        shift = other_mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.squares = self.squares + other_squares + shift**2 * (self.count * count / total)
        self.count = total

    def merge(self, other: Self) -> None:
        """Take what another accumulator has seen."""
        self.update(other.mean, other.squares, other.count)

    def finish(self) -> MeanResult:
        """The result over everything seen."""
        return MeanResult(self.mean, self.squares / self.count, self.count)


class CrossSums:
    """Means of ``x`` and ``y`` and ``M = sum((x - mean_x)(y - mean_y)ᵀ)``, for each of G groups.

    With ``y`` the same as ``x`` it keeps a covariance. The rank-one corrections of a merge wait in
    a
    list and are added many at a time, as one matrix product: on large matrices they would otherwise
    cost several times as much as adding the batch itself.
    """

    _FLUSH = 32

    def __init__(self) -> None:
        self.count = 0
        self.mean_x: FloatArray = np.zeros((0, 0))
        self.mean_y: FloatArray = np.zeros((0, 0))
        self._products: FloatArray = np.zeros((0, 0, 0))
        self._left: list[FloatArray] = []
        self._right: list[FloatArray] = []

    @property
    def products(self) -> FloatArray:
        """``M``, [G, D, E]."""
        if self._left:
            left, right = np.stack(self._left, axis=2), np.stack(self._right, axis=1)
            self._products += left @ right
            self._left, self._right = [], []
        return self._products

    def update_shifted(
        self,
        count: int,
        shift_x: FloatArray,
        sum_x: FloatArray,
        shift_y: FloatArray,
        sum_y: FloatArray,
        products: Array,
    ) -> None:
        """Take ``count`` rows as sums about shifts.

        Args:
            count: Rows.
            shift_x: [G, D].
            sum_x: ``sum(x - shift_x)``, [G, D].
            shift_y: [G, E].
            sum_y: ``sum(y - shift_y)``, [G, E].
            products: ``sum((x - shift_x)(y - shift_y)ᵀ)``, [G, D, E].
        """
        if not count:
            return
        self._add(count, shift_x + sum_x / count, shift_y + sum_y / count, products)
        self._correct(sum_x, sum_y / -count)

    def merge(self, other: Self) -> None:
        """Take what another accumulator has seen."""
        if other.count:
            self._add(other.count, other.mean_x, other.mean_y, other.products)

    def _add(self, count: int, mean_x: FloatArray, mean_y: FloatArray, products: Array) -> None:
        if not self.count:
            self.count, self.mean_x, self.mean_y = count, mean_x, mean_y
            self._products = products.astype(np.float64)
            return
        total = self.count + count
        step_x, step_y = mean_x - self.mean_x, mean_y - self.mean_y
        np.add(self._products, products, out=self._products)
        self._correct(step_x, step_y * (self.count * count / total))
        self.mean_x = self.mean_x + step_x * (count / total)
        self.mean_y = self.mean_y + step_y * (count / total)
        self.count = total

    def _correct(self, left: FloatArray, right: FloatArray) -> None:
        """Add ``left rightᵀ`` to ``M``, sooner or later."""
        self._left.append(left)
        self._right.append(right)
        if len(self._left) >= self._FLUSH:
            _ = self.products


class TailSums:
    """The least and the greatest elements, as many as a quantile needs.

    What is dropped on the way is bounded: ``dropped_low`` is the least element ever dropped from
    the low side, ``dropped_high`` the greatest from the high side. A quantile is exact if it does
    not lie beyond these bounds.

    Args:
        fraction: The quantile.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.count = 0
        self.low: Array = np.zeros(0, np.float32)
        self.high: Array = np.zeros(0, np.float32)
        self.dropped_low = math.inf
        self.dropped_high = -math.inf

    def update(self, low: Array, high: Array, count: int, keep: int) -> None:
        """Take the ends of ``count`` more elements.

        Args:
            low: The least elements of the batch, any order.
            high: Its greatest elements, any order.
            count: Elements of the batch.
            keep: Elements to keep on each side.
        """
        if len(low) < count:
            self.dropped_low = min(self.dropped_low, float(low.max()))
            self.dropped_high = max(self.dropped_high, float(high.min()))
        self.count += count
        self._keep(np.concatenate([self.low, low]), np.concatenate([self.high, high]), keep)

    def merge(self, other: Self) -> None:
        """Take what another accumulator has seen, keeping everything."""
        self.dropped_low = min(self.dropped_low, other.dropped_low)
        self.dropped_high = max(self.dropped_high, other.dropped_high)
        self.count += other.count
        self.low = np.concatenate([self.low, other.low])
        self.high = np.concatenate([self.high, other.high])

    def _keep(self, low: Array, high: Array, keep: int) -> None:
        if len(low) > keep:
            low = np.partition(low, keep)
            self.dropped_low = min(self.dropped_low, float(low[keep]))
            low = low[:keep].copy()
        if len(high) > keep:
            high = np.partition(high, len(high) - keep - 1)
            self.dropped_high = max(self.dropped_high, float(high[-keep - 1]))
            high = high[-keep:].copy()
        self.low, self.high = low, high

    def exact(self) -> bool:
        """Whether enough was kept for :meth:`finish` to be exact."""
        position = self.fraction * (self.count - 1)
        rank = min(math.floor(position) + 1, self.count - 1)
        if rank >= min(len(self.low), len(self.high)):
            return False
        low, high = np.sort(self.low)[rank], np.sort(self.high)[-1 - rank]
        return bool(low <= self.dropped_low and high >= self.dropped_high)

    def finish(self) -> TailResult:
        """The result over everything seen; exact if :meth:`exact`."""
        position = self.fraction * (self.count - 1)
        rank = math.floor(position)
        part = position - rank
        low, high = np.sort(self.low.astype(np.float64)), np.sort(-self.high.astype(np.float64))
        after = min(rank + 1, self.count - 1)

        def between(ends: FloatArray) -> float:
            return float(ends[rank] + part * (ends[after] - ends[rank]))

        return TailResult(between(low), -between(high))
