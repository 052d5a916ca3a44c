"""One rule per operator: what a node does with factors on its output, or on one of its inputs.

*Through* operators commute with positive factors and hand them on (Relu, pools, Add, Transpose).
*Linear* ones take them up in a constant, on either side (Conv, Gemm, MatMul, Mul by a vector). A
normalization takes them up in its scale and shift, on the output only. All else refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_tensor, is_constant, scalar_of
from onnxcompress.graph.scaling.absorb import Absorb, Ids


class RefusedError(Exception):
    """The factors cannot be handed on; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Step:
    """What follows from factors on one tensor of a node.

    Attributes:
        values: Further tensors that must be scaled, with their units. Negative ones are new units:
            -1 is the first new one of this step, -2 the second.
        absorbs: Constants that take the factors up.
    """

    values: tuple[tuple[ir.Value, Ids], ...] = ()
    absorbs: tuple[Absorb, ...] = ()


_STANDARD = frozenset({"", "ai.onnx"})


def write_rule(node: ir.Node, value: ir.Value, ids: Ids) -> Sequence[Step]:
    """The ways to make ``value``, an output of ``node``, scaled; at least one, the best first.

    Raises:
        RefusedError: If there is none.
    """
    rule = _rule(node)
    if node.outputs[0] is not value:
        raise _refused(node, "its second output would be scaled")
    return rule(node, None, ids)


def read_rule(node: ir.Node, place: int, ids: Ids) -> Step:
    """What follows when input ``place`` of ``node`` is scaled.

    Raises:
        RefusedError: If the node cannot read it.
    """
    return _rule(node)(node, place, ids)[0]


_Rule = Callable[[ir.Node, int | None, Ids], Sequence[Step]]
"""Takes the node, the input that is scaled (None: the output), and the units."""


def _rule(node: ir.Node) -> _Rule:
    found = _RULES.get(node.op_type) if node.domain in _STANDARD else None
    if found is None:
        raise _refused(node, "it does not commute with factors per channel")
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        raise _refused(node, "its second output is used")
    return found


def _refused(node: ir.Node, why: str) -> RefusedError:
    return RefusedError(f"{node.op_type} '{node.name}': {why}")


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None:
        raise _refused(node, f"input {place} is absent")
    return value


def _dims(node: ir.Node, value: ir.Value) -> list[int | None]:
    if value.shape is None:
        raise _refused(node, f"the rank of '{value.name}' is unknown")
    return [d if isinstance(d, int) else None for d in value.shape]


def _only_axis(node: ir.Node, ids: Ids, axis: int) -> Ids:
    """The units along ``axis`` as a vector, refused where another axis carries factors."""
    if ids.ndim <= max(axis, 0) or ids.size != ids.shape[axis]:
        raise _refused(node, f"the factors are not along its axis {axis}")
    return ids.reshape(-1)


def _weight(node: ir.Node, place: int) -> tuple[int, ...]:
    """The shape of a constant weight of this node alone."""
    value = _input(node, place)
    tensor = constant_tensor(value)
    if tensor is None:
        raise _refused(node, "its weight is computed at run time")
    if tensor.dtype not in {ir.DataType.FLOAT, ir.DataType.DOUBLE}:
        raise _refused(node, f"its weight is {tensor.dtype.name}")
    if len(value.uses()) > 1 or value.is_graph_output():
        raise _refused(node, f"its weight '{value.name}' has other users")
    return tuple(tensor.shape.numpy())


# --- operators that hand factors on ---------------------------------------------------------------


def _same(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    """Input 0 and output carry the same factors (Relu, Identity, LeakyRelu, PRelu)."""
    if place not in {None, 0}:
        raise _refused(node, "the scaled tensor is its parameter")
    other = node.outputs[0] if place == 0 else _input(node, 0)
    return [Step(((other, ids),))]


def _clip(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    for bound in (1, 2):
        value = node.inputs[bound] if bound < len(node.inputs) else None
        number = None if value is None else scalar_of(value)
        if value is not None and number is None:
            raise _refused(node, "its bounds are computed at run time")
        if number is not None and number != 0 and abs(number) < 3e38:
            raise _refused(node, f"its bound {number:g} would have to differ per channel")
    return _same(node, place, ids)


def _pool(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    if any(n != 1 for n in ids.shape[2:]):
        raise _refused(node, "it joins positions that have different factors")
    return _same(node, place, ids)


def _pad(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    mode = node.attributes.get_string("mode", "constant")
    pads = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    if pads is None or axes is not None or pads.size != 2 * ids.ndim:
        raise _refused(node, "where it pads is not known")
    if mode == "constant" and fill is not None and scalar_of(fill) != 0:
        raise _refused(node, "it pads with something else than 0")
    if place not in {None, 0}:
        raise _refused(node, "the scaled tensor is its parameter")
    around = np.asarray(pads.numpy(), np.int64).reshape(2, -1).T.tolist()
    along = [axis for axis, n in enumerate(ids.shape) if n != 1 and any(around[axis])]
    if not along:
        return _same(node, place, ids)
    if len(along) > 1 or mode != "constant" or min(around[along[0]]) < 0:
        raise _refused(node, "it repeats or drops channels")
    axis = along[0]
    before, behind = around[axis]
    if place is None:
        kept = np.take(ids, range(before, ids.shape[axis] - behind), axis)
        return [Step(((_input(node, 0), kept),))]
    # Channels of zeros have factors of their own: 0 stays 0 with any.
    return [Step(((node.outputs[0], _between(ids, axis, before, behind)),))]


def _between(ids: Ids, axis: int, before: int, behind: int) -> Ids:
    """``ids`` between channels that have factors of their own."""
    front, back = list(ids.shape), list(ids.shape)
    front[axis], back[axis] = before, behind
    parts = [_fresh(front), ids, _fresh(back, math.prod(front))]
    return np.concatenate(parts, axis)


def _fresh(shape: Sequence[int], start: int = 0) -> Ids:
    """New units of a step, behind ``start`` others."""
    return -1 - start - np.arange(math.prod(shape), dtype=np.int64).reshape(shape)


def _slice(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    """A part of the positions has the factors of all; a part of the channels is not followed."""
    if place not in {None, 0}:
        raise _refused(node, "the scaled tensor is its parameter")
    source, output = _dims(node, _input(node, 0)), _dims(node, node.outputs[0])
    if any(n != 1 and a != b for n, a, b in zip(ids.shape, source, output, strict=True)):
        raise _refused(node, "it takes a part of the channels")
    steps = constant_tensor(node.inputs[4]) if len(node.inputs) > 4 else None
    if len(node.inputs) > 4 and (steps is None or (np.asarray(steps.numpy()) < 0).any()):
        raise _refused(node, "it may turn the channels around")
    return _same(node, place, ids)


def _add(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    """All operands and the output carry the same factors; constants take them up."""
    operands = [v for v in node.inputs if v is not None]
    output = node.outputs[0]
    whole = ids
    rank = len(_dims(node, output))
    if place is not None:
        whole = ids.reshape([1] * (rank - ids.ndim) + list(ids.shape))
    values: list[tuple[ir.Value, Ids]] = [(output, whole)]
    absorbs = []
    for at, operand in enumerate(operands):
        if is_constant(operand):
            absorbs.append(_constant_operand(node, at, whole, 1))
            continue
        dims = _dims(node, operand)
        padded = [1] * (rank - len(dims)) + dims
        if any(n != 1 and d != n for n, d in zip(whole.shape, padded, strict=True)):
            raise _refused(node, f"'{operand.name}' is spread over the channels")
        values.append((operand, whole.reshape(whole.shape[rank - len(dims) :])))
    return [Step(tuple(values), tuple(absorbs))]


def _constant_operand(node: ir.Node, place: int, ids: Ids, power: int) -> Absorb:
    """A constant operand of arithmetic takes factors up; it may grow to one entry per unit."""
    value = _input(node, place)
    tensor = constant_tensor(value)
    shape = () if tensor is None else tuple(tensor.shape.numpy())
    if tensor is None or not tensor.dtype.is_floating_point() or len(shape) > ids.ndim:
        raise _refused(node, f"its operand '{value.name}' cannot take factors up")
    while ids.ndim > 1 and ids.shape[0] == 1 and ids.ndim > len(shape):
        ids = ids[0]
    return Absorb(node, place, ids, power)


def _mul(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    """A vector takes the factors up; a number or a computed operand lets them through."""
    constants = [i for i, v in enumerate(node.inputs) if is_constant(v)]
    if place is not None and place in constants:
        raise _refused(node, "the scaled tensor is constant")
    output = node.outputs[0]
    if constants:
        return [_scaled_by_constant(node, place, ids, constants[0])]
    if node.inputs[0] is node.inputs[-1]:
        raise _refused(node, "it squares its input")
    if place is not None:
        if node.op_type == "Div" and place == 1:
            raise _refused(node, "it divides by the scaled tensor")
        return [Step(((output, _spread(node, ids, output)),))]
    steps = []
    for at in (0,) if node.op_type == "Div" else (0, 1):
        operand = _input(node, at)
        dims = _dims(node, operand)
        if len(dims) == ids.ndim and all(n in (1, d) for n, d in zip(ids.shape, dims, strict=True)):
            steps.append(Step(((operand, ids),)))
    if not steps:
        raise _refused(node, "no operand has the channels of its output")
    return steps


def _spread(node: ir.Node, ids: Ids, output: ir.Value) -> Ids:
    rank = len(_dims(node, output))
    return ids.reshape([1] * (rank - ids.ndim) + list(ids.shape))


def _scaled_by_constant(node: ir.Node, place: int | None, ids: Ids, at: int) -> Step:
    tensor = constant_tensor(node.inputs[at])
    size = 1 if tensor is None else tensor.size
    data = _input(node, 1 - at)
    if node.op_type == "Div" and at == 0:
        raise _refused(node, "it divides by computed data")
    if size == 1:
        other = data if place is None else node.outputs[0]
        return Step(((other, _spread(node, ids, other)),))
    inverse = -1 if node.op_type == "Div" else 1
    if place is not None:
        ids = _spread(node, ids, node.outputs[0])
    return Step(absorbs=(_constant_operand(node, at, ids, inverse if place is None else -inverse),))


def _concat(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    axis = node.attributes.get_int("axis", 0) or 0
    if any(is_constant(v) for v in node.inputs):
        raise _refused(node, "it joins a constant")
    operands = [v for v in node.inputs if v is not None]
    if ids.shape[axis] == 1:
        values = [(v, ids) for v in operands]
        return [Step(((node.outputs[0], ids), *values))]
    lengths = [_dims(node, v)[axis] for v in operands]
    known = [n for n in lengths if n is not None]
    if len(known) < len(lengths):
        raise _refused(node, "it joins channels, and how many is unknown")
    ends = np.cumsum(known)
    if place is not None:
        before = int(ends[place]) - known[place]
        return [
            Step(((node.outputs[0], _between(ids, axis, before, int(ends[-1] - ends[place]))),))
        ]
    parts = np.split(ids, ends[:-1], axis)
    return [Step(tuple(zip(operands, parts, strict=True)))]


def _transpose(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    order = node.attributes.get_ints("perm", None) or tuple(reversed(range(ids.ndim)))
    if place is None:
        return [Step(((_input(node, 0), ids.transpose(np.argsort(order))),))]
    return [Step(((node.outputs[0], ids.transpose(order)),))]


def _reshape(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    """Factors within the last axes of fixed length, which the operator only regroups."""
    if place not in {None, 0}:
        raise _refused(node, "the scaled tensor is its parameter")
    data, output = _input(node, 0), node.outputs[0]
    source, target = (output, data) if place is None else (data, output)
    before, after = _dims(node, source), _dims(node, target)
    first = next((i for i, n in enumerate(ids.shape) if n != 1), len(ids.shape) - 1)
    for start in range(first, -1, -1):
        block = before[start:]
        if None in block:
            break
        size = math.prod(n for n in block if n is not None)
        for other in range(len(after) - 1, -1, -1):
            tail = after[other:]
            if None in tail:
                break
            if math.prod(n for n in tail if n is not None) == size:
                lengths = [n for n in block if n is not None]
                spread = np.broadcast_to(ids.reshape(ids.shape[start:]), lengths)
                made = spread.reshape([1] * other + [n for n in tail if n is not None])
                return [Step(((target, _narrow(made)),))]
    raise _refused(node, "it regroups axes of unknown length")


def _narrow(ids: Ids) -> Ids:
    """Give axes along which the units do not change the length 1."""
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1 and (ids == ids.take([0], axis)).all():
            ids = ids.take([0], axis)
    return ids


# --- operators that take factors up ---------------------------------------------------------------


def _conv(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    units = _only_axis(node, ids, 1)
    shape = _weight(node, 1)
    ones = [1] * (len(shape) - 2)
    groups = node.attributes.get_int("group", 1) or 1
    if place is None:
        return [_makes(node, units, units.reshape(-1, 1, *ones))]
    if place != 0:
        raise _refused(node, "its weight is computed at run time")
    per_group = units.reshape(groups, 1, -1)
    rows = np.broadcast_to(per_group, (groups, shape[0] // groups, shape[1]))
    weight = units.reshape(1, -1, *ones) if groups == 1 else rows.reshape(*shape[:2], *ones)
    return [Step(absorbs=(Absorb(node, 1, weight, -1, contracts=True),))]


def _conv_transpose(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    units = _only_axis(node, ids, 1)
    shape = _weight(node, 1)
    ones = [1] * (len(shape) - 2)
    groups = node.attributes.get_int("group", 1) or 1
    if place is None:
        columns = np.broadcast_to(
            units.reshape(groups, 1, -1), (groups, shape[0] // groups, shape[1])
        )
        return [_makes(node, units, columns.reshape(*shape[:2], *ones))]
    if place != 0:
        raise _refused(node, "its weight is computed at run time")
    return [Step(absorbs=(Absorb(node, 1, units.reshape(-1, 1, *ones), -1, contracts=True),))]


def _makes(node: ir.Node, units: Ids, weight: Ids) -> Step:
    """Factors on the output: rows of the weight, and the bias."""
    absorbs = [Absorb(node, 1, weight, 1, contracts=True)]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        if not is_constant(bias):
            raise _refused(node, "its bias is computed at run time")
        absorbs.append(Absorb(node, 2, units, 1))
    return Step(absorbs=tuple(absorbs))


def _gemm(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    units = _only_axis(node, ids, -1)
    _weight(node, 1)
    transposed = bool(node.attributes.get_int("transB", 0))
    if place is None:
        return [_makes(node, units, units.reshape(-1, 1) if transposed else units)]
    sideways = bool(node.attributes.get_int("transA", 0))
    if place != 0 or sideways:
        raise _refused(node, "the scaled tensor is not its plain data")
    weight = units if transposed else units.reshape(-1, 1)
    return [Step(absorbs=(Absorb(node, 1, weight, -1, contracts=True),))]


def _matmul(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    if is_constant(_input(node, 0)) or (place == 0 and not is_constant(_input(node, 1))):
        raise _refused(node, "its factors are no weight behind data")
    if not is_constant(_input(node, 1)):
        return _weighted_sum(node, place, ids)
    units = _only_axis(node, ids, -1)
    shape = _weight(node, 1)
    if len(shape) != 2:
        raise _refused(node, f"its weight has shape {list(shape)}")
    if place is None:
        return [Step(absorbs=(Absorb(node, 1, units, 1, contracts=True),))]
    return [Step(absorbs=(Absorb(node, 1, units.reshape(-1, 1), -1, contracts=True),))]


def _weighted_sum(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    """Computed weights times data, as attention sums its values: the data carry the factors."""
    data, output = _input(node, 1), node.outputs[0]
    if data is node.inputs[0]:
        raise _refused(node, "it multiplies a tensor with itself")
    dims = _dims(node, data)
    if len(dims) != len(_dims(node, output)) or ids.ndim != len(dims) or ids.ndim < 2:
        raise _refused(node, "its operands have different ranks")
    if ids.shape[-2] != 1:
        raise _refused(node, "it sums over channels with different factors")
    if any(n not in (1, d) for n, d in zip(ids.shape, dims, strict=True)):
        raise _refused(node, "its data are spread over the channels")
    return [Step(((data if place is None else output, ids),))]


def _batch_norm(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    units = _only_axis(node, ids, 1)
    for at in (1, 2, 3, 4):
        if not is_constant(_input(node, at)):
            raise _refused(node, "its parameters are computed at run time")
    if place is None:
        return [Step(absorbs=(Absorb(node, 1, units, 1), Absorb(node, 2, units, 1)))]
    return [Step(absorbs=(Absorb(node, 1, units, -1), Absorb(node, 3, units, 1)))]


def _normalization(node: ir.Node, place: int | None, ids: Ids) -> Sequence[Step]:
    """Layer, RMS and instance normalization: the scale and the shift make the output."""
    if place is not None:
        raise _refused(node, "it normalizes over the channels")
    axis = 1 if node.op_type == "InstanceNormalization" else -1
    units = _only_axis(node, ids, axis)
    absorbs = []
    for at in (1, 2):
        value = node.inputs[at] if at < len(node.inputs) else None
        if value is None:
            continue
        tensor = constant_tensor(value)
        if tensor is None or tuple(tensor.shape.numpy()) != (units.size,):
            raise _refused(node, "its scale or shift is no vector of its channels")
        absorbs.append(Absorb(node, at, units, 1))
    return [Step(absorbs=tuple(absorbs))]


_RULES: Mapping[str, _Rule] = {
    "Add": _add,
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": _mul,
    "Dropout": _same,
    "Flatten": _reshape,
    "Gemm": _gemm,
    "GlobalAveragePool": _pool,
    "GlobalMaxPool": _pool,
    "Identity": _same,
    "InstanceNormalization": _normalization,
    "LayerNormalization": _normalization,
    "LeakyRelu": _same,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Mul": _mul,
    "PRelu": _same,
    "Pad": _pad,
    "RMSNormalization": _normalization,
    "Relu": _same,
    "Reshape": _reshape,
    "SimplifiedLayerNormalization": _normalization,
    "Slice": _slice,
    "Squeeze": _reshape,
    "Sub": _add,
    "Sum": _add,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
