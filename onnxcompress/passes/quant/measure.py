"""What quantization asks of the calibration data: ranges, clipping errors, covariances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.geometry import unfold_of
from onnxcompress.calibration.statistics import (
    ClipErrorRequest,
    ConvUnfold,
    MomentsRequest,
    RangeRequest,
    Request,
    TailRequest,
    Unfold,
)
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of
from onnxcompress.numerics.affine import Affine, FloatArray, Grid
from onnxcompress.passes.quant.operators import WEIGHT, data_inputs
from onnxcompress.passes.quant.options import RangeMethod
from onnxcompress.passes.quant.parameters import Group, Range, group_candidates, range_affines

_MAX_COLUMNS = 4608
"""Layers with more columns than this (a 3x3 convolution of 512 channels) are rounded to nearest."""

_FEW_SAMPLES = 32
"""Enough to see that a node fails. Scales chosen on so few cost 3 dB on an image classifier."""

_ROWS_PER_COLUMN = 16
_MIN_ROWS = 4096


def measure_ranges(
    ctx: PassContext, model: ir.Model, points: Sequence[str], percentile: float | None
) -> dict[str, Range]:
    """Least and greatest value by point, or the quantiles that leave ``percentile`` percent inside.

    Args:
        ctx: The job.
        model: The float model.
        points: Values to measure.
        percentile: Share inside the range; None takes the extremes.
    """
    requests: list[Request] = [RangeRequest(point) for point in points]
    fraction = None if percentile is None else (1 - percentile / 100) / 2
    if fraction is not None:
        requests += [TailRequest(point, fraction) for point in points]
    found = ctx.collect(model, requests, description="measuring ranges")
    ranges: dict[str, Range] = {}
    for point in points:
        extremes = found[RangeRequest(point)]
        ranges[point] = (float(extremes.minimum), float(extremes.maximum))
        if fraction is not None:
            tail = found[TailRequest(point, fraction)]
            ranges[point] = (min(tail.low, 0.0), max(tail.high, 0.0))
    return ranges


def choose_affines(
    ctx: PassContext, model: ir.Model, groups: Sequence[Group], grid: Grid, method: RangeMethod
) -> dict[str, Affine]:
    """The grid of every point: the whole range, or the one whose rounding and clipping costs least.

    The candidates of a group are measured on all its sources by rounding the real activations in
    the graph; the least sum of mean squared errors, each relative to the energy of its source,
    wins.
    """
    if method is not RangeMethod.MSE:
        return range_affines(groups, grid)
    candidates = {group.points[0]: group_candidates(group, grid) for group in groups}
    requests = {
        (group.points[0], source): _clip_request(source, candidates[group.points[0]])
        for group in groups
        for source in group.sources
    }
    found = ctx.collect(model, requests.values(), description="choosing scales")
    chosen: dict[str, Affine] = {}
    for group in groups:
        errors = np.sum(
            [found[requests[group.points[0], source]].mse for source in group.sources], axis=0
        )
        best = candidates[group.points[0]][int(np.argmin(errors))]
        chosen |= dict.fromkeys(group.points, best)
    return chosen


def few_samples(ctx: PassContext) -> PassContext:
    """The job with fewer samples, to find nodes that fail; scales and biases need them all."""
    return ctx if ctx.calibration is None else replace(ctx, calibration=_first(ctx.calibration))


def _first(samples: Dataset) -> Dataset:
    return samples.take(min(samples.sample_count, _FEW_SAMPLES))


def _clip_request(value: str, candidates: Iterable[Affine]) -> ClipErrorRequest:
    made = tuple(candidates)
    return ClipErrorRequest(
        value,
        scales=tuple(float(a.scale) for a in made),
        zero_points=tuple(int(a.zero_point) for a in made),
        dtype=made[0].grid.dtype,
    )


def covariances(
    ctx: PassContext, model: ir.Model, nodes: Mapping[str, ir.Node]
) -> dict[str, FloatArray]:
    """Covariance of the unfolded data of weighted nodes, [G, D, D] by node name, from one run.

    Nodes whose data cannot be unfolded (automatic padding, ConvTranspose, too many columns) are
    left out.
    """
    requests: dict[str, MomentsRequest] = {}
    for name, node in nodes.items():
        unfold = _unfold(node)
        columns = 0 if unfold is None else _columns(node)
        if unfold is None or columns > _MAX_COLUMNS:
            continue
        rows = max(_ROWS_PER_COLUMN * columns, _MIN_ROWS)
        requests[name] = MomentsRequest(data_inputs(node)[0].name or "", unfold, max_rows=rows)
    if not requests:
        return {}
    found = ctx.collect(model, requests.values(), description="measuring covariances")
    return {name: found[request].covariance for name, request in requests.items()}


def _columns(node: ir.Node) -> int:
    weight = constant_of(node.inputs[WEIGHT])
    if weight is None:
        return 0
    return int(np.prod(weight.shape[1:])) if node.op_type == "Conv" else max(weight.shape)


def _unfold(node: ir.Node) -> Unfold | None:
    """How the data of a weighted node meet its weight; None where rounding leaves it out."""
    automatic = node.attributes.get_string("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}
    if node.op_type == "ConvTranspose" or automatic:
        return None
    unfold = unfold_of(node)
    crops = isinstance(unfold, ConvUnfold) and min(unfold.pads, default=0) < 0
    return None if crops else unfold
