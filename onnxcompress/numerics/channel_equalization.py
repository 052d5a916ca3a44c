"""Factors per channel that make the rounding of activations cost the least.

Tensors ``t`` of one region are divided by factors ``f``, one per unit ``u``; the weights of the
layers that read them are multiplied (:mod:`onnxcompress.graph.scaling`). A tensor has one step for
all its channels, set by the widest, so each tensor adds

    N_t(f) = s_t² / 12 · sum_u g_tu f_u²,    s_t = (max_u h_tu / f_u - min_u l_tu / f_u) / 255

to the outputs of the layers behind it, relative to their signal: ``g_tu = sum_r ‖W_ru‖² / E‖y_r‖²``
over those layers ``r``. Channels that use the whole range lose least: for one tensor ``f_u =
max(h_u, -l_u)`` is the optimum. Several tensors share the factors. Given half ranges ``R_t`` that
the tensors are to have, the least factors that allow them are

    f_u = max_t m_tu / R_t,    m_tu = max(h_tu, -l_tu),

so that one number per tensor is searched instead of one per channel. The other side of the coin is
the rounding of the weights, with a step per output of a layer:

    N_r(f) = 1 / E‖y_r‖² · sum_o s_ro² / 12 · sum_j E[x_u(j)²] / f_u(j)²
    s_ro = max_j |w_roj| f_u(j) / 127

over the columns ``j`` of a row: error feedback leaves less. An exponent between 0 and 1 on the
factors weighs both.

Source: Meller et al. 2019, "Same, same but different: recovering neural network quantization error
through weight factorization"; noise as in :mod:`onnxcompress.numerics.equalization`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.equalization import DATA_STEPS, WEIGHT_STEPS, FloatArray

Units = npt.NDArray[np.int64]

_LARGEST_RATIO = 64.0
"""Factors reach down to this part of the largest: channels that calibration hardly saw might need
a range yet."""

_SCALES = (0.7, 0.85, 0.95, 1.05, 1.2, 1.5)
_ROUNDS = 6
_CONVERGED = 0.99
_EXPONENTS = np.linspace(0.0, 1.0, 21)


@dataclass(frozen=True, slots=True, eq=False)
class Tensors:
    """What is known of the tensors of a region, per unit; 0 where a tensor has no such unit.

    Attributes:
        low: Least value or 0, [T, U].
        high: Greatest value or 0, [T, U].
        gain: ``g``, what noise of variance 1 there adds to the layers behind, relative to their
            signal, [T, U].
    """

    low: FloatArray
    high: FloatArray
    gain: FloatArray

    @property
    def magnitude(self) -> FloatArray:
        """``m``, largest magnitude, [T, U]."""
        return np.maximum(self.high, -self.low)


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A layer that reads a tensor of the region.

    Attributes:
        sizes: Magnitudes of its weights, [O, J].
        units: The unit that each multiplies, [O, J].
        square: ``E[x²]`` of its data, [U].
        signal: ``E‖y‖²`` of its output, over the channels of one position.
    """

    sizes: FloatArray
    units: Units
    square: FloatArray
    signal: float

    def energy(self, count: int) -> FloatArray:
        """``‖W_u‖² / E‖y‖²``, [count]."""
        made = np.bincount(
            self.units.reshape(-1), np.square(self.sizes).reshape(-1), minlength=count
        )
        return np.asarray(made / self.signal)


@dataclass(frozen=True, slots=True, eq=False)
class Equalized:
    """Factors chosen for one region.

    Attributes:
        factors: What to divide the tensors by, [U] > 0.
        gain_db: By how much the predicted noise falls.
    """

    factors: FloatArray
    gain_db: float


def data_noise(tensors: Tensors, factors: FloatArray) -> float:
    """``sum_t N_t(f)`` of the module for ``factors`` [U]."""
    ranges = (tensors.high / factors).max(axis=1) - (tensors.low / factors).min(axis=1)
    return float(np.square(ranges / DATA_STEPS) @ (tensors.gain @ np.square(factors))) / 12


def weight_noise(readers: Sequence[Reader], factors: FloatArray) -> float:
    """``sum_r N_r(f)`` of the module for ``factors`` [U], if they are rounded to nearest."""
    total = 0.0
    for reader in readers:
        each = factors[reader.units]
        steps = (reader.sizes * each).max(axis=1) / WEIGHT_STEPS
        powers = (reader.square[reader.units] / np.square(each)).sum(axis=1)
        total += float(np.square(steps) @ powers) / reader.signal
    return total / 12


def equalizing_factors(tensors: Tensors, readers: Sequence[Reader]) -> Equalized:
    """The factors with the least predicted noise of data and weights.

    Args:
        tensors: What becomes integers in the region.
        readers: The layers that read it.
    """
    units = tensors.low.shape[1]
    one = np.ones(units)
    full = _searched(tensors)
    before = data_noise(tensors, one) + weight_noise(readers, one)
    best, factors = before, one
    for exponent in _EXPONENTS[1:]:
        tried = full**exponent
        noise = data_noise(tensors, tried) + weight_noise(readers, tried)
        if noise < best:
            best, factors = noise, tried
    gain = 10 * np.log10(max(before, 1e-300) / max(best, 1e-300))
    return Equalized(factors, float(gain))


def _searched(tensors: Tensors) -> FloatArray:
    """The factors with the least noise of the data alone, a number per tensor at a time; [U]."""
    halves = np.maximum(tensors.magnitude.max(axis=1), 1e-30)
    factors = _least_factors(tensors, halves)
    best = data_noise(tensors, factors)
    for _ in range(_ROUNDS if len(halves) > 1 else 0):
        before = best
        for place in range(len(halves)):
            for scale in _SCALES:
                tried = halves.copy()
                tried[place] *= scale
                found = _least_factors(tensors, tried)
                noise = data_noise(tensors, found)
                if noise < best:
                    best, halves, factors = noise, tried, found
        if best > _CONVERGED * before:
            break
    return factors


def _least_factors(tensors: Tensors, halves: FloatArray) -> FloatArray:
    """``f_u = max_t m_tu / R_t`` around 1, [U]."""
    factors = (tensors.magnitude / halves[:, None]).max(axis=0)
    top = float(factors.max(initial=0.0))
    if top <= 0:
        return np.ones(tensors.low.shape[1])
    factors = np.maximum(factors, top / _LARGEST_RATIO)
    return np.asarray(factors / np.exp(np.log(factors).mean()))
