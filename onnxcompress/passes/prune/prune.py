"""The pruning pass: choose, allocate, recover, cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.errors import ModelError, UsageError
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.cost import ModelCost, cost_of
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.labels import analyse
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.surgery import mask, remove
from onnxcompress.passes.base import Change, PassReport, Stage
from onnxcompress.passes.prune.budget import Ledger
from onnxcompress.passes.prune.consumers import UnsupportedError, consumer_of
from onnxcompress.passes.prune.contest import Judge, Plan, Verdict, best_plan
from onnxcompress.passes.prune.jobs import Refit, refitted
from onnxcompress.passes.prune.lost import losses_for
from onnxcompress.passes.prune.named import noun
from onnxcompress.passes.prune.options import (
    DEFAULT_KEPT,
    MILDER_KEPT,
    Importance,
    Measure,
    PruneOptions,
)
from onnxcompress.passes.prune.recover import Recovery, recover
from onnxcompress.passes.prune.samples import contest_size
from onnxcompress.passes.prune.score import Ranking
from onnxcompress.passes.prune.states import state_notes
from onnxcompress.passes.prune.work import Work

Indices = npt.NDArray[np.int64]


class PrunePass:
    """Removes channels, attention heads and hidden units under one budget for the whole model.

    Args:
        options: What to remove and how; the defaults when None.
    """

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = (
        "Remove whole channels, heads and hidden units, and refit the layers that are left."
    )
    stage: ClassVar[Stage] = Stage.STRUCTURE
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.MOMENTS, Statistic.CROSS_MOMENTS})
    options_type: ClassVar[type[PruneOptions]] = PruneOptions

    def __init__(self, options: PruneOptions | None = None) -> None:
        self._options = PruneOptions() if options is None else options
        self._options.validate(self.name)

    @property
    def options(self) -> PruneOptions:
        """The options this pass was made with."""
        return self._options

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say what could be removed, and what can not and why."""
        probe = model_io.clone(model)
        canonicalize(probe)
        coupling = analyse(probe, states=self._options.states)
        work = Work(probe, coupling, self._options, ctx, Ledger.of(model, None))
        changes = tuple(
            Change(g.name, work.op_type(g.name), f"up to {most} of {g.size} {noun(g)} may go")
            for g in work.groups
            if (most := work.counts(g)[-1])
        )
        return PassReport(
            changes=changes,
            skips=work.skips(),
            figures={"groups": len(changes)},
            notes=() if changes else (_NOTHING,),
        )

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Prune ``model`` in place.

        Raises:
            UsageError: If a name pattern matches nothing, or the criterion needs calibration data
                that is not there.
            PassError: If the budget that was asked for cannot be reached.
        """
        options, notes = self._with_data(ctx)
        ledger = Ledger.of(model, ctx.calibration)
        canonicalize(model)
        added = _add_biases(model) if options.recover else ()
        coupling = analyse(model, states=options.states)
        work = Work(model, coupling, options, ctx, ledger)
        reference = model_io.clone(model)
        rankings: list[Ranking] = []
        removed: dict[int, Indices] = {}
        recovery = Recovery((), (), {})
        # Without data a second look at the weights would see what the first one saw.
        steps = options.steps if ctx.calibration is not None else 1
        for number in range(1, steps + 1):
            rankings = work.rank(removed)
            count = options.plans if number == steps and options.compares_plans else 1
            if number == steps == 1:
                spent = self._spent_once(model, reference, coupling, work, rankings)
            else:
                part = number / steps
                spent = _spent(model, reference, coupling, work, rankings, removed, part, count)
            removed, recovery = spent.removed, spent.recovery
            notes.extend(spent.notes)
        changes = [*work.removals(rankings, removed), *_refit_changes(recovery)]
        remove(model, coupling, removed)
        _drop_zero_biases(model, added)
        if not rankings:
            notes.append(_NOTHING)
        notes.extend(work.notes)
        notes.extend(state_notes(coupling, removed))
        notes.extend(_row_notes(recovery.refits))
        real = ctx.calibration is not None and not ctx.calibration.synthetic
        refitted_some = any(r.used for r in recovery.refits)
        if real and refitted_some and ctx.passes and "distill" not in ctx.passes:
            notes.append(_LEARN_NOTE)
        return PassReport(
            changes=tuple(changes),
            skips=(*work.skips(), *work.refit_skips(recovery)),
            figures={
                **_figures(ledger, cost_of(model, ledger.feeds_shapes), removed, coupling),
                "layers_refitted": sum(1 for r in recovery.refits if r.used),
            },
            notes=tuple(notes),
        )

    def _spent_once(
        self,
        model: ir.Model,
        reference: ir.Model,
        coupling: Coupling,
        work: Work,
        rankings: Sequence[Ranking],
    ) -> _Spent:
        """Spend the budget; the default one as the passes that follow want it.

        Before ``quant`` channels go in steps that integer kernels gain from. Where that, or the
        budget itself before ``svd`` or ``share``, costs more than is bearable, finer steps are
        taken, and half as much goes.
        """
        count = self._options.plans if self._options.compares_plans else 1

        def attempt() -> _Spent:
            return _spent(model, reference, coupling, work, rankings, {}, 1.0, count)

        whole, milder = self._wishes_of_others(work.ctx)
        notes = list(work.notes)
        work.whole_steps = whole
        spent = attempt()
        work.whole_steps = False
        if not whole and not (milder and spent.removed):
            return spent
        cost = _unbearable(work.ctx, mask(model, coupling, spent.removed)) if spent.removed else ""
        if cost is None:
            added = (_STEPS_NOTE,) if whole else ()
            return dataclasses.replace(spent, notes=(*spent.notes, *added))
        _restore(model, reference)
        work.notes = notes
        if not milder or not cost:
            return attempt()
        work.options = dataclasses.replace(work.options, macs=MILDER_KEPT)
        spent = attempt()
        note = (
            f"macs={MILDER_KEPT:g} was kept instead of {DEFAULT_KEPT:g}, which left {cost} of the "
            "outputs on held-out samples: too little where other passes follow. Set a budget to "
            "decide."
        )
        return dataclasses.replace(spent, notes=(*spent.notes, note))

    def _wishes_of_others(self, ctx: PassContext) -> tuple[bool, bool]:
        """Whether a default budget should go in whole steps, and whether it may be too much."""
        options = self._options
        default = options.budget is not None and not options.asks_for_budget and options.recover
        if not default or ctx.original is None or ctx.calibration is None:
            return False, False
        whole = not options.align and "quant" in ctx.passes
        return whole, not _FOLLOWING.isdisjoint(ctx.passes)

    def _with_data(self, ctx: PassContext) -> tuple[PruneOptions, list[str]]:
        """The options as the data allow them, and what to say about it."""
        options = self._options
        if ctx.calibration is not None:
            synthetic = (
                "The calibration samples are invented: importance and recovery follow them, not "
                "your data. Give --calib."
            )
            return options, [synthetic] if ctx.calibration.synthetic else []
        if options.importance.needs_data:
            raise UsageError(
                f"prune.importance={options.importance.value} needs calibration data",
                hint="Give --calib, or use prune.importance=l2.",
            )
        importance = Importance.L2 if options.importance is Importance.AUTO else options.importance
        changed = dataclasses.replace(options, importance=importance, recover=False)
        return changed, [
            f"No calibration data: units were chosen by {importance.value} of their weights and "
            "nothing was refitted; expect a large loss."
        ]


_FOLLOWING = frozenset({"svd", "share"})
"""Passes whose losses add to those of this one."""


_STEPS_NOTE = (
    "Channels went in the target's whole steps, since narrower layers would not be faster on "
    "integers. Set prune.align or a budget to decide."
)


@dataclass(frozen=True, slots=True)
class _Spent:
    """Units that go, how the layers behind them were refitted, and what to say about it."""

    removed: dict[int, Indices]
    recovery: Recovery
    notes: tuple[str, ...]


def _spent(
    model: ir.Model,
    reference: ir.Model,
    coupling: Coupling,
    work: Work,
    rankings: Sequence[Ranking],
    removed: Mapping[int, Indices],
    part: float,
    count: int,
) -> _Spent:
    """Spend a part of the budget by the best of ``count`` plans and refit ``model``, in place."""
    options, layers, ctx = work.options, work.layers, work.ctx

    def make(seen: Sequence[Ranking], timed: bool) -> Plan:
        return work.choose(seen, removed, part, timed)

    plan = make(rankings, False)
    notes: tuple[str, ...] = ()
    if count > 1 and ctx.calibration is not None:
        count, samples = contest_size(model, ctx.calibration, count)
        try:
            judges = [
                Judge(model, reference, coupling, layers, options, ctx, samples, place)
                for place in (-1, 1)
            ]
            verdict = best_plan(
                plan, rankings, make, work.time_left, judges, count, ctx, timed=work.counts_time
            )
        except ModelError as error:  # samples held out leave batches of other sizes
            notes = (f"Plans were not compared: the model refuses a part of the samples. {error}",)
        else:
            if verdict is not None:
                plan, notes = verdict.best.plan, (_contest_note(verdict),)
    chosen = dict(plan)
    recovery = Recovery((), (), {})
    if options.recover and chosen:
        recovery = recover(model, reference, coupling, chosen, layers, options, ctx)
    return _Spent(chosen, recovery, notes)


_LEARN_NOTE = (
    "The pass distill (--passes prune,distill) lets all weights learn from the original at once, "
    "without labels. That often brings outputs nearer to it and takes about as long as prune."
)
_NOTHING = "Nothing can be pruned: see the reasons of what was left alone."


def _unbearable(ctx: PassContext, model: ir.Model) -> str | None:
    """What is left of the outputs if that is too little before other passes; None if it is not."""
    found = losses_for(ctx, model)
    if found is None or found[1].error <= found[1].bearable:
        return None
    return f"{-10 * np.log10(found[1].error):.1f} dB"


def _restore(model: ir.Model, reference: ir.Model) -> None:
    """Give ``model`` the weights of ``reference`` back, which has the same graph."""
    for graph, before in zip(model.graphs(), reference.graphs(), strict=True):
        for name, value in graph.initializers.items():
            value.const_value = before.initializers[name].const_value


def _add_biases(model: ir.Model) -> tuple[str, ...]:
    """Give every Conv and Gemm without bias one of zeros, to take up the mean of what is lost."""
    namer, added = Namer(model), []
    for node in model.graph:
        if node.op_type not in {"Conv", "Gemm"} or (
            len(node.inputs) > 2 and node.inputs[2] is not None
        ):
            continue
        try:
            consumer = consumer_of(node)
        except UnsupportedError:
            continue
        weight = constant_of(model.graph.initializers[consumer.weight])
        if weight is None:
            continue
        name = namer.value(f"{node.name}/prune_bias")
        value = set_initializer(model.graph, name, np.zeros(consumer.outputs, weight.dtype))
        node.resize_inputs(3)
        node.replace_input_with(2, value)
        added.append(name)
    return tuple(added)


def _drop_zero_biases(model: ir.Model, added: Sequence[str]) -> None:
    """Take back the biases of :func:`_add_biases` that nothing was put into."""
    for name in added:
        value = model.graph.initializers.get(name)
        if value is None:  # gone with its branch
            continue
        array = constant_of(value)
        if array is None or np.any(array):
            continue
        for use in list(value.uses()):
            use.node.replace_input_with(2, None)
            use.node.resize_inputs(2)
        del model.graph.initializers[name]


def _contest_note(verdict: Verdict) -> str:
    """What the plan that was taken is better at than the first."""
    first, best = verdict.first, verdict.best
    return (
        f"The best of {verdict.count} plans, refitted quickly, leaves an error of the outputs of "
        f"{best.error:.3g} in about {best.time:.2f} of the time (the plan of the least summed "
        f"loss: {first.error:.3g} and {first.time:.2f})."
    )


def _refit_changes(recovery: Recovery) -> list[Change]:
    changes = list(recovery.others)
    for refit in recovery.refits:
        if refit.used:
            ridge = min(r for r in refit.ridges if r is not None)
            changes.append(Change(refit.consumer.node, refit.consumer.op_type, refitted(ridge)))
    return changes


def _row_notes(refits: Sequence[Refit]) -> list[str]:
    few = [r for r in refits if r.rows_per_column < 10]
    if not few:
        return []
    worst = min(few, key=lambda r: r.rows_per_column)
    return [
        f"{len(few)} layer{'s were' if len(few) > 1 else ' was'} refitted from fewer than 10 rows "
        f"per input (least: {worst.rows_per_column:.1f} at '{worst.consumer.node}'); "
        "more samples would help."
    ]


def _figures(
    ledger: Ledger, after: ModelCost, removed: Mapping[int, Indices], coupling: Coupling
) -> dict[str, float | int | str]:
    return {
        "groups_pruned": sum(1 for units in removed.values() if len(units)),
        "groups": len(coupling.groups),
        "units_removed": sum(len(units) for units in removed.values()),
        "units": sum(g.size for g in coupling.groups),
        "macs_kept_ratio": ledger.ratio(after, Measure.MACS),
        "params_kept_ratio": ledger.ratio(after, Measure.PARAMS),
        "weight_bytes_kept_ratio": ledger.ratio(after, Measure.BYTES),
    }
