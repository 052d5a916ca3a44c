"""High-bias absorption: move what a channel always has from one layer's bias into the next one's.

Where the data before a Relu never fall below ``c > 0`` in a channel, Relu passes them on, so

    W2 Relu(z) + b2  =  W2 Relu(z - c) + (b2 + W2 c),      z = W1 x + b1

and ``b1 - c`` leaves a tensor that starts at 0 instead of ``c``: the same integers cover a range
that is shorter by ``c``. Large biases come from equalization, whose factors scale them as well.

Nagel et al. take ``c = max(0, β - 3γ)`` from the BatchNormalization that was there. Here it is what
the calibration samples show, by the stricter of two bounds:

    c = max(0, min(least z, mean z - 3 σ))

so these samples keep their outputs, to rounding; one that falls below changes by the difference.

Source: Nagel et al. 2019, "Data-free quantization through weight equalization and bias
correction", section 4.1.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import MeanRequest, RangeRequest
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.passes._affine import (
    Affine,
    Linear,
    RefusedError,
    bias_of,
    is_op,
    label,
    linear_of,
    scale_inputs,
)
from onnxcompress.passes.base import Skip

_BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})
_DEVIATIONS = 3.0

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A layer, the Relu behind it and the layers that read that, all able to take a shift.

    Attributes:
        source: The layer before the Relu.
        readers: The layers behind it.
    """

    source: Linear
    readers: tuple[Linear, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Absorbed:
    """What absorption did to one layer.

    Attributes:
        node: The layer.
        op_type: Its operator.
        channels: Channels with ``c > 0``.
        before: The greatest value behind its Relu.
        after: The same, after absorption.
    """

    node: str
    op_type: str
    channels: int
    before: float
    after: float


def pairs_of(model: ir.Model) -> tuple[list[Pair], list[Skip]]:
    """Where biases could be moved, and why not behind other layers with a Relu."""
    found, skips = [], []
    for node in model.graph:
        if not is_op(node, _BIASED):
            continue
        uses = node.outputs[0].uses()
        relus = [u.node for u in uses if is_op(u.node, {"Relu"})]
        if not relus:
            continue
        try:
            found.append(_pair(node, relus))
        except RefusedError as error:
            skips.append(Skip(node.name or "", node.op_type, f"its biases stay: {error}"))
    return found, skips


def _pair(node: ir.Node, relus: list[ir.Node]) -> Pair:
    between = node.outputs[0]
    if len(between.uses()) != 1 or between.is_graph_output():
        raise RefusedError("its output has other users than the Relu behind it")
    made = relus[0].outputs[0]
    if made.is_graph_output() or not made.uses():
        raise RefusedError("its Relu makes an output of the model")
    source = linear_of(node)
    bias_of(source)
    readers = []
    for user, place in made.uses():
        if place != 0 or not is_op(user, _BIASED) or user.graph is not node.graph:
            raise RefusedError(f"{label(user)} behind its Relu has no bias to take them")
        reader = linear_of(user)
        _moved(reader, np.ones(source.channels))
        readers.append(reader)
    return Pair(source, tuple(readers))


def _moved(reader: Linear, shift: Float64) -> Float64:
    """What the bias of ``reader`` becomes when ``shift`` [channels] leaves its data, [O]."""
    if reader.node.op_type == "ConvTranspose":
        raise RefusedError(f"{label(reader.node)} adds unequally many products at its borders")
    return bias_of(reader) + scale_inputs(reader, Affine(np.ones(shift.size), shift))[1]


def absorb(model: ir.Model, ctx: PassContext, pairs: list[Pair], namer: Namer) -> list[Absorbed]:
    """Absorb high biases in place, front to back.

    Args:
        model: The model.
        ctx: The job, with calibration samples.
        pairs: Where, from :func:`pairs_of` of the same model.
        namer: Makes names that are new to the model.

    Raises:
        DataError: If there are no calibration samples.
    """
    values = [pair.source.node.outputs[0].name or "" for pair in pairs]
    if not values:
        return []
    ranges = [RangeRequest(value, axis=1) for value in values]
    means = [MeanRequest(value, axis=1) for value in values]
    found = ctx.collect(model, [*ranges, *means], description="absorbing biases")
    absorbed = []
    for pair, wide, mean in zip(pairs, ranges, means, strict=True):
        extent, typical = found[wide], found[mean]
        floor = typical.mean - _DEVIATIONS * np.sqrt(typical.variance)
        shift = np.maximum(np.minimum(extent.minimum, floor), 0.0).astype(np.float64)
        if not np.any(shift):
            continue
        _set_bias(pair.source, bias_of(pair.source) - shift, namer)
        for reader in pair.readers:
            _set_bias(reader, _moved(reader, shift), namer)
        node = pair.source.node
        absorbed.append(
            Absorbed(
                node.name or "",
                node.op_type,
                int(np.count_nonzero(shift)),
                float(extent.maximum.max()),
                float((extent.maximum - shift).max()),
            )
        )
    return absorbed


def _set_bias(linear: Linear, bias: Float64, namer: Namer) -> None:
    node, weight = linear.node, constant_of(linear.weight)
    if weight is None or not isinstance(node.graph, ir.Graph):
        raise TypeError(f"{label(node)} has lost its weight")
    name = namer.value(f"{node.name}/equalize_bias")
    node.resize_inputs(3)
    old = node.inputs[2]
    new = set_initializer(node.graph, name, bias.astype(weight.dtype))
    node.replace_input_with(2, new)
    node.attributes.pop("beta", None)
    if old is not None and old.is_initializer() and not old.uses():
        del node.graph.initializers[old.name or ""]
