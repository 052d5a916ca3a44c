"""Operators that treat every position alike, with broadcasting."""

from __future__ import annotations

from collections.abc import Iterable

from onnxcompress.graph.rules.base import Axes, Outputs, Rule, Trace
from onnxcompress.graph.unions import Labels


def broadcast(t: Trace, inputs: Iterable[int]) -> Axes | None:
    """Tie the axes that numpy's broadcasting lines up; axes of length one tie nothing.

    Returns:
        Labels of the result; None if an input is of unknown rank.
    """
    operands: list[tuple[Axes, tuple[int | None, ...]]] = []
    for index in inputs:
        if index >= len(t.node.inputs) or t.node.inputs[index] is None:
            continue
        axes, shape = t.axes(index), t.shape(index)
        if axes is None or shape is None:
            return None
        operands.append((axes, shape))
    rank = max((len(axes) for axes, _ in operands), default=0)
    result: list[Labels | None] = []
    for position in range(-rank, 0):
        meeting = [
            axes[position]
            for axes, shape in operands
            if len(axes) >= -position and shape[position] != 1
        ]
        common = meeting[0] if meeting else None
        for other in meeting[1:]:
            common = t.tie(common, other)
        result.append(common)
    return tuple(result)


def _elementwise(t: Trace) -> Outputs:
    axes = broadcast(t, range(len(t.node.inputs)))
    return [axes] * len(t.node.outputs)


def _first_input(t: Trace) -> Outputs:
    """Clip, Dropout, Cast, ...: only the first input has the shape of the output."""
    return [t.axes(0)] * len(t.node.outputs)


def _prelu(t: Trace) -> Outputs:
    """The slope is broadcast to the input, never the other way round."""
    return [broadcast(t, (0, 1))]


ELEMENTWISE = Rule(_elementwise)
FIRST_INPUT = Rule(_first_input)
PRELU = Rule(_prelu)
