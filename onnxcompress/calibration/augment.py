"""The model with statistics as its outputs, alone or joined with a reference model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from onnxcompress import model_io
from onnxcompress.calibration.feeds import Feeder
from onnxcompress.calibration.join import join, top_level
from onnxcompress.calibration.kinds import (
    TensorKind,
    declared_kind,
    tensors_of,
    wants_lengths,
)
from onnxcompress.calibration.statistics import Request
from onnxcompress.calibration.taps import Tap, make_tap
from onnxcompress.errors import ModelError
from onnxcompress.graph.emit import Emitter
from onnxcompress.graph.naming import Namer

_FLOATING = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})
_COUNTABLE = _FLOATING | {ir.DataType.INT32, ir.DataType.INT64}
_INTEGERS = frozenset(
    {
        ir.DataType.BOOL,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
    }
)


class Augmented:
    """A copy of a model whose outputs are statistics.

    The nodes of a statistic come right after the node whose output they read, so that onnxruntime
    (which keeps the order of the file) can free that output at once.

    Args:
        model: The model; it is not changed, its tensors are shared.
        reference: A model with the same inputs to run along with it, or None.
        sample_count: Samples of all runs.
        group: Samples per run where the model fixes it, else None.
        trust_shapes: Whether declared shapes may be relied on (they are checked at each run).

    Attributes:
        model: The copy.
        sample_count: As given.
        feeders: Extra inputs, by name: what fills them at each run.
    """

    def __init__(
        self,
        model: ir.Model,
        reference: ir.Model | None,
        *,
        sample_count: int,
        group: int | None,
        trust_shapes: bool,
    ) -> None:
        self.sample_count = sample_count
        self._group = group
        self._trust_shapes = trust_shapes
        self.model = model_io.clone(model)
        self._values = top_level(self.model.graph)
        self._inner = _inside_subgraphs(self.model.graph)
        if reference is not None:
            self._values.update(join(self.model, reference))
        self._order = {node: i for i, node in enumerate(self.model.graph)}
        self.emitter = Emitter(self.model)
        self._kinds: dict[ir.Value, TensorKind] = {}
        self._casts: dict[tuple[str, ir.DataType], ir.Value] = {}
        self._outputs: list[ir.Value] = []
        self._pending: dict[ir.Node | None, list[ir.Node]] = {}
        self._anchor: ir.Node | None = None
        self.feeders: dict[str, Feeder] = {}
        self._extra: dict[str, ir.Value] = {}

    def unknown(self, requests: Iterable[Request]) -> dict[str, bool]:
        """The tensors that have to be looked at by running the model.

        Returns:
            Names within :attr:`model`, each with whether the element type is known.
        """
        unknown: dict[str, bool] = {}
        for request in requests:
            for name in tensors_of(request):
                value = self.value(name)
                kind = declared_kind(value, self._group)
                if kind is None:
                    unknown[value.name or ""] = value.dtype is not None
                    continue
                self._kinds[value] = kind
                if self._trust_shapes and name == request.value and wants_lengths(request, kind):
                    unknown.setdefault(value.name or "", True)
        return unknown

    def learn(self, kinds: Mapping[str, TensorKind]) -> None:
        """Take what was found by running; names within :attr:`model`."""
        values = top_level(self.model.graph)
        self._kinds.update({values[name]: kind for name, kind in kinds.items()})

    def _kind(self, name: str) -> TensorKind:
        return self._kinds[self.value(name)]

    def value(self, name: str) -> ir.Value:
        """See :class:`onnxcompress.calibration.taps.Site`."""
        if name in self._values:
            return self._values[name]
        if name in self._inner:
            raise ModelError(
                f"tensor '{name}' lies in a subgraph of {self._inner[name]}, where no statistics "
                "can be taken"
            )
        near = difflib.get_close_matches(name, self._values, 1)
        hint = f"Did you mean '{near[0]}'?" if near else None
        raise ModelError(f"the model has no tensor '{name}'", hint=hint)

    def rank(self, name: str) -> int:
        """See :class:`onnxcompress.calibration.taps.Site`."""
        return self._kind(name).rank

    def floating(self, name: str) -> ir.Value:
        """See :class:`onnxcompress.calibration.taps.Site`."""
        dtype = self._kind(name).dtype
        return self._as(name, dtype if dtype in _FLOATING else ir.DataType.FLOAT)

    def countable(self, name: str) -> ir.Value:
        """See :class:`onnxcompress.calibration.taps.Site`."""
        dtype = self._kind(name).dtype
        if dtype in _COUNTABLE:
            return self._as(name, dtype)
        return self._as(name, ir.DataType.INT64 if dtype in _INTEGERS else ir.DataType.FLOAT)

    def _as(self, name: str, dtype: ir.DataType) -> ir.Value:
        kind = self._kind(name).dtype
        if kind == ir.DataType.STRING:
            raise ModelError(f"tensor '{name}' holds strings, which have no statistics")
        value = self.value(name)
        self._move_anchor(value)
        if kind == dtype:
            value.dtype = dtype
            return value
        key = (name, dtype)
        if key not in self._casts:
            self._casts[key] = self._cast_after(value, dtype)
        return self._casts[key]

    def _cast_after(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Convert right after the producer, for all taps to share."""
        made = self.emitter.take()
        cast = self.emitter.cast(value, dtype)
        cast.dtype = dtype
        producer = value.producer()
        self._pending.setdefault(producer, [])[:0] = self.emitter.take()
        self.emitter.give_back(made)
        return cast

    def _move_anchor(self, value: ir.Value) -> None:
        producer = value.producer()
        if producer is not None and (
            self._anchor is None or self._order[producer] > self._order[self._anchor]
        ):
            self._anchor = producer

    def output(self, value: ir.Value) -> str:
        """See :class:`onnxcompress.calibration.taps.Site`."""
        if value not in self._outputs:
            self._outputs.append(value)
        return value.name or ""

    def feed(self, key: str, feeder: Feeder, dtype: ir.DataType, *, rank: int = 1) -> ir.Value:
        """See :class:`onnxcompress.calibration.unfold.Inputs`."""
        if key not in self._extra:
            value = ir.Value(
                name=Namer(self.model).value(f"calibrate/{key}"),
                type=ir.TensorType(dtype),
                shape=ir.Shape([None] * rank),
            )
            self.model.graph.inputs.append(value)
            self._extra[key] = value
            self.feeders[value.name or ""] = feeder
        return self._extra[key]

    def sample(self, name: str) -> tuple[int | None, ...] | None:
        """See :class:`onnxcompress.calibration.taps.Site`."""
        return self._kind(name).sample if self._trust_shapes else None

    def tap(self, request: Request) -> Tap:
        """Add a request.

        Raises:
            ModelError: If the tensor or the operator set does not allow it.
        """
        self._anchor = None
        self.emitter.about(request.value)
        made = make_tap(request, self)
        self._pending.setdefault(self._anchor, []).extend(self.emitter.take())
        return made

    def finish(self) -> None:
        """Insert the nodes, make the statistics the outputs, and drop what they do not need."""
        graph = self.model.graph
        for anchor, nodes in self._pending.items():
            if anchor is not None:
                graph.insert_after(anchor, nodes)
        first = self._pending.get(None)
        if first:
            graph.insert_before(graph[0], first) if len(graph) else graph.extend(first)
        graph.outputs.clear()
        graph.outputs.extend(self._outputs)
        ir_passes.RemoveUnusedNodesPass()(self.model)

    def origin(self, name: str) -> str:
        """Where a tensor comes from, for messages."""
        return _origin(self.value(name))

    def tapped_order(self, name: str) -> int:
        """Position of a tensor's producer, for finding the first of several."""
        producer = self.value(name).producer()
        return -1 if producer is None else self._order[producer]


def _origin(value: ir.Value) -> str:
    producer = value.producer()
    if producer is None:
        return "an initializer" if value.is_initializer() else "an input"
    return f"output of {producer.op_type} '{producer.name}'"


def _inside_subgraphs(graph: ir.Graph) -> dict[str, str]:
    """Names of values in subgraphs, to the top-level node they belong to."""
    found: dict[str, str] = {}
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                inner = [attribute.as_graph()]
            elif attribute.type == ir.AttributeType.GRAPHS:
                inner = list(attribute.as_graphs())
            else:
                continue
            label = f"{node.op_type} '{node.name}'"
            for subgraph in inner:
                found.update(dict.fromkeys(top_level(subgraph), label))
                found.update(dict.fromkeys(_inside_subgraphs(subgraph), label))
    return found
