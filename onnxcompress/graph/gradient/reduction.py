"""Derivatives of pooling, reductions and normalizations."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.gradient.tape import InputGradients, Shape, StoppedError, Tape, known, only
from onnxcompress.graph.gradient.windows import Windows


def max_pool(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient of each window goes to its largest place."""
    x = node.inputs[0]
    shape, made = tape.shape(x), tape.shape(node.outputs[0])
    attributes = {
        name: attribute.value
        for name, attribute in node.attributes.items()
        if name != "storage_order"
    }
    _, places = tape.ops("MaxPool", [x], 2, attributes)
    zeros = tape.floats(np.zeros(math.prod(shape), np.float32))
    flat = math.prod(made)
    found = tape.op(
        "ScatterElements",
        zeros,
        tape.reshape(places, flat),
        tape.reshape(only(grads), flat),
        axis=0,
        reduction="add",
    )
    return [tape.reshape(found, *shape)]


def average_pool(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient of each window spread over its places."""
    shape, made = tape.shape(node.inputs[0]), tape.shape(node.outputs[0])[2:]
    w = Windows.of(node, node.attributes.get_ints("kernel_shape", ()), shape[2:], made)
    counts = np.ones((), np.float32)
    for axis, k in enumerate(w.kernel):
        at = np.arange(made[axis]) * w.strides[axis] - w.before[axis]
        seen = at[:, None] + np.arange(k) * w.dilations[axis]
        inside = np.sum((seen >= 0) & (seen < w.lengths[axis]), axis=1)
        whole = node.attributes.get_int("count_include_pad", 0)
        own = np.full(len(at), k) if whole else inside
        counts = counts[..., None] * own.astype(np.float32)
    share = tape.op("Div", only(grads), tape.floats(counts))
    window = tape.floats(np.ones((shape[1], 1, *w.kernel)))
    return [w.back(tape, share, window, shape[1])]


def global_average_pool(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient spread over all places."""
    shape = tape.shape(node.inputs[0])
    return [_spread(tape, only(grads), shape, 1 / math.prod(shape[2:]))]


def _spread(tape: Tape, value: ir.Value, shape: Shape, factor: float) -> ir.Value:
    return tape.op("Expand", tape.times(value, factor), tape.ints(*shape))


def _axes(tape: Tape, node: ir.Node) -> list[int]:
    rank = len(tape.shape(node.inputs[0]))
    if "axes" in node.attributes:
        axes = node.attributes.get_ints("axes", [])
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = known(node.inputs[1], "axes")
    else:
        axes = [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    return [a % rank for a in axes]


def reduce_sum(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient repeated."""
    shape, axes = tape.shape(node.inputs[0]), _axes(tape, node)
    own = tuple(1 if i in axes else n for i, n in enumerate(shape))
    count = math.prod(shape[a] for a in axes) if node.op_type == "ReduceMean" else 1
    return [_spread(tape, tape.reshape(only(grads), *own), shape, 1 / count)]


def reduce_extreme(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient goes to the largest (or least) place, to each of several equal ones."""
    x, shape = node.inputs[0], tape.shape(node.inputs[0])
    pooled = node.op_type.startswith("Global")
    axes = list(range(2, len(shape))) if pooled else _axes(tape, node)
    own = tuple(1 if i in axes else n for i, n in enumerate(shape))
    there = tape.op("Equal", x, tape.reshape(node.outputs[0], *own))
    return [tape.where(there, _spread(tape, tape.reshape(only(grads), *own), shape, 1.0))]


def softmax(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """``y (g - Σ g y)``."""
    y, g = node.outputs[0], only(grads)
    axis = node.attributes.get_int("axis", -1)
    mixed = tape.op("Mul", g, y)
    total = tape.op("Mul", y, tape.sum(mixed, [axis], keep=True))
    return [tape.op("Sub", mixed, total)]


def log_softmax(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """``g - exp(y) Σ g``."""
    y, g = node.outputs[0], only(grads)
    total = tape.sum(g, [node.attributes.get_int("axis", -1)], keep=True)
    return [tape.op("Sub", g, tape.op("Mul", tape.op("Exp", y), total))]


def layer_norm(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """With ``h = (x - x̄)/σ`` and ``q = g γ``: ``(q - mean q - h mean(q h))/σ``."""
    x, g = node.inputs[0], only(grads)
    assert x is not None  # noqa: S101 - required
    shape = tape.shape(x)
    first = node.attributes.get_int("axis", -1) % len(shape)
    axes = list(range(first, len(shape)))
    centred = tape.op("Sub", x, tape.mean(x, axes))
    spread = tape.mean(tape.op("Mul", centred, centred), axes)
    raised = tape.op("Add", spread, tape.floats(node.attributes.get_float("epsilon", 1e-5)))
    inverse = tape.op("Reciprocal", tape.op("Sqrt", raised))
    h = tape.op("Mul", centred, inverse)
    found: InputGradients = [None, None, None]
    if tape.needs(x):
        q = tape.op("Mul", g, node.inputs[1])
        less = tape.op(
            "Add", tape.mean(q, axes), tape.op("Mul", h, tape.mean(tape.op("Mul", q, h), axes))
        )
        found[0] = tape.op("Mul", tape.op("Sub", q, less), inverse)
    for place, value in ((1, tape.op("Mul", g, h)), (2, g)):
        if len(node.inputs) > place and tape.needs(node.inputs[place]):
            found[place] = tape.unbroadcast(value, shape, tape.shape(node.inputs[place]))
    return found


def batch_norm(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """Of the affine map that it is once mean and variance are fixed."""
    if node.attributes.get_int("training_mode", 0) or len(node.outputs) > 1:
        raise StoppedError("it takes statistics of the batch")
    x, scale = node.inputs[0], constant_of(node.inputs[1])
    mean, variance = constant_of(node.inputs[3]), constant_of(node.inputs[4])
    if scale is None or mean is None or variance is None:
        raise StoppedError("its statistics are computed")
    shape, g = tape.shape(x), only(grads)
    flat = (-1, *(1,) * (len(shape) - 2))
    inverse = 1 / np.sqrt(variance.astype(np.float64) + node.attributes.get_float("epsilon", 1e-5))
    others = [0, *range(2, len(shape))]
    found: InputGradients = [None] * 5
    if tape.needs(x):
        found[0] = tape.op(
            "Mul", g, tape.floats((scale.astype(np.float64) * inverse).reshape(flat))
        )
    if tape.needs(node.inputs[1]):
        centred = tape.op("Sub", x, tape.floats(mean.reshape(flat)))
        h = tape.op("Mul", centred, tape.floats(inverse.reshape(flat)))
        found[1] = tape.sum(tape.op("Mul", g, h), others)
    if tape.needs(node.inputs[2]):
        found[2] = tape.sum(g, others)
    return found
