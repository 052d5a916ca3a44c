"""Steps along gradients whose length suits each tensor.

With a gradient ``g`` at step ``t``,

    m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²,
    W ← W - η_t s · (m/(1 - β₁ᵗ)) / (√(v/(1 - β₂ᵗ)) + ε)

``s`` is the size that steps are relative to, one for a tensor or one for each of its channels, so
that one rate suits weights that differ by orders of magnitude. The rate rises over the first steps
and falls along half a cosine to zero.

Source: Kingma and Ba 2015, "Adam: a method for stochastic optimization", algorithm 1; Loshchilov
and Hutter 2017, "SGDR", equation 5 (cosine); You et al. 2020, "Large batch optimization for deep
learning" (steps relative to the weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8
_WARM = 0.05
"""Part of the steps over which the rate rises."""


def rate_at(step: int, steps: int) -> float:
    """The rate of step ``step`` of ``steps``, counted from 0, relative to the largest."""
    warm = min(1.0, (step + 1) / max(_WARM * steps, 1.0))
    return warm * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


class Adam:
    """Moves arrays against their gradients, in place.

    Args:
        arrays: What is moved, by name.
        sizes: ``s`` of each, of a shape that numpy repeats to the array's.
    """

    def __init__(self, arrays: Mapping[str, Array], sizes: Mapping[str, Array]) -> None:
        self._arrays, self._sizes = arrays, sizes
        self._first = {name: np.zeros_like(a) for name, a in arrays.items()}
        self._second = {name: np.zeros_like(a) for name, a in arrays.items()}
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
        second = 1 / (1 - _BETA_2**self._count)
        for name, g in gradients.items():
            m, v = self._first[name], self._second[name]
            m *= _BETA_1
            m += (1 - _BETA_1) * g
            v *= _BETA_2
            v += (1 - _BETA_2) * np.square(g)
            length = np.float32(rate * first) * self._sizes[name]
            self._arrays[name] -= length * m / (np.sqrt(v * np.float32(second)) + _EPSILON)
