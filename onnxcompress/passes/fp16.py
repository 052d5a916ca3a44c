"""Half precision: weights, and where the hardware gains by it the arithmetic, in float16.

Two ways, with the same file size:

- *storage*: weights are stored in float16 and a ``Cast`` makes them float32. It depends on a
  constant alone, so onnxruntime computes it at load and the model runs at the speed of float.
- *compute*: nodes take and give float16; ``Cast`` nodes stand at the borders, so that the inputs
  and outputs of the model keep their types. Nodes that cannot run in float16 are *islands* of
  float32. Every value is cast at most once in each direction, and never back and forth.

float16 has 11 significant bits (a relative error of at most 2⁻¹¹), reaches to 65504 and loses
precision below 6.1e-5. A constant ``w`` goes into float16 only if it is finite there, no element of
a small constant becomes 0 (it may be a divisor), and

    |w - half(w)|₂ <= 2⁻¹⁰ |w|₂

An activation has to stay below half of the range over the calibration data.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxcompress.calibration.statistics import RangeRequest, Statistic
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.passes.base import Change, PassOptions, PassReport, Skip, Stage, option

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

LIMIT = 65504.0 * 0.5
"""Largest magnitude of an activation that may be computed in float16."""

_SMALL = 1024
"""A constant with fewer elements may be a divisor or an epsilon, where an exact 0 does harm."""

_NO_CUDA_KERNEL = frozenset(
    {
        "CumSum",
        "Multinomial",
        "NonMaxSuppression",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Range",
        "RoiAlign",
        "STFT",
        "TopK",
        "Upsample",
    }
)
"""Operators that onnxruntime's CUDA provider computes in float32 only, or not at all."""


class Mode(enum.Enum):
    """What is in float16."""

    AUTO = "auto"
    STORAGE = "storage"
    COMPUTE = "compute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp16Options(PassOptions):
    """Options of :class:`Fp16Pass`."""

    mode: Mode = option(
        Mode.AUTO,
        "storage: weights in float16, arithmetic in float32; compute: both in float16; auto: "
        "compute for the target cuda, storage for others",
    )
    min_elements: int = option(
        256, "leave smaller weights in float32 (storage, and float islands)", minimum=1
    )


class Fp16Pass:
    """Store weights in float16, and compute in it on targets that are faster so."""

    name: ClassVar[str] = "fp16"
    summary: ClassVar[str] = "halve the weights: float16 storage, and arithmetic on GPUs"
    stage: ClassVar[Stage] = Stage.PRECISION
    options_type: ClassVar[type[PassOptions]] = Fp16Options
    needs: frozenset[Statistic] = frozenset({Statistic.RANGE})

    def __init__(self, options: Fp16Options | None = None) -> None:
        self.options = options or Fp16Options()
        if self.options.mode is Mode.STORAGE:
            self.needs = frozenset()

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Convert a copy, which shares the weights, without looking at activations."""
        return self._converted(model.clone(), ctx, ranges=None)

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Convert in place."""
        ranges = None
        if self._computes(ctx) and ctx.calibration is not None:
            ranges = _ranges(model, ctx)
        return self._converted(model, ctx, ranges)

    def _computes(self, ctx: PassContext) -> bool:
        mode = self.options.mode
        return mode is Mode.COMPUTE or (mode is Mode.AUTO and ctx.target.name == "cuda")

    def _converted(
        self, model: ir.Model, ctx: PassContext, ranges: dict[str, float] | None
    ) -> PassReport:
        converter = _Converter(model, Namer(model), self.options.min_elements)
        notes: list[str] = []
        before = _weight_bytes(model)
        if self._computes(ctx):
            if ranges is None:
                notes.append(
                    "Activations were not checked for overflow, only weights: no calibration data."
                )
            converter.compute(ranges or {})
        converter.store()
        figures = {
            "nodes_in_half": converter.nodes,
            "weight_bytes_before": before,
            "weight_bytes_after": _weight_bytes(model),
            "casts_added": converter.casts,
        }
        return PassReport(
            tuple(converter.changes), tuple(converter.all_skips()), figures, tuple(notes)
        )


def _weight_bytes(model: ir.Model) -> int:
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def _ranges(model: ir.Model, ctx: PassContext) -> dict[str, float]:
    """Largest magnitude of every float32 value that a node of the main graph computes."""
    names = [
        value.name or ""
        for node in model.graph
        for value in node.outputs
        if value.dtype == FLOAT and value.name and (value.uses() or value.is_graph_output())
    ]
    names += [v.name or "" for v in model.graph.inputs if v.dtype == FLOAT]
    requests = {name: RangeRequest(name) for name in names}
    found = ctx.collect(model, requests.values(), description="looking for overflow in float16")
    return {
        name: max(-float(found[r].minimum), float(found[r].maximum)) for name, r in requests.items()
    }


# --- constants -----------------------------------------------------------------------------------


def as_half(array: npt.NDArray[np.generic]) -> npt.NDArray[np.float16] | str:
    """``array`` in float16, or why that would not stand for it.

    Args:
        array: float32, any shape.
    """
    with np.errstate(over="ignore", under="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        finite = array[np.isfinite(array)]
        top = float(np.abs(finite).max(initial=0))
        return (
            f"it overflows float16 (a magnitude of {top:.3g})"
            if top > 65504
            else ("it holds numbers that are not finite")
        )
    if array.size < _SMALL and np.any((half == 0) & (array != 0)):
        return "numbers of it would become 0 in float16"
    flat = array.astype(np.float64).reshape(-1)
    error = half.astype(np.float64).reshape(-1)
    error -= flat
    if float(error @ error) > 2.0**-20 * float(flat @ flat):
        return "most of it is too small for float16 (below 6.1e-5)"
    return half


# --- types of operators --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Slots:
    """Numbers of the inputs and outputs whose type follows one of the operator's type variables."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def _slots(node: ir.Node, opset: int) -> _Slots | str:
    """Which inputs and outputs can be float16, or why none can."""
    if node.domain != "":
        return f"operators of the domain {node.domain} stay in float32"
    if _has_subgraph(node):
        return "control flow and what is inside stays in float32"
    if "QuantizeLinear" in node.op_type or node.op_type.startswith(("QLinear", "Dequantize")):
        return "it belongs to an already quantized part"
    if node.op_type in _NO_CUDA_KERNEL:
        return f"onnxruntime has no float16 kernel of {node.op_type}"
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return f"opset {opset} has no operator {node.op_type}"
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def follows(parameters: list[onnx.defs.OpSchema.FormalParameter], index: int) -> bool:
        last = parameters[min(index, len(parameters) - 1)]
        return "tensor(float16)" in allowed.get(last.type_str, ())

    inputs = frozenset(
        i
        for i, v in enumerate(node.inputs)
        if v is not None and v.dtype in (FLOAT, HALF) and follows(list(schema.inputs), i)
    )
    outputs = frozenset(
        i
        for i, v in enumerate(node.outputs)
        if v.dtype == FLOAT and follows(list(schema.outputs), i)
    )
    if not inputs:
        return f"{node.op_type} of opset {opset} takes no float16"
    return _Slots(inputs, outputs)


def _has_subgraph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(a.type in kinds for a in node.attributes.values())


# --- conversion ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Converter:
    """Converts one model and keeps the report."""

    model: ir.Model
    namer: Namer
    min_elements: int
    changes: list[Change] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    nodes: int = 0
    casts: int = 0
    _halves: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _floats: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _constants: dict[ir.Value, npt.NDArray[np.float16] | str] = field(default_factory=dict)
    _marked: dict[ir.Value, None] = field(default_factory=dict)
    _small: list[int] = field(default_factory=list)

    def all_skips(self) -> list[Skip]:
        """Skips, with one for all small weights together."""
        if not self._small:
            return self.skips
        reason = (
            f"each has fewer than min_elements={self.min_elements} elements "
            f"({sum(self._small)} in all)"
        )
        return [*self.skips, Skip(f"{len(self._small)} small tensors", "", reason)]

    # Computing in half ---------------------------------------------------------------------------

    def compute(self, ranges: dict[str, float]) -> None:
        """Turn the nodes of the main graph to float16 where they can be."""
        graph, opset = self.model.graph, self.model.opset_imports.get("") or 0
        for node in list(graph):
            if node.op_type == "Cast" and node.domain == "":
                self._convert_cast(node)
                continue
            # What reads no float32 handles integers, or makes numbers that are cast where read.
            floats = [v for v in node.inputs if v is not None and self._is_float(v)]
            if not floats and not _has_subgraph(node):
                continue
            slots = _slots(node, opset)
            reason = slots if isinstance(slots, str) else self._obstacle(node, slots, ranges)
            if isinstance(slots, str) or reason is not None:
                self.skips.append(Skip(node.name or "", node.op_type, str(reason)))
                self._keep_float(node)
            else:
                self._convert(node, slots)
        self._restore_captures()
        self._merge_constants()

    def _is_float(self, value: ir.Value) -> bool:
        """Whether ``value`` is, or was before this pass, float32."""
        return value.dtype == FLOAT or value in self._marked

    def _obstacle(self, node: ir.Node, slots: _Slots, ranges: dict[str, float]) -> str | None:
        """Why a node whose type allows it cannot be in float16."""
        for index in sorted(slots.inputs):
            value = node.inputs[index]
            if value is not None and _stored(value):
                half = self._half_constant(value)
                if isinstance(half, str):
                    return f"of its constant '{value.name}': {half}"
        inputs = [node.inputs[i] for i in sorted(slots.inputs)]
        for value in (*inputs, *(node.outputs[i] for i in sorted(slots.outputs))):
            top = 0.0 if value is None else ranges.get(value.name or "", 0.0)
            if value is not None and top > LIMIT:
                return (
                    f"'{value.name}' reaches {top:.3g} on the calibration data, "
                    f"beyond half of float16's range"
                )
        return None

    def _half_constant(self, value: ir.Value) -> npt.NDArray[np.float16] | str:
        if value not in self._constants:
            array = constant_of(value)
            self._constants[value] = "its data are unknown" if array is None else as_half(array)
        return self._constants[value]

    def _convert(self, node: ir.Node, slots: _Slots) -> None:
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if index in slots.inputs:
                node.replace_input_with(index, self._as_half(value))
            elif value in self._marked:
                node.replace_input_with(index, self._as_float(value))
        for index in slots.outputs:
            self._make_half(node.outputs[index])
        self.nodes += 1
        self.changes.append(Change(node.name or "", node.op_type, "computed in float16"))

    def _keep_float(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value in self._marked:
                node.replace_input_with(index, self._as_float(value))

    def _convert_cast(self, node: ir.Node) -> None:
        """A Cast reads any type; one to float32 goes to float16 unless the graph returns it."""
        output = node.outputs[0]
        if output.dtype == FLOAT and not output.is_graph_output():
            node.attributes["to"] = ir.AttrInt64("to", int(HALF))
            self._mark(output)

    def _make_half(self, value: ir.Value) -> None:
        """Let ``value`` be float16; the graph still returns float32 under its name."""
        self._mark(value)
        if not value.is_graph_output():
            return
        name, producer = value.name or "", value.producer()
        value.name = self.namer.value(f"{name}/fp16_half")
        cast = self._cast(value, FLOAT, f"{name}/fp16_output")
        cast.name = name
        self._floats[value] = cast
        for index, output in enumerate(self.model.graph.outputs):
            if output is value:
                self.model.graph.outputs[index] = cast
        if producer is None:
            raise TypeError(f"'{name}' is not computed by a node")

    def _mark(self, value: ir.Value) -> None:
        value.type = ir.TensorType(HALF)
        self._marked[value] = None

    def _as_half(self, value: ir.Value) -> ir.Value:
        if value.dtype == HALF:
            return value
        if value not in self._halves:
            if _stored(value):
                half = self._half_constant(value)
                if isinstance(half, str):
                    raise TypeError(f"'{value.name}' does not fit float16: {half}")
                name = self.namer.value(f"{value.name}/fp16_weight")
                self._halves[value] = set_initializer(self._owner(value), name, half)
            else:
                self._halves[value] = self._cast(value, HALF, f"{value.name}/fp16_half")
        return self._halves[value]

    def _as_float(self, value: ir.Value) -> ir.Value:
        if value not in self._floats:
            self._floats[value] = self._cast(value, FLOAT, f"{value.name}/fp16_float")
        return self._floats[value]

    def _cast(self, value: ir.Value, to: ir.DataType, wanted: str) -> ir.Value:
        """A Cast of ``value`` right behind where it is made."""
        node = ir.node("Cast", [value], {"to": int(to)}, name=self.namer.node(f"{wanted}_cast"))
        made = node.outputs[0]
        made.name = self.namer.value(wanted)
        made.type, made.shape = ir.TensorType(to), value.shape
        producer = value.producer()
        if producer is not None and producer.graph is not None:
            producer.graph.insert_after(producer, node)
        else:
            graph = self._owner(value)
            graph.insert_before(graph[0], node)
        self.casts += 1
        return made

    def _restore_captures(self) -> None:
        """Give float32 to subgraphs that read a value which is float16 now."""
        for value in list(self._marked):
            for user, index in list(value.uses()):
                if user.graph is not self.model.graph:
                    user.replace_input_with(index, self._as_float(value))

    def _merge_constants(self) -> None:
        """Store a weight that both sides read once: islands read a Cast of its float16 form."""
        for value, half in self._halves.items():
            if not _stored(value):
                continue
            tensor = value.const_value
            if value.uses() and tensor is not None and tensor.size >= self.min_elements:
                value.replace_all_uses_with(self._as_float(half))
            if not value.uses():
                self._owner(value).initializers.pop(value.name or "")

    # Storing in half -----------------------------------------------------------------------------

    def store(self) -> None:
        """Store the float32 weights that are left in float16, with a Cast to float32."""
        for graph in list(self.model.graphs()):
            for value in list(graph.initializers.values()):
                tensor = value.const_value
                if tensor is None or tensor.dtype != FLOAT:
                    continue
                if tensor.size < self.min_elements:
                    self._small.append(tensor.size)
                    continue
                reason = _storage_obstacle(value)
                half = as_half(tensor.numpy()) if reason is None else reason
                if isinstance(half, str):
                    self.skips.append(Skip(value.name or "", "", half))
                    continue
                name = self.namer.value(f"{value.name}/fp16_weight")
                stored = set_initializer(graph, name, half)
                value.replace_all_uses_with(self._cast(stored, FLOAT, f"{value.name}/fp16_float"))
                graph.initializers.pop(value.name or "")
                self.changes.append(Change(value.name or "", "", "stored in float16"))

    def _owner(self, value: ir.Value) -> ir.Graph:
        graph = value.graph
        if not isinstance(graph, ir.Graph):
            raise TypeError(f"'{value.name}' belongs to no graph")
        return graph


def _stored(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _storage_obstacle(value: ir.Value) -> str | None:
    if not value.uses():
        return "no node reads it"
    if value.is_graph_output() or value.is_graph_input():
        return "it is an input or output of the graph"
    for user, _ in value.uses():
        if user.domain != "" or "QuantizeLinear" in user.op_type or "QLinear" in user.op_type:
            return f"{user.op_type} '{user.name}' may want it as a constant of the file"
    return None
