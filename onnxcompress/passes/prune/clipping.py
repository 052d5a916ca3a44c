"""Targets for layers in front of a ReLU: where the original is clipped, any clipped value will do.

A layer's output ``y`` goes through ``f(y) = min(max(y, l), h)``. Fitting ``y`` to the original's
``y₀`` spends the weights on values that ``f`` throws away. What counts is ``‖f(y₀) - f(y)‖²``, and
for the current output ``ŷ`` the target

    t = y₀ where l < y₀ < h,   min(ŷ, l) where y₀ ≤ l,   max(ŷ, h) where y₀ ≥ h

has ``|f(y₀) - f(y)| ≤ |t - y|`` at ``y = ŷ`` with the least possible right side. Fitting to ``t``
and computing ``t`` anew lowers a bound of the error in every turn (majorization).

Source: Zhang et al. 2016, "Accelerating very deep convolutional networks for classification and
detection" (the nonlinear case).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of


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
    original: npt.NDArray[np.floating], now: npt.NDArray[np.floating], bounds: Bounds
) -> npt.NDArray[np.floating]:
    """``t`` from ``y₀`` and ``ŷ``, any equal shapes."""
    target = original
    if math.isfinite(bounds.low):
        target = np.where(original > bounds.low, target, np.minimum(now, bounds.low))
    if math.isfinite(bounds.high):
        target = np.where(original < bounds.high, target, np.maximum(now, bounds.high))
    return target
