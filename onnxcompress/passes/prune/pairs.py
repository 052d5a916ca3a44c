"""Pairs of layers around removed channels, fitted together.

The layer that reads a pruned group has been refitted; the layer that makes it still makes what it
made in the original. Where nothing but an activation lies between the two
(:mod:`onnxcompress.passes.prune.elementwise`) and nobody else reads it, both are fitted to what the
second one should answer (:mod:`onnxcompress.numerics.joint`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.feeds import RunFeeds
from onnxcompress.calibration.geometry import ConvGrid, weight_order
from onnxcompress.calibration.statistics import ConvUnfold, Unfold
from onnxcompress.context import PassContext
from onnxcompress.graph.coupling import Coupling
from onnxcompress.numerics.clipping import Bounds
from onnxcompress.numerics.joint import Fitted, Floats, Layers, Rows, jointly
from onnxcompress.passes.prune.consumers import Consumer
from onnxcompress.passes.prune.elementwise import Chain, chain_behind
from onnxcompress.passes.prune.fit import FOLDS
from onnxcompress.passes.prune.jobs import Job, Task
from onnxcompress.passes.prune.ranking import workers_of
from onnxcompress.passes.prune.rows import axis_last, chosen_rows, floating, picked, unfolded
from onnxcompress.passes.prune.score import staying
from onnxcompress.passes.prune.stream import Stream

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
_Side = tuple[Consumer, Indices, Indices]

MOST_ROWS = 16384
"""Rows of the second layer that are fitted to."""
_MOST_BYTES = 128 << 20
"""Inputs of the first layer at all of their taps."""
_CHUNK_ROWS = 1024
"""Rows of the second layer that are treated at a time; threads share chunks."""
_ROWS_PER_COLUMN = 4
"""Rows for each input of either layer, at least."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers to fit together.

    Attributes:
        reader: The second one, as it is refitted alone.
        maker: The first one.
        data: Name of its (masked) data input in the masked model.
        inputs: Which of its input channels stay, [C].
        nodes: Names of the nodes from the first layer to the data of the second one.
        chain: The activation between them.
    """

    reader: Job
    maker: Consumer
    data: str
    inputs: Mask
    nodes: tuple[str, ...]
    chain: Chain

    @property
    def written(self) -> tuple[str, ...]:
        """Initializers of the first layer that get new values."""
        return (self.maker.weight, self.maker.bias or "")

    def fitted(
        self,
        model: ir.Model,
        stream: Stream,
        names: Mapping[str, str],
        ridge: float,
        ctx: PassContext,
    ) -> Fitted | None:
        """Both layers, their weights as :class:`Layers` holds them.

        None if there are too few rows, or the activation cannot be run apart.

        Args:
            model: Holds both layers with their current weights.
            stream: Holds the values that :attr:`Job.wanted` and :attr:`data` name.
            names: What values of the original are called in the stream.
            ridge: What suits the second layer.
            ctx: How to run, and the seed of the choice of rows.
        """
        fit, held = self._rows(stream, names, ctx.seed)
        if not fit or not held:
            return None
        layers = self._layers(model)
        x = held[0].x
        seen = x.reshape(-1, x.shape[2]) @ layers.first.T + layers.first_bias
        activation = self.chain.function(seen, ctx)
        if activation is None:
            return None
        bounds = self.reader.bounds or Bounds()
        with ThreadPoolExecutor(workers_of(ctx)) as pool:
            return jointly(fit, held, layers, activation, bounds, ridge=ridge, each=pool.map)

    def write(self, model: ir.Model, layers: Layers) -> None:
        """Store new weights of both."""
        weights = ((layers.first, layers.first_bias), (layers.second, layers.second_bias))
        for (consumer, rows, columns), (weight, bias) in zip(self._sides, weights, strict=True):
            matrix, offset = consumer.matrix(model), consumer.bias_vector(model)
            order = weight_order(consumer.unfold, len(columns))
            matrix[0][np.ix_(rows, columns)] = weight[:, order]
            offset[rows] = bias
            consumer.write(model, matrix, offset)

    @property
    def _sides(self) -> tuple[_Side, _Side]:
        """Both layers, with the rows and columns of their weights that stay."""
        hidden, second = np.flatnonzero(self.reader.inputs), self.reader.consumer
        return (
            (self.maker, hidden, self.maker.columns(np.flatnonzero(self.inputs))),
            (second, np.flatnonzero(self.reader.outputs), second.columns(hidden)),
        )

    def _layers(self, model: ir.Model) -> Layers:
        found: list[Floats] = []
        for consumer, rows, columns in self._sides:
            kept = consumer.matrix(model)[0][np.ix_(rows, columns)]
            placed = np.empty_like(kept)
            placed[:, weight_order(consumer.unfold, len(columns))] = kept
            bias = consumer.bias_vector(model)[rows]
            found += [placed.astype(np.float32), bias.astype(np.float32)]
        return Layers(*found)

    def _most_rows(self) -> int:
        (_, _, columns), (second, _, _) = self._sides
        return min(MOST_ROWS, _MOST_BYTES // (4 * second.taps * max(len(columns), 1)))

    def _rows(
        self, stream: Stream, names: Mapping[str, str], seed: int
    ) -> tuple[list[Rows], list[Rows]]:
        """Rows to fit to and, from other samples, to judge by; none if there are too few."""
        most = self._most_rows()
        least = _ROWS_PER_COLUMN * max(len(columns) for _, _, columns in self._sides)
        if stream.run_count < FOLDS:
            return [], []
        parts: tuple[list[Rows], list[Rows]] = ([], [])
        for number, rows in enumerate(self._runs(stream, names, most * FOLDS // (FOLDS - 1), seed)):
            parts[number % FOLDS == FOLDS - 1].append(rows)
        fit, held = (_chunks(p) for p in parts)
        return (fit, held) if sum(len(p.target) for p in fit) >= least else ([], [])

    def _runs(
        self, stream: Stream, names: Mapping[str, str], most: int, seed: int
    ) -> Iterator[Rows]:
        reader = self.reader
        wanted = [names.get(name, name) for name in (*reader.wanted, self.data)]
        data, total, *rest = wanted[:-1]
        random = np.random.default_rng(seed)
        for count, found in stream.feeds(list(dict.fromkeys(wanted))):
            feeds = RunFeeds(count, stream.sample_count, 1.0, random)
            target = axis_last(floating(found[total]), reader.consumer.target_axis)
            rows = chosen_rows(feeds, len(target), most)
            if rows is None:
                rows = np.arange(len(target), dtype=np.int64)
            hidden = found[data].shape
            places = tapped(reader.consumer.unfold, hidden, rows)
            inside = places >= 0
            x = unfolded(
                floating(found[wanted[-1]]),
                self.maker.unfold,
                self.inputs,
                np.where(inside, places, 0).ravel(),
                math.prod(hidden) // len(reader.inputs),
            )
            shortcut = None
            if rest:
                added = axis_last(floating(found[rest[0]]), reader.consumer.target_axis)
                shortcut = picked(added, rows, reader.outputs).astype(np.float32)
            yield Rows(
                x[0].reshape(*places.shape, -1).astype(np.float32, copy=False),
                inside,
                picked(target, rows, reader.outputs).astype(np.float32),
                shortcut,
            )


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
    half = len(lengths)
    begin, end = unfold.pads[:half], unfold.pads[half:]
    grid = ConvGrid(unfold, tuple(n + a + b for n, a, b in zip(lengths, begin, end, strict=True)))
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
    """The same rows in parts of about :data:`_CHUNK_ROWS`."""
    chunks: list[list[Rows]] = [[]]
    for part in parts:
        if sum(len(p.target) for p in chunks[-1]) >= _CHUNK_ROWS:
            chunks.append([])
        chunks[-1].append(part)
    return [_joined(chunk) for chunk in chunks if chunk]


def _joined(parts: Sequence[Rows]) -> Rows:
    shortcuts = [p.shortcut for p in parts if p.shortcut is not None]
    return Rows(
        np.concatenate([p.x for p in parts]),
        np.concatenate([p.inside for p in parts]),
        np.concatenate([p.target for p in parts]),
        np.concatenate(shortcuts) if shortcuts else None,
    )


def pairs_of(
    original: ir.Model,
    masked: ir.Model,
    levels: Sequence[Sequence[Task]],
    consumers: Mapping[str, Consumer],
    coupling: Coupling,
    kept: Mask,
) -> dict[str, Pair]:
    """The pairs behind removed units, by the name of the second layer.

    Args:
        original: The model before it was masked.
        masked: The model as it is refitted.
        levels: The layers that are refitted.
        consumers: All linear layers by the name of their node.
        coupling: The groups.
        kept: Which units stay.
    """
    own = {n.name or "" for n in original.graph}
    makers = {c.output: c for c in consumers.values() if c.obstacle is None}
    nodes = {n.name: n for n in masked.graph}
    pairs = {}
    for job in (j for level in levels for j in level if isinstance(j, Job)):
        consumer = job.consumer
        if consumer.groups > 1 or consumer.bias is None or job.inputs.all() or not job.inputs.any():
            continue
        read = nodes[consumer.node].inputs[0]
        chain = None if read is None else chain_behind(read, makers, own)
        if chain is None:
            continue
        maker = makers[chain.root.name or ""]
        data = nodes[maker.node].inputs[0]
        if data is None or maker.groups > 1 or maker.outputs != len(job.inputs):
            continue
        axis = 1 if isinstance(maker.unfold, ConvUnfold) else maker.target_axis
        inputs = staying(coupling, kept, maker.data, axis, maker.width // maker.taps)
        if inputs.any() and maker.bias is not None:
            between = _between(read, nodes[maker.node])
            pairs[consumer.node] = Pair(job, maker, data.name or "", inputs, between, chain)
    return pairs


def _between(read: ir.Value | None, maker: ir.Node) -> tuple[str, ...]:
    """Names of the nodes from a layer to what another one reads."""
    found: dict[ir.Node, None] = {maker: None}
    todo = [read]
    while todo:
        value = todo.pop()
        node = None if value is None else value.producer()
        if node is not None and node not in found:
            found[node] = None
            todo.extend(node.inputs)
    return tuple(node.name or "" for node in found)
