"""What a user can say about pruning."""

from __future__ import annotations

import enum
import fnmatch
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from onnxcompress.errors import UsageError
from onnxcompress.passes.base import PassOptions, option

DEFAULT_KEPT = 0.8
"""Fraction of the MACs kept when the user names no budget."""
MILDER_KEPT = 0.9
"""The same where that costs a lot and other passes follow."""

ROUND_SHARE = 0.2
"""Part of a group that goes in one round where ``keep`` alone says what goes."""


class Importance(enum.Enum):
    """How the units to remove are chosen."""

    AUTO = "auto"
    OBS = "obs"
    ACTIVATION = "activation"
    L1 = "l1"
    L2 = "l2"
    GEOMETRIC_MEDIAN = "geometric_median"
    RANDOM = "random"

    @property
    def needs_data(self) -> bool:
        """Whether the criterion looks at activations."""
        return self in {Importance.OBS, Importance.ACTIVATION}


class Price(enum.Enum):
    """What a budget of multiply-accumulates is spent for."""

    TIME = "time"
    MACS = "macs"


class Measure(enum.Enum):
    """What a budget counts."""

    MACS = "macs"
    PARAMS = "params"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be left of the model.

    Attributes:
        measure: What is counted.
        kept: Fraction of it that may stay, in (0, 1].
    """

    measure: Measure
    kept: float


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of some groups stays.

    Attributes:
        pattern: What a node or weight that makes the units is called; wildcards.
        kept: Fraction of the units, in [0, 1].
    """

    pattern: str
    kept: float

    def matches(self, names: Collection[str]) -> bool:
        """Whether any of ``names`` fits."""
        return bool(fnmatch.filter(names, self.pattern))


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions(PassOptions):
    """Options of :class:`~onnxcompress.passes.prune.PrunePass`."""

    macs: float | None = option(
        None,
        f"Fraction of the multiply-accumulates to keep; {DEFAULT_KEPT} when no budget is given.",
        minimum=0.01,
        maximum=1.0,
    )
    params: float | None = option(
        None, "Fraction of the parameters to keep, instead of macs.", minimum=0.01, maximum=1.0
    )
    bytes: float | None = option(
        None,
        "Fraction of the bytes of weights to keep, instead of macs.",
        minimum=0.01,
        maximum=1.0,
    )
    latency: float | None = option(
        None,
        "Fraction of the time of a run to keep, measured on this machine (one sample, one "
        "thread), instead of macs.",
        minimum=0.01,
        maximum=1.0,
    )
    importance: Importance = option(
        Importance.AUTO,
        "How units are chosen: obs, activation, l1, l2, geometric_median or random; auto is obs "
        "with calibration data and l2 without.",
    )
    recover: bool = option(
        True,
        "Refit the layers that lost inputs, or are added to a shortcut that did, to the "
        "original's outputs (needs calibration).",
    )
    recover_all: bool = option(
        True, "Refit every layer behind a removal; false: only those that lost inputs."
    )
    joint: bool = option(
        True,
        "Fit the layers before and behind removed channels together where only activations, a "
        "Concat and a MaxPool lie between them.",
    )
    rounds: int = option(
        0,
        "Steps in which the budget is spent; after each, layers are refitted and units ranked "
        "anew. 0 takes one, and without a budget one for each fifth that prune.keep lets go.",
        minimum=0,
        maximum=100,
    )
    plans: int = option(
        16,
        "Ways of spending the budget that are refitted quickly and compared on held-out samples; "
        "each learns from those before. 1 takes the one of the least summed loss. Fewer (4 at "
        "least) are compared where runs of the model are much work.",
        minimum=1,
        maximum=1000,
    )
    align: int = option(
        0,
        "Keep channel counts that are multiples of this; 0 is the target's own step, smaller for "
        "narrow layers.",
        minimum=0,
        maximum=1024,
    )
    min_kept: float = option(
        0.125, "Fraction of the units of every group that always stays.", minimum=0.0, maximum=1.0
    )
    price: Price = option(
        Price.TIME,
        "What a budget of macs or latency is spent for: time (plans made for kernels that compute "
        "channels in blocks compete, and time counts beside the error), or macs alone.",
    )
    branches: bool = option(
        True,
        "Let whole groups go where the model can do without, so that residual branches disappear; "
        "limits protects what it names.",
    )
    include: tuple[str, ...] = option(
        (), "Prune only channels made by a node or weight of one of these names (wildcards *, ?)."
    )
    exclude: tuple[str, ...] = option(
        (), "Leave channels alone that a node or weight of one of these names makes (wildcards)."
    )
    states: bool = option(
        True,
        "Prune cells of recurrent states that are inputs and outputs of the model too; its "
        "interface stays, removed cells are written as zeros.",
    )
    limits: tuple[str, ...] = option(
        (),
        "Fractions that stay in place of min_kept, as PATTERN:FRACTION of a node or weight that "
        "makes the channels (conv1*:0.5).",
    )
    keep: tuple[str, ...] = option(
        (),
        "Fractions that stay exactly, outside of any budget, as PATTERN:FRACTION of a node or "
        "weight that makes the channels (*intermediate*:0.5).",
    )
    total: tuple[str, ...] = option(
        (),
        "Fractions that stay of all channels that match together, spread over them by measured "
        "loss, outside of any other budget; PATTERN:FRACTION (*intermediate*:0.5).",
    )
    ridge: float = option(
        0.0,
        "Pull towards the original weights, relative to the mean variance of a layer's inputs; 0 "
        "chooses it on held-out samples.",
        minimum=0.0,
    )
    samples: int = option(1024, "Calibration samples to use at most; 0 uses all.", minimum=0)

    @property
    def asks_for_budget(self) -> bool:
        """Whether the user named a budget."""
        return self.latency is not None or any(
            getattr(self, measure.value) is not None for measure in Measure
        )

    @property
    def budget(self) -> Budget | None:
        """The one budget that is set, else the default, but none beside ``keep`` or ``total``.

        A latency is planned for in MACs.
        """
        if self.latency is not None:
            return Budget(Measure.MACS, self.latency)
        for measure in Measure:
            kept = getattr(self, measure.value)
            if kept is not None:
                return Budget(measure, kept)
        return None if self.keep or self.total else Budget(Measure.MACS, DEFAULT_KEPT)

    @property
    def steps(self) -> int:
        """The number of rounds: as given; else one, or as many as ``keep`` needs."""
        if self.rounds or self.budget is not None or not self.keep:
            return self.rounds or 1
        least = min(limit.kept for limit in self.parsed_keep)
        return max(1, math.ceil((1 - least) / ROUND_SHARE - 1e-9))

    @property
    def compares_plans(self) -> bool:
        """Whether there is a budget that can be spent in several ways, and they can be compared."""
        spread = self.budget is not None or bool(self.total)
        return self.recover and spread and self.latency is None

    @property
    def parsed_limits(self) -> tuple[Limit, ...]:
        """The entries of ``limits``; valid once :meth:`validate` has passed."""
        return _parsed(self.limits)

    @property
    def parsed_keep(self) -> tuple[Limit, ...]:
        """The entries of ``keep``; valid once :meth:`validate` has passed."""
        return _parsed(self.keep)

    @property
    def parsed_total(self) -> tuple[Limit, ...]:
        """The entries of ``total``; valid once :meth:`validate` has passed."""
        return _parsed(self.total)

    @property
    def patterns(self) -> tuple[str, ...]:
        """All name patterns; each must fit something."""
        limits = (*self.parsed_limits, *self.parsed_keep, *self.parsed_total)
        return (*self.include, *self.exclude, *(limit.pattern for limit in limits))

    def validate(self, owner: str) -> None:
        """Check the bounds, and that no more than one budget is set.

        Raises:
            UsageError: If an option is out of its bounds or two budgets are set.
        """
        PassOptions.validate(self, owner)
        for name in ("limits", "keep", "total"):
            for entry in getattr(self, name):
                _check_limit(f"{owner}.{name}", entry)
        names = [*(m.value for m in Measure), "latency"]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(
                f"pass '{owner}' takes one budget, not {' and '.join(given)}",
                hint=f"Set one of {', '.join(names)}.",
            )


def _parsed(entries: Iterable[str]) -> tuple[Limit, ...]:
    parts = [entry.rpartition(":") for entry in entries]
    return tuple(Limit(pattern, float(kept)) for pattern, _, kept in parts)


def _check_limit(name: str, entry: str) -> None:
    pattern, _, kept = entry.rpartition(":")
    try:
        fits = bool(pattern) and 0.0 <= float(kept) <= 1.0
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(
            f"option {name}: '{entry}' is not PATTERN:FRACTION",
            hint="Write for example conv1*:0.5 for half of what conv1* makes.",
        )
