"""Reshape and Flatten: labels follow the carrier factor of every block."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.probe import Dims
from onnxcompress.graph.reshape import Block, Factor, align
from onnxcompress.graph.rules.base import Axes, Outputs, Rule, Shrink, Trace, attribute_int
from onnxcompress.graph.unions import Labels

# A choice is named by its place within the reshape: block number * _STRIDE + factor number.
_STRIDE = 64


def spread(t: Trace) -> Outputs:
    """The rule of Reshape, Flatten and their kin: carry labels from input 0 to output 0."""
    data = t.axes(0)
    shape, new_shape = t.shape(0), t.output_shape(0)
    blocks = _agreed_blocks(t)
    if data is None or shape is None or new_shape is None or blocks is None:
        return [None]
    result: list[Labels | None] = [None] * len(new_shape)
    for number, block in enumerate(blocks):
        if len(block.left) == 1 and len(block.right) == 1:
            result[block.right[0]] = data[block.left[0]]
        elif block.factors is not None:
            _carry(t, data, new_shape, number, block.factors, result)
    return [tuple(result)]


def _agreed_blocks(t: Trace) -> tuple[Block, ...] | None:
    """The blocks, if both probes give the same structure; sizes may differ where dynamic."""
    value = t.node.inputs[0]
    if value is None:
        return None
    found: list[tuple[Block, ...]] = []
    for before, after in zip(t.probes(value), t.probes(t.node.outputs[0]), strict=True):
        known = _known(before), _known(after)
        if known[0] is None or known[1] is None:
            return None
        blocks = align(known[0], known[1])
        if blocks is None:
            return None
        found.append(blocks)
    first, second = found
    return first if [_structure(b) for b in first] == [_structure(b) for b in second] else None


def _known(dims: Dims | None) -> tuple[int, ...] | None:
    if dims is None or any(d is None for d in dims):
        return None
    return tuple(d for d in dims if d is not None)


def _structure(block: Block) -> tuple[object, ...]:
    factors = None if block.factors is None else tuple((f.left, f.right) for f in block.factors)
    return block.left, block.right, factors


def _carry(
    t: Trace,
    data: Axes,
    new_shape: Dims,
    number: int,
    factors: tuple[Factor, ...],
    result: list[Labels | None],
) -> None:
    """Choose the carrier of one block and spread its labels."""
    rejected = t.rejected()
    candidates: list[tuple[int, Labels]] = []
    for index in _preference(t, factors):
        carrier = factors[index]
        labels = data[carrier.left]
        if labels is None or new_shape[carrier.right] is None:
            continue
        if number * _STRIDE + index in rejected:
            continue
        sizes = [f.size for f in factors if f.left == carrier.left]
        place = [i for i, f in enumerate(factors) if f.left == carrier.left].index(index)
        if math.prod(sizes) == len(labels):
            rows = np.moveaxis(labels.reshape(sizes), place, 0).reshape(carrier.size, -1)
            candidates.append((index, rows))
    if not candidates:
        return
    # A carrier that ties nothing new (the heads of a merged batch·heads axis) comes first.
    index, rows = next((c for c in candidates if (c[1] == c[1][:, :1]).all()), candidates[0])
    labels = data[factors[index].left]
    t.tie(rows, rows[:, :1])
    t.drop(labels)
    right = factors[index].right
    outer = math.prod(f.size for f in factors[:index] if f.right == right)
    inner = math.prod(f.size for f in factors[index + 1 :] if f.right == right)
    result[right] = np.tile(np.repeat(rows[:, 0], inner), outer)
    t.chose(number * _STRIDE + index, rows, last=len(candidates) == 1)


def _preference(t: Trace, factors: tuple[Factor, ...]) -> Iterator[int]:
    """Outermost first: heads. Innermost first: the dimensions of a head."""
    order = range(len(factors))
    yield from reversed(order) if t.head_dims else order


def shrink_reshape(s: Shrink) -> None:
    """Write the new lengths of touched axes into the target; ``-1`` follows by itself."""
    y = s.node.outputs[0]
    old = constant_of(s.node.inputs[1])
    entries: dict[int, int] = {}
    for axis in range(s.rank(y)):
        entry = None if old is None else int(old[axis])
        kept, before = s.kept(y, axis), s.input_kept(0, axis)
        if entry == -1:
            continue
        if kept is not None:
            entries[axis] = int(kept.sum())
        elif before is not None and entry == 0 and not attribute_int(s.node, "allowzero", 0):
            # A 0 copies an input length that shrinks while this axis does not.
            entries[axis] = len(before)
    s.patch(1, "shape", entries)


RESHAPE = Rule(spread, shrink_reshape)
FLATTEN = Rule(spread)
