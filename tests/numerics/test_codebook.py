from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics import codebook, kmeans
from onnxcompress.numerics.codebook import (
    Coded,
    Fitting,
    descend,
    factored,
    fit,
    refit_levels,
    refit_scale,
    with_feedback,
)
from onnxcompress.numerics.feedback import FloatArray, InputMoments, output_error
from onnxcompress.numerics.kmeans import clustering_error, lloyd, nearest, optimal_levels

SEEDS = st.integers(0, 2**32 - 1)


def moments(
    rng: np.random.Generator, rows: int, columns: int, groups: int = 1, samples: int = 40
) -> InputMoments:
    inputs = rng.normal(size=(groups, samples, columns)) @ rng.normal(size=(columns, columns))
    return InputMoments.shared(inputs.transpose(0, 2, 1) @ inputs / samples, rows)


def weights(rng: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.float32]:
    spread = rng.uniform(0.1, 3.0, (rows, 1))
    return (rng.standard_t(4, (rows, columns)) * spread).astype(np.float32)


def total(coded: Coded, weight: npt.NDArray[np.float32], inputs: InputMoments | None) -> float:
    return float(coded.error(weight.astype(np.float64), inputs).sum())


# --- one-dimensional k-means ---------------------------------------------------------------------


def best_by_trying(values: FloatArray, weights: FloatArray, count: int) -> float:
    """The least error over all ways to cut the sorted values into intervals."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    least = np.inf
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        error = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(values))):
            v, w = values[start:stop], weights[start:stop]
            centre = np.average(v, weights=w)
            error += float((w * (v - centre) ** 2).sum())
        least = min(least, error)
    return least


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(2, 4), st.integers(5, 9))
def test_levels_are_the_best_of_all(seed: int, count: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    values, weight = rng.normal(size=size), rng.uniform(0.1, 2, size)
    found = clustering_error(values, weight, optimal_levels(values, weight, count))
    assert found == pytest.approx(best_by_trying(values, weight, count), rel=1e-9)


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.sampled_from([2, 4, 16]), st.sampled_from([50, 1000, 5000]))
def test_levels_are_not_worse_than_lloyds(seed: int, count: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    values, weight = rng.standard_t(3, size), rng.uniform(0, 1, size)
    exact = clustering_error(values, weight, optimal_levels(values, weight, count))
    start = rng.choice(values, count, replace=False)
    for _ in range(5):
        start = lloyd(values, weight, start)
    # Above 1,024 values the search is among edges: a thousandth is left for what lies between.
    assert exact <= clustering_error(values, weight, start) * (1 + 1e-3)


def test_many_values_are_counted_in_cells_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = np.append(rng.standard_t(3, 40_000), 300.0)  # one far out must not cost resolution
    mass = rng.uniform(0, 2, len(values))
    exact = clustering_error(values, mass, optimal_levels(values, mass, 64))
    monkeypatch.setattr(kmeans, "_MANY", 1000)
    assert clustering_error(values, mass, optimal_levels(values, mass, 64)) < 1.02 * exact
    few = np.repeat(rng.normal(size=8), 1000)
    assert set(optimal_levels(few, np.ones(8000), 8)) == set(few)


def test_some_rows_speak_for_the_levels_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(400, 32)).astype(np.float32)
    mixed = rng.normal(size=(200, 32)) @ rng.normal(size=(32, 32))
    inputs = InputMoments.shared((mixed.T @ mixed / 200)[None], 400)
    errors = []
    for most in (1 << 19, 3000):
        monkeypatch.setattr(codebook, "_FITTED", most)
        coded = fit(weight, inputs, Fitting(16))
        errors.append(coded.error(weight.astype(np.float64), inputs).sum())
    assert errors[1] < 1.05 * errors[0]


def test_few_values_are_their_own_levels() -> None:
    values = np.array([3.0, -1.0, 3.0, 0.5])
    np.testing.assert_array_equal(optimal_levels(values, np.ones(4), 4), [-1, 0.5, 3, 3])


def test_weightless_values_still_get_levels() -> None:
    values = np.linspace(0, 1, 50)
    levels = optimal_levels(values, np.zeros(50), 2)
    np.testing.assert_allclose(levels, [0.25, 0.75], atol=0.02)


def test_nearest_is_nearest() -> None:
    levels = np.array([-2.0, 0.0, 0.0, 5.0])
    values = np.array([-9.0, -1.1, 0.4, 2.4, 2.6, 99.0])
    found = levels[nearest(values, levels)]
    np.testing.assert_array_equal(found, [-2, -2, 0, 0, 5, 5])


# --- codebooks -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.integers(1, 6), st.integers(1, 12), st.integers(1, 16))
def test_as_many_levels_as_values_reproduce_the_matrix(
    seed: int, rows: int, columns: int, distinct: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=distinct).astype(np.float32)
    weight = rng.choice(values, (rows, columns))
    for inputs in (None, moments(rng, rows, columns)):
        coded = fit(weight, inputs, Fitting(16))
        np.testing.assert_array_equal(coded.decoded(), weight)


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.sampled_from([1, 2, 4]), st.sampled_from([4, 16]), st.integers(2, 24))
def test_feedback_is_never_worse_than_nearest(
    seed: int, groups: int, count: int, columns: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = weights(rng, 4, columns)
    inputs = moments(rng, 4, columns, groups)
    # The error that is minimized has a little of the identity in H, against singular moments.
    damped = inputs.damped(0.01)
    start = fit(weight, None, Fitting(count))
    exact = weight.astype(np.float64)
    fed = with_feedback(exact, start, inputs.damped(0.01), factored(inputs))
    assert (fed.error(exact, damped) <= start.error(exact, damped) * (1 + 1e-12)).all()
    lower = descend(exact, fed, damped)
    assert (lower.error(exact, damped) <= fed.error(exact, damped) * (1 + 1e-12)).all()
    near = fit(weight, inputs, Fitting(count, feedback=False))
    best = fit(weight, inputs, Fitting(count))
    assert total(best, weight, damped) <= total(near, weight, damped) * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.integers(2, 20))
def test_refits_never_raise_the_error(seed: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    weight = weights(rng, 5, columns)
    exact, inputs = weight.astype(np.float64), moments(rng, 5, columns).damped(0.01)
    start = fit(weight, None, Fitting(4))
    for refit in (refit_levels(exact, start, inputs), refit_scale(exact, start, inputs)):
        assert total(refit, weight, inputs) <= total(start, weight, inputs) * (1 + 1e-5)


def test_feedback_wins_where_inputs_are_correlated() -> None:
    rng = np.random.default_rng(0)
    weight, inputs = weights(rng, 32, 64), moments(rng, 32, 64, samples=400)
    plain = total(fit(weight, None, Fitting(16, scales=False)), weight, inputs)
    nearest_ = total(fit(weight, inputs, Fitting(16, feedback=False)), weight, inputs)
    fed = total(fit(weight, inputs, Fitting(16)), weight, inputs)
    signal = float(output_error(weight.astype(np.float64), inputs).sum())
    assert fed < 0.5 * nearest_ < 0.5 * plain
    assert 10 * np.log10(signal / fed) > 23


def test_codebooks_of_groups_of_rows() -> None:
    rng = np.random.default_rng(1)
    weight, inputs = weights(rng, 10, 30), moments(rng, 10, 30)
    whole = fit(weight, inputs, Fitting(8, scales=False))
    parts = fit(weight, inputs, Fitting(8, group=4, scales=False))
    assert parts.levels.shape == (3, 8)
    np.testing.assert_array_equal(parts.book, [0] * 4 + [1] * 4 + [2] * 2)
    assert total(parts, weight, inputs) < total(whole, weight, inputs)


def test_levels_that_must_be_integers() -> None:
    rng = np.random.default_rng(2)
    integers = np.clip(np.rint(rng.normal(size=(6, 40)) * 40), -127, 127).astype(np.float32)
    scale = rng.uniform(0.01, 0.1, 6).astype(np.float32)
    fitting = Fitting(16, snap=lambda levels: np.clip(np.rint(levels), -127, 127))
    coded = fit(integers * scale[:, None], moments(rng, 6, 40), fitting, scale=scale)
    assert (coded.levels == np.rint(coded.levels)).all()
    assert np.abs(coded.levels).max() <= 127
    np.testing.assert_array_equal(coded.scale, scale)


def test_moments_without_signal_leave_nearest_codes() -> None:
    rng = np.random.default_rng(3)
    weight = weights(rng, 3, 8)
    silent = InputMoments.shared(np.zeros((1, 8, 8)), 3)
    coded = fit(weight, silent, Fitting(4))
    assert np.isfinite(coded.decoded()).all()
