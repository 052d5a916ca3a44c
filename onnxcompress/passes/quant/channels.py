"""Let the channels of activations use the whole range that they share, in the float model.

A tensor has one step for all its channels, so a channel of a tenth of the range loses a tenth of
its values' precision to the widest. Dividing channels by factors costs nothing where the layers
before and behind take them up: between two layers, over Relu and pools, along a residual stream
with all its branches. Regions come from :mod:`onnxcompress.graph.scaling`, one rule per operator;
factors from the predicted noise (:mod:`onnxcompress.numerics.channel_equalization`). Data that only
matrix products read are left to smoothing (:mod:`onnxcompress.passes.quant.smoothing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.statistics import MeanRequest, MeanResult, RangeRequest, Statistics
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.scaling import Region, apply_factors
from onnxcompress.graph.scaling.absorb import Absorb
from onnxcompress.numerics.channel_equalization import Reader, Tensors, equalizing_factors
from onnxcompress.numerics.equalization import FloatArray
from onnxcompress.passes.base import Change
from onnxcompress.passes.equalize.balance import regions_of
from onnxcompress.passes.quant.operators import attribute
from onnxcompress.passes.quant.placement import Network, make_plan, source_points

_LEAST_GAIN_DB = 0.3
"""A region whose predicted noise falls by less is left alone."""

_MAX_NUMBERS = 1 << 18
"""Regions of more tensors times units are left alone: the search takes a turn for each tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How to equalize one region.

    Attributes:
        node: The first layer that makes its channels, which finds the region in a copy.
        factors: What to divide its tensors by, per unit.
        gain_db: By how much its predicted noise falls.
    """

    node: str
    factors: FloatArray
    gain_db: float


def choose_factors(
    ctx: PassContext, model: ir.Model, network: Network, allowed: frozenset[str]
) -> tuple[Choice, ...]:
    """Measure the channels of every region and find its factors.

    Args:
        ctx: The job, with the samples to look at.
        model: The float model; it is not changed.
        network: The same model as placement sees it.
        allowed: Nodes that may run on integers.
    """
    points = frozenset(source_points(network, make_plan(network, allowed)))
    regions = [
        (node.name or "", region, tensors)
        for node, region in regions_of(model)[0]
        if any(a.node.op_type.startswith("Conv") for a in _readers(region))
        and (tensors := _tensors(region, points))
        and len(tensors) * region.units <= _MAX_NUMBERS
    ]
    requests: list[RangeRequest | MeanRequest] = []
    for _, region, tensors in regions:
        requests += [RangeRequest(v.name or "", axis) for v, axis in tensors.items()]
        for absorb in _readers(region):
            requests += _requests_of(region, absorb)
    if not requests:
        return ()
    found = ctx.collect(model, list(dict.fromkeys(requests)), description="measuring channels")
    choices = []
    for name, region, tensors in regions:
        readers = _measured_readers(region, found)
        if not readers:
            continue
        best = equalizing_factors(
            _measured_tensors(region, tensors, readers, found), list(readers.values())
        )
        if best.gain_db >= _LEAST_GAIN_DB:
            choices.append(Choice(name, best.factors, best.gain_db))
    return tuple(choices)


@dataclass(frozen=True, slots=True)
class Equalized:
    """What :func:`equalize_channels` did.

    Attributes:
        changes: For the report.
        values: Names of the values whose channels share their range now.
    """

    changes: tuple[Change, ...] = ()
    values: frozenset[str] = frozenset()


def equalize_channels(model: ir.Model, choices: Sequence[Choice]) -> Equalized:
    """Carry out ``choices`` on the model they were made for, or an equal copy, in place."""
    namer = Namer(model)
    by_node = {choice.node: choice for choice in choices}
    changes: list[Change] = []
    values: set[str] = set()
    for node, region in regions_of(model)[0] if choices else []:
        choice = by_node.get(node.name or "")
        if choice is None:
            continue
        apply_factors(model, region, 1 / choice.factors, namer, "quant")
        spread = choice.factors.max() / choice.factors.min()
        how = f"the channels behind it share their range, by factors up to {spread:.3g} apart"
        changes.append(Change(choice.node, node.op_type, how))
        values |= {value.name or "" for value in region.values}
    return Equalized(tuple(changes), frozenset(values))


def _readers(region: Region) -> list[Absorb]:
    return [a for a in region.sinks if a.contracts]


def _axis(region: Region, value: ir.Value) -> int | None:
    """The only axis along which the factors of ``value`` differ."""
    ids = region.values.get(value)
    long = [] if ids is None else [axis for axis, n in enumerate(ids.shape) if n != 1]
    return long[0] if len(long) == 1 else None


def _tensors(region: Region, points: frozenset[str]) -> dict[ir.Value, int]:
    """The tensors of a region that become integers, with the axis of their channels."""
    axes = {v: _axis(region, v) for v in region.values if v.name in points}
    return {value: axis for value, axis in axes.items() if axis is not None}


def _requests_of(region: Region, absorb: Absorb) -> list[MeanRequest]:
    """What must be known of a layer: the power of its data and of its output."""
    data, output = absorb.node.inputs[0], absorb.node.outputs[0]
    axis = None if data is None else _axis(region, data)
    if data is None or axis is None or output.shape is None:
        return []
    along = 1 if absorb.node.op_type.startswith("Conv") else len(output.shape) - 1
    return [MeanRequest(data.name or "", axis), MeanRequest(output.name or "", along)]


def _measured_readers(region: Region, found: Statistics) -> dict[Absorb, Reader]:
    made = {}
    for absorb in _readers(region):
        requests = _requests_of(region, absorb)
        weight = constant_of(absorb.node.inputs[absorb.place])
        data = absorb.node.inputs[0]
        if not requests or weight is None or data is None:
            continue
        powers = [_power(found[request]) for request in requests]
        square = np.zeros(region.units)
        square[region.values[data].reshape(-1)] = powers[0]
        signal = float(powers[1].sum())
        if not np.isfinite(signal) or signal <= 0 or not np.isfinite(square).all():
            continue
        sizes, units = np.broadcast_arrays(np.abs(weight.astype(np.float64)), absorb.ids)
        if _rows_last(absorb.node):
            sizes, units = sizes.swapaxes(0, 1), units.swapaxes(0, 1)
        rows = sizes.shape[0]
        made[absorb] = Reader(sizes.reshape(rows, -1), units.reshape(rows, -1), square, signal)
    return made


def _rows_last(node: ir.Node) -> bool:
    """Whether the outputs of a weight are its second axis."""
    if node.op_type == "Gemm":
        return not attribute(node, "transB", 0)
    return node.op_type in {"ConvTranspose", "MatMul"}


def _power(result: MeanResult) -> FloatArray:
    return np.asarray(result.mean**2 + result.variance, np.float64)


def _measured_tensors(
    region: Region,
    tensors: Mapping[ir.Value, int],
    readers: Mapping[Absorb, Reader],
    found: Statistics,
) -> Tensors:
    low, high, gain = (np.zeros((len(tensors), region.units)) for _ in range(3))
    energies = {absorb: reader.energy(region.units) for absorb, reader in readers.items()}
    for row, (value, axis) in enumerate(tensors.items()):
        extremes = found[RangeRequest(value.name or "", axis)]
        units = region.values[value].reshape(-1)
        np.minimum.at(low[row], units, np.minimum(_finite(extremes.minimum), 0))
        np.maximum.at(high[row], units, np.maximum(_finite(extremes.maximum), 0))
        behind = _behind(region, value)
        for absorb, energy in energies.items():
            if absorb.node.inputs[0] in behind:
                gain[row, units] += energy[units]
    return Tensors(low, high, gain)


def _finite(values: object) -> FloatArray:
    return np.nan_to_num(np.asarray(values, np.float64), posinf=0.0, neginf=0.0)


def _behind(region: Region, value: ir.Value) -> set[ir.Value]:
    """The tensors of the region that follow from ``value``, with itself."""
    found, queue = {value}, [value]
    while queue:
        for reader, _ in queue.pop().uses():
            for output in reader.outputs:
                if output in region.values and output not in found:
                    found.add(output)
                    queue.append(output)
    return found
