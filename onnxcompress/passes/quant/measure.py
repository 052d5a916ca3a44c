"""What quantization asks of the calibration data: ranges, clipping errors, covariances."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.geometry import unfold_of
from onnxcompress.calibration.statistics import (
    ConvUnfold,
    HistogramRequest,
    HistogramResult,
    MomentsRequest,
    MovingRangeRequest,
    RangeRequest,
    RangeResult,
    Request,
    TailRequest,
    Unfold,
)
from onnxcompress.context import PassContext
from onnxcompress.errors import ModelError
from onnxcompress.graph.constants import constant_of
from onnxcompress.numerics.affine import Affine, FloatArray, Grid
from onnxcompress.numerics.histogram import Histogram
from onnxcompress.passes.quant.operators import WEIGHT, data_inputs
from onnxcompress.passes.quant.options import QuantOptions, RangeMethod
from onnxcompress.passes.quant.parameters import Group, Range, group_candidates, range_affines

_MAX_COLUMNS = 4608
"""Layers with more columns than this (a 3x3 convolution of 512 channels) are rounded to nearest."""

_MAX_ELEMENTS = 1 << 21
"""Elements of a tensor that its histogram counts, evenly spaced over all samples."""

_BINNED = frozenset({RangeMethod.AUTO, RangeMethod.ENTROPY, RangeMethod.MSE, RangeMethod.NORM})
"""Ways to choose ranges that need histograms."""

_POWERS = {RangeMethod.MSE: 2.0, RangeMethod.NORM: 2.4}
"""What errors are raised to. Above 2, what is cut off weighs more: few values, but those that
decide in the layers behind. Measured beside 2 and 3 on image classifiers; Nahshan et al. 2021,
"Loss aware post-training quantization", search between such norms as well."""

_ROWS_PER_COLUMN = 8
_MIN_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run of the float model over the calibration data showed.

    Attributes:
        ranges: Least and greatest value by point, or the quantiles asked for.
        histograms: How often which values occur, by point; empty where ranges need none.
        covariances: Covariance of the unfolded data, [G, D, D], by weighted node.
        endless: Points that were NaN or infinite on a sample, as masks of attention are: they have
            no range.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    covariances: Mapping[str, FloatArray] = field(default_factory=dict)
    endless: frozenset[str] = frozenset()

    def joined(self, other: Measured) -> Measured:
        """Both together."""
        return Measured(
            {**self.ranges, **other.ranges},
            {**self.histograms, **other.histograms},
            {**self.covariances, **other.covariances},
            self.endless | other.endless,
        )

    def rescaled(self, moved: Collection[str], factors: Mapping[str, FloatArray]) -> Measured:
        """What follows from this for the model after a change of scales, without a run.

        Dividing the data of a product by factors f makes its covariance ``C' = F⁻¹ C F⁻¹``, F =
        diag(f). Ranges of what changed are left out.

        Args:
            moved: Points whose values changed.
            factors: Factors by which the data of a weighted node were divided, [D], by its name.
        """
        covariances = dict(self.covariances)
        for name, each in factors.items():
            if name in covariances:
                covariances[name] = covariances[name] / np.multiply.outer(each, each)
        return Measured(
            {point: r for point, r in self.ranges.items() if point not in moved},
            {point: h for point, h in self.histograms.items() if point not in moved},
            covariances,
        )


def measure(
    ctx: PassContext,
    model: ir.Model,
    points: Sequence[str],
    nodes: Mapping[str, ir.Node],
    options: QuantOptions,
) -> Measured:
    """Run the float model once and take everything that scales and rounding need.

    Args:
        ctx: The job.
        model: The float model.
        points: Values to measure.
        nodes: Weighted nodes whose data's covariance is wanted; those whose data cannot be unfolded
            (unknown padding, too many columns) are left out.
        options: How ranges are chosen.
    """
    extremes = {point: _extremes_of(point, options.ranges) for point in points}
    fraction = (1 - options.percentile / 100) / 2
    tails = {
        point: TailRequest(point, fraction)
        for point in points
        if options.ranges is RangeMethod.PERCENTILE
    }
    moments = _moment_requests(nodes)
    found = ctx.collect(
        model,
        [*extremes.values(), *tails.values(), *moments.values()],
        description="measuring activations",
        finite_only=True,
    )
    ranges: dict[str, Range] = {}
    histograms: dict[str, Histogram] = {}
    for point, request in extremes.items():
        if request not in found:
            continue
        result = found[request]
        if isinstance(result, HistogramResult):
            ranges[point] = (result.minimum, result.maximum)
            histograms[point] = result.histogram
        elif isinstance(result, RangeResult):
            ranges[point] = (float(result.minimum), float(result.maximum))
    for point, tail_request in tails.items():
        if tail_request not in found:
            continue
        tail = found[tail_request]
        ranges[point] = (min(tail.low, 0.0), max(tail.high, 0.0))
    known = {name: request for name, request in moments.items() if request in found}
    return Measured(
        ranges,
        histograms,
        {name: found[request].covariance for name, request in known.items()},
        frozenset(points) - frozenset(ranges),
    )


def _extremes_of(point: str, method: RangeMethod) -> Request:
    if method in _BINNED:
        return HistogramRequest(point, max_elements=_MAX_ELEMENTS)
    if method is RangeMethod.MOVING_AVERAGE:
        return MovingRangeRequest(point)
    return RangeRequest(point)


def choose_affines(
    measured: Measured, groups: Sequence[Group], grid: Grid, method: RangeMethod
) -> dict[str, Affine]:
    """The grid of every point: the whole range, or the one whose rounding and clipping costs least.

    The candidates of a group are judged on the histograms of all its sources; the least sum of mean
    errors to some power (mse, norm) or of divergences (entropy) wins.
    """
    power, entropy = _POWERS.get(method), method is RangeMethod.ENTROPY
    if power is None and not entropy:
        return range_affines(groups, grid)

    def cost(source: str, affine: Affine) -> float:
        seen = measured.histograms[source]
        return seen.divergence(affine) if power is None else seen.rounding_error(affine, power)

    chosen: dict[str, Affine] = {}
    for group in groups:
        candidates = group_candidates(group, grid, fine=entropy)
        errors = [sum(cost(source, a) for source in group.sources) for a in candidates]
        chosen |= dict.fromkeys(group.points, candidates[int(np.argmin(errors))])
    return chosen


def _moment_requests(nodes: Mapping[str, ir.Node]) -> dict[str, MomentsRequest]:
    requests: dict[str, MomentsRequest] = {}
    for name, node in nodes.items():
        unfold = _unfold(node)
        columns = 0 if unfold is None else _columns(node)
        if unfold is None or columns > _MAX_COLUMNS:
            continue
        rows = max(_ROWS_PER_COLUMN * columns, _MIN_ROWS)
        requests[name] = MomentsRequest(data_inputs(node)[0].name or "", unfold, max_rows=rows)
    return requests


def _columns(node: ir.Node) -> int:
    weight = constant_of(node.inputs[WEIGHT])
    if weight is None:
        return 0
    return int(np.prod(weight.shape[1:])) if node.op_type == "Conv" else max(weight.shape)


def _unfold(node: ir.Node) -> Unfold | None:
    """How the data of a weighted node meet its weight; None where rounding leaves it out."""
    if node.op_type == "ConvTranspose":
        return None
    try:
        unfold = unfold_of(node)
    except ModelError:  # automatic padding of a length that is not known
        return None
    crops = isinstance(unfold, ConvUnfold) and min(unfold.pads, default=0) < 0
    return None if crops else unfold
