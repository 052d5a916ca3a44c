"""Allocation: exact on small problems by brute force, and the alignment rules."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.allocation import (
    Curve,
    allocate,
    allowed_counts,
    lower_hull,
    unit_step,
    within,
)


def convex_curve(group: int, seed: int, size: int = 6) -> Curve:
    rises = np.sort(np.random.default_rng(seed).random(size))
    return Curve(group, tuple(range(size + 1)), tuple(np.cumsum([0.0, *rises])))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 0.95))
def test_additive_budgets_are_spent_almost_as_well_as_by_brute_force(
    seed: int, kept: float
) -> None:
    rng = np.random.default_rng(seed)
    curves = [convex_curve(g, 3 * seed + g) for g in range(3)]
    shares = rng.dirichlet(np.ones(3))

    def cost(counts: Mapping[int, int]) -> float:
        return 1.0 - sum(0.9 * float(shares[g]) * n / 6 for g, n in counts.items())

    def loss(counts: Mapping[int, int]) -> float:
        return sum(c.loss(counts[c.group]) for c in curves)

    plan = allocate(curves, cost, kept)
    assert cost(plan) <= kept + 1e-12
    options = [dict(enumerate(c)) for c in itertools.product(range(7), repeat=3)]
    best = min(loss(o) for o in options if cost(o) <= kept)
    # The Lagrangian misses the optimum by less than one step of one group.
    step = max(b - a for c in curves for a, b in itertools.pairwise(c.losses))
    assert loss(plan) <= best + step


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 6.0), st.floats(0.2, 0.9))
def test_an_allowed_loss_is_kept_and_used(seed: int, allowed: float, kept: float) -> None:
    curves = [convex_curve(g, 3 * seed + g) for g in range(3)]

    def cost(counts: Mapping[int, int]) -> float:
        return 1.0 - sum(n / 24 for n in counts.values())

    def loss(counts: Mapping[int, int]) -> float:
        return sum(c.loss(counts[c.group]) for c in curves)

    first = allocate(curves, cost, kept)
    plan = within(curves, cost, kept, first, allowed)
    assert plan == first or loss(plan) <= allowed
    if loss(first) <= allowed:
        assert plan == first
    else:  # one unit more of any group would be too much
        assert (
            all(
                plan[c.group] == c.counts[-1]
                or loss({**plan, c.group: plan[c.group] + 1}) > allowed - 1e-9
                for c in curves
            )
            or cost(plan) <= kept + 1 / 24
        )


def test_products_of_axes_are_met_too() -> None:
    curves = [convex_curve(g, g, size=31) for g in range(4)]

    def cost(counts: Mapping[int, int]) -> float:
        left = [1 - counts[g] / 32 for g in range(4)]
        return sum(a * b for a, b in itertools.pairwise([1, *left, 1])) / 5

    plan = allocate(curves, cost, 0.5)
    assert 0.47 <= cost(plan) <= 0.5


def test_a_cheap_group_goes_first_and_a_precious_one_stays() -> None:
    cheap = Curve(0, (0, 4, 8), (0.0, 0.001, 0.002))
    precious = Curve(1, (0, 4, 8), (0.0, 10.0, 30.0))
    plan = allocate([cheap, precious], lambda c: 1 - (c[0] + c[1]) / 20, 0.6)
    assert plan == {0: 8, 1: 0}


def test_a_group_that_saves_nothing_is_left_alone() -> None:
    free = Curve(0, (0, 1), (0.0, 0.0))
    paid = Curve(1, (0, 1, 2), (0.0, 1.0, 2.0))
    assert allocate([free, paid], lambda c: 1 - c[1] / 4, 0.75) == {0: 0, 1: 1}


def test_units_are_given_back_where_the_hull_took_too_many() -> None:
    # The hull goes from 0 straight to 8 units; the budget needs only 2 of them.
    hollow = Curve(0, (0, 2, 4, 8), (0.0, 0.5, 0.9, 1.0))
    assert allocate([hollow], lambda c: 1 - c[0] / 16, 0.85) == {0: 4}


def test_where_losses_level_off_the_budget_decides_unless_removal_is_free() -> None:
    level = Curve(0, (0, 1, 2, 3, 4), (0.0, 1.0, 1.0, 1.0, 1.0))
    dead = Curve(1, (0, 1, 2), (0.0, 0.0, 0.0))

    def cost(counts: Mapping[int, int]) -> float:
        return 1 - 0.1 * sum(counts.values())

    assert allocate([level], cost, 0.8) == {0: 2}
    assert allocate([dead], cost, 0.9) == {1: 2}


def test_nothing_is_removed_when_the_budget_already_holds() -> None:
    assert allocate([convex_curve(0, 0)], lambda _: 1.0, 1.0) == {0: 0}


def test_everything_allowed_goes_when_the_budget_is_out_of_reach() -> None:
    assert allocate([convex_curve(0, 0)], lambda c: 1 - c[0] / 60, 0.5) == {0: 6}


@pytest.mark.parametrize(
    ("units", "width", "align", "strict", "expected"),
    [
        (64, 1, 16, False, 16),
        (32, 1, 16, False, 8),
        (16, 1, 16, False, 4),
        (6, 1, 16, False, 1),
        (12, 32, 16, False, 1),
        (64, 4, 16, False, 4),
        (16, 1, 16, True, 16),
        (100, 1, 1, False, 1),
    ],
)
def test_alignment_gives_way_in_narrow_groups(
    units: int, width: int, align: int, strict: bool, expected: int
) -> None:
    assert unit_step(units, width, align, strict=strict) == expected


def test_allowed_counts_leave_multiples_and_the_floor() -> None:
    assert allowed_counts(100, 16, 0.25) == (0, 4, 20, 36, 52, 68)
    assert allowed_counts(64, 16, 0.0) == (0, 16, 32, 48)
    assert allowed_counts(3, 1, 0.0) == (0, 1, 2)
    assert allowed_counts(16, 16, 0.0) == (0,)
    assert allowed_counts(10, 1, 1.0) == (0,)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_hull_is_convex_and_below_all_points(heights: list[float]) -> None:
    x, y = np.arange(len(heights), dtype=float), np.array(heights)
    hull = lower_hull(x, y)
    assert hull[0] == 0
    assert hull[-1] == len(heights) - 1
    slopes = np.diff(y[hull]) / np.diff(x[hull])
    assert np.all(np.diff(slopes) > -1e-9)
    assert np.all(np.interp(x, x[hull], y[hull]) <= y + 1e-9)


def test_a_large_last_step_is_exchanged_for_smaller_ones() -> None:
    """The hull's next segment saves 6, where 2 more are wanted."""
    small = Curve(0, (0, 1, 2), (0.0, 2.0, 4.0))
    large = Curve(1, (0, 6), (0.0, 6.0))
    plan = allocate([small, large], lambda c: 1 - (c[0] + c[1]) / 20, 0.9, exchange=True)
    assert plan == {0: 2, 1: 0}


def test_removals_go_where_they_save_time() -> None:
    """Of one group the first four units save no time, of the other each saves as much."""
    blocks = Curve(0, (0, 2, 4, 8), (0.0, 0.1, 0.2, 1.0))
    even = Curve(1, (0, 2, 4, 8), (0.0, 0.4, 0.8, 2.0))

    def cost(counts: Mapping[int, int]) -> float:
        return 1 - sum(counts.values()) / 16

    def time(counts: Mapping[int, int]) -> float:
        return 1 - (max(counts[0] - 4, 0) / 16 + counts[1] / 8) / 2

    assert allocate([blocks, even], cost, 0.75, exchange=True) == {0: 4, 1: 0}
    assert allocate([blocks, even], cost, 0.75, exchange=True, time=time) == {0: 0, 1: 4}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 0.95))
def test_the_budget_holds_whatever_time_says(seed: int, kept: float) -> None:
    rng = np.random.default_rng(seed)
    curves = [convex_curve(g, 3 * seed + g) for g in range(4)]
    saved = {g: np.cumsum([0.0, *rng.random(6)]) for g in range(4)}

    def cost(counts: Mapping[int, int]) -> float:
        return 1 - sum(counts.values()) / 24

    def time(counts: Mapping[int, int]) -> float:
        return 1 - sum(float(saved[g][n]) for g, n in counts.items()) / 24

    plan = allocate(curves, cost, kept, exchange=True, time=time)
    assert cost(plan) <= kept + 1e-12
