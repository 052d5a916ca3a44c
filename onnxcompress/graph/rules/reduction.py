"""Reductions: a sum is a contraction without a weight, anything else freezes what it reduces."""

from __future__ import annotations

from onnxcompress.graph.rules.base import (
    Outputs,
    Rule,
    Trace,
    attribute_int,
    constant_ints,
    input_value,
    normal,
)


def _reduce(t: Trace, *, summing: bool) -> Outputs:
    data = t.axes(0)
    if data is None:
        return [None]
    axes = constant_ints(t.node, "axes", 1)
    if axes is None:
        if input_value(t.node, 1) is not None:
            return [None]
        skip = attribute_int(t.node, "noop_with_empty_axes", 0)
        axes = () if skip else tuple(range(len(data)))
    elif not axes and not attribute_int(t.node, "noop_with_empty_axes", 0):
        axes = tuple(range(len(data)))
    reduced = {normal(a, len(data)) for a in axes}
    for axis in reduced:
        if summing:
            t.contract(0, axis)
        else:
            t.freeze(data[axis], f"is reduced by {t.node.op_type}, in which every channel counts")
    if attribute_int(t.node, "keepdims", 1):
        return [tuple(None if i in reduced else labels for i, labels in enumerate(data))]
    return [tuple(labels for i, labels in enumerate(data) if i not in reduced)]


def _reduce_sum(t: Trace) -> Outputs:
    """A channel that is zero adds nothing: ReduceSum, L1, L2, SumSquare and LogSum."""
    return _reduce(t, summing=True)


def _reduce_other(t: Trace) -> Outputs:
    return _reduce(t, summing=False)


REDUCE_SUM = Rule(_reduce_sum)
REDUCE_OTHER = Rule(_reduce_other)
