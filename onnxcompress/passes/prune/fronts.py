"""What a whole branch costs once the layer in front of it does its work.

Losses of groups are measured with the layers that read them refitted. A branch that goes whole
leaves nothing to refit there; the layer before the sum takes over instead. So the loss of the last
step is measured anew: with ``t`` the sum behind the branch, less the shortcut, the layer in front
gets

    W, b = argmin E‖t - W x - b‖² + ρ‖W - W₀‖²

from moments of the model as it is, which need one run of the data for all branches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress._threads import Each
from onnxcompress.calibration.statistics import (
    REFERENCE_PREFIX,
    CrossMomentsRequest,
    CrossMomentsResult,
    Statistics,
)
from onnxcompress.context import PassContext
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.surgery import mask
from onnxcompress.numerics.least_squares import Moments, regress
from onnxcompress.passes._batches import batches_within
from onnxcompress.passes.prune.branches import Branches
from onnxcompress.passes.prune.consumers import Consumer, Layers
from onnxcompress.passes.prune.jobs import Job, jobs_of
from onnxcompress.passes.prune.probe import OutputProbe
from onnxcompress.passes.prune.score import Ranking
from onnxcompress.passes.prune.suffix import Suffix, SuffixProbe

Weights = dict[str, npt.NDArray[np.generic]]

_RIDGE = 1e-2
"""``ρ``, relative to the mean variance of the inputs."""
MOMENT_BYTES = 1 << 30
"""Moments held at a time."""
_LEAST_ROWS = 4096
_ROWS_PER_COLUMN = 10


@dataclasses.dataclass(frozen=True, slots=True)
class _Front:
    """A branch that goes whole.

    Attributes:
        fitted: Layers that take over its work, and what to measure for that.
        silenced: Layers that then answer nothing, or a constant.
    """

    fitted: Mapping[Consumer, CrossMomentsRequest]
    silenced: Sequence[Consumer]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of all of these layers."""
        return tuple(sorted({c.node for c in (*self.fitted, *self.silenced)}))

    @property
    def nbytes(self) -> int:
        """Bytes of the moments."""
        return sum(8 * c.width * (c.groups * c.width + c.outputs) for c in self.fitted)

    @property
    def written(self) -> tuple[str, ...]:
        """Initializers that get new values."""
        layers = (*self.fitted, *self.silenced)
        names = [n for c in layers for n in (c.weight, c.bias) if n is not None]
        return tuple(dict.fromkeys(names))


def with_fronts(
    model: ir.Model,
    coupling: Coupling,
    rankings: Sequence[Ranking],
    branches: Collection[int],
    layers: Layers,
    whole: OutputProbe,
    ctx: PassContext,
    measuring: PassContext,
    each: Each,
) -> list[Ranking]:
    """Rankings with the loss of last steps measured behind a refit of the layers in front.

    A branch without a layer in front that could be refitted keeps its loss.

    Args:
        model: The model; nothing is removed yet.
        coupling: Its groups.
        rankings: Their losses, in units of the error of the outputs.
        branches: Groups all of whose units may go.
        layers: The linear layers.
        whole: Measures the outputs, on samples that nothing was fitted to.
        ctx: The job, with samples to fit to.
        measuring: The job as it measures the outputs.
        each: Measures, perhaps side by side.
    """
    fronts = {
        r.group.index: front
        for r in rankings
        if r.group.index in branches and len(r.losses) > r.group.size
        if (front := _front(model, coupling, r.group.index, layers)) is not None
    }
    if not fronts:
        return list(rankings)
    places = {n.name: i for i, n in enumerate(model.graph)}
    ordered = sorted(fronts, key=lambda g: min(places[n] for n in fronts[g].nodes))
    measured: dict[int, float] = {}
    changed = {g: (fronts[g].nodes, fronts[g].written) for g in ordered}

    def error(trial: tuple[int, Suffix, Weights]) -> tuple[int, float]:
        group, suffix, weights = trial
        return group, suffix.error_of(weights)

    with (
        SuffixProbe(model, whole, measuring, changed) as probe,
        ctx.progress.task("prune: trying without branches", len(ordered)) as task,
    ):
        for batch in batches_within(ordered, lambda g: fronts[g].nbytes, MOMENT_BYTES):
            requests = dict.fromkeys(r for g in batch for r in fronts[g].fitted.values())
            text = "prune: moments in front of branches"
            statistics = ctx.collect(model, requests, description=text)
            for group, found in each(error, _trials(model, probe, fronts, batch, statistics)):
                measured[group] = found
                task.advance()
    return [_lowered(r, measured.get(r.group.index)) for r in rankings]


def _trials(
    model: ir.Model,
    probe: SuffixProbe,
    fronts: Mapping[int, _Front],
    groups: Sequence[int],
    statistics: Statistics,
) -> Iterator[tuple[int, Suffix, Weights]]:
    """For each group that can be measured what lies behind, and the weights without it."""
    for group in groups:
        suffix = probe.at(group)
        if suffix is not None:
            found = {c: statistics[r] for c, r in fronts[group].fitted.items()}
            yield group, suffix, _weights(model, fronts[group], found)


def _front(model: ir.Model, coupling: Coupling, group: int, layers: Layers) -> _Front | None:
    """The layers that take over the work of a branch; None where there is none."""
    removed = {group: np.arange(coupling.groups[group].size)}
    branches = Branches.of(model, coupling, removed, layers)
    silenced = [layers.consumers.get(name) for name in sorted(branches.emptied.layers)]
    masked = mask(model, coupling, removed)
    branches.hush(masked, layers)
    kept = coupling.kept(removed)
    levels, _ = jobs_of(model, masked, coupling, kept, layers, False, branches)
    moved = [job for level in levels for job in level if isinstance(job, Job) and job.moved]
    if not moved or any(c is None or c.obstacle or c.node not in branches.hushed for c in silenced):
        return None
    return _Front(
        {
            job.consumer: CrossMomentsRequest(
                job.consumer.data,
                job.consumer.unfold,
                tuple((name.removeprefix(REFERENCE_PREFIX), sign) for name, sign in job.target),
                job.consumer.target_axis,
                max(_LEAST_ROWS, _ROWS_PER_COLUMN * job.consumer.width),
            )
            for job in moved
        },
        [c for c in silenced if c is not None],
    )


def _weights(
    model: ir.Model, front: _Front, moments: Mapping[Consumer, CrossMomentsResult]
) -> Weights:
    """New initializers: nothing of the branch, and its work in the layers in front."""
    stored: Weights = {}
    for consumer in front.silenced:
        nothing = np.zeros_like(consumer.matrix(model))
        stored |= consumer.stored(model, nothing, np.zeros(consumer.outputs))
    for consumer, found in moments.items():
        prior, bias = consumer.matrix(model), consumer.bias_vector(model)
        fitted, offsets = np.empty_like(prior), found.mean_y.reshape(consumer.groups, -1)
        for g in range(consumer.groups):
            seen = Moments(
                found.count, found.mean_x[g], offsets[g], found.covariance[g], found.cross[g]
            )
            if consumer.bias is None:
                seen = seen.uncentred()
            fitted[g], shift = regress(seen, prior[g], _RIDGE)
            bias.reshape(consumer.groups, -1)[g] = shift
        stored |= consumer.stored(model, fitted, bias)
    return stored


def _lowered(ranking: Ranking, last: float | None) -> Ranking:
    """The ranking with another loss of its last step.

    What costs more than the whole group costs no more than that: who can spare the group can spare
    a part of it.
    """
    if last is None:
        return ranking
    losses = ranking.losses.copy()
    losses[-1] = min(losses[-1], last)
    losses = np.minimum.accumulate(losses[::-1])[::-1]
    return dataclasses.replace(ranking, losses=losses)
