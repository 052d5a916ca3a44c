"""Which inputs and outputs of an operator can be float16."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

_NO_CUDA_KERNEL = frozenset(
    {
        "CumSum",
        "Multinomial",
        "NonMaxSuppression",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Range",
        "RoiAlign",
        "STFT",
        "TopK",
        "Upsample",
    }
)
"""Operators that onnxruntime's CUDA provider computes in float32 only, or not at all."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Numbers of the inputs and outputs whose type follows one of the operator's type variables."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def slots_of(node: ir.Node, opset: int) -> Slots | str:
    """Which inputs and outputs can be float16, or why none can."""
    if node.domain != "":
        return f"operators of the domain {node.domain} stay in float32"
    if has_subgraph(node):
        return "control flow and what is inside stays in float32"
    if "QuantizeLinear" in node.op_type or node.op_type.startswith(("QLinear", "Dequantize")):
        return "it belongs to an already quantized part"
    if node.op_type in _NO_CUDA_KERNEL:
        return f"onnxruntime has no float16 kernel of {node.op_type}"
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return f"opset {opset} has no operator {node.op_type}"
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def follows(parameters: list[onnx.defs.OpSchema.FormalParameter], index: int) -> bool:
        last = parameters[min(index, len(parameters) - 1)]
        return "tensor(float16)" in allowed.get(last.type_str, ())

    inputs = frozenset(
        i
        for i, v in enumerate(node.inputs)
        if v is not None and v.dtype in (FLOAT, HALF) and follows(list(schema.inputs), i)
    )
    outputs = frozenset(
        i
        for i, v in enumerate(node.outputs)
        if v.dtype == FLOAT and follows(list(schema.outputs), i)
    )
    if not inputs:
        return f"{node.op_type} of opset {opset} takes no float16"
    return Slots(inputs, outputs)


def has_subgraph(node: ir.Node) -> bool:
    """Whether ``node`` is control flow."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(a.type in kinds for a in node.attributes.values())
