"""The user's limits as goals of a pass, measured on calibration samples with a margin.

The limits are judged at the end on other samples than those that a pass sees, so a pass aims a
little higher:

- SQNR by 1 dB, and 1 - cosine, which is half the noise-to-signal ratio, by the same factor. Over
  the models in ``docs/passes/quant.md`` the outputs keep up to 1 dB less on other samples;
- a share of equal decisions p by the lower end of its Wilson interval of one standard error,

      (p + z²/2n - z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)  >=  limit,    z = 1,

  or no decision at all that differs, which is all that few samples can show;
- a lost top-1 by its standard error on paired samples, ``sqrt(b + c)/n`` with b and c the samples
  that only one of the two models has right. Without labels the top-1 that is lost is at most the
  share of decisions that differ, so that share must keep the limit.

Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from onnxcompress.search.reference import worst_sqnr_db
from onnxcompress.verification.classes import Accuracy, Agreement
from onnxcompress.verification.compare import Comparison
from onnxcompress.verification.gates import Gates, judge

MARGIN_DB = 1.0
_Z = 1.0


@dataclass(frozen=True, slots=True)
class Goals:
    """What a version of a model must keep.

    Attributes:
        gates: The user's limits.
        floor_db: Least SQNR of every floating-point output in any case, in dB, without a margin.
    """

    gates: Gates
    floor_db: float = -math.inf

    def missed(self, found: Comparison) -> tuple[str, ...]:
        """The goals that a version misses, one sentence each; none when it keeps them all.

        Args:
            found: The original against the version.
        """
        if found.fatal:
            return found.fatal
        gates = self.gates
        aimed = replace(gates, min_agreement=None, max_drop=None)
        if aimed.min_sqnr_db is not None:
            aimed = replace(aimed, min_sqnr_db=aimed.min_sqnr_db + MARGIN_DB)
        if aimed.min_cosine is not None and aimed.min_cosine > 0:
            loss = (1.0 - aimed.min_cosine) * 10.0 ** (-MARGIN_DB / 10.0)
            aimed = replace(aimed, min_cosine=1.0 - loss)
        told: list[str] = []
        worst = worst_sqnr_db(found)
        if worst < self.floor_db:
            told.append(f"the outputs keep {worst:.1f} dB, less than {self.floor_db:g} dB")
        if not aimed.are_default:
            outcomes = judge(aimed, found.outputs, found.agreements, found.accuracy)
            told += [str(outcome) for outcome in outcomes if not outcome.passed]
        if gates.min_agreement is not None:
            told += _agreement(gates.min_agreement, found)
        if gates.max_drop is not None:
            told += _drop(gates.max_drop, found)
        return tuple(told)

    def __str__(self) -> str:
        words = {
            "{:g} dB in any case": self.floor_db if math.isfinite(self.floor_db) else None,
            "SQNR >= {:g} dB": self.gates.min_sqnr_db,
            "cosine >= {:g}": self.gates.min_cosine,
            "agreement >= {:g}": self.gates.min_agreement,
            "drop <= {:g}": self.gates.max_drop,
        }
        return ", ".join(text.format(v) for text, v in words.items() if v is not None)


def wilson_low(equal: int, count: int) -> float:
    """Lower end of the Wilson interval of one standard error for ``equal`` of ``count``.

    Raises:
        ValueError: If ``count`` is not positive.
    """
    if count <= 0:
        raise ValueError("a share needs at least one decision")
    p = equal / count
    spread = _Z * math.sqrt(p * (1 - p) / count + _Z**2 / (4 * count**2))
    return max(0.0, (p + _Z**2 / (2 * count) - spread) / (1 + _Z**2 / count))


def _keeps(limit: float, agreement: Agreement) -> bool:
    equal = round(agreement.top1_ratio * agreement.decisions)
    return equal == agreement.decisions or wilson_low(equal, agreement.decisions) >= limit


def _agreement(limit: float, found: Comparison) -> list[str]:
    if not found.agreements:
        gates = Gates(min_agreement=limit)
        return [str(o) for o in judge(gates, found.outputs, (), None) if not o.passed]
    return [
        f"agreement of output '{a.output}' is {a.top1_ratio:.4g} of {a.decisions}, which does not "
        f"assure {limit:g}"
        for a in found.agreements
        if not _keeps(limit, a)
    ]


def _drop(limit: float, found: Comparison) -> list[str]:
    if found.accuracy is None:
        if not found.agreements:
            return ["the drop of top-1 cannot be measured: no output is a classifier's"]
        return _agreement(1.0 - limit, found)
    loss = -found.accuracy.difference_ratio
    if loss + _drop_error(found.accuracy) <= limit + 1e-12 or found.accuracy.only_original == 0:
        return []
    return [f"top-1 drops by {loss:.4g}, which does not assure {limit:g}"]


def _drop_error(accuracy: Accuracy) -> float:
    """Standard error of the paired difference."""
    return math.sqrt(accuracy.only_original + accuracy.only_result) / accuracy.samples
