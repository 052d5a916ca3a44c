"""Which weights get a codebook, and how each is a matrix; every other one with its reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import MomentsRequest
from onnxcompress.errors import UsageError
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes._inputs import moment_requests
from onnxcompress.passes.base import Skip
from onnxcompress.passes.share.options import ShareOptions
from onnxcompress.passes.weight_only.layout import Layout, row_axes

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


@dataclass(frozen=True, slots=True)
class Selection:
    """Which weights, which not and why."""

    weights: tuple[Weight, ...]
    skips: tuple[Skip, ...]


def select(model: ir.Model, options: ShareOptions) -> Selection:
    """Choose the weights of ``model``, which is not changed.

    Raises:
        UsageError: If a pattern matches no weight.
    """
    weights: list[Weight] = []
    skips: list[Skip] = []
    small: list[int] = []
    matched: set[str] = set()
    patterns = (*options.include, *options.exclude)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not (
                tensor.dtype.is_floating_point() or tensor.dtype in _INTEGERS
            ):
                continue
            names = [value.name or "", *(user.name or "" for user, _ in value.uses())]
            matched.update(p for p in patterns if fnmatch.filter(names, p))
            if tensor.size < options.min_elements or len(tensor.shape) < 2:
                small.append(tensor.size)
                continue
            found = _refusal(value, options, names) or _weight(value, graph, model)
            if isinstance(found, Weight):
                weights.append(found)
            else:
                skips.append(Skip(value.name or "", "", found))
    for pattern in patterns:
        if pattern not in matched:
            raise UsageError(
                f"the pattern '{pattern}' of the pass 'share' matches no weight",
                hint="Patterns match names of initializers and of the nodes that read them; see "
                "onnxcompress inspect MODEL.",
            )
    if small:
        skips.append(
            Skip(
                f"{len(small)} small tensors",
                "",
                f"biases, factors and others of one axis or fewer than min_elements="
                f"{options.min_elements} elements, {sum(small)} elements in all",
            )
        )
    return Selection(tuple(weights), tuple(skips))


def _refusal(value: ir.Value, options: ShareOptions, names: Sequence[str]) -> str | None:
    if any(fnmatch.filter(names, p) for p in options.exclude):
        return "excluded by name"
    if options.include and not any(fnmatch.filter(names, p) for p in options.include):
        return "not among the names to include"
    if value.is_graph_output():
        return "it is an output of the graph"
    if value.is_graph_input():
        return "it is an input of the graph, which callers can replace"
    if value.dtype not in (ir.DataType.FLOAT, *_INTEGERS):
        return f"its type is {value.dtype}; only FLOAT and 8-bit integers get a codebook"
    return None


def _weight(value: ir.Value, graph: ir.Graph, model: ir.Model) -> Weight | str:
    """The weight of one initializer, or why it is none."""
    if value.dtype in _INTEGERS:
        return _integers(value, graph, model)
    rows = _rows(value)
    if isinstance(rows, str):
        return rows
    array = constant_of(value)
    if array is None or not np.isfinite(array).all():
        return "it holds numbers that are not finite"
    layout = Layout(array.shape, rows)
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
    rows = _rows(real)
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


def _rows(value: ir.Value) -> tuple[int, ...] | str:
    """The row axes that all uses of a weight agree to take the first one's; or why it is none."""
    rank = 0 if value.shape is None else len(value.shape)
    rows: tuple[int, ...] | None = None
    for user, index in value.uses():
        found = row_axes(user, index, rank)
        if found is None:
            return f"{user.op_type} '{user.name}' reads it, which multiplies by no constant weight"
        rows = rows or found
    return "no node reads it" if rows is None else rows


def _requests(
    value: ir.Value, layout: Layout, graph: ir.Graph, model: ir.Model
) -> tuple[MomentsRequest, ...]:
    if graph is not model.graph:
        return ()
    return moment_requests(value, layout.columns, len(layout.rows), model)
