"""Coordinates of a layer's weights in which all directions count alike.

The inputs ``x`` of a layer are far from equal: a few directions hold most of their energy, and a
weight along one of those moves the output a thousand times as far as along another. With the second
moment ``H = E[x xᵀ] = U Λ Uᵀ`` of the inputs and

    P = U (Λ + λ mean Λ)^(-1/2),      W = V Pᵀ,      ∂L/∂V = ∂L/∂W P

the same step of any coordinate of ``V`` moves the output equally far, but along directions in which
there is next to nothing (``λ``). The size of the steps of a row is the root mean square of its
coordinates: that of its output, per direction.

Source: Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
curvature" (the factor of the inputs); Vyas et al. 2024, "SOAP" (Adam in its eigenbasis).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

_DAMPING = 0.1
"""``λ``."""
LEAST_SIZE = 1e-2
"""Part of the mean over all rows that the size of a row is at least: some have no weights."""


@dataclass(frozen=True, slots=True)
class Whitened:
    """The weights of a layer, [O, D], as coordinates [G, O/G, D]; rows in ``G`` groups of inputs.

    Attributes:
        basis: ``P``, [G, D, D].
        size: The size of each row's steps, [G, O/G, 1].
    """

    basis: Array
    size: Array

    @classmethod
    def of(cls, weight: Floats, moment: Floats) -> Self | None:
        """The coordinates of a weight.

        Args:
            weight: ``W``, [O, D].
            moment: ``H`` of each group, [G, D, D].

        Returns:
            None if there is no signal in a group, or what was measured is not finite.
        """
        if not np.isfinite(moment).all():
            return None
        values, vectors = np.linalg.eigh(moment)
        mean = values.mean(axis=1, keepdims=True)
        if not (mean > 0).all():
            return None
        root = np.sqrt(np.maximum(values, 0) + _DAMPING * mean)
        rows = weight.reshape(len(moment), -1, weight.shape[1])
        coordinates = rows @ (vectors * root[:, None, :])
        size = np.sqrt(np.mean(coordinates**2, axis=2, keepdims=True))
        size = np.maximum(size, LEAST_SIZE * np.sqrt(np.mean(coordinates**2)))
        return cls((vectors / root[:, None, :]).astype(np.float32), size.astype(np.float32))

    def gradient(self, gradient: Array) -> Array:
        """``∂L/∂V`` [G, O/G, D] from ``∂L/∂W`` [O, D]."""
        rows = gradient.reshape(len(self.basis), -1, gradient.shape[1])
        return np.asarray(rows @ self.basis, np.float32)

    def move(self, step: Array) -> Array:
        """What a step of ``V`` adds to ``W``, [O, D]."""
        moved = step @ self.basis.transpose(0, 2, 1)
        return np.asarray(moved.reshape(-1, moved.shape[2]), np.float32)
