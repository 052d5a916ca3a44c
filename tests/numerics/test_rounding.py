from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.affine import weight_grid
from onnxcompress.numerics.rounding import (
    FloatArray,
    output_error,
    round_to_nearest,
    round_with_feedback,
)
from tests.numerics.layers import random_layer

GRID = weight_grid()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 90),
    st.integers(1, 3),
    st.sampled_from([3.0, 15.0, 127.0]),
)
def test_feedback_is_never_worse_than_nearest_in_the_c_norm(
    seed: int, outputs: int, size: int, groups: int, levels: float
) -> None:
    weight, covariance = random_layer(seed, outputs, size, groups)
    scale = np.abs(weight).max(axis=1) / levels
    nearest = round_to_nearest(weight, scale, GRID)
    made = round_with_feedback(weight, scale, GRID, covariance)
    errors = [output_error(weight - q * scale[:, None], covariance) for q in (made, nearest)]
    assert (errors[0] <= errors[1]).all()
    assert (made == np.rint(made)).all()
    assert np.abs(made).max() <= GRID.high


def test_feedback_repairs_most_of_the_error_of_correlated_inputs() -> None:
    weight, covariance = random_layer(3, 16, 128, 1)
    covariance = covariance[:, :, :1] @ covariance[:, :1, :] + 0.05 * covariance
    scale = np.abs(weight).max(axis=1) / 7
    made = round_with_feedback(weight, scale, GRID, covariance)
    nearest = round_to_nearest(weight, scale, GRID)
    ratio = [output_error(weight - q * scale[:, None], covariance).sum() for q in (made, nearest)]
    assert ratio[0] < 0.33 * ratio[1]


def test_output_error_is_the_expected_squared_output() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    x -= x.mean(axis=0)
    delta = rng.normal(size=(4, 6))
    expected = ((x @ delta.T) ** 2).mean(axis=0)
    np.testing.assert_allclose(output_error(delta, (x.T @ x / 500)[None]), expected)


@pytest.mark.parametrize("covariance", [np.zeros((1, 4, 4)), np.ones((1, 4, 4))])
def test_degenerate_covariance_still_rounds(covariance: FloatArray) -> None:
    weight = np.array([[0.3, -1.2, 2.0, 0.0]])
    made = round_with_feedback(weight, np.array([2.0 / 127]), GRID, covariance)
    assert np.isfinite(made).all()
    np.testing.assert_allclose(made * 2 / 127, weight, atol=2 / 127)


def test_groups_use_their_own_covariance() -> None:
    weight, covariance = random_layer(7, 2, 12, 2)
    scale = np.abs(weight).max(axis=1) / 3
    both = round_with_feedback(weight, scale, GRID, covariance)
    second = round_with_feedback(weight[2:], scale[2:], GRID, covariance[1:])
    assert (both[2:] == second).all()
