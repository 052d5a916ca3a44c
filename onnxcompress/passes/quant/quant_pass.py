"""The quantization pass: choose, place by the clock, calibrate, check, write."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes.base import Change, PassReport, Stage
from onnxcompress.passes.quant.budget import Budget
from onnxcompress.passes.quant.dynamic import add_dynamic
from onnxcompress.passes.quant.dynamic_plan import plan_dynamic
from onnxcompress.passes.quant.operators import WEIGHT
from onnxcompress.passes.quant.options import (
    Mode,
    QuantOptions,
    Scales,
)
from onnxcompress.passes.quant.placement import Network
from onnxcompress.passes.quant.prepare import prepare
from onnxcompress.passes.quant.selection import Selection
from onnxcompress.passes.quant.static import Static
from onnxcompress.passes.quant.static_run import StaticQuantizer
from onnxcompress.targets import Target

_SAMPLES = 512
"""Calibration samples at most; more gained nothing."""


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
        self._selection = Selection(self._options)

    @property
    def options(self) -> QuantOptions:
        """The options this pass was made with."""
        return self._options

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say which nodes could run on integers, before any measurement.

        Raises:
            UsageError: If a name pattern or operator matches no node.
        """
        self._selection.check_patterns(model)
        if self._options.mode is Mode.DYNAMIC:
            return plan_dynamic(model, ctx, self._selection.excluded)
        static = self._plan_static(model, ctx)
        if self._options.mode is Mode.STATIC:
            return static
        return plan_dynamic(model, ctx, self._selection.excluded, static)

    def _plan_static(self, model: ir.Model, ctx: PassContext) -> PassReport:
        probe = model_io.clone(model)
        prepare(probe)
        network = Network(
            probe,
            symmetric=ctx.target.symmetric_activations,
            fixed_point=self._options.scales is Scales.POWER_OF_TWO,
            tied=ctx.target.tied_operators,
        )
        allowed, skips = self._selection.select(probe, network)
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
            self._selection.check_patterns(model)
            return add_dynamic(model, ctx, self._options, self._selection.excluded, None, budget)
        return add_dynamic(
            model,
            ctx,
            self._options,
            self._selection.excluded,
            lambda copy, kept: self._static(copy, ctx, kept, budget),
            budget,
        )

    def _static(
        self, model: ir.Model, ctx: PassContext, kept: frozenset[str], budget: Budget
    ) -> Static:
        """Quantize ``model`` statically, in place, but for the nodes ``kept``."""
        run = StaticQuantizer(self._selection, self._options, model, ctx, kept, budget)
        return run.static()

    def needs_for(self, target: Target) -> frozenset[Statistic]:
        """Nothing where ranges are taken while the model runs."""
        del target
        return frozenset() if self._options.mode is Mode.DYNAMIC else self.needs


def _saved_bytes(node: ir.Node) -> int:
    """Three of the four bytes of every weight, scales neglected."""
    weight = constant_of(node.inputs[WEIGHT]) if len(node.inputs) > WEIGHT else None
    return 0 if weight is None else weight.nbytes * 3 // 4
