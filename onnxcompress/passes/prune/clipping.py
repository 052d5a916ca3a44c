"""Targets for layers in front of a ReLU: where the original is clipped, any clipped value will do.

A layer's output ``y`` goes through ``f(y) = min(max(y, l), h)``. Fitting ``y`` to the original's
``y₀`` spends the weights on values that ``f`` throws away. What counts is ``‖f(y₀) - f(y)‖²``, and
for the current output ``ŷ`` the target

    t = y₀ where l < y₀ < h,   min(ŷ, l) where y₀ ≤ l,   max(ŷ, h) where y₀ ≥ h

has ``|f(y₀) - f(y)| ≤ |t - y|`` at ``y = ŷ`` with the least possible right side. Fitting to ``t`` and
computing ``t`` anew lowers a bound of the error in every turn (majorization).

Source: Zhang et al. 2016, "Accelerating very deep convolutional networks for classification and
detection" (the nonlinear case).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.naming import Namer
from onnxcompress.passes.prune.consumers import Consumer


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an activation clips to.

    Attributes:
        low: ``l``; -inf where there is none.
        high: ``h``; inf where there is none.
    """

    low: float = -math.inf
    high: float = math.inf


def bounds_of(value: ir.Value) -> Bounds | None:
    """The bounds of the one Relu or Clip that reads ``value``; None if anything else does."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].idx != 0 or value.is_graph_output():
        return None
    node = uses[0].node
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


def clipped_target(
    model: ir.Model,
    consumer: Consumer,
    *,
    data: ir.Value,
    original: ir.Value,
    shortcut: ir.Value | None,
    bounds: Bounds,
) -> tuple[ir.Model, str]:
    """A graph that computes ``t`` from a layer's input, the original's value and the shortcut.

    Args:
        model: Holds the layer with its current weights, reading a value of the name of ``data``.
        consumer: The layer.
        data: Its input, as an input of the new graph.
        original: ``y₀``, likewise.
        shortcut: What is added to the layer's output before the activation, likewise, or None.
        bounds: Of the activation.

    Returns:
        The graph, and the name of ``t``.
    """
    graph = ir.convenience.extract(model.graph, [data.name or ""], [consumer.output])
    graph.inputs[0].type, graph.inputs[0].shape = data.type, data.shape
    made = ir.Model(graph, ir_version=model.ir_version)
    graph.inputs.extend(v for v in (original, shortcut) if v is not None)
    namer = Namer(made)
    base = f"{consumer.node}/prune"
    kind = original.dtype or ir.DataType.FLOAT

    def node(op_type: str, inputs: list[ir.Value], out: ir.DataType = kind) -> ir.Value:
        name = namer.value(f"{base}_{op_type.lower()}")
        added = ir.Node("", op_type, inputs, name=name)
        added.outputs[0].name = f"{name}_output"
        added.outputs[0].type, added.outputs[0].shape = ir.TensorType(out), original.shape
        graph.append(added)
        return added.outputs[0]

    def constant(value: float) -> ir.Value:
        name = namer.value(f"{base}_bound")
        tensor = ir.tensor(np.array(value, kind.numpy()), name=name)
        stored = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([]))
        stored.const_value = tensor
        graph.register_initializer(stored)
        return stored

    now = graph.outputs[0]
    if shortcut is not None:
        now = node("Add", [now, shortcut])
    target = original
    for bound, beyond, nearest in (
        (bounds.low, "Less", "Min"),
        (bounds.high, "Greater", "Max"),
    ):
        if math.isfinite(bound):
            limit = constant(bound)
            inside = node("Not", [node(beyond, [limit, original], ir.DataType.BOOL)], ir.DataType.BOOL)
            target = node("Where", [inside, node(nearest, [now, limit]), target])
    return made, target.name or ""
