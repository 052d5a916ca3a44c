"""What a model costs: parameters, multiply-accumulates (MACs) and bytes, per node and in all.

MACs count the products of contractions; elementwise operators, normalizations and pooling count 0:

    Conv            |Y| · C/g · Πk           (Y: output, C: input channels, g: groups, k: kernel)
    ConvTranspose   |X| · M/g · Πk           (X: input, M: output channels)
    Gemm, MatMul    |Y| · K                  (K: length of the contracted axis)
    Einsum          Π of the lengths of all its axes, times (operands − 1)
    LSTM, GRU, RNN  T · B · D · G·H·(I + H)  (D: directions, G: 4, 3, 1 gates, H: hidden, I: input)
    Attention       B · heads · Sq · Sk · (Dqk + Dv), plus the projection where the node holds one

Quantized forms (QLinear*, *Integer, ``com.microsoft`` fused ones) count like the float operator; a
``DequantizeLinear → Conv → QuantizeLinear`` sandwich counts once because Q and DQ contract nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.graph.cost.common import Shape, subgraphs
from onnxcompress.graph.cost.macs import node_macs
from onnxcompress.graph.cost.shapes import probe_shapes
from onnxcompress.graph.cost.weights import assign_weights, unused_bytes

__all__ = ["ModelCost", "NodeCost", "Shape", "cost_of", "probe_shapes"]


@dataclass(frozen=True, slots=True)
class NodeCost:
    """What one node costs.

    Attributes:
        node: Its name.
        op_type: Its operator.
        parameters: Elements of the weights that it is the first to use (through
            DequantizeLinear, Transpose, ...).
        macs: Multiply-accumulates of one run; None where a shape that they depend on is unknown.
        weight_bytes: Bytes of all constants that it is the first to use, scales and shapes too.
    """

    node: str
    op_type: str
    parameters: int
    macs: int | None
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model costs.

    Attributes:
        parameters: Elements of all weights, each shared one once. Scales, zero points and shapes
            are no weights.
        macs: Multiply-accumulates of one run. Of the branches of an ``If`` the most expensive one
            counts, the body of a ``Loop`` or ``Scan`` once. Nodes of unknown cost count 0.
        weight_bytes: Bytes of all constants, before any compression of the file.
        nodes: One entry per node, subgraphs included, in the order of the graph.
    """

    parameters: int
    macs: int
    weight_bytes: int
    nodes: tuple[NodeCost, ...]

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of contractions whose MACs could not be counted."""
        return tuple(n.node for n in self.nodes if n.macs is None)


def cost_of(model: ir.Model, feeds_shapes: Mapping[str, Shape] | None = None) -> ModelCost:
    """Count parameters, MACs and bytes of ``model``, which is not changed.

    Args:
        model: A model whose functions are inlined.
        feeds_shapes: Shapes of graph inputs by name; otherwise their dynamic axes are 1.
    """
    shapes = probe_shapes(model, feeds_shapes)
    weights = assign_weights(model)
    costs: dict[ir.Node, NodeCost] = {}
    for node in model.graph.all_nodes():
        parameters, weight_bytes = weights.get(node, (0, 0))
        costs[node] = NodeCost(
            node.name or "", node.op_type, parameters, node_macs(node, shapes), weight_bytes
        )
    return ModelCost(
        parameters=sum(c.parameters for c in costs.values()),
        macs=_graph_macs(model.graph, costs),
        weight_bytes=sum(c.weight_bytes for c in costs.values()) + unused_bytes(model),
        nodes=tuple(costs.values()),
    )


def _graph_macs(graph: ir.Graph, costs: Mapping[ir.Node, NodeCost]) -> int:
    total = 0
    for node in graph:
        total += costs[node].macs or 0
        inner = [_graph_macs(g, costs) for g in subgraphs(node)]
        total += max(inner) if node.op_type == "If" and inner else sum(inner)
    return total
