"""What layers answer that have lost all inputs, and what elementwise operators make of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of

Array = npt.NDArray[np.generic]

STANDARD = ("", "ai.onnx")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(np.negative(x.astype(np.float64)))))


def _hard_sigmoid(node: ir.Node, x: Array) -> Array:
    alpha = node.attributes.get_float("alpha", 0.2) or 0.0
    beta = node.attributes.get_float("beta", 0.5) or 0.0
    return np.asarray(np.clip(alpha * x.astype(np.float64) + beta, 0.0, 1.0))


UNARY: Mapping[str, Callable[[ir.Node, Array], Array]] = {
    "Dropout": lambda _, x: x,
    "HardSigmoid": _hard_sigmoid,
    "Identity": lambda _, x: x,
    "Relu": lambda _, x: np.maximum(x, 0),
    "Sigmoid": lambda _, x: _sigmoid(x),
    "Tanh": lambda _, x: np.tanh(x),
}
BINARY: Mapping[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Sub": np.subtract,
}


def answer(node: ir.Node) -> tuple[Array, int] | None:
    """What a layer answers that has lost all inputs, and its channel axis; None if unknown.

    Returns:
        The bias with 1 for the length of every axis but the channels', of the rank of the output.
    """
    output = node.outputs[0]
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.domain not in STANDARD or weight is None or output.shape is None:
        return None
    if output.dtype not in _FLOATS:
        return None
    rank, dtype = len(output.shape), output.dtype.numpy()
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    stored = constant_of(bias)
    if bias is not None and stored is None:
        return None
    if node.op_type in {"Conv", "ConvTranspose"} and rank > 2:
        axis = 1
    elif (node.op_type == "Gemm" and rank == 2) or (
        node.op_type == "MatMul" and rank > 1 and weight.shape is not None and len(weight.shape) > 1
    ):
        axis = rank - 1
    else:
        return None
    length = output.shape[axis]
    if not isinstance(length, int):
        return None
    made = np.zeros(length, dtype)
    if stored is not None:
        if stored.size > 1 and (stored.size != length or stored.shape[-1] != length):
            return None
        factor = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        made = made + (stored.reshape(-1) * np.asarray(factor, dtype)).astype(dtype)
    shape = [1] * rank
    shape[axis] = length
    return made.reshape(shape), axis


def evaluate(node: ir.Node, inputs: list[Array]) -> Array:
    """What an elementwise node of :attr:`Emptied.constants` makes of constants."""
    dtype = inputs[0].dtype
    if node.op_type == "BatchNormalization":
        axes = (1, -1) + (1,) * (inputs[0].ndim - 2)
        scale, bias, mean, variance = (v.astype(np.float64).reshape(axes) for v in inputs[1:])
        epsilon = node.attributes.get_float("epsilon", 1e-5) or 0.0
        made = (inputs[0].astype(np.float64) - mean) / np.sqrt(variance + epsilon) * scale + bias
        return np.asarray(made).astype(dtype)
    if node.op_type in BINARY:
        return np.asarray(BINARY[node.op_type](*inputs)).astype(dtype)
    return UNARY[node.op_type](node, inputs[0]).astype(dtype)
