from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.affine import (
    MIN_SCALE,
    Grid,
    activation_grid,
    affine_from_range,
    clip_candidates,
    dequantize,
    fixed_point_format,
    quantize,
    quantize_bias,
    weight_affine,
    weight_grid,
)

GRIDS = [
    activation_grid("uint8", symmetric=False),
    activation_grid("int8", symmetric=False),
    activation_grid("uint8", symmetric=True),
    activation_grid("int8", symmetric=True),
    weight_grid(),
    weight_grid(reduce_range=True),
]
grids = st.sampled_from(GRIDS)
bounds = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None)
@given(grids, bounds, bounds, st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_error_inside_the_range_is_at_most_half_a_step(
    grid: Grid, a: float, b: float, shares: list[float]
) -> None:
    low, high = min(a, b), max(a, b)
    affine = affine_from_range(low, high, grid)
    x = low + (high - low) * np.array(shares)
    error = np.abs(
        x - (quantize(x, affine).astype(float) - affine.zero_point) * float(affine.scale)
    )
    # The scale is float32: half an ulp of it over 255 steps comes on top.
    assert (error <= float(affine.scale) / 2 * (1 + 1e-4)).all()


@settings(deadline=None)
@given(grids, bounds, bounds)
def test_zero_is_exact_and_integers_stay_on_the_grid(grid: Grid, a: float, b: float) -> None:
    affine = affine_from_range(min(a, b), max(a, b), grid)
    assert affine.scale >= np.float32(MIN_SCALE)
    assert affine.zero_point.dtype == grid.dtype
    assert dequantize(quantize(np.zeros(3), affine), affine).tolist() == [0, 0, 0]
    q = quantize(np.array([-np.inf, -1e30, a, b, 1e30, np.inf]), affine)
    assert q.min() >= grid.low
    assert q.max() <= grid.high


@settings(deadline=None)
@given(grids, st.integers(0, 2**32 - 1))
def test_quantizing_twice_changes_nothing(grid: Grid, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=50) * 3
    affine = affine_from_range(x.min(), x.max(), grid)
    q = quantize(x, affine)
    assert (quantize(dequantize(q, affine), affine) == q).all()


def test_per_channel_scales_run_along_the_axis() -> None:
    w = np.array([[1.0, -2.0, 0.5], [100.0, 50.0, -10.0]])
    affine = weight_affine(np.abs(w).max(axis=1), weight_grid())
    q = quantize(w, affine, axis=0)
    assert q[0, 1] == -127
    assert q[1, 0] == 127
    np.testing.assert_allclose(dequantize(q, affine, axis=0), w, atol=100 / 127 / 2)
    np.testing.assert_allclose(dequantize(q, affine, axis=0)[0], w[0], atol=2 / 127 / 2 * 1.001)
    assert (q == quantize(w.T, affine, axis=1).T).all()


def test_a_relu_range_puts_the_zero_point_at_the_minimum() -> None:
    assert affine_from_range(0.0, 6.0, GRIDS[0]).zero_point == 0
    assert affine_from_range(0.0, 6.0, GRIDS[1]).zero_point == -128
    assert affine_from_range(0.5, 6.0, GRIDS[0]).minimum == 0


@pytest.mark.parametrize(("low", "high"), [(np.nan, 1.0), (0.0, np.inf), (2.0, 1.0)])
def test_an_impossible_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="empty or not finite"):
        affine_from_range(low, high, GRIDS[0])


def test_clip_candidates_narrow_from_the_whole_range() -> None:
    made = clip_candidates(-1.0, 3.0, GRIDS[0], count=4, ratio=0.5)
    widths = [float(a.maximum - a.minimum) for a in made]
    np.testing.assert_allclose(widths, [4, 2, 1, 0.5], rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-6, 0.1, 5.0]), min_size=1, max_size=6),
    st.floats(-1e4, 1e4),
    st.sampled_from([1e-9, 1e-4, 1.0, 100.0]),
)
def test_every_bias_fits_the_scale_made_for_it(tops: list[float], b: float, sx: float) -> None:
    bias = np.full(len(tops), b)
    weight = weight_affine(np.array(tops), weight_grid(), input_scale=sx, bias=bias)
    made = quantize_bias(bias, np.float32(sx) * np.ones((), np.float32), weight.scale)
    assert np.isfinite(made.scale).all()
    assert (made.scale > 0).all()
    error = np.abs(made.integers * made.scale.astype(float) - bias)
    assert (error <= made.scale.astype(float) / 2 * 1.01 + 1e-6 * abs(b)).all()


def test_dead_channels_borrow_the_median_scale() -> None:
    made = weight_affine(np.array([0.0, 1.27, 2.54, 1.27]), weight_grid())
    np.testing.assert_allclose(made.scale, [0.01, 0.01, 0.02, 0.01], rtol=1e-6)


def test_a_bias_that_overflows_is_refused_by_name_of_channel() -> None:
    with pytest.raises(ValueError, match="channel 1"):
        quantize_bias(
            np.array([0.0, 1e6]), np.float32(1e-6) * np.ones((), np.float32), np.ones(2, np.float32)
        )


@given(st.floats(1e-6, 1e6), st.floats(0, 1e6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_fixed_point_scales_are_the_least_powers_of_two_that_reach(
    high: float, low: float, symmetric: bool
) -> None:
    dtype: Literal["int8", "uint8"] = "int8" if symmetric else "uint8"
    free = affine_from_range(-low, high, activation_grid(dtype, symmetric=symmetric))
    fixed = affine_from_range(
        -low, high, activation_grid(dtype, symmetric=symmetric, power_of_two=True)
    )
    assert np.frexp(fixed.scale)[0] == 0.5
    assert free.scale <= fixed.scale < 2 * free.scale


def test_formats_say_how_many_bits_are_behind_the_point() -> None:
    grid = activation_grid("int8", symmetric=True, power_of_two=True)
    assert fixed_point_format(affine_from_range(-1.0, 0.9, grid)) == "Q1.6"
    assert fixed_point_format(affine_from_range(-100.0, 0.9, grid)) == "Q7.0"
    unsigned = activation_grid("uint8", symmetric=False, power_of_two=True)
    assert fixed_point_format(affine_from_range(0.0, 255 / 256, unsigned)) == "UQ0.8"
    weights = weight_affine(np.array([0.4, 3.0]), weight_grid(power_of_two=True))
    assert fixed_point_format(weights) == "Q2.5 to Q-1.8"
    with pytest.raises(ValueError, match="power of two"):
        fixed_point_format(affine_from_range(0.0, 1.0, activation_grid("uint8", symmetric=False)))
