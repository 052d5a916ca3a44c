"""What a mix of precisions must keep, and against what that is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxcompress.context import PassContext
from onnxcompress.errors import DataError
from onnxcompress.graph.cost import cost_of
from onnxcompress.runtime import Session, SessionSettings, open_session
from onnxcompress.search.goals import Goals
from onnxcompress.search.reference import Reference, make_reference
from onnxcompress.verification.gates import Gates

_SAMPLES = 512
_LEAST_SAMPLES = 32
_MACS = 2e11
"""Most multiply-accumulates for one look at the goals: about ten seconds on one core."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What to keep.

    Attributes:
        goals: The user's limits and the floor.
        reference: Samples, and what they are measured against.
        settings: How to run versions: one thread, so that results do not depend on the machine's
            cores.
        notes: Remarks for the report.
    """

    goals: Goals
    reference: Reference
    settings: SessionSettings
    notes: tuple[str, ...] = ()


def find_aim(model: ir.Model, ctx: PassContext, floor_db: float) -> Aim:
    """The user's limits, counted from the original file, and the floor.

    Where the model that the pass was given misses the limits already, no precision can help: they
    are left out, and the floor counts from that model alone.

    Args:
        model: The float model that the pass was given.
        ctx: The job.
        floor_db: Least SQNR of every output in any case.

    Raises:
        DataError: If the job has no calibration data.
    """
    settings = replace(ctx.session, threads=1)
    ours = open_session(model, settings, work_dir=ctx.work_dir)
    macs = max(cost_of(model).macs, 1)
    floor = Goals(Gates(), floor_db)
    if ctx.goals.are_default:
        return Aim(floor, _reference(ours, ctx, macs), settings)
    goals = Goals(ctx.goals, floor_db)
    original = ours if ctx.original is None else open_session(ctx.original, settings)
    reference = _reference(original, ctx, macs)
    notes: list[str] = []
    missed = goals.missed(reference.compare(ours))
    if missed:
        note = (
            f"The limits are missed before any node is quantized ({missed[0]}), so they decide "
            "nothing here."
        )
        return Aim(floor, _reference(ours, ctx, macs), settings, (note,))
    if ctx.goals.max_drop is not None and not reference.labelled:
        notes.append(
            "The calibration samples have no labels: at most the share of top classes that may be "
            "lost may change."
        )
    return Aim(goals, reference, settings, tuple(notes))


def _reference(session: Session, ctx: PassContext, macs: int) -> Reference:
    if ctx.calibration is None:
        raise DataError(
            "this needs calibration data and the job has none",
            hint="Give --calib, or put NAME.calib.npz beside NAME.onnx.",
        )
    samples = max(_LEAST_SAMPLES, min(_SAMPLES, int(_MACS / macs)))
    return make_reference(session, ctx.calibration, samples=samples, batch_size=ctx.batch_size)
