"""Recovery without training: later layers learn to make up for what was removed before them.

Layers are refitted in the order in which data flows. For each, the inputs ``x`` come from the model
as compressed so far and the target ``y`` from the original, so that a layer repairs its own lost
inputs and also the errors that reach it from before. Where its output is added to a shortcut, the
target is the original sum less the shortcut *as it is now*: the branch then repairs the shortcut.

    W, b = argmin E‖y - W x - b‖² + ρ‖W - W_S‖²,     y = y₀ + (shortcut₀ - shortcut)

``ρ`` is chosen on held-out samples, and a fit that is not better there than the old weights (with
the mean of the error taken up by the bias) is not used.

Everything runs on the masked model, which has the original's shapes: removed channels are zero
columns of ``x`` and unused rows of ``y``.

Source: He et al. 2017, "Channel pruning for accelerating very deep networks" (asymmetric,
sequential reconstruction); Luo et al. 2017, "ThiNet".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.join import join
from onnxcompress.calibration.statistics import (
    ConvUnfold,
    CrossMomentsRequest,
    CrossMomentsResult,
    Statistics,
)
from onnxcompress.context import PassContext
from onnxcompress.errors import DataError, ModelError
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.surgery import mask
from onnxcompress.numerics.least_squares import Moments, choose_ridge, regress, residual_energy
from onnxcompress.passes._residual import residual_target, trace
from onnxcompress.passes.prune.clipping import Bounds, bounds_of, clipped_target
from onnxcompress.passes.prune.consumers import Consumer, Layers
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.passes.prune.samples import split
from onnxcompress.passes.prune.score import row_limit, staying
from onnxcompress.passes.prune.stages import plan_stages
from onnxcompress.passes.prune.store import ActivationStore
from onnxcompress.passes.prune.stream import Stream

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for the ridge, relative to the mean variance of the inputs."""
_TURNS = 2
"""Refits of a layer towards what its activation lets through."""
_FALLBACK_RIDGE = 1e-1
"""Where there are too few samples to hold any out."""


@dataclass(frozen=True, slots=True)
class Refit:
    """What became of one layer.

    Attributes:
        consumer: The layer.
        ridges: The ridge used for each group; infinite where only the bias changed, None where
            nothing did.
        rows_per_column: Rows seen per unfolded input.
    """

    consumer: Consumer
    ridges: tuple[float | None, ...]
    rows_per_column: float

    @property
    def used(self) -> bool:
        """Whether any group got new weights."""
        return any(r is not None for r in self.ridges)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was refitted, and which layers downstream of a removal could not be.

    Attributes:
        refits: The layers treated, in topological order of their levels.
        untreated: Node name to the reason.
    """

    refits: tuple[Refit, ...]
    untreated: Mapping[str, str]


def recover(
    model: ir.Model,
    reference: ir.Model,
    coupling: Coupling,
    removed: Mapping[int, Indices],
    layers: Layers,
    options: PruneOptions,
    ctx: PassContext,
) -> Recovery:
    """Refit the layers of ``model`` that the removal affects; the units themselves stay to be cut.

    Args:
        model: The model whose weights are changed in place.
        reference: The original.
        coupling: Its groups.
        removed: Units to be removed, by group.
        layers: The linear layers.
        options: How much to refit, and the ridge.
        ctx: The job; it has calibration data.
    """
    if ctx.calibration is None:
        raise DataError("recovery needs calibration data and the job has none")
    masked = mask(model, coupling, removed)
    kept = coupling.kept(removed)
    levels, untreated = _jobs(model, masked, coupling, kept, layers, options.recover_all)
    both = _Both.of(masked, reference, [job.consumer for level in levels for job in level])
    parts = [part for part in split(ctx.calibration) if part is not None]
    done: list[Refit] = []
    with _Streams(both, [both.wanted(level) for level in levels], parts, ctx) as streams:
        for number, level in enumerate(levels, start=1):
            text = f"prune: refitting layers, step {number} of {len(levels)}"
            requests = {job.consumer.node: both.request(job) for job in level}
            found = streams.collect(number, requests.values(), text)
            for job in level:
                results = [s[requests[job.consumer.node]] for s in found]
                fit = job.solve(both.model, results, options.ridge)
                job.consumer.write(both.model, fit.weight, fit.bias)
                for turn in range(_TURNS if job.bounds is not None and fit.refit.used else 0):
                    again = f"{text}, through the activation ({turn + 1} of {_TURNS})"
                    results = streams.collect_clipped(both, job, again)
                    better = job.solve(both.model, results, options.ridge)
                    if not better.refit.used:
                        break
                    job.consumer.write(both.model, better.weight, better.bias)
                    fit = dataclasses.replace(better, refit=fit.refit)
                done.append(fit.refit)
                job.consumer.write(model, fit.weight, fit.bias)
    return Recovery(tuple(done), untreated)


@dataclass(frozen=True, slots=True)
class _Both:
    """The masked model and the original in one graph.

    Attributes:
        model: The graph; nodes and values of the masked model keep their names.
        names: Names in ``model`` of the original's values (``reference/...``).
    """

    model: ir.Model
    names: Mapping[str, str]

    @classmethod
    def of(cls, masked: ir.Model, reference: ir.Model, consumers: Iterable[Consumer]) -> _Both:
        """Join the two.

        Args:
            masked: The masked model; it is changed.
            reference: The original.
            consumers: The layers that will get new weights.
        """
        for consumer in consumers:
            for name in (consumer.weight, consumer.bias):
                array = None if name is None else constant_of(masked.graph.initializers[name])
                if name is not None and array is not None:
                    # An equal tensor of its own, for the original must keep the old weights.
                    set_initializer(masked.graph, name, array)
        joined = join(masked, reference)
        return cls(masked, {name: value.name or "" for name, value in joined.items()})

    def request(self, job: _Job) -> CrossMomentsRequest:
        """The statistics a job needs, in terms of ``model``."""
        request = job.request()
        terms = tuple((self.names.get(name, name), sign) for name, sign in request.target)
        return dataclasses.replace(request, target=terms)

    def wanted(self, level: Sequence[_Job]) -> tuple[str, ...]:
        """The values that the statistics of a level are taken of."""
        requests = [self.request(job) for job in level]
        names = [n for r in requests for n in (r.value, *(name for name, _ in r.target))]
        return tuple(dict.fromkeys(names))


class _Streams:
    """The samples to fit on and those held out, on their way through the two networks.

    Where a batch finds no memory, or the model refuses it, they start again with half of it.
    """

    def __init__(
        self,
        both: _Both,
        wanted: Sequence[Sequence[str]],
        parts: Sequence[Dataset],
        ctx: PassContext,
    ) -> None:
        self._both, self._wanted, self._parts, self._ctx = both, wanted, parts, ctx
        self._stages = plan_stages(both.model.graph, wanted)
        self._size = ctx.batch_size
        self._streams: list[Stream] = []

    def __enter__(self) -> _Streams:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.close()

    def _open(self) -> None:
        store = ActivationStore(self._ctx.work_dir)
        self._streams = [
            Stream(self._both.model, self._stages, part, self._ctx, self._size, store)
            for part in self._parts
        ]

    def collect(
        self, stage: int, requests: Iterable[CrossMomentsRequest], text: str
    ) -> list[Statistics]:
        """Statistics after the first ``stage`` stages, of each part of the samples."""
        while True:
            try:
                for stream in self._streams:
                    stream.advance(stage, text)
                break
            except (MemoryError, ModelError):
                self.__exit__()
                if self._size == 1 or any(p.layout.group is not None for p in self._parts):
                    raise
                self._size //= 2
                self._open()
        found = []
        for stream in self._streams:
            graph = ir.Graph(
                stream.inputs(self._wanted[stage - 1]),
                (),
                nodes=(),
                opset_imports=self._both.model.opset_imports,
                name="measured",
            )
            measured = ir.Model(graph, ir_version=self._both.model.ir_version)
            found.append(stream.collect(measured, requests, text))
        return found

    def collect_clipped(self, both: _Both, job: _Job, text: str) -> list[CrossMomentsResult]:
        """Statistics of a job of the current stage with the target that its activation allows."""
        request = both.request(job)
        (total, _), *shortcut = request.target
        found = []
        for stream in self._streams:
            names = [total, *(name for name, _ in shortcut)]
            inputs = {v.name: v for v in stream.inputs([*names, request.value])}
            measured, name = clipped_target(
                both.model,
                job.consumer,
                data=inputs[request.value],
                original=inputs[total],
                shortcut=inputs[shortcut[0][0]] if shortcut else None,
                bounds=job.bounds or Bounds(),
            )
            changed = dataclasses.replace(request, target=((name, 1.0), *shortcut))
            found.append(stream.collect(measured, [changed], text)[changed])
        return found


@dataclass(frozen=True, slots=True)
class _Fit:
    weight: Array
    bias: Array
    refit: Refit


@dataclass(frozen=True, slots=True)
class _Job:
    """One layer to refit.

    Attributes:
        consumer: The layer.
        data: Name of its (masked) data input in the masked model.
        target: What to fit to.
        inputs: Which input channels stay, [C].
        outputs: Which outputs stay, [O].
        bounds: What the activation that follows clips to; None where none follows.
    """

    consumer: Consumer
    data: str
    target: tuple[tuple[str, float], ...]
    inputs: npt.NDArray[np.bool_]
    outputs: npt.NDArray[np.bool_]
    bounds: Bounds | None

    def request(self) -> CrossMomentsRequest:
        """The statistics it needs."""
        consumer = self.consumer
        return CrossMomentsRequest(
            self.data,
            consumer.unfold,
            self.target,
            consumer.target_axis,
            row_limit(consumer.width),
        )

    def solve(self, model: ir.Model, results: Sequence[CrossMomentsResult], ridge: float) -> _Fit:
        """New weights from the moments on the fitting samples and, if any, the held-out ones."""
        consumer = self.consumer
        weight, bias = consumer.matrix(model), consumer.bias_vector(model)
        share = consumer.outputs // consumer.groups
        channels = len(self.inputs) // consumer.groups
        ridges: list[float | None] = []
        for g in range(consumer.groups):
            rows = np.flatnonzero(self.outputs[g * share : (g + 1) * share])
            here = np.flatnonzero(self.inputs[g * channels : (g + 1) * channels])
            columns = consumer.columns(here)
            if len(rows) == 0 or len(columns) == 0:
                ridges.append(None)
                continue
            parts = [_moments(r, g, rows + g * share).select(columns) for r in results]
            if consumer.bias is None:
                parts = [p.uncentred() for p in parts]
            prior = weight[g][np.ix_(rows, columns)]
            chosen = _choose(parts, prior, bias[rows + g * share], ridge)
            ridges.append(chosen)
            if chosen is None:
                continue
            whole = parts[0] if len(parts) == 1 else parts[0].merge(parts[1])
            fitted = prior
            if np.isfinite(chosen):
                fitted = regress(whole, prior, chosen)[0]
                weight[g][np.ix_(rows, columns)] = fitted
            if consumer.bias is not None:
                bias[rows + g * share] = whole.mean_y - fitted @ whole.mean_x
        used = int(np.count_nonzero(self.inputs)) // consumer.groups * consumer.taps
        rows_seen = sum(r.count for r in results)
        return _Fit(weight, bias, Refit(consumer, tuple(ridges), rows_seen / max(used, 1)))


def _choose(parts: Sequence[Moments], prior: Array, bias: Array, ridge: float) -> float | None:
    """The ridge that serves the held-out part best.

    Infinite stands for the old weights with a new bias, None for no change at all.
    """
    if len(parts) == 1:
        return ridge or _FALLBACK_RIDGE
    fit, held_out = parts
    candidates = (ridge,) if ridge else RIDGES
    chosen, fitted = choose_ridge(fit, held_out, prior, candidates)
    shifted = fit.mean_y - prior @ fit.mean_x
    old, moved = (float(residual_energy(held_out, prior, b).sum()) for b in (bias, shifted))
    energies: list[tuple[float, float | None]] = [(fitted, chosen), (moved, np.inf), (old, None)]
    return min(energies, key=lambda e: e[0])[1]


def _moments(result: CrossMomentsResult, group: int, rows: Indices) -> Moments:
    share = result.cross.shape[2]
    return Moments(
        count=result.count,
        mean_x=result.mean_x[group],
        mean_y=result.mean_y[rows],
        covariance=result.covariance[group],
        cross=result.cross[group][:, rows - group * share],
    )


def _jobs(
    model: ir.Model,
    masked: ir.Model,
    coupling: Coupling,
    kept: npt.NDArray[np.bool_],
    layers: Layers,
    everything: bool,
) -> tuple[list[list[_Job]], dict[str, str]]:
    """The layers to refit, in levels that do not depend on one another, and those that cannot be.

    A layer is refitted if it lost inputs, or if the shortcut that its output is added to changed;
    with ``everything``, also if only the values of its inputs changed.
    """
    consumers = {n: c for n, c in layers.consumers.items() if c.obstacle is None}
    names = [n.name or "" for n in masked.graph if n.name in consumers]
    order = {name: i for i, name in enumerate(names)}
    flow = trace(masked, {n.name or "" for n in model.graph}, order)
    nodes = {n.name or "": n for n in masked.graph}
    levels: list[list[_Job]] = []
    level_of: dict[int, int] = {}
    for index, name in enumerate(names):
        consumer, data = consumers[name], nodes[name].inputs[0]
        target = residual_target(nodes[name], consumer.output, flow, index)
        axis = 1 if isinstance(consumer.unfold, ConvUnfold) else consumer.target_axis
        channels = consumer.width // consumer.taps * consumer.groups
        inputs = staying(coupling, kept, consumer.data, axis, channels)
        lost = not inputs.all() or target.shortcut is not None
        if data is None or not (lost or (everything and data in flow.touched)):
            continue
        upstream = flow.jobs.get(data, 0)
        if target.shortcut is not None:
            upstream |= flow.jobs.get(target.shortcut, 0)
        level = 1 + max((depth for j, depth in level_of.items() if upstream >> j & 1), default=-1)
        level_of[index] = level
        if level == len(levels):
            levels.append([])
        levels[level].append(
            _Job(
                consumer,
                data.name or "",
                target.terms,
                inputs,
                staying(coupling, kept, consumer.output, consumer.target_axis, consumer.outputs),
                bounds_of(target.result),
            )
        )
    contractions = {t.node for t in coupling.macs} - set(names)
    untreated = {
        name: layers.obstacle(name)
        for name, node in nodes.items()
        if name in contractions and any(v in flow.touched for v in node.inputs)
    }
    return levels, untreated


