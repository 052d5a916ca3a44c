"""Factors of matrices that are positive definite but for rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.least_squares import Moments, choose_ridge
from onnxcompress.numerics.positive import cholesky


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 24),
    rank=st.integers(0, 24),
    exponent=st.integers(-12, 6),
    seed=st.integers(0, 99),
)
def test_rounding_to_float32_leaves_a_factor(
    size: int, rank: int, exponent: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((rank, size)) * 10.0**exponent
    exact = rows.T @ rows
    rounded = exact.astype(np.float32).astype(np.float64)
    factor = cholesky(rounded)
    assert np.array_equal(factor, np.tril(factor))
    largest = np.abs(exact).max(initial=0.0)
    assert np.abs(factor @ factor.T - exact).max() <= 1e-5 * largest + 1e-300


def test_definite_matrices_are_factored_as_they_are() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 20, 6))
    stack = np.swapaxes(rows, 1, 2) @ rows
    assert np.array_equal(cholesky(stack), np.linalg.cholesky(stack))
    stack[1] = np.diag([1.0, 1, 1, 1, 1, -1e-9])
    factors = cholesky(stack)
    assert np.allclose(factors[[0, 2]], np.linalg.cholesky(stack[[0, 2]]), rtol=1e-12)
    assert np.allclose(factors[1] @ factors[1].T, stack[1], atol=1e-8)


def test_a_matrix_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        cholesky(np.array([[-1.0, 0.0], [0.0, np.inf]]))


def test_a_ridge_below_the_rounding_of_float32_is_tried_all_the_same() -> None:
    size = 4
    covariance = np.full((size, size), 1.0) - 1e-5 * np.eye(size)
    moments = Moments(
        count=100,
        mean_x=np.zeros(size),
        mean_y=np.zeros(1),
        covariance=covariance,
        cross=np.ones((size, 1)),
    )
    ridge, energy = choose_ridge(moments, moments, np.ones((1, size)), [1e-9, 1e-1])
    assert np.isfinite(energy)
    assert ridge in {1e-9, 1e-1}
