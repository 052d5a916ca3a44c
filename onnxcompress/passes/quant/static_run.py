"""Static quantization of one model: prepare, choose, place, calibrate, check, write."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.context import PassContext
from onnxcompress.numerics.affine import fixed_point_format
from onnxcompress.passes._unpadded import NOTE, unpadded
from onnxcompress.passes.base import Change, PassReport, Skip
from onnxcompress.passes.quant.budget import Budget
from onnxcompress.passes.quant.build import Builder
from onnxcompress.passes.quant.built import Built
from onnxcompress.passes.quant.by_clock import ByClock
from onnxcompress.passes.quant.channels import Choice, choose_factors, equalize_channels
from onnxcompress.passes.quant.condition import Conditioned, condition, smoothed
from onnxcompress.passes.quant.embeddings import quantize_embeddings
from onnxcompress.passes.quant.ledger import Ledger
from onnxcompress.passes.quant.mixed import Mixed, Mixer
from onnxcompress.passes.quant.operators import Kind
from onnxcompress.passes.quant.options import (
    Activations,
    Equalize,
    Format,
    QuantOptions,
    Rounding,
    Scales,
)
from onnxcompress.passes.quant.precision import Precision
from onnxcompress.passes.quant.prepare import prepare
from onnxcompress.passes.quant.samples import bias_samples
from onnxcompress.passes.quant.selection import Selection
from onnxcompress.passes.quant.static import Static
from onnxcompress.search.goals import Goals

_OF_THE_SEARCH = frozenset(
    {"equalization_gain_db", "placements_timed", "search_seconds", "smoothing_gain_db"}
)
"""Figures that are true whatever is on integers in the end."""


class StaticQuantizer:
    """One static quantization of one model; collects what happened for the report.

    Args:
        selection: Which nodes may be quantized.
        options: How to quantize.
        model: The model; :meth:`static` changes it in place.
        ctx: The job.
        kept: Nodes that stay in float.
        budget: The time for searching.
    """

    def __init__(
        self,
        selection: Selection,
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
        self._selection = selection
        self._options = options
        self._model = model
        self._ctx = ctx
        self._work = model_io.clone(model)
        self._prepared = prepare(self._work)
        self._float = model_io.clone(self._work)
        self._embedded = self._embed(self._work)
        self._channels: tuple[Choice, ...] = ()
        self._even: frozenset[str] = frozenset()
        self._conditioned = Conditioned()
        self._ledger = Ledger()
        # Statistics leave padding out; times are taken on samples as they are.
        self._statistics = unpadded(self._float, ctx)
        if self._statistics is not ctx:
            self._ledger.notes.append(NOTE)
        self._builder = Builder(self._work, options, self._statistics)
        self._mixer = Mixer(self._builder, options, self._statistics)

    def report(self) -> PassReport:
        """Quantize and say what was done."""
        network = self._builder.network
        allowed, self._ledger.skips = self._selection.select(self._work, network)
        allowed -= self._kept
        self._equalize_channels(allowed)
        network = self._builder.network
        if not any(network.rule(name).kind is Kind.WEIGHTED for name in allowed):
            return self._left_in_float("No convolution or matrix product can run on integers.")
        self._builder.measure(allowed)
        for name in allowed & network.refusals.keys():
            self._reject([name], network.refusals[name])
        allowed = self._fusible(allowed - network.refusals.keys())
        if not any(network.rule(name).kind is Kind.WEIGHTED for name in allowed):
            return self._left_in_float("No convolution or matrix product can run on integers.")
        chosen = self._clock().placed(allowed)
        self._condition(chosen)
        mixed = self._mixed(chosen)
        if mixed is None:
            return self._left_in_float(
                f"On integers the outputs stay below {self._wanted()}, so the model was left as it "
                "is."
            )
        mixed = self._clock().not_slower(mixed)
        if mixed is None:
            return self._left_in_float(
                "On integers this model is slower than in float here, so it was left as it is "
                "(objective=size quantizes it all the same)."
            )
        return self._written(self._model, mixed)

    def _written(self, model: ir.Model, mixed: Mixed) -> PassReport:
        """Write a result into ``model``, a copy of the model that the pass was given."""
        self._prepare_again(model)
        kept = self._builder.finish(model, mixed.built)
        if self._options.format is Format.QOPERATOR:
            self._ledger.figures["operators_on_integers"] = len(mixed.built.plan.nodes) - len(kept)
        return self._done(mixed)

    def _prepare_again(self, model: ir.Model) -> None:
        """Bring a copy of the model that the pass was given into the form that was quantized."""
        prepare(model)
        self._embed(model)
        equalize_channels(model, self._channels)
        smoothed(model, self._conditioned)

    def _equalize_channels(self, allowed: frozenset[str]) -> None:
        """Let the channels of activations share their ranges, where less noise is predicted."""
        wanted = self._options.equalize is Equalize.AUTO and self._options.per_channel
        if not wanted or self._statistics.calibration is None:
            return
        samples = bias_samples(self._statistics, self._builder.macs)
        self._channels = choose_factors(samples, self._work, self._builder.network, allowed)
        if self._channels:
            done = equalize_channels(self._work, self._channels)
            self._prepared, self._even = (*self._prepared, *done.changes), done.values
            self._builder = Builder(self._work, self._options, self._statistics)
            self._mixer = Mixer(self._builder, self._options, self._statistics)

    def _embed(self, model: ir.Model) -> tuple[tuple[Change, ...], tuple[Skip, ...]]:
        """Put the embedding tables of ``model`` on integers, as far as the options allow."""
        options = self._options
        if not options.embeddings or (options.op_types and "Gather" not in options.op_types):
            return (), ()
        refused = frozenset(n.name or "" for n in model.graph if self._selection.excluded(n))
        return quantize_embeddings(model, refused, options.min_sqnr_db)

    def _condition(self, chosen: frozenset[str]) -> None:
        """Smooth the float model where the outputs gain, and measure it anew."""
        found = condition(
            self._statistics, self._work, self._options, chosen, self._builder.measured, self._even
        )
        self._ledger.skips |= {skip.node: skip for skip in found.skips}
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
            self._ledger.figures["equalization_gain_db"] = round(found.equalized_db, 1)
        if found.tried:
            self._ledger.figures["smoothing_gain_db"] = round(found.gain_db, 1)

    def _reject(self, names: Iterable[str], reason: str) -> None:
        self._ledger.reject(self._builder.network, names, reason)

    def _clock(self) -> ByClock:
        """The clock for the model as it is now."""
        return ByClock(
            self._builder,
            self._mixer,
            self._options,
            self._ctx,
            self._statistics,
            self._float,
            self._budget,
            self._ledger,
        )

    def _fusible(self, allowed: frozenset[str]) -> frozenset[str]:
        if not self._clock().runs_here():
            return allowed
        if self._options.activations is Activations.INT16:
            self._ledger.notes.append(
                "CPUs have no kernels for 16-bit activations: here each node computes in float "
                "between two of them, slower than float alone."
            )
            return allowed
        allowed, lost = self._builder.fused(allowed)
        self._reject(lost, "onnxruntime has no integer kernel for it")
        return allowed

    def _mixed(self, chosen: frozenset[str]) -> Mixed | None:
        """Quantize with care; what cannot keep what is asked for is lifted off 8-bit integers."""
        mixed = self._mixer.mix(chosen)
        for name, ratio in self._mixer.lost.items():
            self._reject([name], f"its output keeps only {ratio:.1f} dB on integers")
        self._ledger.notes += self._mixer.notes
        if mixed is not None:
            self._ledger.figures |= mixed.figures
        return mixed

    def _wanted(self) -> str:
        """The limits in words."""
        return str(Goals(self._ctx.goals, self._options.min_sqnr_db))

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
        self._prepare_again(model)
        report = PassReport(
            changes=(*self._prepared, *self._embedded[0]),
            skips=tuple(self._ledger.skips.values()),
            figures={n: f for n, f in self._ledger.figures.items() if n in _OF_THE_SEARCH},
            notes=tuple(self._ledger.notes),
        )
        return Static(report, frozenset())

    def _left_in_float(self, note: str) -> PassReport:
        return PassReport(
            skips=tuple(self._ledger.skips.values()),
            figures=self._ledger.figures | {"integer_nodes": 0},
            notes=(*self._ledger.notes, note),
        )

    def _done(self, mixed: Mixed) -> PassReport:
        built, self._result = mixed.built, mixed
        network = self._builder.network
        self._integer_nodes = frozenset(built.plan.nodes)
        changes = [*self._prepared, *self._embedded[0]]
        self._ledger.skips |= {skip.node: skip for skip in self._embedded[1]}
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
        for name in {s for s in self._ledger.skips if s in built.plan.nodes}:
            del self._ledger.skips[name]
        ratios = built.correction.output_sqnr_db
        self._ledger.figures |= {
            "integer_nodes": len(built.plan.nodes),
            "integer_weighted_nodes": len(built.layers),
            "biases_corrected": len(built.correction.shifts),
            "ranges": built.method.value,
        }
        if ratios:
            self._ledger.figures["calibration_sqnr_db"] = round(min(ratios.values()), 1)
        return PassReport(
            changes=tuple(changes),
            skips=tuple(self._ledger.skips.values()),
            figures=self._ledger.figures,
            notes=tuple(self._ledger.notes),
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
