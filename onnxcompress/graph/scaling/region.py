"""Grow a region of tensors that can be multiplied per channel, from one tensor.

Every tensor of a region has a producer and readers, and each of them must know what to do with the
factors: take them up in a constant, or hand them on to its other tensors (one rule per operator, in
:mod:`onnxcompress.graph.scaling.rules`). Where a product of two computed tensors could take the
factors from either, both are tried. A region that meets a tensor with no such rule does not exist;
the refusal names the node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.scaling.absorb import Absorb, Ids, Region
from onnxcompress.graph.scaling.rules import RefusedError, Step, read_rule, write_rule
from onnxcompress.graph.unions import Unions

_MAX_IDS = 1 << 20
_MAX_VALUES = 400


@dataclass(slots=True)
class _State:
    values: dict[ir.Value, Ids] = field(default_factory=dict)
    absorbs: dict[tuple[ir.Node, int, int], Absorb] = field(default_factory=dict)
    ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    queue: list[ir.Value] = field(default_factory=list)
    units: int = 0

    def copy(self) -> _State:
        return _State(
            dict(self.values), dict(self.absorbs), list(self.ties), list(self.queue), self.units
        )


def find_region(value: ir.Value, axis: int) -> Region | str:
    """The least region in which ``value`` is scaled along ``axis``; or why there is none.

    Args:
        value: A computed tensor of known rank, with a static length along ``axis``.
        axis: Its channel axis.
    """
    shape = value.shape
    if shape is None or not -len(shape) <= axis < len(shape):
        return f"the rank of '{value.name}' is unknown"
    length = shape[axis]
    if not isinstance(length, int) or length < 1:
        return f"'{value.name}' has no fixed number of channels"
    form = [1] * len(shape)
    form[axis] = length
    state = _State(units=length)
    try:
        _add(state, value, np.arange(length, dtype=np.int64).reshape(form))
        return _finished(_grow(state))
    except RefusedError as refusal:
        return str(refusal)


def _grow(state: _State) -> _State:
    """Follow every tensor in the queue to its producer and its readers."""
    while state.queue:
        value = state.queue.pop()
        if value.is_graph_output():
            raise RefusedError(f"'{value.name}' is an output of the model")
        node = value.producer()
        if node is None:
            raise RefusedError(f"'{value.name}' is an input of the model")
        for reader, place in value.uses():
            if reader.graph is not node.graph:
                raise RefusedError(f"'{value.name}' is read inside a branch or a loop body")
            _take(state, read_rule(reader, place, state.values[value]))
        options = write_rule(node, value, state.values[value])
        for step in options[:-1]:
            attempt = state.copy()
            try:
                _take(attempt, step)
                return _grow(attempt)
            except RefusedError:
                continue
        _take(state, options[-1])
    return state


def _take(state: _State, step: Step) -> None:
    for absorb in step.absorbs:
        state.absorbs.setdefault((absorb.node, absorb.place, absorb.power), absorb)
    start = state.units
    for value, ids in step.values:
        state.units = max(state.units, start - int(ids.min(initial=0)))
        _add(state, value, np.where(ids < 0, start - 1 - ids, ids))


def _add(state: _State, value: ir.Value, ids: Ids) -> None:
    known = state.values.get(value)
    if known is None:
        if ids.size > _MAX_IDS or len(state.values) >= _MAX_VALUES:
            raise RefusedError(f"the region around '{value.name}' is too large")
        state.values[value] = ids
        state.queue.append(value)
    elif known.shape == ids.shape:
        if not np.array_equal(known, ids):
            state.ties.append((known, ids))
    else:
        raise RefusedError(f"'{value.name}' would be scaled along different axes")


def _finished(state: _State) -> Region:
    """Number the units that are left when those that meet are one."""
    for value in state.values:
        node = value.producer()
        if node is None or node.op_type != "Mul":
            continue
        if all(operand in state.values for operand in node.inputs):
            raise RefusedError(f"Mul '{node.name}': both its operands would be scaled")
    unions = Unions()
    unions.fresh(state.units)
    for left, right in state.ties:
        unions.tie(left, right)
    roots = unions.solve()
    _, number = np.unique(roots, return_inverse=True)
    number = number.reshape(-1).astype(np.int64)
    return Region(
        {value: number[ids] for value, ids in state.values.items()},
        tuple(
            Absorb(a.node, a.place, number[a.ids], a.power, a.contracts)
            for a in state.absorbs.values()
        ),
        int(number.max(initial=-1)) + 1,
    )
