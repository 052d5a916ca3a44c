"""Derivatives of pooling, reductions and normalizations."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.gradient.contraction import pads_of
from onnxcompress.graph.gradient.tape import (
    Shape,
    StoppedError,
    Tape,
    integer,
    integers,
    known,
    number,
)

Gradients = list[ir.Value | None]


def _only(grads: list[ir.Value | None]) -> ir.Value:
    g = grads[0]
    assert g is not None  # noqa: S101 - required, or the engine asks only then
    return g


def max_pool(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """The gradient of each window goes to its largest place."""
    x = node.inputs[0]
    shape, made = tape.shape(x), tape.shape(node.outputs[0])
    attributes = {
        name: attribute.value
        for name, attribute in node.attributes.items()
        if name != "storage_order"
    }
    places = tape.op("MaxPool", x, outputs=2, **attributes)
    zeros = tape.constant(np.zeros(math.prod(shape), np.float32))
    flat = math.prod(made)
    found = tape.op(
        "ScatterElements",
        zeros,
        tape.reshape(places, (flat,)),
        tape.reshape(_only(grads), (flat,)),
        axis=0,
        reduction="add",
    )
    return [tape.reshape(found, shape)]


def average_pool(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """The gradient of each window spread over its places."""
    shape, made = tape.shape(node.inputs[0]), tape.shape(node.outputs[0])[2:]
    lengths = shape[2:]
    kernel = integers(node, "kernel_shape", [])
    strides = integers(node, "strides", [1] * len(kernel))
    dilations = integers(node, "dilations", [1] * len(kernel))
    before, after = pads_of(node, lengths, made, kernel, strides)
    reached = [
        (o - 1) * s + d * (k - 1) + 1 - b - a
        for o, s, d, k, b, a in zip(made, strides, dilations, kernel, before, after, strict=True)
    ]
    rest = [i - r for i, r in zip(lengths, reached, strict=True)]
    if min(rest) < 0:
        raise StoppedError("its last window sticks out")
    counts = np.ones((), np.float32)
    for axis, k in enumerate(kernel):
        at = np.arange(made[axis]) * strides[axis] - before[axis]
        seen = at[:, None] + np.arange(k) * dilations[axis]
        inside = np.sum((seen >= 0) & (seen < lengths[axis]), axis=1)
        own = np.full(len(at), k) if integer(node, "count_include_pad", 0) else inside
        counts = counts[..., None] * own.astype(np.float32)
    share = tape.op("Div", _only(grads), tape.constant(counts))
    window = tape.constant(np.ones((shape[1], 1, *kernel), np.float32))
    return [
        tape.op(
            "ConvTranspose",
            share,
            window,
            group=shape[1],
            strides=strides,
            dilations=dilations,
            pads=[*before, *after],
            output_padding=rest,
        )
    ]


def global_average_pool(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """The gradient spread over all places."""
    shape = tape.shape(node.inputs[0])
    return [_spread(tape, _only(grads), shape, 1 / math.prod(shape[2:]))]


def _spread(tape: Tape, value: ir.Value, shape: Shape, factor: float) -> ir.Value:
    return tape.op("Expand", tape.times(value, factor), tape.ints(*shape))


def _axes(tape: Tape, node: ir.Node) -> list[int]:
    rank = len(tape.shape(node.inputs[0]))
    if "axes" in node.attributes:
        axes = integers(node, "axes", [])
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = known(node.inputs[1], "axes")
    else:
        axes = [] if integer(node, "noop_with_empty_axes", 0) else list(range(rank))
    return [a % rank for a in axes]


def reduce_sum(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """The gradient repeated."""
    shape, axes = tape.shape(node.inputs[0]), _axes(tape, node)
    own = tuple(1 if i in axes else n for i, n in enumerate(shape))
    count = math.prod(shape[a] for a in axes) if node.op_type == "ReduceMean" else 1
    return [_spread(tape, tape.reshape(_only(grads), own), shape, 1 / count)]


def reduce_extreme(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """The gradient goes to the largest (or least) place, to each of several equal ones."""
    x, shape = node.inputs[0], tape.shape(node.inputs[0])
    pooled = node.op_type.startswith("Global")
    axes = list(range(2, len(shape))) if pooled else _axes(tape, node)
    own = tuple(1 if i in axes else n for i, n in enumerate(shape))
    there = tape.op("Equal", x, tape.reshape(node.outputs[0], own))
    return [tape.where(there, _spread(tape, tape.reshape(_only(grads), own), shape, 1.0))]


def softmax(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """``y (g - Σ g y)``."""
    y, g = node.outputs[0], _only(grads)
    axis = integer(node, "axis", -1)
    mixed = tape.op("Mul", g, y)
    total = tape.op("Mul", y, tape.sum(mixed, [axis], keep=True))
    return [tape.op("Sub", mixed, total)]


def log_softmax(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """``g - exp(y) Σ g``."""
    y, g = node.outputs[0], _only(grads)
    total = tape.sum(g, [integer(node, "axis", -1)], keep=True)
    return [tape.op("Sub", g, tape.op("Mul", tape.op("Exp", y), total))]


def layer_norm(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """With ``h = (x - x̄)/σ`` and ``q = g γ``: ``(q - mean q - h mean(q h))/σ``."""
    x, g = node.inputs[0], _only(grads)
    assert x is not None  # noqa: S101 - required, or the engine asks only then
    shape = tape.shape(x)
    first = integer(node, "axis", -1) % len(shape)
    axes = list(range(first, len(shape)))
    centred = tape.op("Sub", x, tape.mean(x, axes))
    spread = tape.mean(tape.op("Mul", centred, centred), axes)
    raised = tape.op("Add", spread, tape.constant(number(node, "epsilon", 1e-5)))
    inverse = tape.op("Reciprocal", tape.op("Sqrt", raised))
    h = tape.op("Mul", centred, inverse)
    found: Gradients = [None, None, None]
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


def batch_norm(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """Of the affine map that it is once mean and variance are fixed."""
    if integer(node, "training_mode", 0) or len(node.outputs) > 1:
        raise StoppedError("it takes statistics of the batch")
    x, scale = node.inputs[0], constant_of(node.inputs[1])
    mean, variance = constant_of(node.inputs[3]), constant_of(node.inputs[4])
    if scale is None or mean is None or variance is None:
        raise StoppedError("its statistics are computed")
    shape, g = tape.shape(x), _only(grads)
    flat = (-1, *(1,) * (len(shape) - 2))
    inverse = 1 / np.sqrt(variance.astype(np.float64) + number(node, "epsilon", 1e-5))
    others = [0, *range(2, len(shape))]
    found: Gradients = [None] * 5
    if tape.needs(x):
        found[0] = tape.op(
            "Mul", g, tape.constant((scale.astype(np.float64) * inverse).reshape(flat))
        )
    if tape.needs(node.inputs[1]):
        centred = tape.op("Sub", x, tape.constant(mean.reshape(flat)))
        h = tape.op("Mul", centred, tape.constant(inverse.reshape(flat)))
        found[1] = tape.sum(tape.op("Mul", g, h), others)
    if tape.needs(node.inputs[2]):
        found[2] = tape.sum(g, others)
    return found
