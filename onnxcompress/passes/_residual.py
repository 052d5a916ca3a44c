"""What a refitted layer should aim at, so that it also repairs what came before it.

Where the output of a layer is added to a shortcut, the best target is not the layer's original
output ``y₀`` but the original sum less the shortcut *as it is now*,

    y = y₀ + (shortcut₀ - shortcut)

for then the branch makes up for what the shortcut lost.

Source: He et al. 2017, "Channel pruning for accelerating very deep networks" (asymmetric
reconstruction of residual branches).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.calibration.statistics import REFERENCE_PREFIX


@dataclass(frozen=True, slots=True)
class Flow:
    """What lies upstream of each value of the changed model.

    Attributes:
        jobs: Bit ``j`` is set where layer ``j``, which may be refitted, lies upstream.
        touched: The values that can differ from the original's.
    """

    jobs: dict[ir.Value, int]
    touched: set[ir.Value]


def trace(changed: ir.Model, original: set[str], order: Mapping[str, int]) -> Flow:
    """Follow the data through ``changed``.

    Args:
        changed: The changed model.
        original: Names of the original's nodes; any other node is a change.
        order: Node name to number of the layers that may be refitted, in topological order.
    """
    jobs: dict[ir.Value, int] = {}
    touched: set[ir.Value] = set()
    for node in changed.graph:
        name = node.name or ""
        upstream = 1 << order[name] if name in order else 0
        differs = name not in original
        for value in node.inputs:
            if value is not None:
                upstream |= jobs.get(value, 0)
                differs = differs or value in touched
        for output in node.outputs:
            jobs[output] = upstream
            if differs:
                touched.add(output)
    return Flow(jobs, touched)


@dataclass(frozen=True, slots=True)
class ResidualTarget:
    """What to fit a layer to.

    Attributes:
        terms: Pairs of a tensor name and its factor; the target is their sum.
        result: The value of the changed model that should then equal the original's: the layer's
            output, or the sum.
        shortcut: The value subtracted, in the changed model; None where there is none.
    """

    terms: tuple[tuple[str, float], ...]
    result: ir.Value
    shortcut: ir.Value | None = None


def residual_target(node: ir.Node, output_name: str, flow: Flow, index: int) -> ResidualTarget:
    """The original's output, or, before a residual Add, the original's sum less today's shortcut.

    The shortcut must not depend on layers that are refitted later: of two branches that meet, the
    last one repairs what the first one left.
    """
    output = node.outputs[0]
    if output.name != output_name:  # the bias is an Add of its own
        output = next(iter(output.uses())).node.outputs[0]
    plain = ResidualTarget(((REFERENCE_PREFIX + output_name, 1.0),), output)
    uses = list(output.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or output.is_graph_output():
        return plain
    add = uses[0].node
    shortcut = add.inputs[1 - uses[0].idx]
    if shortcut is None or shortcut not in flow.touched or shortcut.shape is None:
        return plain
    if shortcut.shape != output.shape or flow.jobs.get(shortcut, 0) >> index:
        return plain
    total = add.outputs[0]
    terms = ((f"{REFERENCE_PREFIX}{total.name}", 1.0), (shortcut.name or "", -1.0))
    return ResidualTarget(terms, total, shortcut)
