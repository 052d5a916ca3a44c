"""Half precision: weights, and where the hardware gains by it the arithmetic, in float16.

Two ways, with the same file size:

- *storage*: weights are stored in float16 and a ``Cast`` makes them float32. It depends on a
  constant alone, so onnxruntime computes it at load and the model runs at the speed of float.
- *compute*: nodes take and give float16; ``Cast`` nodes stand at the borders, so that the inputs
  and outputs of the model keep their types. Nodes that cannot run in float16 are *islands* of
  float32. Every value is cast at most once in each direction, and never back and forth.

float16 has 11 significant bits (a relative error of at most 2⁻¹¹), reaches to 65504 and loses
precision below 6.1e-5. A constant ``w`` goes into float16 only if it is finite there, no element of
a small constant becomes 0 (it may be a divisor), and

    |w - half(w)|₂ <= 2⁻¹⁰ |w|₂

An activation has to stay below half of the range over the calibration data.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcompress.calibration.statistics import RangeRequest, Statistic
from onnxcompress.context import PassContext
from onnxcompress.graph.naming import Namer
from onnxcompress.passes.base import PassOptions, PassReport, Stage, option
from onnxcompress.passes.fp16.convert import Converter
from onnxcompress.passes.fp16.slots import FLOAT
from onnxcompress.targets import Target


class Mode(enum.Enum):
    """What is in float16."""

    AUTO = "auto"
    STORAGE = "storage"
    COMPUTE = "compute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp16Options(PassOptions):
    """Options of :class:`Fp16Pass`."""

    mode: Mode = option(
        Mode.AUTO,
        "storage: weights in float16, arithmetic in float32; compute: both in float16; auto: "
        "compute for the target cuda, storage for others",
    )
    min_elements: int = option(
        256, "leave smaller weights in float32 (storage, and float islands)", minimum=1
    )


class Fp16Pass:
    """Store weights in float16, and compute in it on targets that are faster so."""

    name: ClassVar[str] = "fp16"
    summary: ClassVar[str] = "halve the weights: float16 storage, and arithmetic on GPUs"
    stage: ClassVar[Stage] = Stage.PRECISION
    options_type: ClassVar[type[PassOptions]] = Fp16Options
    needs: frozenset[Statistic] = frozenset({Statistic.RANGE})

    def __init__(self, options: Fp16Options | None = None) -> None:
        self.options = options or Fp16Options()
        if self.options.mode is Mode.STORAGE:
            self.needs = frozenset()

    def needs_for(self, target: Target) -> frozenset[Statistic]:
        """What calibration must collect on ``target``: storage alone looks at no activation."""
        return self.needs if self._computes_on(target) else frozenset()

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Convert a copy, which shares the weights, without looking at activations."""
        return self._converted(model.clone(), ctx, ranges=None)

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Convert in place."""
        ranges = None
        if self._computes_on(ctx.target) and ctx.calibration is not None:
            ranges = _ranges(model, ctx)
        return self._converted(model, ctx, ranges)

    def _computes_on(self, target: Target) -> bool:
        mode = self.options.mode
        return mode is Mode.COMPUTE or (mode is Mode.AUTO and target.name in {"cuda", "tensorrt"})

    def _converted(
        self, model: ir.Model, ctx: PassContext, ranges: dict[str, float] | None
    ) -> PassReport:
        converter = Converter(model, Namer(model), self.options.min_elements)
        notes: list[str] = []
        before = _weight_bytes(model)
        if self._computes_on(ctx.target):
            if ranges is None:
                notes.append(
                    "Activations were not checked for overflow, only weights: no calibration data."
                )
            converter.compute(ranges or {})
        converter.store()
        figures = {
            "nodes_in_half": converter.nodes,
            "weight_bytes_before": before,
            "weight_bytes_after": _weight_bytes(model),
            "casts_added": converter.casts,
        }
        return PassReport(
            tuple(converter.changes), tuple(converter.all_skips()), figures, tuple(notes)
        )


def _weight_bytes(model: ir.Model) -> int:
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def _ranges(model: ir.Model, ctx: PassContext) -> dict[str, float]:
    """Largest magnitude of every float32 value that a node of the main graph computes."""
    names = [
        value.name or ""
        for node in model.graph
        for value in node.outputs
        if value.dtype == FLOAT and value.name and (value.uses() or value.is_graph_output())
    ]
    names += [v.name or "" for v in model.graph.inputs if v.dtype == FLOAT]
    requests = {name: RangeRequest(name) for name in names}
    found = ctx.collect(
        model, requests.values(), description="looking for overflow in float16", finite_only=True
    )
    return {
        name: max(-float(found[r].minimum), float(found[r].maximum)) if r in found else math.inf
        for name, r in requests.items()
    }
