"""Factors that equalize ranges: products stay, ranges meet, predicted noise falls."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.numerics.equalization import (
    ChannelStatistics,
    best_smoothing,
    cross_layer_factors,
    rounding_noise,
    smoothing_factors,
)

_SEEDS = st.integers(0, 10_000)


@given(_SEEDS)
def test_cross_layer_factors_make_both_ranges_equal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made, read = np.exp(rng.normal(0, 1, (2, 7)))
    f = cross_layer_factors(made, read)
    np.testing.assert_allclose(made * f, read / f, rtol=1e-12)
    np.testing.assert_allclose(made * f, np.sqrt(made * read), rtol=1e-12)


def test_dead_channels_keep_their_factor() -> None:
    f = cross_layer_factors(np.array([0.0, 2.0, 1.0]), np.array([3.0, 0.0, 4.0]))
    np.testing.assert_allclose(f, [1.0, 1.0, 2.0])


@given(_SEEDS, st.floats(0, 1))
def test_smoothing_factors_are_positive_and_bounded(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    data = np.exp(rng.normal(0, 5, 9)) * (rng.random(9) < 0.5).astype(np.float64)
    weights = np.exp(rng.normal(0, 5, 9)) * (rng.random(9) < 0.5).astype(np.float64)
    f = smoothing_factors(data, weights, alpha)
    assert np.isfinite(f).all()
    assert (f > 0).all()
    assert f.max() / f.min() <= 1e8 * 1.001


def _outliers(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (400, 16))
    x[:, seed % 16] *= 40
    return x, rng.normal(0, 1, (16, 12))


def _statistics(x: np.ndarray) -> ChannelStatistics:
    return ChannelStatistics(x.min(0), x.max(0), (x**2).mean(0))


@given(_SEEDS)
def test_best_smoothing_never_predicts_more_noise(seed: int) -> None:
    x, w = _outliers(seed)
    found = best_smoothing(_statistics(x), w)
    none = rounding_noise(_statistics(x), w, np.ones(16))
    assert rounding_noise(_statistics(x), w, found.factors) <= none
    assert found.gain_db >= 0


def _rounded(values: np.ndarray, step: np.ndarray | float) -> np.ndarray:
    return np.round(values / step) * step


def _measured_noise(x: np.ndarray, w: np.ndarray, f: np.ndarray) -> float:
    smooth, heavy = x / f, w * f[:, None]
    step = (max(smooth.max(), 0) - min(smooth.min(), 0)) / 255
    product = _rounded(smooth, step) @ _rounded(heavy, np.abs(heavy).max(0) / 127)
    return float(((product - x @ w) ** 2).mean(0).sum())


def test_predicted_noise_is_the_measured_one_and_smoothing_lowers_it() -> None:
    gains = []
    for seed in range(8):
        x, w = _outliers(seed)
        found = best_smoothing(_statistics(x), w)
        predicted = rounding_noise(_statistics(x), w, found.factors)
        measured = _measured_noise(x, w, found.factors)
        assert 0.6 < measured / predicted < 1.6
        gains.append(_measured_noise(x, w, np.ones(16)) / measured)
    assert min(gains) > 2
