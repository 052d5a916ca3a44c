"""The precisions a node can have, from the cheapest to the one that always keeps its output.

What a node is lifted to when 8-bit integers cost too much depends on what gains there:

- *int16*: 16-bit activations, 8-bit weights. The size of int8 and 256 times finer activations, for
  accelerators that compute so. onnxruntime has no such kernel for CPUs: the node computes in float
  between a DequantizeLinear and a QuantizeLinear, slower than float, with a weight that is made of
  its integers at load.
- *float16*: the weight is stored in half precision and computed with in float32, which a ``Cast``
  that onnxruntime performs at load costs nothing: half the size of float at its speed.
- *float*: as it was.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Set
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.numerics.affine import Affine, Grid
from onnxcompress.passes.fp16.halves import as_half
from onnxcompress.passes.quant.operators import WEIGHT, Kind, data_inputs
from onnxcompress.passes.quant.parameters import Layer, make_layer
from onnxcompress.passes.quant.placement import Network, Plan
from onnxcompress.targets import Target

_HALF_CONTRACTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class Precision(enum.Enum):
    """How a node computes."""

    INT8 = "int8"
    INT16 = "int16"
    FLOAT16 = "float16"
    FLOAT = "float"


AUTO = "auto"
"""The word for :func:`fallbacks_for` in place of names of precisions."""

FALLBACKS = (Precision.INT16, Precision.FLOAT16, Precision.FLOAT)


def fallbacks_for(target: Target, *, for_size: bool) -> tuple[Precision, ...]:
    """What to lift nodes to, the cheapest first.

    CPUs run float faster than 16-bit integers, so for speed it is float alone; for size 16-bit
    activations come first, which cost no byte. GPUs (TensorRT) have no 16-bit integers.

    Args:
        target: The hardware.
        for_size: Whether size counts rather than speed.
    """
    if target.name in {"cuda", "tensorrt"}:
        return (Precision.FLOAT16, Precision.FLOAT)
    if target.name in {"qnn", "mobile"}:
        return (Precision.INT16, Precision.FLOAT)
    return FALLBACKS if for_size else (Precision.FLOAT,)


def wide_points(network: Network, plan: Plan, nodes: Set[str]) -> frozenset[str]:
    """Points that become 16-bit when ``nodes`` do: what they read and write, and what is tied.

    A node between a 16-bit and an 8-bit point reads one and writes the other.
    """
    points = set(plan.points)
    touched = {
        value.name or ""
        for name in nodes
        if name in network.nodes
        for value in (*data_inputs(network.nodes[name]), network.result(network.nodes[name]))
    }
    leaders = {plan.ties.get(point, point) for point in touched & points}
    return frozenset(p for p in plan.points if plan.ties.get(p, p) in leaders)


def rescaled(
    node: ir.Node, layer: Layer, affine: Affine, grid: Grid, *, per_channel: bool
) -> Layer:
    """The layer for data on another grid: the same weights, unless the bias would overflow then.

    Args:
        node: The weighted node.
        layer: Its weights.
        affine: The grid of its data.
        grid: The grid of weights.
        per_channel: One weight scale per output channel.
    """
    moved = replace(layer, input_scale=affine.scale)
    try:
        moved.quantized_bias()
    except ValueError:
        return replace(make_layer(node, affine, grid, per_channel=per_channel), bias=layer.bias)
    return moved


def rescaled_layers(
    network: Network,
    layers: Mapping[str, Layer],
    affines: Mapping[str, Affine],
    grid: Grid,
    *,
    per_channel: bool,
) -> dict[str, Layer]:
    """Layers whose data are on the grids ``affines``."""
    made: dict[str, Layer] = {}
    for name, layer in layers.items():
        node = network.nodes[name]
        affine = affines[data_inputs(node)[0].name or ""]
        same = np.array_equal(affine.scale, layer.input_scale)
        made[name] = layer if same else rescaled(node, layer, affine, grid, per_channel=per_channel)
    return made


def store_half(model: ir.Model, nodes: Set[str]) -> None:
    """Store the weights of float nodes in float16, each with a Cast to float32, in place.

    Weights that do not fit float16, or that something else reads as well, stay float32.
    """
    namer = Namer(model)
    for node in list(model.graph):
        if node.name not in nodes or node.op_type not in _HALF_CONTRACTED:
            continue
        weight = node.inputs[WEIGHT] if len(node.inputs) > WEIGHT else None
        array = constant_of(weight)
        if weight is None or array is None or array.dtype != np.float32:
            continue
        if not weight.is_initializer() or weight.is_graph_output() or len(weight.uses()) > 1:
            continue
        half = as_half(array)
        if isinstance(half, str):
            continue
        stored = set_initializer(model.graph, namer.value(f"{weight.name}/quant_half"), half)
        real = ir.Value(
            name=namer.value(f"{weight.name}/quant_float"),
            shape=weight.shape,
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        cast = ir.node(
            "Cast",
            [stored],
            {"to": int(ir.DataType.FLOAT)},
            outputs=[real],
            name=namer.node(f"{weight.name}/quant_half_cast"),
        )
        model.graph.insert_before(node, cast)
        node.replace_input_with(WEIGHT, real)
        del model.graph.initializers[weight.name or ""]


def halvable(network: Network, name: str) -> bool:
    """Whether half precision makes the weight of a node smaller without harm."""
    node = network.nodes[name]
    if network.rule(name).kind is not Kind.WEIGHTED:
        return False
    array = constant_of(node.inputs[WEIGHT])
    return array is not None and not isinstance(as_half(array), str)
