"""Factors that let channels share a range: less noise predicted, and less noise in fact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.channel_equalization import (
    Reader,
    Tensors,
    data_noise,
    equalizing_factors,
    weight_noise,
)
from onnxcompress.numerics.equalization import FloatArray


def _region(seed: int, tensors: int, units: int, rows: int = 8) -> tuple[Tensors, list[Reader]]:
    rng = np.random.default_rng(seed)
    high = rng.lognormal(0, 1, (tensors, units))
    low = -rng.lognormal(0, 1, (tensors, units)) * rng.integers(0, 2, (tensors, 1))
    weights = rng.normal(0, 1, (rows, units))
    square = np.square(high).mean(axis=0) / 9
    signal = float(np.square(weights).sum(axis=0) @ square)
    ids = np.broadcast_to(np.arange(units), weights.shape)
    reader = Reader(np.abs(weights), ids, square, signal)
    return Tensors(low, high, np.tile(reader.energy(units), (tensors, 1))), [reader]


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_predicted_noise_never_rises(seed: int, tensors: int, units: int) -> None:
    made, readers = _region(seed, tensors, units)
    found = equalizing_factors(made, readers)
    one = np.ones(units)
    before = data_noise(made, one) + weight_noise(readers, one)
    after = data_noise(made, found.factors) + weight_noise(readers, found.factors)
    assert (found.factors > 0).all()
    assert after <= before * (1 + 1e-12)
    assert found.gain_db == pytest.approx(10 * np.log10(before / after), abs=1e-9)


def test_alone_every_channel_gets_the_whole_range() -> None:
    tensors, readers = _region(0, 1, 6)
    free = [Reader(r.sizes * 1e-9, r.units, r.square * 0, r.signal) for r in readers]
    found = equalizing_factors(tensors, free)
    reached = tensors.magnitude[0] / found.factors
    assert reached == pytest.approx(np.full(6, reached[0]))


def test_channels_without_values_get_no_endless_factors() -> None:
    high = np.array([[1.0, 0.0, 0.5]])
    reader = Reader(np.ones((2, 3)), np.tile(np.arange(3), (2, 1)), np.array([1.0, 0, 0.2]), 3.0)
    tensors = Tensors(np.zeros((1, 3)), high, reader.energy(3)[None])
    factors = equalizing_factors(tensors, [reader]).factors
    assert factors.max() / factors.min() <= 64 * (1 + 1e-9)
    silent = Tensors(np.zeros((1, 3)), np.zeros((1, 3)), reader.energy(3)[None])
    assert equalizing_factors(silent, [reader]).factors == pytest.approx(np.ones(3))


def _quantized(x: FloatArray) -> FloatArray:
    """``x`` on 256 levels over its whole range."""
    step = (x.max() - min(x.min(), 0.0)) / 255
    return np.asarray(np.round(x / step) * step)


def test_the_prediction_holds_for_real_rounding() -> None:
    rng = np.random.default_rng(3)
    spread = np.logspace(0, 1.2, 16)
    data = np.abs(rng.normal(0, 1, (4096, 16))) * spread
    weights = rng.normal(0, 1, (16, 24)) / spread[:, None] ** 0.5
    exact = data @ weights
    ids = np.tile(np.arange(16), (24, 1))
    square, signal = np.square(data).mean(axis=0), float(np.square(exact).mean(axis=0).sum())
    reader = Reader(np.abs(weights.T), ids, square, signal)
    tensors = Tensors(np.zeros((1, 16)), data.max(axis=0)[None], reader.energy(16)[None])

    def noise(factors: FloatArray) -> float:
        found = _quantized(data / factors) @ (weights * factors[:, None])
        return float(np.square(found - exact).mean(axis=0).sum()) / signal

    factors = equalizing_factors(tensors, [reader]).factors
    for each in (np.ones(16), factors):
        assert noise(each) == pytest.approx(data_noise(tensors, each), rel=0.15)
    assert noise(factors) < 0.5 * noise(np.ones(16))
