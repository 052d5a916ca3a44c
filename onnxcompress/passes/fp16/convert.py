"""The conversion of one model to float16: nodes, weights, and the casts between."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.passes.base import Change, Skip
from onnxcompress.passes.fp16.halves import as_half
from onnxcompress.passes.fp16.slots import FLOAT, HALF, Slots, has_subgraph, slots_of

LIMIT = 65504.0 * 0.5
"""Largest magnitude of an activation that may be computed in float16."""


@dataclass(slots=True)
class Converter:
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
            if not floats and not has_subgraph(node):
                continue
            slots = slots_of(node, opset)
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

    def _obstacle(self, node: ir.Node, slots: Slots, ranges: dict[str, float]) -> str | None:
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

    def _convert(self, node: ir.Node, slots: Slots) -> None:
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
                saved = tensor.nbytes - half.nbytes
                self.changes.append(Change(value.name or "", "", "stored in float16", saved))

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
