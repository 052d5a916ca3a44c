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

Floating = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an activation clips to.

    Attributes:
        low: ``l``; -inf where there is none.
        high: ``h``; inf where there is none.
    """

    low: float = -math.inf
    high: float = math.inf

    def value(self, z: Floats) -> Floats:
        """``f(z)``, any shape."""
        return np.clip(z, np.float32(self.low), np.float32(self.high))

    def slope(self, z: Floats) -> Floats:
        """``f'(z)``, 1 or 0, any shape."""
        return np.asarray((z > self.low) & (z < self.high), np.float32)


def clipped_target(original: Floating, now: Floating, bounds: Bounds) -> Floating:
    """``t`` from ``y₀`` and ``ŷ``, any equal shapes."""
    target = original
    if math.isfinite(bounds.low):
        target = np.where(original > bounds.low, target, np.minimum(now, bounds.low))
    if math.isfinite(bounds.high):
        target = np.where(original < bounds.high, target, np.maximum(now, bounds.high))
    return target
