"""Options of the sparsity pass."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from onnxcompress.errors import UsageError
from onnxcompress.numerics.sparsity import NofM
from onnxcompress.passes.base import PassOptions, option

_PATTERN = re.compile(r"(\d+):(\d+)")


class Importance(enum.Enum):
    """What a weight is worth."""

    AUTO = "auto"
    OBS = "obs"
    ACTIVATION = "activation"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


class Scope(enum.Enum):
    """Which weights compete for staying."""

    GLOBAL = "global"
    LAYER = "layer"


class Store(enum.Enum):
    """How tensors full of zeros are written."""

    AUTO = "auto"
    DENSE = "dense"
    PACKED = "packed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseOptions(PassOptions):
    """Options of :class:`onnxcompress.passes.sparse.SparsePass`."""

    density: float = option(
        0.5, "share of the weights to keep; the others become 0", minimum=0.01, maximum=1.0
    )
    pattern: str = option(
        "", "keep N of every M neighbouring inputs, such as 2:4, in place of density"
    )
    importance: Importance = option(
        Importance.AUTO,
        "what weights are ranked by: obs (what the others cannot make up for), activation (weight "
        "times input, Wanda), magnitude, random; auto: obs where the inputs can be measured, else "
        "magnitude",
    )
    recover: bool = option(True, "let the weights that stay make up for those that go (SparseGPT)")
    scope: Scope = option(
        Scope.GLOBAL,
        "global: layers share one budget, by what outputs lose; layer: the same share in each",
    )
    include: tuple[str, ...] = option(
        (), "treat only weights whose name, or whose node's, matches a pattern (* ? [..])"
    )
    exclude: tuple[str, ...] = option((), "leave weights alone whose name matches a pattern")
    min_elements: int = option(1024, "leave smaller weights alone", minimum=2)
    store: Store = option(
        Store.AUTO,
        "packed: a bit per weight and the values that are left, unpacked at load; dense: zeros are "
        "written out; auto: packed where that is smaller",
    )

    def validate(self, owner: str) -> None:
        """Check bounds and the pattern.

        Raises:
            UsageError: If a value is out of its bounds, or the pattern is not N:M.
        """
        PassOptions.validate(self, owner)
        self.n_of_m(owner)

    def n_of_m(self, owner: str = "sparse") -> NofM | None:
        """The pattern; None when a density is asked for.

        Raises:
            UsageError: If it is not N:M with 0 < N < M.
        """
        if not self.pattern:
            return None
        found = _PATTERN.fullmatch(self.pattern)
        n, m = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < n < m <= 64:
            raise UsageError(
                f"option {owner}.pattern wants N:M with N below M (such as 2:4), "
                f"not '{self.pattern}'"
            )
        return NofM(n, m)
