"""A function of one number, known at even distances: any activation, with its slope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class ScalarFunction(Protocol):
    """What is applied to every element of a tensor."""

    def value(self, z: Floats) -> Floats:
        """``f(z)``, any shape."""
        ...

    def slope(self, z: Floats) -> Floats:
        """``f'(z)``, any shape."""
        ...


@dataclass(frozen=True, slots=True)
class Tabled:
    """``f`` by linear interpolation; beyond the table it goes on as at its ends.

    Attributes:
        low: Where the table begins.
        step: Distance of its entries; above 0.
        values: ``f(low + i step)``, [n], n at least 2.
    """

    low: float
    step: float
    values: Floats

    def value(self, z: Floats) -> Floats:
        """``f(z)``, any shape."""
        place = (z - np.float32(self.low)) / np.float32(self.step)
        left = self._left(place)
        rise = self.values[left + 1] - self.values[left]
        return np.asarray(self.values[left] + (place - left) * rise, np.float32)

    def slope(self, z: Floats) -> Floats:
        """``f'(z)``, any shape."""
        left = self._left((z - np.float32(self.low)) / np.float32(self.step))
        return (self.values[left + 1] - self.values[left]) / np.float32(self.step)

    def _left(self, place: Floats) -> npt.NDArray[np.int32]:
        return np.clip(place, 0, len(self.values) - 2).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Composed:
    """One function after the other.

    Attributes:
        functions: The first to be applied first.
    """

    functions: tuple[ScalarFunction, ...]

    def value(self, z: Floats) -> Floats:
        """``f_n(... f_1(z))``, any shape."""
        for function in self.functions:
            z = function.value(z)
        return z

    def slope(self, z: Floats) -> Floats:
        """The product of all slopes, any shape."""
        first, *others = self.functions
        slope = first.slope(z)
        for before, function in zip(self.functions, others, strict=False):
            z = before.value(z)
            slope = slope * function.slope(z)
        return slope
