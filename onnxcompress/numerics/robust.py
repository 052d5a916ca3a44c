"""The mean of a few measurements of which single ones may be far off.

Of ``n`` values the ``g = floor(n / 5)`` least and greatest are left out of the mean. Its error
follows from the values with those moved to the ends of the rest (winsorized),

    error = s_w / ((1 - 2 g / n) sqrt(n)),

``s_w`` their standard deviation. It is that of a t distribution with ``n - 2 g - 1`` degrees of
freedom.

Source: Tukey and McLaughlin 1963, "Less vulnerable confidence and significance procedures for
location based on a single sample: trimming/winsorization 1".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean.

    Attributes:
        value: The mean.
        error: Its standard error; infinite for a single measurement.
    """

    value: float
    error: float


def trimmed_mean(values: Sequence[float]) -> Estimate:
    """The mean without one in five at either end.

    Args:
        values: At least one measurement.
    """
    count = len(values)
    cut = count // 5
    kept = sorted(values)[cut : count - cut]
    value = float(np.mean(kept))
    if count < 2:
        return Estimate(value, math.inf)
    spread = float(np.std(np.clip(values, kept[0], kept[-1]), ddof=1))
    return Estimate(value, spread / ((1.0 - 2.0 * cut / count) * math.sqrt(count)))
