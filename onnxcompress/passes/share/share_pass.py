"""The share pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.errors import ModelError
from onnxcompress.passes._packing import NIBBLE_OPSET, bits_for, planes
from onnxcompress.passes._unpadded import NOTE, unpadded
from onnxcompress.passes.base import Change, PassOptions, PassReport, Skip, Stage
from onnxcompress.passes.prune.consumers import Consumer, Layers
from onnxcompress.passes.prune.samples import judging_note, judging_samples
from onnxcompress.passes.share.duplicates import Merged, merge_duplicates
from onnxcompress.passes.share.emit import Emitter, stored_size
from onnxcompress.passes.share.filters import MergedFilters, merge_filters
from onnxcompress.passes.share.fit import Fitted, code_bits, fit_all
from onnxcompress.passes.share.halves import affordable, rest_of, store
from onnxcompress.passes.share.mixing import MEASURED, mixed_bits, mixes
from onnxcompress.passes.share.options import Assign, Codebook, Merge, Packing, ShareOptions
from onnxcompress.passes.share.select import Selection, Weight, select
from onnxcompress.passes.share.sequence import fit_in_steps
from onnxcompress.runtime import optimized_graph

_SAMPLES = 512
"""Calibration samples at most; more gained nothing."""


_SLOWER = {"AveragePool": 19}
"""Operators whose kernel is slower from an opset on: 0.60 ms instead of 0.14 for 13 x 13 pools of
1,000 channels (onnxruntime 1.32), 5 % of the time of SqueezeNet."""


class SharePass:
    """Store duplicates once, and weights as indices into codebooks."""

    name: ClassVar[str] = "share"
    summary: ClassVar[str] = "store equal weights once and weights as codes of a few shared values"
    stage: ClassVar[Stage] = Stage.SHARE
    options_type: ClassVar[type[PassOptions]] = ShareOptions
    needs: frozenset[Statistic] = frozenset()

    def __init__(self, options: ShareOptions | None = None) -> None:
        self.options = options or ShareOptions()
        if self._coding and self.options.assign is Assign.FEEDBACK:
            self.needs = frozenset({Statistic.MOMENTS})

    @property
    def _coding(self) -> bool:
        return self.options.codebook is not Codebook.NONE

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say which constants would be merged and which weights would get a codebook."""
        del ctx
        copy = model.clone()
        filters = self._filters(copy)
        merged = self._merged(copy)
        selection = self._selected(copy)
        changes = tuple(
            Change(
                w.name,
                "",
                f"would become codes of {self.options.bits} bits ({w.nbytes} bytes)",
                w.nbytes - stored_size(w, self.options, code_bits(w, self.options)),
            )
            for w in selection.weights
        )
        return PassReport(
            (*filters.changes, *merged.changes, *changes), (*filters.skips, *selection.skips)
        )

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Share in place."""
        filters = self._filters(model)
        merged = self._merged(model)
        notes = self._raised(model)
        limited = ctx.at_most(_SAMPLES)
        ctx = unpadded(model, limited) if self.needs else limited
        notes += (NOTE,) if ctx is not limited else ()
        selection = self._selected(model)
        layers = {}
        if self.options.bias and self.options.assign is Assign.FEEDBACK:
            layers = _with_bias(model, selection.weights)
        bits = {w.name: code_bits(w, self.options) for w in selection.weights}
        if mixes(self.options, ctx):
            count = len(selection.weights)
            if ctx.calibration is not None:
                samples = judging_samples(model, ctx.calibration, MEASURED, count)
                notes += judging_note("Errors of codes", samples, MEASURED)
            bits = mixed_bits(model, selection.weights, layers, self.options, ctx)
            selection = _coded(selection, bits)
        original = model.clone()
        fitted = self._fitted(model, selection, layers, bits, ctx)
        rest = rest_of(model, self.options, fitted) if self.options.halves else ()
        whole_bytes = self.options.packing is Packing.BYTES
        emitter = Emitter(model, whole_bytes=whole_bytes)
        for one in fitted:
            emitter.write(one)
        changes, names = _changes(fitted, self.options), emitter.names
        rest = affordable(model, original, rest, fitted, self.options, ctx)
        halved, added = store(model, rest)
        changes, names = [*changes, *halved], [*names, *added]
        notes += _folded(model, names, ctx)
        return PassReport(
            changes=(*filters.changes, *merged.changes, *changes),
            skips=(*filters.skips, *selection.skips),
            figures={
                **({} if self.options.filters is None else {"filters_merged": filters.count}),
                "duplicates_merged": len(merged.changes),
                "duplicate_bytes_saved": merged.saved_bytes,
                "codebooks": len(fitted),
                "assigned_with_feedback": sum(one.fed for one in fitted),
                "biases_corrected": sum(one.shift is not None for one in fitted),
                "weight_bytes_before": sum(one.weight.nbytes for one in fitted),
                "weight_bytes_after": sum(
                    stored_size(o.weight, self.options, bits_for(o.level_count)) for o in fitted
                ),
            },
            notes=notes,
        )

    def _fitted(
        self,
        model: ir.Model,
        selection: Selection,
        layers: Mapping[str, Consumer],
        bits: Mapping[str, int],
        ctx: PassContext,
    ) -> list[Fitted]:
        done: dict[str, Fitted] = {}
        if self.options.steps > 1 and layers:
            done = fit_in_steps(model, selection.weights, layers, self.options, ctx, bits)
        rest = [w for w in selection.weights if w.name not in done]
        found = list(fit_all(model, rest, self.options, ctx, frozenset(layers), bits=bits))
        for one in found:
            if one.shift is not None:
                layer = layers[one.weight.name]
                layer.write_bias(model, layer.bias_vector(model) + one.shift * layer.gain)
        return [*done.values(), *found]

    def _filters(self, model: ir.Model) -> MergedFilters:
        if self.options.filters is None:
            return MergedFilters((), (), 0)
        return merge_filters(model, self.options.filters)

    def _merged(self, model: ir.Model) -> Merged:
        if self.options.merge is Merge.NONE:
            return Merged((), 0)
        return merge_duplicates(model, scaled=self.options.merge is Merge.SCALED)

    def _selected(self, model: ir.Model) -> Selection:
        """The weights that codebooks make smaller."""
        if not self._coding:
            return Selection((), ())
        selection = select(model, self.options)
        kept, skips = [], list(selection.skips)
        for weight in selection.weights:
            size = stored_size(weight, self.options, code_bits(weight, self.options))
            if size < weight.nbytes:
                kept.append(weight)
            else:
                reason = f"codes and codebook would take {size} bytes instead of {weight.nbytes}"
                skips.append(Skip(weight.name, "", reason))
        return Selection(tuple(kept), tuple(skips))

    def _raised(self, model: ir.Model) -> tuple[str, ...]:
        """Raise the opset where that gives 4-bit tensors, which load faster than packed bytes."""
        opset = model.opset_imports.get("") or 0
        wanted = planes(self.options.bits, whole_bytes=self.options.packing is Packing.BYTES)
        halves = any(p.width == 4 for p in wanted)
        if not self._coding or opset >= NIBBLE_OPSET or not halves:
            return ()
        slower = _slower_when_raised(model, opset)
        if slower is not None:
            return (
                f"The opset stays {opset} and 4-bit codes lie in bytes, two in each: the {slower} "
                f"of onnxruntime takes several times as long from opset {_SLOWER[slower]} on.",
            )
        return model_io.normalize(model, min_opset=NIBBLE_OPSET)


def _slower_when_raised(model: ir.Model, opset: int) -> str | None:
    """An operator that would run slower at the opset with 4-bit tensors."""
    types = {node.op_type for node in model.graph.all_nodes() if node.domain in {"", "ai.onnx"}}
    found = (t for t, first in _SLOWER.items() if t in types and opset < first <= NIBBLE_OPSET)
    return next(found, None)


def _with_bias(model: ir.Model, weights: Sequence[Weight]) -> dict[str, Consumer]:
    """The layer of each weight whose mean error a bias can take up, by name of the weight."""
    own = {w.name for w in weights if w.scale is None and len(w.requests) == 1}
    return {
        layer.weight: layer
        for layer in Layers.of(model).consumers.values()
        if layer.weight in own and layer.bias is not None and not layer.shared
    }


def _coded(selection: Selection, bits: Mapping[str, int]) -> Selection:
    """Leave out the integers that keep all their bits."""
    kept, skips = [], list(selection.skips)
    for weight in selection.weights:
        if weight.scale is None or bits[weight.name] < 8:
            kept.append(weight)
            continue
        reason = "it keeps its 8 bits: with fewer its errors would hurt the model's outputs most"
        skips.append(Skip(weight.name, "", reason))
    return Selection(tuple(kept), tuple(skips))


def _changes(fitted: Sequence[Fitted], options: ShareOptions) -> list[Change]:
    changes = []
    for one in fitted:
        count, weight = one.level_count, one.weight
        size = stored_size(weight, options, bits_for(count))
        how = "error feedback" if one.fed else "nearest value"
        scales = ", one scale per channel" if one.scale is not None else ""
        changes.append(
            Change(
                weight.name,
                "",
                f"stored as codes of {bits_for(count)} bits for {count} values{scales} "
                f"({weight.nbytes} to {size} bytes, {how}, {one.sqnr_db:.1f} dB)",
            )
        )
    return changes


def _folded(model: ir.Model, names: Sequence[str], ctx: PassContext) -> tuple[str, ...]:
    """Check on the graph that onnxruntime executes that codebooks cost nothing after load."""
    if not names:
        return ()
    try:
        executed = optimized_graph(model, ctx.session, ctx.work_dir)
    except ModelError as error:
        return (f"Whether codebooks are expanded at load could not be checked: {error.message}.",)
    left = {node.name or "" for node in executed.graph.all_nodes()} & set(names)
    if left:
        return (
            f"onnxruntime does not compute {len(left)} nodes of codebooks at load "
            f"({sorted(left)[0]}): they will run each time.",
        )
    return (
        "Codebooks are expanded when a session is made: loading takes longer and more memory, "
        "running does not.",
    )
