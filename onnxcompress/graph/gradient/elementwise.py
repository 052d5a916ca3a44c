"""Derivatives of operators that treat every position alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from onnxcompress.graph.constants import scalar_of
from onnxcompress.graph.gradient.tape import InputGradients, StoppedError, Tape, only

Unary = Callable[[Tape, ir.Node, ir.Value, ir.Value, ir.Value], ir.Value]
"""From a node, its input ``x``, its output ``y`` and the gradient of ``y`` to that of ``x``."""


def unary(derivative: Unary) -> Callable[[Tape, ir.Node, list[ir.Value | None]], InputGradients]:
    """The rule of an operator of one differentiable input."""

    def rule(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
        x, y, g = node.inputs[0], node.outputs[0], only(grads)
        assert x is not None  # noqa: S101 - required
        return [derivative(tape, node, x, y, g)]

    return rule


def _relu(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return t.where(t.op("Greater", y, t.floats(0.0)), g)


def _clip(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    for place, operator in ((1, "Greater"), (2, "Less")):
        if len(node.inputs) > place and (bound := node.inputs[place]) is not None:
            g = t.where(t.op(operator, x, bound), g)
    return g


def _leaky(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    slope = node.attributes.get_float("alpha", 0.01)
    return t.op("Where", t.op("Less", x, t.floats(0.0)), t.times(g, slope), g)


def _elu(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    steep = t.op("Mul", g, t.times(t.op("Exp", x), node.attributes.get_float("alpha", 1.0)))
    return t.op("Where", t.op("Less", x, t.floats(0.0)), steep, g)


def _sigmoid(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return t.op("Mul", g, t.op("Mul", y, t.op("Sub", t.floats(1.0), y)))


def _tanh(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return t.op("Mul", g, t.op("Sub", t.floats(1.0), t.op("Mul", y, y)))


def _erf(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    bell = t.op("Exp", t.op("Neg", t.op("Mul", x, x)))
    return t.op("Mul", g, t.times(bell, 2 / math.sqrt(math.pi)))


def _sqrt(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return t.op("Div", t.times(g, 0.5), y)


def _exp(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return t.op("Mul", g, y)


def _log(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return t.op("Div", g, x)


def _neg(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return t.op("Neg", g)


def _abs(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return t.op("Mul", g, t.op("Sign", x))


def _reciprocal(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return t.op("Neg", t.op("Mul", g, t.op("Mul", y, y)))


def _softplus(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return t.op("Mul", g, t.op("Sigmoid", x))


def _hard_sigmoid(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    rising = t.op("And", t.op("Greater", y, t.floats(0.0)), t.op("Less", y, t.floats(1.0)))
    return t.times(t.where(rising, g), node.attributes.get_float("alpha", 0.2))


def _hard_swish(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    slope = t.op("Add", t.times(x, 1 / 3), t.floats(0.5))
    slope = t.op("Where", t.op("Greater", x, t.floats(3.0)), t.floats(1.0), slope)
    return t.op("Mul", g, t.where(t.op("Greater", x, t.floats(-3.0)), slope))


def _gelu(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    """``Φ(x) + x φ(x)``; its approximation by a hyperbolic tangent differs by less than 1e-3."""
    if node.attributes.get_string("approximate", "none") not in {"none", "tanh"}:
        raise StoppedError("its approximation is not known")
    rank = t.times(t.op("Add", t.op("Erf", t.times(x, math.sqrt(0.5))), t.floats(1.0)), 0.5)
    bell = t.times(t.op("Exp", t.times(t.op("Mul", x, x), -0.5)), 1 / math.sqrt(2 * math.pi))
    return t.op("Mul", g, t.op("Add", rank, t.op("Mul", x, bell)))


def _pow(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    power = scalar_of(node.inputs[1])
    if power is None:
        raise StoppedError("its exponent is no constant number")
    if power == 2:
        return t.op("Mul", g, t.times(x, 2.0))
    return t.op("Mul", g, t.times(t.op("Pow", x, t.floats(power - 1)), power))


def _same(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    return g


def _cast(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, g: ir.Value) -> ir.Value:
    if node.attributes.get_int("to", 0) != ir.DataType.FLOAT:
        raise StoppedError("it changes the element type")
    return g


UNARY: Mapping[str, Unary] = {
    "Abs": _abs, "Cast": _cast, "Clip": _clip, "Dropout": _same, "Elu": _elu, "Erf": _erf,
    "Exp": _exp, "Gelu": _gelu, "HardSigmoid": _hard_sigmoid, "HardSwish": _hard_swish,
    "Identity": _same, "LeakyRelu": _leaky, "Log": _log, "Neg": _neg, "Pow": _pow,
    "Reciprocal": _reciprocal, "Relu": _relu, "Sigmoid": _sigmoid, "Softplus": _softplus,
    "Sqrt": _sqrt, "Tanh": _tanh,
}  # fmt: skip


def _each(
    part: Callable[[Tape, ir.Node, int, ir.Value], ir.Value],
) -> Callable[[Tape, ir.Node, list[ir.Value | None]], InputGradients]:
    """The rule of an operator whose inputs are repeated to one shape.

    Args:
        part: From the node, the place of an input and the gradient of the output to that of the
            input once repeated.
    """

    def rule(tape: Tape, node: ir.Node, grads: list[ir.Value | None]) -> InputGradients:
        g = only(grads)
        whole = tape.shape(node.outputs[0])
        return [
            tape.unbroadcast(part(tape, node, place, g), whole, tape.shape(value))
            if tape.needs(value)
            else None
            for place, value in enumerate(node.inputs)
        ]

    return rule


def _add(t: Tape, node: ir.Node, place: int, g: ir.Value) -> ir.Value:
    return g


def _sub(t: Tape, node: ir.Node, place: int, g: ir.Value) -> ir.Value:
    return t.op("Neg", g) if place else g


def _mul(t: Tape, node: ir.Node, place: int, g: ir.Value) -> ir.Value:
    return t.op("Mul", g, node.inputs[1 - place])


def _div(t: Tape, node: ir.Node, place: int, g: ir.Value) -> ir.Value:
    first = t.op("Div", g, node.inputs[1])
    return t.op("Neg", t.op("Mul", first, node.outputs[0])) if place else first


def _extreme(t: Tape, node: ir.Node, place: int, g: ir.Value) -> ir.Value:
    return t.where(t.op("Equal", node.inputs[place], node.outputs[0]), g)


def _chosen(t: Tape, node: ir.Node, place: int, g: ir.Value) -> ir.Value:
    condition, zero = node.inputs[0], t.floats(0.0)
    return t.op("Where", condition, *((g, zero) if place == 1 else (zero, g)))


def _parametric(t: Tape, node: ir.Node, place: int, g: ir.Value) -> ir.Value:
    x, slope = node.inputs
    assert x is not None  # noqa: S101 - required
    assert slope is not None  # noqa: S101 - required
    below = t.op("Less", x, t.floats(0.0))
    if place:
        return t.where(below, t.op("Mul", g, x))
    return t.op("Where", below, t.op("Mul", g, slope), g)


BROADCAST = {
    "Add": _each(_add),
    "Div": _each(_div),
    "Max": _each(_extreme),
    "Min": _each(_extreme),
    "Mul": _each(_mul),
    "PRelu": _each(_parametric),
    "Sub": _each(_sub),
    "Sum": _each(_add),
    "Where": _each(_chosen),
}
