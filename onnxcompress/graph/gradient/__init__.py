"""Gradients as nodes: reverse differentiation of a graph by one rule per operator.

:func:`differentiate` appends to a model the nodes that compute how a loss depends on its weights.
The result runs wherever the model runs, so nothing but onnxruntime is needed to follow a gradient.
An operator without a rule, or one that a rule cannot treat as it is used, stops the gradient; what
would have got a part of it through there gets none at all, for a part of a gradient is wrong.

Source: Griewank and Walther 2008, "Evaluating Derivatives", chapter 3 (reverse accumulation).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.graph.gradient import contraction, movement, reduction
from onnxcompress.graph.gradient.elementwise import BROADCAST, UNARY, unary
from onnxcompress.graph.gradient.tape import StoppedError, Tape

__all__ = ["OPSET", "RULES", "Gradients", "differentiate"]

Rule = Callable[[Tape, ir.Node, list[ir.Value | None]], Sequence[ir.Value | None]]
"""From a node and the gradients of its outputs to those of its inputs that are needed."""

RULES: Mapping[str, Rule] = {
    **{name: unary(derivative) for name, derivative in UNARY.items()},
    **BROADCAST,
    "AveragePool": reduction.average_pool,
    "BatchNormalization": reduction.batch_norm,
    "Concat": movement.concat,
    "Conv": contraction.conv,
    "DepthToSpace": movement.depth_to_space,
    "Expand": movement.expand,
    "Flatten": movement.reshape,
    "Gather": movement.gather,
    "Gemm": contraction.gemm,
    "GlobalAveragePool": reduction.global_average_pool,
    "GlobalMaxPool": reduction.reduce_extreme,
    "LayerNormalization": reduction.layer_norm,
    "LogSoftmax": reduction.log_softmax,
    "MatMul": contraction.matmul,
    "MaxPool": reduction.max_pool,
    "Pad": movement.pad,
    "ReduceMax": reduction.reduce_extreme,
    "ReduceMean": reduction.reduce_sum,
    "ReduceMin": reduction.reduce_extreme,
    "ReduceSum": reduction.reduce_sum,
    "Reshape": movement.reshape,
    "Resize": movement.resize,
    "Slice": movement.slice_,
    "Softmax": reduction.softmax,
    "SpaceToDepth": movement.space_to_depth,
    "Split": movement.split,
    "Squeeze": movement.reshape,
    "Transpose": movement.transpose,
    "Unsqueeze": movement.reshape,
}
"""By operator of the default domain."""

OPSET = 18
"""The oldest operator set of models that gradients can be written into."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """What :func:`differentiate` found.

    Attributes:
        of: The gradient of each weight that the loss depends on through rules alone.
        stopped: The nodes that a gradient cannot pass, with the reason.
    """

    of: Mapping[ir.Value, ir.Value]
    stopped: Mapping[str, str]


def differentiate(
    model: ir.Model,
    seeds: Mapping[ir.Value, ir.Value],
    weights: Collection[ir.Value],
    shapes: Mapping[ir.Value, Sequence[int | None]],
) -> Gradients:
    """Append the nodes that compute gradients.

    Args:
        model: The model, of operator set :data:`OPSET` or later, its nodes in an order in which
            they can run; nodes are added to it.
        seeds: Values of the main graph with the gradients of the loss with respect to them alone.
        weights: Values whose gradients are wanted.
        shapes: The shapes of the model's values.
    """
    nodes = list(model.graph)
    needed = set(weights)
    for node in nodes:
        if any(v in needed for v in node.inputs if v is not None):
            needed.update(node.outputs)
    tape = Tape(model, shapes, needed)
    parts: dict[ir.Value, list[ir.Value]] = {v: [g] for v, g in seeds.items()}
    stopped: dict[str, str] = {}
    spoilt: set[ir.Value] = set()
    for node in reversed(nodes):
        if any(output in spoilt for output in node.outputs):
            spoilt.update(v for v in node.inputs if v is not None)
            continue
        grads = [_total(tape, parts.get(output)) for output in node.outputs]
        inputs = [v for v in node.inputs if tape.needs(v)]
        if not inputs or all(g is None for g in grads):
            continue
        try:
            if node.domain or node.op_type not in RULES:
                raise StoppedError("there is no rule for this operator")
            found = RULES[node.op_type](tape, node, grads)
        except StoppedError as error:
            stopped[node.name or node.op_type] = str(error)
            spoilt.update(v for v in node.inputs if v is not None)
            continue
        for value, g in zip(node.inputs, found, strict=False):
            if value is not None and g is not None and tape.needs(value):
                parts.setdefault(value, []).append(g)
    of = {}
    for weight in weights:
        g = None if weight in spoilt else _total(tape, parts.get(weight))
        if g is not None:
            of[weight] = g
    model.graph.extend(tape.take())
    return Gradients(of, stopped)


def _total(tape: Tape, parts: list[ir.Value] | None) -> ir.Value | None:
    """The sum of what comes from all users of a value; later calls find it ready."""
    if not parts:
        return None
    if len(parts) > 1:
        parts[:] = [tape.op("Sum", *parts)]
    return parts[0]
