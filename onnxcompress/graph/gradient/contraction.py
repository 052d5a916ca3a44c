"""Derivatives of convolutions and matrix products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import onnx_ir as ir

from onnxcompress.graph.gradient.tape import (
    Shape,
    StoppedError,
    Tape,
    integer,
    integers,
    number,
    text,
)

Gradients = list[ir.Value | None]


def pads_of(
    node: ir.Node, lengths: Shape, made: Shape, kernel: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What a window is padded by before and after each axis, however the node says it."""
    dilations = integers(node, "dilations", [1] * len(kernel))
    how = text(node, "auto_pad", "NOTSET")
    if how == "NOTSET":
        pads = integers(node, "pads", [0] * (2 * len(kernel)))
        return pads[: len(kernel)], pads[len(kernel) :]
    if how == "VALID":
        return [0] * len(kernel), [0] * len(kernel)
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    total = [
        max((o - 1) * s + n - i, 0)
        for o, s, n, i in zip(made, strides, spans, lengths, strict=True)
    ]
    less = [n // 2 for n in total]
    more = [n - m for n, m in zip(total, less, strict=True)]
    return (less, more) if how == "SAME_UPPER" else (more, less)


def conv(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """``dx`` is the transposed convolution of the gradient, ``dW`` its product with the taps."""
    g = grads[0]
    assert g is not None  # noqa: S101 - required, or the engine asks only then
    x, weight = node.inputs[0], node.inputs[1]
    n, channels, *lengths = tape.shape(x)
    outputs, inside, *kernel = tape.shape(weight)
    made = tape.shape(node.outputs[0])[2:]
    groups = integer(node, "group", 1)
    strides = integers(node, "strides", [1] * len(kernel))
    dilations = integers(node, "dilations", [1] * len(kernel))
    before, after = pads_of(node, tuple(lengths), made, kernel, strides)
    found: Gradients = [None, None, None]
    if tape.needs(x):
        reached = [
            (o - 1) * s + d * (k - 1) + 1 - b - a
            for o, s, d, k, b, a in zip(
                made, strides, dilations, kernel, before, after, strict=True
            )
        ]
        found[0] = tape.op(
            "ConvTranspose",
            g,
            weight,
            group=groups,
            strides=strides,
            dilations=dilations,
            pads=[*before, *after],
            output_padding=[i - r for i, r in zip(lengths, reached, strict=True)],
        )
    places = math.prod(made)
    if tape.needs(weight):
        assert x is not None  # noqa: S101 - required, or the engine asks only then
        taps = math.prod(kernel)
        padded = tape.place(
            x,
            (n, channels, *lengths),
            (0, 0, *before),
            (1,) * (2 + len(kernel)),
            (n, channels, *(i + b + a for i, b, a in zip(lengths, before, after, strict=True))),
        )
        shape = (n, groups, inside, 1, places)
        columns = []
        for tap in itertools.product(*(range(k) for k in kernel)):
            starts = [t * d for t, d in zip(tap, dilations, strict=True)]
            ends = [b + (o - 1) * s + 1 for b, o, s in zip(starts, made, strides, strict=True)]
            axes = list(range(2, 2 + len(kernel)))
            whole = taps == 1 and all(s == 1 for s in strides)
            seen = padded if whole else tape.cut(padded, starts, ends, axes, strides)
            columns.append(tape.reshape(seen, shape))
        unfolded = columns[0] if taps == 1 else tape.op("Concat", *columns, axis=3)
        unfolded = tape.reshape(unfolded, (n, groups, inside * taps, places))
        rows = tape.reshape(g, (n, groups, outputs // groups, places))
        product = tape.op("MatMul", rows, tape.transpose(unfolded, (0, 1, 3, 2)))
        found[1] = tape.reshape(tape.sum(product, [0]), (outputs, inside, *kernel))
    if len(node.inputs) > 2 and tape.needs(node.inputs[2]):
        found[2] = tape.sum(g, [0, *range(2, 2 + len(kernel))])
    return found


def matmul(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """``dA = G Bᵀ`` and ``dB = Aᵀ G``, summed over what was repeated."""
    g = grads[0]
    assert g is not None  # noqa: S101 - required, or the engine asks only then
    a, b = node.inputs
    assert a is not None  # noqa: S101 - required, or the engine asks only then
    assert b is not None  # noqa: S101 - required, or the engine asks only then
    left, right, made = tape.shape(a), tape.shape(b), tape.shape(node.outputs[0])
    if len(left) < 2 or len(right) < 2:
        raise StoppedError("it multiplies a vector")
    found: Gradients = [None, None]
    if tape.needs(a):
        product = tape.op("MatMul", g, _swapped(tape, b, len(right)))
        found[0] = tape.unbroadcast(product, (*made[:-1], left[-1]), left)
    if tape.needs(b):
        if len(right) == 2:
            rows = tape.reshape(a, (-1, left[-1]))
            product = tape.op(
                "MatMul", tape.transpose(rows, (1, 0)), tape.reshape(g, (-1, made[-1]))
            )
            found[1] = product
        else:
            product = tape.op("MatMul", _swapped(tape, a, len(left)), g)
            found[1] = tape.unbroadcast(product, (*made[:-2], *right[-2:]), right)
    return found


def _swapped(tape: Tape, value: ir.Value, rank: int) -> ir.Value:
    return tape.transpose(value, (*range(rank - 2), rank - 1, rank - 2))


def gemm(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> Gradients:
    """As :func:`matmul`, with the factors and transpositions of ``Gemm``."""
    g = grads[0]
    assert g is not None  # noqa: S101 - required, or the engine asks only then
    a, b = node.inputs[0], node.inputs[1]
    alpha, beta = number(node, "alpha", 1.0), number(node, "beta", 1.0)
    flip_a, flip_b = integer(node, "transA", 0), integer(node, "transB", 0)
    scaled = tape.times(g, alpha)
    found: Gradients = [None, None, None]
    if tape.needs(a):
        found[0] = (
            tape.op("Gemm", b, scaled, transA=flip_b, transB=1)
            if flip_a
            else tape.op("Gemm", scaled, b, transB=1 - flip_b)
        )
    if tape.needs(b):
        found[1] = (
            tape.op("Gemm", scaled, a, transA=1, transB=flip_a)
            if flip_b
            else tape.op("Gemm", a, scaled, transA=1 - flip_a)
        )
    if len(node.inputs) > 2 and tape.needs(node.inputs[2]):
        whole = tape.shape(node.outputs[0])
        found[2] = tape.unbroadcast(tape.times(g, beta), whole, tape.shape(node.inputs[2]))
    return found
