"""The tap that counts a tensor's elements in bins.

ONNX has no operator that counts, so elements leave the graph, few enough of them: evenly spaced
ones where a tensor is large, from a start drawn for each run. They are counted at once and dropped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.accumulate import RangeSums
from onnxcompress.calibration.feeds import RunFeeds
from onnxcompress.calibration.range_tap import RangeTap
from onnxcompress.calibration.statistics import HistogramRequest, HistogramResult, RangeRequest
from onnxcompress.numerics.histogram import HistogramSums

if TYPE_CHECKING:
    from onnxcompress.calibration.arrays import Array
    from onnxcompress.calibration.taps import Outputs, Site

_FAR = np.iinfo(np.int64).max


class HistogramTap:
    """Evenly spaced elements of a tensor, counted outside of the graph."""

    def __init__(self, request: HistogramRequest, site: Site) -> None:
        self.request = request
        e = site.emitter
        flat = e.reshape(site.floating(request.value), -1)
        step = _step(site.sample(request.value), site.sample_count, request.max_elements)
        self._range: RangeTap | None = None
        if step > 1:
            e.need(10, "histograms of a part of the elements")

            def start(run: RunFeeds) -> Array:
                return np.array([int(run.uniform(1)[0] * step)], np.int64)

            first = site.feed(f"start_{step}", start, ir.DataType.INT64)
            flat = e.op("Slice", flat, first, e.ints(_FAR), e.ints(0), e.ints(step))
            self._range = RangeTap(RangeRequest(request.value), site)
        self._elements = site.output(flat)
        self._sums = HistogramSums(request.bins)
        self._extremes = RangeSums()

    def update(self, outputs: Outputs, count: int) -> str | None:
        """See :class:`onnxcompress.calibration.taps.Tap`."""
        elements: npt.NDArray[np.floating] = outputs[self._elements]  # type: ignore[assignment]
        try:
            self._sums.update(elements)
        except ValueError:
            return self.request.value
        if self._range is not None:
            return self._range.update(outputs, count)
        if elements.size:
            self._extremes.update(elements.min(), elements.max(), elements.size)
        return None

    def finish(self) -> HistogramResult:
        """See :class:`onnxcompress.calibration.taps.Tap`."""
        found = (self._extremes if self._range is None else self._range).finish()
        return HistogramResult(self._sums.finish(), float(found.minimum), float(found.maximum))


def _step(
    sample: tuple[int | None, ...] | None, sample_count: int, max_elements: int | None
) -> int:
    """Distance of the elements taken, an odd number; 1 where the lengths are unknown."""
    if sample is None or max_elements is None:
        return 1
    lengths = [length for length in sample if length is not None]
    if len(lengths) != len(sample):
        return 1
    return max(math.prod(lengths) * sample_count // max_elements, 1) | 1
