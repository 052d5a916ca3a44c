"""In which order the units of every group go, and what that is predicted to cost.

With calibration data the consumers of a group become blocks of the elimination in
:mod:`onnxcompress.numerics.least_squares`; its error curve has the right shape but not the right
height, for an error in one layer can matter more to the model's outputs than the same error in
another. So each curve is scaled by measurements: the error of the model's outputs when a quarter
and when half of this group alone is removed. Without data the curves are sums of squared normalized
magnitudes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import ConvUnfold, MomentsRequest, Statistics
from onnxcompress.graph.constants import constant_of, initializer, set_initializer
from onnxcompress.graph.coupling import Coupling, Group, Sink, Source
from onnxcompress.graph.surgery import mask
from onnxcompress.numerics import importance
from onnxcompress.numerics.least_squares import (
    Block,
    best_fit,
    eliminate,
    removal_energy,
    shrunk,
)
from onnxcompress.passes.prune.consumers import MAX_WIDTH, Consumer
from onnxcompress.passes.prune.options import Importance, PruneOptions
from onnxcompress.passes.prune.probe import OutputProbe
from onnxcompress.passes.prune.suffix import Suffix

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_Moment = tuple[Array, Array]
"""``H`` of a layer that reads a group, [G, D, D], and the means of its inputs, [G, D]."""

ROWS_PER_COLUMN = 50
"""Rows collected for each unfolded input; fewer than 10 overfit."""
MIN_ROWS = 16384
PROBED = (0.25, 0.5, 0.75)
"""Parts of a group whose removal is measured."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The order of removal of one group.

    Attributes:
        group: The group.
        order: Units, first to go first.
        losses: Predicted loss after the first k removals, [len(order) + 1].
        basis: What it rests on, for the report ("obs", "l2", ...).
    """

    group: Group
    order: Indices
    losses: Array
    basis: str


@dataclass(frozen=True, slots=True)
class Reader:
    """A consumer that reads a group, with the columns of each unit, one entry per channel group."""

    consumer: Consumer
    columns: tuple[tuple[int, Indices], ...]


def row_limit(width: int) -> int:
    """Rows to collect for an unfolded width."""
    return max(MIN_ROWS, ROWS_PER_COLUMN * width)


def magnitude_rows(model: ir.Model, group: Group) -> list[Array]:
    """The weights that make each unit, one [units, n] per layer; those that read it if none do."""
    places: Sequence[Source | Sink] = group.sources or group.sinks
    rows = []
    for place in places:
        if place.weight is None or place.weight_axis is None:
            continue
        stored = constant_of(initializer(model, place.weight))
        if stored is None:
            continue
        weight = np.moveaxis(stored.astype(np.float64), place.weight_axis, 0)
        if place.positions.max(initial=0) < len(weight):
            rows.append(weight[place.positions].reshape(group.size, -1))
    return rows


def rank_by_weights(
    model: ir.Model, group: Group, criterion: Importance, seed: int
) -> tuple[Indices, Array]:
    """Order and loss curve of one group from its weights alone.

    The loss of a unit is its squared normalized score, so that groups compare by what stands out
    within them.
    """
    if criterion is Importance.RANDOM:
        scores = importance.random(group.size, seed + group.index)
        return np.argsort(scores, kind="stable"), np.arange(group.size + 1.0)
    scores = np.zeros(group.size)
    for rows in magnitude_rows(model, group):
        if criterion is Importance.GEOMETRIC_MEDIAN:
            part = importance.geometric_median(rows)
        else:
            part = importance.magnitude(rows, 1 if criterion is Importance.L1 else 2)
        scores += importance.normalized(part)
    order = np.argsort(scores, kind="stable")
    losses = importance.normalized(scores[order]) ** 2
    if not losses.any():  # its weights are computed: all units look alike, and none is free
        losses = np.ones(group.size)
    return order, np.concatenate([[0.0], np.cumsum(losses)])


def rank_without_data(
    model: ir.Model, groups: Iterable[Group], criterion: Importance, seed: int
) -> list[Ranking]:
    """Rankings of all groups from their weights alone."""
    return [
        Ranking(g, *rank_by_weights(model, g, criterion, seed), criterion.value) for g in groups
    ]


def readers_of(group: Group, consumers: Mapping[str, Consumer]) -> list[Reader]:
    """The linear layers that contract the group's units, and which columns each unit owns."""
    readers = []
    for sink in group.sinks:
        consumer = consumers.get(sink.node)
        if consumer is None or sink.weight != consumer.weight or sink.data_input != 0:
            continue
        if consumer.width > MAX_WIDTH:
            continue
        channels = consumer.width // consumer.taps
        blocks: list[tuple[int, Indices]] = []
        for g in np.unique(sink.positions // channels):
            inside = sink.positions // channels == g
            counts = inside.sum(axis=1)
            if counts.min() != counts.max() or counts[0] == 0:
                blocks = []
                break
            own = (sink.positions[inside] % channels).reshape(group.size, -1)
            blocks.append((int(g), consumer.columns(own)))
        if blocks:
            readers.append(Reader(consumer, tuple(blocks)))
    return readers


def staying(
    coupling: Coupling, kept: npt.NDArray[np.bool_], value: str, axis: int, length: int
) -> npt.NDArray[np.bool_]:
    """Which positions on an axis of a value of the original stay, [length]."""
    axes = coupling.axes.get(value)
    units = None if axes is None else axes[axis]
    if units is None:
        return np.ones(length, np.bool_)
    return np.asarray((units < 0) | kept[units])


def moments_request(consumer: Consumer) -> MomentsRequest:
    """The input moments of a consumer."""
    return MomentsRequest(consumer.data, consumer.unfold, row_limit(consumer.width))


def between(scales: Mapping[int, float], count: int) -> Array:
    """Factors for 0 to ``count - 1`` removals from those measured, linear in the logarithm.

    Beyond the first and the last measurement the nearest one counts; without any all are 1.
    """
    if not scales:
        return np.ones(count)
    places = sorted(scales)
    logs = [np.log(max(scales[n], np.finfo(np.float64).tiny)) for n in places]
    return np.asarray(np.exp(np.interp(np.arange(count), places, logs)))


@dataclass(frozen=True, slots=True)
class State:
    """The model as it is now.

    Attributes:
        model: It, with the units of ``removed`` still in it.
        coupling: Its groups.
        kept: Which units stay, as :meth:`Coupling.kept`.
        removed: Units already removed, by group.
        probe: Measures how far outputs are from those without the units already removed.
        branches: Groups all of whose units may go.
    """

    model: ir.Model
    coupling: Coupling
    kept: npt.NDArray[np.bool_]
    removed: Mapping[int, Indices]
    probe: OutputProbe
    branches: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Scored:
    """One group together with the moments of its readers."""

    state: State
    group: Group
    readers: Sequence[Reader]
    statistics: Statistics

    @property
    def model(self) -> ir.Model:
        """The model with all units."""
        return self.state.model

    def rank(self, options: PruneOptions, seed: int, suffix: Suffix | None) -> Ranking:
        """The order of removal, scaled by errors measured when parts of what is left go."""
        moments = [self._moment(reader) for reader in self.readers]
        order, losses, basis = self._curve(options, seed, moments)
        gone = self.state.removed.get(self.group.index, np.zeros(0, np.int64))
        order = np.concatenate([gone, order[~np.isin(order, gone)]])
        losses = losses - losses[len(gone)]
        losses[: len(gone)] = 0.0
        scales: dict[int, float] = {}
        left = self.group.size - len(gone)
        for share in (*PROBED, 1.0) if self._whole else PROBED:
            count = len(gone) + max(1, min(int(left * share), len(order) - len(gone)))
            if count < len(losses) and losses[count] > 0 and count not in scales:
                error = self._measured(order[:count], options, suffix, moments)
                scales[count] = error / losses[count]
        return Ranking(self.group, order, losses * between(scales, len(losses)), basis)

    @property
    def _whole(self) -> bool:
        """Whether all units may go."""
        return self.group.index in self.state.branches

    def _measured(
        self,
        removed: Indices,
        options: PruneOptions,
        suffix: Suffix | None,
        moments: Sequence[_Moment],
    ) -> float:
        """The error of the model's outputs when ``removed`` are gone from this group."""
        if suffix is not None:
            return suffix.error_of(self._weights(removed, moments if options.recover else None))
        variant = mask(
            self.model, self.state.coupling, {**self.state.removed, self.group.index: removed}
        )
        if options.recover:
            for name, array in self._weights(removed, moments).items():
                set_initializer(variant.graph, name, array)
        return self.state.probe.error_of(variant)

    def _alive(self, reader: Reader) -> npt.NDArray[np.bool_]:
        """Which columns of the reader's groups are still read, [G, D]."""
        consumer = reader.consumer
        axis = 1 if isinstance(consumer.unfold, ConvUnfold) else consumer.target_axis
        channels = consumer.width // consumer.taps
        stays = staying(
            self.state.coupling,
            self.state.kept,
            consumer.data,
            axis,
            channels * consumer.groups,
        )
        return np.repeat(stays.reshape(consumer.groups, channels), consumer.taps, axis=1)

    def _curve(
        self, options: PruneOptions, seed: int, moments: Sequence[_Moment]
    ) -> tuple[Indices, Array, str]:
        criterion = options.importance
        pairs = zip(self.readers, moments, strict=True)
        blocks = [b for reader, (moment, _) in pairs for b in self._blocks(reader, moment)]
        if criterion in {Importance.AUTO, Importance.OBS} and blocks:
            found = eliminate(blocks, keep=0 if self._whole else 1)
            if options.recover:
                return found.order, found.errors, Importance.OBS.value
            return found.order, removal_energy(blocks, found.order), Importance.OBS.value
        if criterion is Importance.ACTIVATION and blocks:
            scores = self._activation_scores(blocks)
            order = np.argsort(scores, kind="stable")
        else:
            criterion = (
                Importance.L2 if criterion.needs_data or criterion is Importance.AUTO else criterion
            )
            order, losses = rank_by_weights(self.model, self.group, criterion, seed)
        if blocks:
            keep = 0 if self._whole else 1
            order = order[: self.group.size - keep]
            losses = (
                eliminate(blocks, keep=keep, order=order).errors
                if options.recover
                else removal_energy(blocks, order)
            )
        return order, losses, criterion.value

    def _activation_scores(self, blocks: Sequence[Block]) -> Array:
        scores = np.zeros(self.group.size)
        for block in blocks:
            rows = np.moveaxis(block.weight[:, block.columns], 1, 0)  # [U, O, m]
            energy = np.diag(block.moment)[block.columns][:, None, :]
            part = importance.activation_weighted(
                rows.reshape(self.group.size, -1),
                np.broadcast_to(energy, rows.shape).reshape(self.group.size, -1),
            )
            scores += importance.normalized(part)
        return scores

    def _moment(self, reader: Reader) -> _Moment:
        """``H`` [G, D, D], centred where a bias can take up the mean, and the means [G, D]."""
        found = self.statistics[moments_request(reader.consumer)]
        covariance = np.stack([shrunk(c, found.count) for c in found.covariance])
        alive = self._alive(reader)
        mean = found.mean * alive
        covariance *= alive[:, :, None] & alive[:, None, :]
        if reader.consumer.bias is not None:
            return covariance, mean
        return covariance + mean[:, :, None] * mean[:, None, :], np.zeros_like(mean)

    def _weight(self, reader: Reader) -> Array:
        """``W`` [G, O/G, D], zero where nothing is read any longer."""
        return reader.consumer.matrix(self.model) * self._alive(reader)[:, None, :]

    def _blocks(self, reader: Reader, moment: Array) -> list[Block]:
        weight = self._weight(reader)
        energy = float(np.sum(weight @ moment * weight))
        scale = 1.0 / energy if energy > 0 else 0.0
        return [Block(weight[g], moment[g], columns, scale) for g, columns in reader.columns]

    def _weights(
        self, removed: Indices, moments: Sequence[_Moment] | None
    ) -> dict[str, npt.NDArray[np.generic]]:
        """The readers' initializers without the removed units.

        With ``moments`` of each reader they are refitted to make up for them.
        """
        stored: dict[str, npt.NDArray[np.generic]] = {}
        for number, reader in enumerate(self.readers):
            consumer = reader.consumer
            if consumer.obstacle:
                continue
            weight = self._weight(reader)
            fitted = weight.copy()
            shift = np.zeros(consumer.outputs)
            for g, columns in reader.columns:
                fitted[g][:, columns[removed].ravel()] = 0.0
            if moments is not None:
                moment, mean = moments[number]
                for g, columns in reader.columns:
                    gone = columns[removed].ravel()
                    kept = np.setdiff1d(np.arange(consumer.width), gone)
                    if len(kept):
                        fitted[g][:, kept] = best_fit(moment[g], weight[g], kept)
                shift = np.einsum("god,gd->go", weight - fitted, mean).reshape(-1)
            stored |= consumer.stored(self.model, fitted, consumer.bias_vector(self.model) + shift)
        return stored
