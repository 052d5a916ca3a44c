"""Embedding tables on 8-bit integers: one scale per row, looked up beside the row.

    Gather(W, i)  ->  Cast(Gather(Q, i)) * Gather(s, i)        W[r] ≈ s_r Q[r]

The lookup moves a quarter of the bytes and only the rows that were looked up are made float, so
onnxruntime cannot compute the whole table back at load. Indices that are constant would let it do
so; such a lookup is left alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of, constant_tensor, is_constant, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.numerics.blockwise import fitted
from onnxcompress.passes.base import Change, Skip
from onnxcompress.passes.quant.operators import WEIGHT

_LEAST_ELEMENTS = 4096
"""Smaller tables save less than the nodes cost."""

_BITS = 8


def quantize_embeddings(
    model: ir.Model, refused: frozenset[str], least_db: float
) -> tuple[tuple[Change, ...], tuple[Skip, ...]]:
    """Put every embedding table of the main graph on integers, in place.

    Args:
        model: The model; the same model always gets the same names.
        refused: Nodes to leave alone.
        least_db: What a table must keep.

    Returns:
        What was done, and a reason for each table that was left.
    """
    namer = Namer(model)
    changes, skips = [], []
    for name, table in list(model.graph.initializers.items()):
        gathers = [n for n, place in table.uses() if place == 0 and _looks_up(n, table)]
        if not gathers:
            continue
        reason = _reason(model, table, gathers, refused)
        if reason is None:
            rows = np.asarray(constant_of(table), np.float32)
            blocks = fitted(rows, bits=_BITS, block=rows.shape[1], symmetric=True, negative=False)
            noise = float(((blocks.dequantized() - rows).astype(np.float64) ** 2).sum())
            signal = float((rows.astype(np.float64) ** 2).sum())
            if noise > 0 and 10 * np.log10(max(signal, 1e-300) / noise) < least_db:
                reason = f"its table '{name}' would keep less than {least_db:g} dB"
        if reason is not None:
            skips += [Skip(n.name or "", n.op_type, reason) for n in gathers]
            continue
        codes = blocks.codes[:, 0].astype(np.int16) - blocks.zero[:, :1].astype(np.int16)
        integers = set_initializer(
            model.graph, namer.value(f"{name}/quant_integer"), codes.astype(np.int8)
        )
        scale = set_initializer(
            model.graph, namer.value(f"{name}/quant_scale"), blocks.scale.astype(np.float32)
        )
        for node in gathers:
            _replace(model.graph, namer, node, integers, scale)
            changes.append(
                Change(node.name or "", node.op_type, "looks up 8-bit integers, one scale per row")
            )
        if not table.uses():
            del model.graph.initializers[name]
    return tuple(changes), tuple(skips)


def _looks_up(node: ir.Node, table: ir.Value) -> bool:
    """Whether ``node`` reads rows of a float table with computed indices."""
    if node.op_type != "Gather" or node.domain not in {"", "ai.onnx"}:
        return False
    tensor = constant_tensor(table)
    return (
        tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and tensor.size >= _LEAST_ELEMENTS
        and len(tensor.shape) == 2
    )


def _reason(
    model: ir.Model, table: ir.Value, gathers: list[ir.Node], refused: frozenset[str]
) -> str | None:
    """Why a table stays float; None if it need not."""
    if table.is_graph_output():
        return "its table is an output of the model"
    for node in gathers:
        if node.name in refused:
            return "it is excluded"
        if node.graph is not model.graph:
            return "it is inside a branch or a loop body"
        if (node.attributes.get_int("axis", 0) or 0) not in {0, -2}:
            return "it looks up columns; only rows have a scale of their own"
        if is_constant(node.inputs[1]):
            return "its indices are constant, so onnxruntime would compute the float table at load"
    for node, place in table.uses():
        weighs = node.op_type in {"Gemm", "MatMul"} and place == WEIGHT
        if node not in gathers and not weighs:
            return f"{node.op_type} '{node.name}' needs its table in float"
    rows = constant_of(table)
    return None if rows is None or np.isfinite(rows).all() else "its table holds NaN or infinity"


def _replace(
    graph: ir.Graph, namer: Namer, node: ir.Node, integers: ir.Value, scale: ir.Value
) -> None:
    output, name = node.outputs[0], node.name or ""

    def made(role: str, dtype: ir.DataType, *, shape: ir.Shape | None) -> ir.Value:
        return ir.Value(
            name=namer.value(f"{name}/quant_{role}"), shape=shape, type=ir.TensorType(dtype)
        )

    rows = made("rows", ir.DataType.INT8, shape=output.shape)
    real = made("real", ir.DataType.FLOAT, shape=output.shape)
    scales = made("scales", ir.DataType.FLOAT, shape=None)
    result = made("result", ir.DataType.FLOAT, shape=output.shape)
    indices, axis = node.inputs[1], {"axis": 0}

    def step(
        op_type: str, inputs: list[ir.Value | None], out: ir.Value, **attributes: int
    ) -> ir.Node:
        return ir.node(
            op_type, inputs, attributes, outputs=[out], name=namer.node(f"{out.name}_op")
        )

    nodes = [
        step("Gather", [integers, indices], rows, **axis),
        step("Cast", [rows], real, to=int(ir.DataType.FLOAT)),
        step("Gather", [scale, indices], scales, **axis),
        step("Mul", [real, scales], result),
    ]
    graph.insert_after(node, nodes)
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    kept = output.name
    graph.remove(node, safe=True)
    output.name = None
    result.name = kept
