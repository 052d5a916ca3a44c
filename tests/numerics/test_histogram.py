"""Histograms: exact growth, errors of rounding as measured by rounding, quantiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.affine import (
    Affine,
    activation_grid,
    affine_from_range,
    dequantize,
    quantize,
)
from onnxcompress.numerics.histogram import Histogram, HistogramSums


def counted(*parts: np.ndarray, bins: int = 8192) -> Histogram:
    sums = HistogramSums(bins)
    for part in parts:
        sums.update(part)
    return sums.finish()


def normal(seed: int, count: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=count) * scale).astype(np.float32)


@given(st.integers(0, 2**16), st.lists(st.floats(-20, 20), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_parts_does_not_matter(seed: int, exponents: list[float]) -> None:
    parts = [normal(seed + k, 200, 2.0**e) for k, e in enumerate(exponents)]
    one, other = counted(*parts, bins=64), counted(*parts[::-1], bins=64)
    assert one.width == other.width
    np.testing.assert_array_equal(one.counts, other.counts)
    assert one.count == other.count == sum(map(len, parts))


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_merging_counts_as_one_stream(seed: int) -> None:
    small, large = normal(seed, 300, 0.1), normal(seed + 1, 300, 37.0)
    first, second = HistogramSums(256), HistogramSums(256)
    first.update(small)
    second.update(large)
    first.merge(second)
    merged, streamed = first.finish(), counted(small, large, bins=256)
    assert merged.width == streamed.width
    np.testing.assert_array_equal(merged.counts, streamed.counts)


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_every_value_lies_in_its_bin(seed: int) -> None:
    values = normal(seed, 500, 3.0)
    made = counted(values)
    edges = (np.arange(len(made.counts) + 1) - len(made.counts) // 2) * made.width
    expected, _ = np.histogram(values.astype(np.float64), edges)
    np.testing.assert_array_equal(expected, made.counts)
    assert edges[0] < values.min()
    assert values.max() < edges[-1]


@pytest.mark.parametrize("share", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("power", [1.0, 2.0, 2.4])
def test_the_error_of_rounding_is_the_measured_one(
    share: float, dtype: str, relu: bool, power: float
) -> None:
    values = normal(3, 200_000, 2.5)
    if relu:
        values = np.maximum(values, 0)
    grid = activation_grid("uint8" if dtype == "uint8" else "int8", symmetric=dtype == "int8")
    affine = affine_from_range(float(values.min()) * share, float(values.max()) * share, grid)
    rounded = dequantize(quantize(values, affine), affine)
    measured = float(np.mean(np.abs(values.astype(np.float64) - rounded) ** power))
    assert counted(values).rounding_error(affine, power) == pytest.approx(measured, rel=0.01)


def test_exact_zeros_cost_nothing() -> None:
    made = counted(np.zeros(1000, np.float32), np.array([1.0], np.float32))
    affine = affine_from_range(0.0, 1.0, activation_grid("uint8", symmetric=False))
    assert made.zeros == 1000
    assert made.count == 1001
    assert made.rounding_error(affine) < 1e-6 / 1000


@given(st.integers(0, 2**16), st.floats(0.001, 0.999))
@settings(max_examples=40, deadline=None)
def test_quantiles_are_right_to_a_bin(seed: int, share: float) -> None:
    values = np.maximum(normal(seed, 5000), -0.5)
    values[values > 2] = 0
    made = counted(values)
    low, high = np.quantile(values.astype(np.float64), [max(share - 4e-4, 0), min(share + 4e-4, 1)])
    assert low - 2 * made.width <= made.quantile(share) <= high + 2 * made.width


def test_nothing_seen_is_no_error() -> None:
    affine = affine_from_range(-1.0, 1.0, activation_grid("uint8", symmetric=False))
    assert counted().rounding_error(affine) == 0.0
    assert counted(np.zeros(3, np.float32)).quantile(0.9) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        counted(np.array([1.0, bad], np.float32))


def test_denormals_and_the_greatest_floats_are_counted() -> None:
    values = np.array([1e-42, 3.4e38, -3.4e38, 0.0], np.float32)
    made = counted(values)
    assert made.count == 4
    assert made.counts.sum() == 3


def _ranged(top: float) -> Affine:
    return affine_from_range(0.0, top, activation_grid("uint8", symmetric=False))


@given(st.integers(0, 2**16), st.floats(0.2, 1.0))
@settings(max_examples=20, deadline=None)
def test_divergence_is_not_negative(seed: int, share: float) -> None:
    values = np.abs(normal(seed, 20_000))
    assert counted(values).divergence(_ranged(float(values.max()) * share)) >= 0.0


def test_divergence_cuts_off_outliers_and_little_of_an_even_distribution() -> None:
    shares = np.linspace(0.15, 1.0, 40)
    random = np.random.default_rng(0)
    even = random.uniform(0, 1, 200_000).astype(np.float32)
    spiky = np.concatenate([np.abs(normal(1, 200_000)) * 0.1, np.ones(20, np.float32)])
    best = [
        shares[int(np.argmin([made.divergence(_ranged(float(share))) for share in shares]))]
        for made in (counted(even), counted(spiky.astype(np.float32)))
    ]
    assert best[0] > 0.95
    assert best[1] < 0.7


def test_steps_finer_than_the_bins_are_not_judged() -> None:
    made = counted(np.abs(normal(0, 1000)), bins=64)
    assert made.divergence(_ranged(0.1)) == np.inf
    assert counted(np.zeros(3, np.float32)).divergence(_ranged(1.0)) == 0.0
