"""From labels to units and from units to groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.coupling import Coupling, Cut, Frozen, Group, MacsTerm, Port, Sink, Source
from onnxcompress.graph.rules.base import Axes, weight_of
from onnxcompress.graph.states import State
from onnxcompress.graph.unions import Labels


@dataclass(frozen=True, slots=True)
class Freeze:
    """Labels that have to stay, where and why."""

    labels: Labels
    node: str
    value: str
    axis: int
    reason: str


@dataclass(frozen=True, slots=True)
class Site:
    """A sink or source while labels are still spreading; ``labels`` are those of its positions."""

    node: ir.Node
    data_input: int
    axis: int
    weight_input: int | None
    weight_axis: int | None
    labels: Labels


@dataclass(frozen=True, slots=True)
class Spread:
    """Everything one walk over the graph found.

    Attributes:
        roots: Component of every label.
        births: Initializer, axis and labels.
        axes: Labels of every value.
        freezes: What has to stay.
        sinks: Where channels are summed over; labels on the data axis.
        sources: Where weights make channels; labels on the weight axis.
        macs: Multiply-accumulates.
    """

    roots: Labels
    births: Sequence[tuple[ir.Value, int, Labels]]
    axes: Mapping[ir.Value, Axes | None]
    freezes: Sequence[Freeze]
    sinks: Sequence[Site]
    sources: Sequence[Site]
    macs: Sequence[MacsTerm]

    def frozen_roots(self) -> npt.NDArray[np.bool_]:
        """Which components have to stay, indexed by root."""
        return self._marked(f.labels for f in self.freezes)

    def _marked(self, arrays: Iterator[Labels]) -> npt.NDArray[np.bool_]:
        marked = np.zeros(len(self.roots), dtype=np.bool_)
        for labels in arrays:
            marked[self.roots[labels]] = True
        return marked

    def born_roots(self) -> npt.NDArray[np.bool_]:
        """Which components live on an initializer."""
        return self._marked(labels for _, _, labels in self.births)

    def summed_roots(self) -> npt.NDArray[np.bool_]:
        """Which components are contracted somewhere."""
        return self._marked(site.labels for site in self.sinks)

    def made_roots(self) -> npt.NDArray[np.bool_]:
        """Which components a weight produces."""
        return self._marked(site.labels for site in self.sources)

    def distinct(self) -> list[Labels]:
        """Every label array once, in the order of the graph."""
        arrays = [
            labels for axes in self.axes.values() for labels in axes or () if labels is not None
        ]
        arrays += [site.labels for site in (*self.sinks, *self.sources)]
        return list({id(labels): labels for labels in arrays}.values())


def group_units(spread: Spread, states: Sequence[State] = ()) -> Coupling:
    """Number the units and gather the places where each group lives."""
    frozen, born, summed = spread.frozen_roots(), spread.born_roots(), spread.summed_roots()
    is_unit = born & summed & ~frozen
    number, sizes = _number_units(spread, is_unit)
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    cuts: list[list[Cut]] = [[] for _ in sizes]
    for value, axis, labels in spread.births:
        for group, positions in _by_group(number[spread.roots[labels]], offsets):
            cuts[group].append(Cut(value.name or "", axis, positions))
    sinks: list[list[Sink]] = [[] for _ in sizes]
    for site in spread.sinks:
        for group, positions in _by_group(number[spread.roots[site.labels]], offsets):
            sinks[group].append(Sink(*_place(site), positions))
    sources: list[list[Source]] = [[] for _ in sizes]
    for site in spread.sources:
        for group, positions in _by_group(number[spread.roots[site.labels]], offsets):
            sources[group].append(Source(*_place(site), positions))
    names = _unique(
        [s[0].node if s else c[0].initializer for s, c in zip(sources, cuts, strict=True)]
    )
    groups = tuple(
        Group(
            index=i,
            name=names[i],
            size=size,
            cuts=tuple(cuts[i]),
            sinks=tuple(sinks[i]),
            sources=tuple(sources[i]),
        )
        for i, size in enumerate(sizes)
    )
    axes = _unit_axes(spread, number)
    return Coupling(
        groups,
        _reports(spread, born, summed, frozen),
        axes,
        tuple(spread.macs),
        tuple(p for state in states for p in _ports(state) if p.value in axes),
    )


def _ports(state: State) -> Iterator[Port]:
    for value in state.readers:
        outside = [n.name or "" for n in value.consumers() if n in state.nodes]
        yield Port(state.source.name or "", value.name or "", tuple(outside), writes=False)
    users: dict[ir.Value, list[str]] = {}
    for writer in state.writers:
        names = users.setdefault(writer.value, [])
        if isinstance(writer.user, ir.Node):
            names.append(writer.user.name or "")
    for value, names in users.items():
        yield Port(state.target.name or "", value.name or "", tuple(names), writes=True)


def _unique(names: Sequence[str]) -> list[str]:
    """A node whose channels fall into several groups names them ``node``, ``node:1``, ..."""
    seen: Counter[str] = Counter()
    found: list[str] = []
    for name in names:
        found.append(f"{name}:{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def _number_units(
    spread: Spread, is_unit: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Sort units into groups of equal signature.

    The signature of a unit is how often it occurs on every axis of every tensor. Refining by
    activations too (not only by weights) keeps every axis of the model non-empty as long as every
    group keeps a unit: the halves of a Split are groups of their own where they go different ways.

    Returns:
        Root to unit number (-1 for no unit), counted across groups, and the size of each group.
    """
    klass = np.zeros(len(spread.roots), dtype=np.int64)
    seen = np.full(len(spread.roots), -1, dtype=np.int64)
    total = next_class = 0
    for labels in spread.distinct():
        members = spread.roots[labels]
        members = members[is_unit[members]]
        if not members.size:
            continue
        units, first, counts = np.unique(members, return_index=True, return_counts=True)
        new = seen[units] < 0
        if new.any():
            order = np.argsort(first[new], kind="stable")
            seen[units[new][order]] = total + np.arange(len(order))
            total += len(order)
        pairs = np.stack([klass[units], counts])
        _, inverse = np.unique(pairs, axis=1, return_inverse=True)
        inverse = inverse.reshape(-1)
        next_class += 1
        klass[units] = next_class + inverse
        next_class += int(inverse.max())
    units = np.flatnonzero(is_unit)
    # Groups in the order in which their first unit is seen; units likewise within a group.
    units = units[np.argsort(seen[units], kind="stable")]
    _, first, inverse, counts = np.unique(
        klass[units], return_index=True, return_inverse=True, return_counts=True
    )
    inverse = inverse.reshape(-1)
    rank = np.argsort(np.argsort(first, kind="stable"), kind="stable")
    # A lone unit cannot be removed: something has to stay.
    plural = counts[inverse] > 1
    units, group = units[plural], rank[inverse][plural]
    _, group = np.unique(group, return_inverse=True)
    order = np.argsort(group, kind="stable")
    number = np.full(len(spread.roots), -1, dtype=np.int64)
    number[units[order]] = np.arange(len(units))
    return number, [int(n) for n in np.bincount(group.reshape(-1))]


def _by_group(
    numbers: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Positions of each group on an axis, ``[units, m]``."""
    order = np.argsort(numbers, kind="stable")
    inside = numbers[order]
    order, inside = order[inside >= 0], inside[inside >= 0]
    if not inside.size:
        return
    bounds = np.searchsorted(inside, offsets)
    for group in np.flatnonzero(np.diff(bounds)):
        size = int(offsets[group + 1] - offsets[group])
        yield int(group), order[bounds[group] : bounds[group + 1]].reshape(size, -1)


def _place(site: Site) -> tuple[str, int, int, int | None, str | None, int | None]:
    """The common fields of a sink or source, with the weight traced to its initializer."""
    name: str | None = None
    weight_axis = site.weight_axis
    if site.weight_input is not None and weight_axis is not None:
        traced = weight_of(site.node.inputs[site.weight_input], weight_axis)
        if traced is not None:
            name, weight_axis = traced[0].name, traced[1]
    return site.node.name or "", site.data_input, site.axis, site.weight_input, name, weight_axis


def _unit_axes(
    spread: Spread, number: npt.NDArray[np.int64]
) -> dict[str, tuple[npt.NDArray[np.int64] | None, ...]]:
    numbered: dict[int, npt.NDArray[np.int64] | None] = {}
    for labels in spread.distinct():
        units = number[spread.roots[labels]]
        numbered[id(labels)] = units if (units >= 0).any() else None
    found: dict[str, tuple[npt.NDArray[np.int64] | None, ...]] = {}
    for value, axes in spread.axes.items():
        units_of = tuple(None if a is None else numbered[id(a)] for a in axes or ())
        if any(u is not None for u in units_of):
            found[value.name or ""] = units_of
    return found


def _reports(
    spread: Spread,
    born: npt.NDArray[np.bool_],
    summed: npt.NDArray[np.bool_],
    frozen: npt.NDArray[np.bool_],
) -> tuple[Frozen, ...]:
    """Freezes that cost channels which a weight makes or sums over, each place once."""
    used = summed | spread.made_roots()
    users = _Users(spread)
    found: dict[tuple[str, str, int], tuple[str, list[Labels]]] = {}
    for f in spread.freezes:
        roots = spread.roots[f.labels]
        if f.value and (born[roots] & used[roots]).any():
            found.setdefault((f.node, f.value, f.axis), (f.reason, []))[1].append(roots.ravel())
    for site in spread.sources:
        roots = spread.roots[site.labels]
        if not (summed[roots] | frozen[roots]).any():
            key = site.node.name or "", site.node.outputs[0].name or "", site.axis
            found.setdefault(key, ("is never summed over", []))[1].append(roots.ravel())
    return tuple(
        Frozen(node, axis, value, reason, users.of(np.concatenate(roots)))
        for (node, value, axis), (reason, roots) in found.items()
    )


class _Users:
    """Which nodes make or sum over a component."""

    def __init__(self, spread: Spread) -> None:
        sites = [s for s in (*spread.sources, *spread.sinks) if s.weight_input is not None]
        self._names = [site.node.name or "" for site in sites]
        roots = [np.unique(spread.roots[site.labels]) for site in sites]
        self._roots = np.concatenate(roots) if roots else np.zeros(0, dtype=np.int64)
        self._sites = np.repeat(np.arange(len(sites)), [len(r) for r in roots])

    def of(self, roots: Labels) -> tuple[str, ...]:
        """Names of the nodes, each once."""
        sites = np.unique(self._sites[np.isin(self._roots, roots)])
        return tuple(dict.fromkeys(self._names[i] for i in sites))
