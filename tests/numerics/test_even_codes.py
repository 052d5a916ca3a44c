from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.numerics.even_codes import fit_even, is_even
from onnxcompress.numerics.feedback import InputMoments
from onnxcompress.numerics.halves import half_levels, half_scales


def weights(rows: int = 24, columns: int = 9) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    rng = np.random.default_rng(1)
    return (rng.normal(size=(rows, columns)) * rng.uniform(0.01, 10, (rows, 1))).astype(np.float32)


def test_nearest_codes_are_within_half_a_step() -> None:
    weight = weights()
    coded = fit_even(weight, None, rounds=0, snap=None)
    assert is_even(coded)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(coded.decoded() - weight) <= step / 2 * (1 + 1e-5))


def test_rounds_lower_the_error() -> None:
    weight = weights()
    errors = [
        float(fit_even(weight, None, rounds=n, snap=None).error(weight.astype(float), None).sum())
        for n in (0, 3)
    ]
    assert errors[1] < errors[0]


def test_feedback_follows_the_inputs() -> None:
    weight = weights()
    mean = np.ones(9)
    matrix = np.outer(mean, mean) + 0.01 * np.eye(9)
    moments = InputMoments.shared(matrix[None], len(weight))
    exact = weight.astype(float)
    plain = fit_even(weight, None, rounds=3, snap=None).error(exact, moments).sum()
    fed = fit_even(weight, moments, rounds=3, snap=None).error(exact, moments).sum()
    assert fed < 0.5 * plain


def test_a_row_of_zeros_stays_zero() -> None:
    weight = weights()
    weight[3] = 0
    assert not fit_even(weight, None, rounds=2, snap=half_scales).decoded()[3].any()


def test_scales_are_stored_exactly() -> None:
    coded = fit_even(weights(), None, rounds=2, snap=half_scales)
    assert coded.scale is not None
    np.testing.assert_array_equal(coded.scale.astype(np.float16).astype(np.float32), coded.scale)


@pytest.mark.parametrize("value", [1e-6, 1e6])
def test_what_half_precision_cannot_hold_stays(value: float) -> None:
    values = np.array([1.0, value * (1 + 1e-4)])
    np.testing.assert_array_equal(half_scales(values), values)


def test_small_levels_need_not_be_exact() -> None:
    levels = np.array([-1.0, 1e-6 / 3, 0.7])
    found = half_levels(levels)
    np.testing.assert_allclose(found, levels, atol=1e-3)
    np.testing.assert_array_equal(found.astype(np.float16).astype(float), found)
    tiny = levels * 1e-5
    np.testing.assert_array_equal(half_levels(tiny), tiny)
