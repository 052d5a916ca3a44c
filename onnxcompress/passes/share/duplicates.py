"""Store equal constants once.

Constants are compared by hashes first and by their bytes then. The second of a pair becomes

    the first                        equal, also in another graph of the model
    Reshape(first)                   the same numbers in the same order
    Transpose(first)                 the same numbers in another order of axes; in front of a Gemm
                                     its flag transA or transB is turned instead
    Mul(first, factor)               a multiple, one factor or one for each position on one axis

The nodes depend on constants alone: onnxruntime computes them at load, and the model runs as
before. A multiple need only be equal within the rounding of a product (two units in the last
place); all other forms are equal bit by bit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.passes.base import Change

Array = npt.NDArray[np.generic]

_MAX_RANK = 5
"""Permutations of more axes are not tried."""
_NODE_BYTES = 60
"""What a node takes in a file besides its names."""
_LAST_PLACES = 2.0
_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Merged:
    """What was merged.

    Attributes:
        changes: One for each constant that is gone.
        saved_bytes: Bytes of the constants that are gone, less those that came.
    """

    changes: tuple[Change, ...]
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class _Kept:
    """A constant that is stored, and its data."""

    value: ir.Value
    array: Array


@dataclass(slots=True)
class _Index:
    """The constants stored so far, by what they have in common with a duplicate."""

    equal: dict[tuple[object, ...], _Kept] = field(default_factory=dict)
    same_numbers: dict[tuple[object, ...], list[_Kept]] = field(default_factory=dict)
    same_shape: dict[tuple[object, ...], list[_Kept]] = field(default_factory=dict)


def merge_duplicates(model: ir.Model, *, scaled: bool) -> Merged:
    """Merge the duplicates among all initializers of ``model``, in place.

    Args:
        model: A normalized model.
        scaled: Whether to merge multiples too, which are equal only to rounding.
    """
    merger = _Merger(model)
    index = _Index()
    for graph in list(model.graphs()):
        for value in list(graph.initializers.values()):
            array = _array(value)
            if array is not None:
                merger.place(value, array, index, scaled=scaled)
    return Merged(tuple(merger.changes), merger.saved_bytes)


def _array(value: ir.Value) -> Array | None:
    """The data of a constant that may be replaced."""
    tensor = value.const_value
    if tensor is None or not value.uses():
        return None
    if value.is_graph_output() or value.is_graph_input() or tensor.dtype == ir.DataType.STRING:
        return None
    return constant_of(value)


class _Merger:
    """Replaces constants of one model."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._namer = model, Namer(model)
        self._around = _surroundings(model)
        self.changes: list[Change] = []
        self.saved_bytes = 0

    def place(self, value: ir.Value, array: Array, index: _Index, *, scaled: bool) -> None:
        """Merge ``value`` with one that is stored, or store it."""
        dtype = value.dtype
        raw = hashlib.blake2b(np.ascontiguousarray(array).tobytes()).digest()
        equal = (dtype, array.shape, raw)
        if equal in index.equal:
            self._same(value, index.equal[equal].value, array.nbytes)
            return
        worth = array.nbytes > self._overhead(value)
        numbers = (dtype, array.size, _numbers(array)) if worth else ()
        alike = (dtype, array.shape)
        if worth:
            for kept in index.same_numbers.get(numbers, ()):
                if self._moved(value, array, kept):
                    return
            if scaled and array.dtype in (np.float32, np.float64):
                for kept in index.same_shape.get(alike, ()):
                    if self._multiple(value, array, kept):
                        return
        kept = _Kept(value, array)
        index.equal[equal] = kept
        if worth:
            index.same_numbers.setdefault(numbers, []).append(kept)
            index.same_shape.setdefault(alike, []).append(kept)

    def _overhead(self, value: ir.Value) -> int:
        return 4 * len(value.name or "") + 2 * _NODE_BYTES

    def _same(self, value: ir.Value, kept: ir.Value, nbytes: int) -> None:
        value.replace_all_uses_with(self._visible(kept, value))
        self._drop(value, f"merged with '{kept.name}', which is equal", nbytes)

    def _moved(self, value: ir.Value, array: Array, kept: _Kept) -> bool:
        """Merge a constant that holds the numbers of ``kept`` in other axes or order."""
        if array.shape != kept.array.shape and np.array_equal(_bits(array), _bits(kept.array)):
            shape = self._constant(value, "shape", np.array(array.shape, np.int64))
            self._derive(value, kept, "Reshape", [shape], {}, f"a reshaped '{kept.value.name}'")
            return True
        perm = _permutation(kept.array, array)
        if perm is None:
            return False
        text = f"a transposed '{kept.value.name}'"
        if perm == (1, 0) and all(_turns(use.node, use.idx) for use in value.uses()):
            source = self._visible(kept.value, value)
            for node, place in list(value.uses()):
                flag = "transA" if place == 0 else "transB"
                turned = 1 - node.attributes.get_int(flag, 0)
                node.attributes[flag] = ir.AttrInt64(flag, turned)
                node.replace_input_with(place, source)
            self._drop(value, f"merged as {text}", array.nbytes)
            return True
        self._derive(value, kept, "Transpose", [], {"perm": list(perm)}, text)
        return True

    def _multiple(self, value: ir.Value, array: Array, kept: _Kept) -> bool:
        factor = _factor(kept.array, array)
        if factor is None or factor.nbytes + self._overhead(value) >= array.nbytes:
            return False
        operand = self._constant(value, "factor", factor)
        self._derive(value, kept, "Mul", [operand], {}, f"a multiple of '{kept.value.name}'")
        self.saved_bytes -= factor.nbytes
        return True

    def _derive(
        self,
        value: ir.Value,
        kept: _Kept,
        op_type: str,
        operands: list[ir.Value],
        attributes: dict[str, list[int]],
        text: str,
    ) -> None:
        """Let a node on ``kept`` stand for ``value``."""
        graph = _graph(value)
        node = ir.node(
            op_type,
            [self._visible(kept.value, value), *operands],
            attributes or None,
            name=self._namer.node(f"{value.name}/share_{op_type.lower()}"),
        )
        output = node.outputs[0]
        output.name = self._namer.value(f"{value.name}/share_{op_type.lower()}_value")
        output.type, output.shape = value.type, value.shape
        graph.insert_before(graph[0], node)
        value.replace_all_uses_with(output)
        nbytes = 0 if value.const_value is None else value.const_value.nbytes
        self._drop(value, f"merged as {text}", nbytes)

    def _visible(self, kept: ir.Value, value: ir.Value) -> ir.Value:
        """``kept``, moved to the main graph unless ``value`` is in the same graph or within."""
        owner = _graph(kept)
        graph: ir.Graph | None = _graph(value)
        while graph is not None and graph is not owner:
            graph = self._around.get(graph)
        if graph is owner:
            return kept
        old = kept.name or ""
        del owner.initializers[old]
        kept.name = self._namer.value(f"{old}/share_common")
        self._model.graph.register_initializer(kept)
        return kept

    def _constant(self, value: ir.Value, role: str, array: Array) -> ir.Value:
        name = self._namer.value(f"{value.name}/share_{role}")
        return set_initializer(_graph(value), name, array)

    def _drop(self, value: ir.Value, what: str, nbytes: int) -> None:
        _graph(value).initializers.pop(value.name or "")
        self.changes.append(Change(value.name or "", "", what))
        self.saved_bytes += nbytes


def _graph(value: ir.Value) -> ir.Graph:
    graph = value.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"initializer '{value.name}' belongs to no graph")
    return graph


def _surroundings(model: ir.Model) -> dict[ir.Graph, ir.Graph]:
    """The graph around each subgraph."""
    found: dict[ir.Graph, ir.Graph] = {}
    for graph in model.graphs():
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    found[attribute.as_graph()] = graph
                elif attribute.type == ir.AttributeType.GRAPHS:
                    found |= dict.fromkeys(attribute.as_graphs(), graph)
    return found


def _turns(node: ir.Node, place: int) -> bool:
    """Whether a flag of the node can transpose the input."""
    return node.op_type == "Gemm" and node.domain == "" and place in (0, 1)


# --- comparing -----------------------------------------------------------------------------------


def _bits(array: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _numbers(array: Array) -> bytes:
    """A hash that no order of the elements changes."""
    width = array.dtype.itemsize
    rows = _bits(array)
    if width in (1, 2, 4, 8):
        rows = rows.view(f"u{width}")
    return hashlib.blake2b(np.sort(rows).tobytes()).digest()


def _permutation(source: Array, target: Array) -> tuple[int, ...] | None:
    """The order of axes that turns ``source`` into ``target``, bit by bit."""
    if source.ndim != target.ndim or not 2 <= source.ndim <= _MAX_RANK:
        return None
    for perm in _permutations(source.shape, target.shape):
        if np.array_equal(_bits(source.transpose(perm)), _bits(target)):
            return perm
    return None


def _permutations(source: tuple[int, ...], target: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for perm in itertools.permutations(range(len(source))):
        if perm != tuple(range(len(source))) and tuple(source[a] for a in perm) == target:
            yield perm


def _factor(source: Array, target: Array) -> Array | None:
    """What ``source`` times makes ``target``: a scalar, or one factor per position of one axis.

    Returns:
        Rank 0, or [1, .., n, .., 1]; None if ``target`` is no multiple.
    """
    first, second = source.astype(np.float64), target.astype(np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()) or not (
        first.any() and second.any()
    ):
        return None
    axes_kept: list[tuple[int, ...]] = [()]
    axes_kept += [(a,) for a in range(first.ndim) if 1 < first.shape[a] < first.size]
    for kept in axes_kept:
        others = tuple(a for a in range(first.ndim) if a not in kept)
        if not _may_be(first, second, kept):
            continue
        # Least squares; exact where the multiple is.
        power = (first**2).sum(axis=others, keepdims=True)
        product = (first * second).sum(axis=others, keepdims=True)
        factor = (product / np.where(power > 0, power, 1)).astype(target.dtype)
        with np.errstate(over="ignore"):
            made = (source * factor).astype(target.dtype)
        if not np.isfinite(made).all():
            continue
        step = np.spacing(np.abs(target)).astype(np.float64)
        if np.all(np.abs(made.astype(np.float64) - second) <= _LAST_PLACES * step):
            return np.asarray(factor.reshape(()) if not kept else factor)
    return None


def _may_be(
    first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], kept: tuple[int, ...]
) -> bool:
    """Cheaply: whether a few elements have one ratio (per position of the axis in ``kept``)."""
    axis = kept[0] if kept else 0
    rows = np.moveaxis(first, axis, 0) if kept else first.reshape(1, -1)
    others = np.moveaxis(second, axis, 0) if kept else second.reshape(1, -1)
    a = rows.reshape(len(rows), -1)[0, :_SAMPLE]
    b = others.reshape(len(others), -1)[0, :_SAMPLE]
    place = int(np.argmax(np.abs(a)))
    if a[place] == 0:
        return not b.any()
    return bool(np.allclose(b, a * (b[place] / a[place]), rtol=1e-5, atol=0))
