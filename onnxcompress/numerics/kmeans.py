"""k-means in one dimension, where it can be solved exactly.

Source: Wang and Song 2011, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic
programming"; Lloyd 1982, "Least squares quantization in PCM".
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]

_EXACT = 1024
"""More different values than this are summed up in bins before the exact search."""
_BINS = 512
"""How many bins; Lloyd's iteration on all values follows."""
_LLOYD_ROUNDS = 10
_MANY = 1 << 19
"""More values than this are summed up in cells before anything else."""
_CELLS = 1 << 16
"""How many cells of equal width; 256 levels are hundreds of them apart."""


def nearest(values: FloatArray, levels: FloatArray) -> npt.NDArray[np.int64]:
    """Index of the nearest level for each value.

    Args:
        values: Any shape.
        levels: Ascending, [k].
    """
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values)


def clustering_error(values: FloatArray, weights: FloatArray, levels: FloatArray) -> float:
    """``Σ wᵢ (vᵢ - c(vᵢ))²`` with each value at its nearest level."""
    return float((weights * (values - levels[nearest(values, levels)]) ** 2).sum())


def optimal_levels(values: FloatArray, weights: FloatArray, count: int) -> FloatArray:
    """The ``count`` levels of least ``Σ wᵢ (vᵢ - c(vᵢ))²``, ascending.

    In one dimension the best clusters are intervals, so that dynamic programming over the sorted
    values finds them: ``E_m(j) = min_i E_{m-1}(i) + cost(i, j)``. With more than 1,024 different
    values the ends of the intervals are sought among 512 edges, and Lloyd's iteration on all
    values, which cannot raise the error, settles the rest.

    Args:
        values: [N].
        weights: Not negative, [N]; all zero counts as all equal.
        count: ``k``; with as many different values or fewer these are the levels, the last one
            repeated.

    Returns:
        [k].
    """
    if not np.any(weights > 0):
        weights = np.ones_like(weights)
    if len(values) > _MANY and not may_repeat(values, count):
        values, weights = _in_cells(values, weights)
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    distinct, first = np.unique(values, return_index=True)
    if len(distinct) <= count:
        return np.concatenate([distinct, np.full(count - len(distinct), distinct[-1])])
    starts = first
    if len(distinct) > _EXACT:
        # Half of the edges at equal steps, half at equal weight: tails and the bulk.
        half = _BINS // 2
        steps = np.linspace(distinct[0], distinct[-1], half + 1)[:-1]
        mass = np.cumsum(weights)
        ranks = np.searchsorted(mass, np.linspace(0, mass[-1], half + 1)[:-1])
        edges = np.concatenate([np.searchsorted(values, steps), ranks])
        # An edge lies where a value begins, so that equal values are never parted.
        starts = np.unique(np.searchsorted(values, values[np.minimum(edges, len(values) - 1)]))
    bounds = _intervals(values, weights, starts, count)
    levels = np.sort(_centroids(values, weights, bounds))
    return _lloyd(values, weights, levels)


def may_repeat(values: npt.NDArray[np.floating], count: int) -> bool:
    """Whether there may be no more than ``count`` different values; False is certain.

    Args:
        values: Any shape.
        count: Below 4,096.
    """
    flat = values.ravel()
    return len(np.unique(flat[:: max(len(flat) // 4096, 1)])) <= count


def _in_cells(values: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Means and weights of the values in each of :data:`_CELLS` cells, ascending."""
    low, high = float(values.min()), float(values.max())
    cell = ((values - low) * ((_CELLS - 1) / (high - low))).astype(np.int32)
    mass = np.bincount(cell, weights, _CELLS).astype(np.float64)
    moment = np.bincount(cell, weights * values, _CELLS)
    used = mass > 0
    return moment[used] / mass[used], mass[used]


def _intervals(
    values: FloatArray, weights: FloatArray, starts: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.int64]:
    """First places of the best ``count`` intervals whose first places are among ``starts``."""
    centred = values - values.mean()  # sums of squares lose fewer digits
    ends = np.append(starts, len(values))
    sums = [
        np.concatenate([[0.0], np.cumsum(part)])[ends]
        for part in (weights, weights * centred, weights * centred**2)
    ]
    mass, first, second = (s[None, :] - s[:, None] for s in sums)  # [i, j]: from edge i to edge j
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = second - np.where(mass > 0, first**2 / mass, 0.0)
    size = len(ends)
    cost = np.where(np.triu(np.ones((size, size), bool), 1), np.maximum(cost, 0), np.inf)
    count = min(count, size - 1)
    best = cost[0]
    back = np.zeros((count, size), np.int64)
    for m in range(1, count):
        total = best[:, None] + cost
        back[m] = total.argmin(axis=0)
        best = total[back[m], np.arange(size)]
    bounds = np.empty(count, np.int64)
    j = size - 1
    for m in range(count - 1, -1, -1):
        j = int(back[m, j]) if m else 0
        bounds[m] = ends[j]
    return bounds


def _centroids(
    values: FloatArray, weights: FloatArray, bounds: npt.NDArray[np.int64]
) -> FloatArray:
    mass = np.add.reduceat(weights, bounds)
    means = np.add.reduceat(values * weights, bounds) / np.where(mass > 0, mass, 1)
    return np.where(mass > 0, means, values[bounds])


def lloyd(values: FloatArray, weights: FloatArray, start: FloatArray) -> FloatArray:
    """Lloyd's iteration from the levels ``start``; it never raises :func:`clustering_error`.

    Args:
        values: [N].
        weights: [N].
        start: [k].
    """
    order = np.argsort(values, kind="stable")
    return _lloyd(values[order], weights[order], np.sort(start))


def _lloyd(values: FloatArray, weights: FloatArray, levels: FloatArray) -> FloatArray:
    """Of sorted values; a level with no value stays where it is."""
    mass = np.concatenate([[0.0], np.cumsum(weights)])
    moment = np.concatenate([[0.0], np.cumsum(values * weights)])
    for _ in range(_LLOYD_ROUNDS):
        middles = (levels[1:] + levels[:-1]) / 2
        ends = np.concatenate([[0], np.searchsorted(values, middles), [len(values)]])
        heavy = mass[ends[1:]] - mass[ends[:-1]]
        sums = moment[ends[1:]] - moment[ends[:-1]]
        moved = np.sort(np.where(heavy > 0, sums / np.where(heavy > 0, heavy, 1), levels))
        if np.array_equal(moved, levels):
            break
        levels = moved
    return levels
