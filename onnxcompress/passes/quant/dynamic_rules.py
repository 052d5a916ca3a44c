"""Which nodes can round their data while the model runs, and in which forms: one rule per operator.

Static quantization fixes the scale of every activation beforehand, from calibration. Dynamic
quantization looks at the values that come and takes their least and greatest: no data are needed,
no range is wrong, and it works where nothing can be calibrated, in branches, loop bodies and the
steps of an LSTM. The price is a pass over the data before each product.

A node's *product* is the part that becomes integers, ``y = x W + b`` with a constant ``W`` [K, N].
A MatMul or Gemm is one; a Conv with a kernel of one element is one as well where its data have the
channels last, which is the case between two Transposes, or have one position only.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of, constant_tensor
from onnxcompress.passes._layout import row_axes
from onnxcompress.passes.quant.operators import attribute

MIN_ELEMENTS = 1024
"""Smaller weights stay float: rounding their data costs more than the product."""

_DYNAMIC_OPSET = 11
"""The first opset with DynamicQuantizeLinear."""

FloatMatrix = npt.NDArray[np.float32]


class Form(enum.Enum):
    """How a node is written; the values are words for the report."""

    TENSOR = "int8, data rounded per tensor at run time (DynamicQuantizeLinear, MatMulInteger)"
    BLOCKS = "int8, data rounded per row and block at run time (MatMulNBits)"
    CONV = "int8, data rounded per tensor at run time (DynamicQuantizeLinear, ConvInteger)"
    LSTM = "int8, data and state rounded at run time (DynamicQuantizeLSTM)"
    STORED = "weights stored in 8 bits, computed in float"


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """``y = x W + b`` as a node, and what is around it, computes it.

    Attributes:
        node: The node that multiplies.
        weight: Its constant factor.
        transposed: Whether the constant is ``Wᵀ``; axes of length 1 behind the first two dropped.
        factor: What the constant is multiplied by.
        data: ``x``, [..., K].
        bias: ``b``, None or a value that broadcasts to ``y``; [N] if ``row``.
        row: Whether the bias is a constant of N numbers.
        result: ``y``, [..., N], replaced by what is written.
        squeezed: Axes of length 1 that the data have and ``x`` has not.
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool
    data: ir.Value
    result: ir.Value
    bias: ir.Value | None = None
    row: bool = False
    factor: float = 1.0
    squeezed: tuple[int, ...] = ()

    def matrix(self) -> FloatMatrix:
        """``W``, [K, N]."""
        array = np.asarray(constant_of(self.weight), np.float32)
        flat = array.reshape(array.shape[:2])
        return np.ascontiguousarray((flat.T if self.transposed else flat) * np.float32(self.factor))


def forms_of(node: ir.Node, opset: int) -> tuple[Form, ...] | str:
    """The forms that ``node`` can take, the one that is usually best first, or why there is none.

    Args:
        node: A node whose operator is in :data:`RULES`.
        opset: Version of the default operator set.
    """
    for place in weight_places(node):
        reason = _weight_refusal(node, place)
        if reason is not None:
            return reason
    if element_count(node) < MIN_ELEMENTS:
        return f"its weights have fewer than {MIN_ELEMENTS} elements"
    found = RULES[node.op_type](node)
    forms = () if isinstance(found, str) else found
    if opset < _DYNAMIC_OPSET and {Form.TENSOR, Form.CONV} & set(forms):
        forms = tuple(f for f in forms if f not in {Form.TENSOR, Form.CONV})
        found = f"the model's operator set is {opset}; DynamicQuantizeLinear needs 11"
    if _storable(node):
        forms = (*forms, Form.STORED)
    return forms or (found if isinstance(found, str) else "it has no dynamic form")


def weight_places(node: ir.Node) -> tuple[int, ...]:
    """The inputs of ``node`` that hold weights."""
    return _WEIGHT_PLACES[node.op_type]


def product_of(node: ir.Node) -> Product | str:
    """The product that ``node`` computes, or why it cannot be written as one."""
    match node.op_type:
        case "MatMul":
            return _matmul(node)
        case "Gemm":
            return _gemm(node)
        case "Conv":
            return _pointwise(node)
    return "it is no product"


# --- weights -------------------------------------------------------------------------------------


def _weight_refusal(node: ir.Node, place: int) -> str | None:
    weight = node.inputs[place] if place < len(node.inputs) else None
    tensor = constant_tensor(weight)
    if tensor is None:
        if node.op_type == "MatMul":
            left = constant_tensor(node.inputs[0]) is not None
            return "its constant is the first factor" if left else "both factors are computed"
        return "its weight is computed at run time"
    if tensor.dtype != ir.DataType.FLOAT:
        return f"its weight is {tensor.dtype.name}; only FLOAT is quantized"
    if not np.isfinite(tensor.numpy()).all():
        return "its weight holds NaN or infinity"
    return None


def element_count(node: ir.Node) -> int:
    """Elements of the constant weights of ``node``."""
    tensors = [constant_tensor(node.inputs[place]) for place in weight_places(node)]
    return sum(tensor.size for tensor in tensors if tensor is not None)


def _storable(node: ir.Node) -> bool:
    """Whether the weights of ``node`` can be stored in 8 bits and computed at load."""
    for place in weight_places(node):
        weight = node.inputs[place]
        rank = None if weight is None or weight.shape is None else len(weight.shape)
        if rank is None or rank < 2 or row_axes(node, place, rank) is None:
            return False
        if weight is None or not weight.is_initializer() or weight.is_graph_output():
            return False
    return True


# --- products ------------------------------------------------------------------------------------


def _product_forms(node: ir.Node) -> tuple[Form, ...] | str:
    product = product_of(node)
    if isinstance(product, str):
        return product
    rank = _rank(product.data)
    if rank is None:
        return (Form.TENSOR,)
    return (Form.TENSOR, Form.BLOCKS)


def _matmul(node: ir.Node) -> Product | str:
    data, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
    shape = _shape(weight)
    if data is None or weight is None or shape is None:
        return "an input is absent"
    if len(shape) != 2:
        return f"its weight has shape {list(shape)}; only matrices are quantized"
    rank = _rank(data)
    if rank is not None and rank < 2:
        return "its data are a vector"
    reader = _only_reader(output)
    if reader is not None and reader.op_type == "Add" and reader.domain == "" and rank is not None:
        other = reader.inputs[1] if reader.inputs[0] is output else reader.inputs[0]
        if other is not None and _is_row(other, shape[1], rank):
            return Product(node, weight, False, data, reader.outputs[0], other, row=True)
    return Product(node, weight, False, data, output)


def _gemm(node: ir.Node) -> Product | str:
    data, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
    shape = _shape(weight)
    if data is None or weight is None or shape is None:
        return "an input is absent"
    if attribute(node, "transA", 0):
        return "it transposes its data (transA)"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and attribute(node, "beta", 1) != 1:
        return "beta is not 1"
    transposed = bool(attribute(node, "transB", 0))
    row = bias is not None and _is_row(bias, shape[0 if transposed else 1], 2)
    factor = attribute(node, "alpha", 1)
    return Product(node, weight, transposed, data, output, bias, row=row, factor=factor)


def _pointwise(node: ir.Node) -> Product | str:
    """A Conv with a kernel of one element on data whose channels are, or can be, last."""
    data, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
    shape = _shape(weight)
    if data is None or weight is None or shape is None:
        return "an input is absent"
    numbers = [
        *(shape[2:]),
        *(node.attributes.get_ints("strides", ()) or ()),
        int(attribute(node, "group", 1)),
    ]
    if any(n != 1 for n in numbers) or any(node.attributes.get_ints("pads", ()) or ()):
        return "its kernel, stride or padding is more than one element, or it has groups"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    row = bias is not None and _is_row(bias, shape[0], 1)
    if bias is not None and not row:
        return "its bias is computed at run time"
    axes = len(shape)
    before, after = data.producer(), _only_reader(output)
    last = (0, *range(2, axes), 1)
    if (
        _permutes(before, tuple(int(i) for i in np.argsort(last)))
        and _permutes(after, last)
        and before is not None
        and after is not None
        and before.inputs[0] is not None
        and after.graph is node.graph
    ):
        return Product(node, weight, True, before.inputs[0], after.outputs[0], bias, row=row)
    lengths = _shape(data)
    if lengths is not None and len(lengths) == axes and all(n == 1 for n in lengths[2:]):
        squeezed = tuple(range(2, axes))
        return Product(node, weight, True, data, output, bias, row=row, squeezed=squeezed)
    return "its data have their channels first"


def _permutes(node: ir.Node | None, order: tuple[int, ...]) -> bool:
    if node is None or node.op_type != "Transpose" or node.domain != "":
        return False
    return tuple(node.attributes.get_ints("perm", ()) or ()) == order


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads ``value``, in the same graph."""
    uses = list(value.uses())
    producer = value.producer()
    if value.is_graph_output() or len(uses) != 1 or producer is None:
        return None
    return uses[0].node if uses[0].node.graph is producer.graph else None


def _is_row(value: ir.Value, outputs: int, rank: int) -> bool:
    """Whether ``value`` is a constant of one float per output, along the last axis."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) > rank:
        return False
    shape = tuple(tensor.shape.numpy())
    return tensor.size == outputs and shape[-1:] == (outputs,)


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of a value, -1 where a length is not known; None for an unknown rank."""
    tensor = constant_tensor(value)
    if tensor is not None:
        return tuple(int(n) for n in tensor.shape.numpy())
    if value is None or value.shape is None:
        return None
    return tuple(n if isinstance(n, int) else -1 for n in value.shape)


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


# --- the other operators -------------------------------------------------------------------------


def _conv_forms(node: ir.Node) -> tuple[Form, ...] | str:
    product = product_of(node)
    if not isinstance(product, str):
        return _product_forms(node)
    return (Form.CONV,)


def _lstm_forms(node: ir.Node) -> tuple[Form, ...] | str:
    if attribute(node, "layout", 0):
        return "its data are batch first (layout=1), which the integer kernel does not take"
    if "hidden_size" not in node.attributes:
        return "its attribute hidden_size is missing, which the integer kernel needs"
    for place in weight_places(node):
        shape = _shape(node.inputs[place])
        if shape is None or len(shape) != 3:
            return "its weights are not of rank 3"
    return (Form.LSTM,)


def _no_kernel(node: ir.Node) -> str:
    return f"onnxruntime has no integer kernel for {node.op_type}"


_WEIGHT_PLACES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"Conv": (1,), "Gemm": (1,), "GRU": (1, 2), "LSTM": (1, 2), "MatMul": (1,), "RNN": (1, 2)}
)

RULES: Mapping[str, Callable[[ir.Node], tuple[Form, ...] | str]] = MappingProxyType(
    {
        "Conv": _conv_forms,
        "Gemm": _product_forms,
        "GRU": _no_kernel,
        "LSTM": _lstm_forms,
        "MatMul": _product_forms,
        "RNN": _no_kernel,
    }
)
