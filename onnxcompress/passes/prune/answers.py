"""The original's answers that a layer is fitted to, kept for other fits from the same samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floating = npt.NDArray[np.floating]


@dataclass(slots=True)
class Answers:
    """Rows of one value of the original, run by run.

    Attributes:
        there: Rows there were to choose from, for each run.
        rows: Those drawn, [k, O] each.
        whole: Whether all runs are in it.
    """

    there: list[int] = field(default_factory=list)
    rows: list[Floating] = field(default_factory=list)
    whole: bool = False

    def add(self, there: int, rows: Floating) -> None:
        """Keep those of one more run."""
        self.there.append(there)
        self.rows.append(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(r.nbytes for r in self.rows)
