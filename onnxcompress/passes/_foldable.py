"""Nodes that compute a weight from smaller constants, which onnxruntime does once, at load."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.passes._packing import digits_per_byte

Array = npt.NDArray[np.generic]
Codes = npt.NDArray[np.uint8]


class Chain:
    """Nodes at the start of a graph that compute one weight from constants.

    Args:
        namer: Makes names that are new to the model.
        weight: The initializer to replace.
        graph: The graph that owns it.
        owner: Name of the pass, which becomes part of all names.

    Attributes:
        nodes: The nodes so far.
    """

    def __init__(self, namer: Namer, weight: ir.Value, graph: ir.Graph, owner: str) -> None:
        self._namer, self._weight, self._graph = namer, weight, graph
        self._stem = f"{weight.name}/{owner}"
        self.nodes: list[ir.Node] = []

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
        self.nodes.append(node)
        return node.outputs[0]

    def integers(self, value: ir.Value) -> ir.Value:
        """``value`` as int32."""
        return self.add("Cast", [value], to=int(ir.DataType.INT32))

    def unpacked(self, role: str, packed: Codes, width: int, shape: tuple[int, ...]) -> ir.Value:
        """Codes of ``width`` bits, see :meth:`digits`."""
        return self.digits(role, packed, 1 << width, shape)

    def digits(self, role: str, packed: Codes, base: int, shape: tuple[int, ...]) -> ir.Value:
        """Codes below ``base``, stored ``m`` to a byte (:func:`digits_per_byte`), as int32.

        Code ``i L + l`` is digit ``i`` of byte ``l`` of ``L = ⌈n / m⌉``, which ``Mod(Div(byte,
        base^i), base)`` takes out.

        Args:
            role: What to call them.
            packed: The bytes, [1, L].
            base: 2 to 16.
            shape: Shape of the codes.
        """
        m, count = digits_per_byte(base), math.prod(shape)
        divisors = (base ** np.arange(m)).astype(np.int32)[:, None]
        value = self.integers(self.constant(role, packed))
        value = self.add("Div", [value, self.constant(f"{role}_divisors", divisors)])
        value = self.add("Mod", [value, self.constant(f"{role}_base", np.array(base, np.int32))])
        if m * packed.size != count:
            bounds = [
                self.constant(f"{role}_{name}", np.array([number]))
                for name, number in (("flat", -1), ("start", 0), ("stop", count))
            ]
            value = self.add("Slice", [self.add("Reshape", [value, bounds[0]]), *bounds[1:]])
        target = self.constant(f"{role}_shape", np.array(shape, np.int64))
        return self.add("Reshape", [value, target])

    def finish(self, value: ir.Value) -> None:
        """Insert the nodes and let ``value`` stand for the weight, under its name."""
        name = self._weight.name or ""
        value.type, value.shape = self._weight.type, self._weight.shape
        self._graph.insert_before(self._graph[0], self.nodes)
        self._weight.replace_all_uses_with(value)
        self._graph.initializers.pop(name)
        value.name = name
