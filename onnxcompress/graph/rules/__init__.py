"""One rule per operator: which positions of its tensors are the same channel.

Every operator of the default domain is in :data:`RULES` or, with the reason, in
:data:`~onnxcompress.graph.rules.frozen.FROZEN`; ``If`` is walked into by the engine. Those of
onnxruntime that files commonly hold are in :data:`CONTRIB` or in
:data:`~onnxcompress.graph.rules.frozen.FROZEN_ELSEWHERE`. Anything else is unknown, and unknown
means frozen.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxcompress.graph.rules import (
    attention,
    contraction,
    elementwise,
    fused,
    movement,
    normalization,
    quantized,
    recurrent,
    reduction,
    reshaping,
    sizes,
)
from onnxcompress.graph.rules.base import Rule, Shrink, Trace
from onnxcompress.graph.rules.frozen import FROZEN, FROZEN_ELSEWHERE

__all__ = [
    "ADDED", "CONTRIB", "FROZEN", "FROZEN_ELSEWHERE", "RULES", "Rule", "Shrink", "Trace",
    "frozen_reason", "rule_of",
]  # fmt: skip

RULES: Mapping[str, Rule] = {
    # Every position alike, with broadcasting.
    **dict.fromkeys(
        (
            "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal",
            "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul",
            "Or", "Pow", "Sub", "Sum", "SwiGLU", "Where", "Xor",
        ),
        elementwise.ELEMENTWISE,
    ),
    # Every position alike, further inputs are parameters of all positions.
    **dict.fromkeys(
        (
            "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast",
            "CastLike", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp",
            "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu",
            "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink",
            "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan",
            "Tanh", "ThresholdedRelu",
        ),
        elementwise.FIRST_INPUT,
    ),
    "PRelu": elementwise.PRELU,
    # Contractions.
    "CausalConvWithState": fused.CAUSAL_CONV,
    "Conv": contraction.CONV,
    "ConvTranspose": contraction.CONV_TRANSPOSE,
    "DeformConv": fused.DEFORMED_CONV,
    "Einsum": contraction.EINSUM,
    "Gemm": contraction.GEMM,
    "MatMul": contraction.MATMUL,
    # Data movement.
    "Concat": movement.CONCAT,
    "ConstantOfShape": sizes.CONSTANT_OF_SHAPE,
    "DepthToSpace": sizes.DEPTH_TO_SPACE,
    "Expand": sizes.EXPAND,
    "Flatten": reshaping.FLATTEN,
    "Gather": movement.GATHER,
    "Pad": sizes.PAD,
    "Reshape": reshaping.RESHAPE,
    "Resize": sizes.RESIZE,
    "Shape": sizes.SHAPE,
    "Slice": movement.SLICE,
    "SpaceToDepth": sizes.SPACE_TO_DEPTH,
    "Split": movement.SPLIT,
    "Squeeze": movement.SQUEEZE,
    "Tile": sizes.TILE,
    "Transpose": movement.TRANSPOSE,
    "Unsqueeze": movement.UNSQUEEZE,
    "Upsample": sizes.RESIZE,
    # Normalization, pooling and other operators that mix some axes and pass the others.
    "ArgMax": normalization.ARG_REDUCE,
    "ArgMin": normalization.ARG_REDUCE,
    "AveragePool": normalization.CHANNELS_PASS,
    "BatchNormalization": normalization.BATCH_NORM,
    "CumProd": normalization.OVER_AXIS,
    "CumSum": normalization.OVER_AXIS,
    "GlobalAveragePool": normalization.CHANNELS_PASS,
    "GlobalLpPool": normalization.CHANNELS_PASS,
    "GlobalMaxPool": normalization.CHANNELS_PASS,
    "GridSample": normalization.SAMPLED,
    "GroupNormalization": normalization.GROUP_NORM,
    "Hardmax": normalization.OVER_AXIS,
    "InstanceNormalization": normalization.INSTANCE_NORM,
    "LRN": normalization.LRN,
    "LayerNormalization": normalization.TRAILING_NORM,
    "LogSoftmax": normalization.OVER_AXIS,
    "LpNormalization": normalization.OVER_AXIS,
    "LpPool": normalization.CHANNELS_PASS,
    "MaxPool": normalization.CHANNELS_PASS,
    "MaxRoiPool": normalization.SAMPLED,
    "MeanVarianceNormalization": normalization.MEAN_VARIANCE,
    "RMSNormalization": normalization.TRAILING_NORM,
    "ReverseSequence": normalization.REVERSE_SEQUENCE,
    "RoiAlign": normalization.SAMPLED,
    "Softmax": normalization.OVER_AXIS,
    "TopK": normalization.OVER_AXIS,
    "Trilu": normalization.MATRIX_TAIL,
    # Attention and caches.
    "Attention": attention.ATTENTION,
    "RotaryEmbedding": attention.ROTARY,
    "TensorScatter": fused.TENSOR_SCATTER,
    # Reductions.
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSum", "ReduceSumSquare"),
        reduction.REDUCE_SUM,
    ),
    **dict.fromkeys(
        ("ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
        reduction.REDUCE_OTHER,
    ),
    # Recurrence and quantization.
    "DequantizeLinear": quantized.LINEAR,
    "GRU": recurrent.GRU,
    "LSTM": recurrent.LSTM,
    "QuantizeLinear": quantized.LINEAR,
    "RNN": recurrent.RNN,
}  # fmt: skip

# Operators that onnxruntime adds to the default domain.
ADDED: Mapping[str, Rule] = {"SimplifiedLayerNormalization": normalization.TRAILING_NORM}

# Operators of onnxruntime's own domain.
CONTRIB: Mapping[str, Rule] = {
    "Attention": attention.PROJECTED,
    "BiasAdd": elementwise.ELEMENTWISE,
    "BiasGelu": elementwise.ELEMENTWISE,
    "DequantizeLinear": quantized.LINEAR,
    "FastGelu": elementwise.ELEMENTWISE,
    "FusedConv": fused.FUSED_CONV,
    "FusedGemm": contraction.GEMM,
    "FusedMatMul": fused.FUSED_MATMUL,
    "Gelu": elementwise.FIRST_INPUT,
    "GridSample": normalization.SAMPLED,
    "GroupNorm": normalization.GROUP_NORM_LAST,
    "GroupQueryAttention": attention.GROUPED_QUERY,
    "MultiHeadAttention": attention.MULTI_HEAD,
    "QuantizeLinear": quantized.LINEAR,
    "QuickGelu": elementwise.FIRST_INPUT,
    "RotaryEmbedding": attention.ROTARY,
    "SkipLayerNormalization": normalization.SKIP_NORM,
    "SkipSimplifiedLayerNormalization": normalization.SKIP_NORM,
    "TransposeMatMul": fused.FUSED_MATMUL,
    "Trilu": normalization.MATRIX_TAIL,
}


def rule_of(node: ir.Node) -> Rule | None:
    """The rule of a node; None if its channels have to stay."""
    if node.domain in {"", "ai.onnx"}:
        return RULES.get(node.op_type) or ADDED.get(node.op_type)
    if node.domain == "com.microsoft":
        return CONTRIB.get(node.op_type)
    return None


def frozen_reason(node: ir.Node) -> str:
    """Why the channels of a node without a rule have to stay."""
    listed = FROZEN if node.domain in {"", "ai.onnx"} else FROZEN_ELSEWHERE.get(node.domain, {})
    reason = listed.get(node.op_type)
    if reason is None:
        return f"meets {node.domain or 'ai.onnx'}::{node.op_type}, an operator without a rule"
    return f"meets {node.op_type}, which {reason}"
