"""Scales and integer weights of a plan, from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.numerics.affine import (
    Affine,
    FloatArray,
    Grid,
    IntArray,
    QuantizedBias,
    affine_from_range,
    clip_candidates,
    quantize,
    quantize_bias,
    weight_affine,
)
from onnxcompress.numerics.descent import descend
from onnxcompress.numerics.rounding import round_with_feedback
from onnxcompress.passes.quant.operators import (
    BIAS,
    WEIGHT,
    activation_bounds,
    attribute,
    weight_axis,
)
from onnxcompress.passes.quant.placement import Network, Plan, source_points

Range = tuple[float, float]

_JOIN_RATIO = 4.0
"""Points around a Concat share a scale unless that makes the steps of one this much coarser."""


@dataclass(frozen=True, slots=True)
class Group:
    """Points that share one scale.

    Attributes:
        points: All of them, in graph order.
        sources: Those to measure.
        range: Least and greatest value of the sources.
    """

    points: tuple[str, ...]
    sources: tuple[str, ...]
    range: Range


def make_groups(network: Network, plan: Plan, ranges: Mapping[str, Range]) -> tuple[Group, ...]:
    """Gather the points of a plan into groups of one scale.

    The points around a Concat are joined where no folded activation forbids it (a Relu is performed
    by a zero point at the bottom, which values below 0 from another branch would move) and no point
    gets steps that are much coarser than its own: then the Concat is a copy.

    Args:
        network: The float model.
        plan: The placement.
        ranges: Least and greatest value by point; all of :func:`source_points` are needed.
    """
    measured = source_points(network, plan)
    leaders = dict(plan.ties)
    for joint in plan.joints:
        roots = {leaders[point] for point in joint}
        members = [p for p in measured if leaders[p] in roots]
        if _joinable(network, plan, members, ranges):
            first = leaders[joint[0]]
            leaders = {p: first if root in roots else root for p, root in leaders.items()}
    made: dict[str, list[str]] = {}
    for point in plan.points:
        made.setdefault(leaders[point], []).append(point)
    return tuple(
        Group(tuple(points), sources, _union([ranges[p] for p in sources]))
        for points in made.values()
        for sources in [tuple(p for p in points if p in set(measured))]
    )


def _union(ranges: Sequence[Range]) -> Range:
    return min((0.0, *(low for low, _ in ranges))), max((0.0, *(high for _, high in ranges)))


def _joinable(
    network: Network, plan: Plan, members: Sequence[str], ranges: Mapping[str, Range]
) -> bool:
    low, high = _union([ranges[p] for p in members])
    for point in members:
        own_low, own_high = _union([ranges[point]])
        if high - low > _JOIN_RATIO * (own_high - own_low):
            return False
    for name in plan.folded:
        activation = network.nodes[name]
        if activation.outputs[0].name in members:
            bounds = activation_bounds(activation)
            if bounds is not None and (low < bounds[0] or high > bounds[1]):
                return False
    return True


def range_affines(groups: Sequence[Group], grid: Grid) -> dict[str, Affine]:
    """The grid of every point, from the least to the greatest value of its group."""
    return {
        point: made
        for group in groups
        for made in [affine_from_range(*group.range, grid)]
        for point in group.points
    }


def group_candidates(group: Group, grid: Grid, *, fine: bool = False) -> tuple[Affine, ...]:
    """Grids to choose from for one group, the widest first.

    Args:
        group: The points.
        grid: The integers.
        fine: Many candidates, for a criterion without a smooth minimum.
    """
    if fine:
        return clip_candidates(*group.range, grid, count=64, ratio=0.965)
    return clip_candidates(*group.range, grid, count=20, ratio=0.92)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The integer weight of one node.

    Attributes:
        integers: In the shape of the float weight.
        affine: Its grid, per output channel or for the whole weight.
        axis: Axis of the channels; None for one scale.
        input_scale: Scale of the data, rank 0.
        bias: Float bias [O]; None for no bias.
        feedback: Whether the rounding used error feedback.
    """

    integers: IntArray
    affine: Affine
    axis: int | None
    input_scale: npt.NDArray[np.float32]
    bias: FloatArray | None
    feedback: bool

    def quantized_bias(self) -> QuantizedBias | None:
        """The bias in the unit of the integer products."""
        if self.bias is None:
            return None
        return quantize_bias(self.bias, self.input_scale, self.affine.scale)

    def shifted(self, correction: FloatArray) -> Layer:
        """The layer with ``correction`` [O] added to its bias."""
        bias = correction if self.bias is None else self.bias + correction
        return replace(self, bias=bias)


def bias_of(node: ir.Node, outputs: int) -> FloatArray | None:
    """The bias of a weighted node as [O]; None when it has none."""
    if node.op_type == "MatMul" or len(node.inputs) <= BIAS or node.inputs[BIAS] is None:
        return None
    array = constant_of(node.inputs[BIAS])
    return (
        None if array is None else np.broadcast_to(array.astype(np.float64).reshape(-1), (outputs,))
    )


def output_count(node: ir.Node) -> int:
    """Number of outputs ``O`` of a weighted node."""
    weight = constant_of(node.inputs[WEIGHT])
    if weight is None:
        raise ValueError(f"{node.op_type} '{node.name}' has no constant weight")
    if node.op_type == "ConvTranspose":
        return int(weight.shape[1] * attribute(node, "group", 1))
    return int(weight.shape[weight_axis(node) or 0])


def make_layer(
    node: ir.Node,
    input_affine: Affine,
    grid: Grid,
    *,
    per_channel: bool,
    covariance: FloatArray | None = None,
    before: Layer | None = None,
    adaptive: bool = False,
) -> Layer:
    """Quantize the weight of one node.

    Args:
        node: A weighted node.
        input_affine: Grid of its data.
        grid: Grid of weights.
        per_channel: One scale per output channel, where the operator has such an axis.
        covariance: Covariance of the unfolded data, [G, D, D]: round with error feedback against
            it. Nearest rounding when None.
        before: What error feedback gave for this node earlier; taken over if the scale is the same.
        adaptive: Go on from error feedback by coordinate descent.
    """
    weight = np.asarray(constant_of(node.inputs[WEIGHT]), np.float64)
    outputs = output_count(node)
    bias = bias_of(node, outputs)
    axis = weight_axis(node) if per_channel else None
    if axis is None:
        top = np.abs(weight).max(initial=0.0)
    else:
        top = np.abs(weight).max(
            axis=tuple(i for i in range(weight.ndim) if i != axis), initial=0.0
        )
    affine = weight_affine(top, grid, input_scale=float(input_affine.scale), bias=bias)
    integers: IntArray
    matrix_axis = weight_axis(node)
    if covariance is None or matrix_axis is None or node.op_type == "ConvTranspose":
        integers, feedback = quantize(weight, affine, axis), False
    elif before is not None and np.array_equal(before.affine.scale, affine.scale):
        integers, feedback = before.integers, True
    else:
        matrix = weight.T if matrix_axis == 1 else weight.reshape(outputs, -1)
        scale = np.broadcast_to(affine.scale.astype(np.float64), (outputs,))
        found = round_with_feedback(matrix, scale, grid, covariance)
        if adaptive:
            found = descend(matrix, scale, grid, covariance, found)
        rounded = found.astype(grid.dtype)
        integers, feedback = (
            (rounded.T if matrix_axis == 1 else rounded.reshape(weight.shape)),
            True,
        )
    return Layer(integers, affine, axis, input_affine.scale, bias, feedback)
