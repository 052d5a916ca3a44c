"""Thin out weights: choose which become zero, and let the others make up for them.

Layers share one budget: every weight gets a score in units of its layer's output energy, and the
best of the whole model stay, but at least a few of each layer. See
:mod:`onnxcompress.numerics.sparsity` for masks and recovery.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.errors import UsageError
from onnxcompress.numerics import sparsity
from onnxcompress.numerics.sparsity import NofM
from onnxcompress.passes._layers import Layer, measured
from onnxcompress.passes.base import Change, PassReport, Stage
from onnxcompress.passes.sparse.layers import choose, scores
from onnxcompress.passes.sparse.options import Importance, Scope, SparseOptions, Store

Float64 = npt.NDArray[np.float64]

_FLOOR = 0.5
"""Of the share that it would keep by itself, a layer keeps this at least in a common budget."""


class SparsePass:
    """Sets weights to zero and refits the others.

    Args:
        options: What to keep; half of the weights when None.
    """

    name: ClassVar[str] = "sparse"
    summary: ClassVar[str] = "set weights to zero (by density or N:M) and refit the others"
    stage: ClassVar[Stage] = Stage.RECOVER
    options_type: ClassVar[type[SparseOptions]] = SparseOptions
    needs: frozenset[Statistic] = frozenset({Statistic.MOMENTS})

    def __init__(self, options: SparseOptions | None = None) -> None:
        self.options = options or SparseOptions()
        self.options.validate(self.name)
        self._pattern = self.options.n_of_m()
        if not self._uses_data:
            self.needs = frozenset()

    @property
    def completed_by(self) -> str | None:
        """The pass that stores zeros in less, behind all that still change weights."""
        return None if self.options.store is Store.DENSE else "pack"

    @property
    def _uses_data(self) -> bool:
        ranked = self.options.importance not in (Importance.MAGNITUDE, Importance.RANDOM)
        return self.options.recover or ranked

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say which weights would be thinned out.

        Raises:
            UsageError: If a pattern matches no weight.
        """
        del ctx
        chosen = choose(model, self.options)
        wanted = self._pattern or f"{self.options.density:.0%}"
        changes = [
            Change(layer.name, "", f"{wanted} of {layer.value.const_value.size} weights may stay")
            for layer in chosen.weights
            if layer.value.const_value is not None
        ]
        return PassReport(tuple(changes), chosen.skips)

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Thin out the weights of ``model`` in place.

        Raises:
            DataError: If the options need calibration data and there are none.
            UsageError: If a pattern matches no weight.
        """
        options = self.options
        chosen = choose(model, options)
        if options.importance in (Importance.OBS, Importance.ACTIVATION) and not ctx.calibration:
            raise UsageError(
                f"sparse.importance={options.importance.value} needs calibration data",
                hint="Give --calib, or use sparse.importance=magnitude.",
            )
        layers = chosen.weights
        if not self._uses_data or ctx.calibration is None:
            layers = tuple(Layer(i.value, i.graph, i.layout, ()) for i in layers)
        keep = self._budgets(model, layers, ctx)
        changes, kept, total, unmeasured = [], 0, 0, 0
        with ctx.progress.task("thinning out", total=len(layers)) as task:
            for layer, moments in measured(model, layers, ctx):
                weight = layer.matrix()
                made = self._thinned(layer, weight, moments, keep.get(layer.name), ctx.seed)
                layer.store(made)
                left = int(np.count_nonzero(made))
                kept, total, unmeasured = (
                    kept + left,
                    total + made.size,
                    unmeasured + (moments is None),
                )
                changes.append(Change(layer.name, "", f"{left} of {made.size} weights left"))
                task.advance()
        figures: dict[str, float | int | str] = {}
        if total:
            figures = {"density_ratio": round(kept / total, 4), "weights_zeroed": total - kept}
        notes: list[str] = []
        if unmeasured and options.recover:
            notes.append(
                f"{unmeasured} of {len(layers)} weights were thinned out by magnitude without "
                "recovery: their inputs could not be measured."
            )
        return PassReport(tuple(changes), chosen.skips, figures, tuple(notes))

    def _importance(self, moments: Float64 | None) -> Importance:
        importance = self.options.importance
        if importance is not Importance.AUTO:
            return importance
        return Importance.MAGNITUDE if moments is None else Importance.OBS

    def _budgets(
        self, model: ir.Model, layers: tuple[Layer, ...], ctx: PassContext
    ) -> dict[str, int]:
        """How many weights each layer keeps; empty where a pattern decides."""
        if self._pattern is not None:
            return {}
        density = self.options.density
        sizes = {layer.name: layer.layout.row_count * layer.layout.columns for layer in layers}
        if self.options.scope is Scope.LAYER or len(layers) < 2:
            return {name: max(round(density * size), 1) for name, size in sizes.items()}
        found: dict[str, Float64] = {}
        for layer, moments in measured(model, layers, ctx):
            worth = scores(
                layer, layer.matrix(), moments, self._importance(moments), ctx.seed
            ).ravel()
            found[layer.name] = np.sort(worth)[::-1]
        floors = {name: round(_FLOOR * density * size) for name, size in sizes.items()}
        spare = round(density * sum(sizes.values())) - sum(floors.values())
        rest = np.concatenate([found[name][floors[name] :] for name in found])
        if spare <= 0 or not rest.size:
            return {name: max(floor, 1) for name, floor in floors.items()}
        threshold = np.partition(rest, max(len(rest) - spare, 0))[max(len(rest) - spare, 0)]
        return {
            name: max(floors[name] + int((found[name][floors[name] :] >= threshold).sum()), 1)
            for name in found
        }

    def _thinned(
        self, layer: Layer, weight: Float64, moments: Float64 | None, keep: int | None, seed: int
    ) -> Float64:
        """The weight with zeros, refitted where its inputs are known."""
        importance = self._importance(moments)
        order = layer.neighbours() if self._pattern else np.arange(weight.shape[1])
        back = np.argsort(order)
        ranked = scores(layer, weight, moments, importance, seed)
        pattern: int | NofM = self._pattern or (weight.size if keep is None else keep)
        mask = sparsity.best_mask(ranked[:, order], pattern)[:, back]
        if moments is None or not self.options.recover:
            return np.where(mask, weight, 0.0)
        rows = len(weight) // len(moments)
        parts = []
        for group, matrix in enumerate(moments):
            own = slice(group * rows, (group + 1) * rows)
            turned = matrix[np.ix_(order, order)]
            if importance is Importance.OBS:
                share = self._pattern or int(mask[own].sum())
                part = sparsity.sparsify(weight[own][:, order], turned, share)
            else:
                part = sparsity.refit(weight[own][:, order], turned, mask[own][:, order])
            parts.append(part[:, back])
        return np.concatenate(parts)
