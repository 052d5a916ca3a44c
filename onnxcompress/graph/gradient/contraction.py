"""Derivatives of convolutions and matrix products."""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxcompress.graph.gradient.tape import InputGradients, StoppedError, Tape, only
from onnxcompress.graph.gradient.windows import Windows


def conv(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """``dx`` is the transposed convolution of the gradient, ``dW`` its product with the taps."""
    g = only(grads)
    x, weight = node.inputs[0], node.inputs[1]
    assert x is not None  # noqa: S101 - required
    assert weight is not None  # noqa: S101 - required
    n, channels, *lengths = tape.shape(x)
    outputs, inside, *kernel = tape.shape(weight)
    made = tape.shape(node.outputs[0])[2:]
    groups = node.attributes.get_int("group", 1)
    windows = Windows.of(node, kernel, tuple(lengths), made)
    found: InputGradients = [None, None, None]
    if tape.needs(x):
        found[0] = windows.back(tape, g, weight, groups)
    if tape.needs(weight):
        places = math.prod(made)
        taps = math.prod(kernel)
        shape = (n, groups, inside, 1, places)
        columns = [tape.reshape(v, *shape) for v in windows.seen(tape, x, n, channels)]
        unfolded = columns[0] if taps == 1 else tape.op("Concat", *columns, axis=3)
        unfolded = tape.reshape(unfolded, n, groups, inside * taps, places)
        rows = tape.reshape(g, n, groups, outputs // groups, places)
        product = tape.op("MatMul", rows, tape.transpose(unfolded, (0, 1, 3, 2)))
        found[1] = tape.reshape(tape.sum(product, [0]), outputs, inside, *kernel)
    if len(node.inputs) > 2 and tape.needs(node.inputs[2]):
        found[2] = tape.sum(g, [0, *range(2, 2 + len(kernel))])
    return found


def matmul(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """``dA = G Bᵀ`` and ``dB = Aᵀ G``, summed over what was repeated."""
    g = only(grads)
    a, b = node.inputs
    assert a is not None  # noqa: S101 - required
    assert b is not None  # noqa: S101 - required
    left, right, made = tape.shape(a), tape.shape(b), tape.shape(node.outputs[0])
    if len(left) < 2 or len(right) < 2:
        raise StoppedError("it multiplies a vector")
    found: InputGradients = [None, None]
    if tape.needs(a):
        product = tape.op("MatMul", g, _swapped(tape, b, len(right)))
        found[0] = tape.unbroadcast(product, (*made[:-1], left[-1]), left)
    if tape.needs(b):
        if len(right) == 2:
            rows = tape.reshape(a, -1, left[-1])
            below = tape.reshape(g, -1, made[-1])
            found[1] = tape.op("MatMul", tape.transpose(rows, (1, 0)), below)
        else:
            product = tape.op("MatMul", _swapped(tape, a, len(left)), g)
            found[1] = tape.unbroadcast(product, (*made[:-2], *right[-2:]), right)
    return found


def _swapped(tape: Tape, value: ir.Value, rank: int) -> ir.Value:
    return tape.transpose(value, (*range(rank - 2), rank - 1, rank - 2))


def gemm(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
    """As :func:`matmul`, with the factors and transpositions of ``Gemm``."""
    g = only(grads)
    a, b = node.inputs[0], node.inputs[1]
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    flip_a, flip_b = node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)
    scaled = tape.times(g, alpha)
    found: InputGradients = [None, None, None]
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
