"""Gates: what a result has to reach to be written.

Without any limit of the user's there is a default one, so that a destroyed model never passes in
silence: every classifier-like output agrees with the original on at least half of the samples,
every other floating-point output has a cosine of at least 0.9, and every other output (one whose
values are all NaN or infinite, too) is equal in at least half of its elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxcompress.errors import UsageError
from onnxcompress.verification.classes import Accuracy, Agreement
from onnxcompress.verification.metrics import OutputFidelity

DEFAULT_COSINE = 0.9
DEFAULT_AGREEMENT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Limits that decide whether a result is written. A limit that is None is not asked for.

    Attributes:
        min_sqnr_db: Least SQNR of every floating-point output, in dB.
        min_cosine: Least cosine of every floating-point output, -1 to 1.
        min_agreement: Least top-1 agreement of every classifier-like output, 0 to 1. Where a model
            has none, the least share of equal elements of its integer outputs.
        max_drop: Most top-1 that may be lost on labelled samples, 0 to 1 (0.01 is one point).
        enforced: Whether a missed limit fails the verification; with False it is only reported.
    """

    min_sqnr_db: float | None = None
    min_cosine: float | None = None
    min_agreement: float | None = None
    max_drop: float | None = None
    enforced: bool = True

    def __post_init__(self) -> None:
        bounds = {"min_cosine": (-1.0, 1.0), "min_agreement": (0.0, 1.0), "max_drop": (0.0, 1.0)}
        for name, (low, high) in bounds.items():
            value: float | None = getattr(self, name)
            if value is not None and not low <= value <= high:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} {value:g} must be between {low:g} and {high:g}")
        if self.min_sqnr_db is not None and math.isnan(self.min_sqnr_db):
            raise UsageError("--min-sqnr nan must be a number of dB")

    @property
    def are_default(self) -> bool:
        """Whether the user set no limit."""
        limits = (self.min_sqnr_db, self.min_cosine, self.min_agreement, self.max_drop)
        return all(limit is None for limit in limits)


@dataclass(frozen=True, slots=True)
class GateOutcome:
    """One limit and what was measured against it.

    Attributes:
        name: ``sqnr_db``, ``cosine``, ``agreement``, ``equal`` or ``drop``.
        output: Output name, "" for the whole model.
        limit: The limit.
        measured: What was measured; None when it could not be measured, which fails.
        passed: Whether the limit was kept.
        by_default: Whether it is the default gate's.
    """

    name: str
    output: str
    limit: float
    measured: float | None
    passed: bool
    by_default: bool

    def __str__(self) -> str:
        where = f" of output '{self.output}'" if self.output else ""
        relation = "at most" if self.name == "drop" else "at least"
        if self.measured is None:
            return f"{self.name}{where} cannot be measured; it must be {relation} {self.limit:g}"
        return f"{self.name}{where} is {self.measured:.4g}; it must be {relation} {self.limit:g}"


def judge(
    gates: Gates,
    outputs: Sequence[OutputFidelity],
    agreements: Sequence[Agreement],
    accuracy: Accuracy | None,
) -> tuple[GateOutcome, ...]:
    """Hold what was measured against the limits."""
    if gates.are_default:
        return _default(outputs, agreements)
    made: list[GateOutcome] = []
    floats = [o for o in outputs if o.is_float]
    if gates.min_sqnr_db is not None:
        made += _each("sqnr_db", gates.min_sqnr_db, [(o.name, o.sqnr_db) for o in floats])
    if gates.min_cosine is not None:
        made += _each("cosine", gates.min_cosine, [(o.name, o.cosine) for o in floats])
    if gates.min_agreement is not None:
        made += _agreement(gates.min_agreement, outputs, agreements)
    if gates.max_drop is not None:
        drop = None if accuracy is None else -accuracy.difference_ratio
        output = "" if accuracy is None else accuracy.output
        kept = drop is not None and drop <= gates.max_drop + 1e-12  # 0.3 - 0.1 is not 0.2
        made.append(GateOutcome("drop", output, gates.max_drop, drop, kept, by_default=False))
    return tuple(made)


def _each(
    name: str, limit: float, measured: Sequence[tuple[str, float | None]], *, default: bool = False
) -> list[GateOutcome]:
    """One outcome per output; one that cannot be measured when there is no output of that kind."""
    rows = measured or [("", None)]
    return [
        GateOutcome(name, output, limit, value, value is not None and value >= limit, default)
        for output, value in rows
    ]


def _agreement(
    limit: float, outputs: Sequence[OutputFidelity], agreements: Sequence[Agreement]
) -> list[GateOutcome]:
    if agreements:
        return _each("agreement", limit, [(a.output, a.top1_ratio) for a in agreements])
    whole = [(o.name, o.equal_ratio) for o in outputs if not o.is_float]
    return _each("agreement" if not whole else "equal", limit, whole)


def _default(
    outputs: Sequence[OutputFidelity], agreements: Sequence[Agreement]
) -> tuple[GateOutcome, ...]:
    ratios = {a.output: a.top1_ratio for a in agreements}
    made: list[GateOutcome] = []
    for o in outputs:
        if o.name in ratios:
            made += _each("agreement", DEFAULT_AGREEMENT, [(o.name, ratios[o.name])], default=True)
        elif not o.is_float or (o.cosine is None and o.elements):
            made += _each("equal", DEFAULT_AGREEMENT, [(o.name, o.equal_ratio)], default=True)
        elif o.cosine is not None:
            made += _each("cosine", DEFAULT_COSINE, [(o.name, o.cosine)], default=True)
    return tuple(made)
