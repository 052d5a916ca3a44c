"""What the fold pass reads and computes: linear nodes, affine nodes and the weights made of both.

The equations stand in :mod:`onnxcompress.passes.fold`. Nothing here changes a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of, constant_tensor, is_constant

Float64 = npt.NDArray[np.float64]

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ELEMENTWISE = frozenset({"Mul", "Div", "Add", "Sub"})


class RefusedError(Exception):
    """An affine node cannot be folded; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Affine:
    """y' = scale·y + shift per channel; both [channels] float64."""

    scale: Float64
    shift: Float64

    def then(self, later: Affine) -> Affine:
        """This one first, ``later`` on its result."""
        return Affine(later.scale * self.scale, later.scale * self.shift + later.shift)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear node with a constant weight of its own.

    Attributes:
        node: The node.
        weight: Its weight.
        channels: Number of output channels.
        trailing: Axes of the output behind the channel axis.
        rank: Rank of the output; None when unknown.
    """

    node: ir.Node
    weight: ir.Value
    channels: int
    trailing: int
    rank: int | None


# --- reading the graph ----------------------------------------------------------------------------


def is_op(node: ir.Node, op_types: frozenset[str] | set[str]) -> bool:
    """Whether ``node`` is one of these operators of the standard domain."""
    return node.domain == "" and node.op_type in op_types


def label(node: ir.Node) -> str:
    """How messages call a node."""
    return f"{node.op_type} '{node.name}'"


def required(value: ir.Value | None) -> ir.Value:
    """``value``, refused where it is absent."""
    if value is None:
        raise RefusedError("an input is absent")
    return value


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph or subgraph that ``node`` is in."""
    if not isinstance(node.graph, ir.Graph):
        raise TypeError(f"{label(node)} is in a function; inline functions before passes run")
    return node.graph


def array_of(value: ir.Value) -> npt.NDArray[np.generic]:
    """The data of a constant, refused where it is none."""
    array = constant_of(value)
    if array is None:
        raise RefusedError(f"'{value.name}' is not constant")
    return array


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of a constant, refused where it is none."""
    tensor = constant_tensor(value)
    if tensor is None:
        raise RefusedError(f"'{value.name}' is not constant")
    return tuple(tensor.shape.numpy())


def _float64(value: ir.Value | None, what: str) -> Float64:
    array = constant_of(value)
    if array is None:
        raise RefusedError(f"its {what} is not constant")
    return array.astype(np.float64)


def is_candidate(node: ir.Node) -> bool:
    """BatchNormalization, or an elementwise operator with exactly one constant operand."""
    if is_op(node, {"BatchNormalization"}):
        return True
    return is_op(node, ELEMENTWISE) and sum(is_constant(v) for v in node.inputs) == 1


def linear_of(node: ir.Node) -> Linear:
    """Describe a linear node.

    Raises:
        RefusedError: If its weight or bias is not constant, or its weight is shared.
    """
    weight = node.inputs[1]
    if weight is None or not is_constant(weight):
        raise RefusedError(f"the weight of {label(node)} is not constant")
    if len(weight.uses()) > 1 or weight.is_graph_output():
        raise RefusedError(
            f"the weight '{weight.name}' of {label(node)} has other users and would be duplicated"
        )
    shape = shape_of(weight)
    if weight.dtype is None or not weight.dtype.is_floating_point() or len(shape) < 2:
        raise RefusedError(f"the weight of {label(node)} is {weight.dtype} {list(shape)}")
    if len(node.inputs) > 2 and node.inputs[2] is not None and not is_constant(node.inputs[2]):
        raise RefusedError(f"the bias of {label(node)} is not constant")
    if node.op_type == "Conv":
        return Linear(node, weight, shape[0], len(shape) - 2, len(shape))
    if node.op_type == "ConvTranspose":
        groups = node.attributes.get_int("group", 1) or 1
        return Linear(node, weight, shape[1] * groups, len(shape) - 2, len(shape))
    if node.op_type == "Gemm":
        return Linear(node, weight, shape[0 if _flag(node, "transB") else 1], 0, 2)
    data = node.inputs[0]
    rank = None
    if data is not None and data.shape is not None:  # a vector loses its axis in the product
        rank = max(len(data.shape), len(shape)) if len(data.shape) > 1 else len(shape) - 1
    return Linear(node, weight, shape[-1], 0, rank)


def _flag(node: ir.Node, name: str) -> bool:
    return bool(node.attributes.get_int(name, 0))


def only_user(value: ir.Value, producer: ir.Node) -> ir.Node:
    """The one node that reads ``value``; refused if there are more or the graph returns it."""
    if value.is_graph_output():
        raise RefusedError(f"the output of {label(producer)} is an output of the graph")
    users = value.uses()
    if len(users) != 1:
        others = ", ".join(label(node) for node, _ in users)
        raise RefusedError(f"the output of {label(producer)} has several consumers: {others}")
    return next(iter(users)).node


def next_affine(linear: Linear, value: ir.Value) -> tuple[ir.Node, Affine] | None:
    """The affine node that alone reads ``value``; None where something else follows.

    Raises:
        RefusedError: If one follows that cannot be folded.
    """
    producer = value.producer()
    if producer is None or not any(is_candidate(user) for user, _ in value.uses()):
        return None
    user = only_user(value, producer)
    if user.graph is not linear.node.graph:
        raise RefusedError(f"it is in a subgraph and {label(producer)} is not")
    if user.op_type == "BatchNormalization":
        if linear.rank is None:
            raise RefusedError(f"the rank of the output of {label(linear.node)} is unknown")
        if linear.rank - linear.trailing - 1 != 1:
            raise RefusedError(f"it normalizes axis 1, {label(linear.node)} makes another axis")
        return user, batch_norm(user)
    return user, _elementwise(linear, user, value)


def batch_norm(node: ir.Node) -> Affine:
    """Scale and shift of a BatchNormalization in inference mode."""
    if _flag(node, "training_mode") or any(
        o.uses() or o.is_graph_output() for o in node.outputs[1:]
    ):
        raise RefusedError("it is in training mode")
    if node.attributes.get_int("spatial", 1) == 0:
        raise RefusedError("it normalizes every position on its own (spatial=0)")
    names = ("scale", "bias", "mean", "variance")
    scale, shift, mean, variance = (
        _float64(v, n) for v, n in zip(node.inputs[1:5], names, strict=True)
    )
    epsilon = node.attributes.get_float("epsilon", 1e-5) or 0.0
    if np.any(variance + epsilon <= 0) or not np.isfinite(variance).all():
        raise RefusedError("its variance is not positive everywhere")
    factor = scale / np.sqrt(variance + epsilon)
    return Affine(factor, shift - mean * factor)


def _elementwise(linear: Linear, node: ir.Node, value: ir.Value) -> Affine:
    """Scale and shift of Mul, Div, Add or Sub with one constant operand."""
    left, right = node.inputs
    constant_first = right is value
    constant = _per_channel(linear, _float64(left if constant_first else right, "operand"))
    one, zero = np.ones(linear.channels), np.zeros(linear.channels)
    if node.op_type == "Mul":
        return Affine(constant, zero)
    if node.op_type == "Add":
        return Affine(one, constant)
    if node.op_type == "Sub":
        return Affine(-one, constant) if constant_first else Affine(one, -constant)
    if constant_first:
        raise RefusedError("it divides a constant by its input, which is not linear")
    if not np.all(constant):
        raise RefusedError("it divides by zero")
    return Affine(1 / constant, zero)


def _per_channel(linear: Linear, constant: Float64) -> Float64:
    """Bring a broadcast constant to [channels].

    Raises:
        RefusedError: If it varies along another axis, or its rank would change that of the output.
    """
    if linear.rank is not None and constant.ndim > linear.rank:
        raise RefusedError(f"its constant {list(constant.shape)} has more axes than its input")
    if linear.rank is None and constant.ndim > linear.trailing + 1:
        raise RefusedError(f"the rank of the output of {label(linear.node)} is unknown")
    axis = constant.ndim - 1 - linear.trailing  # from the right, as broadcasting aligns
    along = constant.shape[axis] if axis >= 0 else 1
    if constant.size != along or along not in (1, linear.channels):
        raise RefusedError(
            f"its constant {list(constant.shape)} is not one number per channel ({linear.channels})"
        )
    return np.broadcast_to(constant.reshape(-1), (linear.channels,)).copy()


# --- writing the weights --------------------------------------------------------------------------


def scale_outputs(linear: Linear, scale: Float64) -> Float64:
    """The weight [float64] with every output channel scaled; ``scale`` is [channels]."""
    node, weight = linear.node, _float64(linear.weight, "weight")
    if node.op_type == "Conv":
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    if node.op_type == "ConvTranspose":  # [C, M/g, ...]: channel c is in group c // (C/g)
        groups = node.attributes.get_int("group", 1) or 1
        per_group = weight.reshape(groups, -1, *weight.shape[1:])
        factor = scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        return (per_group * factor).reshape(weight.shape)
    if node.op_type == "Gemm" and _flag(node, "transB"):
        return weight * scale[:, None]
    return weight * scale


def scale_inputs(linear: Linear, affine: Affine) -> tuple[Float64, Float64]:
    """The weight [float64] with input channels scaled, and what the shift adds to the bias.

    Raises:
        RefusedError: If the shift meets padding, or Gemm transposes its input.
    """
    node, weight = linear.node, _float64(linear.weight, "weight")
    scale, shift = affine.scale, affine.shift
    if node.op_type == "Gemm":
        if _flag(node, "transA"):
            raise RefusedError(f"{label(node)} transposes its input")
        alpha = node.attributes.get_float("alpha", 1.0)
        if _flag(node, "transB"):
            return weight * scale, np.asarray(alpha * (weight @ shift))
        return weight * scale[:, None], np.asarray(alpha * (shift @ weight))
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    pads = node.attributes.get_ints("pads", ()) or ()
    if np.any(shift) and (auto_pad not in ("NOTSET", "VALID") or any(pads)):
        raise RefusedError(f"{label(node)} behind it pads with zeros, which it would shift")
    groups = node.attributes.get_int("group", 1) or 1
    ones = [1] * (weight.ndim - 2)
    per_group = weight.reshape(groups, -1, *weight.shape[1:])  # [g, M/g, C/g, ...]
    scaled = per_group * scale.reshape(groups, 1, weight.shape[1], *ones)
    moved = per_group * shift.reshape(groups, 1, weight.shape[1], *ones)
    return scaled.reshape(weight.shape), moved.reshape(weight.shape[0], -1).sum(1)


def bias_of(linear: Linear) -> Float64:
    """The bias [channels] float64 that the node adds now; zeros where it has none.

    Raises:
        RefusedError: If Gemm adds something else than one number per channel.
    """
    node = linear.node
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(linear.channels)
    bias = _float64(value, "bias")
    if node.op_type == "Gemm":
        beta = node.attributes.get_float("beta", 1.0)
        return _per_channel(linear, np.asarray(beta * bias))
    return bias
