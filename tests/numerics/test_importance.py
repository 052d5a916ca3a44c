"""Importance of units: hand-computed values and invariances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics import importance

ROWS = np.array([[3.0, -4.0], [0.0, 1.0], [-6.0, 8.0]])


def test_magnitude_is_the_norm_of_each_row() -> None:
    np.testing.assert_allclose(importance.magnitude(ROWS, 1), [7, 1, 14])
    np.testing.assert_allclose(importance.magnitude(ROWS, 2), [5, 1, 10])


def test_geometric_median_gives_the_least_score_to_the_unit_among_the_others() -> None:
    rows = np.array([[0.0, 0.0], [10.0, 0.0], [5.0, 0.1]])
    scores = importance.geometric_median(rows)
    assert int(np.argmin(scores)) == 2
    np.testing.assert_allclose(scores[0], 10 + np.hypot(5, 0.1))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-1e3, 1e3))
def test_geometric_median_does_not_see_a_common_offset(seed: int, offset: float) -> None:
    rows = np.random.default_rng(seed).normal(size=(5, 7))
    np.testing.assert_allclose(
        importance.geometric_median(rows + offset), importance.geometric_median(rows), rtol=1e-6
    )


def test_activation_weighted_follows_the_inputs_not_only_the_weights() -> None:
    rows, energy = np.array([[1.0, 1.0], [2.0, 2.0]]), np.array([[9.0, 16.0], [1.0, 1.0]])
    np.testing.assert_allclose(importance.activation_weighted(rows, energy), [5.0, np.sqrt(8.0)])
    silent = importance.activation_weighted(rows, np.zeros((2, 2)))
    np.testing.assert_array_equal(silent, 0)


def test_random_scores_repeat_with_the_seed_and_only_with_it() -> None:
    first = importance.random(50, 1)
    np.testing.assert_array_equal(first, importance.random(50, 1))
    assert not np.array_equal(first, importance.random(50, 2))
    assert first.min() >= 0
    assert first.max() < 1


def test_normalized_scores_have_mean_one_and_zeros_stay() -> None:
    assert importance.normalized(np.array([1.0, 3.0])).tolist() == [0.5, 1.5]
    assert importance.normalized(np.zeros(3)).tolist() == [0, 0, 0]
    assert importance.normalized(importance.magnitude(ROWS)).mean() == pytest.approx(1.0)
