"""Recovery without training: later layers learn to make up for what was removed before them.

Layers are refitted in the order in which data flows. For each, the inputs ``x`` come from the model
as compressed so far and the target ``y`` from the original, so that a layer repairs its own lost
inputs and also the errors that reach it from before. Where its output is added to a shortcut, the
target is the original sum less the shortcut *as it is now*: the branch then repairs the shortcut.

    W, b = argmin E‖y - W x - b‖² + ρ‖W - W_S‖²,     y = y₀ + (shortcut₀ - shortcut)

``ρ`` is chosen by cross-validation (:mod:`onnxcompress.passes.prune.fit`).

Everything runs on the masked model, which has the original's shapes: removed channels are zero
columns of ``x`` and unused rows of ``y``.

Source: He et al. 2017, "Channel pruning for accelerating very deep networks" (asymmetric,
sequential reconstruction); Luo et al. 2017, "ThiNet".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress._threads import Each, side_by_side
from onnxcompress.calibration.join import join
from onnxcompress.calibration.statistics import REFERENCE_PREFIX
from onnxcompress.context import PassContext
from onnxcompress.errors import DataError, ModelError
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.surgery import mask
from onnxcompress.passes.base import Change
from onnxcompress.passes.prune.branches import Branches
from onnxcompress.passes.prune.budget import Removed
from onnxcompress.passes.prune.consumers import Layers
from onnxcompress.passes.prune.fit import (
    FOLDS,
    THOROUGH,
    Effort,
    Fitting,
    choose,
    fold_count,
)
from onnxcompress.passes.prune.jobs import Job, Refit, Task, jobs_of, refitted
from onnxcompress.passes.prune.junctions import Junction, junctions_of
from onnxcompress.passes.prune.memory import Memory
from onnxcompress.passes.prune.norms import Norm
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.passes.prune.ranking import workers_of
from onnxcompress.passes.prune.recurrent import Recurrent
from onnxcompress.passes.prune.rows import RowSource
from onnxcompress.passes.prune.stages import plan_stages
from onnxcompress.passes.prune.store import ActivationStore
from onnxcompress.passes.prune.stream import Stream, StreamOwner

_MIN_SAMPLES = 8
"""With fewer samples none are held out."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was refitted, and which layers downstream of a removal could not be.

    Attributes:
        refits: The layers treated, in topological order of their levels.
        others: What was done to recurrent layers and normalizations.
        untreated: Node name to the reason.
    """

    refits: tuple[Refit, ...]
    others: tuple[Change, ...]
    untreated: Mapping[str, str]


def recover(
    model: ir.Model,
    reference: ir.Model,
    coupling: Coupling,
    removed: Removed,
    layers: Layers,
    options: PruneOptions,
    ctx: PassContext,
    effort: Effort = THOROUGH,
    memory: Memory | None = None,
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
        effort: How exactly to fit.
        memory: What refits of the same model from the same samples have found before, or to put
            there what this one finds.
    """
    branches = Branches.of(model, coupling, removed, layers)
    branches.hush(model, layers)
    masked = mask(model, coupling, removed)
    kept = coupling.kept(removed)
    levels, untreated = jobs_of(
        model, masked, coupling, kept, layers, options.recover_all, branches
    )
    junctions: Mapping[str, Junction] = {}
    if effort.joint and options.joint:
        junctions = junctions_of(model, masked, levels, layers.consumers, coupling, kept)
    written = [n for level in levels for job in level for n in job.written]
    both = _Both.of(
        masked, reference, [*written, *(n for j in junctions.values() for n in j.written)]
    )
    done: list[Refit] = []
    changes: list[Change] = []
    wanted = [both.wanted(level, memory, effort, junctions) for level in levels]
    again = {
        node: number
        for number, level in enumerate(levels)
        for job in level
        if isinstance(job, Job) and job.consumer.node in junctions
        for node in junctions[job.consumer.node].nodes
    }
    with _Running(both, wanted, again, ctx) as running, side_by_side(workers_of(ctx)) as each:
        for number, level in enumerate(levels, start=1):
            text = f"prune: refitting layers, step {number} of {len(levels)}"
            stream = running.advance(number, text)
            for job in level:
                if isinstance(job, Recurrent):
                    found = job.refit(
                        (both.model, model),
                        reference,
                        stream,
                        both.names,
                        job.kept(coupling, kept),
                        running.folds(0),
                        lambda m, weight, bias: choose(m, weight, bias, options.ridge),
                    )
                    if found is not None:
                        changes.append(Change(job.node, job.op_type, refitted(found)))
                    continue
                if isinstance(job, Norm):
                    name = both.names[f"{REFERENCE_PREFIX}{job.original}"]
                    rows = RowSource(stream, job.plan(name, ctx.seed))
                    if job.match((both.model, model), rows):
                        what = "mean and variance estimated anew"
                        changes.append(Change(job.node, "BatchNormalization", what))
                    continue
                if memory is not None and memory.spares(job):
                    continue
                folds = min(running.folds(job.consumer.width), effort.folds)
                max_rows = effort.row_limit(job.consumer.width)
                plan = job.plan(both.names, folds, ctx.seed, max_rows)
                answers = None if memory is None else memory.answers(job, max_rows)
                known = None if memory is None else memory.ridges(job)
                source = RowSource(stream, plan, answers)
                fitting = Fitting(both.model, job, source, folds, options.ridge, each)
                fit = fitting.run(effort.turns, known)
                if memory is not None:
                    memory.keep(job, fit.refit)
                done.append(fit.refit)
                for changed in (both.model, model):
                    job.consumer.write(changed, fit.weight, fit.bias)
                junction = junctions.get(job.consumer.node)
                if junction is not None:
                    refits = {r.consumer.node: r for r in done}
                    own = [refits[r.consumer.node] for r in junction.readers]
                    changes += _fitted_together(junction, own, (both, model), stream, ctx, each)
    return Recovery(tuple(done), tuple(changes), untreated)


def _fitted_together(
    junction: Junction,
    refits: Sequence[Refit],
    models: tuple[_Both, ir.Model],
    stream: Stream,
    ctx: PassContext,
    each: Each,
) -> list[Change]:
    """Fit a junction whose last layers have been refitted alone, and say so where that helped."""
    ridges = [r.ridges[0] for r in refits]
    finite = [r for r in ridges if r is not None and np.isfinite(r)]
    if len(finite) < len(ridges):
        return []
    both, model = models
    found = junction.fitted(both.model, stream, both.names, finite, ctx, each)
    if found is None or not found.after < found.before:
        return []
    for changed in (both.model, model):
        junction.write(changed, found.layers)
    others = " and ".join(f"'{r.consumer.node}'" for r in refits)
    what = f"fitted together with {others} ({1 - found.after / found.before:.0%} less error there)"
    layers = [m.branch.layer for m in junction.makers]
    return [Change(c.node, c.op_type, what) for c in layers]


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
    def of(cls, masked: ir.Model, reference: ir.Model, written: Iterable[str]) -> _Both:
        """Join the two.

        Args:
            masked: The masked model; it is changed.
            reference: The original.
            written: Initializers that will get new values.
        """
        for name in written:
            array = constant_of(masked.graph.initializers[name])
            if array is not None:
                # An equal tensor of its own, for the original must keep the old weights.
                set_initializer(masked.graph, name, array)
        joined = join(masked, reference)
        return cls(masked, {name: value.name or "" for name, value in joined.items()})

    def wanted(
        self,
        level: Sequence[Task],
        memory: Memory | None,
        effort: Effort,
        junctions: Mapping[str, Junction],
    ) -> tuple[str, ...]:
        """The values that the layers of a level are fitted to, but for what is known of them."""
        names: list[str] = []
        for job in level:
            known = (
                memory is not None
                and isinstance(job, Job)
                and memory.knows(job, effort.row_limit(job.consumer.width))
            )
            names.extend(job.wanted[:1] + job.wanted[2:] if known else job.wanted)
            if isinstance(job, Job) and job.consumer.node in junctions:
                names.extend(junctions[job.consumer.node].data)
        return tuple(dict.fromkeys(self.names.get(name, name) for name in names))


class _Running(StreamOwner):
    """The samples on their way through the two networks.

    Where a batch finds no memory, or the model refuses it, they start again with half of it.
    """

    def __init__(
        self,
        both: _Both,
        wanted: Sequence[Sequence[str]],
        again: Mapping[str, int],
        ctx: PassContext,
    ) -> None:
        if ctx.calibration is None:
            raise DataError("recovery needs calibration data and the job has none")
        self._both, self._ctx, self._data = both, ctx, ctx.calibration
        self._stages = plan_stages(both.model.graph, wanted, again)
        # Runs are what is held out, so there must be a few.
        self._size = max(1, min(ctx.batch_size, self._data.sample_count // (2 * FOLDS)))

    def folds(self, width: int) -> int:
        """Parts to divide the samples into for a layer ``width`` inputs wide."""
        if self._stream is None or self._data.sample_count < _MIN_SAMPLES:
            return 1
        return fold_count(width, self._stream.run_count)

    def advance(self, stage: int, text: str) -> Stream:
        """Run until ``stage`` stages are done."""
        while True:
            if self._stream is None:
                store = ActivationStore(self._ctx.work_dir)
                self._stream = Stream(
                    self._both.model, self._stages, self._data, self._ctx, self._size, store
                )
            try:
                self._stream.advance(stage, text)
            except (MemoryError, ModelError):
                self._release()
                if self._size == 1 or self._data.layout.group is not None:
                    raise
                self._size //= 2
            else:
                return self._stream
