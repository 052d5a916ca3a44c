"""What a user can say about factorization."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from onnxcompress.errors import UsageError
from onnxcompress.numerics.low_rank import Form
from onnxcompress.passes.base import PassOptions, option
from onnxcompress.passes.prune.options import Budget, Measure

DEFAULT_KEPT = 0.75
"""Fraction of the parameters kept when the user asks for nothing else."""


class Objective(enum.Enum):
    """What a factorization is for."""

    AUTO = "auto"
    SIZE = "size"
    LATENCY = "latency"


class Forms(enum.Enum):
    """Which chains a convolution may become."""

    AUTO = "auto"
    OUTPUT = "output"
    INPUT = "input"
    SPATIAL = "spatial"
    TUCKER = "tucker"

    def allows(self, form: Form) -> bool:
        """Whether ``form`` may be used."""
        return self is Forms.AUTO or self.value == form.value


@dataclass(frozen=True, slots=True, kw_only=True)
class SvdOptions(PassOptions):
    """Options of :class:`~onnxcompress.passes.svd.SvdPass`."""

    params: float | None = option(
        None,
        f"Fraction of the model's parameters to keep; {DEFAULT_KEPT} when nothing else is asked.",
        minimum=0.01,
        maximum=1.0,
    )
    macs: float | None = option(
        None,
        "Fraction of the multiply-accumulates to keep, instead of params.",
        minimum=0.01,
        maximum=1.0,
    )
    bytes: float | None = option(
        None,
        "Fraction of the bytes of weights to keep, instead of params.",
        minimum=0.01,
        maximum=1.0,
    )
    energy: float | None = option(
        None,
        "No budget: per node the smallest chain that keeps this fraction of the energy of the "
        "node's outputs.",
        minimum=0.0,
        maximum=1.0,
    )
    rank: tuple[str, ...] = option(
        (), "No budget: ranks by node or weight name, as PATTERN:RANK (wildcards *, ?)."
    )
    whiten: bool = option(
        True,
        "Truncate what matters least for the inputs seen in calibration; false: plain singular "
        "values of the weights.",
    )
    recover: bool = option(
        True,
        "Refit the factors, in the order of the data, to the original's outputs (needs "
        "calibration).",
    )
    recover_all: bool = option(
        True, "Also refit the layers behind a factorized one that stay whole."
    )
    objective: Objective = option(
        Objective.AUTO,
        "size: factorize wherever it saves; latency: only where it is faster by the clock; auto: "
        "latency for a budget of macs, else size.",
    )
    form: Forms = option(
        Forms.AUTO,
        "How convolutions are split: output (kxk then 1x1), input (1x1 then kxk), spatial (kx1 "
        "then 1xk), tucker (1x1, kxk, 1x1); auto takes the best per node.",
    )
    embeddings: bool = option(True, "Also factorize the tables that Gather reads.")
    align: int = option(
        0,
        "Ranks that are multiples of this; 0 is the target's own step (a quarter of it where size "
        "alone counts), smaller for narrow layers.",
        minimum=0,
        maximum=1024,
    )
    include: tuple[str, ...] = option(
        (), "Factorize only nodes whose name, or whose weight's name, matches (wildcards *, ?)."
    )
    exclude: tuple[str, ...] = option(
        (), "Leave nodes alone whose name, or whose weight's name, matches (wildcards)."
    )
    ridge: float = option(
        0.0,
        "Pull towards the original weights, relative to the mean variance of a layer's inputs; 0 "
        "chooses it on held-out samples.",
        minimum=0.0,
    )
    samples: int = option(512, "Calibration samples to use at most; 0 uses all.", minimum=0)

    @property
    def asks_for_budget(self) -> bool:
        """Whether the user named a budget."""
        return any(getattr(self, measure.value) is not None for measure in Measure)

    @property
    def budget(self) -> Budget | None:
        """The budget; the default one if nothing is asked, None if energy or ranks decide."""
        for measure in Measure:
            kept = getattr(self, measure.value)
            if kept is not None:
                return Budget(measure, kept)
        if self.energy is not None or self.rank:
            return None
        return Budget(Measure.PARAMS, DEFAULT_KEPT)

    @property
    def for_latency(self) -> bool:
        """Whether the clock has a say."""
        if self.objective is Objective.AUTO:
            return self.macs is not None
        return self.objective is Objective.LATENCY

    @property
    def ranks(self) -> tuple[tuple[str, int], ...]:
        """Pairs of a name pattern and a rank."""
        pairs = (item.rpartition(":") for item in self.rank)
        return tuple((pattern, int(number)) for pattern, _, number in pairs)

    def validate(self, owner: str) -> None:
        """Check the bounds, the form of ``rank`` and that one thing decides the ranks.

        Raises:
            UsageError: If an option is out of its bounds, malformed, or contradicts another.
        """
        PassOptions.validate(self, owner)
        for item in self.rank:
            pattern, _, number = item.rpartition(":")
            if not pattern or not number.isdecimal() or int(number) < 1:
                raise UsageError(
                    f"option {owner}.rank wants PATTERN:RANK, not '{item}'",
                    hint="For example svd.rank=layer1*:32,classifier:64.",
                )
        given = [m.value for m in Measure if getattr(self, m.value) is not None]
        given += ["energy"] if self.energy is not None else []
        given += ["rank"] if self.rank else []
        if len(given) > 1:
            raise UsageError(
                f"pass '{owner}' takes one rule for its ranks, not {' and '.join(given)}",
                hint="Set one of params, macs, bytes, energy and rank.",
            )
