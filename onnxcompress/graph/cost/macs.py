"""Multiply-accumulates of a node: one rule per operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from onnxcompress.graph.cost.common import MICROSOFT, Shape, flag


class _UnknownShapeError(Exception):
    """A shape that the MACs of a node depend on is unknown."""


class _Shapes:
    """Shapes of one node's inputs and outputs; raises where one is unknown."""

    def __init__(self, node: ir.Node, shapes: Mapping[ir.Value, Shape]) -> None:
        self._node, self._shapes = node, shapes

    def input(self, index: int) -> Shape:
        value = self._node.inputs[index] if index < len(self._node.inputs) else None
        return self._of(value)

    def output(self) -> Shape:
        return self._of(self._node.outputs[0])

    def present(self, index: int) -> bool:
        return index < len(self._node.inputs) and self._node.inputs[index] is not None

    def _of(self, value: ir.Value | None) -> Shape:
        if value is None or value not in self._shapes:
            raise _UnknownShapeError
        return self._shapes[value]


_Rule = Callable[[ir.Node, _Shapes], int]


def node_macs(node: ir.Node, shapes: Mapping[ir.Value, Shape]) -> int | None:
    """MACs of one node, subgraphs left out; None where a shape that they depend on is unknown."""
    rule = _RULES.get((node.domain, node.op_type))
    if rule is None:
        return 0
    try:
        return rule(node, _Shapes(node, shapes))
    except (_UnknownShapeError, IndexError):
        return None


def _conv(weight: int) -> _Rule:
    return lambda node, s: math.prod(s.output()) * math.prod(s.input(weight)[1:])


def _conv_transpose(node: ir.Node, s: _Shapes) -> int:
    return math.prod(s.input(0)) * math.prod(s.input(1)[1:])


def _matmul(right: int = 1, *, transposed: str | None = None) -> _Rule:
    """Rows · columns · K from the operands alone, so that an unknown output shape does no harm.

    Args:
        right: Input index of the second operand.
        transposed: Prefix of the attributes that transpose the operands (``transA``/``transB``).
    """

    def count(node: ir.Node, s: _Shapes) -> int:
        a, b = s.input(0), s.input(right)
        if transposed is not None:
            a = (*a[:-2], a[-1], a[-2]) if flag(node, f"{transposed}A") and len(a) > 1 else a
            b = (*b[:-2], b[-1], b[-2]) if flag(node, f"{transposed}B") and len(b) > 1 else b
        rows = a[-2] if len(a) > 1 else 1
        columns = b[-1] if len(b) > 1 else 1
        batch_a, batch_b = a[:-2], b[:-2]
        longest = max(len(batch_a), len(batch_b))
        padded_a = (1,) * (longest - len(batch_a)) + batch_a
        padded_b = (1,) * (longest - len(batch_b)) + batch_b
        batch = math.prod(y if x == 1 else x for x, y in zip(padded_a, padded_b, strict=True))
        return batch * rows * columns * a[-1]

    return count


def _matmul_nbits(node: ir.Node, s: _Shapes) -> int:
    inner, columns = flag(node, "K"), flag(node, "N")
    return math.prod(s.input(0)[:-1]) * inner * columns


def _einsum(node: ir.Node, s: _Shapes) -> int:
    operands = [i for i in range(len(node.inputs)) if node.inputs[i] is not None]
    terms = node.attributes["equation"].as_string().replace(" ", "").split("->")[0].split(",")
    lengths: dict[str, int] = {}
    for index, term in zip(operands, terms, strict=True):
        shape = s.input(index)
        head, dots, tail = term.partition("...")
        hidden = len(shape) - len(head) - len(tail)
        # Ellipsis axes align from the right, like broadcasting.
        names = [*head, *(f"...{hidden - i}" for i in range(hidden if dots else 0)), *tail]
        for name, length in zip(names, shape, strict=True):
            lengths[name] = max(lengths.get(name, 1), length)
    return math.prod(lengths.values()) * (len(operands) - 1)


def _recurrent(node: ir.Node, s: _Shapes) -> int:
    steps_batch = math.prod(s.input(0)[:2])
    # W [D, GH, I] and R [D, GH, H]; of DynamicQuantizeLSTM [D, I, GH] and [D, H, GH].
    return steps_batch * (math.prod(s.input(1)) + math.prod(s.input(2)))


def _attention(node: ir.Node, s: _Shapes) -> int:
    """ai.onnx Attention: Q, K, V as [B, heads, S, D], or [B, S, heads·D] with attributes."""
    q, k, v = s.input(0), s.input(1), s.input(2)
    if len(q) == 4:
        past = s.input(4)[2] if s.present(4) else 0
        return q[0] * q[1] * q[2] * (k[2] + past) * (q[3] + v[3])
    heads, kv_heads = flag(node, "q_num_heads"), max(flag(node, "kv_num_heads"), 1)
    past = s.input(4)[2] if s.present(4) else 0
    return q[0] * q[1] * (k[1] + past) * (q[2] + heads * (v[2] // kv_heads))


def _fused_attention(node: ir.Node, s: _Shapes) -> int:
    """com.microsoft Attention: X [B, S, I] times the packed weight [I, 3·H], then two products."""
    batch, steps, _ = s.input(0)
    hidden = s.input(1)[1] // 3
    return batch * steps * math.prod(s.input(1)) + 2 * batch * steps * steps * hidden


def _multi_head_attention(node: ir.Node, s: _Shapes) -> int:
    """com.microsoft MultiHeadAttention with separate Q [B, Sq, H], K and V [B, Sk, H]."""
    q, k, v = s.input(0), s.input(1), s.input(2)
    return q[0] * q[1] * k[1] * (q[2] + v[2])


_RULES: Mapping[tuple[str, str], _Rule] = {
    ("", "Conv"): _conv(1),
    ("", "ConvInteger"): _conv(1),
    ("", "QLinearConv"): _conv(3),
    ("", "DeformConv"): _conv(1),
    ("", "ConvTranspose"): _conv_transpose,
    ("", "Gemm"): _matmul(transposed="trans"),
    ("", "MatMul"): _matmul(),
    ("", "MatMulInteger"): _matmul(),
    ("", "QLinearMatMul"): _matmul(3),
    ("", "Einsum"): _einsum,
    ("", "LSTM"): _recurrent,
    ("", "GRU"): _recurrent,
    ("", "RNN"): _recurrent,
    ("", "Attention"): _attention,
    (MICROSOFT, "FusedConv"): _conv(1),
    (MICROSOFT, "QLinearConv"): _conv(3),
    (MICROSOFT, "FusedGemm"): _matmul(transposed="trans"),
    (MICROSOFT, "QGemm"): _matmul(3, transposed="trans"),
    (MICROSOFT, "FusedMatMul"): _matmul(transposed="trans"),
    (MICROSOFT, "MatMulIntegerToFloat"): _matmul(),
    (MICROSOFT, "DynamicQuantizeMatMul"): _matmul(),
    (MICROSOFT, "MatMulNBits"): _matmul_nbits,
    (MICROSOFT, "DynamicQuantizeLSTM"): _recurrent,
    (MICROSOFT, "Attention"): _fused_attention,
    (MICROSOFT, "QAttention"): _fused_attention,
    (MICROSOFT, "MultiHeadAttention"): _multi_head_attention,
}
