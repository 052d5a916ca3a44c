"""The quantization pass: choose, place by the clock, calibrate, check, write."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.padding import without_padding
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.errors import UsageError
from onnxcompress.graph.constants import constant_of
from onnxcompress.numerics.affine import fixed_point_format
from onnxcompress.passes.base import Change, PassReport, Skip, Stage
from onnxcompress.passes.quant.budget import Budget
from onnxcompress.passes.quant.build import Builder, Built
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.passes.quant.condition import Conditioned, condition, smoothed
from onnxcompress.passes.quant.dynamic import NOT_FASTER, Static, add_dynamic, plan_dynamic
from onnxcompress.passes.quant.embeddings import quantize_embeddings
from onnxcompress.passes.quant.judge import Judge
from onnxcompress.passes.quant.memory import placement_key, recall, remember
from onnxcompress.passes.quant.mixed import Mixed, Mixer
from onnxcompress.passes.quant.operators import RULES, WEIGHT, Kind
from onnxcompress.passes.quant.options import (
    Activations,
    Format,
    Mode,
    Objective,
    QuantOptions,
    Rounding,
    Scales,
)
from onnxcompress.passes.quant.placement import Network
from onnxcompress.passes.quant.precision import Precision
from onnxcompress.passes.quant.prepare import prepare
from onnxcompress.passes.quant.regions import repair
from onnxcompress.passes.quant.search import Candidate, chosen_by, default_candidate, search
from onnxcompress.runtime import Array, SessionSettings, open_session
from onnxcompress.search.goals import Goals
from onnxcompress.targets import Target, detect_target

_MIN_OPSET = 13
"""QuantizeLinear and DequantizeLinear take one scale per channel from this operator set on."""

_NO_RULE = {
    "Attention": "there is no integer kernel for it",
    "Einsum": "there is no integer kernel for it",
    "GRU": "there is no integer kernel for it",
    "LSTM": "it has a dynamic integer kernel only, which this mode does not use",
    "RNN": "there is no integer kernel for it",
}

_SAMPLES = 512
"""Calibration samples at most; more gained nothing."""

_LOSES = 0.98
"""Below this speed against float the integer model is not shipped (objective=latency)."""

_GAINS = 1.02
"""Below this speed against float the report says that integers bring no speed-up."""

_REPAIRS = 3
"""How often parts of a result that is slower than float are put back to float."""

_PLACEMENT_SHARE = 0.6
"""Most of the time for searching that placements may take; the rest is for what comes after."""

_PLACEMENT_SAMPLES = 16
"""Samples on which the outputs of placements are compared with float."""

_OF_THE_SEARCH = frozenset(
    {"equalization_gain_db", "placements_timed", "search_seconds", "smoothing_gain_db"}
)
"""Figures that are true whatever is on integers in the end."""

_FINAL_SECONDS = 1.5
"""Time to compare the result with float."""


class QuantPass:
    """Runs weighted operators on 8-bit integers where that is accurate and not slower.

    Args:
        options: How to quantize; the defaults when None.
    """

    name: ClassVar[str] = "quant"
    summary: ClassVar[str] = (
        "Run convolutions, products and LSTM on 8-bit integers (static or dynamic)."
    )
    stage: ClassVar[Stage] = Stage.PRECISION
    needs: ClassVar[frozenset[Statistic]] = frozenset(
        {Statistic.RANGE, Statistic.TAIL, Statistic.HISTOGRAM, Statistic.MEAN, Statistic.MOMENTS}
    )
    options_type: ClassVar[type[QuantOptions]] = QuantOptions

    def __init__(self, options: QuantOptions | None = None) -> None:
        self._options = QuantOptions() if options is None else options
        self._options.validate(self.name)

    @property
    def options(self) -> QuantOptions:
        """The options this pass was made with."""
        return self._options

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say which nodes could run on integers, before any measurement.

        Raises:
            UsageError: If a name pattern or operator matches no node.
        """
        self._check_patterns(model)
        if self._options.mode is Mode.DYNAMIC:
            return plan_dynamic(model, ctx, self._excluded)
        static = self._plan_static(model, ctx)
        if self._options.mode is Mode.STATIC:
            return static
        return plan_dynamic(model, ctx, self._excluded, static)

    def _plan_static(self, model: ir.Model, ctx: PassContext) -> PassReport:
        probe = model_io.clone(model)
        prepare(probe)
        network = Network(
            probe,
            symmetric=ctx.target.symmetric_activations,
            fixed_point=self._options.scales is Scales.POWER_OF_TWO,
            tied=ctx.target.tied_operators,
        )
        allowed, skips = self._select(probe, network)
        return PassReport(
            changes=tuple(
                Change(name, node.op_type, "may run on 8-bit integers", _saved_bytes(node))
                for name, node in network.nodes.items()
                if name in allowed
            ),
            skips=tuple(skips.values()),
            figures={"candidate_nodes": len(allowed)},
        )

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Quantize ``model`` in place.

        Raises:
            DataError: If there is no calibration data.
            UsageError: If a name pattern or operator matches no node.
        """
        ctx = ctx.at_most(_SAMPLES)
        mode, budget = self._options.mode, Budget(self._options.search_seconds)
        if mode is Mode.STATIC:
            return self._static(model, ctx, frozenset(), budget).report
        if mode is Mode.DYNAMIC:
            self._check_patterns(model)
            return add_dynamic(model, ctx, self._options, self._excluded, None, budget)
        return add_dynamic(
            model,
            ctx,
            self._options,
            self._excluded,
            lambda copy, kept: self._static(copy, ctx, kept, budget),
            budget,
        )

    def _static(
        self, model: ir.Model, ctx: PassContext, kept: frozenset[str], budget: Budget
    ) -> Static:
        """Quantize ``model`` statically, in place, but for the nodes ``kept``."""
        run = _Run(self, self._options, model, ctx, kept, budget)
        return run.static()

    def needs_for(self, target: Target) -> frozenset[Statistic]:
        """Nothing where ranges are taken while the model runs."""
        del target
        return frozenset() if self._options.mode is Mode.DYNAMIC else self.needs

    def _select(self, model: ir.Model, network: Network) -> tuple[frozenset[str], dict[str, Skip]]:
        """Nodes that may be quantized, and a reason for each other node that might have been."""
        self._check_patterns(model)
        skips: dict[str, Skip] = {}
        allowed: set[str] = set()
        opset = model.opset_imports.get("", 0)
        for node in model.graph.all_nodes():
            name = node.name or ""
            rule = RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
            if rule is None:
                if node.op_type in _NO_RULE and node.domain in {"", "ai.onnx"}:
                    skips[name] = Skip(name, node.op_type, _NO_RULE[node.op_type])
                continue
            if rule.kind not in {Kind.WEIGHTED, Kind.JOINING} or _computes_shapes(node):
                continue
            reason = self._excluded(node)
            if node.graph is not model.graph:
                reason = "it is inside a branch or a loop body"
            elif opset < _MIN_OPSET:
                reason = f"the model's operator set is {opset}; scales per channel need 13"
            elif reason is None:
                reason = network.refusals.get(name)
            if reason is None:
                allowed.add(name)
            else:
                skips[name] = Skip(name, node.op_type, reason)
        return frozenset(allowed), skips

    def _excluded(self, node: ir.Node) -> str | None:
        options, name = self._options, node.name or ""
        if options.op_types and node.op_type not in options.op_types:
            return f"op_types names only {', '.join(options.op_types)}"
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.exclude):
            return "excluded by name"
        if options.include and not any(fnmatch.fnmatchcase(name, p) for p in options.include):
            return "not among the names to include"
        return None

    def _check_patterns(self, model: ir.Model) -> None:
        names = [node.name or "" for node in model.graph.all_nodes()]
        for role, patterns in (
            ("include", self._options.include),
            ("exclude", self._options.exclude),
        ):
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    raise UsageError(
                        f"quant.{role}: no node is named like '{pattern}'",
                        hint="See the node names with: onnxcompress inspect MODEL.",
                    )
        operators = {node.op_type for node in model.graph.all_nodes()}
        for op_type in self._options.op_types:
            if op_type not in operators:
                raise UsageError(
                    f"quant.op_types: the model has no operator '{op_type}'",
                    hint=f"It has: {', '.join(sorted(operators))}.",
                )


def _saved_bytes(node: ir.Node) -> int:
    """Three of the four bytes of every weight, scales neglected."""
    weight = constant_of(node.inputs[WEIGHT]) if len(node.inputs) > WEIGHT else None
    return 0 if weight is None else weight.nbytes * 3 // 4


def _computes_shapes(node: ir.Node) -> bool:
    """Whether ``node`` handles integers, as the arithmetic of shapes and indices does."""
    dtype = node.outputs[0].dtype
    return dtype is not None and not dtype.is_floating_point()


class _Run:
    """One run of the pass; collects what happened for the report."""

    def __init__(
        self,
        owner: QuantPass,
        options: QuantOptions,
        model: ir.Model,
        ctx: PassContext,
        kept: frozenset[str],
        budget: Budget,
    ) -> None:
        self._integer_nodes: frozenset[str] = frozenset()
        self._result: Mixed | None = None
        self._kept = kept
        self._budget = budget
        self._owner = owner
        self._options = options
        self._model = model
        self._ctx = ctx
        self._work = model_io.clone(model)
        self._prepared = prepare(self._work)
        self._float = model_io.clone(self._work)
        self._embedded = self._embed(self._work)
        self._conditioned = Conditioned()
        self._skips: dict[str, Skip] = {}
        self._notes: list[str] = []
        self._figures: dict[str, float | int | str] = {}
        # Statistics leave padding out; times are taken on samples as they are.
        self._statistics = self._without_padding()
        self._builder = Builder(self._work, options, self._statistics)
        self._mixer = Mixer(self._builder, options, self._statistics)

    def report(self) -> PassReport:
        """Quantize and say what was done."""
        network = self._builder.network
        allowed, self._skips = self._owner._select(self._work, network)
        allowed -= self._kept
        if not any(network.rule(name).kind is Kind.WEIGHTED for name in allowed):
            return self._left_in_float("No convolution or matrix product can run on integers.")
        self._builder.measure(allowed)
        for name in allowed & network.refusals.keys():
            self._reject([name], network.refusals[name])
        allowed = self._fusible(allowed - network.refusals.keys())
        if not any(network.rule(name).kind is Kind.WEIGHTED for name in allowed):
            return self._left_in_float("No convolution or matrix product can run on integers.")
        chosen = self._placed(allowed)
        self._condition(chosen)
        mixed = self._mixed(chosen)
        if mixed is None:
            return self._left_in_float(
                f"On integers the outputs stay below {self._wanted()}, so the model was left as it "
                "is."
            )
        mixed = self._not_slower(mixed)
        if mixed is None:
            return self._left_in_float(
                "On integers this model is slower than in float here, so it was left as it is "
                "(objective=size quantizes it all the same)."
            )
        return self._written(self._model, mixed)

    def _written(self, model: ir.Model, mixed: Mixed) -> PassReport:
        """Write a result into ``model``, a copy of the model that the pass was given."""
        prepare(model)
        self._embed(model)
        smoothed(model, self._conditioned)
        kept = self._builder.finish(model, mixed.built)
        if self._options.format is Format.QOPERATOR:
            self._figures["operators_on_integers"] = len(mixed.built.plan.nodes) - len(kept)
        return self._done(mixed)

    def _embed(self, model: ir.Model) -> tuple[tuple[Change, ...], tuple[Skip, ...]]:
        """Put the embedding tables of ``model`` on integers, as far as the options allow."""
        options = self._options
        if not options.embeddings or (options.op_types and "Gather" not in options.op_types):
            return (), ()
        refused = frozenset(n.name or "" for n in model.graph if self._owner._excluded(n))
        return quantize_embeddings(model, refused, options.min_sqnr_db)

    def _without_padding(self) -> PassContext:
        """The job with samples cut to what counts of them."""
        samples = self._ctx.calibration
        if samples is None:
            return self._ctx
        cut = without_padding(samples, lambda: open_session(self._float, self._ctx.session).run)
        if cut is None:
            return self._ctx
        self._notes.append("Statistics leave out the padding that a mask input marks.")
        return replace(self._ctx, calibration=cut)

    def _condition(self, chosen: frozenset[str]) -> None:
        """Smooth the float model where the outputs gain, and measure it anew."""
        found = condition(
            self._statistics, self._work, self._options, chosen, self._builder.measured
        )
        self._skips |= {skip.node: skip for skip in found.skips}
        if not found.changes_model:
            return
        done = smoothed(self._work, found)
        self._prepared = (*self._prepared, *done.changes)
        self._conditioned = found
        known = None  # equalization changes nearly all values
        if found.equalized_db is None:
            known = self._builder.measured.rescaled(done.moved, done.factors)
        self._builder = Builder(self._work, self._options, self._statistics, known)
        self._builder.measure(chosen)
        self._mixer = Mixer(self._builder, self._options, self._statistics)
        if found.equalized_db is not None:
            self._figures["equalization_gain_db"] = round(found.equalized_db, 1)
        if found.tried:
            self._figures["smoothing_gain_db"] = round(found.gain_db, 1)

    def _reject(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self._skips[name] = Skip(name, self._builder.network.nodes[name].op_type, reason)

    def _runs_here(self) -> bool:
        """Whether onnxruntime on this machine's CPU shows what the target would do."""
        return self._ctx.session.providers == ("CPUExecutionProvider",) and self._ctx.target.on_cpu

    def _fusible(self, allowed: frozenset[str]) -> frozenset[str]:
        if not self._runs_here():
            return allowed
        if self._options.activations is Activations.INT16:
            self._notes.append(
                "CPUs have no kernels for 16-bit activations: here each node computes in float "
                "between two of them, slower than float alone."
            )
            return allowed
        allowed, lost = self._builder.fused(allowed)
        self._reject(lost, "onnxruntime has no integer kernel for it")
        return allowed

    def _placed(self, allowed: frozenset[str]) -> frozenset[str]:
        """The fastest placement; all of ``allowed`` where the clock has no say."""
        wide = self._options.activations is Activations.INT16
        if self._options.objective is Objective.SIZE or wide:
            return chosen_by(self._builder.network, allowed, Candidate(pools=True))
        candidate = default_candidate(self._builder.network, allowed)
        same_machine = self._ctx.target == detect_target()
        if not (self._runs_here() and same_machine) or self._ctx.calibration is None:
            self._notes.append(
                f"The placement was not timed: the target {self._ctx.target.name} is not the "
                "CPU of this machine."
            )
        elif self._options.search_seconds > 0:
            candidate = self._fastest(allowed, self._ctx.calibration.first())
        chosen = chosen_by(self._builder.network, allowed, candidate)
        self._figures["placement"] = str(candidate)
        self._reject(allowed - chosen, "in float the model is faster by the clock")
        return chosen

    def _fastest(self, allowed: frozenset[str], feeds: Mapping[str, Array]) -> Candidate:
        """The fastest placement, timed here or remembered from a search for the same model."""
        key = placement_key(self._work, allowed, feeds, self._ctx.target, self._options)
        known = recall(key) if self._options.cache else None
        if known is not None:
            self._notes.append(
                f"The placement was found before, on this kind of machine: {known.timed} were "
                f"timed in {known.seconds:.1f} s then (quant.cache=false searches again)."
            )
            self._figures |= {"placements_timed": 0, "search_seconds": 0.0}
            return known.candidate
        assert self._statistics.calibration is not None  # noqa: S101 - there are feeds
        draft = self._builder.draft(allowed)
        judge = Judge(self._float, self._statistics.calibration, count=_PLACEMENT_SAMPLES)
        with self._budget.spend(_PLACEMENT_SHARE) as seconds:
            found = search(
                self._builder.network,
                allowed,
                lambda chosen: self._builder.part_of(draft, chosen),
                judge.rate,
                feeds,
                seconds=seconds,
                progress=self._ctx.progress,
            )
        if self._options.cache and not remember(key, found):
            self._ctx.progress.log("the placement found could not be cached")
        self._figures |= {
            "placements_timed": found.timed,
            "search_seconds": round(found.seconds, 1),
        }
        return found.candidate

    def _mixed(self, chosen: frozenset[str]) -> Mixed | None:
        """Quantize with care; what cannot keep what is asked for is lifted off 8-bit integers."""
        mixed = self._mixer.mix(chosen)
        for name, ratio in self._mixer.lost.items():
            self._reject([name], f"its output keeps only {ratio:.1f} dB on integers")
        self._notes += self._mixer.notes
        if mixed is not None:
            self._figures |= mixed.figures
        return mixed

    def _wanted(self) -> str:
        """The limits in words."""
        return str(Goals(self._ctx.goals, self._options.min_sqnr_db))

    def _timed(self) -> bool:
        """Whether a result that is slower than float is not wanted, and the clock can tell."""
        return (
            self._options.objective is Objective.LATENCY
            and self._options.activations is Activations.INT8
            and self._runs_here()
            and self._ctx.target == detect_target()
            and self._ctx.calibration is not None
        )

    def _not_slower(self, mixed: Mixed) -> Mixed | None:
        """Time the result against float; parts that are slower go back to float."""
        if not self._timed():
            return mixed
        ratio = self._speed_ratio(mixed)
        for _ in range(_REPAIRS):
            if ratio >= _LOSES:
                break
            fewer = self._without_slow_parts(mixed)
            if fewer is None:
                break
            mixed, ratio = fewer
        self._figures["speed_ratio"] = round(ratio, 3)
        if _LOSES <= ratio < _GAINS:
            self._notes.append(f"{NOT_FASTER} ({ratio:.2f}x the speed of float with one thread).")
        return mixed if ratio >= _LOSES else None

    def _speed_ratio(self, mixed: Mixed) -> float:
        """Time of float over time of the result, one thread, one sample."""
        assert self._ctx.calibration is not None  # noqa: S101 - _timed() looked
        settings = SessionSettings(threads=1)
        quantized = self._builder.model_of(mixed.built)
        sessions = [open_session(self._float, settings), open_session(quantized, settings)]
        feeds = self._ctx.calibration.first()
        for patience in (1, 3):  # a verdict against integers is heard twice, the second time longer
            times = run_times(sessions, feeds, seconds=_FINAL_SECONDS * patience, clear=1.0)
            if times[0] / times[1] >= _LOSES:
                break
        return times[0] / times[1]

    def _without_slow_parts(self, mixed: Mixed) -> tuple[Mixed, float] | None:
        """The result with slow parts in float, and its speed; None where no part is fast enough."""
        assert self._ctx.calibration is not None  # noqa: S101 - _timed() looked
        with self._budget.spend() as seconds:
            found = repair(
                self._builder.network,
                mixed.chosen,
                lambda chosen: self._builder.part_of(mixed.built, chosen),
                self._ctx.calibration.first(),
                seconds=seconds,
                progress=self._ctx.progress,
            )
        if "search_seconds" in self._figures:
            self._figures["search_seconds"] = round(self._budget.spent, 1)
        timed = int(self._figures.get("regions_timed", 0))
        self._figures["regions_timed"] = timed + found.timed
        fewer = self._mixer.rebuilt(mixed, found.chosen)
        if fewer is None:
            return None
        self._reject(mixed.chosen - found.chosen, "in float the model is faster by the clock")
        return fewer, self._speed_ratio(fewer)

    def static(self) -> Static:
        """Quantize, and say what was done and how to do it with fewer nodes."""
        report = self.report()
        result = self._result
        if result is None:
            return Static(report, frozenset(), left_in_float=True)

        def draft(names: frozenset[str]) -> ir.Model:
            return self._builder.part_of(result.built, result.chosen - names)

        def again(model: ir.Model, names: frozenset[str]) -> Static:
            fewer = self._mixer.rebuilt(result, result.chosen - names)
            if fewer is None:
                return self._only_conditioned(model)
            return Static(self._written(model, fewer), self._integer_nodes)

        return Static(report, self._integer_nodes, draft, again)

    def _only_conditioned(self, model: ir.Model) -> Static:
        """Leave all in float but the embeddings, smoothed as for integers."""
        prepare(model)
        self._embed(model)
        smoothed(model, self._conditioned)
        report = PassReport(
            changes=(*self._prepared, *self._embedded[0]),
            skips=tuple(self._skips.values()),
            figures={n: f for n, f in self._figures.items() if n in _OF_THE_SEARCH},
            notes=tuple(self._notes),
        )
        return Static(report, frozenset())

    def _left_in_float(self, note: str) -> PassReport:
        return PassReport(
            skips=tuple(self._skips.values()),
            figures=self._figures | {"integer_nodes": 0},
            notes=(*self._notes, note),
        )

    def _done(self, mixed: Mixed) -> PassReport:
        built, self._result = mixed.built, mixed
        network = self._builder.network
        self._integer_nodes = frozenset(built.plan.nodes)
        changes = [*self._prepared, *self._embedded[0]]
        self._skips |= {skip.node: skip for skip in self._embedded[1]}
        for name in built.plan.nodes:
            layer = built.layers.get(name)
            how = f"runs on {16 if name in self._wide(mixed) else 8}-bit integers"
            if layer is not None:
                fed = self._options.weights.words
                how += f", weights rounded {fed if layer.feedback else Rounding.NEAREST.words}"
            if self._options.scales is Scales.POWER_OF_TWO:
                how += self._formats(built, name)
            changes.append(Change(name, network.nodes[name].op_type, how))
        for activation, node in built.plan.folded.items():
            changes.append(
                Change(
                    activation,
                    network.nodes[activation].op_type,
                    f"performed by the scale of '{node}'",
                )
            )
        changes.extend(
            Change(name, network.nodes[name].op_type, "weights stored in float16, for accuracy")
            for name in sorted(built.halves)
        )
        for name, precision in mixed.lifted.items():
            if precision is Precision.FLOAT:
                self._reject([name], "lifted to float: the limits on the outputs need it")
        for name in {s for s in self._skips if s in built.plan.nodes}:
            del self._skips[name]
        ratios = built.correction.output_sqnr_db
        self._figures |= {
            "integer_nodes": len(built.plan.nodes),
            "integer_weighted_nodes": len(built.layers),
            "biases_corrected": len(built.correction.shifts),
            "ranges": built.method.value,
        }
        if ratios:
            self._figures["calibration_sqnr_db"] = round(min(ratios.values()), 1)
        return PassReport(
            changes=tuple(changes),
            skips=tuple(self._skips.values()),
            figures=self._figures,
            notes=tuple(self._notes),
            tables=mixed.tables,
        )

    def _formats(self, built: Built, name: str) -> str:
        """The fixed-point formats of a node's weight and output."""
        words = []
        if (layer := built.layers.get(name)) is not None:
            words.append(f"weights {fixed_point_format(layer.affine)}")
        output = built.affines.get(
            self._builder.network.result(self._builder.network.nodes[name]).name or ""
        )
        if output is not None:
            words.append(f"output {fixed_point_format(output)}")
        return "".join(f", {each}" for each in words)

    def _wide(self, mixed: Mixed) -> frozenset[str]:
        """Nodes with 16-bit activations."""
        if self._options.activations is Activations.INT16:
            return frozenset(mixed.built.plan.nodes)
        return mixed.wide
