"""One run of the pass: which groups may lose units, in what order, and how many of them go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import PassError
from onnxcompress.graph.coupling import Coupling, Group
from onnxcompress.graph.emptying import Emptying, RefusedError, whole
from onnxcompress.graph.macs import MacsModel
from onnxcompress.numerics.allocation import (
    Cost,
    Curve,
    allocate,
    allowed_counts,
    unit_step,
)
from onnxcompress.passes._unpadded import NOTE, unpadded
from onnxcompress.passes.base import Change, Skip
from onnxcompress.passes.prune.budget import Ledger, remaining
from onnxcompress.passes.prune.consumers import Layers
from onnxcompress.passes.prune.latency import Clock, plan_in_time
from onnxcompress.passes.prune.named import filtered, fixed, names_of, noun, totals_of, width_of
from onnxcompress.passes.prune.options import (
    Budget,
    Importance,
    Measure,
    Price,
    PruneOptions,
)
from onnxcompress.passes.prune.probe import PROBE_SAMPLES
from onnxcompress.passes.prune.ranking import rank_with_data
from onnxcompress.passes.prune.recover import Recovery
from onnxcompress.passes.prune.samples import judging_note, judging_samples, split
from onnxcompress.passes.prune.score import PROBED, Ranking, rank_by_weights, rank_without_data

Indices = npt.NDArray[np.int64]

_UNSEEN = 1e-30
"""Loss below which removing a whole group changed nothing."""
_SETTLINGS = 5
"""Plans that are cut to see what they really leave."""


class Work:
    """One run of the pass: the groups it may prune and what is known about them."""

    def __init__(
        self,
        model: ir.Model,
        coupling: Coupling,
        options: PruneOptions,
        ctx: PassContext,
        ledger: Ledger,
    ) -> None:
        self.model, self.coupling, self.options = model, coupling, options
        self._ledger = ledger
        self.notes: list[str] = []
        self.whole_steps = False
        """Whether channels go in the target's own steps, also where groups are narrow."""
        limited = ctx.at_most(options.samples)
        self.ctx = unpadded(model, limited)
        if self.ctx is not limited:
            self.notes.append(NOTE)
        self._nodes = {n.name or "": n for n in model.graph.all_nodes()}
        self.layers = Layers.of(model)
        self.groups, self._excluded = filtered(coupling.groups, options)
        self._kept = fixed(self.groups, options)
        self._totals = totals_of(self.groups, options.parsed_total, self._kept)
        self._macs: MacsModel | None = None
        self._measures: dict[Measure, Callable[[Mapping[int, Indices]], float]] = {}
        self._emptying = Emptying(model, coupling)
        self._branches = self._joint() if options.branches else frozenset()

    def op_type(self, node: str) -> str:
        """Operator of a node; "" for an initializer."""
        found = self._nodes.get(node)
        return "" if found is None else found.op_type

    def counts(self, group: Group, part: float = 1.0) -> tuple[int, ...]:
        """Removals to choose from, increasing; 0 first.

        Args:
            group: The group.
            part: How much of what is to go may go by now, for groups that ``prune.keep`` names.
        """
        options = self.options
        align = options.align or self.ctx.target.channel_alignment
        strict = options.align > 0 or self.whole_steps
        step = unit_step(group.size, width_of(group), align, strict=strict)
        kept = self._kept.get(group.index)
        whole_too = (group.size,) if group.index in self._branches else ()
        if kept is not None:
            every = (*allowed_counts(group.size, step, 0.0), *(() if kept else whole_too))
            wanted = (1 - kept) * group.size * part
            nearest = min(every, key=lambda n: (abs(n - wanted), n))
            return (0, nearest) if nearest else (0,)
        if options.budget is None and not self._in_total(group):
            return (0,)
        limits = [limit.kept for limit in options.parsed_limits if limit.matches(names_of(group))]
        if limits:
            return allowed_counts(group.size, step, max(limits))
        return (*allowed_counts(group.size, step, options.min_kept), *whole_too)

    def _joint(self) -> frozenset[int]:
        """Groups that may all lose all of their units at once, the smallest first."""
        found: list[int] = []
        for group in sorted(self.groups, key=lambda g: len(g.sinks)):
            if group.size < 2 or self._emptying.reason(group.index) is not None:
                continue
            try:
                self._emptying.of((*found, group.index))
            except RefusedError:
                continue
            found.append(group.index)
        return frozenset(found)

    def _closed(self, units: dict[int, Indices]) -> dict[int, Indices]:
        """Units to remove, with those of groups that nothing reads any longer."""
        emptied = whole(self.coupling, units)
        if not emptied:
            return units
        try:
            implied = self._emptying.of(emptied).implied
        except RefusedError:  # each may go, and all of them, but not these together
            return units | {g: units[g][:-1] for g in emptied}
        return units | {g: np.arange(self.coupling.groups[g].size) for g in implied}

    def _in_total(self, group: Group) -> bool:
        """Whether ``prune.total`` names the group."""
        return any(group in total.groups for total in self._totals)

    def rank(self, removed: Mapping[int, Indices]) -> list[Ranking]:
        """The order of removal of all groups that can lose units at all, after ``removed``."""
        groups = [
            g
            for g in self.groups
            if len(self.counts(g)) > 1 and len(removed.get(g.index, ())) < g.size
        ]
        if not groups:
            return []
        if self.ctx.calibration is None:
            return rank_without_data(self.model, groups, self.options.importance, self.ctx.seed)
        found = rank_with_data(
            self.model,
            self.coupling,
            groups,
            self.layers,
            self.options,
            self.ctx,
            removed,
            self._branches,
            self._judging(len(groups), self.ctx.calibration),
        )
        return self._with_unseen(found, removed)

    def _judging(self, groups: int, data: Dataset) -> int:
        """Held-out samples to measure the losses of groups on: fewer where runs are much work."""
        samples = judging_samples(self.model, data, PROBE_SAMPLES, groups * len(PROBED))
        _, held_out = split(data)
        there = (data if held_out is None else held_out).sample_count
        note = judging_note("Losses of groups", samples, min(PROBE_SAMPLES, there))
        self.notes += [n for n in note if n not in self.notes]
        return samples

    def _with_unseen(
        self, rankings: Sequence[Ranking], removed: Mapping[int, Indices]
    ) -> list[Ranking]:
        """Rankings in which groups of branches that no sample runs do not look free.

        Such a group changes no output. Its units are ordered by their weights, and its curve gets
        the height of the lowest of the other groups' curves: what samples do run comes first, but
        nobody wants all channels of the other branch gone.
        """
        inner = {n.name for n in self.model.graph.all_nodes()} - {n.name for n in self.model.graph}
        unseen = [
            r
            for r in rankings
            if all(s.node in inner for s in r.group.sinks) and r.losses.max(initial=0.0) < _UNSEEN
        ]
        if not unseen:
            return list(rankings)
        others = [r.losses[len(r.losses) // 2] for r in rankings if r not in unseen]
        height = max(min(others, default=1.0), _UNSEEN)
        replaced = {}
        for ranking in unseen:
            order, losses = rank_by_weights(self.model, ranking.group, Importance.L2, self.ctx.seed)
            gone = removed.get(ranking.group.index, np.zeros(0, np.int64))
            order = np.concatenate([gone, order[~np.isin(order, gone)]])
            losses = losses * (height / losses[len(losses) // 2])
            replaced[ranking.group.index] = Ranking(ranking.group, order, losses, "l2")
        note = (
            f"The calibration samples never run the branch with '{unseen[0].group.name}': the "
            "channels to remove there were chosen by their weights."
        )
        if note not in self.notes:
            self.notes.append(note)
        return [replaced.get(r.group.index, r) for r in rankings]

    def choose(
        self,
        rankings: Sequence[Ranking],
        removed: Mapping[int, Indices],
        part: float,
        timed: bool = False,
    ) -> dict[int, Indices]:
        """Spend a part of the budget; nothing if the default one cannot be reached.

        Args:
            rankings: The order of removal of each group, what is removed already first.
            removed: That.
            part: How much of what is to go may go by now, in (0, 1].
            timed: Whether it is to be spent where it saves most time.

        Raises:
            PassError: If one that was asked for cannot be reached.
        """
        # What prune.keep names goes whatever a budget says.
        budget = self.options.budget or Budget(Measure.MACS, 1.0)
        kept = 1 - (1 - budget.kept) * part
        left = self._left(budget.measure)
        orders = {r.group.index: r.order for r in rankings}

        def taken(counts: Mapping[int, int]) -> dict[int, Indices]:
            units = {g: orders[g][:n] for g, n in counts.items() if n}
            return self._closed({g: u for g, u in removed.items() if g not in orders} | units)

        curves = []
        for ranking in rankings:
            gone = len(removed.get(ranking.group.index, ()))
            open_ = tuple(n for n in self.counts(ranking.group, part) if n > gone)
            named = open_ and ranking.group.index in self._kept
            counts = open_ if named else (gone, *open_)
            # Measurements of two sizes may say otherwise, but more removals never cost less.
            losses = tuple(np.maximum.accumulate(ranking.losses)[list(counts)].tolist())
            curves.append(Curve(ranking.group.index, counts, losses))
        for total in self._totals:
            curves = total.settled(curves, part)

        remains = _remembered(lambda counts: left(taken(counts)))
        timed = timed or self.options.latency is not None
        time = None
        if timed and self.counts_time:
            time = _remembered(lambda counts: self.time_left(taken(counts)))

        def plan_for(share: float) -> dict[int, Indices]:
            return taken(allocate(curves, remains, share, exchange=True, time=time))

        name = budget.measure.value
        if self.options.latency is not None and rankings:
            name = "latency"
            clock = Clock(self.model, self.coupling, self.ctx)
            plan, reached = plan_in_time(plan_for, clock.ratio, kept)
            self.notes.append(
                f"A run takes {reached:.2f} of the original's time (one sample, one thread, "
                f"measured before refitting), with {left(plan):.2f} of the multiply-accumulates."
            )
        elif part < 1:
            plan = plan_for(kept)
            reached = left(plan)
        else:
            plan, reached = self._settled(plan_for, budget.measure, kept, left)
        if not rankings or self.options.budget is None or reached <= kept + 1e-9:
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

    def _left(self, measure: Measure) -> Callable[[Mapping[int, Indices]], float]:
        """The fraction of a measure that is left; its tables serve all plans."""
        if measure not in self._measures:
            self._measures[measure] = remaining(
                self.model, self.coupling, measure, self._ledger.feeds_shapes
            )
        return self._measures[measure]

    def time_left(self, units: Mapping[int, Indices]) -> float:
        """The fraction of the time that is left, as kernels take it; 1 if it does not count."""
        if not self.counts_time:
            return 1.0
        if self._macs is None:
            self._macs = MacsModel(self.model, self.coupling, self._ledger.feeds_shapes)
        block = self.options.align or self.ctx.target.channel_alignment
        return self._macs.padded(units, block) / max(self._macs.padded({}, block), 1)

    @property
    def counts_time(self) -> bool:
        """Whether a budget is there for the sake of time."""
        budget = self.options.budget
        timed = self.options.price is Price.TIME
        return timed and budget is not None and budget.measure is Measure.MACS

    def _settled(
        self,
        plan_for: Callable[[float], dict[int, Indices]],
        measure: Measure,
        kept: float,
        left: Callable[[Mapping[int, Indices]], float],
    ) -> tuple[dict[int, Indices], float]:
        """A plan that keeps its budget once it is cut, and what is then left.

        Cutting adds constants of its own (shapes, gathers); by what they cost too much, the plan
        is made tighter.
        """
        target = kept
        for _ in range(_SETTLINGS):
            plan = plan_for(target)
            reached = self._ledger.cut_ratio(self.model, self.coupling, plan, measure)
            if reached <= kept + 1e-9 or left(plan) > target:
                break
            target = max(target - (reached - kept) - 1e-6, 0.0)
        return plan, reached

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
                        f"{count} of {group.size} {noun(group)} removed (by {ranking.basis}, "
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
                    f"its {group.size} {noun(group)} are too few for prune.align and prune.min_kept"
                )
                if group.index in self._kept:
                    reason = f"prune.keep leaves all of its {group.size} {noun(group)}"
                elif self.options.budget is None and not self._in_total(group):
                    reason = "prune.keep and prune.total do not name it, and there is no budget"
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


def _remembered(cost: Cost) -> Cost:
    """The same, each cost reckoned once: plans for nearly the same budget ask alike."""
    known: dict[tuple[tuple[int, int], ...], float] = {}

    def found(counts: Mapping[int, int]) -> float:
        key = tuple(sorted(counts.items()))
        if key not in known:
            known[key] = cost(counts)
        return known[key]

    return found
