"""Operators that only move data: the same movement is applied to the label arrays."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.rules.base import (
    Axes,
    Outputs,
    Rule,
    Shrink,
    Trace,
    attribute_int,
    attribute_ints,
    constant_ints,
    input_value,
    normal,
)
from onnxcompress.graph.unions import Labels

# --- whole axes ----------------------------------------------------------------------------


def _transpose(t: Trace) -> Outputs:
    data = t.axes(0)
    if data is None:
        return [None]
    perm = attribute_ints(t.node, "perm") or tuple(reversed(range(len(data))))
    return [tuple(data[p] for p in perm)]


def _squeeze(t: Trace) -> Outputs:
    data, shape = t.axes(0), t.shape(0)
    if data is None or shape is None:
        return [None]
    axes = constant_ints(t.node, "axes", 1)
    if axes is None:
        after = t.output_shape(0)
        gone = {i for i, d in enumerate(shape) if d == 1}
        if after is None or len(after) != len(shape) - len(gone):
            return [None]
    else:
        gone = {normal(a, len(data)) for a in axes}
    return [tuple(labels for i, labels in enumerate(data) if i not in gone)]


def _unsqueeze(t: Trace) -> Outputs:
    data = t.axes(0)
    axes = constant_ints(t.node, "axes", 1)
    if data is None or axes is None:
        return [None]
    rank = len(data) + len(axes)
    new = {normal(a, rank) for a in axes}
    rest = iter(data)
    return [tuple(None if i in new else next(rest) for i in range(rank))]


# --- joining and splitting -----------------------------------------------------------------


def _concat(t: Trace) -> Outputs:
    operands = [(t.axes(i), t.shape(i)) for i in range(len(t.node.inputs))]
    known = [(axes, shape) for axes, shape in operands if axes is not None and shape is not None]
    if len(known) != len(operands) or not known:
        return [None]
    rank = len(known[0][0])
    along = normal(attribute_int(t.node, "axis", 0), rank)
    result: list[Labels | None] = []
    for axis in range(rank):
        parts = [axes[axis] for axes, _ in known]
        if axis != along:
            common = parts[0]
            for part in parts[1:]:
                common = t.tie(common, part)
            result.append(common)
            continue
        lengths = [shape[axis] for _, shape in known]
        if any(n is None for n in lengths) or all(p is None for p in parts):
            result.append(None)
            continue
        result.append(
            np.concatenate(
                [t.fixed(n or 0) if p is None else p for p, n in zip(parts, lengths, strict=True)]
            )
        )
    return [tuple(result)]


def _split(t: Trace) -> Outputs:
    data, count = t.axes(0), len(t.node.outputs)
    if data is None:
        return [None] * count
    along = normal(attribute_int(t.node, "axis", 0), len(data))
    labels = data[along]
    if labels is None:
        return [data] * count
    shapes = [t.output_shape(i) for i in range(count)]
    sizes = [None if shape is None else shape[along] for shape in shapes]
    if any(n is None for n in sizes) or sum(n or 0 for n in sizes) != len(labels):
        return [None] * count
    ends = np.cumsum([n or 0 for n in sizes])
    parts = np.split(labels, ends[:-1])
    return [(*data[:along], part, *data[along + 1 :]) for part in parts]


def _shrink_split(s: Shrink) -> None:
    along = normal(attribute_int(s.node, "axis", 0), s.rank(s.node.inputs[0]))
    if s.input_kept(0, along) is None:
        return
    before = s.input_kept(0, along)
    assert before is not None  # noqa: S101 - tested above
    sizes = _split_sizes(s, len(before))
    bounds = np.cumsum([0, *sizes])
    left = [int(before[a:b].sum()) for a, b in itertools.pairwise(bounds)]
    s.node.attributes.pop("num_outputs", None)
    if s.opset < 13:
        s.set_ints("split", left)
    else:
        s.set_constant(1, "split", np.array(left, dtype=np.int64))


def _split_sizes(s: Shrink, length: int) -> tuple[int, ...]:
    given = constant_ints(s.node, "split", 1)
    if given is not None:
        return given
    count = len(s.node.outputs)
    chunk = -(-length // count)
    return tuple(min(chunk, length - i * chunk) for i in range(count))


# --- picking positions ---------------------------------------------------------------------


def slice_arguments(node: ir.Node, rank: int) -> dict[int, tuple[int, int, int]] | None:
    """Axis to (start, end, step); None unless all of them are constant."""
    starts, ends = constant_ints(node, "starts", 1), constant_ints(node, "ends", 2)
    axes, steps = constant_ints(node, "axes", 3), constant_ints(node, "steps", 4)
    if starts is None or ends is None:
        return None
    if axes is None:
        if input_value(node, 3) is not None:
            return None
        axes = tuple(range(len(starts)))
    if steps is None:
        if input_value(node, 4) is not None:
            return None
        steps = (1,) * len(starts)
    return {
        normal(a, rank): (b, e, step)
        for a, b, e, step in zip(axes, starts, ends, steps, strict=True)
    }


def slice_positions(length: int, bounds: tuple[int, int, int]) -> tuple[int, ...]:
    """The positions that a slice of an axis takes, as ONNX clamps its bounds."""
    start, end, step = bounds
    start, end = (v + length if v < 0 else v for v in (start, end))
    if step > 0:
        return tuple(range(min(max(start, 0), length), min(max(end, 0), length), step))
    return tuple(range(min(max(start, 0), length - 1), min(max(end, -1), length - 1), step))


def _slice_axes(t: Trace, rank: int) -> tuple[int, ...] | None:
    """The axes that a slice may touch, even if its bounds are computed."""
    axes = constant_ints(t.node, "axes", 3)
    if axes is not None:
        return tuple(normal(a, rank) for a in axes)
    return tuple(range(rank)) if input_value(t.node, 3) is None else None


def _slice(t: Trace) -> Outputs:
    data = t.axes(0)
    if data is None:
        return [None]
    result = list(data)
    arguments = slice_arguments(t.node, len(data))
    if arguments is None:
        touched = _slice_axes(t, len(data))
        for axis in range(len(data)) if touched is None else touched:
            t.freeze(data[axis], "is sliced with bounds that are computed at run time")
            result[axis] = None
        return [tuple(result)]
    for axis, bounds in arguments.items():
        labels = data[axis]
        if labels is not None:
            result[axis] = labels[list(slice_positions(len(labels), bounds))]
            t.drop(labels)
    return [tuple(result)]


def _shrink_slice(s: Shrink) -> None:
    """New bounds where the survivors are contiguous, else a Gather takes over the axis."""
    rank = s.rank(s.node.inputs[0])
    arguments = slice_arguments(s.node, rank)
    if arguments is None:
        return
    gathered: dict[int, tuple[int, ...]] = {}
    changed = False
    for axis, bounds in list(arguments.items()):
        kept = s.input_kept(0, axis)
        if kept is None:
            continue
        changed = True
        number = np.cumsum(kept) - 1
        chosen = tuple(int(number[p]) for p in slice_positions(len(kept), bounds) if kept[p])
        first = chosen[0] if chosen else 0
        if chosen == tuple(range(first, first + len(chosen))):
            arguments[axis] = (first, first + len(chosen), 1)
        else:
            gathered[axis] = chosen
            del arguments[axis]
    if not changed:
        return
    for axis, chosen in gathered.items():
        indices = s.constant("indices", np.array(chosen, dtype=np.int64))
        gather = s.insert(
            "Gather", [s.node.inputs[0], indices], "gather", [ir.AttrInt64("axis", axis)]
        )
        s.node.replace_input_with(0, gather.outputs[0])
    starts, ends, steps = zip(*arguments.values(), strict=True) if arguments else ((), (), ())
    s.set_integers("starts", 1, starts)
    s.set_integers("ends", 2, ends)
    s.set_integers("axes", 3, tuple(arguments))
    if any(step != 1 for step in steps) or input_value(s.node, 4) is not None:
        s.set_integers("steps", 4, steps)


def _gather(t: Trace) -> Outputs:
    data, indices = t.axes(0), t.axes(1)
    if data is None or indices is None:
        return [None]
    along = normal(attribute_int(t.node, "axis", 0), len(data))
    labels = data[along]
    picked: Axes = indices
    constant = constant_of(t.node.inputs[1])
    if labels is not None:
        if constant is not None and constant.ndim <= 1:
            chosen = labels[constant.astype(np.int64)]
            t.drop(labels)
            if constant.ndim == 0:
                t.freeze(np.atleast_1d(chosen), "is picked as the only channel")
            else:
                picked = (chosen,)
        else:
            t.freeze(labels, "is indexed by data: removing entries would change its meaning")
    if constant is None and data[-1] is not None and along == 0 and len(data) == 2:
        rank = len(indices) + 1
        t.produce(1, rank - 1, 0, 1)
    return [(*data[:along], *picked, *data[along + 1 :])]


def _shrink_gather(s: Shrink) -> None:
    along = normal(attribute_int(s.node, "axis", 0), s.rank(s.node.inputs[0]))
    kept = s.input_kept(0, along)
    indices = constant_of(s.node.inputs[1])
    if kept is None or indices is None:
        return
    number = np.cumsum(kept) - 1
    old = indices.astype(np.int64)
    staying = old[kept[old]] if old.ndim else old
    s.set_constant(1, "indices", np.asarray(number[staying], dtype=indices.dtype))


TRANSPOSE = Rule(_transpose)
SQUEEZE = Rule(_squeeze)
UNSQUEEZE = Rule(_unsqueeze)
CONCAT = Rule(_concat)
SPLIT = Rule(_split, _shrink_split)
SLICE = Rule(_slice, _shrink_slice)
GATHER = Rule(_gather, _shrink_gather)
