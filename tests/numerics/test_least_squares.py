"""Least squares and elimination, checked against brute force and against the samples themselves."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.least_squares import (
    Block,
    Moments,
    approximated,
    best_fit,
    choose_ridge,
    damping,
    eliminate,
    regress,
    removal_energy,
    residual_energy,
    shrunk,
    solve_positive_definite,
)

Array = npt.NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


def moments_of(x: Array, y: Array) -> Moments:
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    centred = x - mean_x
    return Moments(
        len(x), mean_x, mean_y, centred.T @ centred / len(x), centred.T @ (y - mean_y) / len(x)
    )


def problem(seed: int, rows: int = 60, inputs: int = 6, outputs: int = 3) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs))
    x = rng.normal(size=(rows, inputs)) @ mixing + rng.normal(size=inputs)
    return x, rng.normal(size=(outputs, inputs))


def second_moment(x: Array) -> Array:
    return np.asarray(x.T @ x / len(x))


def units(count: int, width: int) -> npt.NDArray[np.int64]:
    return np.arange(count * width, dtype=np.int64).reshape(count, width)


@few
@given(seeds, st.integers(1, 300), st.integers(1, 3))
def test_solution_of_a_definite_system_satisfies_it(seed: int, size: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    matrix, right = root @ root.T / size + 0.1 * np.eye(size), rng.normal(size=(size, columns))
    np.testing.assert_allclose(matrix @ solve_positive_definite(matrix, right), right, atol=1e-9)


def test_indefinite_system_is_refused() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        solve_positive_definite(np.diag([1.0, -1.0]), np.eye(2))


@few
@given(seeds, st.integers(1, 59))
def test_merged_moments_equal_the_moments_of_all_rows(seed: int, cut: int) -> None:
    x, weight = problem(seed)
    y = np.tanh(x @ weight.T)
    merged, whole = (
        moments_of(x[:cut], y[:cut]).merge(moments_of(x[cut:], y[cut:])),
        moments_of(x, y),
    )
    assert merged.count == whole.count
    for name in ("mean_x", "mean_y", "covariance", "cross"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), atol=1e-10)


def test_merging_two_empty_moments_gives_an_empty_one() -> None:
    empty = Moments(0, np.zeros(2), np.zeros(1), np.zeros((2, 2)), np.zeros((2, 1)))
    assert empty.merge(empty).count == 0


@few
@given(seeds, st.floats(1e-6, 10.0))
def test_regression_satisfies_its_normal_equations(seed: int, ridge: float) -> None:
    x, prior = problem(seed)
    y = np.tanh(x @ prior.T)
    m = moments_of(x, y)
    weight, bias = regress(m, prior, ridge)
    rho = damping(m.covariance, ridge)
    gradient = weight @ m.covariance - m.cross.T + rho * (weight - prior)
    np.testing.assert_allclose(gradient, 0, atol=1e-9 * (1 + np.abs(m.covariance).max()))
    np.testing.assert_allclose((x @ weight.T + bias).mean(axis=0), y.mean(axis=0), atol=1e-9)


@few
@given(seeds, st.floats(1e-6, 10.0), st.integers(0, 5))
def test_regression_is_never_worse_than_the_weights_it_starts_from(
    seed: int, ridge: float, gone: int
) -> None:
    x, original = problem(seed)
    kept = np.delete(np.arange(6), gone)
    m, prior = moments_of(x[:, kept], x @ original.T), original[:, kept]
    fitted = residual_energy(m, *regress(m, prior, ridge)).sum()
    before = residual_energy(m, prior, m.mean_y - prior @ m.mean_x).sum()
    assert fitted <= before + 1e-9 * abs(before)


@few
@given(seeds)
def test_residual_energy_is_the_squared_error_less_the_variance(seed: int) -> None:
    x, weight = problem(seed)
    y, bias = np.tanh(x @ weight.T), np.arange(3.0)
    expected = ((y - x @ weight.T - bias) ** 2).mean(axis=0) - y.var(axis=0)
    np.testing.assert_allclose(
        residual_energy(moments_of(x, y), weight, bias), expected, rtol=1e-9, atol=1e-9
    )


@few
@given(seeds)
def test_uncentred_moments_fit_without_a_bias(seed: int) -> None:
    x, weight = problem(seed)
    y = x @ weight.T + 1.0
    fitted, bias = regress(moments_of(x, y).uncentred(), weight, 1e-9)
    gradient = x.T @ (y - x @ fitted.T) / len(x)
    np.testing.assert_allclose(gradient, 0, atol=1e-6 * (x**2).mean())
    np.testing.assert_array_equal(bias, 0)


def test_large_ridge_keeps_the_prior_and_dead_inputs_keep_their_weights() -> None:
    x, prior = problem(3)
    x[:, 2] = 1.5  # no variance: the samples say nothing about this weight
    m = moments_of(x, x @ (prior + 1).T)
    np.testing.assert_allclose(regress(m, prior, 1e9)[0], prior, atol=1e-6)
    np.testing.assert_allclose(regress(m, prior, 1e-6)[0][:, 2], prior[:, 2], atol=1e-9)


def test_chosen_ridge_is_large_for_few_noisy_rows_and_small_for_many_clean_ones() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(2, 20))
    prior = truth + 0.05 * rng.normal(size=truth.shape)

    def draw(rows: int, noise: float) -> Moments:
        x = rng.normal(size=(rows, 20))
        return moments_of(x, x @ truth.T + noise * rng.normal(size=(rows, 2)))

    candidates = (1e-4, 1e-2, 1.0, 100.0)
    held_out = draw(2000, 0.0)
    assert choose_ridge(draw(25, 2.0), held_out, prior, candidates)[0] >= 1.0
    ridge, energy = choose_ridge(draw(4000, 0.0), held_out, prior, candidates)
    assert ridge == 1e-4
    before = residual_energy(held_out, prior, held_out.mean_y - prior @ held_out.mean_x).sum()
    assert energy < before


def forced_error(moment: Array, weight: Array, removed: list[int], damp: float) -> float:
    """The least of ``tr((W-V)(H+λI)(W-V)ᵀ)`` over V that is zero on ``removed``, by definition."""
    damped = moment + damping(moment, damp) * np.eye(len(moment))
    kept = [i for i in range(len(moment)) if i not in removed]
    best = np.zeros_like(weight)
    if kept:
        best[:, kept] = np.linalg.lstsq(
            damped[np.ix_(kept, kept)], damped[kept] @ weight.T, rcond=None
        )[0].T
    change = weight - best
    return float(np.trace(change @ damped @ change.T))


@few
@given(seeds, st.integers(1, 3))
def test_first_removal_is_the_best_by_brute_force(seed: int, width: int) -> None:
    x, weight = problem(seed, inputs=4 * width)
    moment, columns = second_moment(x), units(4, width)
    result = eliminate([Block(weight, moment, columns)], damp=1e-3, keep=3)
    costs = [forced_error(moment, weight, list(columns[u]), 1e-3) for u in range(4)]
    assert result.order.tolist() == [int(np.argmin(costs))]
    assert result.errors[1] == pytest.approx(min(costs), rel=1e-6, abs=1e-12)


@few
@given(seeds, st.integers(1, 2), st.booleans())
def test_accumulated_error_is_the_optimum_for_what_is_left(
    seed: int, width: int, tall: bool
) -> None:
    x, weight = problem(seed, inputs=5 * width, outputs=20 if tall else 2)
    moment, columns = second_moment(x), units(5, width)
    result = eliminate([Block(weight, moment, columns)], damp=1e-3, keep=1)
    for k in range(1, 5):
        removed = columns[result.order[:k]].ravel().tolist()
        expected = forced_error(moment, weight, removed, 1e-3)
        assert result.errors[k] == pytest.approx(expected, rel=1e-5, abs=1e-10)


@few
@given(seeds)
def test_errors_of_several_consumers_add_up_with_their_scales(seed: int) -> None:
    x, weight = problem(seed)
    z, other = problem(seed + 1, outputs=2)
    blocks = [
        Block(weight, second_moment(x), units(6, 1), 2.0),
        Block(other, second_moment(z), units(6, 1)[::-1], 0.5),
    ]
    result = eliminate(blocks, keep=5)
    costs = [
        2.0 * forced_error(second_moment(x), weight, [u], 1e-3)
        + 0.5 * forced_error(second_moment(z), other, [5 - u], 1e-3)
        for u in range(6)
    ]
    assert result.order[0] == int(np.argmin(costs))
    assert result.errors[1] == pytest.approx(min(costs), rel=1e-6)


@few
@given(seeds, st.permutations(range(6)), st.integers(1, 4))
def test_given_order_is_kept_and_priced_whatever_the_chunk(
    seed: int, order: list[int], chunk: int
) -> None:
    x, weight = problem(seed)
    wanted = np.array(order[:4], np.int64)
    result = eliminate([Block(weight, second_moment(x), units(6, 1))], order=wanted, chunk=chunk)
    np.testing.assert_array_equal(result.order, wanted)
    for k in range(1, 5):
        expected = forced_error(second_moment(x), weight, order[:k], 1e-3)
        assert result.errors[k] == pytest.approx(expected, rel=1e-5, abs=1e-10)


def test_chunks_cost_little_against_the_exact_greedy_order() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 40)) @ rng.normal(size=(40, 200))
    x += 0.3 * rng.normal(size=x.shape)
    block = Block(rng.normal(size=(8, 200)), second_moment(x), units(100, 2))
    exact, quick = eliminate([block], chunk=1), eliminate([block])
    assert sorted(quick.order) == sorted(set(quick.order)), "a unit was removed twice"
    assert len(quick.order) == len(exact.order) == 99
    assert quick.errors[50] <= 1.1 * exact.errors[50]


@few
@given(seeds)
def test_duplicates_and_combinations_cost_nothing_and_the_rest_makes_up_for_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(400, 4))
    x = np.column_stack([base, base[:, 0], base[:, 1] - 2 * base[:, 2]])
    weight = rng.normal(size=(3, 6))
    moment, energy = second_moment(x), float(((x @ weight.T) ** 2).mean(axis=0).sum())
    result = eliminate([Block(weight, moment, units(6, 1))], damp=1e-8, keep=4)
    assert result.errors[2] <= 1e-5 * energy
    kept = np.setdiff1d(np.arange(6), result.order)
    refitted = best_fit(moment, weight, kept, damp=1e-8)
    np.testing.assert_allclose(x[:, kept] @ refitted.T, x @ weight.T, atol=1e-3)


@few
@given(seeds, st.permutations(range(3)), st.integers(1, 2))
def test_removal_energy_is_the_energy_of_what_was_removed(
    seed: int, order: list[int], width: int
) -> None:
    x, weight = problem(seed, inputs=3 * width)
    columns = units(3, width)
    block = Block(weight, second_moment(x), columns, 3.0)
    curve = removal_energy([block], np.array(order, np.int64))
    for k in range(4):
        gone = columns[order[:k]].ravel()
        expected = 3.0 * ((x[:, gone] @ weight[:, gone].T) ** 2).mean(axis=0).sum()
        assert curve[k] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_best_fit_is_no_worse_than_any_perturbation() -> None:
    x, weight = problem(7)
    moment, kept = second_moment(x), np.array([0, 2, 3, 5])
    fitted = best_fit(moment, weight, kept, damp=1e-9)

    def error(candidate: Array) -> float:
        return float(((x @ weight.T - x[:, kept] @ candidate.T) ** 2).sum())

    rng = np.random.default_rng(0)
    for _, size in itertools.product(range(10), (1e-3, 1e-1)):
        assert error(fitted) <= error(fitted + size * rng.normal(size=fitted.shape))


def test_shrinking_keeps_variances_and_fades_with_the_number_of_rows() -> None:
    covariance = np.array([[4.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(shrunk(covariance, 2), [[4.0, 0.5], [0.5, 2.0]])
    np.testing.assert_allclose(shrunk(covariance, 10**9), covariance, atol=1e-8)
    assert covariance[0, 1] == 1.0


def test_shrinking_predicts_the_loss_on_fresh_rows_better_when_rows_are_few() -> None:
    """With fewer rows than inputs, plain moments promise that half of the inputs are for free."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 40))
    few_rows, fresh = rng.normal(size=(30, 40)), second_moment(rng.normal(size=(4000, 40)))
    plain = second_moment(few_rows)
    promised = {}
    for name, moment in (("plain", plain), ("shrunk", shrunk(plain, 30))):
        result = eliminate([Block(weight, moment, units(40, 1))], keep=20)
        promised[name] = result.errors[-1]
    truth = forced_error(fresh, weight, np.arange(20).tolist(), 1e-3)
    assert promised["plain"] < 0.1 * truth
    assert 3 * promised["plain"] < promised["shrunk"] < truth


def test_moments_that_underflowed_are_no_signal() -> None:
    random = np.random.default_rng(0)
    noisy = random.standard_normal((6, 6)) * 1e-44
    moment = (noisy + noisy.T) / 2  # as many eigenvalues below zero as above
    weight = random.standard_normal((3, 6))
    block = Block(weight, moment, np.arange(6)[:, None])
    assert np.isfinite(eliminate([block]).errors).all()


def test_the_approximated_covariance_trusts_spectra_that_fall_fast() -> None:
    random = np.random.default_rng(0)
    size, rows = 60, 40
    directions = random.normal(size=(size, 3))
    structured = random.normal(size=(rows, 3)) @ directions.T
    noise = random.normal(size=(rows, size))
    for samples, low, high in ((structured, 0.0, 0.3), (noise, 0.6, 1.0)):
        covariance = np.cov(samples.T, bias=True)
        found = approximated(covariance, rows)
        np.testing.assert_allclose(found.diagonal(), covariance.diagonal())
        away = ~np.eye(size, dtype=bool)
        share = 1 - np.linalg.norm(found[away]) / np.linalg.norm(covariance[away])
        assert low <= share <= high
    many = np.cov(random.normal(size=(100000, 4)) @ random.normal(size=(4, 4)), rowvar=False)
    np.testing.assert_allclose(approximated(many, 100000), many, rtol=0.01, atol=1e-3)
    assert np.isfinite(approximated(np.zeros((3, 3)), 5)).all()
    assert approximated(np.ones((1, 1)), 5) == pytest.approx(np.ones((1, 1)))
