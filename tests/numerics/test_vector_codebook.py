from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.vector_codebook import divisor, fit
from tests.numerics.test_codebook import SEEDS, moments, weights


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([2, 3]), st.integers(1, 8))
def test_few_different_runs_are_reproduced(seed: int, length: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(distinct, length)).astype(np.float32)
    weight = table[rng.integers(0, distinct, (4, 5))].reshape(4, 5 * length)
    coded = fit(weight, None, bits=3, length=length)
    np.testing.assert_array_equal(coded.decoded(), weight)


@settings(deadline=None, max_examples=25)
@given(SEEDS)
def test_feedback_is_not_worse_than_nearest_vectors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, inputs = weights(rng, 8, 24), moments(rng, 8, 24)
    damped, exact = inputs.damped(0.01), weight.astype(np.float64)
    plain = fit(weight, None, bits=4, length=2)
    fed = fit(weight, inputs, bits=4, length=2)
    assert fed.error(exact, damped).sum() <= plain.error(exact, damped).sum()


def test_pairs_follow_correlated_neighbours() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(64, 32, 1))
    weight = (base + 0.1 * rng.normal(size=(64, 32, 2))).reshape(64, 64).astype(np.float32)
    pairs = fit(weight, None, bits=6, length=2, scales=False)
    error = float(((weight - pairs.decoded()) ** 2).mean())
    # 3 bits for each number alone leave 0.0345 of the variance (Lloyd-Max, normal distribution).
    assert error < 0.6 * 0.0345 * float(weight.var())


def test_moments_of_groups_belong_to_their_rows() -> None:
    rng = np.random.default_rng(5)
    weight, inputs = weights(rng, 8, 12), moments(rng, 8, 12, groups=4)
    coded = fit(weight, inputs, bits=5, length=3)
    assert coded.codes.shape == (8, 4)
    assert coded.table.shape == (32, 3)


@pytest.mark.parametrize(("columns", "wanted", "found"), [(9, 2, 1), (9, 3, 3), (12, 5, 4)])
def test_divisor(columns: int, wanted: int, found: int) -> None:
    assert divisor(columns, wanted) == found
