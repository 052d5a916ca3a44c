"""Compute equal expressions once, and drop constants that nothing reads, in all graphs.

Two nodes are equal if they have the same operator, attributes and inputs. A node in a branch or
loop body may also equal one of the graphs around it, which has been computed already when the
branch begins.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Hashable, MutableMapping

import onnx_ir as ir

_RANDOM = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
_DOMAINS = frozenset({"", "ai.onnx.ml"})
"""Operators of other domains may have state."""
_MOST_BYTES = 4096
"""A larger tensor in an attribute is a weight, which is not compared."""


def merge_equal_nodes(model: ir.Model) -> int:
    """Let readers of a node's outputs read those of an equal node before it, in all graphs.

    Returns:
        How many nodes were removed.
    """
    return _visit(model.graph, {})


def _visit(graph: ir.Graph, known: MutableMapping[Hashable, ir.Node]) -> int:
    removed = 0
    for node in list(graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                removed += _visit(attribute.as_graph(), ChainMap({}, known))
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    removed += _visit(body, ChainMap({}, known))
        key = _key(node)
        if key is None:
            continue
        other = known.setdefault(key, node)
        if other is node or any(output.is_graph_output() for output in node.outputs):
            continue
        for output, equal in zip(node.outputs, other.outputs, strict=True):
            output.replace_all_uses_with(equal)
        graph.remove(node, safe=True)
        removed += 1
    return removed


def _key(node: ir.Node) -> Hashable | None:
    """What equal nodes have in common; None for a node that is not to be compared."""
    if node.domain not in _DOMAINS or node.op_type in _RANDOM:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        value = _attribute(attribute)
        if value is None:
            return None
        attributes.append((name, attribute.type, value))
    wanted = tuple(bool(output.name) for output in node.outputs)
    inputs = tuple(None if value is None else id(value) for value in node.inputs)
    return (node.domain, node.op_type, node.overload, inputs, wanted, tuple(attributes))


def _attribute(attribute: ir.Attr) -> Hashable | None:
    """The value of an attribute; None if it is not compared."""
    if attribute.is_ref():
        return None
    match attribute.type:
        case ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.nbytes > _MOST_BYTES or tensor.dtype == ir.DataType.STRING:
                return None
            return (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        case ir.AttributeType.INT | ir.AttributeType.FLOAT | ir.AttributeType.STRING:
            return repr(attribute.value)
        case ir.AttributeType.INTS | ir.AttributeType.FLOATS | ir.AttributeType.STRINGS:
            return tuple(repr(part) for part in attribute.value)
    return None


def drop_unused_constants(model: ir.Model) -> None:
    """Remove the initializers of every graph that nothing reads."""
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            kept = value.uses() or value.is_graph_output() or value.is_graph_input()
            if not kept:
                del graph.initializers[name]
