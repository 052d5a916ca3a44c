"""Which weights to quantize and how each is written; every other one with its reason."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.numerics.blockwise import balanced
from onnxcompress.passes._layout import Layout
from onnxcompress.passes._weights import Chosen, choose_weights, rows_of
from onnxcompress.passes.weight_only.options import Format, WeightOnlyOptions

INT4_OPSET = 21
"""The first opset with 4-bit tensors and with DequantizeLinear in blocks."""


class Form(enum.Enum):
    """How one weight is written; the values are words for the report."""

    MATMUL_NBITS = "MatMulNBits"
    GATHER_BLOCKS = "GatherBlockQuantized"
    GATHERED_ROWS = "Gather of codes and scales"
    FOLDABLE = "Mul(Cast(codes), scale), folded at load"
    DIGITS = "digits of bytes, folded at load"
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
        return options.stored_code_bytes(codes) + 4 * scales + zeros


Selection = Chosen[Weight]


def select(model: ir.Model, options: WeightOnlyOptions) -> Selection:
    """Choose the weights of ``model``, which is not changed.

    Raises:
        UsageError: If a pattern matches no weight.
    """
    return choose_weights(
        model,
        lambda value, graph: _weight(value, graph, model, options),
        owner="weights",
        include=options.include,
        exclude=options.exclude,
        min_elements=options.min_elements,
    )


def needs_newer(weight: Weight, options: WeightOnlyOptions) -> bool:
    """Whether the form of ``weight`` exists only from :data:`INT4_OPSET` on."""
    if weight.form is Form.DEQUANTIZE:
        return options.bits == 4 or weight.blocks > 1
    return weight.form is Form.FOLDABLE and options.bits == 4


def _weight(
    value: ir.Value, graph: ir.Graph, model: ir.Model, options: WeightOnlyOptions
) -> Weight | str:
    """The plan for one initializer, or why there is none."""
    tensor = value.const_value
    if tensor is None:
        return "its data are unknown"
    rows = rows_of(value)
    if isinstance(rows, str):
        return rows
    if not options.embeddings and any(user.op_type == "Gather" for user, _ in value.uses()):
        return "it is an embedding table and embeddings=false"
    shape = tuple(int(d) for d in tensor.shape.numpy())
    weight = _placed(value, graph, Layout(shape, rows), options)
    if weight.stored_bytes(options) >= tensor.nbytes:
        return (
            f"{options.bits} bits and scales for {list(shape)} would take "
            f"{weight.stored_bytes(options)} bytes instead of {tensor.nbytes}"
        )
    opset = model.opset_imports.get("") or 0
    if opset < 13 and weight.form in (Form.FOLDABLE, Form.DIGITS, Form.DEQUANTIZE):
        return f"opset {opset} is older than 13, which the operators around it need"
    array = constant_of(value)
    if array is None or not np.isfinite(array).all():
        return "it holds numbers that are not finite"
    return weight


# --- forms ---------------------------------------------------------------------------------------


def _placed(value: ir.Value, graph: ir.Graph, layout: Layout, options: WeightOnlyOptions) -> Weight:
    """Choose form and block of a weight that can be quantized."""
    block, wanted = options.block, options.format
    users = [(user, index) for user, index in value.uses()]
    if options.levels is not None:
        return Weight(value, graph, layout, Form.DIGITS, balanced(layout.columns, block))
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
