"""The cheapest set of lifts, over invented nodes whose noise adds up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.search.greedy import Lift, Lifted, by_gain, cheapest, cost_of

NOISES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8)


def _lifts(noises: Sequence[float], costs: Sequence[tuple[float, ...]]) -> list[Lift]:
    return [Lift(f"n{k}", noise, costs[k]) for k, noise in enumerate(noises)]


class Additive:
    """A model whose noise is the sum of its nodes', each tier leaving a share of it."""

    def __init__(self, noises: list[float], limit: float, left: tuple[float, ...]) -> None:
        self.noises, self.limit, self.left = noises, limit, left
        self.asked: list[Lifted] = []

    def noise(self, lifted: Lifted) -> float:
        return sum(
            noise * (self.left[lifted[f"n{k}"]] if f"n{k}" in lifted else 1.0)
            for k, noise in enumerate(self.noises)
        )

    def __call__(self, lifted: Lifted) -> bool:
        self.asked.append(dict(lifted))
        return self.noise(lifted) <= self.limit


@given(NOISES, st.floats(0.0, 1.2), st.data())
@settings(max_examples=60, deadline=None)
def test_the_set_suffices_and_is_measured_once_per_set(
    noises: list[float], share: float, data: st.DataObject
) -> None:
    costs = [(data.draw(st.floats(0.1, 10.0)),) for _ in noises]
    model = Additive(noises, share * sum(noises), (0.0,))
    lifts = _lifts(noises, costs)
    lifted = cheapest(lifts, model, tiers=1, trims=16)
    assert lifted is not None
    assert model.noise(lifted) <= model.limit
    keys = [tuple(sorted(each.items())) for each in model.asked]
    assert len(keys) == len(set(keys))
    # no node can be put back, since every one was tried
    for node in lifted:
        rest = {n: t for n, t in lifted.items() if n != node}
        assert not rest or model.noise(rest) > model.limit


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=7), st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_it_is_near_the_best_set(noises: list[float], share: float) -> None:
    costs = [(1.0 + k % 3,) for k in range(len(noises))]
    model, lifts = Additive(noises, share * sum(noises), (0.0,)), _lifts(noises, costs)
    lifted = cheapest(lifts, model, tiers=1, trims=16)
    assert lifted is not None
    names = [lift.node for lift in lifts]
    sets = itertools.chain.from_iterable(
        itertools.combinations(names, size) for size in range(len(names) + 1)
    )
    fits = [s for s in sets if model.noise(dict.fromkeys(s, 0)) <= model.limit]
    best = min(cost_of(lifts, dict.fromkeys(s, 0)) for s in fits)
    # the greedy solution of a knapsack problem is off by at most one item
    assert cost_of(lifts, lifted) <= best + max(c[0] for c in costs) + 1e-9


def test_nothing_is_lifted_where_nothing_needs_it() -> None:
    lifts = _lifts([0.1, 0.2], [(1.0,), (1.0,)])
    assert cheapest(lifts, lambda lifted: True, tiers=1, trims=4) == {}


def test_where_no_tier_suffices_there_is_no_set() -> None:
    model = Additive([1.0, 1.0], 0.1, (0.5, 0.2))
    assert cheapest(_lifts([1.0, 1.0], [(1.0, 2.0)] * 2), model, tiers=2, trims=4) is None


def test_a_cheap_tier_is_taken_where_it_suffices_and_a_dear_one_only_where_it_must() -> None:
    noises = [10.0, 1.0, 1.0, 1.0]
    costs = [(1.0, 5.0)] * 4
    enough = cheapest(_lifts(noises, costs), Additive(noises, 8.0, (0.3, 0.0)), tiers=2, trims=16)
    assert enough == {"n0": 0}
    strict = cheapest(_lifts(noises, costs), Additive(noises, 1.7, (0.3, 0.0)), tiers=2, trims=16)
    assert strict is not None
    assert strict["n0"] == 1
    assert all(tier == 0 for node, tier in strict.items() if node != "n0")


def test_nodes_that_fall_with_others_count_in_the_order_and_the_cost() -> None:
    def completed(lifted: Lifted) -> Lifted:
        return dict(lifted) | ({"n2": 0} if "n0" in lifted else {})

    lifts = [Lift("n0", 1.0, (1.0,)), Lift("n1", 0.5, (1.0,)), Lift("n2", 0.0, (9.0,))]
    assert [lift.node for lift in by_gain(lifts, 0, completed)] == ["n1", "n0", "n2"]
    found = cheapest(lifts, lambda s: "n0" in s, tiers=1, trims=8, completed=completed)
    assert found == {"n0": 0, "n2": 0}
