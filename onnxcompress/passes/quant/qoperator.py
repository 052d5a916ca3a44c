"""Write integer nodes as operators on integers (QOperator) instead of Q/DQ pairs around float ones.

The Q/DQ form says *what* is computed: ``Q(f(DQ(x), DQ(w)))``. onnxruntime replaces such a pattern
by an integer kernel when it loads the model; runtimes that do not look for patterns need the kernel
by name:

    DequantizeLinear(x, s_x, z_x) ┐
    DequantizeLinear(w, s_w, z_w) ┼ Conv → QuantizeLinear(s_y, z_y)
    DequantizeLinear(b, s_x s_w)  ┘
        →  QLinearConv(x, s_x, z_x, w, s_w, z_w, s_y, z_y, b)

One table says for every operator what the kernel is called and in which order it takes data, scales
and zero points. A node that moves values (MaxPool, Reshape, ...) reads and writes the integers
themselves where both sides are on the same grid. What has no such form here - a ConvTranspose,
16-bit activations, an activation between the node and its QuantizeLinear - keeps its Q/DQ pairs,
which is valid beside the rest.

Source: the ONNX operators QLinearConv and QLinearMatMul; onnxruntime's docs/ContribOperators.md for
those of the domain com.microsoft.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.passes.quant.operators import BIAS, Kind, rule_of

_MICROSOFT = "com.microsoft"
_BYTES = frozenset({ir.DataType.INT8, ir.DataType.UINT8})


class Part(enum.Enum):
    """What an input of an integer kernel is."""

    INTEGERS = "integers"
    SCALE = "scale"
    ZERO = "zero point"
    OUTPUT_SCALE = "scale of the output"
    OUTPUT_ZERO = "zero point of the output"
    BIAS = "bias"
    EACH = "integers, scale and zero point of every input"


Slot = tuple[Part, int]
"""A part, and the place of the float node's input that it belongs to (0 where there is none)."""


@dataclass(frozen=True, slots=True)
class Form:
    """An integer kernel for a float operator.

    Attributes:
        op_type: Its name.
        domain: Its domain; empty for ONNX.
        slots: Its inputs in order.
        attributes: Names of the float node's attributes that it has as well.
        set: Attributes that it needs beside them.
        real: Whether it writes float.
    """

    op_type: str
    slots: tuple[Slot, ...]
    domain: str = _MICROSOFT
    attributes: frozenset[str] = frozenset()
    set: tuple[tuple[str, int], ...] = ()
    real: bool = False


def _tensor(place: int) -> tuple[Slot, ...]:
    return (Part.INTEGERS, place), (Part.SCALE, place), (Part.ZERO, place)


_OUTPUT = ((Part.OUTPUT_SCALE, 0), (Part.OUTPUT_ZERO, 0))
_BIAS = ((Part.BIAS, BIAS),)
_BINARY = (*_tensor(0), *_tensor(1), *_OUTPUT)
_UNARY = (*_tensor(0), *_OUTPUT)
_WINDOW = frozenset({"auto_pad", "kernel_shape", "pads", "strides"})

FORMS: Mapping[str, tuple[Form, ...]] = MappingProxyType(
    {
        "Conv": (
            Form(
                "QLinearConv",
                (*_BINARY, *_BIAS),
                domain="",
                attributes=_WINDOW | {"dilations", "group"},
            ),
        ),
        "Gemm": (
            Form(
                "QGemm",
                (*_tensor(0), *_tensor(1), *_BIAS, *_OUTPUT),
                attributes=frozenset({"alpha", "transA", "transB"}),
            ),
            Form(
                "QGemm",
                (*_tensor(0), *_tensor(1), *_BIAS),
                attributes=frozenset({"alpha", "transA", "transB"}),
                real=True,
            ),
        ),
        "MatMul": (
            Form("QLinearMatMul", _BINARY, domain=""),
            Form(
                "MatMulIntegerToFloat",
                tuple(
                    (part, place)
                    for part in (Part.INTEGERS, Part.SCALE, Part.ZERO)
                    for place in (0, 1)
                ),
                real=True,
            ),
        ),
        "Add": (Form("QLinearAdd", _BINARY),),
        "Mul": (Form("QLinearMul", _BINARY),),
        "Concat": (
            Form("QLinearConcat", (*_OUTPUT, (Part.EACH, 0)), attributes=frozenset({"axis"})),
        ),
        "LeakyRelu": (Form("QLinearLeakyRelu", _UNARY, attributes=frozenset({"alpha"})),),
        "AveragePool": (
            Form(
                "QLinearAveragePool",
                _UNARY,
                attributes=_WINDOW | {"ceil_mode", "count_include_pad"},
                set=(("channels_last", 0),),
            ),
        ),
        "GlobalAveragePool": (
            Form(
                "QLinearGlobalAveragePool",
                _UNARY,
                set=(("channels_last", 0),),
            ),
        ),
    }
)
"""The integer kernels of each operator: first the one that writes integers."""

_DEFAULTS = MappingProxyType({"beta": (1.0,), "dilations": (1,)})
"""Values of attributes that a kernel without them performs all the same, element by element."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An integer tensor: what a DequantizeLinear reads, or a QuantizeLinear makes."""

    integers: ir.Value
    scale: ir.Value
    zero: ir.Value


def write_operators(model: ir.Model, nodes: Iterable[str]) -> tuple[str, ...]:
    """Replace the Q/DQ form of ``nodes`` by operators on integers, in place.

    Args:
        model: A model written by :func:`onnxcompress.passes.quant.insertion.insert`.
        nodes: Names of its integer nodes.

    Returns:
        Names of the nodes that keep their Q/DQ pairs, because they have no other form.
    """
    writer = _Writer(model)
    by_name = {node.name: node for node in model.graph}
    # Each node's reading of its own pairs is independent of its neighbours', so order is free.
    kept = tuple(name for name in nodes if not writer.write(by_name[name]))
    writer.drop_unread()
    return kept


class _Writer:
    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._graph = model.graph

    def write(self, node: ir.Node) -> bool:
        """Write one node on integers; False where it has no such form."""
        rule = rule_of(node)
        if rule is not None and rule.kind is Kind.MOVING:
            return self._move(node)
        quantize = _quantize_of(node.outputs[0])
        return any(
            form.real is (quantize is None) and self._replace(node, form, quantize)
            for form in FORMS.get(node.op_type, ())
        )

    def _replace(self, node: ir.Node, form: Form, quantize: ir.Node | None) -> bool:
        parts = _parts(node, form, quantize)
        if parts is None or not _expressible(node, form):
            return False
        attributes = [a for name, a in node.attributes.items() if name in form.attributes]
        attributes += [ir.AttrInt64(name, value) for name, value in form.set]
        if form.domain:
            self._model.opset_imports.setdefault(form.domain, 1)
        name = node.name or ""
        made = ir.Node(form.domain, form.op_type, parts, attributes, num_outputs=1, name=name)
        old = node.outputs[0] if quantize is None else quantize.outputs[0]
        self._stand_for(old, made)
        self._graph.insert_before(node, made)
        dropped = [node] if quantize is None else [quantize, node]
        self._graph.remove(dropped, safe=True)
        return True

    def _stand_for(self, old: ir.Value, made: ir.Node) -> None:
        """Let the output of ``made`` take over name, type and readers of ``old``."""
        new, name = made.outputs[0], old.name
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        new.name = name

    def _move(self, node: ir.Node) -> bool:
        """Let a moving node read and write the integers: ``DQ → MaxPool → Q`` to ``MaxPool``."""
        quantize = _quantize_of(node.outputs[0])
        source = _dequantized(node.inputs[0])
        if source is None and node.inputs[0] is not None and node.inputs[0].dtype in _BYTES:
            return True  # it was written so (Pad)
        if quantize is None or source is None:
            return False
        written = _tensor_of(quantize, quantize.outputs[0])
        if written is None or not _same_grid(source, written):
            return False
        node.replace_input_with(0, source.integers)
        output, integers = node.outputs[0], quantize.outputs[0]
        name = integers.name
        integers.replace_all_uses_with(output, replace_graph_outputs=True)
        self._graph.remove(quantize, safe=True)
        integers.name = None
        output.name, output.type = name, ir.TensorType(integers.dtype or ir.DataType.UINT8)
        return True

    def drop_unread(self) -> None:
        """Remove DequantizeLinears without readers, and constants that only they read."""
        for node in reversed(list(self._graph)):
            output = node.outputs[0]
            if node.op_type != "DequantizeLinear" or output.uses() or output.is_graph_output():
                continue
            inputs = tuple(node.inputs)
            self._graph.remove(node, safe=True)
            for value in inputs:
                if value is None or value.uses() or value.is_graph_output():
                    continue
                if value.is_initializer():
                    self._graph.initializers.pop(value.name or "", None)


def _parts(node: ir.Node, form: Form, quantize: ir.Node | None) -> list[ir.Value | None] | None:
    """The inputs of the kernel; None where one of them is not on 8-bit integers."""
    tensors = [_dequantized(value) for value in node.inputs]
    written = None if quantize is None else _tensor_of(quantize, quantize.outputs[0])
    if quantize is not None and written is None:
        return None
    found: list[ir.Value | None] = []
    for part, place in form.slots:
        if part is Part.EACH:
            for tensor in tensors:
                if tensor is None:
                    return None
                found += [tensor.integers, tensor.scale, tensor.zero]
        elif part is Part.BIAS:
            given = place < len(node.inputs) and node.inputs[place] is not None
            bias = _bias(node.inputs[place]) if given else None
            if given and bias is None:
                return None
            found.append(bias)
        elif part in {Part.OUTPUT_SCALE, Part.OUTPUT_ZERO}:
            if written is None:
                return None
            found.append(written.scale if part is Part.OUTPUT_SCALE else written.zero)
        else:
            tensor = tensors[place]
            if tensor is None:
                return None
            found.append(
                {
                    Part.INTEGERS: tensor.integers,
                    Part.SCALE: tensor.scale,
                    Part.ZERO: tensor.zero,
                }[part]
            )
    while found[-1] is None:
        found.pop()
    return found


def _expressible(node: ir.Node, form: Form) -> bool:
    """Whether the kernel has all attributes of ``node`` that are not at a value without effect."""
    for name, attribute in node.attributes.items():
        if name in form.attributes:
            continue
        if not np.isin(np.asarray(attribute.value), _DEFAULTS.get(name, ())).all():
            return False
    return True


def _dequantized(value: ir.Value | None) -> _Tensor | None:
    """The 8-bit tensor behind a float value."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    return _tensor_of(producer, producer.inputs[0])


def _tensor_of(node: ir.Node, integers: ir.Value | None) -> _Tensor | None:
    """The tensor on one side of a Q or DQ; None where it is not of 8 bits."""
    if node.domain not in {"", "ai.onnx"} or len(node.inputs) < 3 or integers is None:
        return None
    scale, zero = node.inputs[1], node.inputs[2]
    if scale is None or zero is None or zero.dtype not in _BYTES:
        return None
    return _Tensor(integers, scale, zero)


def _bias(value: ir.Value | None) -> ir.Value | None:
    """The int32 tensor behind a bias."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    integers = producer.inputs[0]
    return integers if integers is not None and integers.dtype is ir.DataType.INT32 else None


def _quantize_of(value: ir.Value) -> ir.Node | None:
    """The QuantizeLinear that is the only reader of ``value``."""
    readers = [reader for reader, _ in value.uses()]
    if value.is_graph_output() or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return None
    return readers[0]


def _same_grid(first: _Tensor, second: _Tensor) -> bool:
    """Whether two tensors have equal scales and zero points of the same type."""
    for a, b in ((first.scale, second.scale), (first.zero, second.zero)):
        one, other = constant_of(a), constant_of(b)
        if one is None or other is None or one.dtype != other.dtype:
            return False
        if not np.array_equal(one, other):
            return False
    return True
