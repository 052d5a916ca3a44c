"""Quantized weights: what the integers of an initializer stand for, by the node that reads them.

real = (integers - zero) * scale

DequantizeLinear(integers, scale, zero)     the float weight is its output
Mul(Cast(integers), scale)                  likewise, with zero 0
MatMulInteger(x, integers, ., zero)         there is no float weight; each column counts alike
DynamicQuantizeLSTM(x, integers, ...)       nor is there; gates have scales, errors count alike
MatMulNBits(x, integers, scale, zero)       nor is there; each block of 8-bit integers has a scale
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.passes._weights import rows_of

Array = npt.NDArray[np.generic]


_BYTE = 8
"""Bits of integers that are not packed."""
_BLOCKED = 3
"""Axes of a weight in blocks."""
_ZEROS = 3
"""Input of MatMulNBits that is the zero points."""


@dataclass(frozen=True, slots=True)
class Integers:
    """A quantized weight.

    Attributes:
        real: The float weight in the graph; None where there is none.
        rows: Axes of the weight that are output channels.
        scale: One number, or as many axes as the weight has.
        zero: Zero points, of any shape.
    """

    real: ir.Value | None
    rows: tuple[int, ...]
    scale: npt.NDArray[np.float32]
    zero: Array


def read_integers(value: ir.Value) -> Integers | str:
    """What an integer initializer stands for, or why it is no weight that can be treated."""
    uses = list(value.uses())
    if len(uses) == 1:
        node, index = uses[0].node, uses[0].idx
        if node.op_type == "DequantizeLinear" and index == 0:
            return _dequantized(node)
        if node.op_type == "Cast" and node.domain == "":
            return _cast(node)
        if node.op_type == "MatMulInteger" and index == 1:
            return _product(node)
        if node.op_type == "DynamicQuantizeLSTM" and index in {1, 2}:
            return _recurrent(node, index)
        if node.op_type == "MatMulNBits" and index == 1:
            return _blocks(node)
    return "these integers are no weights of one layer"


def _dequantized(node: ir.Node) -> Integers | str:
    if node.attributes.get_int("block_size", 0):
        return "it is quantized in blocks, which leaves a codebook little to save"
    rows = rows_of(node.outputs[0])
    if isinstance(rows, str):
        return rows
    scale = constant_of(node.inputs[1])
    zero = _zero(node, 2)
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    if shape is None or scale is None or zero is None or scale.dtype != np.float32:
        return "its scale or zero point is not stored as float32"
    if scale.size > 1:
        axis = node.attributes.get_int("axis", 1) % len(shape)
        if scale.ndim != 1 or rows != (axis,):
            return f"its scale runs along axis {axis}, which is not that of the output channels"
        scale = scale.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return Integers(node.outputs[0], rows, scale.astype(np.float32), zero)


def _cast(node: ir.Node) -> Integers | str:
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Mul" or node.outputs[0].is_graph_output():
        return "these integers are no weights of one layer"
    product = uses[0].node
    scale = constant_of(product.inputs[1 - uses[0].idx])
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    rows = rows_of(product.outputs[0])
    if isinstance(rows, str):
        return rows
    if scale is None or scale.dtype != np.float32 or shape is None:
        return "its scale is not stored as float32"
    if scale.size > 1 and scale.ndim != len(shape):
        return "its scale has not as many axes as the weight"
    return Integers(product.outputs[0], rows, scale.astype(np.float32), np.zeros(1, np.int64))


def _product(node: ir.Node) -> Integers | str:
    zero = _zero(node, 3)
    shape = None if node.inputs[1] is None else node.inputs[1].shape
    if zero is None or shape is None or len(shape) < 2:
        return "its zero point is not stored"
    rows = tuple(a for a in range(len(shape)) if a != len(shape) - 2)
    return Integers(None, rows, np.ones(1, np.float32), zero)


def _recurrent(node: ir.Node, index: int) -> Integers | str:
    """The weights of inputs [D, I, 4H] or states [D, H, 4H], with a scale per direction or gate."""
    place = 8 + 2 * (index - 1)
    given = node.inputs[place] if len(node.inputs) > place else None
    scale, zero = constant_of(given), _zero(node, place + 1)
    array = constant_of(node.inputs[index])
    if array is None or array.ndim != 3 or scale is None or zero is None:
        return "its scale or zero point is not stored"
    ways, _, gates = array.shape
    if scale.size not in {ways, ways * gates} or scale.dtype != np.float32:
        return f"its scale of shape {scale.shape} is neither one per direction nor one per gate"
    spread = np.broadcast_to(scale.reshape(ways, 1, -1), (ways, 1, gates))
    return Integers(None, (0, 2), spread.astype(np.float32), zero)


def _blocks(node: ir.Node) -> Integers | str:
    """The weight [N, blocks, length] of one product, with a scale per block."""
    array, scale = constant_of(node.inputs[1]), constant_of(node.inputs[2])
    if node.attributes.get_int("bits", 4) != _BYTE or array is None or array.ndim != _BLOCKED:
        return "it has codes of 4 bits already"
    if scale is None or scale.dtype != np.float32 or scale.size != array.shape[0] * array.shape[1]:
        return "its scale is not stored as one float32 per block"
    given = node.inputs[3] if len(node.inputs) > _ZEROS else None
    zero = constant_of(given) if given is not None else np.full(1, 1 << (_BYTE - 1), np.uint8)
    if zero is None or zero.dtype != np.uint8:
        return "its zero point is not stored as uint8"
    return Integers(None, (0, 1), scale.reshape(*array.shape[:2], 1).astype(np.float32), zero)


def _zero(node: ir.Node, index: int) -> Array | None:
    given = node.inputs[index] if len(node.inputs) > index else None
    return np.zeros(1, np.int64) if given is None else constant_of(given)
