"""QuantizeLinear and DequantizeLinear: channels pass, per-channel scales go with them."""

from __future__ import annotations

from onnxcompress.graph.rules.base import Outputs, Rule, Trace, attribute_int, input_value, normal


def _linear(t: Trace) -> Outputs:
    """Y = (x - z[c]) · s[c] and its inverse; with blocks, the blocked axis stays."""
    data, scale = t.axes(0), t.axes(1)
    if data is None or scale is None:
        return [None]
    result = list(data)
    if len(scale) == 1 and t.shape(1) != (1,):
        axis = normal(attribute_int(t.node, "axis", 1), len(data))
        for index in (1, 2):
            if input_value(t.node, index) is not None:
                axes = t.axes(index)
                result[axis] = t.tie(result[axis], axes[0] if axes else None)
    elif len(scale) == len(data) and len(data) > 0 and attribute_int(t.node, "block_size", 0):
        blocked = normal(attribute_int(t.node, "axis", 1), len(data))
        for axis in range(len(data)):
            if axis == blocked:
                t.freeze(result[axis], "is quantized in blocks along this axis")
                result[axis] = None
                continue
            for index in (1, 2):
                axes = t.axes(index)
                if input_value(t.node, index) is not None:
                    result[axis] = t.tie(result[axis], axes[axis] if axes else None)
    return [tuple(result)]


LINEAR = Rule(_linear)
