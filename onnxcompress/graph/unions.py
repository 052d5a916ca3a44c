"""Union-find over integer labels, a whole array of unions at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]


class Unions:
    """Hands out labels, collects unions and solves them all at once.

    Labels are ``0 .. count - 1``. Unions are only recorded; :meth:`solve` finds the connected
    components by pointer jumping: every pass hooks the larger root of each edge under the smaller
    one and then halves all paths, so the number of passes grows with the logarithm of the longest
    chain (Shiloach and Vishkin 1982).
    """

    def __init__(self) -> None:
        self._count = 0
        self._left: list[Labels] = []
        self._right: list[Labels] = []

    @property
    def count(self) -> int:
        """Number of labels handed out."""
        return self._count

    def fresh(self, size: int) -> Labels:
        """``size`` new labels, each a component of its own."""
        start = self._count
        self._count += size
        return np.arange(start, self._count, dtype=np.int64)

    def tie(self, left: Labels, right: Labels) -> None:
        """Unite ``left[i]`` with ``right[i]`` (broadcast) for every ``i``."""
        if left is right:
            return
        left, right = np.broadcast_arrays(left, right)
        self._left.append(left.ravel())
        self._right.append(right.ravel())

    def solve(self) -> Labels:
        """The root of every label, ``[count]``: the smallest label of its component."""
        root = np.arange(self._count, dtype=np.int64)
        if not self._left:
            return root
        left, right = np.concatenate(self._left), np.concatenate(self._right)
        while True:
            a, b = root[left], root[right]
            open_edges = a != b
            if not open_edges.any():
                return root
            left, right = left[open_edges], right[open_edges]
            a, b = a[open_edges], b[open_edges]
            np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
            while True:
                shorter = root[root]
                if np.array_equal(shorter, root):
                    break
                root = shorter
