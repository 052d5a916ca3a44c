"""Fused operators that are not attention: a convolution or product with what follows it, caches."""

from __future__ import annotations

from onnxcompress.graph.rules.base import (
    Outputs,
    Rule,
    Trace,
    attribute_int,
    input_value,
    normal,
)
from onnxcompress.graph.rules.contraction import (
    any_conv,
    matrix_product,
    shrink_conv,
)
from onnxcompress.graph.unions import Labels


def _fused_conv(t: Trace) -> Outputs:
    """Y = activation(Conv(X, W, B) + Z)."""
    (found,) = any_conv(t, transposed=False)
    if found is None or input_value(t.node, 3) is None:
        return [found]
    other = t.axes(3)
    if other is None or len(other) != len(found):
        t.freeze(found[1], "meets a summand of unknown shape")
        return [None]
    return [tuple(t.tie(a, b) if a is not b else a for a, b in zip(found, other, strict=True))]


def _fused_matmul(t: Trace) -> Outputs:
    """Y = alpha · op(A) op(B), each transposed or not."""
    if attribute_int(t.node, "transBatchA", 0) or attribute_int(t.node, "transBatchB", 0):
        return [None]
    flags = (attribute_int(t.node, name, 0) for name in ("transA", "transB"))
    return matrix_product(t, *(bool(flag) for flag in flags))


def _deformed_conv(t: Trace) -> Outputs:
    """Channels are independent of each other's offsets unless these come in groups."""
    offsets = attribute_int(t.node, "offset_group", 1)
    for index in (2, 4):
        for labels in t.axes(index) or ():
            t.freeze(labels, "places the kernel of a DeformConv")
    data = t.axes(0)
    if offsets != 1 and data is not None and len(data) > 1:
        t.freeze(data[1], "is moved in groups by a DeformConv")
    return any_conv(t, transposed=False, bias=3)


def _causal_conv(t: Trace) -> Outputs:
    """A depthwise convolution along time with its state: all of them by channel."""
    data, weight = t.axes(0), t.axes(1)
    if data is None or weight is None or len(data) != 3 or len(weight) != 3:
        return [None] * len(t.node.outputs)
    t.freeze(weight[2], "is a spatial axis of the kernel")
    channels = t.tie(data[1], weight[0])
    t.produce(0, 1, 1, 0)
    for index, axis in ((2, 0), (3, 1)):
        if input_value(t.node, index) is not None:
            axes = t.axes(index)
            channels = t.tie(channels, axes[axis] if axes else None)
    batch, state = data[0], t.axes(3) if input_value(t.node, 3) is not None else None
    if state is not None:
        batch = t.tie(batch, state[0])
    return [(batch, channels, None)] * len(t.node.outputs)


def _tensor_scatter(t: Trace) -> Outputs:
    """A cache that is written at computed places of one axis; the others pass."""
    cache, update, shape = t.axes(0), t.axes(1), t.shape(0)
    if cache is None or update is None or len(cache) != len(update) or shape is None:
        return [None]
    along = normal(attribute_int(t.node, "axis", -2), len(cache))
    result: list[Labels | None] = []
    for axis, (old, new) in enumerate(zip(cache, update, strict=True)):
        if axis in {0, along}:
            for labels in (old, new):
                t.freeze(labels, "is written at computed places")
            result.append(None)
        else:
            result.append(t.tie(old, new))
    return [tuple(result)]


FUSED_CONV = Rule(_fused_conv, shrink_conv)
FUSED_MATMUL = Rule(_fused_matmul)
DEFORMED_CONV = Rule(_deformed_conv, shrink_conv)
CAUSAL_CONV = Rule(_causal_conv)
TENSOR_SCATTER = Rule(_tensor_scatter)
