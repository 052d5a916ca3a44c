from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.numerics.signs import fitted, output_error, with_feedback

Float32 = npt.NDArray[np.float32]

SMALL = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 6)),
    elements=st.floats(-8, 8, width=32),
)
LEVELS = st.sampled_from([2, 3])


def _least_error(row: Float32, levels: int) -> float:
    """Error of the best codes and scale, by trying all codes."""
    signs = (-1, 1) if levels == 2 else (-1, 0, 1)
    best = np.inf
    for codes in itertools.product(signs, repeat=len(row)):
        t = np.array(codes, np.float64)
        power = float(t @ t)
        scale = max(float(t @ row) / power, 0.0) if power else 0.0
        best = min(best, float(np.square(row - scale * t).sum()))
    return best


@settings(max_examples=60, deadline=None)
@given(SMALL, LEVELS, st.integers(1, 7))
def test_codes_and_scales_are_the_best_there_are(matrix: Float32, levels: int, block: int) -> None:
    found = fitted(matrix, levels=levels, block=block)
    assert found.dequantized().shape == matrix.shape
    error = np.square(matrix.astype(np.float64) - found.dequantized())
    for row in range(len(matrix)):
        for start in range(0, matrix.shape[1], block):
            part = slice(start, start + block)
            least = _least_error(matrix[row, part].astype(np.float64), levels)
            assert error[row, part].sum() <= least * (1 + 1e-4) + 1e-6


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 24), LEVELS, st.sampled_from([0, 5])
)
def test_feedback_never_costs_a_row_anything(
    seed: int, rows: int, columns: int, levels: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns)).astype(np.float32)
    x = rng.standard_normal((columns, columns)) * rng.exponential(1.0, columns)
    moment = x.T @ x
    start = fitted(matrix, levels=levels, block=block or columns)
    fed = with_feedback(matrix, start, moment)
    weight = matrix.astype(np.float64)
    before, after = output_error(weight, start, moment), output_error(weight, fed, moment)
    assert (after <= before * (1 + 1e-9)).all()
    assert set(np.unique(fed.flat())) <= set(range(levels))


@pytest.mark.parametrize(("levels", "fallen"), [(2, 0.6), (3, 0.6)])
def test_feedback_gains_on_correlated_inputs(levels: int, fallen: float) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((32, 64)).astype(np.float32)
    x = rng.standard_normal((256, 8)) @ rng.standard_normal((8, 64))
    x += 0.1 * rng.standard_normal(x.shape)
    moment = x.T @ x / len(x)
    start = fitted(matrix, levels=levels, block=64)
    fed = with_feedback(matrix, start, moment)
    weight = matrix.astype(np.float64)
    after = output_error(weight, fed, moment).sum()
    assert after < fallen * output_error(weight, start, moment).sum()


def test_known_errors_on_normal_weights() -> None:
    """Variance left by the best binary and ternary quantizer of a normal variable (Max 1960)."""
    matrix = np.random.default_rng(0).standard_normal((4, 50_000)).astype(np.float32)
    for levels, left in ((2, 1 - 2 / np.pi), (3, 0.1902)):
        found = fitted(matrix, levels=levels, block=50_000)
        assert np.square(matrix - found.dequantized()).mean() == pytest.approx(left, abs=0.005)


def test_no_inputs_no_change() -> None:
    matrix = np.ones((2, 3), np.float32)
    start = fitted(matrix, levels=3, block=3)
    assert with_feedback(matrix, start, np.zeros((3, 3))) is start
