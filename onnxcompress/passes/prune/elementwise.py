"""Chains of nodes that apply one function to every element of a tensor: activations as exported.

A GELU may be five nodes, a hard swish four. Whatever they are, if all of them are elementwise, read
nothing but the tensor and constants of one element, and nobody else reads what lies between, the
chain is a function of one number. It is run once, on numbers at even distances.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.context import PassContext
from onnxcompress.errors import OnnxCompressError
from onnxcompress.graph.constants import constant_tensor
from onnxcompress.numerics.scalar_function import Floats, ScalarFunction, Tabled
from onnxcompress.passes.prune.clipping import clip_of
from onnxcompress.runtime import open_session

_ELEMENTWISE = frozenset({
    "Abs", "Add", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow",
    "QuickGelu", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub",
    "Swish", "Tanh", "ThresholdedRelu",
})  # fmt: skip
"""Operators, of ONNX or onnxruntime, that treat every element alike."""
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_LONGEST = 16
"""Nodes of a chain at most."""
_ENTRIES = 8192
"""Numbers at which a chain is run."""
_BEYOND = 0.5
"""How far the table goes beyond what was seen, relative to its width."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A function of one number, as nodes.

    Attributes:
        root: The tensor that it is applied to.
        result: What comes out.
        nodes: The nodes, in no order; masks behind them are left out.
    """

    root: ir.Value
    result: ir.Value
    nodes: tuple[ir.Node, ...]

    def function(self, seen: Floats, ctx: PassContext) -> ScalarFunction | None:
        """The function; None if it does not run.

        Args:
            seen: Numbers that it is applied to, any shape.
            ctx: How to run.
        """
        if len(self.nodes) == 1 and (bounds := clip_of(self.nodes[0])) is not None:
            return bounds
        low, high = float(seen.min(initial=0.0)), float(seen.max(initial=0.0))
        margin = _BEYOND * max(high - low, 1.0)
        at = np.linspace(low - margin, high + margin, _ENTRIES, dtype=np.float64)
        try:
            session = open_session(self._model(), ctx.session, work_dir=ctx.work_dir)
            (found,) = session.run({self.root.name or "": at.astype(np.float32)}).values()
        except (OnnxCompressError, ValueError):
            return None
        values = np.asarray(found, np.float32).reshape(-1)
        if len(values) != _ENTRIES or not np.isfinite(values).all():
            return None
        return Tabled(float(at[0]), float(at[1] - at[0]), values)

    def _model(self) -> ir.Model:
        """The chain alone, for a vector."""
        graph = self.root.graph
        if not isinstance(graph, ir.Graph):
            raise ValueError("the chain stands in no graph")
        part = ir.convenience.extract(graph, [self.root], [self.result])
        for value in (*part.inputs, *(o for n in part for o in n.outputs)):
            value.shape = None
        for value in part.inputs:
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([_ENTRIES])
        return ir.Model(part, ir_version=10)


def chain_behind(result: ir.Value, makers: Collection[str]) -> Chain | None:
    """The longest chain that ends at a value.

    Args:
        result: The value.
        makers: Names of values that layers make; a chain goes no further back.

    Returns:
        An empty chain where no elementwise operator makes the value; None where what lies between
        has several roots, or somebody else reads it, too.
    """
    nodes: dict[ir.Node, None] = {}
    roots: set[ir.Value] = set()
    todo = [result]
    while todo and len(nodes) <= _LONGEST:
        value = todo.pop()
        node = value.producer()
        if value.name in makers or node is None or not _elementwise(node):
            roots.add(value)
        elif node not in nodes:
            nodes[node] = None
            todo.extend(v for v in node.inputs if v is not None and constant_tensor(v) is None)
    if todo or len(roots) != 1:
        return None
    (root,) = roots
    inner = {root, *(o for n in nodes for o in n.outputs)} - {result}
    alone = all(not v.is_graph_output() and all(u.node in nodes for u in v.uses()) for v in inner)
    return Chain(root, result, tuple(nodes)) if alone else None


def _elementwise(node: ir.Node) -> bool:
    """Whether a node treats every element of its one data input alike."""
    if node.domain not in _DOMAINS or node.op_type not in _ELEMENTWISE or len(node.outputs) != 1:
        return False
    for value in node.inputs:
        tensor = None if value is None else constant_tensor(value)
        if tensor is not None and tensor.size != 1:
            return False
    return True
