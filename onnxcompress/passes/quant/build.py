"""From a choice of nodes to a quantized model: roughly for the clock, carefully for the result."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from onnxcompress import model_io, runtime
from onnxcompress.calibration.statistics import FloatArray
from onnxcompress.context import PassContext
from onnxcompress.numerics.affine import (
    Affine,
    activation_grid,
    is_wide,
    weight_grid,
    wide_grid,
)
from onnxcompress.passes.quant.built import Built
from onnxcompress.passes.quant.correction import (
    Correction,
    Quantized,
    correct_biases,
    local_sqnr_db,
)
from onnxcompress.passes.quant.insertion import insert
from onnxcompress.passes.quant.kernels import unfused
from onnxcompress.passes.quant.measure import (
    Measured,
    choose_affines,
    measure,
)
from onnxcompress.passes.quant.operators import Kind, data_inputs
from onnxcompress.passes.quant.options import (
    Activations,
    BiasCorrection,
    Format,
    QuantOptions,
    RangeMethod,
    Rounding,
    Scales,
)
from onnxcompress.passes.quant.parameters import (
    Layer,
    make_groups,
    make_layer,
    range_affines,
)
from onnxcompress.passes.quant.placement import Network, Plan, make_plan
from onnxcompress.passes.quant.precision import store_half, wide_points
from onnxcompress.passes.quant.qoperator import write_operators
from onnxcompress.passes.quant.samples import (
    bias_samples,
    few_samples,
    macs_of,
    parted_samples,
)
from onnxcompress.passes.quant.variants import Kit
from onnxcompress.runtime import SessionSettings
from onnxcompress.search.reference import Reference

_ENDLESS = (
    "it meets a tensor with infinite values or NaN, as masks have, which integers cannot hold"
)

AUTO_RANGES = (RangeMethod.NORM, RangeMethod.MINMAX)
"""What ``ranges=auto`` compares; neither is the better one everywhere."""


class Builder:
    """Quantizes one model in different ways; statistics of the float model are measured once.

    Args:
        model: The float model, already prepared; it is not changed.
        options: How to quantize.
        ctx: The job.
        measured: What is known of the float model already.
    """

    def __init__(
        self,
        model: ir.Model,
        options: QuantOptions,
        ctx: PassContext,
        measured: Measured | None = None,
    ) -> None:
        target = ctx.target
        self.model = model
        fixed_point = options.scales is Scales.POWER_OF_TWO
        self.network = Network(
            model,
            symmetric=target.symmetric_activations,
            fixed_point=fixed_point,
            tied=target.tied_operators,
        )
        self._options = options
        self._ctx = ctx
        grid = activation_grid(
            target.activation_dtype,
            symmetric=target.symmetric_activations,
            power_of_two=fixed_point,
        )
        self._grid = wide_grid(grid) if options.activations is Activations.INT16 else grid
        self._weight_grid = weight_grid(reduce_range=target.reduce_range, power_of_two=fixed_point)
        # Accelerators read the Q/DQ pairs themselves; onnxruntime's CPU kernels want the integers.
        self._on_cpu = target.on_cpu
        self._measured = Measured() if measured is None else measured
        self._asked: set[str] = set(self._measured.covariances)
        self._rounded: dict[str, Layer] = {}

    @functools.cached_property
    def macs(self) -> int:
        """Multiply-accumulates of the model for one sample."""
        return macs_of(self.model, self._ctx.calibration)

    @property
    def measured(self) -> Measured:
        """What the float model showed so far."""
        return self._measured

    def measure(self, chosen: frozenset[str]) -> None:
        """Measure what the plan for ``chosen`` and all smaller ones can ask for, in one run.

        Nodes at tensors that are NaN or infinite on a sample are refused by the network from then
        on: no grid of integers holds them.
        """
        # In graph order: a set's order differs between processes, and with it the rows drawn.
        nodes = [node for name, node in self.network.nodes.items() if name in chosen]
        # What a moving node passes on was measured before it; what a Relu cuts off is no point.
        points = dict.fromkeys(
            value.name or ""
            for node in nodes
            for value in (*data_inputs(node), self.network.result(node))
        )
        weighted = {
            node.name or "": node
            for node in nodes
            if self._options.weights is not Rounding.NEAREST
            and self.network.rule(node.name or "").kind is Kind.WEIGHTED
        }
        new = {name: node for name, node in weighted.items() if name not in self._asked}
        known = self._measured.ranges.keys() | self._measured.endless
        missing = [point for point in points if point not in known]
        if missing or new:
            self._asked |= set(new)
            found = measure(self._ctx, self.model, missing, new, self._options)
            self._measured = self._measured.joined(found)
            self.network.refuse(found.endless, _ENDLESS)

    def rough(self, chosen: frozenset[str]) -> tuple[Plan, ir.Model]:
        """The model with scales from ranges and weights rounded to nearest: right for timing."""
        plan = make_plan(self.network, chosen)
        affines = range_affines(make_groups(self.network, plan, self._measured.ranges), self._grid)
        return plan, self.write(plan, affines, self._layers(plan, affines, {})).model

    def fused(self, chosen: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
        """Drop nodes for which onnxruntime has no integer kernel, in up to three rounds.

        Returns:
            The nodes that are left, and those dropped.
        """
        dropped: frozenset[str] = frozenset()
        settings = SessionSettings(threads=1)
        for _ in range(3):
            plan, model = self.rough(chosen)
            executed = runtime.optimized_graph(model, settings, self._ctx.work_dir)
            lost = unfused(self.network, plan, executed)
            if not lost:
                break
            dropped, chosen = dropped | lost, chosen - lost
        return chosen, dropped

    def careful(
        self,
        chosen: frozenset[str],
        *,
        wide: frozenset[str] = frozenset(),
        halves: frozenset[str] = frozenset(),
        method: RangeMethod | None = None,
    ) -> Built:
        """The model with the scales, weights and biases that the options ask for.

        Args:
            chosen: Nodes on integers.
            wide: Those of them with 16-bit activations.
            halves: Float nodes whose weights are stored in float16.
            method: How to choose ranges, where that is known; the option decides when None.
        """
        plan = make_plan(self.network, chosen)
        method = method or self._options.ranges
        if is_wide(self._grid):
            method = RangeMethod.MINMAX  # nothing is to be gained by clipping 16 bits
        if method is not RangeMethod.AUTO:
            best = self._calibrated(plan, method, wide, bias_samples(self._ctx, self.macs))
            return replace(best, halves=halves)
        few, rest, share = parted_samples(self._ctx, self.macs)
        best = max(
            (self._calibrated(plan, m, wide, few) for m in AUTO_RANGES),
            key=Built.worst_output,
        )
        # Few samples show which ranges are better; what biases lack needs more.
        if share and best.correction.shifts:
            before = (best.correction, share)
            best = self._calibrated(plan, best.method, wide, rest, before=before)
        return replace(best, halves=halves)

    def draft(self, chosen: frozenset[str]) -> Built:
        """A model to cut placements out of, near enough to the careful one to compare them.

        Its biases see a few samples. Products are rounded to nearest: they may yet be smoothed,
        which changes what is to be rounded.
        """
        plan, method = make_plan(self.network, chosen), self._options.ranges
        nodes = self.network.nodes
        known = {
            name: covariance
            for name, covariance in self._measured.covariances.items()
            if nodes[name].op_type == "Conv"
        }
        best = RangeMethod.NORM if method is RangeMethod.AUTO else method
        return self._calibrated(plan, best, frozenset(), few_samples(self._ctx, self.macs), known)

    def _calibrated(
        self,
        plan: Plan,
        method: RangeMethod,
        wide: frozenset[str],
        ctx: PassContext,
        known: Mapping[str, FloatArray] | None = None,
        before: tuple[Correction, float] | None = None,
    ) -> Built:
        """The model with one way of choosing ranges, biases corrected on the data of ``ctx``.

        Args:
            plan: The placement.
            method: The way.
            wide: Nodes with 16-bit activations.
            ctx: The job with the samples to take.
            known: Covariances to round weights with; all that are measured when None.
            before: What other samples showed of the same network, and the share of all that these
                are.
        """
        known = self._measured.covariances if known is None else known
        groups = make_groups(self.network, plan, self._measured.ranges)
        affines = choose_affines(self._measured, groups, self._grid, method)
        wides = range_affines(groups, wide_grid(self._grid))
        affines |= {point: wides[point] for point in wide_points(self.network, plan, wide)}
        layers = self._layers(plan, affines, known)
        quantized = self.write(plan, affines, layers)
        corrected = self._corrected(self._weighted(plan))
        correction = correct_biases(ctx, self.model, quantized, corrected)
        if before is not None:
            correction = before[0].joined(correction, before[1])
        layers |= {name: layers[name].shifted(shift) for name, shift in correction.shifts.items()}
        return Built(plan, affines, layers, correction, method)

    def quick_sqnr_db(self, chosen: frozenset[str]) -> float:
        """SQNR of the worst output, or its logits, with whole ranges."""
        plan = make_plan(self.network, chosen)
        affines = range_affines(make_groups(self.network, plan, self._measured.ranges), self._grid)
        layers = self._layers(plan, affines, self._measured.covariances)
        quantized = self.write(plan, affines, layers)
        return correct_biases(self._ctx, self.model, quantized, {}).rank_db

    def _weighted(self, plan: Plan) -> dict[str, ir.Node]:
        return {
            name: self.network.nodes[name]
            for name in plan.nodes
            if self.network.rule(name).kind is Kind.WEIGHTED
        }

    def _corrected(self, weighted: Mapping[str, ir.Node]) -> dict[str, int]:
        """Nodes whose bias is to be corrected, with the axis of their output's channels."""
        convolutions = any(node.op_type.startswith("Conv") for node in weighted.values())
        wanted = {
            BiasCorrection.ON: True,
            BiasCorrection.OFF: False,
            BiasCorrection.AUTO: convolutions,
        }[self._options.bias_correction]
        return {
            name: 1
            for name, node in weighted.items()
            if wanted and node.op_type != "MatMul" and node.outputs[0].shape is not None
        }

    def kit(self, built: Built, chosen: frozenset[str], reference: Reference) -> Kit:
        """What versions of ``built`` are made from.

        Args:
            built: The model with all of ``chosen`` on integers.
            chosen: Nodes on integers.
            reference: Samples, and what the original makes of them.
        """
        groups = make_groups(self.network, built.plan, self._measured.ranges)
        return Kit(
            chosen=chosen,
            plan=built.plan,
            affines=built.affines,
            wides=range_affines(groups, wide_grid(self._grid)),
            layers=built.layers,
            weight_grid=self._weight_grid,
            per_channel=self._options.per_channel,
            symmetric=self.network.symmetric,
            tied=self.network.tied,
            on_cpu=self._on_cpu,
            settings=replace(self._ctx.session, threads=1),
            reference=reference,
        )

    def model_of(self, built: Built) -> ir.Model:
        """A copy of the float model with everything of ``built`` written into it."""
        copy = model_io.clone(self.model)
        self.finish(copy, built)
        return copy

    def finish(self, model: ir.Model, built: Built) -> tuple[str, ...]:
        """Write ``built`` into ``model``, an equal copy of the float model, in the format wanted.

        Returns:
            Integer nodes that keep Q/DQ pairs although operators on integers were wanted.
        """
        self.write_into(model, built.plan, built.affines, built.layers)
        store_half(model, built.halves)
        if self._options.format is Format.QOPERATOR:
            return write_operators(model, built.plan.nodes)
        return ()

    def part_of(self, built: Built, chosen: frozenset[str]) -> ir.Model:
        """The model with some of the nodes of ``built`` on integers, none for the float model."""
        plan = make_plan(self.network, chosen)
        layers = {name: built.layers[name] for name in plan.nodes if name in built.layers}
        affines = {point: built.affines[point] for point in plan.points}
        model = self.write(plan, affines, layers).model
        store_half(model, built.halves)
        return model

    def check_nodes(self, built: Built) -> dict[str, float]:
        """SQNR in dB of each node's own output, its inputs being right."""
        quantized = self.write(built.plan, built.affines, built.layers)
        points = set(built.plan.points)
        results: dict[str, str] = {}
        for name in built.plan.nodes:
            node = self.network.nodes[name]
            point = self.network.result(node).name or ""
            if self.network.rule(name).kind is not Kind.MOVING:
                results[name] = point if point in points else node.outputs[0].name or ""
        results = {n: v for n, v in results.items() if v not in points or v in quantized.reals}
        few = few_samples(self._ctx, self.macs)
        return local_sqnr_db(few, self.model, quantized, results)

    def write(
        self, plan: Plan, affines: Mapping[str, Affine], layers: Mapping[str, Layer]
    ) -> Quantized:
        """A copy of the float model with the plan written into it."""
        copy = model_io.clone(self.model)
        return Quantized(copy, self.write_into(copy, plan, affines, layers))

    def write_into(
        self,
        model: ir.Model,
        plan: Plan,
        affines: Mapping[str, Affine],
        layers: Mapping[str, Layer],
    ) -> dict[str, str]:
        """Write the plan into ``model``, an equal copy of the float model; see :func:`insert`."""
        return insert(model, plan, affines, layers, on_cpu=self._on_cpu)

    def _layers(
        self,
        plan: Plan,
        affines: Mapping[str, Affine],
        known: Mapping[str, FloatArray],
    ) -> dict[str, Layer]:
        """The integer weights; rounding with error feedback is done once per node and scale."""
        made = {}
        for name, node in self._weighted(plan).items():
            made[name] = make_layer(
                node,
                affines[data_inputs(node)[0].name or ""],
                self._weight_grid,
                per_channel=self._options.per_channel,
                covariance=known.get(name),
                before=self._rounded.get(name),
                adaptive=self._options.weights is Rounding.ADAPTIVE,
            )
            if made[name].feedback:
                self._rounded[name] = made[name]
        return made
