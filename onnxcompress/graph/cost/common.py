"""What the parts of the cost model share."""

from __future__ import annotations

import onnx_ir as ir

Shape = tuple[int, ...]

MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs in the attributes of a node."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def flag(node: ir.Node, name: str) -> int:
    """An integer attribute; 0 where it is missing."""
    return node.attributes.get_int(name, 0) or 0


def elements_per_code(node: ir.Node, tensor: ir.TensorProtocol) -> int:
    """Weights in one element of a packed tensor."""
    packs = node.op_type in {"MatMulNBits", "GatherBlockQuantized"}
    if not packs or tensor.dtype != ir.DataType.UINT8:
        return 1
    return 8 // (node.attributes.get_int("bits", 4) or 4)
