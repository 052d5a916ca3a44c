"""States: inputs of a model that it also returns, changed, for the next call.

A recurrent model whose state is part of its interface cannot lose a cell there: the shapes of
inputs and outputs stay. But inside, the cell may go: where the state is *read*, the surviving
cells are picked out, and where it is *written*, zeros take the places of the others.

A state often passes some data movement between the interface and the cells (a Slice per layer, a
Squeeze, a Concat of all layers). Those nodes keep the state at full size; the analysis follows them
with the numbers of the state's elements and so knows which cell that is written is the same as
which cell that is read (:func:`matches`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.probe import Dims, Shapes
from onnxcompress.graph.rules.base import (
    attribute_int,
    attribute_ints,
    constant_ints,
    normal,
)
from onnxcompress.graph.rules.movement import slice_arguments, slice_positions

# The number of each element within the state; dynamic axes have length 1.
Elements = npt.NDArray[np.int64]

_STANDARD = frozenset({"", "ai.onnx"})
_FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
# They look at a state without reading its cells.
_MEASURES = frozenset({"Shape", "Size"})


@dataclass(frozen=True, slots=True)
class Writer:
    """An edge at which cells leave for the interface.

    Attributes:
        value: What carries the cells.
        user: The node, or the graph whose output it is, that takes it on.
        index: Which input of the node (output of the graph).
        elements: Numbers of the state's elements, in the shape of ``value``.
    """

    value: ir.Value
    user: ir.Node | ir.Graph
    index: int
    elements: Elements


@dataclass(frozen=True, slots=True)
class State:
    """An input, the output it comes back as, and what lies between them and the cells.

    Attributes:
        source: The graph input.
        target: The graph output.
        readers: Values from which cells are read, with the numbers of their elements.
        writers: Edges over which cells are written.
        nodes: The data movement outside of readers and writers, which keeps its full size.
        joined: Outputs of If nodes that are part of it; other outputs of these nodes are not.
    """

    source: ir.Value
    target: ir.Value
    readers: Mapping[ir.Value, Elements]
    writers: tuple[Writer, ...]
    nodes: frozenset[ir.Node]
    joined: frozenset[ir.Value]

    @property
    def feeds_recurrence(self) -> bool:
        """Whether a recurrent operator starts from it: then it is a state beyond doubt."""
        return any(
            use.node.op_type in _RECURRENT and use.node.domain in _STANDARD and use.idx in {5, 6}
            for value in self.readers
            for use in value.uses()
        )


def candidates(model: ir.Model, shapes: Shapes) -> list[State]:
    """Every pair of an input and an output that could be one state, in the order of the interface.

    By convention data comes first, so the first input, the first output and inputs shaped like the
    first are no state unless a recurrent operator starts from them.

    Args:
        model: A canonical model.
        shapes: Its static shapes.
    """
    graph = model.graph
    if len(graph.inputs) < 2 or len(graph.outputs) < 2:
        return []
    found: list[State] = []
    for number, source in enumerate(graph.inputs):
        dims = shapes.of(source)
        if source.is_initializer() or source.dtype not in _FLOATS or dims is None:
            continue
        if not any(d is not None and d > 1 for d in dims):
            continue
        targets = [
            (place, t)
            for place, t in enumerate(graph.outputs)
            if t.dtype in {source.dtype, None} and _compatible(dims, shapes.of(t))
        ]
        if not targets:
            continue
        readers, inner = _read(model, source, shapes)
        for place, target in targets:
            writers, outer = _written(target, shapes, inner)
            joined = frozenset(v for v in outer if _is_joined(v))
            movers = {v.producer() for v in outer - joined}
            nodes = inner | {n for n in movers if n is not None}
            state = State(source, target, readers, tuple(writers), nodes, joined)
            like_data = not (number and place) or dims == shapes.of(graph.inputs[0])
            if not like_data or state.feeds_recurrence:
                found.append(state)
    return found


def _is_joined(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "If"


def _compatible(dims: Dims, other: Dims | None) -> bool:
    """Equal where both are static; a dynamic axis may also meet one of length 1."""
    if other is None or len(other) != len(dims):
        return False
    return all(a == b or {a, b} == {None, 1} for a, b in zip(dims, other, strict=True))


def matches(state: State) -> Iterator[tuple[Writer, ir.Value, int, int, Elements]]:
    """Which axis of a writer is which axis of a reader.

    Yields:
        Writer, reader, axis of the writer, axis of the reader, and pairs ``[2, n]`` of positions
        on the two that are one cell.
    """
    for writer in state.writers:
        for reader, elements in state.readers.items():
            shared = np.intersect1d(writer.elements, elements, return_indices=True)
            if not shared[0].size:
                continue
            left = np.unravel_index(shared[1], writer.elements.shape)
            right = np.unravel_index(shared[2], elements.shape)
            for a, ours in enumerate(left):
                for b, theirs in enumerate(right):
                    pairs = np.unique(np.stack([ours, theirs]), axis=1)
                    sizes = {pairs.shape[1], *(len(np.unique(side)) for side in pairs)}
                    if len(sizes) == 1 and pairs.shape[1] > 1:
                        yield writer, reader, a, b, pairs


# --- from the input to the cells -----------------------------------------------------------


def _numbered(dims: Dims) -> Elements:
    """A number for every element; dynamic axes count as one position."""
    shape = [1 if d is None else d for d in dims]
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)


def _read(
    model: ir.Model, source: ir.Value, shapes: Shapes
) -> tuple[dict[ir.Value, Elements], frozenset[ir.Node]]:
    """Follow data movement from ``source`` to the values that others read."""
    dims = shapes.of(source)
    views: dict[ir.Value, Elements] = {source: _numbered(dims or ())}
    passed: set[ir.Node] = set()
    for node in _nodes(model.graph):
        viewed = [v for v in node.inputs if v in views]
        if not viewed or viewed[0] is not node.inputs[0] or len(viewed) > 1:
            continue
        moved = _moved(node, views[viewed[0]], shapes)
        if moved is None:
            continue
        passed.add(node)
        views.update(zip(node.outputs, moved, strict=True))
    readers = {
        value: elements
        for value, elements in views.items()
        if value.is_graph_output()
        or any(n not in passed and n.op_type not in _MEASURES for n in value.consumers())
    }
    return readers, frozenset(passed)


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes in order, those of If branches included, those of loop bodies not."""
    for node in graph:
        yield node
        if node.op_type == "If" and node.domain in _STANDARD:
            for name in ("then_branch", "else_branch"):
                yield from _nodes(node.attributes[name].as_graph())


def _moved(node: ir.Node, elements: Elements, shapes: Shapes) -> list[Elements] | None:
    """The elements in every output of a node that only moves data; None if it does more."""
    if node.domain not in _STANDARD:
        return None
    if node.op_type == "Split":
        along = normal(attribute_int(node, "axis", 0), elements.ndim)
        sizes = [shapes.of(o) for o in node.outputs]
        lengths = [None if s is None else s[along] for s in sizes]
        if sum(n or 0 for n in lengths) != elements.shape[along] or None in lengths:
            return None
        return np.split(elements, np.cumsum([n or 0 for n in lengths])[:-1], axis=along)
    moved = _moved_to_one(node, elements, shapes)
    after = shapes.of(node.outputs[0])
    if moved is None or after is None or moved.shape != tuple(1 if d is None else d for d in after):
        return None
    return [moved]


def _moved_to_one(node: ir.Node, elements: Elements, shapes: Shapes) -> Elements | None:
    before = shapes.of(node.inputs[0])
    after = shapes.of(node.outputs[0])
    if before is None or after is None:
        return None
    if node.op_type == "Identity":
        return elements
    if node.op_type == "Transpose":
        return np.transpose(elements, attribute_ints(node, "perm"))
    if node.op_type in {"Squeeze", "Unsqueeze", "Reshape", "Flatten"}:
        # With dynamic axes as 1, all of them keep the order of elements; several dynamic axes
        # could change places.
        if before.count(None) > 1 and node.op_type in {"Reshape", "Flatten"}:
            return None
        target = tuple(1 if d is None else d for d in after)
        if int(np.prod(target)) != elements.size or before.count(None) != after.count(None):
            return None
        return elements.reshape(target)
    if node.op_type == "Slice":
        return _sliced(node, elements, before)
    if node.op_type == "Gather":
        indices = constant_of(node.inputs[1])
        along = normal(attribute_int(node, "axis", 0), elements.ndim)
        if indices is None or before[along] is None:
            return None
        return np.take(elements, indices.astype(np.int64), axis=along)
    return None


def _sliced(node: ir.Node, elements: Elements, before: Dims) -> Elements | None:
    arguments = slice_arguments(node, elements.ndim)
    if arguments is None:
        return None
    for axis, bounds in arguments.items():
        length = before[axis]
        if length is None:
            return None
        elements = np.take(elements, slice_positions(length, bounds), axis=axis)
    return elements


# --- from the cells to the output ----------------------------------------------------------


def _written(
    target: ir.Value, shapes: Shapes, inner: frozenset[ir.Node]
) -> tuple[list[Writer], frozenset[ir.Value]]:
    """Follow data movement back from ``target`` to the values that others make.

    Returns:
        The edges on which these leave, and the values between them and ``target``.
    """
    after = shapes.of(target)
    if after is None:
        return [], frozenset()
    producer = target.producer()
    graph = target.graph
    if graph is None or producer is None:
        return [], frozenset()
    writers: list[Writer] = []
    passed: set[ir.Value] = set()
    open_edges: list[Writer] = [
        Writer(target, graph, i, _numbered(after))
        for i, output in enumerate(graph.outputs)
        if output is target
    ]
    while open_edges:
        edge = open_edges.pop()
        before = _origins(edge, shapes)
        if before is None:
            if edge.value.producer() is not None and edge.value.producer() not in inner:
                writers.append(edge)
            continue
        passed.add(edge.value)
        open_edges += before
    return writers, frozenset(passed)


def _origins(edge: Writer, shapes: Shapes) -> list[Writer] | None:
    """The edges that an edge comes from over a node that only moves data; None if it does more."""
    value, elements = edge.value, edge.elements
    node = value.producer()
    if node is None or node.domain not in _STANDARD or len(value.uses()) + _exits(value) > 1:
        return None
    if node.op_type == "If":
        place = node.outputs.index(value)
        branches = [node.attributes[n].as_graph() for n in ("then_branch", "else_branch")]
        ends = [Writer(b.outputs[place], b, place, elements) for b in branches]
        known = [shapes.of(end.value) for end in ends]
        same = all(k is not None and _ones(k) == elements.shape for k in known)
        return ends if same else None
    origin = node.inputs[0] if node.inputs else None
    before, after = shapes.of(origin), shapes.of(value)
    if origin is None or before is None or after is None or _ones(after) != elements.shape:
        return None
    if node.op_type == "Concat":
        return _joined(node, elements, shapes)
    moved: Elements | None = None
    if node.op_type == "Identity":
        moved = elements
    elif node.op_type == "Transpose":
        perm = attribute_ints(node, "perm") or tuple(reversed(range(elements.ndim)))
        moved = np.transpose(elements, np.argsort(perm))
    elif node.op_type in {"Squeeze", "Unsqueeze", "Reshape", "Flatten"}:
        moving = node.op_type in {"Reshape", "Flatten"}
        if before.count(None) == after.count(None) and not (moving and before.count(None) > 1):
            wanted = _ones(before)
            moved = elements.reshape(wanted) if np.prod(wanted) == elements.size else None
            if moving and constant_ints(node, "shape", 1) is None and node.op_type == "Reshape":
                moved = None
    return None if moved is None else [Writer(origin, node, 0, moved)]


def _joined(node: ir.Node, elements: Elements, shapes: Shapes) -> list[Writer] | None:
    along = normal(attribute_int(node, "axis", 0), elements.ndim)
    sizes: list[int] = []
    for value in node.inputs:
        dims = shapes.of(value)
        if dims is None or dims[along] is None:
            return None
        sizes.append(dims[along] or 0)
    if sum(sizes) != elements.shape[along]:
        return None
    parts = np.split(elements, np.cumsum(sizes)[:-1], axis=along)
    return [
        Writer(value, node, index, part)
        for index, (value, part) in enumerate(zip(node.inputs, parts, strict=True))
        if value is not None
    ]


def _ones(dims: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(1 if d is None else d for d in dims)


def _exits(value: ir.Value) -> int:
    """How many outputs of its graph a value is."""
    graph = value.graph
    return 0 if graph is None else sum(1 for output in graph.outputs if output is value)
