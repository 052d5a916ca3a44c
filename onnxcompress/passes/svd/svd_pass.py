"""The factorization pass: measure, allocate ranks, write chains, refit them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.graph.cost import ModelCost, cost_of
from onnxcompress.passes._unpadded import NOTE, unpadded
from onnxcompress.passes.base import Change, PassReport, Stage
from onnxcompress.passes.svd.allowance import Factorized, limit_of
from onnxcompress.passes.svd.emit import Writer, Written
from onnxcompress.passes.svd.options import SvdOptions
from onnxcompress.passes.svd.planning import Plan, Planner
from onnxcompress.passes.svd.recover import Refit, recover


class SvdPass:
    """Splits layers into chains of smaller ones under one budget for the whole model.

    Args:
        options: What to split and how far; the defaults when None.
    """

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = (
        "Split layers into two or three of low rank, chosen by the inputs they see, and refit them."
    )
    stage: ClassVar[Stage] = Stage.FACTORIZE
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.MOMENTS, Statistic.CROSS_MOMENTS})
    options_type: ClassVar[type[SvdOptions]] = SvdOptions

    def __init__(self, options: SvdOptions | None = None) -> None:
        self._options = SvdOptions() if options is None else options
        self._options.validate(self.name)

    @property
    def options(self) -> SvdOptions:
        """The options this pass was made with."""
        return self._options

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say which layers could be split, and which can not and why."""
        planner = Planner(model, self._options, dataclasses.replace(ctx, calibration=None))
        found = planner.possible()
        changes = tuple(
            Change(site.node, site.op_type, f"can become a chain ({site.kind.value}), {least}")
            for site, least in found
        )
        return PassReport(
            changes=changes,
            skips=planner.skips(),
            figures={"layers": len(changes)},
            notes=() if changes else (_NOTHING,),
        )

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Factorize ``model`` in place.

        Raises:
            UsageError: If a name pattern matches nothing.
            PassError: If the budget that was asked for cannot be reached.
        """
        options, limited, notes = self._with_data(ctx)
        ctx = unpadded(model, limited) if options.whiten or options.recover else limited
        notes += [NOTE] if ctx is not limited else []
        reference = model_io.clone(model)
        planner = Planner(reference, options, ctx)
        before = cost_of(model)
        limit = None if options.asks_for_budget or not options.budget else limit_of(reference, ctx)
        plan = planner.plan(None if limit is None else limit.allowed)
        notes.extend(plan.notes)
        if options.for_latency and plan.entries and not self._is_faster(model, planner, plan):
            plan = dataclasses.replace(plan, entries=())
            notes.append(
                "Nothing was factorized: the model as a whole would not get faster. Set "
                "svd.objective=size to factorize all the same."
            )
        done = _factorized(reference, plan, options, ctx)
        if limit is not None and done.written:
            done, note = limit.kept_to(
                done, planner, lambda p: _factorized(reference, p, options, ctx)
            )
            notes.append(note)
        elif limit is not None and not options.for_latency:
            notes.append(limit.nothing)
        model.graph = done.model.graph
        notes.extend(_row_notes(done.refits))
        return PassReport(
            changes=(*_changes(done.plan), *_refit_changes(done.refits)),
            skips=(*planner.skips(), *done.plan.skips),
            figures={**_figures(before, cost_of(model)), "layers_factorized": len(done.written)},
            notes=tuple(notes),
        )

    def _with_data(self, ctx: PassContext) -> tuple[SvdOptions, PassContext, list[str]]:
        """Options and job as the data allow them, and what to say about it."""
        options, data = self._options, ctx.calibration
        if data is None:
            changed = dataclasses.replace(options, whiten=False, recover=False)
            return (
                changed,
                ctx,
                [
                    "No calibration data: layers were cut to the largest singular values of their "
                    "weights and nothing was refitted; expect a large loss."
                ],
            )
        notes = []
        if data.synthetic and (options.whiten or options.recover):
            notes.append(
                "The calibration samples are invented: ranks and recovery follow them, not your "
                "data. Give --calib."
            )
        return options, ctx.at_most(options.samples), notes

    @staticmethod
    def _is_faster(model: ir.Model, planner: Planner, plan: Plan) -> bool:
        """Whether the whole model gets faster; times do not depend on values."""
        variant = model_io.clone(model)
        _write(variant, plan)
        return planner.faster(variant)


_FEW_ROWS = 10
"""Rows per unfolded input below which a regression overfits."""
_NOTHING = "Nothing can be factorized: see the reasons of what was left alone."


def _factorized(
    reference: ir.Model, plan: Plan, options: SvdOptions, ctx: PassContext
) -> Factorized:
    """A copy of a model with its layers replaced and refitted."""
    model = model_io.clone(reference)
    written = _write(model, plan)
    refits: Sequence[Refit] = ()
    if options.recover and written:
        refits = recover(model, reference, written, plan.metrics, options, ctx)
    return Factorized(model, plan, written, refits)


def _write(model: ir.Model, plan: Plan) -> list[Written]:
    writer = Writer(model)
    return [writer.write(e.site, e.chains, e.bias) for e in plan.entries]


def _changes(plan: Plan) -> list[Change]:
    changes = []
    for entry in plan.entries:
        site, candidate = entry.site, entry.candidate
        changes.append(
            Change(
                site.node,
                site.op_type,
                f"split in {candidate} ({site.parameters} to {candidate.cost.parameters} weights, "
                f"predicted loss {entry.loss:.2g})",
            )
        )
    return changes


def _refit_changes(refits: Sequence[Refit]) -> list[Change]:
    changes = []
    for refit in refits:
        if refit.ridge is None:
            continue
        what = "cut again for the inputs as they are now"
        if np.isfinite(refit.ridge):
            what = f"refitted to the original's output (ridge {refit.ridge:g})"
        elif refit.whole:
            what = "bias corrected"
        changes.append(Change(refit.node, refit.op_type, what))
    return changes


def _row_notes(refits: Sequence[Refit]) -> list[str]:
    few = [r for r in refits if r.rows_per_column < _FEW_ROWS]
    if not few:
        return []
    worst = min(few, key=lambda r: r.rows_per_column)
    return [
        f"{len(few)} layer{'s were' if len(few) > 1 else ' was'} refitted from fewer than "
        f"{_FEW_ROWS} rows per input (least: {worst.rows_per_column:.1f} at '{worst.node}'); more "
        "samples would help."
    ]


def _figures(before: ModelCost, after: ModelCost) -> dict[str, float | int | str]:
    return {
        "params_kept_ratio": after.parameters / max(before.parameters, 1),
        "macs_kept_ratio": after.macs / max(before.macs, 1),
        "weight_bytes_kept_ratio": after.weight_bytes / max(before.weight_bytes, 1),
    }
