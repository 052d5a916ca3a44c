"""What each operator needs to run on integers: one line per operator in one table.

Four kinds of operators take part in quantization:

- *weighted*: a constant weight times data (Conv, Gemm, MatMul). They bring the speed and the size.
- *joining*: arithmetic between integer tensors (Add, Mul, Concat, pools). They cost a little and
  save the way to float and back between weighted operators.
- *moving*: values pass unchanged (Reshape, Transpose, MaxPool). Input and output share scale and
  zero point.
- *activations*: Relu and Clip, which the saturation of the output's integers performs for free.

Everything else stays float.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of, is_constant


class Kind(enum.Enum):
    """Part an operator plays."""

    WEIGHTED = "weighted"
    JOINING = "joining"
    MOVING = "moving"
    ACTIVATION = "activation"


@dataclass(frozen=True, slots=True)
class Rule:
    """How an operator is quantized.

    Attributes:
        kind: Its part.
        data: Places of the inputs that carry data; None means all.
        needs_output_scale: Whether the integer kernel writes integers only; if False it can write
            float.
        tied: Whether inputs and output must share one scale.
        on_integers: Whether the operator itself is written on integers, because onnxruntime does
            not take the Q/DQ pair around it away though it has an integer kernel.
        useful_alone: Whether it may be the last integer operator of its chain. A pool is not:
            computed in float it is as fast and its output keeps full precision.
    """

    kind: Kind
    data: tuple[int, ...] | None = (0,)
    needs_output_scale: bool = True
    tied: bool = False
    on_integers: bool = False
    useful_alone: bool = True


_MOVING = Rule(Kind.MOVING, tied=True)

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Conv": Rule(Kind.WEIGHTED),
        "ConvTranspose": Rule(Kind.WEIGHTED),
        "Gemm": Rule(Kind.WEIGHTED, needs_output_scale=False),
        "MatMul": Rule(Kind.WEIGHTED, needs_output_scale=False),
        "Add": Rule(Kind.JOINING, data=(0, 1)),
        "Mul": Rule(Kind.JOINING, data=(0, 1)),
        "Concat": Rule(Kind.JOINING, data=None),
        "LeakyRelu": Rule(Kind.JOINING),
        "AveragePool": Rule(Kind.JOINING, useful_alone=False),
        "GlobalAveragePool": Rule(Kind.JOINING, useful_alone=False),
        "Flatten": _MOVING,
        "Gather": _MOVING,
        "MaxPool": _MOVING,
        "Pad": Rule(Kind.MOVING, tied=True, on_integers=True),
        "Reshape": _MOVING,
        "Resize": _MOVING,
        "Slice": _MOVING,
        "Squeeze": _MOVING,
        "Transpose": _MOVING,
        "Unsqueeze": _MOVING,
        "Relu": Rule(Kind.ACTIVATION),
        "Clip": Rule(Kind.ACTIVATION),
    }
)

WEIGHT, BIAS = 1, 2
"""Places of the weight and the bias in the inputs of a weighted node (MatMul has no bias)."""


def rule_of(node: ir.Node) -> Rule | None:
    """The rule for ``node``, None if it stays float."""
    return RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None


def data_inputs(node: ir.Node) -> tuple[ir.Value, ...]:
    """The inputs of a node with a rule that carry computed data, constants left out."""
    rule = RULES[node.op_type]
    places = range(len(node.inputs)) if rule.data is None else rule.data
    found = (node.inputs[i] for i in places if i < len(node.inputs))
    return tuple(v for v in found if v is not None and not is_constant(v))


def attribute(node: ir.Node, name: str, default: float) -> float:
    """A number attribute of ``node``."""
    found = node.attributes.get(name)
    return default if found is None else float(found.value)


def weight_axis(node: ir.Node) -> int | None:
    """The axis of the weight that runs over the outputs of ``node``; None where it does not exist.

    A ConvTranspose with groups has none: its outputs run over the groups (in the axis of the
    inputs) and the outputs of one group.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if attribute(node, "group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1


def activation_bounds(node: ir.Node) -> tuple[float, float] | None:
    """What Relu or a Clip with constant bounds around 0 saturates to; None for any other node."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    bounds = [-np.inf, np.inf]
    for place in (1, 2):
        value = node.inputs[place] if place < len(node.inputs) else None
        if value is None:
            continue
        array = constant_of(value)
        if array is None or array.size != 1:
            return None
        bounds[place - 1] = float(array.reshape(()).astype(np.float64))
    low, high = bounds
    return (low, high) if low <= 0.0 <= high and low < high else None


def refusal(node: ir.Node) -> str | None:
    """Why a node with a rule cannot be quantized; None if nothing in the node forbids it."""
    rule = RULES[node.op_type]
    dtypes = {v.dtype for v in (*data_inputs(node), *node.outputs)}
    if dtypes - {ir.DataType.FLOAT}:
        names = ", ".join(sorted("unknown type" if d is None else d.name for d in dtypes))
        return f"its tensors are {names}; only FLOAT is quantized"
    if not data_inputs(node):
        return "it has no input computed at run time"
    if rule.kind is Kind.WEIGHTED:
        return _weighted_refusal(node)
    if rule.kind is Kind.JOINING:
        return _joining_refusal(node)
    return _moving_refusal(node)


def _weighted_refusal(node: ir.Node) -> str | None:
    weight = constant_of(node.inputs[WEIGHT] if len(node.inputs) > WEIGHT else None)
    if weight is None:
        if node.op_type == "MatMul":
            return "both factors are computed at run time"
        return "its weight is computed at run time"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}; only float32 is quantized"
    if not np.isfinite(weight).all():
        return "its weight holds NaN or infinity"
    if node.op_type in {"Gemm", "MatMul"} and weight.ndim != 2:
        return f"its weight has shape {list(weight.shape)}; only matrices are quantized"
    bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
    if bias is not None:
        array = constant_of(bias)
        if array is None:
            return "its bias is computed at run time"
        if array.dtype != np.float32 or not np.isfinite(array).all():
            return "its bias is not finite float32"
    if node.op_type == "Gemm":
        return _gemm_refusal(node, weight.shape)
    return None


def _gemm_refusal(node: ir.Node, shape: tuple[int, ...]) -> str | None:
    if attribute(node, "transA", 0):
        return "it transposes its data (transA)"
    if attribute(node, "alpha", 1) != 1 or attribute(node, "beta", 1) != 1:
        return "alpha or beta is not 1"
    bias = constant_of(node.inputs[BIAS]) if len(node.inputs) > BIAS else None
    axis = weight_axis(node)
    outputs = shape[axis] if axis is not None else 0
    if bias is not None and bias.size not in {1, outputs}:
        return f"its C has shape {list(bias.shape)}, which is no bias of {outputs} outputs"
    return None


def _joining_refusal(node: ir.Node) -> str | None:
    inputs = data_inputs(node)
    if node.op_type == "Concat" and len(inputs) != len(node.inputs):
        return "it joins a constant"
    if node.op_type in {"Add", "Mul"} and len(inputs) != 2:
        return "one of its inputs is constant"
    if node.op_type == "AveragePool" and attribute(node, "ceil_mode", 0):
        return "integer pooling does not round up (ceil_mode)"
    return None


def _moving_refusal(node: ir.Node) -> str | None:
    if len(node.outputs) > 1 and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "its second output is used"
    if node.op_type == "Resize":
        mode = node.attributes.get("mode")
        if mode is not None and mode.value != "nearest":
            return f"it interpolates (mode {mode.value})"
    if node.op_type == "Pad":
        mode = node.attributes.get("mode")
        if mode is not None and mode.value != "constant":
            return f"it pads with mode {mode.value}"
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            fill = constant_of(node.inputs[2])
            if fill is None or (fill != 0).any():
                return "it pads with something else than 0"
    return None
