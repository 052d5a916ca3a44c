"""Which node holds which weights, and how many they are."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxcompress.graph.constants import stored_tensor
from onnxcompress.graph.cost.common import elements_per_code, subgraphs

# Input positions that hold scales, zero points, bounds and paddings: constants, but no weights.
_AUXILIARY: Mapping[str, frozenset[int]] = {
    "QuantizeLinear": frozenset({1, 2}),
    "DequantizeLinear": frozenset({1, 2}),
    "QLinearConv": frozenset({1, 2, 4, 5, 6, 7}),
    "QLinearMatMul": frozenset({1, 2, 4, 5, 6, 7}),
    "QGemm": frozenset({1, 2, 4, 5, 7, 8}),
    "ConvInteger": frozenset({2, 3}),
    "MatMulInteger": frozenset({2, 3}),
    "MatMulIntegerToFloat": frozenset({2, 3, 4, 5}),
    "DynamicQuantizeMatMul": frozenset({2, 3}),
    "DynamicQuantizeLSTM": frozenset({8, 9, 10, 11}),
    "QAttention": frozenset({3, 4, 6, 7}),
    "MatMulNBits": frozenset({2, 3, 4}),
    "GatherBlockQuantized": frozenset({2, 3}),
    "QLinearAdd": frozenset({1, 2, 4, 5, 6, 7}),
    "QLinearMul": frozenset({1, 2, 4, 5, 6, 7}),
    "QLinearSigmoid": frozenset({1, 2, 3, 4}),
    "QLinearLeakyRelu": frozenset({1, 2, 3, 4}),
    "QLinearSoftmax": frozenset({1, 2, 3, 4}),
    "QLinearGlobalAveragePool": frozenset({1, 2, 3, 4}),
    "QLinearAveragePool": frozenset({1, 2, 3, 4}),
    "Clip": frozenset({1, 2}),
    "Pad": frozenset({1, 2, 3}),
    "Resize": frozenset({1, 2, 3}),
    "Upsample": frozenset({1}),
    "Dropout": frozenset({1, 2}),
    "Range": frozenset({0, 1, 2}),
    "OneHot": frozenset({1, 2}),
}
# Operators whose integer data is a weight in quantized form: an int32 there is a bias.
_QUANTIZED_DATA = frozenset({"DequantizeLinear", "QLinearConv", "QGemm", "QAttention"})
_NARROW = frozenset(
    getattr(ir.DataType, name)
    for name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
    if hasattr(ir.DataType, name)
)


def _is_weight(node: ir.Node, index: int, tensor: ir.TensorProtocol) -> bool:
    """Whether the constant at input ``index`` of ``node`` is a weight in this use."""
    if index in _AUXILIARY.get(node.op_type, frozenset()):
        return False
    if tensor.dtype.is_floating_point():
        return True
    if tensor.dtype in _NARROW:
        return True
    return node.op_type in _QUANTIZED_DATA and tensor.dtype in (
        ir.DataType.INT32,
        ir.DataType.INT16,
        ir.DataType.UINT16,
    )


def assign_weights(model: ir.Model) -> dict[ir.Node, tuple[int, int]]:
    """Give every constant to its first user; nodes fed by constants alone pass theirs on.

    Returns:
        Node to (parameters, bytes).
    """
    held: dict[ir.Node, tuple[int, int]] = {}
    pending: dict[ir.Value, tuple[int, int]] = {}  # outputs of constant-only nodes
    counted_data: set[ir.Value] = set()
    counted_bytes: set[ir.Value] = set()
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and node.domain == "":
            continue
        parameters = size_bytes = 0
        inputs = [(i, v) for i, v in enumerate(node.inputs) if v is not None]
        plumbing = bool(inputs) and not subgraphs(node)
        for index, value in inputs:
            tensor = stored_tensor(value)
            if tensor is not None:
                if value not in counted_bytes:
                    counted_bytes.add(value)
                    size_bytes += tensor.nbytes
                if value not in counted_data and _is_weight(node, index, tensor):
                    counted_data.add(value)
                    parameters += _elements(node, tensor)
            elif value in pending:
                more_parameters, more_bytes = pending[value]
                pending[value] = (0, 0)
                parameters, size_bytes = parameters + more_parameters, size_bytes + more_bytes
            else:
                plumbing = False
        # A graph output or a second constant path must not lose the counts.
        if plumbing and any(output.uses() for output in node.outputs):
            used = next(output for output in node.outputs if output.uses())
            pending.update(dict.fromkeys(node.outputs, (0, 0)))
            pending[used] = (parameters, size_bytes)
        else:
            held[node] = (parameters, size_bytes)
    return held


def _elements(node: ir.Node, tensor: ir.TensorProtocol) -> int:
    """Number of weights in a tensor: some operators pack several into one byte."""
    return int(tensor.size) * elements_per_code(node, tensor)


def unused_bytes(model: ir.Model) -> int:
    """Bytes of initializers that no node reads; they are in the file all the same."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and not value.uses()
    )
