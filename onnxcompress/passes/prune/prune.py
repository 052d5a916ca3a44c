"""The pruning pass: choose, allocate, recover, cut."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.errors import PassError, UsageError
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.cost import ModelCost, cost_of
from onnxcompress.graph.coupling import Coupling, Group
from onnxcompress.graph.labels import analyse
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.surgery import remove
from onnxcompress.numerics.allocation import Curve, allocate, allowed_counts, unit_step
from onnxcompress.passes.base import Change, PassReport, Skip, Stage
from onnxcompress.passes.prune.budget import remaining
from onnxcompress.passes.prune.consumers import Layers, UnsupportedError, consumer_of
from onnxcompress.passes.prune.jobs import Refit
from onnxcompress.passes.prune.latency import Clock, plan_in_time
from onnxcompress.passes.prune.options import Importance, PruneOptions
from onnxcompress.passes.prune.recover import Recovery, recover
from onnxcompress.passes.prune.score import (
    Ranking,
    rank_with_data,
    rank_without_data,
)
from onnxcompress.passes.prune.states import state_notes

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
        work = _Work(probe, coupling, self._options, ctx)
        changes = tuple(
            Change(g.name, work.op_type(g.name), f"up to {most} of {g.size} {_noun(g)} may go")
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
        before = cost_of(model)
        canonicalize(model)
        added = _add_biases(model) if options.recover else ()
        coupling = analyse(model, states=options.states)
        work = _Work(model, coupling, options, ctx)
        reference = model_io.clone(model)
        rankings: list[Ranking] = []
        removed: dict[int, Indices] = {}
        recovery = Recovery((), {})
        # Without data a second look at the weights would see what the first one saw.
        steps = options.steps if ctx.calibration is not None else 1
        for number in range(1, steps + 1):
            rankings = work.rank(removed)
            kept = 1 - (1 - options.budget.kept) * number / steps
            removed = work.choose(rankings, removed, kept)
            if options.recover and removed:
                recovery = recover(
                    model, reference, coupling, removed, work.layers, options, work.ctx
                )
        changes = [*work.removals(rankings, removed), *_refit_changes(recovery.refits)]
        remove(model, coupling, removed)
        _drop_zero_biases(model, added)
        if not rankings:
            notes.append(_NOTHING)
        notes.extend(work.notes)
        notes.extend(state_notes(coupling, removed))
        notes.extend(_row_notes(recovery.refits))
        return PassReport(
            changes=tuple(changes),
            skips=(*work.skips(), *work.refit_skips(recovery)),
            figures={
                **_figures(before, cost_of(model), removed, coupling),
                "layers_refitted": sum(1 for r in recovery.refits if r.used),
            },
            notes=tuple(notes),
        )

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


_NOTHING = "Nothing can be pruned: see the reasons of what was left alone."


class _Work:
    """One run of the pass: the groups it may prune and what is known about them."""

    def __init__(
        self, model: ir.Model, coupling: Coupling, options: PruneOptions, ctx: PassContext
    ) -> None:
        self.model, self.coupling, self.options = model, coupling, options
        self.notes: list[str] = []
        self.ctx = _limited(ctx, options.samples)
        self._nodes = {n.name or "": n for n in model.graph.all_nodes()}
        self.layers = Layers.of(model)
        self.groups, self._excluded = _filtered(coupling.groups, options)

    def op_type(self, node: str) -> str:
        """Operator of a node; "" for an initializer."""
        found = self._nodes.get(node)
        return "" if found is None else found.op_type

    def counts(self, group: Group) -> tuple[int, ...]:
        """Removals that alignment and floor allow."""
        options = self.options
        align = options.align or self.ctx.target.channel_alignment
        step = unit_step(group.size, _width(group), align, strict=options.align > 0)
        limits = [limit.kept for limit in options.parsed_limits if limit.matches(_names(group))]
        return allowed_counts(group.size, step, max(limits, default=options.min_kept))

    def rank(self, removed: Mapping[int, Indices]) -> list[Ranking]:
        """The order of removal of all groups that can lose units at all, after ``removed``."""
        groups = [g for g in self.groups if len(self.counts(g)) > 1]
        if not groups:
            return []
        if self.ctx.calibration is None:
            return rank_without_data(self.model, groups, self.options.importance, self.ctx.seed)
        return rank_with_data(
            self.model,
            self.coupling,
            groups,
            self.layers.consumers,
            self.options,
            self.ctx,
            removed,
        )

    def choose(
        self, rankings: Sequence[Ranking], removed: Mapping[int, Indices], kept: float
    ) -> dict[int, Indices]:
        """Spend the budget; nothing if the default one cannot be reached.

        Args:
            rankings: The order of removal of each group, what is removed already first.
            removed: That.
            kept: What may be left.

        Raises:
            PassError: If one that was asked for cannot be reached.
        """
        budget = self.options.budget
        left = remaining(self.model, self.coupling, budget.measure)
        orders = {r.group.index: r.order for r in rankings}

        def taken(counts: Mapping[int, int]) -> dict[int, Indices]:
            return {g: orders[g][:n] for g, n in counts.items() if n}

        curves = []
        for ranking in rankings:
            gone = len(removed.get(ranking.group.index, ()))
            counts = (gone, *(n for n in self.counts(ranking.group) if n > gone))
            losses = tuple(float(ranking.losses[n]) for n in counts)
            curves.append(Curve(ranking.group.index, counts, losses))

        def plan_for(share: float) -> dict[int, Indices]:
            return taken(allocate(curves, lambda counts: left(taken(counts)), share, exchange=True))

        name = budget.measure.value
        if self.options.latency is not None and rankings:
            name = "latency"
            clock = Clock(self.model, self.coupling, self.ctx)
            plan, reached = plan_in_time(plan_for, clock.ratio, kept)
            self.notes.append(
                f"A run takes {reached:.2f} of the original's time (one sample, one thread, "
                f"measured before refitting), with {left(plan):.2f} of the multiply-accumulates."
            )
        else:
            plan = plan_for(kept)
            reached = left(plan)
        if not rankings or reached <= kept + 1e-9:
            return plan
        message = (
            f"{name}={budget.kept:g} cannot be reached: with all that may go "
            f"removed, {reached:.3f} is left"
        )
        if not self.options.asks_for_budget:
            # Cutting everything that may go, for a budget that nobody named, would wreck the model.
            self.notes.append(f"Nothing was pruned: {message}. Set a budget to prune all the same.")
            return {}
        possible = np.ceil(reached * 100) / 100
        hint = "Lower prune.min_kept or prune.align, or leave the pass out."
        if possible < 1:
            hint = f"Ask for {name}={possible:.2f} or more, or lower prune.min_kept or prune.align."
        raise PassError("prune", message, hint=hint)

    def removals(self, rankings: Sequence[Ranking], removed: Mapping[int, Indices]) -> list[Change]:
        """One entry per pruned group."""
        changes = []
        for ranking in rankings:
            group = ranking.group
            count = len(removed.get(group.index, ()))
            if count:
                changes.append(
                    Change(
                        group.name,
                        self.op_type(group.name),
                        f"{count} of {group.size} {_noun(group)} removed (by {ranking.basis}, "
                        f"predicted loss {ranking.losses[count]:.2g})",
                    )
                )
        return changes

    def skips(self) -> tuple[Skip, ...]:
        """What was left alone: frozen axes, each reason once, and groups that may not shrink."""
        places: dict[str, list[str]] = {}
        for frozen in self.coupling.frozen:
            places.setdefault(frozen.reason, []).append(frozen.node or frozen.value)
        skips = self._once(places)
        for group in self._excluded:
            reason = "kept by prune.include or prune.exclude"
            skips.append(Skip(group.name, self.op_type(group.name), reason))
        for group in self.groups:
            if len(self.counts(group)) == 1:
                reason = (
                    f"its {group.size} {_noun(group)} are too few for prune.align and "
                    "prune.min_kept"
                )
                skips.append(Skip(group.name, self.op_type(group.name), reason))
        return tuple(skips)

    def refit_skips(self, recovery: Recovery) -> list[Skip]:
        """Layers downstream of a removal that kept their weights, each reason once."""
        places: dict[str, list[str]] = {}
        for node, reason in recovery.untreated.items():
            places.setdefault(f"not refitted: {reason}", []).append(node)
        for refit in recovery.refits:
            if not refit.used:
                reason = "not refitted: its old weights did better on held-out samples"
                places.setdefault(reason, []).append(refit.consumer.node)
        return self._once(places)

    def _once(self, places: Mapping[str, Sequence[str]]) -> list[Skip]:
        """One entry per reason, at the first of its places."""
        skips = []
        for reason, names in places.items():
            first, *others = dict.fromkeys(names)
            more = f" (and {len(others)} more such places)" if others else ""
            skips.append(Skip(first, self.op_type(first), reason + more))
        return skips


def _limited(ctx: PassContext, samples: int) -> PassContext:
    """The job with no more than ``samples`` calibration samples (0: all)."""
    if ctx.calibration is None or not samples or ctx.calibration.sample_count <= samples:
        return ctx
    return dataclasses.replace(ctx, calibration=ctx.calibration.spread(samples))


def _width(group: Group) -> int:
    """Channels per unit, where the units are made."""
    places = group.sources or group.sinks
    return int(places[0].positions.shape[1]) if places else 1


def _noun(group: Group) -> str:
    width = _width(group)
    return "channels" if width == 1 else f"blocks of {width} channels"


def _names(group: Group) -> set[str]:
    """What a name pattern can match: the layers that make the units, and their weights."""
    made = {(s.weight, s.weight_axis) for s in group.sources}
    cuts = {c.initializer for c in group.cuts if (c.initializer, c.axis) in made}
    return {group.name, *(s.node for s in group.sources), *cuts}


def _filtered(groups: Sequence[Group], options: PruneOptions) -> tuple[list[Group], list[Group]]:
    """Groups that the name patterns let through, and the others.

    Raises:
        UsageError: If a pattern matches nothing.
    """
    matched = {
        pattern: {g.index for g in groups if fnmatch.filter(_names(g), pattern)}
        for pattern in (
            *options.include,
            *options.exclude,
            *(limit.pattern for limit in options.parsed_limits),
        )
    }
    for pattern, found in matched.items():
        if not found:
            raise UsageError(
                f"the pattern '{pattern}' of the pass 'prune' matches nothing that can be pruned",
                hint="Use --dry-run to see the groups and their names.",
            )
    wanted = {i for p in options.include for i in matched[p]}
    unwanted = {i for p in options.exclude for i in matched[p]}
    keep = [
        g for g in groups if g.index not in unwanted and (not options.include or g.index in wanted)
    ]
    return keep, [g for g in groups if g not in keep]


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
        value = model.graph.initializers[name]
        array = constant_of(value)
        if array is None or np.any(array):
            continue
        for use in list(value.uses()):
            use.node.replace_input_with(2, None)
            use.node.resize_inputs(2)
        del model.graph.initializers[name]


def _refit_changes(refits: Sequence[Refit]) -> list[Change]:
    changes = []
    for refit in refits:
        if not refit.used:
            continue
        ridges = sorted({r for r in refit.ridges if r is not None})
        what = "bias corrected"
        if np.isfinite(ridges[0]):
            what = f"refitted to the original's output (ridge {ridges[0]:g})"
        changes.append(Change(refit.consumer.node, refit.consumer.op_type, what))
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
    before: ModelCost, after: ModelCost, removed: Mapping[int, Indices], coupling: Coupling
) -> dict[str, float | int | str]:
    return {
        "groups_pruned": sum(1 for units in removed.values() if len(units)),
        "groups": len(coupling.groups),
        "units_removed": sum(len(units) for units in removed.values()),
        "units": sum(g.size for g in coupling.groups),
        "macs_kept_ratio": after.macs / max(before.macs, 1),
        "params_kept_ratio": after.parameters / max(before.parameters, 1),
        "weight_bytes_kept_ratio": after.weight_bytes / max(before.weight_bytes, 1),
    }
