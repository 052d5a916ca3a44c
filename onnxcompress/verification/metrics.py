"""How far one model's outputs are from another's: streaming metrics in pure numpy.

Every meter takes batches and keeps sums in float64, so memory does not grow with the number of
samples. With y the original's output and ŷ the result's, over all elements that are finite in both:

    max abs error    max |y - ŷ|
    mean abs error   mean |y - ŷ|
    SQNR [dB]        10 log10( Σ y² / Σ (y - ŷ)² )
    cosine           Σ y ŷ / sqrt( Σ y² · Σ ŷ² )

SQNR and cosine are also kept for the sample that is worst by each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OutputFidelity:
    """How near one output of the result is to the same output of the original.

    Attributes:
        name: Output name.
        samples: Samples compared.
        elements: Elements compared.
        is_float: Whether the output is of a floating-point type; SQNR and cosine exist only then.
        equal_ratio: Share of elements that are exactly equal, 0 to 1.
        max_abs_error: Largest absolute difference.
        mean_abs_error: Mean absolute difference.
        sqnr_db: Over all elements; infinite when nothing differs.
        cosine: Over all elements, -1 to 1.
        worst_sqnr_db: Of the sample where it is lowest.
        worst_cosine: Of the sample where it is lowest.
        worst_sample: Number (from 0) of the sample whose cosine is lowest.
        nonfinite_original: Elements that are NaN or infinite in the original.
        nonfinite_result: Elements that are NaN or infinite in the result where the original is
            finite.
    """

    name: str
    samples: int
    elements: int
    is_float: bool
    equal_ratio: float
    max_abs_error: float | None
    mean_abs_error: float | None
    sqnr_db: float | None
    cosine: float | None
    worst_sqnr_db: float | None
    worst_cosine: float | None
    worst_sample: int | None
    nonfinite_original: int
    nonfinite_result: int


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantization noise ratio in dB from two sums of squares; infinite without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(dot: float, original: float, result: float) -> float:
    """Cosine from Σyŷ, Σy² and Σŷ²; 1 when both are zero, 0 when only one is."""
    if original == 0 or result == 0 or dot == original == result:
        return 1.0 if original == result else 0.0
    return max(-1.0, min(1.0, dot / (math.sqrt(original) * math.sqrt(result))))


class OutputMeter:
    """Streams one output of both models into an :class:`OutputFidelity`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_float = False
        self._is_number = True
        self._samples = self._elements = self._compared = self._equal = 0
        self._nonfinite_original = self._nonfinite_result = 0
        self._max_error = self._sum_error = 0.0
        self._signal = self._noise = self._dot = self._power = 0.0
        self._worst_sqnr = math.inf
        self._worst_cosine = math.inf
        self._worst_sample: int | None = None

    def update(self, original: Array, result: Array, samples: int) -> None:
        """Add a batch.

        Args:
            original: Output of the original, any shape.
            result: Output of the result, same shape.
            samples: How many samples the batch holds. They lie on the first axis when it has that
                length, else the batch counts as one sample for the worst sample's sake.

        Raises:
            ValueError: If the shapes differ.
        """
        if original.shape != result.shape:
            raise ValueError(
                f"output '{self._name}' has shape {list(result.shape)} where the original's has "
                f"{list(original.shape)}"
            )
        first = self._samples
        self._samples += samples
        self._elements += original.size
        self._equal += int(np.count_nonzero(original == result))
        kind = original.dtype.kind
        self._is_float = kind in "fV"  # ml_dtypes' bfloat16 and float8 are of kind V
        self._is_number = kind in "fViub"
        if not self._is_number or original.size == 0:
            return
        rows = samples if original.ndim and original.shape[0] == samples else 1
        y = original.astype(np.float64).reshape(rows, -1)
        z = result.astype(np.float64).reshape(rows, -1)
        y, z = self._drop_nonfinite(y, z)
        self._add(y, z, first)

    def _drop_nonfinite(self, y: Floats, z: Floats) -> tuple[Floats, Floats]:
        """Count elements that are not finite, and make them 0 in both: no sum changes."""
        good_y, good_z = np.isfinite(y), np.isfinite(z)
        self._equal += int(np.count_nonzero(np.isnan(y) & np.isnan(z)))  # NaN == NaN is False
        good = good_y & good_z
        self._compared += int(np.count_nonzero(good))
        if good.all():
            return y, z
        self._nonfinite_original += int(np.count_nonzero(~good_y))
        self._nonfinite_result += int(np.count_nonzero(good_y & ~good_z))
        return np.where(good, y, 0.0), np.where(good, z, 0.0)

    def _add(self, y: Floats, z: Floats, first: int) -> None:
        difference = y - z
        error = np.abs(difference)
        self._max_error = max(self._max_error, float(error.max()))
        self._sum_error += float(error.sum())
        signal = np.einsum("ij,ij->i", y, y)
        noise = np.einsum("ij,ij->i", difference, difference)
        dot = np.einsum("ij,ij->i", y, z)
        power = np.einsum("ij,ij->i", z, z)
        self._signal += float(signal.sum())
        self._noise += float(noise.sum())
        self._dot += float(dot.sum())
        self._power += float(power.sum())
        for row in range(len(y)):
            self._worst_sqnr = min(self._worst_sqnr, sqnr_db(float(signal[row]), float(noise[row])))
            near = cosine(float(dot[row]), float(signal[row]), float(power[row]))
            if near < self._worst_cosine:
                self._worst_cosine, self._worst_sample = near, first + row

    def finish(self) -> OutputFidelity:
        """The metrics over everything added so far."""
        numbers = self._is_number and self._compared > 0
        floats = self._is_float and self._compared > 0
        return OutputFidelity(
            name=self._name,
            samples=self._samples,
            elements=self._elements,
            is_float=self._is_float,
            equal_ratio=self._equal / self._elements if self._elements else 1.0,
            max_abs_error=self._max_error if numbers else None,
            mean_abs_error=self._sum_error / self._compared if numbers else None,
            sqnr_db=sqnr_db(self._signal, self._noise) if floats else None,
            cosine=cosine(self._dot, self._signal, self._power) if floats else None,
            worst_sqnr_db=self._worst_sqnr if floats else None,
            worst_cosine=self._worst_cosine if floats else None,
            worst_sample=self._worst_sample if floats else None,
            nonfinite_original=self._nonfinite_original,
            nonfinite_result=self._nonfinite_result,
        )
