"""Write dynamic forms into a model; :mod:`.dynamic_rules` says which node can take which.

With int8 weights ``Q`` and scales ``s`` per output, for ``y = x W + b``:

    TENSOR   q, t, z = DynamicQuantizeLinear(x);  y = Cast(MatMulInteger(q, Q, z)) · (t s) + b
    BLOCKS   y = MatMulNBits(x, Q, s, b), with a scale per block of K
    CONV     as TENSOR with ConvInteger
    LSTM     DynamicQuantizeLSTM(x, Qw, Qr, ..., sw, sr)
    STORED   W = Cast(Q) · s, which onnxruntime computes once at load

onnxruntime fuses the operators of TENSOR to DynamicQuantizeMatMul; they are all standard. Data that
several products read are rounded once. Weights stay in the graph that owned the float ones, so a
weight that two branches share stays shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import Array, constant_of, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.numerics import blockwise
from onnxcompress.numerics.affine import Affine, Grid, quantize, weight_affine
from onnxcompress.passes._layout import Layout, row_axes
from onnxcompress.passes.quant.constant_chains import drop_unread
from onnxcompress.passes.quant.dynamic_rules import (
    FloatMatrix,
    Form,
    Product,
    product_of,
    weight_places,
)

_MICROSOFT = "com.microsoft"
_BLOCK_LENGTHS = (128, 64, 32)
_EXACT_CODES = 4
"""accuracy_level of MatMulNBits that multiplies in 8 bits."""

_NOT_FOR_LSTM = frozenset({"layout", "output_sequence"})


Memory = dict[tuple[str, bool, float], blockwise.Blocks]
"""Weights rounded in blocks, by name, and whether and how they were transposed and scaled."""


def write_forms(
    model: ir.Model, forms: Mapping[str, Form], grid: Grid, memory: Memory | None = None
) -> frozenset[str]:
    """Write ``forms`` into ``model``, in place.

    Args:
        model: The model; nodes are found by name, in subgraphs too.
        forms: Node name to a form that its rule allows.
        grid: The grid of weights. Blocks always use all 8 bits: their kernel cannot overflow.
        memory: Rounded weights of earlier versions of the same model; those made are added.

    Returns:
        The nodes that were really changed: a stored weight that a node in another form reads as
        well stays as it is.
    """
    writer = _Writer(model, grid, {} if memory is None else memory)
    nodes = {node.name: node for node in model.graph.all_nodes() if node.name in forms}
    done = set()
    for name, node in nodes.items():
        form = forms[name or ""]
        if form is not Form.STORED:
            writer.write(node, form)
            done.add(name or "")
    stored = {node for name, node in nodes.items() if forms[name or ""] is Form.STORED}
    done |= {node.name or "" for node in stored if writer.store(node, stored)}
    drop_unread(model)
    model.graph.sort()
    return frozenset(done)


class _Writer:
    def __init__(self, model: ir.Model, grid: Grid, memory: Memory) -> None:
        self._model, self._grid, self._namer = model, grid, Namer(model)
        self._memory = memory
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._rounded_in: dict[ir.Value, ir.Graph | ir.Function | None] = {}
        self._constants: dict[tuple[object, ...], tuple[ir.Value, ...]] = {}

    def write(self, node: ir.Node, form: Form) -> None:
        """Replace ``node`` by its form; STORED is done by :meth:`store`."""
        if form is Form.LSTM:
            self._lstm(node)
        elif form is Form.CONV:
            self._conv(node)
        else:
            product = product_of(node)
            if isinstance(product, str):
                raise ValueError(f"{node.op_type} '{node.name}' is no product: {product}")
            self._product(product, form)

    # --- products --------------------------------------------------------------------------------

    def _product(self, product: Product, form: Form) -> None:
        # Everything goes where the result is made: there data and bias are known.
        place = product.result.producer() or product.node
        data, name = product.data, product.node.name or ""
        if product.squeezed:
            data = self._squeeze(place, name, data, product.squeezed, "Squeeze")
        write = self._by_blocks if form is Form.BLOCKS else self._by_tensor
        result = write(product, place, data)
        if product.squeezed:
            result = self._squeeze(place, name, result, product.squeezed, "Unsqueeze")
        self._take_over(product.result, result)

    def _by_tensor(self, product: Product, place: ir.Node, data: ir.Value) -> ir.Value:
        name = product.node.name or ""
        rounded, step, zero = self._round(place, data)
        key = (product.weight, product.transposed, product.factor)
        if key not in self._constants:
            integers, affine = self._rows(product.matrix().T)
            self._constants[key] = (
                self._constant(product.weight, "integer", integers.T),
                self._constant(product.weight, "scale", affine.scale),
            )
        weight, scale = self._constants[key]
        sums = self._add(place, "MatMulInteger", [rounded, weight, zero], name, "sums")
        result = self._scaled(place, name, sums, step, scale)
        if product.bias is None:
            return result
        return self._add(place, "Add", [result, self._row(product)], name, "biased")

    def _by_blocks(self, product: Product, place: ir.Node, data: ir.Value) -> ir.Value:
        key = (product.weight, product.transposed, product.factor, Form.BLOCKS)
        blocks = self._blocks(product)
        if key not in self._constants:
            self._constants[key] = (
                self._constant(product.weight, "codes", blocks.codes),
                self._constant(product.weight, "scale", blocks.scale),
            )
        inputs: list[ir.Value | None] = [data, *self._constants[key]]
        if product.bias is not None and product.row:
            inputs += [None, None, self._row(product)]
        attributes = {
            "K": blocks.columns,
            "N": len(blocks.codes),
            "bits": 8,
            "block_size": blocks.block,
            "accuracy_level": _EXACT_CODES,
        }
        name = product.node.name or ""
        result = self._add(place, "MatMulNBits", inputs, name, "product", attributes, _MICROSOFT)
        rest = None if product.row else product.bias
        return result if rest is None else self._add(place, "Add", [result, rest], name, "biased")

    def _blocks(self, product: Product) -> blockwise.Blocks:
        key = (product.weight.name or "", product.transposed, product.factor)
        if key not in self._memory:
            rows = np.ascontiguousarray(product.matrix().T)
            self._memory[key] = blockwise.fitted(
                rows, bits=8, block=block_length(rows.shape[1]), symmetric=True
            )
        return self._memory[key]

    def _row(self, product: Product) -> ir.Value:
        """The bias; as [N] if it is a row of another rank."""
        if (bias := product.bias) is None:
            raise ValueError(f"{product.node.op_type} '{product.node.name}' has no bias")
        array = constant_of(bias) if product.row else None
        if array is None or array.ndim == 1:
            return bias
        key = (bias, "row")
        if key not in self._constants:
            self._constants[key] = (self._constant(bias, "row", array.reshape(-1)),)
        return self._constants[key][0]

    def _squeeze(
        self, place: ir.Node, name: str, value: ir.Value, axes: tuple[int, ...], op_type: str
    ) -> ir.Value:
        if self._model.opset_imports.get("", 0) < 13:
            return self._add(place, op_type, [value], name, op_type.lower(), {"axes": axes})
        key = ("axes", axes, place.graph)
        if key not in self._constants:
            wanted = self._namer.value(f"{name}/quant_axes")
            made = set_initializer(_graph(place), wanted, np.array(axes, np.int64))
            self._constants[key] = (made,)
        return self._add(place, op_type, [value, *self._constants[key]], name, op_type.lower())

    # --- Conv, LSTM ------------------------------------------------------------------------------

    def _conv(self, node: ir.Node) -> None:
        data, weight = _required(node, 0), _required(node, 1)
        name = node.name or ""
        rounded, step, zero = self._round(node, data)
        if (weight, Form.CONV) not in self._constants:
            array = np.asarray(constant_of(weight), np.float32)
            integers, affine = self._rows(array.reshape(len(array), -1))
            scale = affine.scale.reshape(-1, *[1] * (array.ndim - 2))
            self._constants[weight, Form.CONV] = (
                self._constant(weight, "integer", integers.reshape(array.shape)),
                self._constant(weight, "scale", scale),
            )
        integer, scale_value = self._constants[weight, Form.CONV]
        made = ir.Node(
            "",
            "ConvInteger",
            [rounded, integer, zero],
            list(node.attributes.values()),
            name=self._namer.node(f"{name}/quant_sums"),
        )
        sums = self._placed(node, made, f"{name}/quant_sums_value")
        result = self._scaled(node, name, sums, step, scale_value)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            spread = [-1, *[1] * (np.asarray(constant_of(scale_value)).ndim - 1)]
            known = constant_of(bias)
            if known is not None:
                column = self._constant(bias, "column", known.reshape(spread))
            else:
                shape = self._constant(weight, "column_shape", np.array(spread, np.int64))
                column = self._add(node, "Reshape", [bias, shape], name, "column")
            result = self._add(node, "Add", [result, column], name, "biased")
        self._take_over(node.outputs[0], result)

    def _lstm(self, node: ir.Node) -> None:
        inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
        for place in weight_places(node):
            weight = _required(node, place)
            key = (weight, Form.LSTM)
            if key not in self._constants:
                array = np.asarray(constant_of(weight), np.float32)
                rows = array.shape[:2]
                integers, affine = self._rows(array.reshape(-1, array.shape[2]))
                turned = integers.reshape(array.shape).transpose(0, 2, 1)
                self._constants[key] = (
                    self._constant(weight, "integer", turned),
                    self._constant(weight, "scale", affine.scale.reshape(rows)),
                    self._constant(weight, "zero_point", affine.zero_point.reshape(rows)),
                )
            integer, scale, zero = self._constants[key]
            inputs[place] = integer
            inputs += [scale, zero]
        made = ir.Node(
            _MICROSOFT,
            "DynamicQuantizeLSTM",
            inputs,
            [a for a in node.attributes.values() if a.name not in _NOT_FOR_LSTM],
            num_outputs=len(node.outputs),
            name=self._namer.node(f"{node.name}/quant_lstm"),
        )
        self._model.opset_imports.setdefault(_MICROSOFT, 1)
        _graph(node).insert_before(node, made)
        for old, new in zip(node.outputs, made.outputs, strict=True):
            self._take_over(old, new)

    # --- weights alone ---------------------------------------------------------------------------

    def store(self, node: ir.Node, stored: set[ir.Node]) -> bool:
        """Store the weights of ``node`` in 8 bits; False where another form needs one in float."""
        weights = [_required(node, place) for place in weight_places(node)]
        if any(user not in stored for weight in weights for user, _ in weight.uses()):
            return False
        for place, weight in zip(weight_places(node), weights, strict=True):
            array = constant_of(weight)
            if array is None or array.dtype != np.float32:
                continue  # another node has stored it already
            rows = row_axes(node, place, array.ndim)
            if rows is None or not weight.is_initializer():
                continue
            self._store(weight, Layout(tuple(array.shape), rows), np.asarray(array, np.float32))
        return True

    def _store(self, weight: ir.Value, layout: Layout, array: FloatMatrix) -> None:
        integers, affine = self._rows(np.asarray(layout.matrix(array), np.float32))
        codes = self._constant(weight, "integer", layout.tensor(integers))
        scale = self._constant(weight, "scale", affine.scale.reshape(layout.per_row))
        graph, name = _owner(weight), weight.name or ""
        cast = ir.node(
            "Cast",
            [codes],
            {"to": int(ir.DataType.FLOAT)},
            name=self._namer.node(f"{name}/quant_cast"),
        )
        scaled = ir.node(
            "Mul", [cast.outputs[0], scale], name=self._namer.node(f"{name}/quant_scaled")
        )
        for made in (cast, scaled):
            made.outputs[0].name = self._namer.value(f"{made.name}_value")
            made.outputs[0].type, made.outputs[0].shape = weight.type, weight.shape
        graph.insert_before(graph[0], [cast, scaled])
        weight.replace_all_uses_with(scaled.outputs[0])

    # --- small parts -----------------------------------------------------------------------------

    def _rows(self, matrix: FloatMatrix) -> tuple[Array, Affine]:
        # Clipping the largest weights of a row gains less than 0.2 dB with 8 bits.
        affine = weight_affine(np.abs(matrix).max(axis=1, initial=0.0), self._grid)
        return quantize(matrix, affine, 0), affine

    def _round(self, place: ir.Node, data: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Integers, scale and zero point of ``data``, made once per graph."""
        if self._rounded_in.get(data) is not place.graph:
            name = data.name or ""
            made = ir.node(
                "DynamicQuantizeLinear",
                [data],
                num_outputs=3,
                name=self._namer.node(f"{name}/quant_round"),
            )
            dtypes = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            for output, role, dtype in zip(
                made.outputs, ("rounded", "step", "zero"), dtypes, strict=True
            ):
                output.name = self._namer.value(f"{name}/quant_{role}")
                output.type = ir.TensorType(dtype)
                output.shape = data.shape if role == "rounded" else ir.Shape([])
            _graph(place).insert_before(place, made)
            integers, step, zero = made.outputs
            self._rounded[data], self._rounded_in[data] = (integers, step, zero), place.graph
        return self._rounded[data]

    def _scaled(
        self, place: ir.Node, name: str, sums: ir.Value, step: ir.Value, scale: ir.Value
    ) -> ir.Value:
        sums.type = ir.TensorType(ir.DataType.INT32)
        attributes = {"to": int(ir.DataType.FLOAT)}
        real = self._add(place, "Cast", [sums], name, "real", attributes)
        both = self._add(place, "Mul", [step, scale], name, "scale")
        return self._add(place, "Mul", [real, both], name, "scaled")

    def _add(
        self,
        place: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        role: str,
        attributes: Mapping[str, int | Sequence[int]] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """A node before ``place`` and its named output."""
        made = ir.node(
            op_type,
            list(inputs),
            attributes,
            domain=domain,
            name=self._namer.node(f"{name}/quant_{role}"),
        )
        if domain:
            self._model.opset_imports.setdefault(domain, 1)
        return self._placed(place, made, f"{name}/quant_{role}_value")

    def _placed(self, place: ir.Node, made: ir.Node, name: str) -> ir.Value:
        made.outputs[0].name = self._namer.value(name)
        made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        _graph(place).insert_before(place, made)
        return made.outputs[0]

    def _constant(self, source: ir.Value, role: str, array: Array) -> ir.Value:
        """An initializer beside ``source``, in the graph that owns it."""
        name = self._namer.value(f"{source.name}/quant_{role}")
        return set_initializer(_owner(source), name, np.ascontiguousarray(array))

    def _take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let ``new`` stand for ``old`` under its name; what made ``old`` is left unread."""
        name = old.name
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None if not name else self._namer.value(f"{name}/quant_before")
        new.name = name


def block_length(columns: int) -> int:
    """The longest block whose filling costs at most a tenth more bytes than the shortest does."""
    sizes = {b: -(-columns // b) * (b + 4) for b in _BLOCK_LENGTHS}
    least = min(sizes.values())
    return next(b for b in _BLOCK_LENGTHS if sizes[b] <= 1.1 * least)


def _graph(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise TypeError(f"{node.op_type} '{node.name}' is in no graph")
    return node.graph


def _owner(value: ir.Value) -> ir.Graph:
    producer = value.producer()
    graph = value.graph if producer is None else producer.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"the constant '{value.name}' is in no graph")
    return graph


def _required(node: ir.Node, place: int) -> ir.Value:
    if (value := node.inputs[place]) is None:
        raise ValueError(f"{node.op_type} '{node.name}' lacks its input {place}")
    return value
