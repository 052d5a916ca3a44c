from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.rounding import output_error
from onnxcompress.numerics.sparsity import (
    FloatArray,
    NofM,
    best_mask,
    damped,
    inverse_factor,
    obs_scores,
    refit,
    sparsify,
)


def _problem(seed: int, rows: int, columns: int) -> tuple[FloatArray, FloatArray]:
    """A weight, and second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns))
    inputs = rng.standard_normal((6 * columns, max(columns // 2, 1))) @ mixing[: columns // 2 or 1]
    inputs += 0.3 * rng.standard_normal(inputs.shape)
    return rng.standard_normal((rows, columns)), inputs.T @ inputs / len(inputs)


SEEDS = st.integers(0, 10_000)
ROWS, COLUMNS = st.integers(1, 9), st.integers(1, 150)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, rows=ROWS, columns=COLUMNS, share=st.floats(0.05, 1.0))
def test_recovery_keeps_the_budget_and_is_never_worse(
    seed: int, rows: int, columns: int, share: float
) -> None:
    weight, moments = _problem(seed, rows, columns)
    keep = max(int(share * weight.size), 1)
    made = sparsify(weight, moments, keep)
    assert np.count_nonzero(made) <= keep
    matrix = damped(moments, 0.01)
    assert matrix is not None
    plain = np.where(best_mask(obs_scores(weight, matrix), keep), weight, 0)
    errors = [output_error(weight - w, moments[None]).sum() for w in (made, plain)]
    assert errors[0] <= errors[1] * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, rows=ROWS, columns=COLUMNS, m=st.integers(2, 8), data=st.data())
def test_n_of_m_holds_in_every_group(
    seed: int, rows: int, columns: int, m: int, data: st.DataObject
) -> None:
    pattern = NofM(data.draw(st.integers(1, m - 1)), m)
    weight, moments = _problem(seed, rows, columns)
    made = sparsify(weight, moments, pattern)
    for start in range(0, columns, m):
        assert (np.count_nonzero(made[:, start : start + m], axis=1) <= pattern.n).all()


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, rows=ROWS, columns=COLUMNS, share=st.floats(0.0, 1.0))
def test_refitting_keeps_the_mask_and_is_never_worse_in_any_row(
    seed: int, rows: int, columns: int, share: float
) -> None:
    weight, moments = _problem(seed, rows, columns)
    mask = np.random.default_rng(seed + 1).random(weight.shape) < share
    made = refit(weight, moments, mask)
    assert not made[~mask].any()
    ours = output_error(weight - made, moments[None])
    plain = output_error(np.where(mask, 0.0, weight), moments[None])
    assert (ours <= plain * (1 + 1e-9) + 1e-12).all()


def test_everything_stays_at_full_density() -> None:
    weight, moments = _problem(0, 5, 70)
    np.testing.assert_array_equal(sparsify(weight, moments, weight.size), weight)


def test_a_duplicated_input_costs_nothing() -> None:
    rng = np.random.default_rng(3)
    half = rng.standard_normal((400, 6))
    inputs = np.concatenate([half, half], axis=1)
    weight = rng.standard_normal((4, 12))
    mask = np.ones(weight.shape, bool)
    mask[:, :6] = False  # the copies that come later can take over
    moments = inputs.T @ inputs / len(inputs)
    lost = output_error(weight - refit(weight, moments, mask, damp=1e-6), moments[None]).sum()
    before = output_error(np.where(mask, 0.0, weight), moments[None]).sum()
    assert lost < 1e-3 * before


def test_without_signal_magnitude_decides() -> None:
    weight = np.array([[3.0, -1.0, 2.0]])
    np.testing.assert_array_equal(sparsify(weight, np.zeros((3, 3)), 2), [[3.0, 0.0, 2.0]])


def test_the_factor_is_of_the_inverse() -> None:
    _, moments = _problem(5, 1, 20)
    upper = inverse_factor(moments)
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(moments), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(np.tril(upper, -1), 0.0, atol=1e-12)


@pytest.mark.parametrize(("keep", "expected"), [(1, [0, 0, 1, 0]), (3, [1, 1, 1, 0])])
def test_of_equal_scores_the_first_stay(keep: int, expected: list[int]) -> None:
    assert best_mask(np.array([[1.0, 1.0, 2.0, 1.0]]), keep).astype(int).tolist() == [expected]
