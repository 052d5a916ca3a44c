"""Rows of a layer, drawn from kept activations: what it sees, and what it should answer.

The same rows serve the fit, the choice of its ridge and every later turn towards another target, so
they are unfolded once and kept as long as they are small enough; else they are unfolded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnxcompress._threads import Each
from onnxcompress.calibration.accumulate import CrossSums
from onnxcompress.calibration.feeds import RunFeeds
from onnxcompress.calibration.geometry import ConvGrid, weight_order
from onnxcompress.calibration.statistics import AxisUnfold, Unfold
from onnxcompress.errors import DataError, ModelError
from onnxcompress.passes.prune.answers import Answers
from onnxcompress.passes.prune.stream import Stream

Floating = npt.NDArray[np.floating]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

KEPT_BYTES = 256 << 20
"""Rows kept between turns."""
_CHUNK_ROWS = 4096
"""Rows of one matrix product; sums of so many are exact enough in float32."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows of one part of the samples.

    Attributes:
        fold: Number of the part.
        x: What the layer sees, [G, k, D], columns tap first.
        y: The target before an activation and before the shortcut is subtracted, [k, O].
        shortcut: What is subtracted from it, [k, O]; None where there is nothing.
    """

    fold: int
    x: Floating
    y: Floating
    shortcut: Floating | None

    @property
    def target(self) -> Floating:
        """What the layer should answer, [k, O]."""
        return self.y if self.shortcut is None else self.y - self.shortcut

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return (
            self.x.nbytes + self.y.nbytes + (0 if self.shortcut is None else self.shortcut.nbytes)
        )


@dataclass(frozen=True, slots=True)
class Products:
    """Sums over some rows about shifts near their means.

    Attributes:
        count: Number of rows.
        shift_x: ``s``, [G, D].
        shift_y: ``t``, [G, O/G].
        left_x: ``Σ(x - s)``, [G, D].
        left_y: ``Σ(y - t)``, [G, O/G].
        own: ``Σ(x - s)(x - s)ᵀ``, [G, D, D]; None where it was not asked for.
        cross: ``Σ(x - s)(y - t)ᵀ``, [G, D, O/G].
    """

    count: int
    shift_x: npt.NDArray[np.float64]
    shift_y: npt.NDArray[np.float64]
    left_x: npt.NDArray[np.float64]
    left_y: npt.NDArray[np.float64]
    own: Floating | None
    cross: Floating

    @classmethod
    def of(cls, x: Floating, y: Floating, groups: int, *, own: bool) -> Products:
        """Sum over rows.

        Args:
            x: [G, k, D].
            y: [k, O].
            groups: ``G``.
            own: Whether to sum ``x xᵀ`` too.
        """
        count = x.shape[1]
        mean_x = x.mean(axis=1, dtype=np.float64)
        mean_y = y.mean(axis=0, dtype=np.float64)
        centred = x - mean_x[:, np.newaxis].astype(x.dtype)
        target = (y - mean_y.astype(y.dtype)).reshape(count, groups, -1).swapaxes(0, 1)
        left_x = mean_x - mean_x.astype(x.dtype)
        left_y = (mean_y - mean_y.astype(y.dtype)).reshape(groups, -1)
        across = centred.swapaxes(1, 2)
        return cls(
            count,
            mean_x - left_x,
            mean_y.reshape(groups, -1) - left_y,
            left_x * count,
            left_y * count,
            across @ centred if own else None,
            across @ target,
        )


@dataclass(frozen=True, slots=True)
class Sums:
    """Moments of one part of the rows.

    Attributes:
        own: Of ``x`` with itself.
        cross: Of ``x`` with the target.
    """

    own: CrossSums = field(default_factory=CrossSums)
    cross: CrossSums = field(default_factory=CrossSums)

    def add(self, found: Products) -> None:
        """Take in the sums over more rows."""
        x = (found.shift_x, found.left_x)
        if found.own is not None:
            self.own.update_shifted(found.count, *x, *x, found.own)
        self.cross.update_shifted(found.count, *x, found.shift_y, found.left_y, found.cross)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Which rows to draw.

    Attributes:
        data: Name of the value that rows are unfolded from.
        unfold: What a row is.
        total: Name of the value that gives the target.
        axis: Axis of the targets that ``y`` runs along.
        shortcut: Name of the value to subtract from it; None for nothing.
        channels: Channels of ``data`` to take, [C]; all must be taken where there are groups.
        outputs: Outputs to take, [O], likewise.
        max_rows: About how many rows.
        folds: Parts the samples are divided into.
        seed: Of the choice of rows.
    """

    data: str
    unfold: Unfold
    total: str
    axis: int
    shortcut: str | None
    channels: Mask
    outputs: Mask
    max_rows: int
    folds: int
    seed: int


class RowSource:
    """The rows of a layer.

    Args:
        stream: Holds the values of the plan, but the targets where they are known.
        plan: Which rows.
        answers: The targets' rows, if they are known; else they are put there. None: they are not
            kept.
    """

    def __init__(self, stream: Stream, plan: RowPlan, answers: Answers | None = None) -> None:
        self._stream, self._plan = stream, plan
        self._answers = answers
        self._kept: list[Pairs] | None = None
        self._whole = True

    def __iter__(self) -> Iterator[Pairs]:
        """All rows, fold after fold, in chunks of several thousand."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Pairs] = []
        used = 0
        for pairs in self._chunks():
            used += pairs.nbytes
            if used <= KEPT_BYTES:
                kept.append(pairs)
            yield pairs
        if used <= KEPT_BYTES:
            self._kept = kept

    def order(self, columns: int) -> Indices:
        """Where the columns of the weight's order lie in ``x``, [D]."""
        return weight_order(self._plan.unfold, columns)

    def _chunks(self) -> Iterator[Pairs]:
        parts: list[Pairs] = []
        for pairs in self._runs():
            if parts and (
                pairs.fold != parts[0].fold or sum(p.x.shape[1] for p in parts) >= _CHUNK_ROWS
            ):
                yield _joined(parts)
                parts = []
            parts.append(pairs)
        if parts:
            yield _joined(parts)

    def _runs(self) -> Iterator[Pairs]:
        plan, answers = self._plan, self._answers
        random = np.random.default_rng(plan.seed)
        names = [plan.data] if plan.shortcut is None else [plan.data, plan.shortcut]
        runs = self._stream.run_count
        if answers is not None and answers.whole and len(answers.rows) != runs:
            raise ModelError("the samples run in other batches than before")
        if answers is None or not answers.whole:
            names.append(plan.total)
        for number, (count, found) in enumerate(self._stream.feeds(list(dict.fromkeys(names)))):
            feeds = RunFeeds(count, self._stream.sample_count, 1.0, random)
            pairs = self._drawn(feeds, found, number, number * plan.folds // runs)
            for name, array in ((plan.data, pairs.x), (plan.total, pairs.y)):
                if not _finite(array):
                    raise DataError(
                        f"tensor '{name}' has NaN or infinite values on calibration samples",
                        hint="Check the model and the samples: a float model must give finite "
                        "values.",
                    )
            yield pairs
        if answers is not None:
            answers.whole = True

    def _drawn(
        self,
        feeds: RunFeeds,
        found: Mapping[str, npt.NDArray[np.generic]],
        number: int,
        fold: int,
    ) -> Pairs:
        plan, answers = self._plan, self._answers
        if answers is not None and answers.whole:
            there, y = answers.there[number], answers.rows[number]
            rows = chosen_rows(feeds, there, plan.max_rows)
        else:
            total = found[plan.total]
            there = total.size // total.shape[plan.axis]
            rows = chosen_rows(feeds, there, plan.max_rows)
            y = rows_along(floating(total), plan.axis, rows)
            if answers is not None and len(answers.rows) == number:
                answers.add(there, y)
        x = unfolded(floating(found[plan.data]), plan.unfold, plan.channels, rows, there)
        shortcut = None
        if plan.shortcut is not None:
            shortcut = rows_along(floating(found[plan.shortcut]), plan.axis, rows)
            shortcut = picked(shortcut, None, plan.outputs)
        return Pairs(fold, x, picked(y, None, plan.outputs), shortcut)


def _finite(array: Floating) -> bool:
    """Whether all numbers are; their sum in float64 says so, if that in float32 overflows.

    In float64 it overflows only where refitting is pointless, too.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum()) or np.isfinite(array.sum(dtype=np.float64)))


def chosen_rows(feeds: RunFeeds, there: int, max_rows: int) -> Indices | None:
    """This run's share of the rows; None for all."""
    number = feeds.quota(max_rows)
    if number >= there:
        return None
    bounds = np.arange(number + 1, dtype=np.int64) * there // number
    steps = feeds.uniform(number) * np.diff(bounds)
    chosen: Indices = bounds[:-1] + steps.astype(np.int64)
    return chosen


def picked(y: Floating, rows: Indices | None, outputs: Mask) -> Floating:
    """Some rows and columns of ``y``; all rows for None."""
    taken = y if rows is None else y[rows]
    return taken if outputs.all() else taken[:, outputs]


def floating(array: npt.NDArray[np.generic]) -> Floating:
    """The array in a type to compute with."""
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32, copy=False)


def axis_last(array: Floating, axis: int) -> Floating:
    """Rows along an axis of a tensor, [rows, length of the axis]."""
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def rows_along(array: Floating, axis: int, rows: Indices | None) -> Floating:
    """Some rows of :func:`axis_last`, without making the others; all for None."""
    if rows is None:
        return axis_last(array, axis)
    moved = np.moveaxis(array, axis, -1)
    taken: Floating = moved[np.unravel_index(rows, moved.shape[:-1])]
    return taken


def unfolded(
    x: Floating, unfold: Unfold, channels: Mask, rows: Indices | None, there: int
) -> Floating:
    """Rows of a tensor, columns tap first.

    Args:
        x: The tensor.
        unfold: What a row is.
        channels: Those to take, [C]; all where there are groups.
        rows: Numbers of the rows; None for all.
        there: How many rows there must be.

    Returns:
        [G, k, D].

    Raises:
        ModelError: If there are more or fewer rows than ``there``.
    """
    if isinstance(unfold, AxisUnfold):
        flat = axis_last(x, unfold.axis)
        _check(len(flat), there)
        return picked(flat, rows, channels)[np.newaxis]
    if not channels.all():
        x = x[:, channels]
    last = np.moveaxis(x, 1, -1)
    grid, begins = ConvGrid.over(unfold, x.shape[2:]), unfold.pads[: x.ndim - 2]
    _check(len(x) * grid.per_sample, there)
    padded = np.zeros((len(x), *grid.padded, x.shape[1]), x.dtype)
    inner = (slice(a, a + n) for a, n in zip(begins, x.shape[2:], strict=True))
    padded[(slice(None), *inner)] = last
    flat = padded.reshape(-1, x.shape[1])
    every = np.arange(there, dtype=np.int64) if rows is None else rows
    sample, place = np.divmod(every, grid.per_sample)
    positions = grid.places()[place] + (sample * int(np.prod(grid.padded)))[:, np.newaxis]
    taken: Floating = flat.take(positions, axis=0)  # [k, taps, C]
    if unfold.groups == 1:
        return taken.reshape(1, len(every), -1)
    split = np.moveaxis(taken.reshape(len(every), unfold.taps, unfold.groups, -1), 2, 0)
    grouped: Floating = split.reshape(unfold.groups, len(every), -1)
    return grouped


def _check(rows: int, there: int) -> None:
    if rows != there:
        raise ModelError(
            f"a layer has {rows} rows of inputs and {there} of outputs",
            hint="Its output must have one row for each position that it reads.",
        )


def _joined(parts: Sequence[Pairs]) -> Pairs:
    if len(parts) == 1:
        return parts[0]
    shortcuts = [p.shortcut for p in parts if p.shortcut is not None]
    return Pairs(
        parts[0].fold,
        np.concatenate([p.x for p in parts], axis=1),
        np.concatenate([p.y for p in parts]),
        np.concatenate(shortcuts) if shortcuts else None,
    )


def gathered(
    source: RowSource,
    groups: int,
    folds: int,
    *,
    own: bool,
    target: Callable[[Pairs], Floating],
    each: Each = map,
) -> list[Sums]:
    """Moments of each fold.

    Args:
        source: The rows.
        groups: Groups ``G`` of the layer.
        folds: How many parts the samples are in.
        own: Whether to sum ``x xᵀ`` too.
        target: What to fit rows to, [k, O].
        each: Runs over parts of the rows.
    """

    def summed(pairs: Pairs) -> tuple[int, Products]:
        return pairs.fold, Products.of(pairs.x, target(pairs), groups, own=own)

    found = [Sums() for _ in range(folds)]
    for fold, products in each(summed, (pairs for pairs in source if len(pairs.y))):
        found[fold].add(products)
    return found
