"""Mixed precision: lift as few nodes off 8-bit integers as the limits need.

One mechanism for all that a result must keep, the user's limits and ``quant.min_sqnr_db``:

1. A node whose *own* output keeps less than ``min_sqnr_db``, its inputs being right, is destroyed
   and goes back to float at once. One run of the data tells all nodes.
2. If the outputs keep what is asked for with a margin (:mod:`onnxcompress.search.goals`), this is
   the result; nothing more is measured.
3. Otherwise the sensitivity of each node is measured (:mod:`onnxcompress.search.sensitivity`), and
   the cheapest set of lifts that keeps the goals is found on versions of the model
   (:mod:`onnxcompress.search.greedy`).
4. The result is calibrated anew with that set and measured on the calibration samples; while it
   misses the goals more nodes are lifted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from onnxcompress.context import PassContext
from onnxcompress.passes.base import Table
from onnxcompress.passes.quant.aim import Aim, find_aim
from onnxcompress.passes.quant.build import Builder
from onnxcompress.passes.quant.built import Built
from onnxcompress.passes.quant.costs import Costs
from onnxcompress.passes.quant.operators import Kind
from onnxcompress.passes.quant.options import Objective, QuantOptions, RangeMethod
from onnxcompress.passes.quant.placement import Plan, make_plan
from onnxcompress.passes.quant.precision import AUTO, Precision, fallbacks_for
from onnxcompress.passes.quant.samples import mix_bounds
from onnxcompress.passes.quant.variants import (
    Bench,
    Kit,
    Order,
    Variant,
    forget_bench,
    keep_bench,
    measure,
    measured_nodes,
    variant,
    write_kit,
)
from onnxcompress.runtime import open_session
from onnxcompress.search.goals import Goals
from onnxcompress.search.greedy import Lifted, cheapest
from onnxcompress.search.parallel import run_tasks
from onnxcompress.search.reference import noise_ratio, worst_sqnr_db
from onnxcompress.search.sensitivity import NodeSensitivity, bounds_for, table_of
from onnxcompress.verification.compare import Comparison

_UNKNOWN_DB = 200.0
_CHECK_ROUNDS = 3
"""How often nodes that cannot keep their own output are put back to float."""

_ROUNDS = 4
"""How often the calibrated result may miss the goals, each time with more nodes lifted."""

_TRIMS = 16
"""Versions measured to make the set of lifts cheaper."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """A quantized model with nodes in different precisions.

    Attributes:
        built: The model.
        chosen: Nodes on integers.
        lifted: Nodes taken off 8-bit integers for the goals, with what they are in.
        lost: Nodes put back to float because of their own output, with its SQNR in dB.
        tables: What was measured, for the report.
        figures: Figures for the report.
        notes: Remarks for the report.
    """

    built: Built
    chosen: frozenset[str]
    lifted: Mapping[str, Precision] = field(default_factory=dict)
    lost: Mapping[str, float] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    figures: Mapping[str, float | int | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def wide(self) -> frozenset[str]:
        """Nodes with 16-bit activations."""
        return frozenset(n for n, p in self.lifted.items() if p is Precision.INT16)


class Mixer:
    """Finds the precision of each node.

    Args:
        builder: Makes models.
        options: How to quantize.
        ctx: The job, with the user's limits.
    """

    def __init__(self, builder: Builder, options: QuantOptions, ctx: PassContext) -> None:
        self._builder = builder
        self._options = options
        self._ctx = ctx
        self._folder = ctx.work_dir / "quant-versions"
        self._notes: list[str] = []
        self._figures: dict[str, float | int | str] = {}
        self._lost: dict[str, float] = {}

    @property
    def lost(self) -> Mapping[str, float]:
        """Nodes put back to float because of their own output so far, with its SQNR in dB."""
        return self._lost

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks so far."""
        return tuple(self._notes)

    def mix(self, chosen: frozenset[str]) -> Mixed | None:
        """The cheapest mix of precisions that keeps what is asked for.

        Args:
            chosen: Nodes that may run on integers.

        Returns:
            None where nothing can stay on integers.
        """
        found = self._keep_own_outputs(chosen)
        if found is None:
            return None
        chosen, built, ratios = found
        plain = Mixed(built, chosen, lost=dict(self._lost))
        floor_kept = built.worst_output() >= self._options.min_sqnr_db
        if floor_kept and self._ctx.goals.are_default and not self._options.sensitivity:
            return plain
        aim = find_aim(self._builder.model, self._ctx, self._options.min_sqnr_db)
        self._notes += aim.notes
        try:
            return self._pursue(plain, aim, ratios)
        finally:
            forget_bench(self._folder)

    def rebuilt(self, mixed: Mixed, chosen: frozenset[str]) -> Mixed | None:
        """The same mix with fewer nodes on integers, calibrated anew; None if none is left."""
        if not self._has_weights(chosen):
            return None
        before = mixed.built
        built = self._builder.careful(
            chosen, wide=mixed.wide & chosen, halves=before.halves, method=before.method
        )
        return replace(mixed, built=built, chosen=chosen)

    def _has_weights(self, chosen: frozenset[str]) -> bool:
        network = self._builder.network
        return any(network.rule(name).kind is Kind.WEIGHTED for name in chosen)

    def _keep_own_outputs(
        self, chosen: frozenset[str]
    ) -> tuple[frozenset[str], Built, dict[str, float]] | None:
        """Put nodes back to float that lose their own output, whatever happens elsewhere."""
        method: RangeMethod | None = None
        for _ in range(_CHECK_ROUNDS):
            if not self._has_weights(chosen):
                return None
            built = self._builder.careful(chosen, method=method)
            method = built.method  # to compare ways anew for a few nodes less would be much work
            easy = self._ctx.goals.are_default and not self._options.sensitivity
            if easy and built.clearly_keeps(self._options.min_sqnr_db):
                return chosen, built, {}
            ratios = self._builder.check_nodes(built)
            bad = {n: r for n, r in ratios.items() if r < self._options.min_sqnr_db}
            if not bad:
                return chosen, built, ratios
            self._lost |= bad
            chosen -= bad.keys()
        return None

    # --- the search ------------------------------------------------------------------------

    def _pursue(self, plain: Mixed, aim: Aim, ratios: Mapping[str, float]) -> Mixed | None:
        """Measure sensitivities, and lift nodes until the goals hold."""
        started = time.monotonic()
        kit = self._builder.kit(plain.built, plain.chosen, aim.reference)
        bench = Bench(self._builder.model, kit)
        keep_bench(self._folder, bench)
        every = bench.measure(Variant())
        missed = aim.goals.missed(every)
        if not missed and not self._options.sensitivity:
            return replace(plain, notes=self.notes)
        for sentence in missed:
            self._ctx.progress.log(f"all on integers: {sentence}")
        costs = self._costs_of(plain.built.plan)
        rows, every, samples = self._sensitivities(bench, costs, ratios)
        lifted: dict[str, Precision] = {}
        mixed: Mixed | None = plain
        if missed:
            precisions = self._precisions()
            gains = self._gains(rows, noise_ratio(every), ratios)
            lifted = self._cheapest(bench, aim.goals, gains, costs, precisions)
            mixed, lifted = self._calibrated(plain, aim, gains, lifted, precisions[-1])
        if mixed is None:
            lifted = dict.fromkeys(ratios, Precision.FLOAT)
        rows = [replace(row, precision=lifted.get(row.node, Precision.INT8).value) for row in rows]
        self._figures |= {
            "nodes_lifted": len(lifted),
            "mixing_seconds": round(time.monotonic() - started, 1),
        }
        if mixed is None:
            return None
        return replace(
            mixed,
            tables=(table_of(rows, worst_sqnr_db(every), samples),),
            figures=self._figures,
            notes=self.notes,
        )

    def _precisions(self) -> tuple[Precision, ...]:
        """What nodes may be lifted to, the cheapest first."""
        if self._options.fallback == (AUTO,):
            for_size = self._options.objective is Objective.SIZE
            return fallbacks_for(self._ctx.target, for_size=for_size)
        named = tuple(Precision(name) for name in self._options.fallback)
        return tuple(dict.fromkeys(named))

    def _sensitivities(
        self, bench: Bench, costs: Costs, ratios: Mapping[str, float]
    ) -> tuple[list[NodeSensitivity], Comparison, int]:
        """Measure the nodes, those that lose most of their own output first.

        Returns:
            A row per node, the comparison of all on integers on the same samples, and their number.
        """
        network = self._builder.network
        nodes = measured_nodes(network, bench.kit.plan)
        bounds = bounds_for(
            len(nodes), costs.total_macs, most_nodes=self._options.sensitivity_nodes
        )
        if bounds.nodes < len(nodes):
            self._notes.append(
                f"Of {len(nodes)} nodes on integers the sensitivity of {bounds.nodes} was "
                "measured, those whose own output loses most (sensitivity_nodes bounds them, and "
                "the size of the model)."
            )
        nodes = tuple(sorted(nodes, key=lambda n: (ratios.get(n, _UNKNOWN_DB), n)))[: bounds.nodes]
        wanted = [
            each
            for name in nodes
            for each in (
                Variant(only=name, samples=bounds.samples),
                variant({name: Precision.FLOAT}, bounds.samples),
            )
        ]
        found = run_tasks(
            measure,
            [Order(str(self._folder), each) for each in wanted],
            self._ctx.workers,
            share=lambda: write_kit(self._folder, self._builder.model, bench.kit),
            progress=self._ctx.progress,
            description="measuring sensitivities",
        )
        self._figures["versions_measured"] = len(found)
        rows = [
            NodeSensitivity(
                node=name,
                op_type=network.nodes[name].op_type,
                only_db=worst_sqnr_db(only),
                without_db=worst_sqnr_db(without),
                only_noise=noise_ratio(only),
                without_noise=noise_ratio(without),
                macs=costs.macs(name),
                precision=Precision.INT8.value,
            )
            for name, only, without in zip(nodes, found[::2], found[1::2], strict=True)
        ]
        every = bench.measure(Variant(samples=bounds.samples))
        return rows, every, bench.kit.reference.first(bounds.samples).sample_count

    def _costs_of(self, plan: Plan) -> Costs:
        feeds = {} if self._ctx.calibration is None else self._ctx.calibration.first()
        return Costs(
            self._builder.model,
            self._builder.network,
            plan,
            {name: array.shape for name, array in feeds.items()},
            for_size=self._options.objective is Objective.SIZE,
        )

    @staticmethod
    def _gains(
        rows: Sequence[NodeSensitivity], all_noise: float, ratios: Mapping[str, float]
    ) -> dict[str, float]:
        """Noise that lifting each node on integers takes away; what was not measured is guessed.

        The guess is the node's own noise times the least part of it that reached the outputs from
        any measured node.
        """
        gains = {row.node: row.gain(all_noise) for row in rows}
        own = {name: 10.0 ** (-ratio / 10.0) for name, ratio in ratios.items()}
        passed_on = min((gains[n] / own[n] for n in gains if own.get(n)), default=1.0)
        return {name: gains.get(name, passed_on * own[name]) for name in own}

    def _cheapest(
        self,
        bench: Bench,
        goals: Goals,
        gains: Mapping[str, float],
        costs: Costs,
        precisions: Sequence[Precision],
    ) -> dict[str, Precision]:
        tried = 0
        macs = self._builder.macs
        samples, looks = mix_bounds(macs, bench.kit.reference.sample_count)
        samples = bench.kit.reference.first(samples).sample_count  # whole batches

        def named(lifted: Lifted) -> dict[str, Precision]:
            return {node: precisions[tier] for node, tier in lifted.items()}

        most = min(looks, len(precisions) * (2 + len(gains).bit_length()) + _TRIMS)
        with self._ctx.progress.task("looking for the cheapest mix", most) as task:

            def holds(lifted: Lifted) -> bool:
                nonlocal tried
                tried += 1
                missed = goals.missed(bench.measure(variant(named(lifted), samples)))
                self._ctx.progress.log(f"{len(lifted)} lifted: {'; '.join(missed) or 'holds'}")
                task.advance()
                return not missed

            found = cheapest(
                gains,
                holds,
                cost=lambda lifted: costs.of(named(lifted)),
                tiers=len(precisions),
                trims=_TRIMS,
                looks=looks,
                completed=lambda lifted: self._completed(bench.kit, lifted, precisions),
            )
        self._figures |= {"mixes_tried": tried, "mix_samples": samples}
        if found is None:
            last = precisions[-1]
            self._notes.append(f"Not even with all nodes in {last.value} do the limits hold.")
            return dict.fromkeys(gains, last)
        if found.untried:
            self._figures["lifts_not_tried_lower"] = found.untried
        if found.untried and tried >= looks:
            self._notes.append(
                f"The search for the cheapest mix ended after {tried} versions on {samples} "
                f"samples each, the most work for a model of {macs:.2g} multiply-accumulates: "
                f"{found.untried} of {len(found.lifted)} nodes lifted were not tried lower."
            )
        return named(found.lifted)

    def _completed(
        self, kit: Kit, lifted: Lifted, precisions: Sequence[Precision]
    ) -> dict[str, int]:
        """The lifts with the nodes that leave integers because of them."""
        floats = {n for n, tier in lifted.items() if precisions[tier] is not Precision.INT16}
        left = set(make_plan(self._builder.network, kit.chosen - floats).nodes)
        fallen = [n for n in kit.plan.nodes if n not in left and n not in lifted]
        moving = {n for n in fallen if self._builder.network.rule(n).kind is Kind.MOVING}
        last = len(precisions) - 1
        return dict(lifted) | {n: last for n in fallen if n not in moving}

    def _calibrated(
        self,
        plain: Mixed,
        aim: Aim,
        gains: Mapping[str, float],
        lifted: dict[str, Precision],
        last: Precision,
    ) -> tuple[Mixed | None, dict[str, Precision]]:
        """The mix with scales, rounding and biases of its own; more is lifted while it misses."""
        order = sorted(gains, key=lambda name: (-gains[name], name))
        for turn in range(_ROUNDS):
            mixed = self._mixed(plain, lifted)
            if mixed is None or all(lifted.get(name) is last for name in order):
                return mixed, lifted
            session = open_session(self._builder.model_of(mixed.built), aim.settings)
            missed = aim.goals.missed(aim.reference.compare(session))
            if not missed:
                return mixed, lifted
            self._ctx.progress.log(f"calibrated with {len(lifted)} lifted: {missed[0]}")
            more = [node for node in order if lifted.get(node) is not last]
            count = max(1, len(lifted) // 16) << turn  # it mostly misses by little
            lifted = lifted | dict.fromkeys(more[:count], last)
        return self._mixed(plain, dict.fromkeys(order, last)), dict.fromkeys(order, last)

    def _mixed(self, plain: Mixed, lifted: Mapping[str, Precision]) -> Mixed | None:
        wide = frozenset(n for n, p in lifted.items() if p is Precision.INT16)
        halves = frozenset(
            n
            for n, p in lifted.items()
            if p is Precision.FLOAT16 and self._builder.network.rule(n).kind is Kind.WEIGHTED
        )
        chosen = plain.chosen - (lifted.keys() - wide)
        if not self._has_weights(chosen):
            return None
        built = self._builder.careful(chosen, wide=wide, halves=halves)
        return replace(plain, built=built, chosen=chosen, lifted=dict(lifted))
