"""A hidden tensor: what layers in front of it make, and how that moves with their weights.

    h_t = max_p f(V x_p + v)

A row of a layer behind reads the tensor at its taps ``t``, and each of them is the largest of the
places ``p`` of a pooling, or one place where there is none (:mod:`onnxcompress.numerics.places`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.places import Places
from onnxcompress.numerics.scalar_function import ScalarFunction

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rows:
    """What a second layer sees, and what it should answer.

    Attributes:
        x: Inputs of each first layer at ``U`` places of the hidden tensor, [U, D].
        places: Which of them each tap of each row reads, [k, T, P].
        target: What the second layer is to give, before an activation and before the shortcut is
            subtracted, [k, O].
        shortcut: What is added to it, [k, O]; None where nothing is.
    """

    x: tuple[Floats, ...]
    places: Places
    target: Floats
    shortcut: Floats | None


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer.

    Attributes:
        weight: Of a first layer ``V``, [H, D]; of a second one ``W``, [O, T · H], tap first, with
            the ``H`` of all first layers side by side.
        bias: [H] or [O].
    """

    weight: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers on both sides.

    Attributes:
        first: Those that make the hidden tensor, in the order of its channels.
        second: Those that read it.
    """

    first: tuple[Layer, ...]
    second: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """What a first layer makes of the rows of a second one.

    Attributes:
        values: The hidden tensor as the rows read it, 0 for padding, [k, T, H].
        slopes: ``f'`` at each place, [U, H].
        largest: Which of the places of a tap is the largest, [k, T, 1, H]; None where there is but
            one.
    """

    values: Floats
    slopes: Floats
    largest: npt.NDArray[np.intp] | None

    def moved(self, places: Places, change: Floats) -> Floats:
        """How the values move, [k, T, H], where what is activated moves by ``change``, [U, H]."""
        spread = places.spread(change * self.slopes)
        if self.largest is None:
            return spread[:, :, 0]
        return np.take_along_axis(spread, self.largest, axis=2)[:, :, 0]

    def returned(self, places: Places, back: Floats) -> Floats:
        """What values of weight ``back``, [k, T, H], weigh at each place, [U, H]."""
        return places.summed(self._placed(places, back)) * self.slopes

    def states(self, places: Places) -> Floats:
        """``Σ f' f'ᵀ`` over the taps of all rows, [H, H]; of pooled ones nearly."""
        weights = places.weights
        if self.largest is not None:
            weights = places.summed(self._placed(places, np.ones_like(self.values)))
        scaled = self.slopes * np.sqrt(weights)
        return np.asarray(scaled.T @ scaled, np.float32)

    def _placed(self, places: Places, back: Floats) -> Floats:
        """``back`` at the largest of the places, [k, T, P, H]."""
        if self.largest is None:
            return back[:, :, np.newaxis]
        spread = np.zeros((*places.read.shape, back.shape[2]), np.float32)
        np.put_along_axis(spread, self.largest, back[:, :, np.newaxis], axis=2)
        return spread


def made_of(places: Places, x: Floats, layer: Layer, function: ScalarFunction) -> Made:
    """What a first layer makes of its inputs ``x``, [U, D]."""
    z = x @ layer.weight.T + layer.bias
    slopes, values = function.slope(z), function.value(z)
    if places.read.shape[2] == 1:
        return Made(places.spread(values)[:, :, 0], slopes, None)
    spread = places.spread(values, -np.inf)
    largest = spread.argmax(axis=2, keepdims=True)
    found = np.take_along_axis(spread, largest, axis=2)[:, :, 0]
    return Made(np.where(np.isfinite(found), found, np.float32(0)), slopes, largest)
