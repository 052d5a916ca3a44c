"""onnxruntime's own operators as the standard ones whose output shapes inference knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.graph.constants import stored_tensor
from onnxcompress.graph.cost.common import MICROSOFT, Shape, elements_per_code, flag


@dataclass(frozen=True, slots=True)
class _Form:
    """The standard operator of the same output shape.

    Attributes:
        op_type: Its name.
        inputs: Which inputs of the original it takes, in its own order.
        attributes: Which attributes of the original it takes.
    """

    op_type: str
    inputs: tuple[int, ...]
    attributes: frozenset[str] = frozenset()


_SPATIAL = frozenset({"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"})
_POOL = frozenset({"auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides"})
_GEMM = frozenset({"transA", "transB"})

_FORMS: Mapping[str, _Form] = {
    "BiasAdd": _Form("Identity", (0,)),
    "BiasGelu": _Form("Identity", (0,)),
    "BiasSoftmax": _Form("Identity", (0,)),
    "DynamicQuantizeMatMul": _Form("MatMul", (0, 1)),
    "FastGelu": _Form("Identity", (0,)),
    "FusedConv": _Form("Conv", (0, 1), _SPATIAL),
    "FusedGemm": _Form("Gemm", (0, 1), _GEMM),
    "Gelu": _Form("Identity", (0,)),
    "MatMulIntegerToFloat": _Form("MatMul", (0, 1)),
    "QGemm": _Form("Gemm", (0, 3), _GEMM),
    "QLinearAdd": _Form("Add", (0, 3)),
    "QLinearAveragePool": _Form("AveragePool", (0,), _POOL),
    "QLinearGlobalAveragePool": _Form("GlobalAveragePool", (0,)),
    "QLinearLeakyRelu": _Form("Identity", (0,)),
    "QLinearMul": _Form("Mul", (0, 3)),
    "QLinearSigmoid": _Form("Identity", (0,)),
    "QLinearSoftmax": _Form("Identity", (0,)),
    "QuickGelu": _Form("Identity", (0,)),
    "RotaryEmbedding": _Form("Identity", (0,)),
    "SimplifiedLayerNormalization": _Form("Identity", (0,)),
    "SkipLayerNormalization": _Form("Identity", (0,)),
    "SkipSimplifiedLayerNormalization": _Form("Identity", (0,)),
}
"""Operators whose first output has the shape that the standard operator's has."""


def use_standard_forms(probe: ir.Model) -> None:
    """Write onnxruntime's operators as standard ones of the same output shapes, in place.

    Packed weights become graph inputs of the unpacked shape. Further outputs keep no shape.
    """
    for node in list(probe.graph.all_nodes()):
        if node.domain != MICROSOFT:
            continue
        if node.op_type in _FORMS:
            _rewrite(node, _FORMS[node.op_type])
        elif node.op_type in {"MatMulNBits", "GatherBlockQuantized"}:
            _unpack_blocks(probe, node)
        elif node.op_type == "DynamicQuantizeLSTM":
            _unpack_lstm(probe, node)


def _rewrite(node: ir.Node, form: _Form) -> None:
    inputs = [node.inputs[i] if i < len(node.inputs) else None for i in form.inputs]
    if any(value is None for value in inputs) or flag(node, "channels_last"):
        return
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)
    node.resize_inputs(len(inputs))
    if len(node.outputs) > 1 and not any(value.uses() for value in node.outputs[1:]):
        node.resize_outputs(1)
    for name in [name for name in node.attributes if name not in form.attributes]:
        node.attributes.pop(name)
    node.op_type, node.domain = form.op_type, ""


def _unpack_blocks(probe: ir.Model, node: ir.Node) -> None:
    if node.op_type == "MatMulNBits":
        place, standard = 1, "MatMul"
        shape: Shape = (flag(node, "K"), flag(node, "N"))
        attributes = []
    else:
        packed = stored_tensor(node.inputs[0]) if node.inputs[0] is not None else None
        if packed is None:
            return
        *rows, columns = packed.shape.numpy()
        place, standard = 0, "Gather"
        shape = (*rows, columns * elements_per_code(node, packed))
        attributes = [ir.AttrInt64("axis", flag(node, "gather_axis"))]
    node.replace_input_with(place, _weight(probe, node, "weight", shape))
    node.resize_inputs(2)
    node.op_type, node.domain = standard, ""
    node.attributes.clear()
    for attribute in attributes:
        node.attributes.add(attribute)


def _unpack_lstm(probe: ir.Model, node: ir.Node) -> None:
    """W [D, I, 4H] and R [D, H, 4H] of integers as those of LSTM, [D, 4H, I] and [D, 4H, H]."""
    for place, role in ((1, "weight"), (2, "recurrent")):
        value = node.inputs[place]
        packed = None if value is None else stored_tensor(value)
        if packed is None:
            return
        directions, rows, columns = packed.shape.numpy()
        node.replace_input_with(place, _weight(probe, node, role, (directions, columns, rows)))
    node.resize_inputs(min(len(node.inputs), 8))
    node.op_type, node.domain = "LSTM", ""


def _weight(probe: ir.Model, node: ir.Node, role: str, shape: Shape) -> ir.Value:
    """A new graph input that stands for an unpacked weight."""
    value = ir.Value(
        name=f"{node.name}/cost_{role}",
        shape=ir.Shape(shape),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    probe.graph.inputs.append(value)
    return value
