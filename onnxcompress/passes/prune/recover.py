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
from onnxcompress.passes.prune.jobs import Job, Refit, jobs_of
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.passes.prune.samples import split
from onnxcompress.passes.prune.score import row_limit, staying
from onnxcompress.passes.prune.stages import plan_stages
from onnxcompress.passes.prune.store import ActivationStore
from onnxcompress.passes.prune.stream import Stream

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_TURNS = 2
"""Refits of a layer towards what its activation lets through."""
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
    levels, untreated = jobs_of(model, masked, coupling, kept, layers, options.recover_all)
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

    def request(self, job: Job) -> CrossMomentsRequest:
        """The statistics a job needs, in terms of ``model``."""
        request = job.request()
        terms = tuple((self.names.get(name, name), sign) for name, sign in request.target)
        return dataclasses.replace(request, target=terms)

    def wanted(self, level: Sequence[Job]) -> tuple[str, ...]:
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

    def collect_clipped(self, both: _Both, job: Job, text: str) -> list[CrossMomentsResult]:
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


