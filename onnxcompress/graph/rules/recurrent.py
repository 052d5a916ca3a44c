"""RNN, GRU and LSTM: a hidden cell is one unit with a row in every gate.

With ``g`` gates and ``H`` cells, ``W [D, g·H, I]`` and ``R [D, g·H, H]`` hold the rows of cell
``h`` at ``h, H + h, ..., (g - 1)·H + h``; the columns of ``R`` read the cells one step later. Both
directions of a bidirectional layer share the axes of ``W`` and ``R``, so a cell is removed from
both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxcompress.graph.rules.base import (
    Axes,
    Outputs,
    Rule,
    Shrink,
    Trace,
    input_value,
)
from onnxcompress.graph.unions import Labels


def _recurrent(gates: int) -> Callable[[Trace], Outputs]:
    def trace(t: Trace) -> Outputs:
        data, weight, recurrence = t.axes(0) or _of_rank(3, None), t.axes(1), t.axes(2)
        if weight is None or recurrence is None or len(weight) != 3:
            return [None] * len(t.node.outputs)
        cells = recurrence[2]
        if cells is None:
            for labels in (weight[1], recurrence[1]):
                t.freeze(labels, "is the hidden size of a layer with a single or computed cell")
        for axes in (weight, recurrence, t.axes(3), t.axes(7)):
            if axes is not None:
                t.freeze(axes[0], "holds the directions of the layer")
        t.tie(data[2], weight[2])
        t.contract(0, 2, 1, 2)
        t.contract(2, 2, 2, 2)
        t.produce(0, 3, 1, 1)
        t.produce(0, 3, 2, 1)
        cells = _tie_gates(t, cells, gates)
        x, w, r = (t.node.inputs[i] for i in range(3))
        t.macs([(x, 0), (x, 1), (w, 0), (w, 1), (w, 2)])
        t.macs([(x, 0), (x, 1), (r, 0), (r, 1), (r, 2)])
        for labels in data[:2]:
            t.freeze(labels, "is the time or batch axis of a recurrent layer")
        return [_of_rank(4, cells), _of_rank(3, cells), _of_rank(3, cells)][: len(t.node.outputs)]

    return trace


def _of_rank(rank: int, last: Labels | None) -> Axes:
    return (*(None for _ in range(rank - 1)), last)


def _tie_gates(t: Trace, cells: Labels | None, gates: int) -> Labels | None:
    """Tie the rows of all gates, biases, peepholes and initial states to the cells."""
    for index, axis, times in ((1, 1, gates), (2, 1, gates), (3, 1, 2 * gates), (7, 1, 3)):
        if input_value(t.node, index) is None:
            continue
        axes = t.axes(index)
        rows = None if axes is None else axes[axis]
        t.tie(None if cells is None else np.tile(cells, times), rows)
    for index in (5, 6):
        if input_value(t.node, index) is None:
            continue
        axes = t.axes(index)
        if axes is None or axes[2] is None:
            t.freeze(cells, "starts from a state that is an input of the model or computed")
            cells = None
        else:
            cells = t.tie(cells, axes[2])
    return cells


def _shrink_recurrent(s: Shrink) -> None:
    kept = s.input_kept(2, 2)
    if kept is not None and "hidden_size" in s.node.attributes:
        s.set_int("hidden_size", int(kept.sum()))


RNN = Rule(_recurrent(1), _shrink_recurrent)
GRU = Rule(_recurrent(3), _shrink_recurrent)
LSTM = Rule(_recurrent(4), _shrink_recurrent)
