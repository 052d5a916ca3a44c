"""Divide an input of the model once, where Slices take it apart piece by piece.

A recurrent model that keeps the states of its layers in one tensor takes them out by a Slice per
state, ``S[:, i, :, j]``. Slices ``[l_k, u_k)`` of one axis of length L that tile it,

    0 = l_1 < u_1 = l_2 < ... < u_n = L,

are the outputs of one Split. Slices of several axes are one where their ranges on *one* axis tile
it, and those with the same range there tile the piece in turn: a grid of m times n pieces takes
1 + m Splits instead of m n Slices. A Slice reads four more tensors at each run, so that a runtime
spends more time on it than on the elements of a small state.

Only inputs of the model are divided. Between layers a Slice has an integer kernel that passes
integers on; a Split, in onnxruntime, has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.rules.movement import slice_arguments

_STANDARD = frozenset({"", "ai.onnx"})
_SIZES_AS_INPUT = 13

Range = tuple[int, int]
Boxes = Mapping[ir.Node, Mapping[int, Range]]
"""Slices, and the range that each takes of the axes that it does not take whole."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How a value is divided.

    Attributes:
        axis: The axis.
        parts: The lengths of the pieces, in order, and what becomes of each: it is divided again,
            or is what some Slices take.
    """

    axis: int
    parts: tuple[tuple[int, _Tiles | tuple[ir.Node, ...]], ...]

    @property
    def splits(self) -> int:
        """How many Splits that takes."""
        return 1 + sum(part.splits for _, part in self.parts if isinstance(part, _Tiles))


def split_inputs(model: ir.Model) -> int:
    """Write the Slices that divide an input as Splits, in place.

    Args:
        model: A normalized model.

    Returns:
        How many inputs were divided. Their Slices are left as Identity of a piece.
    """
    namer, divided = Namer(model), 0
    for value in model.graph.inputs:
        boxes = _boxes(value, model.graph)
        tiles = _tiled(boxes, _lengths(value)) if len(boxes) > 1 else None
        if isinstance(tiles, _Tiles) and tiles.splits < len(boxes):
            _Writer(model, namer).divide(value, tiles, value)
            divided += 1
    return divided


def _lengths(value: ir.Value) -> list[int | None]:
    return [n if isinstance(n, int) else None for n in value.shape or ()]


def _boxes(value: ir.Value, graph: ir.Graph) -> Boxes:
    """The Slices of ``value``; none if one of them is not constant, or takes steps."""
    lengths = _lengths(value)
    boxes = {}
    for use in value.uses():
        node = use.node
        if node.op_type != "Slice" or node.domain not in _STANDARD or use.idx:
            continue
        arguments = slice_arguments(node, len(lengths))
        if arguments is None or node.graph is not graph or value.is_initializer():
            return {}
        box = {}
        for axis, (start, end, step) in arguments.items():
            length = lengths[axis]
            if length is None or step != 1:
                return {}
            low, high = (min(max(n + length if n < 0 else n, 0), length) for n in (start, end))
            if (low, high) != (0, length):
                box[axis] = (low, high)
        boxes[node] = box
    return boxes


def _tiled(boxes: Boxes, lengths: list[int | None]) -> _Tiles | tuple[ir.Node, ...] | None:
    """How some Slices divide what they read, in the fewest Splits; None if they do not."""
    if not any(boxes.values()):
        return tuple(boxes)
    found = []
    for axis in range(len(lengths)):
        groups: dict[Range, dict[ir.Node, Mapping[int, Range]]] = {}
        for node, box in boxes.items():
            if axis not in box:
                break
            rest = {a: r for a, r in box.items() if a != axis}
            groups.setdefault(box[axis], {})[node] = rest
        else:
            ranges = sorted(groups)
            stops = [high for _, high in ranges]
            if [low for low, _ in ranges] != [0, *stops[:-1]] or stops[-1] != lengths[axis]:
                continue
            parts = [(high - low, _tiled(groups[low, high], lengths)) for low, high in ranges]
            whole = tuple((length, part) for length, part in parts if part is not None)
            if len(whole) == len(parts):
                found.append(_Tiles(axis, whole))
    # Of equally many the last axis, where the pieces are strewn most: it is read once then.
    return min(reversed(found), key=lambda tiles: tiles.splits, default=None)


class _Writer:
    def __init__(self, model: ir.Model, namer: Namer) -> None:
        self._model, self._namer = model, namer

    def divide(self, value: ir.Value, tiles: _Tiles, source: ir.Value) -> None:
        """Divide ``value``, an input or a piece of one; nodes are called after ``source``."""
        name = self._namer.node(f"{source.name}/simplify_split")
        sizes = [length for length, _ in tiles.parts]
        pieces = [self._piece(value, tiles.axis, length, source) for length in sizes]
        inputs = [value]
        attributes: dict[str, int | list[int]] = {"axis": tiles.axis}
        if self._model.opset_imports.get("", 0) < _SIZES_AS_INPUT:
            attributes["split"] = sizes
        else:
            constant = self._namer.value(f"{source.name}/simplify_sizes")
            array = np.array(sizes, np.int64)
            inputs.append(set_initializer(self._model.graph, constant, array))
        split = ir.node("Split", inputs, attributes, outputs=pieces, name=name)
        producer = value.producer()
        if producer is None:
            self._model.graph.insert_before(self._model.graph[0], split)
        else:
            self._model.graph.insert_after(producer, split)
        for piece, (_, part) in zip(pieces, tiles.parts, strict=True):
            if isinstance(part, _Tiles):
                self.divide(piece, part, source)
            else:
                for node in part:
                    _pass_on(node, piece)

    def _piece(self, value: ir.Value, axis: int, length: int, source: ir.Value) -> ir.Value:
        shape = list(value.shape or ())
        shape[axis] = length
        name = self._namer.value(f"{source.name}/simplify_piece")
        return ir.Value(name=name, type=value.type, shape=ir.Shape(shape))


def _pass_on(node: ir.Node, piece: ir.Value) -> None:
    """Turn a Slice into the Identity of a piece."""
    node.op_type = "Identity"
    node.attributes.clear()
    node.resize_inputs(1)
    node.replace_input_with(0, piece)
