"""Factors on losses that are measured one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.numerics.additivity import learned


def versions(seed: int, count: int, parts: int) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=(count, parts))


@given(seed=st.integers(0, 1000), parts=st.integers(1, 6))
def test_without_versions_the_prior_is_all_there_is(seed: int, parts: int) -> None:
    prior = np.random.default_rng(seed).normal(size=parts)
    found = learned(np.zeros((0, parts)), np.zeros(0), prior, np.full(parts, 0.7))
    np.testing.assert_allclose(found.likely, np.exp(prior))
    np.testing.assert_allclose(found.root @ found.root.T, 0.49 * np.eye(parts), atol=1e-9)


@given(seed=st.integers(0, 1000), common=st.floats(-3.0, 3.0))
def test_versions_enough_tell_the_factors_but_for_what_is_common(seed: int, common: float) -> None:
    parts = 4
    true = np.exp(np.random.default_rng(seed + 1).normal(0.0, 0.7, parts))
    losses = versions(seed, 400, parts)
    found = learned(
        losses, np.exp(common) * (losses @ true), np.zeros(parts), np.full(parts, 0.7)
    ).likely
    # How versions compare is what counts; what is common to all changes nothing about that.
    apart = np.log(losses @ found) - np.log(losses @ true)
    assert np.std(apart) < 0.02


@given(seed=st.integers(0, 1000))
def test_a_part_that_no_version_lost_is_as_believed(seed: int) -> None:
    losses = versions(seed, 20, 3)
    losses[:, 1] = 0.0
    prior = np.array([0.1, -0.4, 0.3])
    found = learned(losses, losses @ np.array([1.0, 9.0, 3.0]), prior, np.full(3, 0.7))
    assert abs(found.logs[1] - prior[1]) < 1e-6
    assert np.isclose(found.root[1] @ found.root[1], 0.49)


@given(seed=st.integers(0, 1000))
def test_what_versions_tell_leaves_less_to_draw(seed: int) -> None:
    losses = versions(seed, 60, 3)
    prior, spread = np.zeros(3), np.full(3, 0.7)
    before = learned(losses[:0], np.zeros(0), prior, spread)
    after = learned(losses, losses @ np.array([2.0, 1.0, 0.5]), prior, spread)
    assert np.trace(after.root @ after.root.T) < np.trace(before.root @ before.root.T)


def test_versions_without_loss_or_error_are_left_out() -> None:
    losses = np.array([[0.0, 0.0], [1.0, 2.0]])
    found = learned(losses, np.array([0.5, 0.0]), np.zeros(2), np.full(2, 0.7))
    np.testing.assert_allclose(found.likely, 1.0)


def test_draws_repeat_with_the_seed_and_keep_to_their_width() -> None:
    losses = versions(0, 5, 3)
    found = learned(losses, losses.sum(axis=1), np.zeros(3), np.full(3, 0.7))
    one, again = (found.drawn(np.random.default_rng(3), np.ones(3)) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    still = found.drawn(np.random.default_rng(3), np.zeros(3))
    np.testing.assert_array_equal(still, found.likely)
