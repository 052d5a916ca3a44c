"""One tap per request: the nodes it adds to the graph, and what it makes of their outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.accumulate import (
    CrossSums,
    MeanSums,
    TailSums,
)
from onnxcompress.calibration.arrays import Array
from onnxcompress.calibration.feeds import ShapesDifferError
from onnxcompress.calibration.geometry import shift_columns, weight_order
from onnxcompress.calibration.histogram_tap import HistogramTap
from onnxcompress.calibration.range_tap import (
    MovingRangeTap,
    RangeTap,
    check_axis,
    size_of,
    total_of,
)
from onnxcompress.calibration.statistics import (
    ConvUnfold,
    CrossMomentsRequest,
    CrossMomentsResult,
    FloatArray,
    HistogramRequest,
    MeanRequest,
    MomentsRequest,
    MomentsResult,
    MovingRangeRequest,
    RangeRequest,
    Request,
    Result,
    TailRequest,
    Unfold,
)
from onnxcompress.calibration.unfold import Inputs, Rows, Source, axis_last, emit_rows
from onnxcompress.errors import ModelError
from onnxcompress.graph.emit import Emitter

Outputs: TypeAlias = Mapping[str, Array]


class Site(Inputs, Protocol):
    """The graph as a tap sees it."""

    emitter: Emitter

    def value(self, name: str) -> ir.Value:
        """The tensor of that name."""

    def rank(self, name: str) -> int:
        """Its number of axes."""

    def floating(self, name: str) -> ir.Value:
        """It as float32 or float64."""

    def countable(self, name: str) -> ir.Value:
        """It as floating point, int32 or int64, whichever loses nothing."""

    def output(self, value: ir.Value) -> str:
        """Make a value an output of the graph; its name."""

    def sample(self, name: str) -> tuple[int | None, ...] | None:
        """See :class:`onnxcompress.calibration.unfold.Source`."""


class Tap(Protocol):
    """A request at work."""

    @property
    def request(self) -> Request:
        """What is measured."""

    def update(self, outputs: Outputs, count: int) -> str | None:
        """Take the outputs of one run.

        Args:
            outputs: The graph's outputs by name.
            count: Samples of this run.

        Returns:
            The name of a tensor found to be NaN or infinite; None when all is well.

        Raises:
            ShapesDifferError: If a tensor does not have its declared shape.
        """

    def finish(self) -> Result | None:
        """The result; None if another pass over the data is needed for it to be exact."""


def make_tap(request: Request, site: Site) -> Tap:
    """Add a request's nodes to the graph.

    Raises:
        ModelError: If the tensor or the operator set does not allow the statistic.
    """
    if isinstance(request, RangeRequest):
        return RangeTap(request, site)
    if isinstance(request, MovingRangeRequest):
        return MovingRangeTap(request, site)
    if isinstance(request, TailRequest):
        return _TailTap(request, site)
    if isinstance(request, MeanRequest):
        return _MeanTap(request, site)
    if isinstance(request, HistogramRequest):
        return HistogramTap(request, site)
    return _MomentsTap(request, site)


class _TailTap:
    """Quantiles from the ends of every batch.

    A batch of ``n`` elements in a set of about ``n * scale`` can hold all of the
    ``ceil(fraction * n * scale) + 1`` elements that decide a quantile, so as many are taken from
    it. Where batches differ in size the estimate may fall short; then the data are read once more
    with twice as many.
    """

    def __init__(self, request: TailRequest, site: Site) -> None:
        self.request = request
        e, rank = site.emitter, site.rank(request.value)
        e.need(10, "exact quantiles")
        x = site.floating(request.value)
        self._watch = site.output(total_of(e, x, rank))
        flat = e.reshape(x, -1)
        size = e.op("Shape", flat)
        double = ir.DataType.DOUBLE
        sized = e.cast(size, double)
        share = site.feed(
            f"tail_share_{request.fraction}",
            lambda run: np.array([request.fraction * run.slack * run.total / run.count]),
            double,
        )
        wanted = e.op("Mul", sized, share)
        wanted = e.op("Add", wanted, e.constant(np.array([2.0])))
        keep = e.cast(e.op("Min", wanted, sized), ir.DataType.INT64)
        high = e.ops("TopK", (flat, keep), 2, {"axis": 0})[0]
        if e.opset >= 11:
            low = e.ops("TopK", (flat, keep), 2, {"axis": 0, "largest": 0})[0]
        else:
            low = e.op("Neg", e.ops("TopK", (e.op("Neg", flat), keep), 2, {"axis": 0})[0])
        self._low, self._high, self._size = site.output(low), site.output(high), site.output(size)
        self._sums = TailSums(request.fraction)
        self._slack = 1.0
        self._total = site.sample_count
        self._largest = 0.0

    def update(self, outputs: Outputs, count: int) -> str | None:
        if not np.isfinite(outputs[self._low]).all() or not np.isfinite(outputs[self._high]).all():
            return self.request.value
        if np.isnan(outputs[self._watch].astype(np.float64)):
            return self.request.value
        size = int(outputs[self._size][0])
        self._largest = max(self._largest, size * self._total / count)
        keep = math.floor(self.request.fraction * self._largest * self._slack) + 2
        self._sums.update(outputs[self._low], outputs[self._high], size, keep)
        return None

    def finish(self) -> Result | None:
        if self._sums.exact():
            return self._sums.finish()
        self._slack *= 2
        self._sums = TailSums(self.request.fraction)
        return None


class _MeanTap:
    """Mean and squares about it, per index of an axis."""

    def __init__(self, request: MeanRequest, site: Site) -> None:
        self.request = request
        e, rank = site.emitter, site.rank(request.value)
        check_axis(request.value, request.axis, rank)
        x = site.floating(request.value)
        self._shape = site.output(e.op("Shape", x))
        axes = [i for i in range(rank) if i != request.axis % rank]
        mean = e.reduce("ReduceMean", x, axes, keepdims=True) if axes else x
        error = e.op("Sub", x, mean)
        squares = e.reduce("ReduceSum", e.op("Mul", error, error), axes) if axes else error
        self._mean = site.output(e.reshape(mean, -1))
        self._squares = site.output(squares)
        self._sums = MeanSums()

    def update(self, outputs: Outputs, count: int) -> str | None:
        del count
        mean, squares, shape = (outputs[n] for n in (self._mean, self._squares, self._shape))
        if not np.isfinite(mean).all() or not np.isfinite(squares).all():
            return self.request.value
        count = size_of(shape) // int(shape[self.request.axis])
        self._sums.update(mean, squares, count)
        return None

    def finish(self) -> Result | None:
        return self._sums.finish()


class _Side:
    """Shift and sum of the rows ``x`` or the targets ``y``, as outputs."""

    def __init__(self, matrix: ir.Value, shift: ir.Value, groups: int, site: Site) -> None:
        e = site.emitter
        self.groups = groups
        self.matrix = matrix
        self._shift = site.output(shift)
        self._sum = site.output(e.reduce("ReduceSum", matrix, [0 if groups == 1 else 1]))

    def read(self, outputs: Outputs) -> tuple[FloatArray, FloatArray]:
        """Shift and sum of one batch, each [G, D]."""
        total = outputs[self._sum].astype(np.float64).reshape(self.groups, -1)
        shift = outputs[self._shift].astype(np.float64)
        return shift_columns(shift, *total.shape), total


class _MomentsTap:
    """Moments of unfolded rows, and with targets."""

    def __init__(self, request: MomentsRequest | CrossMomentsRequest, site: Site) -> None:
        self.request = request
        e = site.emitter
        unfold: Unfold = request.unfold
        self._groups = groups = unfold.groups if isinstance(unfold, ConvUnfold) else 1
        x = site.floating(request.value)
        self._sample = site.sample(request.value)
        source = Source(x, site.rank(request.value), self._sample)
        rows = emit_rows(e, source, unfold, request.max_rows, site)
        self._source_shape = site.output(e.op("Shape", x))
        self._per_sample = rows.per_sample
        perm = [1, 0] if groups == 1 else [0, 2, 1]
        across = e.op("Transpose", rows.matrix, perm=perm)
        self._x = _Side(rows.matrix, rows.shift, groups, site)
        self._products = site.output(e.op("MatMul", across, rows.matrix))
        self._shape = site.output(e.op("Shape", rows.matrix))
        self._own = CrossSums()
        self._cross: CrossSums | None = None
        if isinstance(request, CrossMomentsRequest):
            self._cross = CrossSums()
            matrix, shift = self._targets(request, rows, site)
            self._y = _Side(matrix, shift, groups, site)
            self._mixed = site.output(e.op("MatMul", across, matrix))

    def _targets(
        self, request: CrossMomentsRequest, rows: Rows, site: Site
    ) -> tuple[ir.Value, ir.Value]:
        """The targets ``y`` of the chosen rows, [k, O] or [G, k, O / G], and their shift."""
        e, rank = site.emitter, site.rank(request.target[0][0])
        check_axis(request.target[0][0], request.target_axis, rank)
        y = _signed_sum(request, site)
        y = axis_last(e, y, rank, request.target_axis % rank)
        self._targets_shape = site.output(e.op("Shape", y))
        self._total = None if rows.total is None else site.output(rows.total)
        if rows.chosen is not None:
            y = e.gather(y, rows.chosen)
        shift = e.reduce("ReduceMean", y, [0])
        y = e.op("Sub", y, shift)
        if self._groups > 1:
            y = e.op("Transpose", e.reshape(y, 0, self._groups, -1), perm=[1, 0, 2])
        return y, shift

    def update(self, outputs: Outputs, count: int) -> str | None:
        samples = count
        self._check_shape(outputs[self._source_shape], samples)
        count = int(outputs[self._shape][-2])
        shift, total = self._x.read(outputs)
        products = outputs[self._products]
        products = products.reshape(self._groups, *products.shape[-2:])
        # A NaN or infinite element of a row shows in the row's square.
        squares = np.diagonal(products, axis1=1, axis2=2)
        if not np.isfinite(squares).all() or not np.isfinite(shift).all():
            return self.request.value
        self._own.update_shifted(count, shift, total, shift, total, products)
        if self._cross is None or not isinstance(self.request, CrossMomentsRequest):
            return None
        there = samples * (self._per_sample or 0)
        if self._total is not None:
            there = int(outputs[self._total][0])
        targets = int(outputs[self._targets_shape][0])
        if there != targets:
            raise ModelError(
                f"'{self.request.value}' has {there} rows, its targets have {targets}",
                hint="Unfolded rows and targets must belong to the same output positions.",
            )
        shift_y, total_y = self._y.read(outputs)
        mixed = outputs[self._mixed]
        mixed = mixed.reshape(self._groups, *mixed.shape[-2:])
        if not np.isfinite(total_y).all() or not np.isfinite(shift_y).all():
            return self.request.target[0][0]
        self._cross.update_shifted(count, shift, total, shift_y, total_y, mixed)
        return None

    def _check_shape(self, shape: Array, samples: int) -> None:
        """Whether the lengths that were relied on are true."""
        if self._per_sample is None or self._sample is None:
            return
        declared = (samples, *self._sample)
        if any(d is not None and d != s for d, s in zip(declared, shape.tolist(), strict=True)):
            raise ShapesDifferError(self.request.value)

    def finish(self) -> Result | None:
        own = self._own
        order = weight_order(self.request.unfold, own.mean_x.shape[1])
        mean = own.mean_x[:, order]
        covariance = own.products[:, order][:, :, order]
        covariance /= own.count
        if self._cross is None:
            return MomentsResult(own.count, mean, covariance)
        cross = self._cross.products[:, order] / own.count
        return CrossMomentsResult(own.count, mean, self._cross.mean_y.ravel(), covariance, cross)


def _signed_sum(request: CrossMomentsRequest, site: Site) -> ir.Value:
    """``sum_i sign_i * target_i``."""
    e = site.emitter
    total: ir.Value | None = None
    for name, sign in request.target:
        term = site.floating(name)
        if total is not None and sign == -1:
            total = e.op("Sub", total, term)
            continue
        if sign != 1:
            dtype = np.float64 if term.dtype == ir.DataType.DOUBLE else np.float32
            term = e.op("Mul", term, e.constant(np.array(sign, dtype)))
        total = term if total is None else e.op("Add", total, term)
    assert total is not None  # noqa: S101 - requests have at least one target
    return total
