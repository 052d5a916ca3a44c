"""Branches that lose everything: what becomes of the constants that their last layers answer.

The constant of a residual branch would be added to every position of a large tensor, which takes
time. So it is left out where a layer before the sum can give it instead (that layer is refitted
towards the sum *behind* the branch, its bias included), and where nothing can: then later layers
make up for it. It is kept where a normalization or a stored constant can take it up for nothing,
and wherever it is not simply added; it is then the mean of what is wanted of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.emptying import Emptied, Emptying, whole
from onnxcompress.graph.hollow import absorber, constants_of
from onnxcompress.passes._residual import Detour
from onnxcompress.passes.prune.consumers import Consumer, Layers

Removed = Mapping[int, npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Branches:
    """The emptied groups of a plan.

    Attributes:
        emptied: What becomes of the graph.
        hushed: Layers whose constant is left out.
    """

    emptied: Emptied
    hushed: frozenset[str]

    @classmethod
    def of(cls, model: ir.Model, coupling: Coupling, removed: Removed, layers: Layers) -> Branches:
        """Find them; ``model`` is not changed."""
        groups = whole(coupling, removed)
        if not groups:
            return cls(Emptied(), frozenset())
        emptied = Emptying(model, coupling).of(groups)
        biases = {c.bias for c in layers.consumers.values() if c.obstacle is None}
        nodes = {n.name or "": n for n in model.graph}
        hushed = {
            name
            for name in emptied.layers
            if (c := layers.consumers.get(name)) is not None
            and c.obstacle is None
            and _is_hushed(coupling, nodes[name], c, emptied, biases)
        }
        return cls(emptied, frozenset(hushed))

    def hush(self, model: ir.Model, layers: Layers) -> None:
        """Set the biases of the constants that are left out to zero, in place."""
        for name in self.hushed:
            consumer = layers.consumers[name]
            consumer.write_bias(model, np.zeros(consumer.outputs))

    def detour(self, masked: ir.Model) -> Detour:
        """The way around what is gone, in the masked model."""
        if not self.emptied.layers:
            return Detour()
        arrays = constants_of(self.emptied, masked.graph)
        silent = frozenset(name for name, array in arrays.items() if not np.any(array))
        return Detour(self.emptied.dead, silent)


def _is_hushed(
    coupling: Coupling,
    node: ir.Node,
    consumer: Consumer,
    emptied: Emptied,
    biases: Collection[str | None],
) -> bool:
    """Whether the constant of a layer is better left out."""
    output = node.outputs[0]
    if output.name != consumer.output:  # the bias is an Add of its own
        output = next(iter(output.uses())).node.outputs[0]
    readers = [u for u in output.uses() if u.node.name not in emptied.dead]
    if len(readers) != 1 or readers[0].node.op_type != "Add" or output.shape is None:
        return False
    if readers[0].node.name not in emptied.joins:
        return False
    value = readers[0].node.inputs[1 - readers[0].idx]
    if value is None:
        return False
    taker = absorber(coupling, value, consumer.target_axis, consumer.outputs, emptied.dead)
    return taker is None or taker.name in biases
