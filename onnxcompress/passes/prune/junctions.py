"""Layers on both sides of a hidden tensor, fitted together.

The layers that read a pruned group have been refitted; those that make it still make what they made
in the original. Where nothing but activations, a Concat and a MaxPool lie between
(:mod:`onnxcompress.passes.prune.hidden`), all of them are fitted to what the readers should answer
(:mod:`onnxcompress.numerics.joint`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress._threads import Each
from onnxcompress.calibration.feeds import RunFeeds
from onnxcompress.calibration.geometry import ConvGrid, weight_order
from onnxcompress.calibration.statistics import ConvUnfold, Unfold
from onnxcompress.context import PassContext
from onnxcompress.graph.coupling import Coupling
from onnxcompress.numerics.clipping import Bounds
from onnxcompress.numerics.hidden import Floats, Layer, Layers, Rows
from onnxcompress.numerics.joint import Fitted, Task, jointly
from onnxcompress.numerics.places import Places
from onnxcompress.numerics.scalar_function import ScalarFunction
from onnxcompress.passes.prune.consumers import Consumer
from onnxcompress.passes.prune.fit import FOLDS
from onnxcompress.passes.prune.hidden import Branch, Hidden, hidden_behind, nodes_between
from onnxcompress.passes.prune.jobs import Job
from onnxcompress.passes.prune.jobs import Task as Refitting
from onnxcompress.passes.prune.rows import (
    Floating,
    chosen_rows,
    floating,
    picked,
    rows_along,
    unfolded,
)
from onnxcompress.passes.prune.score import staying
from onnxcompress.passes.prune.stream import Stream

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
_Side = tuple[Consumer, Indices, Indices]

MOST_ROWS = 16384
"""Rows of one of the layers behind that are fitted to."""
_MOST_BYTES = 256 << 20
"""Inputs of the layers in front at the places that those behind read."""
_CHUNK_BYTES = 2 << 20
"""Of rows that are treated at a time, at least; threads share such chunks."""
_ROWS_PER_COLUMN = 4
"""Rows for each input of any of the layers, at least."""


@dataclass(frozen=True, slots=True)
class Maker:
    """A layer in front of a hidden tensor.

    Attributes:
        branch: It, and what follows up to the tensor.
        data: Name of its (masked) data input in the masked model.
        inputs: Which of its input channels stay, [C].
        outputs: Which of its outputs stay, [O].
    """

    branch: Branch
    data: str
    inputs: Mask
    outputs: Mask

    @property
    def side(self) -> _Side:
        """The layer, with the rows and columns of its weight that stay."""
        layer = self.branch.layer
        return layer, np.flatnonzero(self.outputs), layer.columns(np.flatnonzero(self.inputs))


@dataclass(frozen=True, slots=True)
class Junction:
    """The layers on both sides of a hidden tensor.

    Attributes:
        makers: Those that make it, in the order of its channels.
        readers: Those that read it, as they are refitted alone.
        hidden: What lies between.
        nodes: Names of the nodes from the makers, them included, to what the readers read.
    """

    makers: tuple[Maker, ...]
    readers: tuple[Job, ...]
    hidden: Hidden
    nodes: tuple[str, ...]

    @property
    def written(self) -> tuple[str, ...]:
        """Initializers of the layers in front, which get new values."""
        layers = [m.branch.layer for m in self.makers]
        return tuple(n for c in layers for n in (c.weight, c.bias) if n is not None)

    @property
    def data(self) -> tuple[str, ...]:
        """What the layers in front read."""
        return tuple(m.data for m in self.makers)

    def fitted(
        self,
        model: ir.Model,
        stream: Stream,
        names: Mapping[str, str],
        ridges: Sequence[float],
        ctx: PassContext,
        each: Each = map,
    ) -> Fitted | None:
        """All layers, their weights as :class:`Layers` holds them.

        None if there are too few rows, or an activation cannot be run apart.

        Args:
            model: Holds the layers with their current weights.
            stream: Holds the values that :attr:`Job.wanted` and :attr:`data` name.
            names: What values of the original are called in the stream.
            ridges: What suits each of the layers behind.
            ctx: How to run, and the seed of the choice of rows.
            each: Runs over parts of the rows.
        """
        tasks = []
        for reader, ridge in zip(self.readers, ridges, strict=True):
            fit, held = self._rows(reader, stream, names, ctx.seed, each)
            if not fit or not held:
                return None
            bounds = reader.bounds or Bounds()
            tasks.append(Task(fit, held, bounds, ridge))
        layers = self._layers(model)
        activations: list[ScalarFunction] = []
        for number, (maker, layer) in enumerate(zip(self.makers, layers.first, strict=True)):
            seen = tasks[0].held[0].x[number] @ layer.weight.T + layer.bias
            activation = maker.branch.function(seen, ctx)
            if activation is None:
                return None
            activations.append(activation)
        return jointly(tasks, layers, activations, each=each)

    def write(self, model: ir.Model, layers: Layers) -> None:
        """Store new weights of all layers."""
        sides = [m.side for m in self.makers] + [_side(r) for r in self.readers]
        for (consumer, rows, columns), layer in zip(
            sides, (*layers.first, *layers.second), strict=True
        ):
            matrix, offset = consumer.matrix(model), consumer.bias_vector(model)
            order = weight_order(consumer.unfold, len(columns))
            matrix[0][np.ix_(rows, columns)] = layer.weight[:, order]
            offset[rows] = layer.bias
            consumer.write(model, matrix, offset)

    def _layers(self, model: ir.Model) -> Layers:
        return Layers(
            tuple(_layer(model, m.side) for m in self.makers),
            tuple(_layer(model, _side(r)) for r in self.readers),
        )

    def _most_rows(self, reader: Job, stream: Stream, names: Mapping[str, str]) -> int:
        """Rows of a layer behind whose places surely fit into memory."""
        width = sum(len(m.side[2]) for m in self.makers)
        fitting = _MOST_BYTES // (len(self.readers) * 4 * max(width, 1))
        _, shapes = stream.shapes(names.get(self.data[0], self.data[0]))
        if sum(self._places(shape) for shape in shapes) <= fitting:
            return MOST_ROWS
        return min(MOST_ROWS, fitting // (reader.consumer.taps * self.hidden.pooled))

    def _places(self, shape: Sequence[int]) -> int:
        """How many places the hidden tensor has, from the shape of what the first maker reads."""
        return math.prod(self._shape(shape))

    def _shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The hidden tensor's shape, but one channel, from that of what the first maker reads."""
        return made_shape(self.makers[0].branch.layer.unfold, shape)

    def _rows(
        self, reader: Job, stream: Stream, names: Mapping[str, str], seed: int, each: Each
    ) -> tuple[list[Rows], list[Rows]]:
        """Rows to fit to and, from other samples, to judge by; none if there are too few."""
        most = self._most_rows(reader, stream, names)
        sides = [*(m.side for m in self.makers), _side(reader)]
        least = _ROWS_PER_COLUMN * max(len(columns) for _, _, columns in sides)
        if stream.run_count < FOLDS:
            return [], []
        parts: tuple[list[Rows], list[Rows]] = ([], [])
        drawn = self._drawn(reader, stream, names, most * FOLDS // (FOLDS - 1), seed)
        for number, rows in enumerate(each(functools.partial(self._seen, reader), drawn)):
            parts[number % FOLDS == FOLDS - 1].append(rows)
        fit, held = (_chunks(p) for p in parts)
        return (fit, held) if sum(len(p.target) for p in fit) >= least else ([], [])

    def _drawn(
        self, reader: Job, stream: Stream, names: Mapping[str, str], most: int, seed: int
    ) -> Iterator[_Drawn]:
        """For each run some rows of a layer behind, and the values to make them from."""
        _, total, *rest = (names.get(name, name) for name in reader.wanted)
        data = [names.get(name, name) for name in self.data]
        axis, random = reader.consumer.target_axis, np.random.default_rng(seed)
        for count, found in stream.feeds(list(dict.fromkeys([total, *rest, *data]))):
            there = found[total].size // found[total].shape[axis]
            rows = chosen_rows(RunFeeds(count, stream.sample_count, 1.0, random), there, most)
            yield _Drawn(
                np.arange(there, dtype=np.int64) if rows is None else rows,
                [floating(found[name]) for name in data],
                floating(found[total]),
                floating(found[rest[0]]) if rest else None,
            )

    def _seen(self, reader: Job, drawn: _Drawn) -> Rows:
        """What the layers see and should answer there."""
        shape = self._shape(drawn.inputs[0].shape)
        read = read_places(reader.consumer.unfold, self.hidden.pool, shape, drawn.rows)
        # Numbers begin with that of padding, if there is any, which goes to the end.
        numbers, inverse = np.unique(read, return_inverse=True)
        own = numbers[numbers >= 0]
        places = (inverse - (len(numbers) - len(own))) % (len(own) + 1)
        x = tuple(
            unfolded(data, m.branch.layer.unfold, m.inputs, own, math.prod(shape))[0].astype(
                np.float32
            )
            for m, data in zip(self.makers, drawn.inputs, strict=True)
        )

        def picked_rows(value: Floating) -> Floats:
            taken = rows_along(value, reader.consumer.target_axis, drawn.rows)
            return picked(taken, None, reader.outputs).astype(np.float32)

        shortcut = None if drawn.shortcut is None else picked_rows(drawn.shortcut)
        grouped = places.reshape(len(drawn.rows), -1, self.hidden.pooled)
        return Rows(x, Places.of(grouped, len(own)), picked_rows(drawn.total), shortcut)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Rows of a layer behind a hidden tensor, of one run.

    Attributes:
        rows: Their numbers, [k].
        inputs: What each layer in front reads.
        total: What gives the target.
        shortcut: What is subtracted from it; None for nothing.
    """

    rows: Indices
    inputs: Sequence[Floating]
    total: Floating
    shortcut: Floating | None


def _side(reader: Job) -> _Side:
    """A layer behind a hidden tensor, with the rows and columns of its weight that stay."""
    columns = reader.consumer.columns(np.flatnonzero(reader.inputs))
    return reader.consumer, np.flatnonzero(reader.outputs), columns


def _layer(model: ir.Model, side: _Side) -> Layer:
    """What stays of a layer, columns tap first."""
    consumer, rows, columns = side
    kept = consumer.matrix(model)[0][np.ix_(rows, columns)]
    placed = np.empty_like(kept)
    placed[:, weight_order(consumer.unfold, len(columns))] = kept
    bias = consumer.bias_vector(model)[rows]
    return Layer(placed.astype(np.float32), bias.astype(np.float32))


def made_shape(unfold: Unfold, shape: Sequence[int]) -> tuple[int, ...]:
    """Samples, 1 and the other lengths of what a layer makes of a tensor.

    Args:
        unfold: How the layer reads it.
        shape: The tensor's shape.
    """
    if not isinstance(unfold, ConvUnfold):
        return (int(np.prod(shape[:-1])), 1)
    return (shape[0], 1, *ConvGrid.over(unfold, shape[2:]).outputs)


def read_places(
    unfold: Unfold, pool: ConvUnfold | None, shape: Sequence[int], rows: Indices
) -> Indices:
    """Which rows of a hidden tensor each row of a layer behind it reads.

    Args:
        unfold: How the layer reads what the pooling makes.
        pool: How the pooling reads the tensor; None where there is none.
        shape: The tensor's shape.
        rows: Rows of the layer, [k].

    Returns:
        [k, taps · places of the pooling]: numbers of the tensor's rows (its samples and positions,
        flattened); -1 for padding.
    """
    if pool is None:
        return tapped(unfold, shape, rows)
    taps = tapped(unfold, made_shape(pool, shape), rows)
    places = tapped(pool, shape, np.maximum(taps, 0).ravel())
    return np.where(taps.reshape(-1, 1) >= 0, places, -1).reshape(len(rows), -1)


def tapped(unfold: Unfold, shape: Sequence[int], rows: Indices) -> Indices:
    """Which rows of a tensor each row of the layer behind it reads.

    Args:
        unfold: How the layer reads the tensor.
        shape: The tensor's shape.
        rows: Rows of the layer, [k].

    Returns:
        [k, taps]: numbers of the tensor's rows (its samples and positions, flattened); -1 where a
        tap is padding.
    """
    if not isinstance(unfold, ConvUnfold):
        return rows[:, np.newaxis]
    lengths = tuple(shape[2:])
    grid, begin = ConvGrid.over(unfold, lengths), unfold.pads[: len(lengths)]
    sample, place = np.divmod(rows, grid.per_sample)
    flat = grid.places()[place]
    found = np.broadcast_to(sample[:, np.newaxis], flat.shape).copy()
    inside = np.ones(flat.shape, np.bool_)
    coordinates = np.unravel_index(flat, grid.padded)
    for coordinate, length, before in zip(coordinates, lengths, begin, strict=True):
        position = coordinate - before
        inside &= (position >= 0) & (position < length)
        found = found * length + position
    return np.where(inside, found, -1)


def _chunks(parts: Sequence[Rows]) -> list[Rows]:
    """The same rows in parts of :data:`_CHUNK_BYTES` or more."""
    chunks: list[list[Rows]] = [[]]
    for part in (p for p in parts if len(p.target)):
        if sum(x.nbytes for p in chunks[-1] for x in p.x) >= _CHUNK_BYTES:
            chunks.append([])
        chunks[-1].append(part)
    return [_joined(chunk) for chunk in chunks if chunk]


def _joined(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    shortcuts = [p.shortcut for p in parts if p.shortcut is not None]
    return Rows(
        tuple(np.concatenate(same) for same in zip(*(p.x for p in parts), strict=True)),
        Places.joined([p.places for p in parts]),
        np.concatenate([p.target for p in parts]),
        np.concatenate(shortcuts) if shortcuts else None,
    )


def junctions_of(
    original: ir.Model,
    masked: ir.Model,
    levels: Sequence[Sequence[Refitting]],
    consumers: Mapping[str, Consumer],
    coupling: Coupling,
    kept: Mask,
) -> dict[str, Junction]:
    """The junctions that lost units, by the name of the last one that is refitted of their readers.

    Args:
        original: The model before it was masked.
        masked: The model as it is refitted.
        levels: The layers that are refitted.
        consumers: All linear layers by the name of their node.
        coupling: The groups.
        kept: Which units stay.
    """
    own = {n.name or "" for n in original.graph}
    makers = {
        c.output: c for c in consumers.values() if not c.obstacle and c.groups == 1 and c.bias
    }
    nodes = {n.name: n for n in masked.graph}
    found: dict[str, Junction] = {}
    for level in levels:
        jobs = {j.consumer.node: j for j in level if isinstance(j, Job)}
        for name in jobs:
            read = nodes[name].inputs[0]
            hidden = None if read is None else hidden_behind(read, makers, own)
            # All must be refitted by then, and nothing behind them yet.
            if hidden is None or not jobs.keys() >= set(hidden.readers):
                continue
            readers = [job for other, job in jobs.items() if other in hidden.readers]
            if name != readers[-1].consumer.node:
                continue
            junction = _junction(nodes, readers, hidden, coupling, kept)
            if junction is not None:
                found[name] = junction
    return found


def _junction(
    nodes: Mapping[str | None, ir.Node],
    readers: Sequence[Job],
    hidden: Hidden,
    coupling: Coupling,
    kept: Mask,
) -> Junction | None:
    """The junction, if units are gone from it and all layers can be fitted."""
    stays, branches = readers[0].inputs, hidden.branches
    if stays.all() or not stays.any():
        return None
    alike = all(np.array_equal(r.inputs, stays) for r in readers)
    linear = all(r.consumer.groups == 1 and r.consumer.bias is not None for r in readers)
    if not alike or not linear or sum(b.layer.outputs for b in branches) != len(stays):
        return None
    makers = []
    ends = np.cumsum([b.layer.outputs for b in branches])
    for branch, outputs in zip(branches, np.split(stays, ends[:-1]), strict=True):
        layer = branch.layer
        data = nodes[layer.node].inputs[0]
        axis = 1 if isinstance(layer.unfold, ConvUnfold) else layer.target_axis
        inputs = staying(coupling, kept, layer.data, axis, layer.width // layer.taps)
        if data is None or not inputs.any():
            return None
        if outputs.any():
            makers.append(Maker(branch, data.name or "", inputs, outputs))
    between = nodes_between(
        [nodes[r.consumer.node].inputs[0] for r in readers],
        [nodes[b.layer.node] for b in branches],
    )
    return Junction(tuple(makers), tuple(readers), hidden, between)
