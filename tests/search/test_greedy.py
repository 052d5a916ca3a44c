"""The cheapest set of lifts, over invented nodes whose noise adds up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.search.greedy import Completed, Cost, Lifted, cheapest, order_by_gain

NOISES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8)


def _gains(noises: Sequence[float]) -> dict[str, float]:
    return {f"n{k}": noise for k, noise in enumerate(noises)}


def _sum_of(costs: Sequence[Sequence[float]]) -> Cost:
    """The cost of a set as the sum of its nodes', by tier."""
    return lambda lifted: sum(costs[int(node[1:])][tier] for node, tier in lifted.items())


class Additive:
    """A model whose noise is the sum of its nodes', each tier leaving a share of it."""

    def __init__(
        self, noises: Sequence[float], limit: float, left: tuple[float, ...] = (0.0,)
    ) -> None:
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


def _cheapest(
    gains: Mapping[str, float],
    holds: Callable[[Lifted], bool],
    *,
    cost: Cost,
    tiers: int,
    trims: int,
    completed: Completed = dict,
) -> dict[str, int] | None:
    found = cheapest(gains, holds, cost=cost, tiers=tiers, trims=trims, completed=completed)
    return None if found is None else found.lifted


@given(NOISES, st.floats(0.0, 1.2), st.data())
@settings(max_examples=60, deadline=None)
def test_the_set_suffices_none_of_it_can_go_and_no_set_is_measured_twice(
    noises: list[float], share: float, data: st.DataObject
) -> None:
    costs = [(data.draw(st.floats(0.1, 10.0)),) for _ in noises]
    model = Additive(noises, share * sum(noises))
    lifted = _cheapest(_gains(noises), model, cost=_sum_of(costs), tiers=1, trims=99)
    assert lifted is not None
    assert model.noise(lifted) <= model.limit
    keys = [tuple(sorted(each.items())) for each in model.asked]
    assert len(keys) == len(set(keys))
    for node in lifted:
        rest = {n: t for n, t in lifted.items() if n != node}
        assert not rest or model.noise(rest) > model.limit


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=7), st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_it_is_near_the_best_set(noises: list[float], share: float) -> None:
    costs = [(1.0 + k % 3,) for k in range(len(noises))]
    model, cost = Additive(noises, share * sum(noises)), _sum_of(costs)
    lifted = _cheapest(_gains(noises), model, cost=cost, tiers=1, trims=99)
    assert lifted is not None
    names = list(_gains(noises))
    sets = itertools.chain.from_iterable(
        itertools.combinations(names, size) for size in range(len(names) + 1)
    )
    fits = [s for s in sets if model.noise(dict.fromkeys(s, 0)) <= model.limit]
    best = min(cost(dict.fromkeys(s, 0)) for s in fits)
    # the greedy solution of a knapsack problem is off by at most one item
    assert cost(lifted) <= best + max(c[0] for c in costs) + 1e-9


def test_nothing_is_lifted_where_nothing_needs_it() -> None:
    cost = _sum_of([(1.0,), (1.0,)])
    assert _cheapest(_gains([0.1, 0.2]), lambda _: True, cost=cost, tiers=1, trims=4) == {}


def test_where_no_tier_suffices_there_is_no_set() -> None:
    model = Additive([1.0, 1.0], 0.1, (0.5, 0.2))
    cost = _sum_of([(1.0, 2.0)] * 2)
    assert _cheapest(_gains([1.0, 1.0]), model, cost=cost, tiers=2, trims=4) is None


def test_a_cheap_tier_is_taken_where_it_suffices_and_a_dear_one_only_where_it_must() -> None:
    noises = [10.0, 1.0, 1.0, 1.0]
    cost = _sum_of([(1.0, 5.0)] * 4)
    loose, strict = (Additive(noises, limit, (0.3, 0.0)) for limit in (8.0, 1.7))
    assert _cheapest(_gains(noises), loose, cost=cost, tiers=2, trims=99) == {"n0": 0}
    found = _cheapest(_gains(noises), strict, cost=cost, tiers=2, trims=99)
    assert found is not None
    assert found.pop("n0") == 1
    assert set(found.values()) == {0}


def test_nodes_that_fall_with_others_count_in_the_order_and_the_cost() -> None:
    def completed(lifted: Lifted) -> Lifted:
        return dict(lifted) | ({"n2": 0} if "n0" in lifted else {})

    gains, cost = _gains([1.0, 0.5, 0.0]), _sum_of([(1.0,), (1.0,), (9.0,)])
    assert order_by_gain(gains, 0, cost, completed) == ["n1", "n0"]
    found = _cheapest(gains, lambda s: "n0" in s, cost=cost, tiers=1, trims=8, completed=completed)
    assert found == {"n0": 0, "n2": 0}


def test_neighbours_are_cheaper_together() -> None:
    def cost(lifted: Lifted) -> float:
        """One per node, and five per change between lifted and low along the chain."""
        lows = ["low", *("up" if f"n{k}" in lifted else "low" for k in range(5)), "low"]
        return len(lifted) + 5.0 * sum(a != b for a, b in itertools.pairwise(lows))

    gains = _gains([0.1, 1.0, 0.6, 0.1, 0.65])
    assert order_by_gain(gains, 0, cost)[:2] == ["n1", "n2"]


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=40), st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_a_bound_on_looks_ends_with_the_best_set_so_far(noises: list[float], share: float) -> None:
    cost = _sum_of([(1.0 + k % 3,) for k in range(len(noises))])
    spent = []
    for looks in (2, 6, 12, 400):
        model = Additive(noises, share * sum(noises))
        found = cheapest(_gains(noises), model, cost=cost, tiers=1, trims=99, looks=looks)
        assert found is not None
        assert len(model.asked) <= looks
        assert model.noise(found.lifted) <= model.limit + 1e-9
        assert found.untried <= len(found.lifted)
        if looks == 400:  # enough to try all
            assert found.untried == 0
        spent.append(cost(found.lifted))
    assert spent == sorted(spent, reverse=True)


@given(st.lists(st.floats(0.01, 1.0), min_size=30, max_size=60), st.randoms())
@settings(max_examples=20, deadline=None)
def test_the_order_of_many_nodes_is_that_of_gain_per_cost(
    noises: list[float], random: Random
) -> None:
    costs = [(random.uniform(0.1, 10.0),) for _ in noises]
    gains = _gains(noises)
    order = order_by_gain(gains, 0, _sum_of(costs))
    ratios = [gains[node] / costs[int(node[1:])][0] for node in order]
    assert all(a >= b * (1 - 1e-6) for a, b in itertools.pairwise(ratios))
