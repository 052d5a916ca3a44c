"""Which axes are static: the model evaluated twice with primes for its dynamic dimensions.

Every dynamic dimension of the inputs is set to a prime, shapes are inferred node by node and what
depends on shapes and constants alone is computed. This is done twice with different primes: a
length (or a computed constant) that is equal both times is static, anything else is dynamic. Plain
symbolic inference gives up at the first ``Shape -> Gather -> Concat -> Reshape``; this does not.

Two more evaluations, with 1 and with large primes for every dynamic dimension, can only refute: a
model may ask whether its batch is 1 (Squeeze does), or clamp a length to a maximum. What such an
evaluation finds different is dynamic after all; where it gets stuck, it says nothing.

Nothing large is ever computed: weights take part with their shapes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcompress.graph.constants import constant_tensor
from onnxcompress.graph.foreign import output_shapes, standard_form

Array = npt.NDArray[np.generic]
Dims = tuple[int | None, ...]

# Larger constants are never computed: 64 k elements hold any mask or padding of a probe.
MAX_ELEMENTS = 65_536
# Float constants above this size are weights: folding those is not our business.
_MAX_FLOAT_ELEMENTS = 64

# Two sets of lengths, tried in turn until every node's shapes can be inferred. Primes keep
# dimensions apart in Reshape; below 512 they stay within tables of positions; multiples of 64 suit
# networks that halve and double (U-Net), the small set suits short tables.
_PRIMES = (
    (211, 223, 227, 229, 233, 239, 241, 251, 257, 263, 269, 271, 277, 281, 283, 293),
    (307, 311, 313, 317, 331, 337, 347, 349, 353, 359, 367, 373, 379, 383, 389, 397),
)
_SMALL = (
    (29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97),
    (17, 19, 23, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163),
)
_REFUTING = ((1,), (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069))
_SIXTY_FOURS = tuple(
    tuple(64 * p for p in (5, 7, 11, 13, 3, 2, 17, 19)[::step]) for step in (1, -1)
)

_NOT_COMPUTED = frozenset(
    {
        "Bernoulli", "DequantizeLinear", "DynamicQuantizeLinear", "Dropout", "If", "Loop",
        "Multinomial", "QuantizeLinear", "RandomNormal", "RandomNormalLike", "RandomUniform",
        "RandomUniformLike", "Scan", "SequenceMap",
    }
)  # fmt: skip

# Operators without shape inference of their own that keep the shape of their first input.
_SHAPE_KEPT = frozenset({"GroupNormalization"})

# What the operators of onnx.reference raise on operands they cannot handle.
_EVALUATION_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError,
    NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip

_INFERENCE_ERRORS = (
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    onnx.defs.SchemaError,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Shapes:
    """Shapes and computed constants of a model.

    Attributes:
        probes: For each of the two evaluations, value to concrete shape; None where a length is
            unknown. Values of unknown rank are absent.
        constants: Value to array, for what is equal in all evaluations (initializers left out).
        static: Value to static lengths, None for dynamic axes. Values of unknown rank are absent.
    """

    probes: tuple[Mapping[ir.Value, Dims], Mapping[ir.Value, Dims]]
    constants: Mapping[ir.Value, Array]
    static: Mapping[ir.Value, Dims]

    def of(self, value: ir.Value | None) -> Dims | None:
        """The static shape of ``value``: None for dynamic axes; None if the rank is unknown."""
        return None if value is None else self.static.get(value)


def probe(model: ir.Model) -> Shapes:
    """Find the static axes of every value of ``model``, subgraphs included; it is not changed.

    Args:
        model: A normalized model.
    """
    best: tuple[int, list[_Evaluation]] | None = None
    for lengths, by_position in (
        (_PRIMES, False), (_PRIMES, True), (_SIXTY_FOURS, True), (_SMALL, False), (_SMALL, True),
    ):  # fmt: skip
        pair = [_Evaluation(model, _input_dims(model, one, by_position)) for one in lengths]
        failures = sum(one.failures for one in pair)
        if best is None or failures < best[0]:
            best = failures, pair
        if failures == 0:
            break
    assert best is not None  # noqa: S101 - the loop runs at least once
    first, second = best[1]
    doubts: list[_Evaluation] = []
    if any(None in _stored(value) for value in model.graph.inputs):
        doubts = [_Evaluation(model, _input_dims(model, one, False)) for one in _REFUTING]
    constants = {
        value: array
        for value, array in first.computed.items()
        if not value.is_initializer()
        and value in second.computed
        and _same(array, second.computed[value])
        and all(_same(array, d.computed[value]) for d in doubts if value in d.computed)
    }
    static: dict[ir.Value, Dims] = {}
    for value, shape in first.shapes.items():
        found = _agreed(shape, second.shapes.get(value), [d.shapes.get(value) for d in doubts])
        if found is not None:
            static[value] = found
    return Shapes((first.shapes, second.shapes), constants, static)


def _agreed(first: Dims, second: Dims | None, doubts: Sequence[Dims | None]) -> Dims | None:
    """The lengths that all evaluations agree on; None if the ranks differ."""
    if second is None or len(first) != len(second):
        return None
    if any(d is not None and len(d) != len(first) for d in doubts):
        return None
    lengths = [a if a == b else None for a, b in zip(first, second, strict=True)]
    for doubt in doubts:
        for axis, length in enumerate(doubt or ()):
            if length is not None and length != lengths[axis]:
                lengths[axis] = None
    return tuple(lengths)


def _stored(value: ir.Value) -> Dims:
    """The shape of a graph input as the model gives it; dynamic axes are None."""
    return tuple(d if isinstance(d, int) and d >= 0 else None for d in value.shape or ())


def _same(a: Array, b: Array) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
    )


def _input_dims(model: ir.Model, lengths: Sequence[int], by_position: bool) -> dict[ir.Value, Dims]:
    """A length for every dynamic axis of the inputs: one per name, or one per axis number."""
    chosen: dict[object, int] = {}
    dims: dict[ir.Value, Dims] = {}
    for value in model.graph.inputs:
        if value.shape is None:
            continue
        shape: list[int] = []
        for axis, d in enumerate(value.shape):
            if isinstance(d, int) and d >= 0:
                shape.append(d)
                continue
            name = None if isinstance(d, int) else d.value
            key: object = axis if by_position else (name or (value, axis))
            shape.append(chosen.setdefault(key, lengths[len(chosen) % len(lengths)]))
        dims[value] = tuple(shape)
    return dims


@dataclass(slots=True)
class _Evaluation:
    """One walk through the model with fixed input lengths."""

    model: ir.Model
    shapes: dict[ir.Value, Dims]
    hypothesis: Hypothesis | None = None
    computed: dict[ir.Value, Array] = field(default_factory=dict)
    failures: int = 0
    _types: dict[ir.Value, onnx.TypeProto] = field(default_factory=dict)
    _tensors: dict[ir.Value, onnx.TensorProto] = field(default_factory=dict)
    _results: dict[bytes, list[Array] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._opsets = [
            onnx.helper.make_opsetid(domain, version)
            for domain, version in self.model.opset_imports.items()
        ]
        self._versions = dict(self.model.opset_imports)
        self._graph(self.model.graph)

    _opsets: list[onnx.OperatorSetIdProto] = field(init=False)
    _versions: dict[str, int] = field(init=False)

    def _graph(self, graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            tensor = constant_tensor(value)
            if tensor is None:
                continue
            self.shapes[value] = tuple(int(d) for d in tensor.shape.numpy())
            if _is_small(tensor):
                self.computed[value] = tensor.numpy()
        for node in graph:
            self._node(node)

    def _node(self, node: ir.Node) -> None:
        for branch in _branches(node):
            self._graph(branch)
        if node.op_type == "If" and node.domain == "":
            self._join(node)
            return
        proto = ir.serde.serialize_node(node) if not _has_graph(node) else None
        types = None if proto is None else self._infer(node, proto)
        if node.op_type in _SHAPE_KEPT and node.domain == "" and node.inputs[0] in self.shapes:
            self.shapes[node.outputs[0]] = self.shapes[node.inputs[0]]
        for output in node.outputs:
            self._settle(output, None if types is None else types.get(output.name or ""))
        if types is None:
            self._foreign(node)
            self._squeezed(node)
        if proto is not None:
            self._compute(node, proto)

    def _foreign(self, node: ir.Node) -> None:
        """An operator that onnx does not know: its shapes, and the type of its first input."""
        dims = [None if v is None else self.shapes.get(v) for v in node.inputs]
        for output, shape in zip(node.outputs, output_shapes(node, dims) or (), strict=False):
            if shape is None:
                continue
            known = self.shapes.get(output, (None,) * len(shape))
            if len(known) == len(shape):
                both = zip(known, shape, strict=True)
                self.shapes[output] = tuple(a if b is None else b for a, b in both)
            first = node.inputs[0]
            kind = None if first is None else self._type(first)
            if output.dtype is None and kind is not None:
                self._types[output] = _tensor_type(kind.tensor_type.elem_type, shape)

    def _squeezed(self, node: ir.Node) -> None:
        """A Squeeze of an axis that is not of length one here: on a run that succeeds it is."""
        before = self.shapes.get(node.inputs[0]) if node.inputs and node.inputs[0] else None
        if node.op_type != "Squeeze" or node.domain != "" or before is None:
            return
        axes = node.attributes.get_ints("axes")
        if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
            given = self.computed.get(node.inputs[1])
            axes = None if given is None else [int(a) for a in np.ravel(given)]
        if axes is not None and node.outputs[0] not in self.shapes:
            gone = {a % len(before) for a in axes}
            self.shapes[node.outputs[0]] = tuple(
                d for axis, d in enumerate(before) if axis not in gone
            )

    def _take(self, node: ir.Node) -> bool:
        """Hand on the results of the branch that an If takes in a hypothesis."""
        taken = self.hypothesis.taken(node, self.computed) if self.hypothesis else None
        if taken is None:
            return False
        for output, result in zip(node.outputs, _branches(node)[taken].outputs, strict=True):
            if result in self.shapes:
                self.shapes[output] = self.shapes[result]
            if result in self.computed:
                self.computed[output] = self.computed[result]
        return True

    def _join(self, node: ir.Node) -> None:
        """An If: a length that both branches agree on is known."""
        if self._take(node):
            return
        branches = _branches(node)
        for index, output in enumerate(node.outputs):
            shapes = [self.shapes.get(branch.outputs[index]) for branch in branches]
            if any(s is None or len(s) != len(shapes[0] or ()) for s in shapes):
                continue
            self.shapes[output] = tuple(
                lengths[0] if len(set(lengths)) == 1 else None
                for lengths in zip(*(s for s in shapes if s is not None), strict=True)
            )

    def _infer(self, node: ir.Node, proto: onnx.NodeProto) -> dict[str, onnx.TypeProto] | None:
        plain = standard_form(proto)
        domain, op_type = (node.domain, node.op_type) if plain is None else ("", plain.op_type)
        version = self._versions.get(domain)
        if version is None or not onnx.defs.has(op_type, version, domain):
            return None
        schema = onnx.defs.get_schema(op_type, version, domain)
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for value in node.inputs:
            if value is None:
                continue
            kind = self._type(value)
            if kind is None:
                return None
            types[value.name or ""] = kind
            if value in self.computed:
                data[value.name or ""] = self._tensor(value)
        try:
            return dict(
                onnx.shape_inference.infer_node_outputs(
                    schema, plain or proto, types, data, None, self._opsets, self.model.ir_version
                )
            )
        except _INFERENCE_ERRORS:
            self.failures += 1
            return None

    def _settle(self, output: ir.Value, kind: onnx.TypeProto | None) -> None:
        """Take the inferred shape, completed by the static lengths stored in the model."""
        stored: Dims | None = None
        if output.shape is not None:
            stored = tuple(d if isinstance(d, int) and d >= 0 else None for d in output.shape)
        if kind is None or not kind.HasField("tensor_type"):
            if stored is not None:
                self.shapes.setdefault(output, stored)
            return
        if kind.tensor_type.HasField("shape"):
            dims: Dims = tuple(
                int(d.dim_value) if d.HasField("dim_value") else None
                for d in kind.tensor_type.shape.dim
            )
            if stored is not None and len(stored) == len(dims):
                dims = tuple(s if d is None else d for d, s in zip(dims, stored, strict=True))
            self.shapes[output] = dims
        elif stored is not None:
            self.shapes.setdefault(output, stored)
        if output.dtype is None and kind.tensor_type.elem_type:
            # Types inferred here let inference go on where the model stores none.
            self._types[output] = _tensor_type(kind.tensor_type.elem_type, self.shapes.get(output))

    def _type(self, value: ir.Value) -> onnx.TypeProto | None:
        kind = self._types.get(value)
        if kind is None:
            tensor = constant_tensor(value)
            dtype = value.dtype if tensor is None else tensor.dtype
            if dtype is None or (
                value.type is not None and not isinstance(value.type, ir.TensorType)
            ):
                return None
            kind = self._types[value] = _tensor_type(int(dtype), self.shapes.get(value))
        return kind

    def _tensor(self, value: ir.Value) -> onnx.TensorProto:
        tensor = self._tensors.get(value)
        if tensor is None:
            tensor = numpy_helper.from_array(
                np.ascontiguousarray(self.computed[value]).reshape(self.computed[value].shape)
            )
            self._tensors[value] = tensor
        return tensor

    def _compute(self, node: ir.Node, proto: onnx.NodeProto) -> None:
        if node.domain != "" or node.op_type in _NOT_COMPUTED or not node.outputs:
            return
        if node.op_type in {"Shape", "Size"}:
            self._measure(node)
            return
        inputs = [v for v in node.inputs if v is not None]
        if not inputs or not all(v in self.computed for v in inputs):
            return
        for output in node.outputs:
            dims = self.shapes.get(output)
            if (
                dims is None
                or None in dims
                or np.prod([d or 0 for d in dims], dtype=float) > MAX_ELEMENTS
            ):
                return
        results = self._evaluate(proto, {v.name or "": self.computed[v] for v in inputs})
        for output, array in zip(node.outputs, results or (), strict=False):
            # The evaluator and the inference have to agree: either may be wrong.
            if array.shape == self.shapes.get(output):
                self.computed[output] = array

    def _measure(self, node: ir.Node) -> None:
        dims = self.shapes.get(node.inputs[0]) if node.inputs and node.inputs[0] else None
        if dims is None or None in dims:
            return
        known = np.array(dims, dtype=np.int64)
        if node.op_type == "Size":
            self.computed[node.outputs[0]] = np.array(known.prod(), dtype=np.int64)
            return
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(known)) if "end" in node.attributes else None
        self.computed[node.outputs[0]] = known[start:end]

    def _evaluate(self, proto: onnx.NodeProto, feeds: dict[str, Array]) -> list[Array] | None:
        """Run one node; results are remembered, as layers repeat the same shape arithmetic."""
        key = b"|".join(
            [
                proto.op_type.encode(),
                *(a.SerializeToString() for a in proto.attribute),
                *(_content(feeds[name]) if name else b"-" for name in proto.input),
            ]
        )
        if key in self._results:
            return self._results[key]
        element_type = onnx.helper.np_dtype_to_tensor_dtype
        graph = onnx.helper.make_graph(
            [proto],
            "node",
            [
                onnx.helper.make_tensor_value_info(name, element_type(array.dtype), array.shape)
                for name, array in feeds.items()
            ],
            [onnx.ValueInfoProto(name=name) for name in proto.output if name],
        )
        try:
            with np.errstate(all="ignore"):
                found = ReferenceEvaluator(graph, opsets=self._versions).run(None, feeds)
            results: list[Array] | None = [np.asarray(a) for a in found]
        except _EVALUATION_ERRORS:
            results = None
        if results is not None and any(a.dtype.kind not in "biuf" for a in results):
            results = None
        self._results[key] = results
        return results


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What if an If took one of its branches.

    Attributes:
        model: The model.
        node: The If.
        branch: 0 for then, 1 for else.
    """

    model: ir.Model
    node: ir.Node
    branch: int

    def taken(self, node: ir.Node, computed: Mapping[ir.Value, Array]) -> int | None:
        """The branch that ``node`` takes; None if that depends on the data."""
        if node is self.node:
            return self.branch
        value = node.inputs[0]
        array = None if value is None else computed.get(value)
        return None if array is None or array.size != 1 else int(not np.ravel(array)[0])

    def fails(self) -> bool:
        """Whether some operator then fails for the rank of its input, on every path."""
        graph = self.node.graph
        if not isinstance(graph, ir.Graph):
            return False
        for lengths in _PRIMES:
            dims = _input_dims(self.model, lengths, False)
            if not self._breaks(graph, _Evaluation(self.model, dims, self)):
                return False
        return True

    def _breaks(self, graph: ir.Graph, found: _Evaluation) -> bool:
        for node in graph:
            branches = _branches(node)
            if branches:
                taken = self.taken(node, found.computed)
                paths = branches if taken is None else [branches[taken]]
                if all(self._breaks(path, found) for path in paths):
                    return True
            elif _has_wrong_rank(node, found.shapes):
                return True
        return False


def _has_wrong_rank(node: ir.Node, shapes: Mapping[ir.Value, Dims]) -> bool:
    """Whether an operator of fixed rank gets a tensor of another one."""
    if node.domain not in {"", "ai.onnx"} or len(node.inputs) < 2:
        return False
    data, weight = (None if v is None else shapes.get(v) for v in node.inputs[:2])
    if data is None:
        return False
    if node.op_type in {"GRU", "LSTM", "RNN"}:
        return len(data) != 3
    if node.op_type == "Gemm":
        return len(data) != 2
    convolves = node.op_type in {"Conv", "ConvTranspose"}
    return convolves and weight is not None and len(data) != len(weight)


def _content(array: Array) -> bytes:
    return f"{array.dtype}{array.shape}".encode() + array.tobytes()


def _is_small(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype in {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE}:
        return bool(tensor.size <= _MAX_FLOAT_ELEMENTS)
    return tensor.dtype in _INTEGERS and tensor.size <= MAX_ELEMENTS


_INTEGERS = frozenset(
    {
        ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32,
        ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32,
        ir.DataType.UINT64,
    }
)  # fmt: skip


def _tensor_type(elem_type: int, dims: Dims | None) -> onnx.TypeProto:
    kind = onnx.TypeProto()
    kind.tensor_type.elem_type = elem_type
    if dims is not None:
        shape = kind.tensor_type.shape
        shape.SetInParent()
        for length in dims:
            entry = shape.dim.add()
            if length is not None:
                entry.dim_value = length
    return kind


def _branches(node: ir.Node) -> list[ir.Graph]:
    """The subgraphs of an If, in the order of the outputs' join: then, else."""
    if node.op_type != "If" or node.domain != "":
        return []
    return [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]


def _has_graph(node: ir.Node) -> bool:
    kinds = {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
    return any(attribute.type in kinds for attribute in node.attributes.values())
