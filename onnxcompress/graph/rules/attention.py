"""Fused attention: Attention of ONNX, and those of onnxruntime's own domain.

All compute, for query head ``h`` and the key/value head ``g(h) = h // (H / H_kv)`` it reads,

    Y_h = softmax(s · Q_h K_g(h)ᵀ + mask) V_g(h)

so a key/value head and its query heads are one unit (with a single key/value head, every query
head is), or, by option, a dimension of all query and key heads, and a dimension of all value
heads. The operators differ in where these lie: four axes ``[B, H, S, D]``, or three
``[B, S, H·D]``, or all of Q, K and V behind each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.rules.base import (
    Axes,
    Outputs,
    Rule,
    Shrink,
    Trace,
    attribute_int,
    attribute_ints,
    input_value,
)
from onnxcompress.graph.unions import Labels

_ONLY = "belongs to the only key and value head of the layer"


@dataclass(frozen=True, slots=True)
class _Operand:
    """Q, K or V as heads and dimensions; None where one of them does not carry channels."""

    heads: Labels | None
    dims: Labels | None


def _by_dims(t: Trace, heads: int) -> bool:
    return t.head_dims or heads == 1


def _fold(t: Trace, labels: Labels | None, heads: int, *, dims: bool) -> _Operand:
    """``[H·D]`` read as ``[H, D]``: tie the dimensions of a head, or a dimension of all heads."""
    if labels is None:
        return _Operand(None, None)
    table = labels.reshape(heads, -1)
    t.drop(labels)
    if dims:
        t.tie(table, table[:1])
        return _Operand(None, table[0])
    t.tie(table, table[:, :1])
    return _Operand(np.ascontiguousarray(table[:, 0]), None)


def _unfold(part: _Operand, heads: int, width: int) -> Labels | None:
    """The inverse of :func:`_fold`."""
    if part.heads is not None:
        return np.repeat(part.heads, width)
    return None if part.dims is None else np.tile(part.dims, heads)


def _couple(t: Trace, q: _Operand, k: _Operand, v: _Operand, heads: tuple[int, int]) -> _Operand:
    """Tie query, key and value heads; returns what the result carries.

    Args:
        t: The node.
        q: Queries.
        k: Keys.
        v: Values.
        heads: Number of query and of key/value heads.
    """
    t.tie(q.dims, k.dims)
    if heads[1] == 1 and heads[0] > 1:
        for labels in (k.heads, v.heads):
            t.freeze(labels, _ONLY)
        return _Operand(q.heads, v.dims)
    lead = q.heads
    if q.heads is not None:
        rows = q.heads.reshape(heads[1], -1)
        t.tie(rows, rows[:, :1])
        t.drop(q.heads)
        lead = np.ascontiguousarray(rows[:, 0])
    lead = t.tie(t.tie(lead, k.heads), v.heads)
    result = None if lead is None else np.repeat(lead, heads[0] // heads[1])
    return _Operand(result, v.dims)


def _score_axes(t: Trace, index: int, q: _Operand) -> None:
    """A mask or bias that is added to the scores ``[B, H, S, T]``."""
    axes, shape = t.axes(index), t.shape(index)
    if axes is None or shape is None or len(axes) < 3 or shape[-3] == 1:
        return
    t.tie(axes[-3], q.heads)


def _cache_axes(t: Trace, index: int, part: _Operand) -> None:
    """A cache ``[B, H, P, D]`` that keys or values are appended to."""
    if input_value(t.node, index) is None:
        return
    axes = t.axes(index)
    given = (axes[1], axes[3]) if axes is not None and len(axes) == 4 else (None, None)
    for labels, other in zip(given, (part.heads, part.dims), strict=True):
        if labels is not None or other is not None:
            t.tie(labels, other)


def _cache(part: _Operand) -> Axes:
    return (None, part.heads, None, part.dims)


def _head_counts(t: Trace, q_name: str, kv_name: str) -> tuple[int, int] | None:
    """Query and key/value heads: of four axes by their lengths, else by the attributes."""
    shape, keys = t.shape(0), t.shape(1)
    if shape is not None and len(shape) == 4 and keys is not None and len(keys) == 4:
        found = shape[1], keys[1]
    else:
        queries = attribute_int(t.node, q_name, 0)
        found = queries, attribute_int(t.node, kv_name, queries)
    q, kv = found
    return (q, kv) if q and kv and q % kv == 0 else None


def _operands(
    t: Trace, heads: tuple[int, int], *, dims: bool
) -> tuple[_Operand, _Operand, _Operand] | None:
    """Q, K and V from three inputs, each of three or four axes."""
    found = []
    for index, count in enumerate((heads[0], heads[1], heads[1])):
        axes = t.axes(index)
        if axes is None or len(axes) not in {3, 4}:
            return None
        if len(axes) == 4:
            found.append(_Operand(axes[1], axes[3]))
        else:
            found.append(_fold(t, axes[2], count, dims=dims))
    return found[0], found[1], found[2]


def _result(t: Trace, y: _Operand, heads: int) -> Axes:
    """The output: as the queries lie, with the values' dimensions."""
    axes, after = t.axes(0) or (), t.output_shape(0)
    if len(axes) == 4:
        return (None, y.heads, None, y.dims)
    width = None if after is None or len(after) != 3 else after[2]
    if width is None:
        for labels in (y.heads, y.dims):
            t.freeze(labels, "has a width that is computed at run time")
        return (None, None, None)
    return (None, None, _unfold(y, heads, width // heads))


def _attention(t: Trace) -> Outputs:
    """Attention of the default domain, opset 23 and up."""
    nothing: Outputs = [None] * len(t.node.outputs)
    heads = _head_counts(t, "q_num_heads", "kv_num_heads")
    if heads is None:
        return nothing
    parts = _operands(t, heads, dims=_by_dims(t, heads[0]))
    if parts is None:
        return nothing
    q, k, v = parts
    y = _couple(t, q, k, v, heads)
    if q.dims is not None:
        axes = t.axes(0) or ()
        t.contract(0, len(axes) - 1)
    _attention_macs(t)
    _score_axes(t, 3, q)
    _cache_axes(t, 4, k)
    _cache_axes(t, 5, v)
    scores: Axes = (None, q.heads, None, None)
    return [_result(t, y, heads[0]), _cache(k), _cache(v), scores][: len(t.node.outputs)]


def _attention_macs(t: Trace) -> None:
    """B · H · S · (T + P) · (D + D_v), with four axes or with three."""
    query, key, value = t.node.inputs[:3]
    if len(t.axes(0) or ()) == 4:
        rest, sides, steps = [(query, 0), (query, 1), (query, 2)], [(query, 3), (value, 3)], 2
    else:
        rest, sides, steps = [(query, 0), (query, 1)], [(query, 2), (t.node.outputs[0], 2)], 1
    lengths = [(key, steps)]
    if input_value(t.node, 4) is not None:
        lengths.append((t.node.inputs[4], 2))
    for side in sides:
        for length in lengths:
            t.macs([*rest, length, side])


def _multi_head(t: Trace) -> Outputs:
    """com.microsoft MultiHeadAttention: a bias of Q, K and V behind each other comes first."""
    nothing: Outputs = [None] * len(t.node.outputs)
    count = attribute_int(t.node, "num_heads", 0)
    shape = t.shape(0)
    if not count or shape is None or len(shape) != 3:
        return nothing
    parts = _operands(t, (count, count), dims=_by_dims(t, count))
    if parts is None:
        return nothing
    q, k, v = parts
    if input_value(t.node, 3) is not None:
        bias = t.axes(3)
        values = (t.axes(2) or (None,))[-1]
        if bias is None or bias[0] is None or shape[2] is None:
            for labels in (q.heads, q.dims, k.heads, k.dims, v.heads, v.dims):
                t.freeze(labels, "meets a bias that is computed")
            return nothing
        width = shape[2]
        pieces = np.split(bias[0], [width, 2 * width])
        t.drop(bias[0])
        if values is not None and len(values) != len(pieces[2]):
            return nothing
        for part, piece in zip((q, k, v), pieces, strict=True):
            folded = _fold(t, piece, count, dims=_by_dims(t, count))
            t.tie(part.heads, folded.heads)
            t.tie(part.dims, folded.dims)
        for labels in (q.dims, k.dims):
            t.freeze(labels, "gets a bias before it is summed over")
    y = _couple(t, q, k, v, (count, count))
    if q.dims is not None:
        t.contract(0, 2)
    query, key, value = t.node.inputs[:3]
    for side in (query, value):
        t.macs([(query, 0), (query, 1), (key, 1), (side, 2)])
    _score_axes(t, 5, q)
    _cache_axes(t, 6, k)
    _cache_axes(t, 7, v)
    scores: Axes = (None, q.heads, None, None)
    return [_result(t, y, count), _cache(k), _cache(v), scores][: len(t.node.outputs)]


def _grouped_query(t: Trace) -> Outputs:
    """com.microsoft GroupQueryAttention, with Q, K and V apart or behind each other."""
    nothing: Outputs = [None] * len(t.node.outputs)
    queries = attribute_int(t.node, "num_heads", 0)
    keys = attribute_int(t.node, "kv_num_heads", 0)
    axes, shape = t.axes(0), t.shape(0)
    if not queries or not keys or queries % keys or axes is None or shape is None:
        return nothing
    if len(axes) != 3 or shape[2] is None:
        return nothing
    packed = input_value(t.node, 1) is None
    dims = _by_dims(t, queries)
    if packed:
        if axes[2] is None:
            return nothing
        if dims:
            t.freeze(axes[2], "holds queries, keys and values of one matrix")
            return nothing
        width = shape[2] // (queries + 2 * keys)
        pieces = np.split(axes[2], [queries * width, (queries + keys) * width])
        t.drop(axes[2])
        q, k, v = (
            _fold(t, piece, n, dims=False)
            for piece, n in zip(pieces, (queries, keys, keys), strict=True)
        )
    else:
        parts = _operands(t, (queries, keys), dims=dims)
        if parts is None:
            return nothing
        q, k, v = parts
        width = shape[2] // queries
    # Queries, keys and values have one head size here.
    for part in (q, k, v):
        t.freeze(part.dims, "belongs to heads of one size in queries, keys and values")
    q, k, v = (_Operand(part.heads, None) for part in (q, k, v))
    y = _couple(t, q, k, v, (queries, keys))
    _score_axes(t, 10, q)
    _cache_axes(t, 3, k)
    _cache_axes(t, 4, v)
    if input_value(t.node, 11) is not None and q.heads is not None:
        sink = t.axes(11)
        t.tie(q.heads, sink[0] if sink else None)
    for index in (12, 13):
        for labels in t.axes(index) or ():
            t.freeze(labels, "is the scale of a quantized cache")
    result: Axes = (None, None, _unfold(y, queries, width))
    scores: Axes = (None, q.heads, None, None)
    return [result, _cache(k), _cache(v), scores][: len(t.node.outputs)]


def _projected(t: Trace) -> Outputs:
    """com.microsoft Attention: ``[Q K V] = X W + B`` comes first, in one matrix."""
    nothing: Outputs = [None] * len(t.node.outputs)
    data, weight, bias = t.axes(0), t.axes(1), t.axes(2)
    shape = t.shape(1)
    count = attribute_int(t.node, "num_heads", 0)
    if data is None or weight is None or shape is None or len(data) != 3 or not count:
        return nothing
    if shape[1] is None or weight[1] is None:
        return nothing
    sizes = attribute_ints(t.node, "qkv_hidden_sizes") or (shape[1] // 3,) * 3
    if sum(sizes) != shape[1] or any(s % count for s in sizes):
        return nothing
    t.tie(data[2], weight[0])
    t.contract(0, 2, 1, 0)
    t.produce(0, 2, 1, 1)
    x, w = t.node.inputs[0], t.node.inputs[1]
    t.macs([(x, 0), (x, 1), (w, 0), (w, 1)])
    for _ in range(2):
        t.macs([(x, 0), (x, 1), (x, 1), (t.node.outputs[0], 2)])
    if input_value(t.node, 2) is not None:
        t.tie(weight[1], bias[0] if bias else None)
    # The sum over dimensions of heads has no input of its own that could be masked.
    pieces = np.split(weight[1], np.cumsum(sizes)[:-1])
    t.drop(weight[1])
    dims = _by_dims(t, count)
    q, k, v = (_fold(t, piece, count, dims=dims) for piece in pieces)
    for labels in (q.dims, k.dims):
        t.freeze(labels, "is summed over inside of the attention")
    y = _couple(t, q, k, v, (count, count))
    _score_axes(t, 5, q)
    past, present = t.axes(4), (None, None, q.heads, None, None)
    if input_value(t.node, 4) is not None:
        # Keys and values are stacked: their dimensions cannot go apart.
        t.tie(q.heads, past[2] if past is not None and len(past) == 5 else None)
    if len(t.node.outputs) > 1:
        t.freeze(v.dims, "is stacked with keys in one cache")
    return [(None, None, _unfold(y, count, sizes[2] // count)), present][: len(t.node.outputs)]


# --- rotary positions ----------------------------------------------------------------------


def _rotary(t: Trace) -> Outputs:
    """RotaryEmbedding of both domains: heads pass, their dimensions are turned in pairs."""
    data, shape = t.axes(0), t.shape(0)
    if data is None or shape is None or len(data) not in {3, 4}:
        return [None]
    reason = "is turned in pairs by rotary positions"
    for axis in (0, 2 if len(data) == 4 else 1):
        t.freeze(data[axis], "numbers samples or places, to which the positions belong")
    if len(data) == 4:
        t.freeze(data[3], reason)
        return [(None, data[1], None, None)]
    heads = _rotary_heads(t, shape[2])
    if heads is None or data[2] is None:
        return [None]
    if heads == 1:
        t.freeze(data[2], reason)
        return [None]
    part = _fold(t, data[2], heads, dims=False)
    return [(None, None, _unfold(part, heads, len(data[2]) // heads))]


def _rotary_heads(t: Trace, width: int | None) -> int | None:
    """The attribute; else the caches hold half of a head's dimensions."""
    heads = attribute_int(t.node, "num_heads", 0)
    if heads or width is None:
        return heads or None
    caches = (2, 3) if t.node.domain else (1, 2)
    cos = t.shape(caches[0])
    half = None if not cos else cos[-1]
    return width // (2 * half) if half and width % (2 * half) == 0 else None


# --- shrinking -----------------------------------------------------------------------------


def _left(s: Shrink, value: ir.Value | None, axis: int, heads: int) -> tuple[int, int] | None:
    """Heads and dimensions that stay on an axis of ``H·D``; None if it loses nothing."""
    kept = s.kept(value, axis)
    if kept is None or not heads:
        return None
    table = kept.reshape(heads, -1)
    whole = (table == table[:, :1]).all()
    if whole:
        return int(table[:, 0].sum()), table.shape[1]
    return heads, int(table[0].sum())


def _set_heads(s: Shrink, name: str, value: ir.Value | None) -> None:
    """The attribute ``name`` follows the heads that stay in ``value``."""
    if name not in s.node.attributes:
        return
    heads = attribute_int(s.node, name, 0)
    four = s.rank(value) == 4
    if four:
        kept = s.kept(value, 1)
        if kept is not None:
            s.set_int(name, int(kept.sum()))
        return
    left = _left(s, value, 2, heads)
    if left is not None:
        s.set_int(name, left[0])


def _keep_scale(s: Shrink, heads: int) -> None:
    """The default scale is 1 / √D: it has to stay that of the original."""
    queries = s.node.inputs[0]
    if s.rank(queries) == 4:
        kept = s.kept(queries, 3)
        before, after = (0, 0) if kept is None else (len(kept), int(kept.sum()))
    else:
        kept = s.kept(queries, 2)
        left = _left(s, queries, 2, heads)
        if kept is None or left is None:
            return
        before, after = len(kept) // heads, left[1]
    given = s.node.attributes.get("scale")
    if before != after and (given is None or given.as_float() == 0.0):
        s.node.attributes["scale"] = ir.AttrFloat32("scale", before**-0.5)


def _shrink_attention(s: Shrink) -> None:
    _keep_scale(s, attribute_int(s.node, "q_num_heads", 0))
    _set_heads(s, "q_num_heads", s.node.inputs[0])
    _set_heads(s, "kv_num_heads", s.node.inputs[1])


def _shrink_multi_head(s: Shrink) -> None:
    _keep_scale(s, attribute_int(s.node, "num_heads", 0))
    _set_heads(s, "num_heads", s.node.inputs[0])


def _shrink_grouped_query(s: Shrink) -> None:
    queries = attribute_int(s.node, "num_heads", 0)
    keys = attribute_int(s.node, "kv_num_heads", 0)
    if input_value(s.node, 1) is None:
        kept = s.input_kept(0, 2)
        if kept is not None:
            table = kept.reshape(queries + 2 * keys, -1)[:, 0]
            s.set_int("num_heads", int(table[:queries].sum()))
            s.set_int("kv_num_heads", int(table[queries : queries + keys].sum()))
        return
    _set_heads(s, "num_heads", s.node.inputs[0])
    _set_heads(s, "kv_num_heads", s.node.inputs[1])


def _shrink_projected(s: Shrink) -> None:
    kept = s.input_kept(1, 1)
    if kept is None:
        return
    count = attribute_int(s.node, "num_heads", 0)
    sizes = attribute_ints(s.node, "qkv_hidden_sizes") or (len(kept) // 3,) * 3
    parts = np.split(kept, np.cumsum(sizes)[:-1])
    staying = [int(part.sum()) for part in parts]
    # Heads go from all three parts, dimensions from the values alone.
    if staying[0] != sizes[0]:
        s.set_int("num_heads", staying[0] * count // sizes[0])
    if "qkv_hidden_sizes" in s.node.attributes or len(set(staying)) > 1:
        s.set_ints("qkv_hidden_sizes", staying)


def _shrink_rotary(s: Shrink) -> None:
    if attribute_int(s.node, "num_heads", 0):
        _set_heads(s, "num_heads", s.node.inputs[0])


ATTENTION = Rule(_attention, _shrink_attention)
MULTI_HEAD = Rule(_multi_head, _shrink_multi_head)
GROUPED_QUERY = Rule(_grouped_query, _shrink_grouped_query)
PROJECTED = Rule(_projected, _shrink_projected)
ROTARY = Rule(_rotary, _shrink_rotary)
