"""How many units each group gives up: one budget, spent where a unit of cost does least harm.

Every group offers a curve of loss against removed units. On the lower convex hulls of these curves
the best plan for any price of cost takes segments in the order of loss per saving (the Lagrangian
solution); the budget decides, by bisection, how many segments are taken. What a unit saves depends
on what the other groups have lost, so savings are measured again around each solution.

Source: Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Cost = Callable[[Mapping[int, int]], float]
"""Fraction of the budget's measure that is left when group ``g`` loses ``counts[g]`` units."""

_ROUNDS = 3
_EXCHANGES = 400
"""Exchanges whose cost is looked up."""
_REACH = 3
"""Counts that one exchange goes up or down at most."""
_STEPS_LOOKED_AT = 12
"""Groups of more counts are taken to save in proportion to the units removed."""
_INSTANT = 1e-6
"""Least part of the time that something is taken to need."""
_HALVINGS = 8
"""How exactly the fraction is found that an allowed loss pays for."""
_STEPS = 4
"""A group of fewer aligned steps than this gets a finer alignment."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What removing units of one group costs in quality.

    Attributes:
        group: Number of the group.
        counts: Removals to choose from, increasing; the first are those already decided.
        losses: Predicted loss of each.
    """

    group: int
    counts: tuple[int, ...]
    losses: tuple[float, ...]

    def loss(self, count: int) -> float:
        """The loss of one of ``counts``."""
        return self.losses[self.counts.index(count)]


@dataclass(frozen=True, slots=True)
class _Segment:
    """One edge of a curve's lower hull: going on to ``count`` costs ``price`` per unit saved."""

    group: int
    count: int
    price: float


def unit_step(units: int, width: int, align: int, *, strict: bool) -> int:
    """Units to keep in multiples of, so that channel counts suit the kernels.

    Args:
        units: Units of the group.
        width: Channels per unit.
        align: Wanted multiple of channels.
        strict: Take ``align`` as it is; otherwise halve it until the group has four steps, so that
            narrow layers can be pruned at all.
    """
    step = align // math.gcd(align, width)
    while not strict and step > 1 and units < _STEPS * step:
        align = (align + 1) // 2
        step = align // math.gcd(align, width)
    return step


def allowed_counts(units: int, step: int, min_kept: float) -> tuple[int, ...]:
    """Removals that leave a multiple of ``step`` and at least ``min_kept`` of them; 0 first."""
    floor = max(1, math.ceil(min_kept * units - 1e-9))
    kept = range(units // step * step, floor - 1, -step)
    return (0, *(units - k for k in kept if 0 < k < units))


def allocate(
    curves: Sequence[Curve],
    cost: Cost,
    kept: float,
    *,
    exchange: bool = False,
    time: Cost | None = None,
) -> dict[int, int]:
    """Choose one count per group so that ``cost`` is at most ``kept``, at the least summed loss.

    With ``time``, removals go where they save most of that for their loss. It need not be
    proportional to the units removed: steps of one curve may save much or little.

    Args:
        curves: What there is to remove.
        cost: Fraction left for given removals; 1 for none.
        kept: The budget, as a fraction.
        exchange: Whether to trade steps of one group for steps of another in the end, as suits
            curves of few, coarse steps.
        time: What removals are for, as a fraction like ``cost``, if it is not the same.

    Returns:
        Units to remove by group; if the budget cannot be reached, all that may go.
    """
    most = {c.group: c.counts[-1] for c in curves}
    plan = {c.group: c.counts[0] for c in curves}
    if cost(plan) <= kept:
        return plan
    if cost(most) > kept:
        return most
    least = dict(plan)
    for _ in range(_ROUNDS):
        found = _bisect(_segments(curves, _savings(curves, time or cost, plan)), cost, kept, least)
        if found == plan:
            break
        plan = found
    plan = _give_back(curves, cost, kept, plan, time)
    return _exchange(curves, cost, kept, plan, time) if exchange else plan


def within(
    curves: Sequence[Curve], cost: Cost, kept: float, plan: dict[int, int], allowed: float
) -> dict[int, int]:
    """The plan that leaves least of all whose summed loss is allowed.

    Args:
        curves: What there is to remove.
        cost: Fraction left for given removals; 1 for none.
        kept: The least fraction that is wanted.
        plan: The plan for it.
        allowed: Most summed loss.
    """

    def loss(counts: Mapping[int, int]) -> float:
        return sum(curve.loss(counts[curve.group]) for curve in curves)

    if loss(plan) <= allowed:
        return plan
    best = {c.group: c.counts[0] for c in curves}
    low, high = kept, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        plan = allocate(curves, cost, middle)
        if loss(plan) <= allowed:
            best, high = plan, middle
        else:
            low = middle
    return best


def _savings(
    curves: Sequence[Curve], cost: Cost, plan: Mapping[int, int]
) -> dict[int, npt.NDArray[np.float64]]:
    """What each count of each group saves, the others being as in ``plan``."""
    savings = {}
    for curve in curves:
        counts = np.array(curve.counts)
        if len(counts) < 2:
            continue
        looked_at = counts if len(counts) <= _STEPS_LOOKED_AT else counts[[0, -1]]
        left = [cost({**plan, curve.group: int(n)}) for n in looked_at]
        saved = np.maximum.accumulate(left[0] - np.array(left))
        savings[curve.group] = np.interp(counts, looked_at, saved)
    return savings


def _segments(
    curves: Sequence[Curve], savings: Mapping[int, npt.NDArray[np.float64]]
) -> list[_Segment]:
    """The edges of all lower hulls, cheapest first; groups that save nothing offer none."""
    edges = []
    for curve in curves:
        saved = savings.get(curve.group)
        if saved is None or saved[-1] <= 0:
            continue
        # Of counts that save the same the least loss counts: steps that save nothing are no edges.
        useful = np.flatnonzero(np.diff(saved, prepend=-1.0) > 0)
        losses = np.array(curve.losses)[useful]
        hull = lower_hull(saved[useful], losses)
        for a, b in itertools.pairwise(hull):
            rise = max(float(losses[b] - losses[a]), 0.0)
            width = float(saved[useful[b]] - saved[useful[a]])
            edges.append(_Segment(curve.group, curve.counts[useful[b]], rise / width))
    return sorted(edges, key=lambda s: (s.price, s.group, s.count))


def lower_hull(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> list[int]:
    """Indices of the points on the lower convex hull, left to right (monotone chain)."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _bisect(
    segments: Sequence[_Segment], cost: Cost, kept: float, least: Mapping[int, int]
) -> dict[int, int]:
    """The shortest prefix of ``segments`` that meets the budget."""

    def plan(length: int) -> dict[int, int]:
        taken = dict(least)
        for segment in segments[:length]:
            taken[segment.group] = max(taken[segment.group], segment.count)
        return taken

    low, high = 0, len(segments)
    while low < high:
        middle = (low + high) // 2
        if cost(plan(middle)) <= kept:
            high = middle
        else:
            low = middle + 1
    return plan(high)


def _give_back(
    curves: Sequence[Curve],
    cost: Cost,
    kept: float,
    plan: Mapping[int, int],
    time: Cost | None,
) -> dict[int, int]:
    """Return units while the budget holds, each time where that undoes the most loss.

    With ``time``, where it undoes the most loss for the time that it takes.
    """
    current = dict(plan)
    blocked: set[int] = set()
    while True:
        offers = []
        now = 0.0 if time is None else time(current)
        for curve in curves:
            place = curve.counts.index(current[curve.group])
            if place and curve.group not in blocked:
                gain = curve.losses[place] - curve.losses[place - 1]
                free = curve.losses[place] <= 0
                count = curve.counts[place - 1]
                if time is not None:
                    gain /= max(time({**current, curve.group: count}) - now, _INSTANT)
                offers.append((gain, not free, curve.group, count))
        if not offers:
            return current
        gain, useful, group, count = max(offers)
        # Where losses level off, fewer removals are the better ones, unless they are free.
        if (gain > 0 or (useful and gain >= 0)) and cost({**current, group: count}) <= kept:
            current[group] = count
        else:
            blocked.add(group)


def _exchange(
    curves: Sequence[Curve],
    cost: Cost,
    kept: float,
    plan: Mapping[int, int],
    time: Cost | None,
) -> dict[int, int]:
    """Return units of one group for units of another while that lowers the loss within the budget.

    Where steps are coarse, whole segments in the order of their price can overshoot the budget by
    far: the last one may be large. An exchange trades it for smaller ones, and takes no more time.
    """
    current = dict(plan)
    tries = _EXCHANGES
    while tries:
        places = {c.group: c.counts.index(current[c.group]) for c in curves}
        moves = [
            (curve.losses[place] - curve.losses[places[curve.group]], curve, place)
            for curve in curves
            for place in range(
                max(places[curve.group] - _REACH, 0),
                min(places[curve.group] + _REACH + 1, len(curve.counts)),
            )
        ]
        back = [m for m in moves if m[2] < places[m[1].group]]
        more = [m for m in moves if m[2] > places[m[1].group]]
        offers = sorted(
            (
                (gain + rise, i, j)
                for i, (gain, returned, _) in enumerate(back)
                for j, (rise, taken, _) in enumerate(more)
                if returned.group != taken.group and gain + rise < 0
            ),
        )
        for _, i, j in offers[:tries]:
            tries -= 1
            changed = {**current, **{m[1].group: m[1].counts[m[2]] for m in (back[i], more[j])}}
            if cost(changed) <= kept and (time is None or time(changed) <= time(current)):
                current = changed
                break
        else:
            break
    return current
