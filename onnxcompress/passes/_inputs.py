"""Which statistics tell how the inputs of a weight are distributed."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.calibration.geometry import unfold_of
from onnxcompress.calibration.statistics import AxisUnfold, MomentsRequest
from onnxcompress.errors import ModelError
from onnxcompress.graph.constants import is_constant

MAX_COLUMNS = 8192
"""Wider layers are not measured: their second moment would take more than 0.5 GB."""

_ROWS_PER_COLUMN = 16
"""Rows of calibration used per column; more add time and no accuracy."""
_MIN_ROWS = 4096

_LAYERS = {"MatMul", "Gemm", "Conv"}
_RECURRENT = {"LSTM", "GRU", "RNN"}


def moment_requests(
    value: ir.Value, columns: int, row_axes: int, model: ir.Model
) -> tuple[MomentsRequest, ...]:
    """One request for every use of a weight; none unless each of them can be measured.

    The recurrent weight of an RNN meets its own output one step late; the moments of the output
    stand for it.

    Args:
        value: The weight: an initializer, or what dequantizes one.
        columns: How many of its columns one row of inputs meets.
        row_axes: How many of its axes are output channels.
        model: The model; uses in subgraphs cannot be measured.
    """
    if columns > MAX_COLUMNS:
        return ()
    found: list[MomentsRequest] = []
    for node, index in value.uses():
        data = _data(node, index, row_axes)
        if node.graph is not model.graph or data is None or is_constant(data):
            return ()
        if not data.name or data.dtype != ir.DataType.FLOAT:
            return ()
        try:
            unfold = AxisUnfold(-1) if node.op_type in _RECURRENT else unfold_of(node)
        except ModelError:
            return ()  # padding by an unknown length
        rows = max(_ROWS_PER_COLUMN * columns, _MIN_ROWS)
        found.append(MomentsRequest(data.name, unfold, rows))
    return tuple(dict.fromkeys(found))


def _data(node: ir.Node, index: int, row_axes: int) -> ir.Value | None:
    """The value that meets the weight at input ``index`` of ``node``; None if it is not known."""
    if node.op_type in _LAYERS and index == 1 and row_axes == 1:
        return node.inputs[0]
    if node.op_type in _RECURRENT and not node.attributes.get_int("layout", 0):
        if index == 1:
            return node.inputs[0]
        if index == 2 and node.outputs[0].shape is not None:
            return node.outputs[0]
    return None
