"""Conv, ConvTranspose, Gemm, MatMul and Einsum: one axis of each operand is summed over.

The summed axes of both operands are the same channels; the free axes pass through to the output.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.rules.base import (
    Axes,
    Outputs,
    Rule,
    Shrink,
    Trace,
    attribute_int,
    attribute_text,
    input_value,
    is_weight,
)
from onnxcompress.graph.unions import Labels

# --- convolution ---------------------------------------------------------------------------


def _conv(t: Trace) -> Outputs:
    """Y[n, o, ...] = sum over c, k of W[o, c, k] X[n, group(o)·C/G + c, ...] + B[o].

    A grouped convolution shares the places of its weight's input axis across groups, so channels
    go by place (the i-th of every group together). Where a group has a single input or output
    channel they go by whole groups instead: the depthwise convolution.
    """
    return any_conv(t, transposed=False)


def _conv_transpose(t: Trace) -> Outputs:
    """As :func:`_conv` with the weight as ``[C, O / group, kernel]``."""
    return any_conv(t, transposed=True)


def any_conv(t: Trace, *, transposed: bool, bias: int = 2) -> Outputs:
    """A convolution of input 0 with input 1; ``bias`` is the index of the bias."""
    weight, weight_shape = t.axes(1), t.shape(1)
    if weight is None or weight_shape is None or len(weight) < 3:
        return [None]
    rank = len(weight)
    data = t.axes(0)
    if data is None or len(data) != rank:
        data = (None,) * rank
    groups = attribute_int(t.node, "group", 1)
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    # Input and output channels per group; the axis of the weight that spans all groups is axis 0.
    spanning, per_group = weight_shape[0], weight_shape[1]
    if spanning is None or per_group is None or groups < 1 or spanning % groups:
        return [None]
    ins, outs = (spanning // groups, per_group) if transposed else (per_group, spanning // groups)
    for labels in weight[2:]:
        t.freeze(labels, "is a spatial axis of the kernel")
    if groups == 1:
        t.tie(data[1], weight[in_axis])
        channels = weight[out_axis]
        t.contract(0, 1, 1, in_axis)
    elif ins == 1 or outs == 1:
        channels = _by_group(t, data[1], weight, groups, ins, outs)
    else:
        channels = _by_place(t, data[1], weight, groups, transposed=transposed)
        t.contract(0, 1, 1, in_axis)
    if input_value(t.node, bias) is not None:
        shift = t.axes(bias)
        channels = t.tie(channels, shift[0] if shift else None)
    t.produce(0, 1, 1, 0 if groups > 1 and (ins == 1 or outs == 1) else out_axis)
    free = t.node.inputs[0] if transposed else t.node.outputs[0]
    t.macs([*((free, i) for i in range(rank)), *((t.node.inputs[1], i) for i in range(1, rank))])
    return [(data[0], channels, *(None for _ in range(rank - 2)))]


def _by_group(
    t: Trace, data: Labels | None, weight: Axes, groups: int, ins: int, outs: int
) -> Labels | None:
    """Whole groups come and go: the depthwise convolution and its relatives."""
    t.freeze(weight[1], "is shared by all groups of the convolution")
    spanning = weight[0]
    if spanning is None or data is None:
        t.tie(data, spanning)
        return None
    per_group = spanning.reshape(groups, -1)
    t.tie(per_group, per_group[:, :1])
    channels = data.reshape(groups, ins)
    t.tie(channels, channels[:, :1])
    t.tie(channels[:, 0], per_group[:, 0])
    t.drop(data)
    t.drop(spanning)
    return np.repeat(per_group[:, 0], outs)


def _by_place(
    t: Trace, data: Labels | None, weight: Axes, groups: int, *, transposed: bool
) -> Labels | None:
    """The same place of every group goes together."""
    spanning, per_group = weight[0], weight[1]
    if spanning is not None:
        places = spanning.reshape(groups, -1)
        t.tie(places, places[:1])
    tiled = None if per_group is None else np.tile(per_group, groups)
    if transposed:
        t.tie(data, spanning)
        t.drop(per_group)
        return tiled
    t.tie(data, tiled)
    t.drop(per_group)
    return spanning


def shrink_conv(s: Shrink) -> None:
    """Group = input channels / weight's input channels per group, whichever of them shrank."""
    _shrink_group(s, s.node.inputs[0], 1)


def _shrink_conv_transpose(s: Shrink) -> None:
    _shrink_group(s, s.node.outputs[0], 1)


def _shrink_group(s: Shrink, value: ir.Value | None, axis: int) -> None:
    groups = attribute_int(s.node, "group", 1)
    if groups == 1:
        return
    channels, per_group = s.kept(value, axis), s.input_kept(1, 1)
    if channels is None:
        return
    # Before: len(channels) = groups * places; places shrink with the weight's axis 1.
    places = len(channels) // groups if per_group is None else int(per_group.sum())
    s.set_int("group", int(channels.sum()) // places)


# --- matrix products -----------------------------------------------------------------------


def _gemm(t: Trace) -> Outputs:
    """Y = alpha · A' B' + beta · C, with A' = Aᵀ if transA."""
    a, b = t.axes(0) or (None, None), t.axes(1) or (None, None)
    if len(a) != 2 or len(b) != 2:
        return [None]
    a_sum = 0 if attribute_int(t.node, "transA", 0) else 1
    b_sum = 1 if attribute_int(t.node, "transB", 0) else 0
    t.tie(a[a_sum], b[b_sum])
    rows, columns = a[1 - a_sum], b[1 - b_sum]
    _record(t, (0, a_sum, 1 - a_sum, 0), (1, b_sum, 1 - b_sum, 1))
    y = t.node.outputs[0]
    t.macs([(y, 0), (y, 1), (t.node.inputs[1], b_sum)])
    bias, bias_shape = t.axes(2), t.shape(2)
    if input_value(t.node, 2) is not None and (bias is None or bias_shape is None):
        return [None]
    for position, labels in ((-1, columns), (-2, rows)):
        if bias is None or bias_shape is None or len(bias) < -position or bias_shape[position] == 1:
            continue
        if t.tie(labels, bias[position]) is None:
            rows, columns = (rows, None) if position == -1 else (None, columns)
    return [(rows, columns)]


def _matmul(t: Trace) -> Outputs:
    """Y[..., m, n] = sum over k of A[..., m, k] B[..., k, n]; batch axes broadcast."""
    return matrix_product(t, False, False)


def matrix_product(t: Trace, left: bool, right: bool) -> Outputs:
    """As :func:`_matmul`, with the last two axes of an operand swapped where its flag is set."""
    a, b = t.axes(0), t.axes(1)
    if a is None or b is None or not a or not b:
        return [None]
    # A vector has no second axis to swap.
    left, right = left and len(a) > 1, right and len(b) > 1
    a_sum = len(a) - (2 if left else 1)
    b_sum = len(b) - 1 if right else max(len(b) - 2, 0)
    a_free, b_free = len(a) - (1 if left else 2), len(b) - (2 if right else 1)
    t.tie(a[a_sum], b[b_sum])
    batch = _batch(t, a[:-2], b[:-2])
    rows = (a[a_free],) if len(a) > 1 else ()
    columns = (b[b_free],) if len(b) > 1 else ()
    y = t.node.outputs[0]
    rank = len(batch) + len(rows) + len(columns)
    _record(
        t,
        (0, a_sum, a_free if rows else None, len(batch)),
        (1, b_sum, b_free if columns else None, rank - 1),
    )
    t.macs([*((y, i) for i in range(rank)), (t.node.inputs[0], a_sum)])
    return [(*batch, *rows, *columns)]


def _batch(t: Trace, a: Axes, b: Axes) -> Axes:
    a_shape, b_shape = t.shape(0) or (), t.shape(1) or ()
    result: list[Labels | None] = []
    for position in range(-max(len(a), len(b)), 0):
        meeting = [
            axes[position]
            for axes, shape in ((a, a_shape[:-2]), (b, b_shape[:-2]))
            if len(axes) >= -position and shape[position] != 1
        ]
        result.append(
            t.tie(meeting[0], meeting[1]) if len(meeting) == 2 else (meeting or [None])[0]
        )
    return tuple(result)


_Operand = tuple[int, int, int | None, int]


def _record(t: Trace, left: _Operand, right: _Operand) -> None:
    """Tell the engine which operand is the weight: (input, summed axis, free axis, output axis)."""
    for data, weight in ((left, right), (right, left)):
        if is_weight(t.node.inputs[weight[0]]):
            t.contract(data[0], data[1], weight[0], weight[1])
            if weight[2] is not None:
                t.produce(data[0], weight[3], weight[0], weight[2])
            return
    t.contract(left[0], left[1])


def _einsum(t: Trace) -> Outputs:
    """Equal letters are equal channels; letters that the output lacks are summed over."""
    parsed = _parse_einsum(t)
    if parsed is None:
        return [None]
    terms, right = parsed
    common: dict[str, Labels | None] = {}
    place: dict[str, tuple[int, int]] = {}
    for index, term in enumerate(terms):
        axes, shape = t.axes(index) or (), t.shape(index) or ()
        for axis, letter in enumerate(term):
            if shape[axis] == 1:
                continue
            common[letter] = t.tie(common[letter], axes[axis]) if letter in common else axes[axis]
            place[letter] = (index, axis)
    weight = next((i for i, v in enumerate(t.node.inputs) if is_weight(v)), None)
    for letter in common:
        if letter not in right:
            _einsum_sum(t, terms, letter, weight)
    if weight is not None and len(terms) == 2:
        for axis, letter in enumerate(terms[weight]):
            if letter in right and letter not in terms[1 - weight]:
                t.produce(1 - weight, right.index(letter), weight, axis)
    for _ in range(max(len(terms) - 1, 1)):
        t.macs([(t.node.inputs[index], axis) for index, axis in place.values()])
    return [tuple(common.get(letter) for letter in right)]


def _parse_einsum(t: Trace) -> tuple[list[str], str] | None:
    """Terms and result with a letter per axis; an ellipsis becomes digits, right-aligned."""
    equation = attribute_text(t.node, "equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(t.node.inputs):
        return None
    widest = 0
    for index, term in enumerate(terms):
        axes = t.axes(index)
        if axes is None:
            return None
        hidden = len(axes) - len(term.replace("...", ""))
        widest = max(widest, hidden)
        if hidden < 0 or hidden > len(_ELLIPSIS) or ("..." not in term and hidden):
            return None
        terms[index] = term.replace("...", _ELLIPSIS[len(_ELLIPSIS) - hidden :])
        if len(set(terms[index])) != len(axes):
            return None
    shown = _ELLIPSIS[len(_ELLIPSIS) - widest :]
    if not arrow:
        letters = [c for c in "".join(terms) if c not in shown]
        right = shown + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return terms, right.replace("...", shown)


_ELLIPSIS = "0123456789"


def _einsum_sum(t: Trace, terms: list[str], letter: str, weight: int | None) -> None:
    """Record the sum over a letter at an operand that has it at full length."""
    users = [i for i, term in enumerate(terms) if letter in term]
    users = [i for i in users if (t.shape(i) or ())[terms[i].index(letter)] != 1]
    data = next((i for i in users if i != weight), users[0])
    if weight is not None and weight in users and weight != data:
        t.contract(data, terms[data].index(letter), weight, terms[weight].index(letter))
    else:
        t.contract(data, terms[data].index(letter))


CONV = Rule(_conv, shrink_conv)
CONV_TRANSPOSE = Rule(_conv_transpose, _shrink_conv_transpose)
GEMM = Rule(_gemm)
MATMUL = Rule(_matmul)
EINSUM = Rule(_einsum)
