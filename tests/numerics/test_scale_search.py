"""Scales of weights with the least rounding error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.numerics.affine import Grid, dequantize, quantize, weight_affine, weight_grid
from onnxcompress.numerics.scale_search import fitted_affine

GRIDS = [weight_grid(), weight_grid(reduce_range=True)]

matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 40)),
    elements=st.floats(-100, 100, width=32),
)


def errors(matrix: np.ndarray, grid: Grid, *, fitted: bool) -> np.ndarray:
    top = np.abs(matrix).max(axis=1)
    affine = fitted_affine(matrix, grid) if fitted else weight_affine(top, grid)
    rounded = dequantize(quantize(matrix, affine, 0), affine, 0).astype(np.float64)
    return np.asarray(np.square(matrix - rounded).sum(axis=1))


@pytest.mark.parametrize("grid", GRIDS, ids=["int8", "int7"])
@given(matrix=matrices)
def test_no_row_is_worse_than_with_the_whole_range(grid: Grid, matrix: np.ndarray) -> None:
    plain, fitted = errors(matrix, grid, fitted=False), errors(matrix, grid, fitted=True)
    energy = np.square(matrix.astype(np.float64)).sum(axis=1)
    assert (fitted <= plain * (1 + 1e-5) + 1e-9 * energy + 1e-20).all()


def test_clipping_one_large_weight_pays_in_a_long_row() -> None:
    row = np.random.default_rng(0).normal(size=(1, 50000)).astype(np.float32)
    row[0, 0] = 1.1 * np.abs(row).max()
    grid = weight_grid()
    assert errors(row, grid, fitted=True)[0] < 0.95 * errors(row, grid, fitted=False)[0]


def test_a_zero_row_and_no_rows() -> None:
    affine = fitted_affine(np.zeros((2, 3), np.float32), weight_grid())
    assert np.isfinite(affine.scale).all()
    assert (affine.scale > 0).all()
    assert fitted_affine(np.zeros((0, 3), np.float32), weight_grid()).scale.shape == (0,)
