"""Which weights get a codebook, and how each is a matrix; every other one with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import MomentsRequest
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes._inputs import moment_requests
from onnxcompress.passes._layout import Layout
from onnxcompress.passes._weights import Chosen, choose_weights, matrix_layout, rows_of
from onnxcompress.passes.share.options import ShareOptions

Float32 = npt.NDArray[np.float32]

_INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that may get a codebook.

    Attributes:
        value: Its initializer.
        graph: The graph that owns it.
        layout: How it is a matrix [R, D].
        requests: What to measure of its inputs; none if they cannot be measured.
        scale: Of integers, their scale per row, [R]; None for floats.
        zero: Of integers, their zero point.
    """

    value: ir.Value
    graph: ir.Graph
    layout: Layout
    requests: tuple[MomentsRequest, ...]
    scale: Float32 | None = None
    zero: int = 0

    @property
    def name(self) -> str:
        """Name of the initializer."""
        return self.value.name or ""

    @property
    def nbytes(self) -> int:
        """Bytes it takes now."""
        tensor = self.value.const_value
        return 0 if tensor is None else tensor.nbytes

    def matrix(self) -> Float32:
        """The weight as the layer multiplies by it, float32, [R, D]."""
        array = constant_of(self.value)
        if array is None:
            raise TypeError(f"initializer '{self.name}' has no data")
        matrix = np.ascontiguousarray(self.layout.matrix(array)).astype(np.float32)
        return matrix if self.scale is None else (matrix - self.zero) * self.scale[:, None]


Selection = Chosen[Weight]


def select(model: ir.Model, options: ShareOptions) -> Selection:
    """Choose the weights of ``model``, which is not changed.

    Raises:
        UsageError: If a pattern matches no weight.
    """
    return choose_weights(
        model,
        lambda value, graph: _weight(value, graph, model),
        owner="share",
        include=options.include,
        exclude=options.exclude,
        min_elements=options.min_elements,
        dtypes=(ir.DataType.FLOAT, *_INTEGERS),
    )


def _weight(value: ir.Value, graph: ir.Graph, model: ir.Model) -> Weight | str:
    """The weight of one initializer, or why it is none."""
    if value.dtype in _INTEGERS:
        return _integers(value, graph, model)
    layout = matrix_layout(value)
    if isinstance(layout, str):
        return layout
    return Weight(value, graph, layout, _requests(value, layout, graph, model))


def _integers(value: ir.Value, graph: ir.Graph, model: ir.Model) -> Weight | str:
    """A quantized weight: integers that one DequantizeLinear reads."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != "DequantizeLinear" or uses[0].idx != 0:
        return "these integers are no weights of one DequantizeLinear"
    node = uses[0].node
    if node.attributes.get_int("block_size", 0):
        return "it is quantized in blocks, which leaves a codebook little to save"
    real = node.outputs[0]
    rows = rows_of(real)
    if isinstance(rows, str):
        return rows
    array = constant_of(value)
    scale = constant_of(node.inputs[1])
    third = node.inputs[2] if len(node.inputs) > 2 else None
    zero = np.zeros(1, np.int64) if third is None else constant_of(third)
    if array is None or scale is None or zero is None or scale.dtype != np.float32:
        return "its scale or zero point is not stored as float32"
    if np.unique(zero).size != 1:
        return "its zero point is not the same for all channels"
    axis = node.attributes.get_int("axis", 1) % array.ndim
    layout = Layout(array.shape, rows)
    if scale.size not in (1, layout.row_count) or (scale.size > 1 and rows != (axis,)):
        return f"its scale runs along axis {axis}, which is not that of the output channels"
    per_row = np.broadcast_to(scale.reshape(-1), (layout.row_count,)).astype(np.float32)
    requests = _requests(real, layout, graph, model)
    return Weight(value, graph, layout, requests, per_row, int(zero.reshape(-1)[0]))


def _requests(
    value: ir.Value, layout: Layout, graph: ir.Graph, model: ir.Model
) -> tuple[MomentsRequest, ...]:
    if graph is not model.graph:
        return ()
    return moment_requests(value, layout.columns, len(layout.rows), model)
