from __future__ import annotations

import itertools

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.affine import weight_grid
from onnxcompress.numerics.descent import descend
from onnxcompress.numerics.rounding import (
    FloatArray,
    output_error,
    round_to_nearest,
    round_with_feedback,
)
from tests.numerics.layers import random_layer

GRID = weight_grid()


def _error(weight: FloatArray, scale: FloatArray, q: FloatArray, c: FloatArray) -> FloatArray:
    return output_error(weight - q * scale[:, None], c)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 90),
    st.integers(1, 3),
    st.sampled_from([1.0, 3.0, 15.0, 127.0]),
)
def test_it_is_never_worse_than_error_feedback(
    seed: int, outputs: int, size: int, groups: int, levels: float
) -> None:
    weight, covariance = random_layer(seed, outputs, size, groups)
    scale = np.abs(weight).max(axis=1) / levels
    fed = round_with_feedback(weight, scale, GRID, covariance)
    made = descend(weight, scale, GRID, covariance, fed)
    assert (_error(weight, scale, made, covariance) <= _error(weight, scale, fed, covariance)).all()
    assert (made == np.rint(made)).all()
    assert made.min() >= GRID.low
    assert made.max() <= GRID.high


@settings(max_examples=40, deadline=None)
@example(seed=3661131, size=12)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_no_single_weight_could_be_better(seed: int, size: int) -> None:
    weight, covariance = random_layer(seed, 2, size, 1)
    scale = np.abs(weight).max(axis=1) / 3
    start = round_to_nearest(weight, scale, GRID)
    made = descend(weight, scale, GRID, covariance, start, sweeps=1000, least_gain=0.0)
    best = _error(weight, scale, made, covariance)
    for column, step in itertools.product(range(size), (-1.0, 1.0)):
        other = made.copy()
        other[:, column] = np.clip(other[:, column] + step, GRID.low, GRID.high)
        assert (_error(weight, scale, other, covariance) >= best - 1e-9 * best.sum()).all()


def test_it_gains_on_coarse_grids() -> None:
    weight, covariance = random_layer(3, 16, 128, 1)
    scale = np.abs(weight).max(axis=1) / 3
    fed = round_with_feedback(weight, scale, GRID, covariance)
    made = descend(weight, scale, GRID, covariance, fed)
    gained = _error(weight, scale, made, covariance).sum()
    assert gained < 0.95 * _error(weight, scale, fed, covariance).sum()


def test_without_signal_nothing_moves() -> None:
    weight, _ = random_layer(0, 2, 5, 1)
    scale = np.ones(2)
    start = round_to_nearest(weight, scale, GRID)
    assert (descend(weight, scale, GRID, np.zeros((1, 5, 5)), start) == start).all()
