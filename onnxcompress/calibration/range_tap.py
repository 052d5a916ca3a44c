"""The tap that finds the least and the greatest element, and what taps share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.accumulate import MovingExtremes, RangeSums
from onnxcompress.calibration.arrays import Array
from onnxcompress.calibration.statistics import MovingRangeRequest, RangeRequest, RangeResult
from onnxcompress.errors import ModelError
from onnxcompress.graph.emit import Emitter

if TYPE_CHECKING:
    from onnxcompress.calibration.taps import Outputs, Site


def rows_of_elements(e: Emitter, x: ir.Value, rank: int) -> ir.Value:
    """View all elements as a matrix whose rows onnxruntime reduces in parallel."""
    if rank == 0:
        return e.reshape(x, 1, 1)
    return e.op("Flatten", x, axis=min(rank - 1, 2))


def total_of(e: Emitter, x: ir.Value, rank: int) -> ir.Value:
    """The sum of all elements as float64; NaN if and only if an element is (or inf - inf)."""
    parts = e.reduce("ReduceSum", rows_of_elements(e, x, rank), [1])
    return e.reduce("ReduceSum", e.cast(parts, ir.DataType.DOUBLE), None)


class RangeTap:
    """Least and greatest element.

    onnxruntime's ReduceMin and ReduceMax pass over NaN, so a sum watches for it. The sum may
    overflow where the extremes do not; only NaN counts.
    """

    def __init__(self, request: RangeRequest, site: Site) -> None:
        self.request = request
        e, rank = site.emitter, site.rank(request.value)
        x = site.countable(request.value)
        self._shape = site.output(e.op("Shape", x))
        axes: list[int] | None = None
        if request.axis is not None:
            check_axis(request.value, request.axis, rank)
            axes = [i for i in range(rank) if i != request.axis % rank]
        floating = x.dtype in {ir.DataType.FLOAT, ir.DataType.DOUBLE}
        self._watch = site.output(total_of(e, x, rank)) if floating else None
        if axes is None and floating:
            rows = rows_of_elements(e, x, rank)
            low = e.reduce("ReduceMin", e.reduce("ReduceMin", rows, [1]), None)
            high = e.reduce("ReduceMax", e.reduce("ReduceMax", rows, [1]), None)
        elif axes == []:
            low = high = x
        else:
            low, high = (e.reduce(op, x, axes) for op in ("ReduceMin", "ReduceMax"))
        self._low, self._high = site.output(low), site.output(high)
        self._sums = RangeSums()

    def update(self, outputs: Outputs, count: int) -> str | None:
        """See :class:`onnxcompress.calibration.taps.Tap`."""
        del count
        shape = outputs[self._shape]
        count = size_of(shape)
        if self.request.axis is not None:
            count //= int(shape[self.request.axis])
        low, high = outputs[self._low], outputs[self._high]
        if self._watch is not None and (
            np.isnan(outputs[self._watch].astype(np.float64))
            or not np.isfinite(low.astype(np.float64)).all()
            or not np.isfinite(high.astype(np.float64)).all()
        ):
            return self.request.value
        self._sums.update(low, high, count)
        return None

    def finish(self) -> RangeResult:
        """See :class:`onnxcompress.calibration.taps.Tap`."""
        return self._sums.finish()


class MovingRangeTap:
    """Extremes of each sample, averaged outside of the graph."""

    def __init__(self, request: MovingRangeRequest, site: Site) -> None:
        self.request = request
        e, rank = site.emitter, site.rank(request.value)
        x = site.floating(request.value)
        self._shape = site.output(e.op("Shape", x))
        self._watch = site.output(total_of(e, x, rank))
        counts_samples = rank > 1 and site.sample(request.value) is not None
        rows = e.op("Flatten", x, axis=1) if counts_samples else e.reshape(x, 1, -1)
        self._low = site.output(e.reduce("ReduceMin", rows, [1]))
        self._high = site.output(e.reduce("ReduceMax", rows, [1]))
        self._sums = MovingExtremes(request.memory)

    def update(self, outputs: Outputs, count: int) -> str | None:
        """See :class:`onnxcompress.calibration.taps.Tap`."""
        del count
        low, high = outputs[self._low], outputs[self._high]
        if np.isnan(outputs[self._watch].astype(np.float64)):
            return self.request.value
        if not np.isfinite(low).all() or not np.isfinite(high).all():
            return self.request.value
        self._sums.update(low, high, size_of(outputs[self._shape]))
        return None

    def finish(self) -> RangeResult:
        """See :class:`onnxcompress.calibration.taps.Tap`."""
        return self._sums.finish()


def check_axis(value: str, axis: int, rank: int) -> None:
    """Raise :class:`ModelError` if a tensor of ``rank`` axes has no axis ``axis``."""
    if not -rank <= axis < rank:
        raise ModelError(f"tensor '{value}' has {rank} axes, no axis {axis}")


def size_of(shape: Array) -> int:
    """Elements of a tensor, from what Shape gave."""
    return math.prod(shape.astype(np.int64).tolist())
