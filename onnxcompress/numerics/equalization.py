"""Factors per channel that make tensors easier to round and leave products as they are.

With positive factors ``f``, ``y = W x = (W diag(f)) (x / f)``: the product stays, the ranges of the
two sides do not.

- *Cross-layer equalization*: a channel whose weights on one side of a positively homogeneous
  function are ``r1`` at most and on the other side ``r2`` has both at ``sqrt(r1 r2)`` after
  ``f = sqrt(r2 / r1)``.
- *Smoothing*: outlier channels of an activation set the step of all of them; part of their
  magnitude is moved into the weights, which have a step per output.

How far to smooth follows from the noise that rounding adds to ``y``, row ``w_o`` of ``W`` by row:

    N(f) = s_x² / 12 · sum_oj (w_oj f_j)²  +  κ · sum_o s_o² / 12 · sum_j E[x_j²] / f_j²
    s_x = (max_j max x_j/f_j - min_j min x_j/f_j) / steps_x,   s_o = max_j |w_oj f_j| / steps_w

whose terms are the rounding of the data and that of the weights; ``κ < 1`` where weights are
rounded with error feedback.

Source: Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction";
Xiao et al. 2023, "SmoothQuant".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_LARGEST_RATIO = 1e4
"""Factors further than this from their geometric mean are cut off: dead channels have no range."""

_ALPHAS = np.linspace(0.0, 1.0, 21)
DATA_STEPS = 255
WEIGHT_STEPS = 127


def normalized(factors: FloatArray) -> FloatArray:
    """``factors`` [C] > 0 around a geometric mean of 1, within the largest ratio."""
    logs = np.log(factors)
    limit = np.log(_LARGEST_RATIO)
    return np.asarray(np.exp(np.clip(logs - np.median(logs), -limit, limit)))


def cross_layer_factors(made: FloatArray, read: FloatArray) -> FloatArray:
    """``f_c = sqrt(read_c / made_c)``: what to multiply the tensor between two layers by.

    Channels that one side does not use keep 1.

    Args:
        made: Largest weight that makes each channel, [C].
        read: Largest weight that reads it, [C].
    """
    alive = (made > 0) & (read > 0)
    ratio = np.where(alive, read, 1.0) / np.where(alive, made, 1.0)  # 1 for dead channels
    limit = _LARGEST_RATIO
    return np.asarray(np.sqrt(np.clip(ratio, limit**-2, limit**2)))


@dataclass(frozen=True, slots=True, eq=False)
class ChannelStatistics:
    """What is known of the data of a product, per channel.

    Attributes:
        low: Least value, [C].
        high: Greatest value, [C].
        square: Mean square, [C].
    """

    low: FloatArray
    high: FloatArray
    square: FloatArray

    @property
    def magnitude(self) -> FloatArray:
        """Largest magnitude, [C]."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


def smoothing_factors(data: FloatArray, weights: FloatArray, alpha: float) -> FloatArray:
    """``f_c = data_c**alpha / weights_c**(1 - alpha)``, what to divide the data by; [C] > 0.

    Args:
        data: Largest magnitude per channel, [C].
        weights: Largest weight per channel, [C].
        alpha: 0 leaves the data as they are in proportion to the weights, 1 makes them all alike.
    """
    x, w = _positive(data), _positive(weights)
    return normalized(x**alpha / w ** (1 - alpha))


def _positive(values: FloatArray) -> FloatArray:
    """``values`` with zeros replaced by something small beside the others."""
    top = float(values.max(initial=0.0))
    return np.maximum(values, top * 1e-5 if top > 0 else 1.0)


def rounding_noise(
    data: ChannelStatistics, weights: FloatArray, factors: FloatArray, feedback: float = 1.0
) -> float:
    """``N(f)`` of the module, summed over outputs.

    Args:
        data: Of the data before smoothing.
        weights: ``W`` as [C, O].
        factors: ``f``, [C] > 0.
        feedback: ``κ``.
    """
    top = max(float((data.high / factors).max()), 0.0)
    bottom = min(float((data.low / factors).min()), 0.0)
    scaled = weights * factors[:, None]
    by_data = ((top - bottom) / DATA_STEPS) ** 2 * float((scaled**2).sum())
    steps = np.abs(scaled).max(axis=0) / WEIGHT_STEPS
    by_weights = float((steps**2).sum()) * float((data.square / factors**2).sum())
    return (by_data + feedback * by_weights) / 12


@dataclass(frozen=True, slots=True, eq=False)
class Smoothing:
    """Factors chosen for one tensor.

    Attributes:
        factors: What to divide the data by, [C].
        alpha: The exponent they come from; 0.0 with factors of 1 where nothing is gained.
        gain_db: By how much the predicted noise falls.
    """

    factors: FloatArray
    alpha: float
    gain_db: float


def best_smoothing(
    data: ChannelStatistics, weights: FloatArray, feedback: float = 1.0, alpha: float | None = None
) -> Smoothing:
    """The factors with the least predicted noise over exponents from 0 to 1, or none at all.

    Args:
        data: Of the data.
        weights: ``W`` of everything that reads the data, side by side, [C, O].
        feedback: ``κ``.
        alpha: Take this exponent instead of searching.
    """
    none = np.ones(weights.shape[0])
    before = rounding_noise(data, weights, none, feedback)
    largest = np.abs(weights).max(axis=1)
    best = (before, 0.0, none)
    for exponent in _ALPHAS if alpha is None else (alpha,):
        factors = smoothing_factors(data.magnitude, largest, float(exponent))
        noise = rounding_noise(data, weights, factors, feedback)
        if noise < best[0] or alpha is not None:
            best = (noise, float(exponent), factors)
    noise, exponent, factors = best
    gain = 10 * np.log10(max(before, 1e-300) / max(noise, 1e-300))
    return Smoothing(factors, exponent, float(gain))
