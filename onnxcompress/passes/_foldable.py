"""Nodes that compute a weight from smaller constants, which onnxruntime does once, at load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import set_initializer
from onnxcompress.graph.naming import Namer

Array = npt.NDArray[np.generic]
Codes = npt.NDArray[np.uint8]


class Chain:
    """Nodes at the start of a graph that compute one weight from constants.

    Args:
        namer: Makes names that are new to the model.
        weight: The initializer to replace.
        graph: The graph that owns it.
        owner: Name of the pass, which becomes part of all names.
    """

    def __init__(self, namer: Namer, weight: ir.Value, graph: ir.Graph, owner: str) -> None:
        self._namer, self._weight, self._graph = namer, weight, graph
        self._stem = f"{weight.name}/{owner}"
        self._nodes: list[ir.Node] = []

    def constant(self, role: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """Add an initializer."""
        name = self._namer.value(f"{self._stem}_{role}")
        data = array if array.ndim == 0 else np.ascontiguousarray(array)
        return set_initializer(self._graph, name, data, dtype=dtype)

    def add(
        self, op_type: str, inputs: Sequence[ir.Value], **attributes: int | list[int]
    ) -> ir.Value:
        """Append a node and return its output."""
        name = self._namer.node(f"{self._stem}_{op_type.lower()}")
        node = ir.node(op_type, inputs, attributes or None, name=name)
        node.outputs[0].name = self._namer.value(f"{name}_out")
        self._nodes.append(node)
        return node.outputs[0]

    def bits(self, role: str, bits: Codes) -> ir.Value:
        """A vector of bits, stored eight to a byte, as int32.

        Bit ``i L + l`` is bit ``i`` of byte ``l`` of ``L = ⌈n / 8⌉``, which
        ``Mod(Div(byte, 2^i), 2)`` takes out.

        Args:
            role: What to call it.
            bits: 0 or 1, [n].
        """
        length = -(-len(bits) // 8)
        filled = np.concatenate([bits, np.zeros(8 * length - len(bits), np.uint8)])
        planes = filled.reshape(8, length) << np.arange(8, dtype=np.uint8)[:, None]
        packed = np.bitwise_or.reduce(planes, axis=0, keepdims=True)
        value = self.add("Cast", [self.constant(role, packed)], to=int(ir.DataType.INT32))
        divisors = (1 << np.arange(8, dtype=np.int32))[:, None]
        value = self.add("Div", [value, self.constant(f"{role}_divisors", divisors)])
        two = self.constant(f"{role}_base", np.array(2, np.int32))
        value = self.add("Mod", [value, two])
        value = self.add("Reshape", [value, self.constant(f"{role}_flat", np.array([-1]))])
        if len(filled) == len(bits):
            return value
        start = self.constant(f"{role}_start", np.array([0]))
        stop = self.constant(f"{role}_stop", np.array([len(bits)]))
        return self.add("Slice", [value, start, stop])

    def finish(self, value: ir.Value) -> None:
        """Insert the nodes and let ``value`` stand for the weight, under its name."""
        name = self._weight.name or ""
        value.type, value.shape = self._weight.type, self._weight.shape
        self._graph.insert_before(self._graph[0], self._nodes)
        self._weight.replace_all_uses_with(value)
        self._graph.initializers.pop(name)
        value.name = name
