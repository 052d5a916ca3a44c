"""Derivatives of operators that only move data."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.gradient.tape import InputGradients, StoppedError, Tape, known, only


def reshape(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient in the shape of the input."""
    return [tape.reshape(only(grads), *tape.shape(node.inputs[0]))]


def transpose(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient transposed back."""
    rank = len(tape.shape(node.inputs[0]))
    order = node.attributes.get_ints("perm", list(reversed(range(rank))))
    return [tape.transpose(only(grads), [order.index(i) for i in range(rank)])]


def expand(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The sum over what was repeated."""
    whole, own = tape.shape(node.outputs[0]), tape.shape(node.inputs[0])
    return [tape.unbroadcast(only(grads), whole, own)]


def concat(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """Each part of the gradient."""
    axis = node.attributes.get_int("axis", 0) % len(tape.shape(node.outputs[0]))
    g, start, found = only(grads), 0, []
    for value in node.inputs:
        end = start + tape.shape(value)[axis]
        found.append(tape.cut(g, [start], [end], [axis]) if tape.needs(value) else None)
        start = end
    return found


def split(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradients of the parts beside each other, zeros where a part has none."""
    shape = tape.shape(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % len(shape)
    total: ir.Value | None = None
    start = 0
    for output, g in zip(node.outputs, grads, strict=True):
        part = tape.shape(output)
        if g is not None:
            starts = tuple(start if i == axis else 0 for i in range(len(shape)))
            placed = tape.place(g, part, starts, (1,) * len(shape), shape)
            total = placed if total is None else tape.op("Add", total, placed)
        start += part[axis]
    return [total]


def slice_(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient where it came from, between zeros."""
    shape, part = tape.shape(node.inputs[0]), tape.shape(node.outputs[0])
    given = [*node.inputs, None, None]
    begin = known(given[1], "starts")
    axes = list(range(len(begin))) if given[3] is None else known(given[3], "axes")
    strides = [1] * len(begin) if given[4] is None else known(given[4], "steps")
    if any(s < 0 for s in strides):
        raise StoppedError("it goes backwards")
    starts, steps = [0] * len(shape), [1] * len(shape)
    for axis, first, step in zip(axes, begin, strides, strict=True):
        length = shape[axis]
        starts[axis % len(shape)] = min(max(first + length if first < 0 else first, 0), length)
        steps[axis % len(shape)] = step
    return [tape.place(only(grads), part, tuple(starts), tuple(steps), shape)]


def pad(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """What is left of the gradient without the border."""
    if node.attributes.get_string("mode", "constant") != "constant":
        raise StoppedError("its border is made of data")
    shape = tape.shape(node.inputs[0])
    given = [*node.inputs, None, None]
    pads = known(given[1], "pads")
    axes = list(range(len(shape))) if given[3] is None else known(given[3], "axes")
    if min(pads) < 0:
        raise StoppedError("it cuts")
    starts = [0] * len(shape)
    for axis, before in zip(axes, pads[: len(axes)], strict=True):
        starts[axis % len(shape)] = before
    ends = [s + n for s, n in zip(starts, shape, strict=True)]
    return [tape.cut(only(grads), starts, ends, range(len(shape)))]


def gather(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient at the one place that was taken."""
    shape = tape.shape(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % len(shape)
    index = constant_of(node.inputs[1])
    if index is None or index.size != 1:
        raise StoppedError("it takes more than one place, or one that is computed")
    part = tuple(1 if i == axis else n for i, n in enumerate(shape))
    place = int(index.reshape(())) % shape[axis]
    starts = tuple(place if i == axis else 0 for i in range(len(shape)))
    own = tape.reshape(only(grads), *part)
    return [tape.place(own, part, starts, (1,) * len(shape), shape)]


def depth_to_space(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient moved back."""
    n, c, h, w = tape.shape(node.inputs[0])
    b = node.attributes.get_int("blocksize", 1)
    back = (
        (0, 3, 5, 1, 2, 4)
        if node.attributes.get_string("mode", "DCR") == "DCR"
        else (0, 1, 3, 5, 2, 4)
    )
    parted = tape.reshape(only(grads), n, c // (b * b), h, b, w, b)
    return [tape.reshape(tape.transpose(parted, back), n, c, h, w)]


def space_to_depth(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The gradient moved back."""
    return [tape.op("DepthToSpace", only(grads), blocksize=node.attributes.get_int("blocksize", 1))]


def resize(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """The sum over the copies of each place."""
    shape, made = tape.shape(node.inputs[0]), tape.shape(node.outputs[0])
    how = (
        node.attributes.get_string("mode", "nearest"),
        node.attributes.get_string("coordinate_transformation_mode", "half_pixel"),
        node.attributes.get_string("nearest_mode", "round_prefer_floor"),
    )
    copies = {
        ("nearest", "half_pixel", "round_prefer_floor"),
        ("nearest", "asymmetric", "floor"),
    }
    if how not in copies or any(m % n for m, n in zip(made, shape, strict=True)):
        raise StoppedError("it does more than to repeat each place")
    parted = [f for n, m in zip(shape, made, strict=True) for f in (n, m // n)]
    axes = list(range(1, 2 * len(shape), 2))
    return [tape.sum(tape.reshape(only(grads), *parted), axes)]
