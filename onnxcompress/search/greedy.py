"""The cheapest set of nodes to lift out of low precision until a model is good enough.

Each node has a *gain*, the noise it takes away when lifted, and a set of lifts has a *cost*, which
need not be the sum of its nodes' (two neighbours in float change between float and integer once,
not twice). A node can be lifted to one of several *tiers*, the cheapest first.

Noise of different nodes adds up in good approximation, so for one tier nodes are taken in the order
of gain per cost that each adds (the greedy solution of the knapsack problem), and how many is found
by bisection with real versions of the model. The cheapest tier's solution wins; then every lifted
node is tried lower, the one that saves most first. Bisection measures about ``log₂ n`` versions per
tier, trimming ``trims`` more.

Source: Dantzig 1957, "Discrete-variable extremum problems" (the order by ratio).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Lifted = Mapping[str, int]
"""Node to the number of its tier; nodes that are not in it stay low."""

Cost = Callable[[Lifted], float]
"""Cost of a set of lifts in any unit; that of no lifts is subtracted."""

Completed = Callable[[Lifted], Lifted]
"""Adds the nodes that cannot stay low without those lifted, as an Add of a value now in float."""

_FREE = 1e-12
"""Share of the cost of all lifts below which a lift counts as free."""


_LOOKED_AT = 24
"""Nodes whose gain per cost is computed anew at each step: those for which it was greatest last."""


@dataclass(frozen=True, slots=True)
class Cheapest:
    """What the search ended with.

    Attributes:
        lifted: The completed set; empty when nothing needs lifting.
        untried: Nodes in it that were not tried lower although that would be cheaper.
    """

    lifted: dict[str, int]
    untried: int = 0


def order_by_gain(
    gains: Mapping[str, float], tier: int, cost: Cost, completed: Completed = dict
) -> list[str]:
    """Nodes in the order to take them: each next one has the most gain per cost it adds.

    Args:
        gains: Node to the noise it takes away; only the proportions matter.
        tier: The tier to lift to.
        cost: Cost of a set.
        completed: Adds the nodes that fall with others; their gains count with them.
    """
    left = {node: max(gain, 0.0) for node, gain in gains.items()}
    taken: Lifted = {}
    free = _FREE * max(cost(dict.fromkeys(gains, tier)), 1e-300)
    order: list[str] = []
    spent = cost(taken)
    ratios = dict.fromkeys(left, math.inf)
    while left:
        best, best_key = "", (-1.0, "")
        last = sorted(left, key=lambda node: (-ratios[node], node))
        for node in sorted(last[: _LOOKED_AT if order else None]):
            with_it = completed({**taken, node: tier})
            gain = sum(left.get(n, 0.0) for n in with_it if n not in taken)
            ratio = ratios[node] = gain / max(cost(with_it) - spent, free)
            if ratio > best_key[0]:
                best, best_key = node, (ratio, node)
        taken = completed({**taken, best: tier})
        spent = cost(taken)
        order.append(best)
        left = {node: gain for node, gain in left.items() if node not in taken}
    return order


def cheapest(
    gains: Mapping[str, float],
    holds: Callable[[Lifted], bool],
    *,
    cost: Cost,
    tiers: int,
    trims: int,
    completed: Completed = dict,
    looks: int | None = None,
) -> Cheapest | None:
    """A cheap set of lifts with which the model is good enough.

    Args:
        gains: Node to the noise it takes away, for all nodes that can be lifted.
        holds: Whether the model is good enough with some nodes lifted; measured at most once per
            set.
        cost: Cost of a set.
        tiers: Number of tiers.
        trims: Most measurements to make the set cheaper.
        completed: Adds the nodes that fall with others.
        looks: Most measurements in all, but for the first of each tier: the best set so far is
            what is returned then. None for no such limit.

    Returns:
        None when in no tier all nodes suffice.
    """
    known: dict[tuple[tuple[str, int], ...], bool] = {}

    def asked(lifted: Lifted) -> bool:
        key = tuple(sorted(lifted.items()))
        if key not in known:
            known[key] = holds(lifted)
        return known[key]

    def more() -> bool:
        return looks is None or len(known) < looks

    if asked({}):
        return Cheapest({})
    prefixes = [_prefix(gains, tier, asked, more, cost, completed) for tier in range(tiers)]
    found = [lifted for lifted in prefixes if lifted is not None]
    if not found:
        return None
    best = min(found, key=cost)
    return _trimmed(best, asked, more, cost, completed, tiers=tiers, trims=trims)


def _prefix(
    gains: Mapping[str, float],
    tier: int,
    holds: Callable[[Lifted], bool],
    more: Callable[[], bool],
    cost: Cost,
    completed: Completed,
) -> Lifted | None:
    """The shortest beginning of the order that suffices; None when not even all nodes do."""
    if not gains or not holds(completed(dict.fromkeys(gains, tier))):
        return None
    order = order_by_gain(gains, tier, cost, completed)
    low, high = 0, len(order)  # `low` nodes do not suffice, `high` do
    while high - low > 1 and more():
        middle = (low + high) // 2
        if holds(completed(dict.fromkeys(order[:middle], tier))):
            high = middle
        else:
            low = middle
    return completed(dict.fromkeys(order[:high], tier))


def _trimmed(
    lifted: Lifted,
    holds: Callable[[Lifted], bool],
    more: Callable[[], bool],
    cost: Cost,
    completed: Completed,
    *,
    tiers: int,
    trims: int,
) -> Cheapest:
    """Put nodes back, or into another tier, where the rest suffices; what saves most first."""
    kept = dict(lifted)
    refused: set[tuple[str, int | None]] = set()
    while True:
        spent = cost(kept)
        trials = []
        for node, tier in sorted(kept.items()):
            rest = {n: t for n, t in kept.items() if n != node}
            for other in (None, *range(tiers)):
                if other == tier or (node, other) in refused:
                    continue
                trial = completed(rest if other is None else {**rest, node: other})
                if trial and cost(trial) < spent:
                    trials.append((cost(trial), node, other, dict(trial)))
        if not trials or trims <= 0 or not more():
            return Cheapest(kept, len({node for _, node, _, _ in trials}))
        _, node, other, trial = min(trials, key=lambda each: (each[0], each[1]))
        trims -= 1
        if holds(trial):
            kept = trial
        else:
            refused.add((node, other))
