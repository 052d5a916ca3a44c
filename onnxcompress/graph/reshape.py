"""Reshape: which axis of the result carries the channels of which axis of the input.

A reshape regroups the digits of a mixed-radix number, the flat index. Reading both shapes from the
left, axes fall into blocks of equal product: ``[B, S, 384] -> [B, S, 12, 32]`` has the blocks
``B|B``, ``S|S`` and ``384|12·32``. Within a block both sides are refined to common factors, here 12
and 32. Channels survive a block only along *one* factor, the carrier: with 12 as the carrier whole
heads can go, with 32 the same dimension of every head. Positions that differ in another factor
become one unit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Factor:
    """A common factor of both sides of a block.

    Attributes:
        size: Its length, above 1.
        left: Axis of the input that it is part of.
        right: Axis of the output that it is part of.
    """

    size: int
    left: int
    right: int


@dataclass(frozen=True, slots=True)
class Block:
    """A smallest run of axes with equal products on both sides; axes of length 1 are left out.

    Attributes:
        left: Axes of the input.
        right: Axes of the output.
        factors: Common factors, outermost first; None if the sides have no common refinement
            (``[6, 4] -> [8, 3]``).
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    factors: tuple[Factor, ...] | None


def align(left: Sequence[int], right: Sequence[int]) -> tuple[Block, ...] | None:
    """Split a reshape into blocks.

    Args:
        left: Concrete shape before.
        right: Concrete shape after.

    Returns:
        The blocks, outermost first; None if a length is 0 or the numbers of elements differ.
    """
    if math.prod(left) != math.prod(right) or 0 in left:
        return None
    ends = [_ends(side) for side in (left, right)]
    common = sorted(ends[0].keys() & ends[1].keys())
    blocks: list[Block] = []
    start = 1
    for end in common:
        inside = [{e: axis for e, axis in side.items() if start < e <= end} for side in ends]
        blocks.append(_block(inside[0], inside[1], start))
        start = end
    return tuple(blocks)


def _ends(shape: Sequence[int]) -> dict[int, int]:
    """Product of the lengths up to and with an axis, to that axis; axes of length 1 left out."""
    products = itertools.accumulate(shape, lambda a, b: a * b)
    return {end: axis for axis, end in enumerate(products) if shape[axis] != 1}


def _block(left: dict[int, int], right: dict[int, int], start: int) -> Block:
    factors: list[Factor] = []
    previous = start
    for end in sorted(left.keys() | right.keys()):
        if end % previous:
            return Block(tuple(left.values()), tuple(right.values()), None)
        factors.append(Factor(end // previous, _holder(left, end), _holder(right, end)))
        previous = end
    return Block(tuple(left.values()), tuple(right.values()), tuple(factors))


def _holder(side: dict[int, int], end: int) -> int:
    """The axis that the digits up to ``end`` belong to."""
    return side[min(e for e in side if e >= end)]
