"""Which weights to quantize and how each is written; every other one with its reason."""

from __future__ import annotations

import enum
import fnmatch
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import UsageError
from onnxcompress.graph.constants import constant_of
from onnxcompress.numerics.blockwise import balanced
from onnxcompress.passes.base import Skip
from onnxcompress.passes.weight_only.layout import Layout, row_axes
from onnxcompress.passes.weight_only.options import Format, WeightOnlyOptions

INT4_OPSET = 21
"""The first opset with 4-bit tensors and with DequantizeLinear in blocks."""


class Form(enum.Enum):
    """How one weight is written; the values are words for the report."""

    MATMUL_NBITS = "MatMulNBits"
    GATHER_BLOCKS = "GatherBlockQuantized"
    GATHERED_ROWS = "Gather of codes and scales"
    FOLDABLE = "Mul(Cast(codes), scale), folded at load"
    DEQUANTIZE = "DequantizeLinear"


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight to quantize.

    Attributes:
        value: Its initializer.
        graph: The graph that owns it.
        layout: How it is a matrix [R, D].
        form: How it will be written.
        block: Columns that share a scale; ``D`` for one scale per row.
    """

    value: ir.Value
    graph: ir.Graph
    layout: Layout
    form: Form
    block: int

    @property
    def name(self) -> str:
        """Name of the initializer."""
        return self.value.name or ""

    @property
    def blocks(self) -> int:
        """Blocks per row."""
        return -(-self.layout.columns // self.block)

    def stored_bytes(self, options: WeightOnlyOptions) -> int:
        """Bytes of codes, scales and zero points."""
        scales = self.layout.row_count * self.blocks
        filled = self.form is Form.MATMUL_NBITS or self.block < self.layout.columns
        codes = scales * self.block if filled else math.prod(self.layout.shape)
        zeros = 0 if options.symmetric else scales * options.bits // 8
        return codes * options.bits // 8 + 4 * scales + zeros


@dataclass(frozen=True, slots=True)
class Selection:
    """What to quantize, what not and why."""

    weights: tuple[Weight, ...]
    skips: tuple[Skip, ...]


def select(model: ir.Model, options: WeightOnlyOptions) -> Selection:
    """Choose the weights of ``model``, which is not changed.

    Raises:
        UsageError: If a pattern matches no weight.
    """
    weights: list[Weight] = []
    skips: list[Skip] = []
    small: list[ir.Value] = []
    matched: set[str] = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            names = [value.name or "", *(user.name or "" for user, _ in value.uses())]
            matched.update(
                p for p in (*options.include, *options.exclude) if fnmatch.filter(names, p)
            )
            if tensor.size < options.min_elements or len(tensor.shape) < 2:
                small.append(value)
                continue
            found = _weight(value, graph, model, options, names)
            if isinstance(found, Weight):
                weights.append(found)
            else:
                skips.append(Skip(value.name or "", "", found))
    for pattern in (*options.include, *options.exclude):
        if pattern not in matched:
            raise UsageError(
                f"the pattern '{pattern}' of the pass 'weights' matches no weight",
                hint="Patterns match names of initializers and of the nodes that read them; see "
                "onnxcompress inspect MODEL.",
            )
    if small:
        elements = sum(value.const_value.size for value in small if value.const_value is not None)
        skips.append(
            Skip(
                f"{len(small)} small tensors",
                "",
                f"biases, factors and others of one axis or fewer than min_elements="
                f"{options.min_elements} elements, {elements} elements in all",
            )
        )
    return Selection(tuple(weights), tuple(skips))


def needs_newer(weight: Weight, options: WeightOnlyOptions) -> bool:
    """Whether the form of ``weight`` exists only from :data:`INT4_OPSET` on."""
    if weight.form is Form.DEQUANTIZE:
        return options.bits == 4 or weight.blocks > 1
    return weight.form is Form.FOLDABLE and options.bits == 4


def _weight(
    value: ir.Value,
    graph: ir.Graph,
    model: ir.Model,
    options: WeightOnlyOptions,
    names: list[str],
) -> Weight | str:
    """The plan for one initializer, or why there is none."""
    tensor = value.const_value
    if tensor is None:
        return "its data are unknown"
    reason = _refusal(value, options, names)
    if reason is not None:
        return reason
    shape = tuple(int(d) for d in tensor.shape.numpy())
    rows: tuple[int, ...] | None = None
    for user, index in value.uses():
        found = row_axes(user, index, len(shape))
        if found is None:
            return f"{user.op_type} '{user.name}' reads it, which multiplies by no constant weight"
        rows = rows or found
    if rows is None:
        return "no node reads it"
    if not options.embeddings and any(user.op_type == "Gather" for user, _ in value.uses()):
        return "it is an embedding table and embeddings=false"
    weight = _placed(value, graph, Layout(shape, rows), options)
    if weight.stored_bytes(options) >= tensor.nbytes:
        return (
            f"{options.bits} bits and scales for {list(shape)} would take "
            f"{weight.stored_bytes(options)} bytes instead of {tensor.nbytes}"
        )
    opset = model.opset_imports.get("") or 0
    if opset < 13 and weight.form in (Form.FOLDABLE, Form.DEQUANTIZE):
        return f"opset {opset} is older than 13, which the operators around it need"
    array = constant_of(value)
    if array is None or not np.isfinite(array).all():
        return "it holds numbers that are not finite"
    return weight


def _refusal(value: ir.Value, options: WeightOnlyOptions, names: list[str]) -> str | None:
    if any(fnmatch.filter(names, p) for p in options.exclude):
        return "excluded by name"
    if options.include and not any(fnmatch.filter(names, p) for p in options.include):
        return "not among the names to include"
    if value.is_graph_output():
        return "it is an output of the graph"
    if value.is_graph_input():
        return "it is an input of the graph, which callers can replace"
    if value.dtype != ir.DataType.FLOAT:
        return f"its type is {value.dtype}; only FLOAT is quantized"
    return None


# --- forms ---------------------------------------------------------------------------------------


def _placed(value: ir.Value, graph: ir.Graph, layout: Layout, options: WeightOnlyOptions) -> Weight:
    """Choose form and block of a weight that can be quantized."""
    block, wanted = options.block, options.format
    users = [(user, index) for user, index in value.uses()]
    kernels = wanted is Format.MATMUL_NBITS or (wanted is Format.AUTO and block > 0)
    if kernels and all(_is_plain_product(user, index, layout) for user, index in users):
        return Weight(value, graph, layout, Form.MATMUL_NBITS, _kernel_block(layout, block))
    gathers = layout.rows == (0,) and all(
        user.op_type == "Gather" and index == 0 for user, index in users
    )
    if kernels and gathers and len(layout.shape) == 2:
        size = _kernel_block(layout, block)
        if layout.columns % 2 == 0 and layout.columns >= size:
            return Weight(value, graph, layout, Form.GATHER_BLOCKS, size)
    if gathers and options.bits == 8 and wanted is not Format.FOLDABLE:
        return Weight(value, graph, layout, Form.GATHERED_ROWS, max(layout.columns, 1))
    if wanted is Format.DEQUANTIZE and len(layout.rows) == 1:
        matrix = len(layout.shape) == 2
        length = balanced(layout.columns, block if matrix else 0)
        return Weight(value, graph, layout, Form.DEQUANTIZE, length)
    return Weight(value, graph, layout, Form.FOLDABLE, balanced(layout.columns, block))


def _kernel_block(layout: Layout, wanted: int) -> int:
    """``wanted`` (the nearest power of two below it), or less where the rows are shorter."""
    power = 1 << max(wanted.bit_length() - 1, 4)
    short = 1 << max((layout.columns - 1).bit_length(), 4)
    return min(power, short, 256)


def _is_plain_product(node: ir.Node, index: int, layout: Layout) -> bool:
    """Whether MatMulNBits can compute the node: ``A @ B`` (+ C), B constant of rank 2."""
    data = node.inputs[0]
    if index != 1 or len(layout.shape) != 2 or data is None or data.shape is None:
        return False
    if data.dtype != ir.DataType.FLOAT or len(data.shape) < 2:
        return False
    if node.op_type == "MatMul":
        return True
    return (
        node.op_type == "Gemm"
        and not node.attributes.get_int("transA", 0)
        and node.attributes.get_float("alpha", 1.0) == 1.0
        and (node.attributes.get_float("beta", 1.0) == 1.0 or not _has_bias(node))
    )


def _has_bias(node: ir.Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] is not None
