"""The weight-only quantization pass."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.errors import PassError
from onnxcompress.graph.constants import constant_of
from onnxcompress.numerics import signs
from onnxcompress.numerics.blockwise import fitted
from onnxcompress.passes._layout import Float32
from onnxcompress.passes.base import Change, PassOptions, PassReport, Skip, Stage
from onnxcompress.passes.weight_only.emit import Emitter
from onnxcompress.passes.weight_only.feedback import Feedback, Stored, batches
from onnxcompress.passes.weight_only.options import Rounding, WeightOnlyOptions
from onnxcompress.passes.weight_only.select import (
    INT4_OPSET,
    Form,
    Selection,
    Weight,
    needs_newer,
    select,
)


class WeightOnlyPass:
    """Store weights in few bits and compute in float."""

    name: ClassVar[str] = "weights"
    summary: ClassVar[str] = "store weights in 8, 4, 2 or 1 bits, compute in float"
    stage: ClassVar[Stage] = Stage.PRECISION
    options_type: ClassVar[type[PassOptions]] = WeightOnlyOptions
    needs: frozenset[Statistic] = frozenset()

    def __init__(self, options: WeightOnlyOptions | None = None) -> None:
        self.options = options or WeightOnlyOptions()
        if self.options.rounding is Rounding.GPTQ:
            self.needs = frozenset({Statistic.MOMENTS})

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say which weights would be stored how, without rounding any."""
        del ctx
        selection, notes = self._selected(model.clone())
        return self._report(selection, notes, {})

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Quantize in place; without calibration one weight at a time is expanded in memory."""
        selection, notes = self._selected(model)
        tally = _Tally()
        prepared: dict[str, Stored] = {}
        if self.options.rounding is Rounding.GPTQ:
            prepared = self._with_feedback(model, selection, ctx, tally)
        emitter = Emitter(model, self.options)
        with ctx.progress.task("quantizing weights", total=len(selection.weights)) as task:
            for weight in selection.weights:
                matrix = _matrix(weight)
                blocks = prepared.pop(weight.name, None) or self._fitted(weight, matrix)
                tally.add(matrix, blocks)
                emitter.write(weight, blocks)
                task.advance()
        return self._report(selection, notes, tally.figures(self.options))

    def _fitted(self, weight: Weight, matrix: Float32) -> Stored:
        options = self.options
        if options.levels is not None:
            return signs.fitted(matrix, levels=options.levels, block=weight.block)
        return fitted(
            matrix,
            bits=options.bits,
            block=weight.block,
            symmetric=options.symmetric,
            # QuantizeLinear and its inverse are defined for positive scales.
            negative=weight.form is not Form.DEQUANTIZE,
        )

    def _with_feedback(
        self, model: ir.Model, selection: Selection, ctx: PassContext, tally: _Tally
    ) -> dict[str, Stored]:
        """Codes of the weights whose inputs could be measured, by name."""
        prepared: dict[str, Stored] = {}
        for group in batches(selection.weights, model):
            feedback = Feedback(model, group, ctx)
            for fed in group:
                if fed.requests:
                    matrix = _matrix(fed.weight)
                    start = self._fitted(fed.weight, matrix)
                    prepared[fed.weight.name] = feedback.improve(fed, matrix, start)
                    tally.fed += 1
        return prepared

    def _report(
        self, selection: Selection, notes: tuple[str, ...], figures: dict[str, float | int | str]
    ) -> PassReport:
        options = self.options
        changes, before, after = [], 0, 0
        for weight in selection.weights:
            old, new = 4 * math.prod(weight.layout.shape), weight.stored_bytes(options)
            before, after = before + old, after + new
            scales = f"blocks of {weight.block}" if weight.blocks > 1 else "one scale per channel"
            changes.append(
                Change(
                    weight.name,
                    "",
                    f"stored {options.words}, {scales}, as {weight.form.value} "
                    f"({old} to {new} bytes)",
                    old - new,
                )
            )
        if options.levels is not None and selection.weights:
            notes = (*notes, options.warning)
        sizes = {"weight_bytes_before": before, "weight_bytes_after": after}
        return PassReport(tuple(changes), selection.skips, {**sizes, **figures}, notes)

    def _selected(self, model: ir.Model) -> tuple[Selection, tuple[str, ...]]:
        """Choose weights; raises the opset where a form needs it and it can be raised."""
        selection = select(model, self.options)
        notes: tuple[str, ...] = ()
        if (model.opset_imports.get("") or 0) >= INT4_OPSET:
            return selection, notes
        if any(needs_newer(weight, self.options) for weight in selection.weights):
            notes = model_io.normalize(model, min_opset=INT4_OPSET)
            selection = select(model, self.options)
        opset = model.opset_imports.get("") or 0
        if opset >= INT4_OPSET:
            return selection, notes
        late = [w for w in selection.weights if needs_newer(w, self.options)]
        skips = tuple(
            Skip(w.name, "", f"{w.form.value} needs opset {INT4_OPSET}, the model has {opset}")
            for w in late
        )
        kept = tuple(w for w in selection.weights if w not in late)
        return dataclasses.replace(selection, weights=kept, skips=selection.skips + skips), notes


@dataclass(slots=True)
class _Tally:
    """Sums over the weights quantized so far."""

    signal: float = 0.0
    noise: float = 0.0
    fed: int = 0

    def add(self, matrix: Float32, blocks: Stored) -> None:
        """Count the squares of a weight and of its rounding error."""
        self.signal += float(np.square(matrix, dtype=np.float64).sum())
        self.noise += float(np.square(matrix - blocks.dequantized(), dtype=np.float64).sum())

    def figures(self, options: WeightOnlyOptions) -> dict[str, float | int | str]:
        """Figures for the report."""
        found: dict[str, float | int | str] = {}
        if self.signal > 0 and self.noise > 0:
            found["weight_sqnr_db"] = round(10 * math.log10(self.signal / self.noise), 2)
        if options.rounding is Rounding.GPTQ:
            found["rounded_with_feedback"] = self.fed
        return found


def _matrix(weight: Weight) -> Float32:
    array = constant_of(weight.value)
    if array is None:
        raise PassError("weights", f"initializer '{weight.name}' has no data")
    return np.ascontiguousarray(weight.layout.matrix(array), dtype=np.float32)
