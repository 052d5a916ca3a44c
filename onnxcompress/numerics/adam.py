"""Steps along gradients, in coordinates in which one length of step suits all weights.

With the gradient ``h`` of the coordinates ``V`` of a weight at step ``t``,

    m ← β₁ m + (1 - β₁) h,   v ← β₂ v + (1 - β₂) h²,
    V ← V - η_t s · (m/(1 - β₁ᵗ)) / (√(v/(1 - β₂ᵗ)) + ε)

The length of a step is the rate ``η_t`` times the size ``s`` of what is moved, whatever the size of
the gradient. The rate rises over the first steps and falls along half a cosine to zero.

Source: Kingma and Ba 2015, "Adam: a method for stochastic optimization", algorithm 1; Loshchilov
and Hutter 2017, "SGDR", equation 5 (cosine); You et al. 2020, "Large batch optimization for deep
learning" (steps relative to the weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-12
_WARM = 0.05
"""Part of the steps over which the rate rises."""


class Coordinates(Protocol):
    """What is moved in place of an array that depends on it linearly."""

    @property
    def size(self) -> Array:
        """``s``, of a shape that numpy repeats to that of the coordinates."""

    def gradient(self, gradient: Array) -> Array:
        """The gradient of the coordinates, from that of the array."""

    def move(self, step: Array) -> Array:
        """What a step of the coordinates adds to the array."""


@dataclass(frozen=True, slots=True)
class Plain:
    """An array that is moved itself.

    Attributes:
        size: What steps are relative to.
    """

    size: Array

    def gradient(self, gradient: Array) -> Array:
        """As it is."""
        return gradient

    def move(self, step: Array) -> Array:
        """As it is."""
        return step


def rate_at(step: int, steps: int) -> float:
    """The rate of step ``step`` of ``steps``, counted from 0, relative to the largest."""
    warm = min(1.0, (step + 1) / max(_WARM * steps, 1.0))
    return warm * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


class Adam:
    """Moves arrays against their gradients, in place.

    Args:
        arrays: What is moved, by name.
        coordinates: In which coordinates, by name.
    """

    def __init__(self, arrays: Mapping[str, Array], coordinates: Mapping[str, Coordinates]) -> None:
        self._arrays, self._coordinates = arrays, coordinates
        self._moments: dict[str, tuple[Array, Array]] = {}
        self._count = 0

    def step(self, gradients: Mapping[str, Array], rate: float) -> None:
        """Make one step.

        Args:
            gradients: One for each array; those that are not finite make no step at all.
            rate: ``η_t``.
        """
        if not all(np.isfinite(g).all() for g in gradients.values()):
            return
        self._count += 1
        first = 1 / (1 - _BETA_1**self._count)
        second = np.float32(1 / (1 - _BETA_2**self._count))
        for name, gradient in gradients.items():
            own = self._coordinates[name]
            h = own.gradient(gradient)
            if name not in self._moments:
                self._moments[name] = np.zeros_like(h), np.zeros_like(h)
            m, v = self._moments[name]
            m *= _BETA_1
            m += (1 - _BETA_1) * h
            v *= _BETA_2
            v += (1 - _BETA_2) * np.square(h)
            length = np.float32(rate * first) * own.size
            self._arrays[name] -= own.move(length * m / (np.sqrt(v * second) + _EPSILON))
