"""Operators that grow, resample or measure axes: Pad, Expand, Tile, Resize, Shape and their kin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.rules.base import (
    Outputs,
    Rule,
    Shrink,
    Trace,
    attribute_int,
    attribute_ints,
    attribute_text,
    constant_ints,
    input_value,
    normal,
)
from onnxcompress.graph.unions import Labels

# --- growing -------------------------------------------------------------------------------


def _pad_amounts(node: ir.Node, rank: int) -> dict[int, tuple[int, int]] | None:
    """Axis to (before, after); None unless constant."""
    pads = constant_ints(node, "pads", 1)
    axes: Sequence[int] | None = range(rank)
    if input_value(node, 3) is not None:
        axes = constant_ints(node, "axes", 3)
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return None
    half = len(axes)
    return {normal(a, rank): (pads[i], pads[half + i]) for i, a in enumerate(axes)}


def _pad(t: Trace) -> Outputs:
    data, shape, after = t.axes(0), t.shape(0), t.output_shape(0)
    if data is None or shape is None:
        return [None]
    amounts = _pad_amounts(t.node, len(data))
    if amounts is None:
        if after is None or len(after) != len(data):
            return [None]
        same = [d is not None and d == n for d, n in zip(shape, after, strict=True)]
        for labels, unchanged in zip(data, same, strict=True):
            if not unchanged:
                t.freeze(labels, "is padded by amounts that are computed at run time")
        return [tuple(labels if s else None for labels, s in zip(data, same, strict=True))]
    result = list(data)
    for axis, (before, behind) in amounts.items():
        labels = data[axis]
        if labels is None or (before == 0 and behind == 0):
            continue
        if attribute_text(t.node, "mode", "constant") != "constant":
            t.freeze(labels, "is padded with its own values")
            result[axis] = None
            continue
        inside = labels[max(-before, 0) : len(labels) - max(-behind, 0)]
        t.drop(labels)
        result[axis] = np.concatenate([t.fresh(max(before, 0)), inside, t.fresh(max(behind, 0))])
    return [tuple(result)]


def _shrink_pad(s: Shrink) -> None:
    """Padded positions survive or go like channels; a crop counts the survivors it takes away."""
    rank = s.rank(s.node.outputs[0])
    amounts = _pad_amounts(s.node, rank)
    if amounts is None:
        return
    order = list(amounts)
    entries: dict[int, int] = {}
    for place, axis in enumerate(order):
        y, x = s.output_kept(0, axis), s.input_kept(0, axis)
        for end, amount in enumerate(amounts[axis]):
            mask = y if amount > 0 else x
            if mask is None or amount == 0:
                continue
            part = mask[: abs(amount)] if end == 0 else mask[len(mask) - abs(amount) :]
            entries[place + end * len(order)] = int(part.sum()) * (1 if amount > 0 else -1)
    given = attribute_ints(s.node, "pads")
    if given is not None:
        s.set_ints("pads", [entries.get(i, p) for i, p in enumerate(given)])
    else:
        s.patch(1, "pads", entries)


def _expand(t: Trace) -> Outputs:
    data, shape, after = t.axes(0), t.shape(0), t.output_shape(0)
    if data is None or shape is None or after is None:
        return [None]
    result: list[Labels | None] = []
    for position in range(-len(after), 0):
        length = after[position]
        inside = len(data) >= -position
        if inside and shape[position] != 1:
            labels = data[position]
            if labels is not None and length != len(labels):
                t.freeze(labels, "is broadcast to a length that is computed at run time")
                labels = None
            result.append(labels)
        else:
            result.append(t.fresh(length) if length is not None and length > 1 else None)
    return [tuple(result)]


def _shrink_expand(s: Shrink) -> None:
    y = s.node.outputs[0]
    rank = s.rank(y)
    old = constant_of(s.node.inputs[1])
    # The target may be shorter than the result: it is aligned at the right.
    shift = 0 if old is None else rank - len(old)
    entries: dict[int, int] = {}
    for axis in range(rank):
        kept = s.kept(y, axis)
        if kept is None or axis < shift or (old is not None and int(old[axis - shift]) == 1):
            continue
        entries[axis - shift] = int(kept.sum())
    s.patch(1, "shape", entries)


def _constant_of_shape(t: Trace) -> Outputs:
    after = t.output_shape(0)
    if after is None:
        return [None]
    return [tuple(t.fresh(d) if d is not None and d > 1 else None for d in after)]


def _shrink_constant_of_shape(s: Shrink) -> None:
    y = s.node.outputs[0]
    masks = ((axis, s.kept(y, axis)) for axis in range(s.rank(y)))
    s.patch(0, "shape", {axis: int(kept.sum()) for axis, kept in masks if kept is not None})


def _tile(t: Trace) -> Outputs:
    data, shape, after = t.axes(0), t.shape(0), t.output_shape(0)
    if data is None or shape is None or after is None or len(after) != len(data):
        return [None]
    result: list[Labels | None] = []
    for labels, length, new in zip(data, shape, after, strict=True):
        if labels is None or length is None or new is None:
            t.freeze(labels, "is repeated a number of times that is computed at run time")
            result.append(None)
        else:
            result.append(np.tile(labels, new // length))
    return [tuple(result)]


def _depth_to_space(t: Trace) -> Outputs:
    """DCR reads the channels as ``[b, b, C']``, CRD as ``[C', b, b]``; C' survives."""
    data = t.axes(0)
    if data is None or len(data) != 4:
        return [None]
    block = attribute_int(t.node, "blocksize", 1) ** 2
    labels = data[1]
    if labels is None:
        return [(data[0], None, None, None)]
    if attribute_text(t.node, "mode", "DCR") == "DCR":
        rows = labels.reshape(block, -1).T
    else:
        rows = labels.reshape(-1, block)
    t.tie(rows, rows[:, :1])
    t.drop(labels)
    return [(data[0], np.ascontiguousarray(rows[:, 0]), None, None)]


def _space_to_depth(t: Trace) -> Outputs:
    """Output channel ``(dy · b + dx) · C + c`` (DCR), ``c · b² + dy · b + dx`` (CRD) is of c."""
    data = t.axes(0)
    if data is None or len(data) != 4:
        return [None]
    block = attribute_int(t.node, "blocksize", 1) ** 2
    if data[1] is None:
        return [(data[0], None, None, None)]
    depth_first = attribute_text(t.node, "mode", "DCR") == "DCR"
    labels = np.tile(data[1], block) if depth_first else np.repeat(data[1], block)
    return [(data[0], labels, None, None)]


# --- resampling ----------------------------------------------------------------------------


def _resize(t: Trace) -> Outputs:
    """An axis of unchanged length passes: every interpolation is the identity there."""
    data, shape, after = t.axes(0), t.shape(0), t.output_shape(0)
    if data is None or shape is None or after is None or len(after) != len(data):
        return [None]
    result: list[Labels | None] = []
    mode = attribute_text(t.node, "coordinate_transformation_mode", "half_pixel")
    policy = attribute_text(t.node, "keep_aspect_ratio_policy", "stretch")
    # Then an axis of unchanged length is no identity, or its length depends on all others.
    mixing = mode == "tf_crop_and_resize" or policy != "stretch"
    for labels, length, new in zip(data, shape, after, strict=True):
        if labels is not None and (length != new or mixing):
            t.freeze(labels, "is resampled")
            labels = None
        result.append(labels)
    return [tuple(result)]


def _shrink_resize(s: Shrink) -> None:
    sizes = input_value(s.node, 3)
    if sizes is None:
        return
    y = s.node.outputs[0]
    given = attribute_ints(s.node, "axes")
    order = list(range(s.rank(y))) if given is None else [normal(a, s.rank(y)) for a in given]
    masks = ((place, s.kept(y, axis)) for place, axis in enumerate(order))
    s.patch(3, "sizes", {place: int(kept.sum()) for place, kept in masks if kept is not None})


# --- shapes as data ------------------------------------------------------------------------


def _shape(t: Trace) -> Outputs:
    """Reading a shape freezes nothing: :func:`_shrink_shape` keeps the numbers as they were."""
    for labels in t.axes(0) or ():
        t.drop(labels)
    return [(None,)]


def _shrink_shape(s: Shrink) -> None:
    """Static lengths that readers see stay those of the original."""
    start = attribute_int(s.node, "start", 0)
    rank = s.rank(s.node.inputs[0])
    start = max(start + rank, 0) if start < 0 else start
    end = attribute_int(s.node, "end", rank)
    end = min(end + rank if end < 0 else end, rank)
    masks = ((axis, s.input_kept(0, axis)) for axis in range(start, end))
    entries = {axis - start: len(kept) for axis, kept in masks if kept is not None}
    if not entries:
        return
    size = end - start
    changed, numbers = np.zeros(size, dtype=np.bool_), np.ones(size, dtype=np.int64)
    for place, length in entries.items():
        changed[place], numbers[place] = True, length
    y = s.node.outputs[0]
    users = [(use.node, use.idx) for use in y.uses()]
    where = s.insert(
        "Where",
        [s.constant("shape_where", changed), s.constant("shape_lengths", numbers), y],
        "shape",
        after=True,
    )
    where.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    where.outputs[0].shape = ir.Shape([size])
    for node, index in users:
        node.replace_input_with(index, where.outputs[0])


PAD = Rule(_pad, _shrink_pad)
EXPAND = Rule(_expand, _shrink_expand)
CONSTANT_OF_SHAPE = Rule(_constant_of_shape, _shrink_constant_of_shape)
TILE = Rule(_tile)
DEPTH_TO_SPACE = Rule(_depth_to_space)
SPACE_TO_DEPTH = Rule(_space_to_depth)
RESIZE = Rule(_resize, _shrink_resize)
SHAPE = Rule(_shape, _shrink_shape)
