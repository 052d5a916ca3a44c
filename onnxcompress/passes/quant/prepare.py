"""Rewrites that let integer kernels apply; each keeps what the model computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import Array, constant_of, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.passes.base import Change
from onnxcompress.passes.quant.operators import WEIGHT

_GEMM_ATTRIBUTES = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
_NO_OPERATION = frozenset({"Dropout", "Identity"})


def prepare(model: ir.Model) -> tuple[Change, ...]:
    """Remove what stands between quantized nodes, and join MatMul with its bias; in place.

    - Identity and Dropout (which passes values on when a model is used) part a DequantizeLinear
      from the kernel that should take it in.
    - ``MatMul`` followed by ``Add`` of a constant row becomes ``Gemm``, whose integer kernel adds
      the bias.

    Args:
        model: The model; the same model always gets the same names.
    """
    return (*_drop_no_operations(model), *_join_biases(model))


def _drop_no_operations(model: ir.Model) -> list[Change]:
    changes = []
    for node in list(model.graph):
        if node.op_type not in _NO_OPERATION or node.domain not in {"", "ai.onnx"}:
            continue
        source, output = node.inputs[0], node.outputs[0]
        others = any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
        if source is None or output.is_graph_output() or others or _trains(node):
            continue
        output.replace_all_uses_with(source)
        model.graph.remove(node, safe=True)
        changes.append(Change(node.name or "", node.op_type, "removed: it passes its input on"))
    return changes


def _trains(node: ir.Node) -> bool:
    """Whether a Dropout may be asked to drop something at run time."""
    if node.op_type != "Dropout" or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    flag = constant_of(node.inputs[2])
    return flag is None or bool(flag.any())


def _join_biases(model: ir.Model) -> list[Change]:
    namer = Namer(model)
    changes = []
    for node in list(model.graph):
        found = _bias_after(node)
        if found is None:
            continue
        add, bias, row = found
        name = namer.value(f"{bias.name}/quant_bias")
        flat = set_initializer(model.graph, name, row.reshape(-1))
        _write_gemm(model.graph, namer, node, add, flat)
        if not bias.uses() and bias.is_initializer():
            del model.graph.initializers[bias.name or ""]
        changes.append(
            Change(node.name or "", "MatMul", f"joined with its bias '{add.name}' into a Gemm")
        )
    return changes


def _bias_after(node: ir.Node) -> tuple[ir.Node, ir.Value, Array] | None:
    """The Add of a constant row that alone reads a product with a constant; and that constant.

    More than two axes are taken only if all lengths are known: there onnxruntime itself turns the
    two into Reshape, Gemm, Reshape, and does not see the integers around the MatMul any more.
    """
    if node.op_type != "MatMul" or node.domain not in {"", "ai.onnx"}:
        return None
    data, product = node.inputs[0], node.outputs[0]
    weight = constant_of(node.inputs[WEIGHT])
    lengths = _lengths(data)
    if lengths is None or weight is None or weight.ndim != 2 or len(lengths) < 2:
        return None
    if len(lengths) > 2 and None in lengths:
        return None
    uses = list(product.uses())
    if product.is_graph_output() or len(uses) != 1 or uses[0].node.graph is not node.graph:
        return None
    add = uses[0].node
    bias = add.inputs[1 - uses[0].idx] if add.op_type == "Add" else None
    row = constant_of(bias)
    if bias is None or row is None or row.size != weight.shape[1]:
        return None
    if row.ndim > len(lengths) or row.shape[-1:] != (row.size,):
        return None
    return add, bias, row


def _lengths(value: ir.Value | None) -> list[int | None] | None:
    """Length of each axis, None where it is dynamic; None for an unknown rank."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else None for d in value.shape]


def _write_gemm(
    graph: ir.Graph, namer: Namer, matmul: ir.Node, add: ir.Node, bias: ir.Value
) -> None:
    """Replace ``matmul`` and ``add`` by a Gemm, between two Reshape where there are more axes."""
    data, output = matmul.inputs[0], add.outputs[0]
    lengths = [n for n in _lengths(data) or () if n is not None]
    name = matmul.name or ""

    def reshape(value: ir.Value | None, target: list[int], role: str) -> ir.Node:
        constant = set_initializer(
            graph, namer.value(f"{name}/quant_{role}_shape"), np.array(target, np.int64)
        )
        return node("Reshape", [value, constant], target, role)

    def node(
        op_type: str, inputs: list[ir.Value | None], shape: list[int] | None, role: str
    ) -> ir.Node:
        made = ir.Value(
            name=namer.value(f"{name}/quant_{role}"),
            shape=output.shape if shape is None else ir.Shape(shape),
            type=output.type,
        )
        attributes = _GEMM_ATTRIBUTES if op_type == "Gemm" else {}
        return ir.node(
            op_type, inputs, attributes, outputs=[made], name=namer.node(f"{name}/quant_{role}_op")
        )

    weight = matmul.inputs[WEIGHT]
    if len(lengths) > 2:
        rows = int(np.prod(lengths[:-1]))
        before = reshape(data, [rows, lengths[-1]], "rows")
        gemm = node("Gemm", [before.outputs[0], weight, bias], [rows, _count(bias)], "product")
        after = reshape(gemm.outputs[0], [*lengths[:-1], _count(bias)], "result")
        made = [before, gemm, after]
    else:
        gemm = node("Gemm", [data, weight, bias], None, "product")
        made = [gemm]
    graph.insert_after(add, made)
    output.replace_all_uses_with(made[-1].outputs[0], replace_graph_outputs=True)
    name_out = output.name
    graph.remove((add, matmul), safe=True)
    output.name = None
    made[-1].outputs[0].name = name_out
    gemm.name = name


def _count(bias: ir.Value) -> int:
    """Number of entries of a constant row."""
    row = constant_of(bias)
    return 0 if row is None else int(row.size)
