"""Write a plan into a model as QuantizeLinear and DequantizeLinear nodes.

A point ``v`` becomes ``v → QuantizeLinear → DequantizeLinear``: one pair, however many nodes read
it (onnxruntime copies the DequantizeLinear where a kernel needs its own). Readers on integers take
the pair's output; float readers of a value that an integer node makes take it as well, those of a
float value keep reading that. A weight becomes ``int8 → DequantizeLinear``, a bias ``int32 →
DequantizeLinear`` with the scale ``s_x s_w`` of the products it is added to.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import Array
from onnxcompress.graph.naming import Namer
from onnxcompress.numerics.affine import Affine, IntArray, is_wide
from onnxcompress.passes.quant.operators import BIAS, WEIGHT, data_inputs, rule_of
from onnxcompress.passes.quant.parameters import Layer
from onnxcompress.passes.quant.placement import CLIMBED, Plan

_SHAPE_READERS = frozenset({"Shape", "Size"})
"""Readers that look at the shape alone: reading the integers saves them a way back to float."""

_WIDE_OPSET = 21
_ORT_DOMAIN = "com.microsoft"
_BYTES = frozenset({ir.DataType.INT8, ir.DataType.UINT8})

_SELF_QUANTIZED = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Float operators that onnxruntime quantizes by itself between two integer regions."""


def insert(
    model: ir.Model,
    plan: Plan,
    affines: Mapping[str, Affine],
    layers: Mapping[str, Layer],
    *,
    on_cpu: bool = True,
) -> dict[str, str]:
    """Write ``plan`` into ``model``, in place.

    Args:
        model: The model that the plan was made for, or a copy of it.
        plan: The placement.
        affines: The grid of every point.
        layers: The integer weight of every weighted node of the plan.
        on_cpu: Write what onnxruntime's CPU kernels want: moving nodes that need it on integers
            themselves (see :class:`~onnxcompress.passes.quant.operators.Rule`), and the weights of
            nodes with 16-bit data, for which there is no integer kernel, as float constants made
            of the integers at load.

    Returns:
        Point to the name of the float value behind its DequantizeLinear, where one is left.
    """
    return _Writer(model, plan, affines, on_cpu).write(layers)


class _Writer:
    def __init__(
        self, model: ir.Model, plan: Plan, affines: Mapping[str, Affine], on_cpu: bool
    ) -> None:
        self._model = model
        self._graph = model.graph
        self._namer = Namer(model)
        self._plan = plan
        self._affines = affines
        self._on_cpu = on_cpu
        self._nodes = {n.name: n for n in model.graph if n.name}
        self._members = {self._nodes[name] for name in plan.nodes}
        self._parameters: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._integers: dict[ir.Value, ir.Value] = {}
        self._replaced: dict[ir.Value, None] = {}
        self._reals: dict[str, ir.Value] = {}

    def write(self, layers: Mapping[str, Layer]) -> dict[str, str]:
        for name in self._plan.folded:
            self._drop_activation(self._nodes[name])
        produced = {output for node in self._members for output in node.outputs}
        values = {v.name: v for v in self._graph.inputs}
        values |= {v.name: v for node in self._graph for v in node.outputs}
        for point in self._plan.points:
            self._write_point(values[point], made_by_member=values[point] in produced)
        if self._on_cpu:
            for name in self._plan.nodes:
                self._move_on_integers(self._nodes[name])
        for name, layer in layers.items():
            self._write_layer(self._nodes[name], layer)
        for node in list(self._graph):
            self._fence(node)
        for value in self._replaced:
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[value.name or ""]
        reals = self._drop_unread()
        self._graph.sort()
        return reals

    def _drop_unread(self) -> dict[str, str]:
        """Remove each DequantizeLinear that nobody reads any more; the others by point."""
        kept: dict[str, str] = {}
        for point, real in self._reals.items():
            dq = real.producer()
            if dq is not None and not real.uses() and not real.is_graph_output():
                self._graph.remove(dq, safe=True)
            else:
                kept[point] = real.name or ""
        return kept

    def _drop_activation(self, activation: ir.Node) -> None:
        """Let the node before ``activation`` make its output, under the same name."""
        source, output = activation.inputs[0], activation.outputs[0]
        if source is None:
            return
        name = output.name
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        self._graph.remove(activation, safe=True)
        output.name = None
        source.name = name

    def _new_value(self, like: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=self._namer.value(name), shape=like.shape, type=ir.TensorType(dtype))

    def _grid_values(self, affine: Affine, name: str) -> tuple[ir.Value, ir.Value]:
        """Initializers for scale and zero point, one pair for all users of the same grid object."""
        if id(affine) not in self._parameters:
            self._parameters[id(affine)] = (
                self._constant(f"{name}/quant_scale", affine.scale),
                self._constant(f"{name}/quant_zero_point", affine.zero_point),
            )
        return self._parameters[id(affine)]

    def _constant(self, name: str, array: Array) -> ir.Value:
        """An initializer of a new name (which needs no search of the graph, as the namer knows)."""
        tensor = ir.Tensor(np.asarray(array, order="C"), name=self._namer.value(name))
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def _write_point(self, value: ir.Value, *, made_by_member: bool) -> None:
        name = value.name or ""
        affine = self._affines[name]
        uses = [
            (node, place)
            for node, place in value.uses()
            if made_by_member or (node in self._members and value in data_inputs(node))
        ]
        is_output = made_by_member and value.is_graph_output()
        if is_output:  # the float side of the pair must keep the interface's name
            value.name = self._namer.value(f"{name}/quant_float")
        source = self._shield(value, affine, name) if name in self._plan.shields else value
        scale, zero = self._grid_values(affine, name)
        integer = self._new_value(
            value, f"{name}/quant_integer", ir.DataType[affine.grid.dtype.upper()]
        )
        real = self._new_value(value, f"{name}/quant_real", ir.DataType.FLOAT)
        if is_output:
            real.name = name
        domain = self._domain(affine)
        q = self._node("QuantizeLinear", [source, scale, zero], integer, f"{name}/quant_q", domain)
        dq = self._node(
            "DequantizeLinear", [integer, scale, zero], real, f"{name}/quant_dq", domain
        )
        self._insert_after(source, q, dq)
        self._integers[real] = integer
        self._reals[name] = real
        for node, place in uses:
            shape_only = node.op_type in _SHAPE_READERS and node.domain == ""
            node.replace_input_with(place, integer if shape_only else real)
        if is_output:
            self._graph.outputs[list(self._graph.outputs).index(value)] = real

    def _domain(self, affine: Affine) -> str:
        """Where Q and DQ of a grid are defined: 16 bits are standard from operator set 21 on."""
        if not is_wide(affine.grid) or self._model.opset_imports.get("", 0) >= _WIDE_OPSET:
            return ""
        self._model.opset_imports.setdefault(_ORT_DOMAIN, 1)
        return _ORT_DOMAIN

    def _shield(self, value: ir.Value, affine: Affine, name: str) -> ir.Value:
        """A Clip that changes no integer and over which onnxruntime moves no QuantizeLinear.

        A Clip as wide as the grid would be taken away as redundant, so it ends a quarter of a step
        inside: the last step still rounds to the same integer.
        """
        quarter = float(affine.scale) / 4
        bounds = [
            self._constant(f"{name}/quant_{role}", np.array(float(end) - quarter, np.float32))
            for role, end in (("low", affine.minimum), ("high", affine.maximum))
        ]
        output = self._new_value(value, f"{name}/quant_clipped", ir.DataType.FLOAT)
        clip = self._node("Clip", [value, *bounds], output, f"{name}/quant_clip")
        self._insert_after(value, clip)
        return output

    def _fence(self, node: ir.Node) -> None:
        """Keep onnxruntime from quantizing a float node between two integer regions by itself.

        Where the data of a Conv, ConvTranspose or Gemm come from a DequantizeLinear and its output
        goes to a QuantizeLinear, onnxruntime rounds the float weight to one scale for the whole
        tensor, which ruins a depthwise convolution. A Clip as wide as the data's grid changes no
        value and hides the DequantizeLinear.
        """
        if node.op_type not in _SELF_QUANTIZED or node in self._members:
            return
        real = _back_to_dequantize(node)
        source = node.inputs[0]
        if real is None or source is None or not _leads_to_quantize(node):
            return
        point = next((p for p, value in self._reals.items() if value is real), None)
        if point is None:
            return
        affine = self._affines[point]
        bounds = [
            self._constant(f"{node.name}/quant_{role}", np.array(float(end), np.float32))
            for role, end in (("low", affine.minimum), ("high", affine.maximum))
        ]
        output = self._new_value(source, f"{node.name}/quant_fenced", ir.DataType.FLOAT)
        clip = self._node("Clip", [source, *bounds], output, f"{node.name}/quant_fence")
        self._graph.insert_before(node, clip)
        node.replace_input_with(0, output)

    def _insert_after(self, value: ir.Value, *nodes: ir.Node) -> None:
        """Insert ``nodes`` right where ``value`` is known."""
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], nodes)
        else:
            self._graph.insert_after(producer, nodes)

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        output: ir.Value,
        name: str,
        domain: str = "",
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Node:
        return ir.node(
            op_type,
            inputs=inputs,
            outputs=[output],
            attributes=dict(attributes or {}),
            domain=domain,
            name=self._namer.node(name),
        )

    def _move_on_integers(self, node: ir.Node) -> None:
        """Let a moving node read and write the integers themselves: ``Q → Pad → DQ``."""
        rule = rule_of(node)
        source, output = node.inputs[0], node.outputs[0]
        if rule is None or not rule.on_integers or source is None or source not in self._integers:
            return
        readers = [reader for reader, _ in output.uses()]
        if [r.op_type for r in readers] != ["QuantizeLinear"]:
            return
        q = readers[0]
        if q.inputs[2] is None or q.inputs[2].dtype not in _BYTES:
            return  # onnxruntime pads no 16-bit integers
        written = q.outputs[0]
        node.replace_input_with(0, self._integers[source])
        if node.op_type == "Pad":
            fill = q.inputs[2]
            if len(node.inputs) > 2:
                node.replace_input_with(2, fill)
            else:
                node.resize_inputs(3)
                node.replace_input_with(2, fill)
        written.replace_all_uses_with(output)
        self._graph.remove(q, safe=True)
        output.type = ir.TensorType(written.dtype or ir.DataType.UINT8)

    def _write_layer(self, node: ir.Node, layer: Layer) -> None:
        weight = node.inputs[WEIGHT]
        if weight is None:
            return
        self._replace(node, WEIGHT, f"{weight.name}", layer.integers, layer.affine, layer.axis)
        bias = layer.quantized_bias()
        if bias is None:
            return
        old = node.inputs[BIAS] if len(node.inputs) > BIAS else None
        name = f"{node.name}/bias" if old is None else f"{old.name}"
        grid = Affine(bias.scale, np.zeros(bias.scale.shape, np.int32), layer.affine.grid)
        self._replace(node, BIAS, name, bias.integers, grid, 0 if bias.scale.ndim else None)

    def _replace(
        self,
        node: ir.Node,
        place: int,
        name: str,
        integers: IntArray,
        affine: Affine,
        axis: int | None,
    ) -> None:
        """Put ``integers → DequantizeLinear`` into input ``place`` of ``node``.

        Before a node with 16-bit data onnxruntime would dequantize at every run, or (1.32) take the
        pattern for a weight-only product and round the data to 8 bits. So there, on a CPU, the
        weight is ``(Cast(integers) - z) s``, which onnxruntime computes once, at load.
        """
        stored = self._constant(f"{name}/quant_integer", np.ascontiguousarray(integers))
        real = self._new_value(stored, f"{name}/quant_real", ir.DataType.FLOAT)
        made = (
            self._folded(stored, affine, axis, real, name)
            if self._on_cpu and _has_wide_data(node)
            else [self._dequantize(stored, affine, axis, real, name)]
        )
        self._graph.insert_before(node, made)
        if place >= len(node.inputs):
            node.resize_inputs(place + 1)
        old = node.inputs[place]
        node.replace_input_with(place, real)
        if old is not None and old.is_initializer():
            self._replaced.setdefault(old)

    def _dequantize(
        self, stored: ir.Value, affine: Affine, axis: int | None, real: ir.Value, name: str
    ) -> ir.Node:
        """``real = DequantizeLinear(stored)``."""
        scale = self._constant(f"{name}/quant_scale", affine.scale)
        zero = self._constant(f"{name}/quant_zero_point", affine.zero_point)
        attributes = {} if axis is None else {"axis": axis}
        inputs = [stored, scale, zero]
        return self._node(
            "DequantizeLinear", inputs, real, f"{name}/quant_dq", attributes=attributes
        )

    def _folded(
        self, stored: ir.Value, affine: Affine, axis: int | None, real: ir.Value, name: str
    ) -> list[ir.Node]:
        """``real = (Cast(stored) - z) s``, of constants alone."""
        rank = 0 if stored.shape is None else len(stored.shape)
        shape = () if axis is None else tuple(-1 if i == axis else 1 for i in range(rank))
        value = self._new_value(stored, f"{name}/quant_cast", ir.DataType.FLOAT)
        to = {"to": int(ir.DataType.FLOAT)}
        nodes = [self._node("Cast", [stored], value, f"{name}/quant_cast", attributes=to)]
        if np.any(affine.zero_point):
            zero = np.reshape(affine.zero_point, shape).astype(np.float32)
            operands = [value, self._constant(f"{name}/quant_zero_point", zero)]
            value = self._new_value(stored, f"{name}/quant_centred", ir.DataType.FLOAT)
            nodes.append(self._node("Sub", operands, value, f"{name}/quant_centre"))
        scale = self._constant(f"{name}/quant_scale", np.reshape(affine.scale, shape))
        nodes.append(self._node("Mul", [value, scale], real, f"{name}/quant_multiply"))
        return nodes


def _has_wide_data(node: ir.Node) -> bool:
    """Whether ``node`` reads 16-bit integers through a DequantizeLinear."""
    real = _back_to_dequantize(node)
    dq = None if real is None else real.producer()
    integers = None if dq is None else dq.inputs[0]
    return integers is not None and integers.dtype not in _BYTES


def _back_to_dequantize(node: ir.Node) -> ir.Value | None:
    """The output of the DequantizeLinear that the data of ``node`` come from, moved at most."""
    value = node.inputs[0]
    while value is not None:
        producer = value.producer()
        if producer is None:
            return None
        if producer.op_type == "DequantizeLinear":
            return value
        if producer.op_type not in CLIMBED:
            return None
        value = producer.inputs[0]
    return None


def _leads_to_quantize(node: ir.Node) -> bool:
    """Whether the output of ``node`` goes to a QuantizeLinear alone, moved or clipped at most."""
    value = node.outputs[0]
    while True:
        readers = [reader for reader, _ in value.uses()]
        if value.is_graph_output() or len(readers) != 1:
            return False
        if readers[0].op_type == "QuantizeLinear":
            return True
        if readers[0].op_type not in CLIMBED | {"Clip", "Relu"}:
            return False
        value = readers[0].outputs[0]
