"""Blocks and factors of a reshape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.graph.reshape import Block, Factor, align


def test_split_of_an_axis() -> None:
    assert align((211, 223, 384), (211, 223, 12, 32)) == (
        Block((0,), (0,), (Factor(211, 0, 0),)),
        Block((1,), (1,), (Factor(223, 1, 1),)),
        Block((2,), (2, 3), (Factor(12, 2, 2), Factor(32, 2, 3))),
    )


def test_merge_with_a_dynamic_axis() -> None:
    (block,) = align((9, 211, 32), (9 * 211 * 4, 8)) or ()
    assert block.factors == (
        Factor(9, 0, 0), Factor(211, 1, 0), Factor(4, 2, 0), Factor(8, 2, 1),
    )  # fmt: skip


def test_axes_of_length_one_belong_nowhere() -> None:
    assert align((1, 6, 1), (6, 1)) == (Block((1,), (0,), (Factor(6, 1, 0),)),)


def test_sides_without_common_factors() -> None:
    (block,) = align((6, 4), (8, 3)) or ()
    assert block.factors is None
    assert (block.left, block.right) == ((0, 1), (0, 1))


@pytest.mark.parametrize(("left", "right"), [((2, 3), (7,)), ((0, 3), (0, 3))])
def test_nothing_to_align(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    assert align(left, right) is None


@given(
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=6),
    left=st.integers(0, 31),
    right=st.integers(0, 31),
)
def test_factors_say_where_every_digit_goes(sizes: list[int], left: int, right: int) -> None:
    """The digits of a flat index are the same on both sides, axis by axis."""
    shapes = [_merge(sizes, cuts) for cuts in (left, right)]
    blocks = align(*shapes)
    assert blocks is not None
    flat = np.arange(int(np.prod(sizes)))
    for side, shape in zip(("left", "right"), shapes, strict=True):
        factors = [f for b in blocks for f in b.factors or ()]
        assert all(b.factors is not None for b in blocks)
        digits = np.unravel_index(flat, [f.size for f in factors])
        expected = np.unravel_index(flat, shape)
        for axis, wanted in enumerate(expected):
            got = np.zeros_like(flat)
            for factor, digit in zip(factors, digits, strict=True):
                if getattr(factor, side) == axis:
                    got = got * factor.size + digit
            np.testing.assert_array_equal(got, wanted)


def _merge(sizes: list[int], cuts: int) -> tuple[int, ...]:
    """Multiply neighbours together except where a bit of ``cuts`` is set."""
    shape = [sizes[0]]
    for i, size in enumerate(sizes[1:]):
        if cuts >> i & 1:
            shape.append(size)
        else:
            shape[-1] *= size
    return tuple(shape)
