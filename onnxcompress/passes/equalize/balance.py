"""Cross-layer equalization of a whole model, region by region until nothing moves.

A region (:mod:`onnxcompress.graph.scaling`) is a set of tensors that can only be scaled together:
the tensor between two layers, or a residual stream with all its branches. Per channel, the weights
that make it reach ``r1`` at most and those that read it ``r2``; the factors

    f_c = sqrt(r2_c / r1_c)

bring both to ``sqrt(r1_c r2_c)``. A layer between two regions belongs to both, so the regions are
taken in turns until no factor is far from 1.

Source: Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction",
section 4.1, here with any number of layers on either side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import is_constant
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.scaling import Region, apply_factors, find_region
from onnxcompress.graph.scaling.absorb import FloatArray, unit_maxima
from onnxcompress.numerics.equalization import cross_layer_factors
from onnxcompress.passes.base import Skip

_CHANNEL_AXIS = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}

_CONVERGED = 0.01
"""Largest logarithm of a factor at which a model counts as balanced."""


@dataclass(frozen=True, slots=True, eq=False)
class Balanced:
    """What equalization did to one region.

    Attributes:
        node: The first layer that makes its channels.
        op_type: Its operator.
        layers: Layers on both sides.
        channels: Factors of their own.
        spread: Largest over least factor.
    """

    node: str
    op_type: str
    layers: int
    channels: int
    spread: float


def regions_of(model: ir.Model) -> tuple[list[tuple[ir.Node, Region]], list[Skip]]:
    """The regions with layers on both sides, and why the outputs of other layers have none."""
    found: list[tuple[ir.Node, Region]] = []
    skips = []
    covered: set[ir.Value] = set()
    for node in model.graph:
        axis = _CHANNEL_AXIS.get(node.op_type)
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if axis is None or node.domain not in {"", "ai.onnx"} or not is_constant(weight):
            continue
        output = node.outputs[0]
        if output in covered:
            continue
        region = find_region(output, axis)
        if isinstance(region, str):
            skips.append(Skip(node.name or "", node.op_type, region))
        elif not any(a.contracts for a in region.sinks):
            skips.append(Skip(node.name or "", node.op_type, "no layer reads its channels"))
        else:
            covered.update(region.values)
            found.append((node, region))
    return found, skips


def _factors(region: Region) -> FloatArray:
    """The factors that bring both sides of every channel to the same range, [units]."""
    made = unit_maxima([a for a in region.sources if a.contracts], region.units)
    read = unit_maxima([a for a in region.sinks if a.contracts], region.units)
    return cross_layer_factors(made, read)


def largest_spread(model: ir.Model) -> float:
    """Largest over least factor that a tensor asks for; ``model`` is only read."""
    found = [_factors(region) for _, region in regions_of(model)[0]]
    return max((float(f.max() / f.min()) for f in found if f.size), default=1.0)


def equalize(model: ir.Model, rounds: int) -> tuple[list[Balanced], list[Skip], int]:
    """Equalize ``model`` in place; its outputs stay the same, to rounding.

    Args:
        model: A normalized model.
        rounds: At most so many turns through the regions.

    Returns:
        The regions that changed, why other layers were left, and the turns taken.
    """
    regions, skips = regions_of(model)
    namer = Namer(model)
    totals: list[FloatArray] = [np.ones(region.units) for _, region in regions]
    taken = 0
    for _ in range(rounds if regions else 0):
        taken += 1
        largest = 0.0
        for place, (_, region) in enumerate(regions):
            factors = _factors(region)
            largest = max(largest, float(np.abs(np.log(factors)).max(initial=0.0)))
            apply_factors(model, region, factors, namer, "equalize")
            totals[place] = totals[place] * factors
        if largest < _CONVERGED:
            break
    balanced = [
        Balanced(
            node.name or "",
            node.op_type,
            len({a.node for a in region.absorbs if a.contracts}),
            region.units,
            float(total.max() / total.min()),
        )
        for (node, region), total in zip(regions, totals, strict=True)
    ]
    return [b for b in balanced if b.spread > 1.0], skips, taken
