"""The cheapest set of nodes to lift out of low precision until a model is good enough.

Each node has a *gain* (noise it takes away when lifted) and a cost for each *tier* it can be lifted
to, the cheapest tier first. Noise of different nodes adds up in good approximation, so for one tier
the best set is near the first nodes by gain per cost (the greedy solution of the knapsack problem),
and how many is found by bisection with real versions of the model. The cheapest tier's solution
wins; then every lifted node, the most expensive first, is tried lower. Bisection and trimming
measure about ``log₂ n`` versions per tier and ``trims`` more.

Source: Dantzig 1957, "Discrete-variable extremum problems" (the order by ratio).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Lifted = Mapping[str, int]
"""Node to the number of its tier; nodes that are not in it stay low."""


Completed = Callable[[Lifted], Lifted]
"""Adds the nodes that cannot stay low without those lifted, as an Add of a value now in float."""


@dataclass(frozen=True, slots=True)
class Lift:
    """What lifting one node brings and costs.

    Attributes:
        node: Its name.
        gain: Noise that it takes away; only the proportions matter.
        costs: Cost in each tier, in any unit; at least 0.
    """

    node: str
    gain: float
    costs: tuple[float, ...]


def by_gain(lifts: Sequence[Lift], tier: int, completed: Completed = dict) -> list[Lift]:
    """Lifts in the order to take them: the most gain per cost first, by name where equal."""

    def key(lift: Lift) -> tuple[float, str]:
        cost = cost_of(lifts, completed({lift.node: tier}))
        return -max(lift.gain, 0.0) / max(cost, 1e-30), lift.node

    return sorted(lifts, key=key)


def cost_of(lifts: Sequence[Lift], lifted: Lifted) -> float:
    """Sum of the costs of the nodes lifted."""
    return sum(lift.costs[lifted[lift.node]] for lift in lifts if lift.node in lifted)


def cheapest(
    lifts: Sequence[Lift],
    holds: Callable[[Lifted], bool],
    *,
    tiers: int,
    trims: int,
    completed: Completed = dict,
) -> dict[str, int] | None:
    """A cheap set of lifts with which the model is good enough.

    Args:
        lifts: All nodes that can be lifted.
        holds: Whether the model is good enough with some nodes lifted; measured at most once per
            set.
        tiers: Number of tiers.
        trims: Most measurements to make the set cheaper.
        completed: Adds the nodes that fall with others.

    Returns:
        The completed set, empty when nothing needs lifting; None when in no tier all nodes
        suffice.
    """
    known: dict[tuple[tuple[str, int], ...], bool] = {}

    def asked(lifted: Lifted) -> bool:
        key = tuple(sorted(lifted.items()))
        if key not in known:
            known[key] = holds(lifted)
        return known[key]

    if asked({}):
        return {}
    prefixes = [_prefix(lifts, tier, asked, completed) for tier in range(tiers)]
    found = [lifted for lifted in prefixes if lifted is not None]
    if not found:
        return None
    best = min(found, key=lambda lifted: cost_of(lifts, lifted))
    return _trimmed(lifts, best, asked, trims, completed)


def _prefix(
    lifts: Sequence[Lift], tier: int, holds: Callable[[Lifted], bool], completed: Completed
) -> Lifted | None:
    """The shortest beginning of the order that suffices; None when not even all nodes do."""
    order = [lift.node for lift in by_gain(lifts, tier, completed)]

    def first(count: int) -> Lifted:
        return completed(dict.fromkeys(order[:count], tier))

    low, high = 0, len(order)  # `low` nodes do not suffice, `high` do
    if not order or not holds(first(high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if holds(first(middle)):
            high = middle
        else:
            low = middle
    return first(high)


def _trimmed(
    lifts: Sequence[Lift],
    lifted: Lifted,
    holds: Callable[[Lifted], bool],
    trims: int,
    completed: Completed,
) -> dict[str, int]:
    """Put nodes back, or into a cheaper tier, where the rest suffices; the most expensive first."""
    kept = dict(lifted)
    costs = {lift.node: lift.costs for lift in lifts}
    for node in sorted(kept, key=lambda n: (-costs[n][kept[n]], n)):
        if node not in kept:
            continue
        without = {n: t for n, t in kept.items() if n != node}
        lower = [t for t, cost in enumerate(costs[node]) if cost < costs[node][kept[node]]]
        for wanted in (without, *({**without, node: tier} for tier in lower)):
            trial = completed(wanted)
            if not trial or cost_of(lifts, trial) >= cost_of(lifts, kept):
                continue
            if trims <= 0:
                return kept
            trims -= 1
            if holds(trial):
                kept = dict(trial)
                break
    return kept
