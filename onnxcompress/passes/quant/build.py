"""From a choice of nodes to a quantized model: roughly for the clock, carefully for the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io, runtime
from onnxcompress.calibration.statistics import FloatArray
from onnxcompress.context import PassContext
from onnxcompress.numerics.affine import Affine, activation_grid, weight_grid
from onnxcompress.passes.quant.correction import (
    Correction,
    Quantized,
    correct_biases,
    local_sqnr_db,
)
from onnxcompress.passes.quant.insertion import insert
from onnxcompress.passes.quant.kernels import unfused
from onnxcompress.passes.quant.measure import Measured, choose_affines, few_samples, measure
from onnxcompress.passes.quant.operators import Kind, data_inputs
from onnxcompress.passes.quant.options import BiasCorrection, QuantOptions, RangeMethod, Rounding
from onnxcompress.passes.quant.parameters import (
    Layer,
    make_groups,
    make_layer,
    range_affines,
)
from onnxcompress.passes.quant.placement import Network, Plan, make_plan
from onnxcompress.runtime import SessionSettings


@dataclass(frozen=True, slots=True)
class Built:
    """A quantized model and what it was made from.

    Attributes:
        plan: The placement.
        affines: The grid of every point.
        layers: The integer weight of every weighted node.
        correction: What the comparison with the float network showed.
        method: How the ranges were chosen.
    """

    plan: Plan
    affines: Mapping[str, Affine]
    layers: Mapping[str, Layer]
    correction: Correction
    method: RangeMethod

    def worst_output(self) -> float:
        """SQNR in dB of the output that is farthest from float, on the calibration samples."""
        return min(self.correction.output_sqnr_db.values(), default=np.inf)


class Builder:
    """Quantizes one model in different ways; statistics of the float model are measured once.

    Args:
        model: The float model, already prepared; it is not changed.
        options: How to quantize.
        ctx: The job.
    """

    def __init__(self, model: ir.Model, options: QuantOptions, ctx: PassContext) -> None:
        target = ctx.target
        self.model = model
        self.network = Network(model, symmetric=target.symmetric_activations)
        self._options = options
        self._ctx = ctx
        self._grid = activation_grid(
            target.activation_dtype, symmetric=target.symmetric_activations
        )
        self._weight_grid = weight_grid(reduce_range=target.reduce_range)
        # TensorRT reads the Q/DQ pairs themselves; onnxruntime's CPU kernels want the integers.
        self._integer_moves = target.name != "cuda"
        self._measured = Measured()
        self._asked: set[str] = set()
        self._rounded: dict[str, Layer] = {}

    def measure(self, chosen: frozenset[str]) -> None:
        """Measure what the plan for ``chosen`` and all smaller ones can ask for, in one run."""
        nodes = [self.network.nodes[name] for name in chosen]
        moving = list(self.network.of_kind(Kind.MOVING))
        points = dict.fromkeys(
            value.name or ""
            for node in (*nodes, *moving)
            for value in (*data_inputs(node), node.outputs[0], self.network.result(node))
        )
        weighted = {
            node.name or "": node
            for node in nodes
            if self._options.weights is Rounding.GPTQ
            and self.network.rule(node.name or "").kind is Kind.WEIGHTED
        }
        new = {name: node for name, node in weighted.items() if name not in self._asked}
        missing = [point for point in points if point not in self._measured.ranges]
        if missing or new:
            self._asked |= set(new)
            found = measure(self._ctx, self.model, missing, new, self._options)
            self._measured = self._measured.joined(found)

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

    def careful(self, chosen: frozenset[str]) -> Built:
        """The model with the scales, weights and biases that the options ask for."""
        plan = make_plan(self.network, chosen)
        method = self._options.ranges
        if method is RangeMethod.AUTO:
            few = few_samples(self._ctx)
            method = max(
                (RangeMethod.MSE, RangeMethod.MINMAX),
                key=lambda m: self._calibrated(plan, m, few).worst_output(),
            )
        return self._calibrated(plan, method, self._ctx)

    def _calibrated(self, plan: Plan, method: RangeMethod, ctx: PassContext) -> Built:
        """The model with one way of choosing ranges, its biases corrected on the data of ``ctx``."""
        groups = make_groups(self.network, plan, self._measured.ranges)
        affines = choose_affines(self._measured, groups, self._grid, method)
        layers = self._layers(plan, affines, self._measured.covariances)
        quantized = self.write(plan, affines, layers)
        corrected = self._corrected(self._weighted(plan))
        correction = correct_biases(ctx, self.model, quantized, corrected)
        layers |= {name: layers[name].shifted(shift) for name, shift in correction.shifts.items()}
        return Built(plan, affines, layers, correction, method)

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
        return local_sqnr_db(self._ctx, self.model, quantized, results)

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
        return insert(model, plan, affines, layers, integer_moves=self._integer_moves)

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
            )
            if made[name].feedback:
                self._rounded[name] = made[name]
        return made
