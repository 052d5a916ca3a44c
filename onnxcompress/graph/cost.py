"""What a model costs: parameters, multiply-accumulates (MACs) and bytes, per node and in all.

MACs count the products of contractions; elementwise operators, normalizations and pooling count 0:

    Conv            |Y| · C/g · Πk           (Y: output, C: input channels, g: groups, k: kernel)
    ConvTranspose   |X| · M/g · Πk           (X: input, M: output channels)
    Gemm, MatMul    |Y| · K                  (K: length of the contracted axis)
    Einsum          Π of the lengths of all its axes, times (operands − 1)
    LSTM, GRU, RNN  T · B · D · G·H·(I + H)  (D: directions, G: 4, 3, 1 gates, H: hidden, I: input)
    Attention       B · heads · Sq · Sk · (Dqk + Dv), plus the projection where the node holds one

Quantized forms (QLinear*, *Integer, ``com.microsoft`` fused ones) count like the float operator; a
``DequantizeLinear → Conv → QuantizeLinear`` sandwich counts once because Q and DQ contract nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.optimizer import fold_constants

from onnxcompress.graph.constants import constant_of, stored_tensor

Shape = tuple[int, ...]

# Constants up to this many elements can be shapes, axes or paddings.
_SHAPE_ELEMENTS = 1024


@dataclass(frozen=True, slots=True)
class NodeCost:
    """What one node costs.

    Attributes:
        node: Its name.
        op_type: Its operator.
        parameters: Elements of the weights that it is the first to use (through
            DequantizeLinear, Transpose, ...).
        macs: Multiply-accumulates of one run; None where a shape that they depend on is unknown.
        weight_bytes: Bytes of all constants that it is the first to use, scales and shapes too.
    """

    node: str
    op_type: str
    parameters: int
    macs: int | None
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model costs.

    Attributes:
        parameters: Elements of all weights, each shared one once. Scales, zero points and shapes
            are no weights.
        macs: Multiply-accumulates of one run. Of the branches of an ``If`` the most expensive one
            counts, the body of a ``Loop`` or ``Scan`` once. Nodes of unknown cost count 0.
        weight_bytes: Bytes of all constants, before any compression of the file.
        nodes: One entry per node, subgraphs included, in the order of the graph.
    """

    parameters: int
    macs: int
    weight_bytes: int
    nodes: tuple[NodeCost, ...]

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of contractions whose MACs could not be counted."""
        return tuple(n.node for n in self.nodes if n.macs is None)


def cost_of(model: ir.Model, feeds_shapes: Mapping[str, Shape] | None = None) -> ModelCost:
    """Count parameters, MACs and bytes of ``model``, which is not changed.

    Args:
        model: A model whose functions are inlined.
        feeds_shapes: Shapes of graph inputs by name; otherwise their dynamic axes are 1.
    """
    shapes = probe_shapes(model, feeds_shapes)
    weights = _assign_weights(model)
    costs: dict[ir.Node, NodeCost] = {}
    for node in model.graph.all_nodes():
        parameters, weight_bytes = weights.get(node, (0, 0))
        costs[node] = NodeCost(
            node.name or "", node.op_type, parameters, _node_macs(node, shapes), weight_bytes
        )
    return ModelCost(
        parameters=sum(c.parameters for c in costs.values()),
        macs=_graph_macs(model.graph, costs),
        weight_bytes=sum(c.weight_bytes for c in costs.values()) + _unused_bytes(model),
        nodes=tuple(costs.values()),
    )


# --- shapes --------------------------------------------------------------------------------


def probe_shapes(
    model: ir.Model, feeds_shapes: Mapping[str, Shape] | None = None
) -> dict[ir.Value, Shape]:
    """Static shapes of all values, inferred on a copy whose inputs have fixed shapes.

    Where plain inference stops at shape arithmetic, the copy's constants are folded and inference
    runs again. What is still unknown is taken from the shape stored in ``model``, dynamic axes as
    1. Inference sees no large initializers, so that models above 2 GB work.

    Args:
        model: The model; it is not changed.
        feeds_shapes: Shapes of graph inputs by name; otherwise their dynamic axes are 1.

    Returns:
        Value of ``model`` to shape; values of unknown rank are absent.
    """
    probe = model.clone()
    for value in probe.graph.inputs:
        if value.name in probe.graph.initializers:
            continue
        given = (feeds_shapes or {}).get(value.name or "")
        if given is None and value.shape is not None:
            # Some exporters write a dynamic axis as -1.
            given = tuple(d if isinstance(d, int) and d >= 0 else 1 for d in value.shape)
        if given is not None:
            value.shape = ir.Shape(given)
    for node in probe.graph.all_nodes():
        for output in node.outputs:
            output.shape = None
    _use_standard_forms(probe)
    inferred = _infer(probe)
    if any(v.shape is None or not v.shape.is_static() for v in inferred.values()):
        fold_constants(probe, onnx_shape_inference=True, should_fold=_folds_shape_arithmetic)
        inferred = {**inferred, **_infer(probe)}
    shapes: dict[ir.Value, Shape] = {}
    for value in _values(model):
        tensor = stored_tensor(value)
        found = inferred.get(value.name or "")
        if tensor is not None:
            known: ir.Shape | None = ir.Shape(tensor.shape.numpy())
        else:
            known = value.shape if found is None or found.shape is None else found.shape
        if known is not None:
            shapes[value] = tuple(_axis(known, value.shape, i) for i in range(len(known)))
    return shapes


def _use_standard_forms(probe: ir.Model) -> None:
    """Write packed operators, which inference does not know, as the standard ones they stand for.

    Their packed weights become graph inputs of the unpacked shape.
    """
    for node in list(probe.graph.all_nodes()):
        if node.domain != _MS or node.op_type not in {"MatMulNBits", "GatherBlockQuantized"}:
            continue
        if node.op_type == "MatMulNBits":
            place, standard = 1, "MatMul"
            shape: Shape = (_flag(node, "K"), _flag(node, "N"))
            attributes = []
        else:
            packed = stored_tensor(node.inputs[0]) if node.inputs[0] is not None else None
            if packed is None:
                continue
            *rows, columns = packed.shape.numpy()
            place, standard = 0, "Gather"
            shape = (*rows, columns * _elements_per_code(node, packed))
            attributes = [ir.AttrInt64("axis", _flag(node, "gather_axis"))]
        weight = ir.Value(
            name=f"{node.name}/cost_weight",
            shape=ir.Shape(shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        probe.graph.inputs.append(weight)
        node.replace_input_with(place, weight)
        node.resize_inputs(2)
        node.op_type, node.domain = standard, ""
        node.attributes.clear()
        for attribute in attributes:
            node.attributes.add(attribute)


def _folds_shape_arithmetic(node: ir.Node) -> bool | None:
    """Fold small ConstantOfShape nodes too, as paddings are built from them; None: as usual."""
    if node.op_type != "ConstantOfShape":
        return None
    lengths = constant_of(node.inputs[0])
    return lengths is not None and math.prod(lengths.tolist()) <= _SHAPE_ELEMENTS


def _infer(probe: ir.Model) -> dict[str, ir.Value]:
    """Infer shapes in place; returns the values by name, which is unique in a normalized model."""
    common_passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(probe)
    return {value.name: value for value in _values(probe) if value.name}


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """All values of the model and its subgraphs."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from (v for v in graph.initializers.values() if not v.is_graph_input())
        for node in graph:
            yield from node.outputs


def _axis(known: ir.Shape, stored: ir.Shape | None, index: int) -> int:
    """Length of one axis: as inferred, else as stored in the model, else 1."""
    for shape in (known, stored):
        if shape is not None and len(shape) == len(known):
            length = shape[index]
            if isinstance(length, int) and length >= 0:
                return length
    return 1


# --- MACs --------------------------------------------------------------------------------


def _graph_macs(graph: ir.Graph, costs: Mapping[ir.Node, NodeCost]) -> int:
    total = 0
    for node in graph:
        total += costs[node].macs or 0
        inner = [_graph_macs(g, costs) for g in _subgraphs(node)]
        total += max(inner) if node.op_type == "If" and inner else sum(inner)
    return total


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


class _UnknownShapeError(Exception):
    """A shape that the MACs of a node depend on is unknown."""


class _Shapes:
    """Shapes of one node's inputs and outputs; raises where one is unknown."""

    def __init__(self, node: ir.Node, shapes: Mapping[ir.Value, Shape]) -> None:
        self._node, self._shapes = node, shapes

    def input(self, index: int) -> Shape:
        value = self._node.inputs[index] if index < len(self._node.inputs) else None
        return self._of(value)

    def output(self) -> Shape:
        return self._of(self._node.outputs[0])

    def present(self, index: int) -> bool:
        return index < len(self._node.inputs) and self._node.inputs[index] is not None

    def _of(self, value: ir.Value | None) -> Shape:
        if value is None or value not in self._shapes:
            raise _UnknownShapeError
        return self._shapes[value]


_Rule = Callable[[ir.Node, _Shapes], int]


def _node_macs(node: ir.Node, shapes: Mapping[ir.Value, Shape]) -> int | None:
    rule = _RULES.get((node.domain, node.op_type))
    if rule is None:
        return 0
    try:
        return rule(node, _Shapes(node, shapes))
    except (_UnknownShapeError, IndexError):
        return None


def _conv(weight: int) -> _Rule:
    return lambda node, s: math.prod(s.output()) * math.prod(s.input(weight)[1:])


def _conv_transpose(node: ir.Node, s: _Shapes) -> int:
    return math.prod(s.input(0)) * math.prod(s.input(1)[1:])


def _matmul(right: int = 1, *, transposed: str | None = None) -> _Rule:
    """Rows · columns · K from the operands alone, so that an unknown output shape does no harm.

    Args:
        right: Input index of the second operand.
        transposed: Prefix of the attributes that transpose the operands (``transA``/``transB``).
    """

    def count(node: ir.Node, s: _Shapes) -> int:
        a, b = s.input(0), s.input(right)
        if transposed is not None:
            a = (*a[:-2], a[-1], a[-2]) if _flag(node, f"{transposed}A") and len(a) > 1 else a
            b = (*b[:-2], b[-1], b[-2]) if _flag(node, f"{transposed}B") and len(b) > 1 else b
        rows = a[-2] if len(a) > 1 else 1
        columns = b[-1] if len(b) > 1 else 1
        batch_a, batch_b = a[:-2], b[:-2]
        longest = max(len(batch_a), len(batch_b))
        padded_a = (1,) * (longest - len(batch_a)) + batch_a
        padded_b = (1,) * (longest - len(batch_b)) + batch_b
        batch = math.prod(y if x == 1 else x for x, y in zip(padded_a, padded_b, strict=True))
        return batch * rows * columns * a[-1]

    return count


def _flag(node: ir.Node, name: str) -> int:
    return node.attributes.get_int(name, 0) or 0


def _matmul_nbits(node: ir.Node, s: _Shapes) -> int:
    inner, columns = _flag(node, "K"), _flag(node, "N")
    return math.prod(s.input(0)[:-1]) * inner * columns


def _einsum(node: ir.Node, s: _Shapes) -> int:
    operands = [i for i in range(len(node.inputs)) if node.inputs[i] is not None]
    terms = node.attributes["equation"].as_string().replace(" ", "").split("->")[0].split(",")
    lengths: dict[str, int] = {}
    for index, term in zip(operands, terms, strict=True):
        shape = s.input(index)
        head, dots, tail = term.partition("...")
        hidden = len(shape) - len(head) - len(tail)
        # Ellipsis axes align from the right, like broadcasting.
        names = [*head, *(f"...{hidden - i}" for i in range(hidden if dots else 0)), *tail]
        for name, length in zip(names, shape, strict=True):
            lengths[name] = max(lengths.get(name, 1), length)
    return math.prod(lengths.values()) * (len(operands) - 1)


def _recurrent(node: ir.Node, s: _Shapes) -> int:
    steps_batch = math.prod(s.input(0)[:2])
    if node.op_type == "DynamicQuantizeLSTM":  # W [D, I, 4H], R [D, H, 4H]
        return steps_batch * (math.prod(s.input(1)) + math.prod(s.input(2)))
    return steps_batch * (
        math.prod(s.input(1)) + math.prod(s.input(2))
    )  # W [D, GH, I], R [D, GH, H]


def _attention(node: ir.Node, s: _Shapes) -> int:
    """ai.onnx Attention: Q, K, V as [B, heads, S, D], or [B, S, heads·D] with attributes."""
    q, k, v = s.input(0), s.input(1), s.input(2)
    if len(q) == 4:
        past = s.input(4)[2] if s.present(4) else 0
        return q[0] * q[1] * q[2] * (k[2] + past) * (q[3] + v[3])
    heads, kv_heads = _flag(node, "q_num_heads"), max(_flag(node, "kv_num_heads"), 1)
    past = s.input(4)[2] if s.present(4) else 0
    return q[0] * q[1] * (k[1] + past) * (q[2] + heads * (v[2] // kv_heads))


def _fused_attention(node: ir.Node, s: _Shapes) -> int:
    """com.microsoft Attention: X [B, S, I] times the packed weight [I, 3·H], then two products."""
    batch, steps, _ = s.input(0)
    hidden = s.input(1)[1] // 3
    return batch * steps * math.prod(s.input(1)) + 2 * batch * steps * steps * hidden


def _multi_head_attention(node: ir.Node, s: _Shapes) -> int:
    """com.microsoft MultiHeadAttention with separate Q [B, Sq, H], K and V [B, Sk, H]."""
    q, k, v = s.input(0), s.input(1), s.input(2)
    return q[0] * q[1] * k[1] * (q[2] + v[2])


_MS = "com.microsoft"
_RULES: Mapping[tuple[str, str], _Rule] = {
    ("", "Conv"): _conv(1),
    ("", "ConvInteger"): _conv(1),
    ("", "QLinearConv"): _conv(3),
    ("", "DeformConv"): _conv(1),
    ("", "ConvTranspose"): _conv_transpose,
    ("", "Gemm"): _matmul(transposed="trans"),
    ("", "MatMul"): _matmul(),
    ("", "MatMulInteger"): _matmul(),
    ("", "QLinearMatMul"): _matmul(3),
    ("", "Einsum"): _einsum,
    ("", "LSTM"): _recurrent,
    ("", "GRU"): _recurrent,
    ("", "RNN"): _recurrent,
    ("", "Attention"): _attention,
    (_MS, "FusedConv"): _conv(1),
    (_MS, "QLinearConv"): _conv(3),
    (_MS, "FusedGemm"): _matmul(transposed="trans"),
    (_MS, "QGemm"): _matmul(3, transposed="trans"),
    (_MS, "FusedMatMul"): _matmul(transposed="trans"),
    (_MS, "MatMulIntegerToFloat"): _matmul(),
    (_MS, "DynamicQuantizeMatMul"): _matmul(),
    (_MS, "MatMulNBits"): _matmul_nbits,
    (_MS, "DynamicQuantizeLSTM"): _recurrent,
    (_MS, "Attention"): _fused_attention,
    (_MS, "QAttention"): _fused_attention,
    (_MS, "MultiHeadAttention"): _multi_head_attention,
}


# --- parameters and bytes ----------------------------------------------------------------------

# Input positions that hold scales, zero points, bounds and paddings: constants, but no weights.
_AUXILIARY: Mapping[str, frozenset[int]] = {
    "QuantizeLinear": frozenset({1, 2}),
    "DequantizeLinear": frozenset({1, 2}),
    "QLinearConv": frozenset({1, 2, 4, 5, 6, 7}),
    "QLinearMatMul": frozenset({1, 2, 4, 5, 6, 7}),
    "QGemm": frozenset({1, 2, 4, 5, 7, 8}),
    "ConvInteger": frozenset({2, 3}),
    "MatMulInteger": frozenset({2, 3}),
    "MatMulIntegerToFloat": frozenset({2, 3, 4, 5}),
    "DynamicQuantizeMatMul": frozenset({2, 3}),
    "DynamicQuantizeLSTM": frozenset({8, 9, 10, 11}),
    "QAttention": frozenset({3, 4, 6, 7}),
    "MatMulNBits": frozenset({2, 3, 4}),
    "GatherBlockQuantized": frozenset({2, 3}),
    "QLinearAdd": frozenset({1, 2, 4, 5, 6, 7}),
    "QLinearMul": frozenset({1, 2, 4, 5, 6, 7}),
    "QLinearSigmoid": frozenset({1, 2, 3, 4}),
    "QLinearLeakyRelu": frozenset({1, 2, 3, 4}),
    "QLinearSoftmax": frozenset({1, 2, 3, 4}),
    "QLinearGlobalAveragePool": frozenset({1, 2, 3, 4}),
    "QLinearAveragePool": frozenset({1, 2, 3, 4}),
    "Clip": frozenset({1, 2}),
    "Pad": frozenset({1, 2, 3}),
    "Resize": frozenset({1, 2, 3}),
    "Upsample": frozenset({1}),
    "Dropout": frozenset({1, 2}),
    "Range": frozenset({0, 1, 2}),
    "OneHot": frozenset({1, 2}),
}
# Operators whose integer data is a weight in quantized form: an int32 there is a bias.
_QUANTIZED_DATA = frozenset({"DequantizeLinear", "QLinearConv", "QGemm", "QAttention"})
_NARROW = frozenset(
    getattr(ir.DataType, name)
    for name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
    if hasattr(ir.DataType, name)
)


def _is_weight(node: ir.Node, index: int, tensor: ir.TensorProtocol) -> bool:
    """Whether the constant at input ``index`` of ``node`` is a weight in this use."""
    if index in _AUXILIARY.get(node.op_type, frozenset()):
        return False
    if tensor.dtype.is_floating_point():
        return True
    if tensor.dtype in _NARROW:
        return True
    return node.op_type in _QUANTIZED_DATA and tensor.dtype in (
        ir.DataType.INT32,
        ir.DataType.INT16,
        ir.DataType.UINT16,
    )


def _assign_weights(model: ir.Model) -> dict[ir.Node, tuple[int, int]]:
    """Give every constant to its first user; nodes fed by constants alone pass theirs on.

    Returns:
        Node to (parameters, bytes).
    """
    held: dict[ir.Node, tuple[int, int]] = {}
    pending: dict[ir.Value, tuple[int, int]] = {}  # outputs of constant-only nodes
    counted_data: set[ir.Value] = set()
    counted_bytes: set[ir.Value] = set()
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and node.domain == "":
            continue
        parameters = size_bytes = 0
        inputs = [(i, v) for i, v in enumerate(node.inputs) if v is not None]
        plumbing = bool(inputs) and not _subgraphs(node)
        for index, value in inputs:
            tensor = stored_tensor(value)
            if tensor is not None:
                if value not in counted_bytes:
                    counted_bytes.add(value)
                    size_bytes += tensor.nbytes
                if value not in counted_data and _is_weight(node, index, tensor):
                    counted_data.add(value)
                    parameters += _elements(node, tensor)
            elif value in pending:
                more_parameters, more_bytes = pending[value]
                pending[value] = (0, 0)
                parameters, size_bytes = parameters + more_parameters, size_bytes + more_bytes
            else:
                plumbing = False
        # A graph output or a second constant path must not lose the counts.
        if plumbing and any(output.uses() for output in node.outputs):
            used = next(output for output in node.outputs if output.uses())
            pending.update(dict.fromkeys(node.outputs, (0, 0)))
            pending[used] = (parameters, size_bytes)
        else:
            held[node] = (parameters, size_bytes)
    return held


def _elements(node: ir.Node, tensor: ir.TensorProtocol) -> int:
    """Number of weights in a tensor: some operators pack several into one byte."""
    return int(tensor.size) * _elements_per_code(node, tensor)


def _elements_per_code(node: ir.Node, tensor: ir.TensorProtocol) -> int:
    """Weights in one element of a packed tensor."""
    packs = node.op_type in {"MatMulNBits", "GatherBlockQuantized"}
    if not packs or tensor.dtype != ir.DataType.UINT8:
        return 1
    return 8 // (node.attributes.get_int("bits", 4) or 4)


def _unused_bytes(model: ir.Model) -> int:
    """Bytes of initializers that no node reads; they are in the file all the same."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and not value.uses()
    )
