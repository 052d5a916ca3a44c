"""Which groups the user's name patterns mean, and what the patterns say about them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxcompress.errors import PassError, UsageError
from onnxcompress.graph.coupling import Group
from onnxcompress.numerics.allocation import Curve, allocate
from onnxcompress.passes.prune.options import Limit, PruneOptions


def width_of(group: Group) -> int:
    """Channels per unit, where the units are made."""
    places = group.sources or group.sinks
    return int(places[0].positions.shape[1]) if places else 1


def noun(group: Group) -> str:
    """What the units of a group are called in reports."""
    width = width_of(group)
    return "channels" if width == 1 else f"blocks of {width} channels"


def names_of(group: Group) -> set[str]:
    """What a name pattern can match: the layers that make the units, and their weights."""
    made = {(s.weight, s.weight_axis) for s in group.sources}
    cuts = {c.initializer for c in group.cuts if (c.initializer, c.axis) in made}
    return {group.name, *(s.node for s in group.sources), *cuts}


def filtered(groups: Sequence[Group], options: PruneOptions) -> tuple[list[Group], list[Group]]:
    """Groups that the name patterns let through, and the others.

    Raises:
        UsageError: If a pattern matches nothing.
    """
    matched = {
        pattern: {g.index for g in groups if fnmatch.filter(names_of(g), pattern)}
        for pattern in options.patterns
    }
    for pattern, found in matched.items():
        if not found:
            raise UsageError(
                f"the pattern '{pattern}' of the pass 'prune' matches nothing that can be pruned",
                hint="Use --dry-run to see the groups and their names.",
            )
    wanted = {i for p in options.include for i in matched[p]}
    unwanted = {i for p in options.exclude for i in matched[p]}
    keep = [
        g for g in groups if g.index not in unwanted and (not options.include or g.index in wanted)
    ]
    return keep, [g for g in groups if g not in keep]


def fixed(groups: Sequence[Group], options: PruneOptions) -> dict[int, float]:
    """Group to the fraction of it that ``prune.keep`` says stays; of several the largest."""
    named = {
        g.index: [limit.kept for limit in options.parsed_keep if limit.matches(names_of(g))]
        for g in groups
    }
    return {index: max(kept) for index, kept in named.items() if kept}


@dataclass(frozen=True, slots=True)
class Total:
    """Groups that share one count of channels.

    Attributes:
        limit: What ``prune.total`` says.
        groups: The groups it means.
    """

    limit: Limit
    groups: tuple[Group, ...]

    def left(self, counts: Mapping[int, int]) -> float:
        """The fraction of the channels that is left without ``counts`` units of each group."""
        whole = sum(g.size * width_of(g) for g in self.groups)
        gone = sum(counts.get(g.index, 0) * width_of(g) for g in self.groups)
        return 1 - gone / whole

    def settled(self, curves: Sequence[Curve], part: float) -> list[Curve]:
        """The curves, those of its groups with no choice but the one made here.

        Args:
            curves: What there is to remove.
            part: How much of what is to go may go by now, in (0, 1].

        Raises:
            PassError: If not as much may go.
        """
        own = {g.index for g in self.groups}
        mine = [c for c in curves if c.group in own]
        kept = 1 - (1 - self.limit.kept) * part
        counts = allocate(mine, self.left, kept + 1e-9, exchange=True)
        if part == 1 and self.left(counts) > kept + 1e-9:
            raise PassError(
                "prune",
                f"total={self.limit.pattern}:{self.limit.kept:g} cannot be reached: with all that "
                f"may go removed, {self.left(counts):.3f} is left",
                hint="Ask for more, or lower prune.min_kept or prune.align.",
            )
        return [
            Curve(c.group, (counts[c.group],), (c.loss(counts[c.group]),)) if c.group in own else c
            for c in curves
        ]


def totals_of(
    groups: Sequence[Group], limits: Sequence[Limit], apart: Mapping[int, float]
) -> tuple[Total, ...]:
    """The groups of each entry of ``prune.total``; of several that fit the first counts.

    Args:
        groups: All groups.
        limits: The entries.
        apart: Groups that ``prune.keep`` names, by index: they are not meant.
    """
    found: list[Total] = []
    taken = set(apart)
    for limit in limits:
        own = tuple(g for g in groups if g.index not in taken and limit.matches(names_of(g)))
        taken.update(g.index for g in own)
        if own:
            found.append(Total(limit, own))
    return tuple(found)
