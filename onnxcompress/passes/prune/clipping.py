"""What the activation behind a layer clips to."""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.numerics.clipping import Bounds


def bounds_of(value: ir.Value) -> Bounds | None:
    """The bounds of the one Relu or Clip that reads ``value``; None if anything else does."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].idx != 0 or value.is_graph_output():
        return None
    return clip_of(uses[0].node)


def clip_of(node: ir.Node) -> Bounds | None:
    """The bounds of a Relu or Clip; None for any other node."""
    if node.domain not in {"", "ai.onnx"}:
        return None
    if node.op_type == "Relu":
        return Bounds(low=0.0)
    if node.op_type != "Clip" or "min" in node.attributes or "max" in node.attributes:
        return None
    limits = []
    for index, default in ((1, -math.inf), (2, math.inf)):
        limit = node.inputs[index] if len(node.inputs) > index else None
        stored = None if limit is None else constant_of(limit)
        if limit is not None and (stored is None or stored.size != 1):
            return None
        limits.append(default if stored is None else float(stored.reshape(())))
    low, high = limits
    return Bounds(low, high) if low < high else None
