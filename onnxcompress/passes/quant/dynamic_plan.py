"""Which nodes have a dynamic form, before anything is measured, and whether there are kernels."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.context import PassContext
from onnxcompress.passes.base import Change, PassReport, Skip
from onnxcompress.passes.quant.constant_chains import fold_weight_chains
from onnxcompress.passes.quant.dynamic_rules import RULES, Form
from onnxcompress.passes.quant.dynamic_search import find_items

Refuse = Callable[[ir.Node], str | None]
"""Gives a reason to leave a node alone, or None."""


def plan_dynamic(
    model: ir.Model, ctx: PassContext, refuse: Refuse, static: PassReport | None = None
) -> PassReport:
    """Say which nodes have a dynamic form, beside those of a static plan.

    Args:
        model: The model; it is not changed.
        ctx: The job.
        refuse: Gives a reason to leave a node alone, or None.
        static: What static quantization would do.
    """
    if not supported(ctx):
        return static or unsupported(model, ctx)
    probe = model_io.clone(model)
    fold_weight_chains(probe)
    items, reasons = find_items(probe, refuse, convolutions=static is None)
    planned = () if static is None else static.changes
    taken = {change.node for change in planned}
    dynamic = tuple(
        Change(item.name, item.op_type, f"may become {form.value}", 3 * item.elements)
        for item in items
        for form in [item.forms[0] if item.forms else Form.STORED]
        if item.name not in taken
    )
    taken |= {change.node for change in dynamic}
    types = {node.name: node.op_type for node in probe.graph.all_nodes()}
    skips = {skip.node: skip for skip in (() if static is None else static.skips)}
    for name, reason in reasons.items():
        skips.setdefault(name, Skip(name, types[name], reason))
    return PassReport(
        changes=(*planned, *dynamic),
        skips=tuple(skip for name, skip in skips.items() if name not in taken),
        figures={"candidate_nodes": len(taken)},
    )


def supported(ctx: PassContext) -> bool:
    """Whether there are dynamic kernels where the model is to run."""
    cpu = ctx.session.providers == ("CPUExecutionProvider",)
    return cpu and ctx.target.name != "cuda"


def unsupported(model: ir.Model, ctx: PassContext) -> PassReport:
    """The report where there are none."""
    reason = f"its dynamic kernels run on CPUs only; the target is {ctx.target.name}"
    return PassReport(
        skips=tuple(
            Skip(node.name or "", node.op_type, reason)
            for node in model.graph.all_nodes()
            if node.op_type in RULES and node.domain == ""
        ),
        figures={"integer_nodes": 0},
        notes=("Dynamic quantization is for CPUs; use quant.mode=static here.",),
    )
