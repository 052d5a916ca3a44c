"""What new weights of a few layers do to the outputs, running only what lies behind them.

Pruning is priced by many small measurements of the same kind: other weights for the layers that
read one group, the same samples, the model's outputs. What lies before these layers never changes.
So the samples go through the model once, stage by stage, from the first group to the last
(:mod:`~onnxcompress.passes.prune.stages`); at each, what lies behind its layers is opened once,
with their weights as inputs, and run for every change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.context import PassContext
from onnxcompress.errors import ModelError
from onnxcompress.passes.prune.probe import Errors, OutputProbe
from onnxcompress.passes.prune.stages import plan_stages, reads
from onnxcompress.passes.prune.store import ActivationStore
from onnxcompress.passes.prune.stream import Stream, StreamOwner
from onnxcompress.runtime import Session, open_session

Array = npt.NDArray[np.generic]

_FED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
"""Types of weights that onnxruntime takes from numpy."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What lies behind some layers: names of values of the model.

    Attributes:
        weights: Initializers that may change.
        inputs: Values that are read and do not depend on them.
        outputs: Floating-point outputs of the model that do.
    """

    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Suffix:
    """The part of a model behind some of its layers, ready to run with other weights.

    Args:
        session: Opened on it.
        feeds: What it reads, run by run.
        errors: Measures the outputs.
    """

    def __init__(
        self, session: Session, feeds: Sequence[Mapping[str, Array]], errors: Errors
    ) -> None:
        self._session, self._feeds, self._errors = session, feeds, errors

    def error_of(self, weights: Mapping[str, Array]) -> float:
        """As :meth:`OutputProbe.error_of` for the model with these initializers changed."""
        return self._errors.of(self._session.run({**feeds, **weights}) for feeds in self._feeds)


class SuffixProbe(StreamOwner):
    """Takes samples through a model and stops in front of some of its layers, group by group.

    Args:
        model: The model.
        whole: The measurement on the whole model.
        ctx: How to run.
        layers: For each group its layers: names of the nodes and the initializers that may change.
            Groups are visited in this order.
        text: What to call the work.
    """

    def __init__(
        self,
        model: ir.Model,
        whole: OutputProbe,
        ctx: PassContext,
        layers: Mapping[int, tuple[Sequence[str], Sequence[str]]],
        text: str = "prune: running to the next channels",
    ) -> None:
        self._model, self._whole, self._ctx, self._text = model, whole, ctx, text
        found = {g: _place(model, nodes, weights) for g, (nodes, weights) in layers.items()}
        self._places = {g: place for g, place in found.items() if place is not None}
        self._numbers = {g: i for i, g in enumerate(self._places, start=1)}
        if self._places:
            stages = plan_stages(model.graph, [p.inputs for p in self._places.values()])
            store = ActivationStore(ctx.work_dir)
            self._stream = Stream(model, stages, whole.data, ctx, whole.batch_size, store)

    def at(self, group: int) -> Suffix | None:
        """What lies behind the layers of a group; None where it cannot be run apart."""
        place = self._places.get(group)
        if place is None or self._stream is None or not self._can_be_fed(place.weights):
            return None
        try:
            self._stream.advance(self._numbers[group], self._text)
            feeds = [found for _, found in self._stream.feeds(place.inputs)]
            part = self._stream.part(place.inputs, place.outputs, place.weights)
            session = open_session(part, self._ctx.session, work_dir=self._ctx.work_dir)
        except (MemoryError, ModelError, ValueError):
            self._release()
            return None
        return Suffix(session, feeds, self._whole.errors)

    def part(self, group: int) -> ir.Model | None:
        """A copy of what lies behind the layers of a group, them included, to be changed.

        Nodes, values and initializers have the names that they have in the model. None where it
        cannot be run apart.
        """
        place = self._places.get(group)
        if place is None or self._stream is None:
            return None
        try:
            self._stream.advance(self._numbers[group], self._text)
            return self._stream.part(place.inputs, place.outputs)
        except (MemoryError, ModelError, ValueError):
            self._release()
            return None

    def error_of(self, group: int, part: ir.Model) -> float:
        """As :meth:`OutputProbe.error_of` for the model with :meth:`part` changed so.

        Raises:
            ModelError: If it does not run.
        """
        if self._stream is None:
            raise ValueError("there is no part to run")
        session = open_session(part, self._ctx.session, work_dir=self._ctx.work_dir)
        runs = (session.run(feeds) for _, feeds in self._stream.feeds(self._places[group].inputs))
        return self._whole.errors.of(runs)

    def _can_be_fed(self, weights: Sequence[str]) -> bool:
        values = [self._model.graph.initializers.get(name) for name in weights]
        return bool(weights) and all(v is not None and v.dtype in _FED for v in values)


def _place(model: ir.Model, nodes: Sequence[str], weights: Sequence[str]) -> _Place | None:
    """What lies behind ``nodes``; None if no output that can be compared does."""
    graph = model.graph
    initializers = [graph.initializers.get(name) for name in weights]
    behind: set[ir.Value] = set()
    changed: list[ir.Node] = []
    names = set(nodes)
    changing = {v for v in initializers if v is not None}
    for node in graph:
        read = reads(node)
        if node.name in names or any(v in behind or v in changing for v in read):
            changed.append(node)
            behind.update(node.outputs)
    outputs = [v for v in graph.outputs if v in behind and _floating(v)]
    if not outputs:
        return None
    needed = set(outputs)
    inputs: dict[str, None] = {}
    for node in reversed(changed):
        if not needed.isdisjoint(node.outputs):
            for value in reads(node):
                if value in behind:
                    needed.add(value)
                elif not value.is_initializer():
                    inputs[value.name or ""] = None
    return _Place(tuple(weights), tuple(sorted(inputs)), tuple(v.name or "" for v in outputs))


def _floating(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()
