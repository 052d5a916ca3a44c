"""Weights that nodes compute from constants alone, as the gates that an exporter reorders.

An exporter may hand a weight to its LSTM through Slice, Concat and Unsqueeze. onnxruntime computes
such a chain once at load; a quantizer that looks for a constant finds none. Here each chain is
computed once and its result stored in its place, unless that would make the model larger.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from onnxcompress.errors import ModelError
from onnxcompress.graph.constants import is_constant, set_initializer, stored_tensor
from onnxcompress.graph.naming import Namer
from onnxcompress.passes.quant.dynamic_rules import RULES, weight_places
from onnxcompress.runtime import Optimization, SessionSettings, open_session

_MOVES = frozenset(
    {
        "Cast",
        "Concat",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
_MOST_NODES = 32


def fold_weight_chains(model: ir.Model) -> tuple[str, ...]:
    """Compute the weights of products, convolutions and recurrent nodes that only move constants.

    Args:
        model: The model; changed in place, in subgraphs too.

    Returns:
        The nodes whose weights became constants.
    """
    namer = Namer(model)
    known: dict[ir.Value, ir.Value] = {}
    folded = []
    for node in list(model.graph.all_nodes()):
        if node.op_type not in RULES or node.domain != "":
            continue
        for place in weight_places(node):
            value = node.inputs[place] if place < len(node.inputs) else None
            if value is None or is_constant(value):
                continue
            if value not in known:
                made = _folded(model, value, namer)
                if made is None:
                    continue
                known[value] = made
            node.replace_input_with(place, known[value])
            folded.append(node.name or "")
    return tuple(dict.fromkeys(folded))


def _folded(model: ir.Model, value: ir.Value, namer: Namer) -> ir.Value | None:
    """A new initializer with what the chain behind ``value`` computes; None if it is no chain."""
    chain = _chain(value)
    producer = value.producer()
    if not chain or producer is None or not isinstance(producer.graph, ir.Graph):
        return None
    leaves = {v: stored_tensor(v) for n in chain for v in n.inputs if v is not None}
    constants = {v: t for v, t in leaves.items() if is_constant(v) and t is not None}
    copies = {
        v: ir.Value(
            name=f"c{k}",
            const_value=t,
            type=ir.TensorType(t.dtype),
            shape=ir.Shape(t.shape.numpy()),
        )
        for k, (v, t) in enumerate(constants.items())
    }
    nodes = []
    for k, node in enumerate(chain):
        made = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else copies[v] for v in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=f"n{k}",
        )
        for place, (old, new) in enumerate(zip(node.outputs, made.outputs, strict=True)):
            new.name, new.type = f"n{k}_{place}", old.type
            copies[old] = new
        nodes.append(made)
    result = copies[value]
    result.type = ir.TensorType(ir.DataType.FLOAT)
    initializers = [copies[v] for v in constants]
    graph = ir.Graph(
        [], [result], nodes=nodes, initializers=initializers, opset_imports=model.opset_imports
    )
    small = ir.Model(graph, ir_version=model.ir_version)
    try:
        session = open_session(small, SessionSettings(threads=1, optimization=Optimization.NONE))
        array = session.run({})[result.name or ""]
    except ModelError:
        return None
    if array.nbytes > sum(t.nbytes for t in constants.values()):
        return None
    name = namer.value(f"{value.name}/quant_folded")
    return set_initializer(producer.graph, name, array)


def _chain(value: ir.Value) -> list[ir.Node]:
    """The nodes that compute ``value``, in order; none if anything but constants flows in."""
    found: dict[ir.Node, None] = {}

    def visit(current: ir.Value) -> bool:
        if is_constant(current):
            return True
        node = current.producer()
        if node is None or node.op_type not in _MOVES or node.domain != "":
            return False
        if node in found:
            return True
        if not all(v is None or visit(v) for v in node.inputs) or len(found) >= _MOST_NODES:
            return False
        found[node] = None
        return True

    return list(found) if visit(value) else []


def drop_unread(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads, in subgraphs too."""
    common_passes.RemoveUnusedNodesPass()(model)
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                del graph.initializers[name]
