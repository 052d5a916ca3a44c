"""The fit of one layer: its ridge by cross-validation, its weights from all samples.

The samples are divided into a few runs of neighbours. Each in turn judges weights fitted to the
others; the ridge with the least error over all of them is taken, and the weights are then fitted to
all samples with it. A fit that does not serve the samples it has not seen better than the old
weights is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress._threads import Each
from onnxcompress.numerics.clipping import Bounds, clipped_target
from onnxcompress.numerics.least_squares import Moments, regress, residual_energy
from onnxcompress.passes.prune.jobs import RIDGES, Job, Refit
from onnxcompress.passes.prune.rows import Floating, Pairs, RowSource, Sums, gathered
from onnxcompress.passes.prune.score import row_limit

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

FOLDS = 4
"""Parts the samples are divided into."""
_WIDE = 2048
"""Layers wider than this are judged by one half of the samples for the other, and treated one part
after the other, to save memory. Their products have threads of their own."""
_JUDGED = 128
"""Outputs of a layer by which its ridge is chosen at most; all share it."""
_FEW_ROWS = 4096
"""Least number of rows where plans are compared."""
_FALLBACK_RIDGE = 1e-1
"""Where there are too few samples to hold any out."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How exactly to fit.

    Attributes:
        folds: Parts the samples are divided into, at most.
        turns: Refits of a layer towards what its activation lets through.
        row_limit: From the width of a layer to the rows that are drawn.
        joint: Whether layers on both sides of removed channels are fitted together.
    """

    folds: int
    turns: int
    row_limit: Callable[[int], int]
    joint: bool


THOROUGH = Effort(FOLDS, 2, row_limit, joint=True)
"""What the result is made with."""
QUICK = Effort(2, 0, lambda width: max(_FEW_ROWS, 10 * width), joint=False)
"""What is enough to compare plans by."""


@dataclass(frozen=True, slots=True)
class Fit:
    """New weights of a layer, [G, O/G, D] and [O], and what became of it."""

    weight: Array
    bias: Array
    refit: Refit


@dataclass(frozen=True, slots=True)
class _Part:
    """One group of a layer: its rows and columns in the layer, and their places in the sums."""

    group: int
    rows: Indices
    columns: Indices
    sum_rows: Indices
    sum_columns: Indices


def fold_count(width: int, runs: int) -> int:
    """Parts to divide ``runs`` runs into for a layer ``width`` inputs wide."""
    wanted = FOLDS if width <= _WIDE else 2
    return min(wanted, runs)


class Fitting:
    """One layer that gets new weights.

    Args:
        model: Holds the layer with its current weights.
        job: The layer.
        source: Its rows.
        folds: Parts the samples are divided into; 1: none are held out.
        ridge: The ridge; 0 chooses it.
        each: Runs over parts of the work.
    """

    def __init__(
        self,
        model: ir.Model,
        job: Job,
        source: RowSource,
        folds: int,
        ridge: float,
        each: Each = map,
    ) -> None:
        self._job, self._source, self._folds, self._ridge = job, source, folds, ridge
        self._each = each if job.consumer.width <= _WIDE else map
        self._weight = job.consumer.matrix(model)
        self._bias = job.consumer.bias_vector(model)
        self._parts = list(self._places())

    @property
    def _bereft(self) -> bool:
        """Whether no input is left, and the bias is all there is."""
        return not self._job.inputs.any() and self._job.consumer.bias is not None

    def _places(self) -> list[_Part]:
        consumer, job = self._job.consumer, self._job
        share = consumer.outputs // consumer.groups
        channels = len(job.inputs) // consumer.groups
        parts = []
        for g in range(consumer.groups):
            rows = np.flatnonzero(job.outputs[g * share : (g + 1) * share])
            here = np.flatnonzero(job.inputs[g * channels : (g + 1) * channels])
            columns = consumer.columns(here)
            # Without groups the sums hold the chosen channels alone, with groups all of them.
            whole = consumer.groups > 1
            count = channels * consumer.taps if whole else len(columns)
            order = self._source.order(count)
            parts.append(
                _Part(
                    g,
                    rows,
                    columns,
                    rows if whole else np.arange(len(rows)),
                    order[columns] if whole else order,
                )
            )
        return parts

    def run(self, turns: int, known: Sequence[float | None] | None = None) -> Fit:
        """Fit, and fit again ``turns`` times towards what the activation lets through.

        Args:
            turns: How often to fit again.
            known: For each group a ridge that is taken as it is; None: it is chosen.
        """
        known = known or (None,) * len(self._parts)
        sums = self._gathered(lambda pairs: pairs.target, own=True)
        ridges = [
            self._solve(part, sums, sums, ridge)
            for part, ridge in zip(self._parts, known, strict=True)
        ]
        count = sum(s.own.count for s in sums)
        used = int(np.count_nonzero(self._job.inputs)) // self._job.consumer.groups
        width = max(used * self._job.consumer.taps, 1)
        refit = Refit(self._job.consumer, tuple(ridges), count / width)
        if self._job.bounds is not None and refit.used:
            for _ in range(turns):
                self._turn(self._job.bounds, sums, ridges)
        return Fit(self._weight, self._bias, refit)

    def _turn(self, bounds: Bounds, sums: Sequence[Sums], ridges: Sequence[float | None]) -> None:
        """One refit towards what the activation lets through, with the ridges found before."""
        predict = self._predictor()

        def passed(pairs: Pairs) -> Floating:
            now = predict(pairs.x)
            if pairs.shortcut is not None:
                now = now + pairs.shortcut
            target = clipped_target(pairs.y, now.astype(pairs.y.dtype), bounds)
            return target if pairs.shortcut is None else target - pairs.shortcut

        found = self._gathered(passed, own=False)
        for part, ridge in zip(self._parts, ridges, strict=True):
            if ridge is not None and np.isfinite(ridge):
                self._solve(part, sums, found, ridge)

    def _gathered(self, target: Callable[[Pairs], Floating], *, own: bool) -> list[Sums]:
        groups = self._job.consumer.groups
        return gathered(self._source, groups, self._folds, own=own, target=target, each=self._each)

    def _predictor(self) -> Callable[[Floating], Floating]:
        """From ``x`` [G, k, D] to the layer's output now, [k, O]."""
        weights, biases = [], []
        for part in self._parts:
            weight = np.zeros((self._sum_outputs(), self._sum_width()))
            weight[np.ix_(part.sum_rows, part.sum_columns)] = self._weight[part.group][
                np.ix_(part.rows, part.columns)
            ]
            bias = np.zeros(self._sum_outputs())
            bias[part.sum_rows] = self._bias[self._absolute(part)]
            weights.append(weight.T)
            biases.append(bias)
        stacked, offset = np.stack(weights), np.concatenate(biases)

        def predict(x: Floating) -> Floating:
            made: Floating = x @ stacked.astype(x.dtype)
            flat = np.moveaxis(made, 0, 1).reshape(made.shape[1], -1)
            return flat + offset.astype(x.dtype)

        return predict

    def _sum_outputs(self) -> int:
        consumer = self._job.consumer
        if consumer.groups > 1:
            return consumer.outputs // consumer.groups
        return int(np.count_nonzero(self._job.outputs))

    def _sum_width(self) -> int:
        consumer = self._job.consumer
        if consumer.groups > 1:
            return consumer.width
        return int(np.count_nonzero(self._job.inputs)) * consumer.taps

    def _absolute(self, part: _Part) -> Indices:
        share = self._job.consumer.outputs // self._job.consumer.groups
        return part.rows + part.group * share

    def _solve(
        self, part: _Part, own: Sequence[Sums], cross: Sequence[Sums], known: float | None
    ) -> float | None:
        """Write the new weights of one group; what ridge they have, as in :class:`Refit`."""
        if not len(part.rows) or not (len(part.columns) or self._bereft):
            return None
        moments = [_moments(o, c, part) for o, c in zip(own, cross, strict=True) if o.own.count]
        if self._job.consumer.bias is None:
            moments = [m.uncentred() for m in moments]
        if not moments:
            return None
        absolute = self._absolute(part)
        if self._bereft:
            self._bias[absolute] = _sum(moments).mean_y
            return np.inf
        place = np.ix_(part.rows, part.columns)
        prior = self._weight[part.group][place]
        chosen = known
        if known is None:
            chosen = choose(moments, prior, self._bias[absolute], self._ridge, self._each)
        if chosen is None:
            return None
        whole = _sum(moments)
        fitted = prior
        if np.isfinite(chosen):
            fitted = regress(whole, prior, chosen)[0]
            self._weight[part.group][place] = fitted
        if self._job.consumer.bias is not None:
            self._bias[absolute] = whole.mean_y - fitted @ whole.mean_x
        return chosen


def choose(
    folds: Sequence[Moments], prior: Array, bias: Array, ridge: float, each: Each = map
) -> float | None:
    """The ridge whose weights serve samples best that they were not fitted to.

    Infinite stands for the old weights with a new bias, None for no change at all.

    Args:
        folds: Moments of each part of the samples.
        prior: The old weights, [O, D].
        bias: The old bias, [O].
        ridge: The ridge, or 0 to choose it from :data:`RIDGES`.
        each: Runs over the parts that are held out.
    """
    if len(folds) == 1:
        return ridge or _FALLBACK_RIDGE
    some = slice(None, None, -(-len(prior) // _JUDGED))
    folds, prior, bias = [m.outputs(some) for m in folds], prior[some], bias[some]
    splits = [(_sum([m for j, m in enumerate(folds) if j != i]), m) for i, m in enumerate(folds)]

    def energy(weights: Callable[[Moments], tuple[Array, Array]]) -> float:
        def missed(number: int) -> float:
            fit, held = splits[number]
            return held.count * float(residual_energy(held, *weights(fit)).sum())

        return sum(each(missed, range(len(splits))))

    found: dict[int, float] = {}

    def of(place: int) -> float:
        if place not in found:
            found[place] = energy(lambda fit: regress(fit, prior, RIDGES[place]))
        return found[place]

    if ridge:
        best, least = ridge, energy(lambda fit: regress(fit, prior, ridge))
    else:
        place = _downhill(of, len(RIDGES))
        best, least = RIDGES[place], of(place)
    moved = energy(lambda fit: (prior, fit.mean_y - prior @ fit.mean_x))
    old = energy(lambda fit: (prior, bias))
    candidates: list[tuple[float, float | None]] = [(least, best), (moved, np.inf), (old, None)]
    return min(candidates, key=lambda e: e[0])[1]


def _downhill(energy: Callable[[int], float], count: int) -> int:
    """The place of a minimum of a function that falls and then rises, from the middle on."""
    place = count // 2
    for step in (-1, 1):
        moved = False
        while 0 <= place + step < count and energy(place + step) < energy(place):
            place += step
            moved = True
        if moved:
            break
    return place


def _sum(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def _moments(own: Sums, cross: Sums, part: _Part) -> Moments:
    columns, rows, g = part.sum_columns, part.sum_rows, part.group
    count = own.own.count
    return Moments(
        count=count,
        mean_x=own.own.mean_x[g][columns],
        mean_y=cross.cross.mean_y[g][rows],
        covariance=own.own.products[g][np.ix_(columns, columns)] / count,
        cross=cross.cross.products[g][np.ix_(columns, rows)] / count,
    )
