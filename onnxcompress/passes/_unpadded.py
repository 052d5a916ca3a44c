"""The job of a pass with samples cut to what counts of them."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnxcompress.calibration.padding import without_padding
from onnxcompress.context import PassContext
from onnxcompress.runtime import open_session

NOTE = "Statistics leave out the padding that a mask input marks."


def unpadded(model: ir.Model, ctx: PassContext) -> PassContext:
    """``ctx`` itself where no input is a mask: rows of padding tell nothing about a layer."""
    if ctx.calibration is None:
        return ctx
    cut = without_padding(
        ctx.calibration, lambda: open_session(model, ctx.session, work_dir=ctx.work_dir).run
    )
    return ctx if cut is None else dataclasses.replace(ctx, calibration=cut)
