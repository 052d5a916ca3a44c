"""Normalizations and pooling: statistics over some axes, one channel at a time over the others."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

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
from onnxcompress.graph.rules.elementwise import broadcast
from onnxcompress.graph.unions import Labels


def _without(t: Trace, data: Axes, axes: Iterable[int], reason: str) -> Axes:
    """``data`` with some axes frozen."""
    result = list(data)
    for axis in axes:
        t.freeze(data[axis], reason)
        result[axis] = None
    return tuple(result)


def _per_channel(t: Trace, labels: Labels | None, parameters: Iterable[int]) -> Labels | None:
    """Tie one-dimensional parameters to the channels they belong to."""
    for index in parameters:
        if input_value(t.node, index) is not None:
            axes = t.axes(index)
            labels = t.tie(labels, axes[0] if axes else None)
    return labels


def _batch_norm(t: Trace) -> Outputs:
    data = t.axes(0)
    if data is None or len(data) < 2:
        return [None]
    if attribute_int(t.node, "training_mode", 0):
        data = _without(t, data, (0, *range(2, len(data))), _MEAN)
    channels = _per_channel(t, data[1], (1, 2, 3, 4))
    outputs: list[Axes | None] = [(data[0], channels, *data[2:])]
    return outputs + [(channels,)] * (len(t.node.outputs) - 1)


def _instance_norm(t: Trace) -> Outputs:
    data = t.axes(0)
    if data is None or len(data) < 3:
        return [None]
    channels = _per_channel(t, data[1], (1, 2))
    return [_without(t, (data[0], channels, *data[2:]), range(2, len(data)), _MEAN)]


_MEAN = "is normalized over, so that every channel depends on all of them"


def _group_norm(t: Trace) -> Outputs:
    """Whole groups may go: the channels of a group share mean and variance."""
    data, shape = t.axes(0), t.shape(0)
    scale = t.axes(1)
    groups = attribute_int(t.node, "num_groups", 1)
    if data is None or shape is None or scale is None or shape[1] is None:
        return [None]
    labels = data[1]
    if labels is not None:
        rows = labels.reshape(groups, -1)
        t.tie(rows, rows[:, :1])
        labels = np.repeat(rows[:, 0], rows.shape[1])
        t.drop(data[1])
    per_group = scale[0] is not None and len(scale[0]) == groups != shape[1]
    if per_group and labels is not None:
        _per_channel(t, np.ascontiguousarray(labels.reshape(groups, -1)[:, 0]), (1, 2))
    else:
        labels = _per_channel(t, labels, (1, 2))
    return [_without(t, (data[0], labels, *data[2:]), range(2, len(data)), _MEAN)]


def _shrink_group_norm(s: Shrink) -> None:
    kept = s.input_kept(0, 1)
    if kept is None:
        return
    groups = attribute_int(s.node, "num_groups", 1)
    s.set_int("num_groups", int(kept.sum()) * groups // len(kept))


def _group_norm_last(t: Trace) -> Outputs:
    """com.microsoft GroupNorm: channels last by default, and an activation behind it."""
    data, shape = t.axes(0), t.shape(0)
    last = bool(attribute_int(t.node, "channels_last", 1))
    groups = attribute_int(t.node, "groups", 1)
    if data is None or shape is None or len(data) != 4:
        return [None]
    along = 3 if last else 1
    labels = data[along]
    others = [axis for axis in range(1, 4) if axis != along]
    if labels is not None:
        rows = labels.reshape(groups, -1)
        t.tie(rows, rows[:, :1])
        t.drop(labels)
        labels = _per_channel(t, np.repeat(rows[:, 0], rows.shape[1]), (1, 2))
    result = list(_without(t, data, others, _MEAN))
    result[along] = labels
    return [tuple(result)]


def _shrink_group_norm_last(s: Shrink) -> None:
    kept = s.input_kept(0, 3 if attribute_int(s.node, "channels_last", 1) else 1)
    if kept is not None:
        groups = attribute_int(s.node, "groups", 1)
        s.set_int("groups", int(kept.sum()) * groups // len(kept))


def _skip_norm(t: Trace) -> Outputs:
    """com.microsoft SkipLayerNormalization: a sum, then a normalization over its last axis."""
    data = broadcast(t, (0, 1))
    if data is None or not data:
        return [None] * len(t.node.outputs)
    for index in range(2, len(t.node.inputs)):
        for labels in t.axes(index) or ():
            t.freeze(labels, _MEAN)
    y = _without(t, data, (len(data) - 1,), _MEAN)
    return [y, None, None, y][: len(t.node.outputs)]


def _trailing_norm(t: Trace) -> Outputs:
    """LayerNormalization, RMSNormalization: over ``axis`` and everything behind it."""
    data = t.axes(0)
    if data is None:
        return [None]
    first = normal(attribute_int(t.node, "axis", -1), len(data))
    for index in range(1, len(t.node.inputs)):
        for labels in t.axes(index) or ():
            t.freeze(labels, _MEAN)
    y = _without(t, data, range(first, len(data)), _MEAN)
    return [y] * len(t.node.outputs)


def _mean_variance(t: Trace) -> Outputs:
    data = t.axes(0)
    if data is None:
        return [None]
    axes = attribute_ints(t.node, "axes") or (0, 2, 3)
    return [_without(t, data, {normal(a, len(data)) for a in axes}, _MEAN)]


def _over_axis(t: Trace) -> Outputs:
    """Softmax and its kin, CumSum, TopK, ...: one axis mixes, the others pass."""
    data = t.axes(0)
    if data is None:
        return [None] * len(t.node.outputs)
    flattening = t.opset < 13 and t.node.op_type in {"Softmax", "LogSoftmax", "Hardmax"}
    default = 1 if flattening else -1
    if t.node.op_type in {"CumSum", "CumProd"}:
        given = constant_ints(t.node, "axis", 1)
        if given is None:
            return [None]
        axis = given[0]
    else:
        axis = attribute_int(t.node, "axis", default)
    first = normal(axis, len(data))
    axes = range(first, len(data)) if flattening else (first,)
    reason = f"is the axis of a {t.node.op_type}, which mixes all its channels"
    return [_without(t, data, axes, reason)] * len(t.node.outputs)


def _arg_reduce(t: Trace) -> Outputs:
    """ArgMax, ArgMin: positions are the result."""
    data = t.axes(0)
    if data is None:
        return [None]
    along = normal(attribute_int(t.node, "axis", 0), len(data))
    rest = _without(t, data, (along,), f"is the axis of an {t.node.op_type}: positions are data")
    if attribute_int(t.node, "keepdims", 1):
        return [rest]
    return [(*rest[:along], *rest[along + 1 :])]


def _channels_pass(t: Trace) -> Outputs:
    """Pooling: channels are independent, spatial axes change."""
    data = t.axes(0)
    if data is None or len(data) < 2:
        return [None] * len(t.node.outputs)
    if len(t.node.outputs) > 1:
        data = _without(t, data, (1,), "numbers of pooled positions count all channels")
    y = _without(t, data, range(2, len(data)), "is a spatial axis")
    return [y] * len(t.node.outputs)


def _matrix_tail(t: Trace) -> Outputs:
    """Trilu: the last two axes are told apart by position."""
    data = t.axes(0)
    if data is None or len(data) < 2:
        return [None]
    return [_without(t, data, (len(data) - 2, len(data) - 1), "is masked by position")]


def _lrn(t: Trace) -> Outputs:
    data = t.axes(0)
    if data is None or len(data) < 2:
        return [None]
    return [_without(t, data, (1,), "is normalized with its neighbours")]


def _reverse_sequence(t: Trace) -> Outputs:
    data = t.axes(0)
    if data is None:
        return [None]
    axes = (attribute_int(t.node, "batch_axis", 1), attribute_int(t.node, "time_axis", 0))
    return [_without(t, data, axes, "is reversed along time")]


def _sampled(t: Trace) -> Outputs:
    """GridSample, RoiAlign, MaxRoiPool: read at computed places, channel by channel."""
    data, after = t.axes(0), t.output_shape(0)
    if data is None or after is None or len(after) != len(data):
        return [None]
    places = (0, *range(2, len(data)))
    return [_without(t, data, places, "is read at computed places")]


BATCH_NORM = Rule(_batch_norm)
INSTANCE_NORM = Rule(_instance_norm)
GROUP_NORM_LAST = Rule(_group_norm_last, _shrink_group_norm_last)
SKIP_NORM = Rule(_skip_norm)
GROUP_NORM = Rule(_group_norm, _shrink_group_norm)
TRAILING_NORM = Rule(_trailing_norm)
MEAN_VARIANCE = Rule(_mean_variance)
OVER_AXIS = Rule(_over_axis)
ARG_REDUCE = Rule(_arg_reduce)
CHANNELS_PASS = Rule(_channels_pass)
MATRIX_TAIL = Rule(_matrix_tail)
LRN = Rule(_lrn)
REVERSE_SEQUENCE = Rule(_reverse_sequence)
SAMPLED = Rule(_sampled)
