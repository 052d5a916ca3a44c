"""Nodes that compute a weight from smaller constants, which onnxruntime does once, at load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.passes._packing import digits_per_byte

Array = npt.NDArray[np.generic]
Codes = npt.NDArray[np.uint8]
Common: TypeAlias = dict[tuple[object, ...], ir.Value]
"""Constants that several chains read, by graph, type, shape and bytes."""

CAST_BYTES = 40
"""What a Cast takes in a file, its constant's header included, with short names."""


def halves_save(elements: int) -> bool:
    """Whether a float32 constant takes less in half precision behind a Cast."""
    return 2 * elements > CAST_BYTES


def float_bytes(elements: int) -> int:
    """Bytes of a float32 constant that may be stored in half precision, its Cast included."""
    return 2 * elements + CAST_BYTES if halves_save(elements) else 4 * elements


class Chain:
    """Nodes at the start of a graph that compute one weight from constants.

    Args:
        namer: Makes names that are new to the model.
        weight: The initializer to replace.
        graph: The graph that owns it.
        owner: Name of the pass, which becomes part of all names.
        common: Constants of other chains of the model, which gets those of this one.

    Attributes:
        nodes: The nodes so far.
    """

    def __init__(
        self,
        namer: Namer,
        weight: ir.Value,
        graph: ir.Graph,
        owner: str,
        common: Common | None = None,
    ) -> None:
        self._namer, self._weight, self._graph = namer, weight, graph
        self._stem = f"{weight.name}/{owner}"
        self._common: Common = {} if common is None else common
        self.nodes: list[ir.Node] = []

    def constant(self, role: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """Add an initializer."""
        name = self._namer.value(f"{self._stem}_{role}")
        data = array if array.ndim == 0 else np.ascontiguousarray(array)
        return set_initializer(self._graph, name, data, dtype=dtype)

    def helper(self, role: str, array: Array) -> ir.Value:
        """A constant that says how to compute, such as a shape: equal ones are stored once."""
        key = (self._graph, array.dtype, array.shape, array.tobytes())
        if key not in self._common:
            self._common[key] = self.constant(role, array)
        return self._common[key]

    def floats(self, role: str, array: npt.NDArray[np.float32]) -> ir.Value:
        """A float32 constant, stored in half precision where that is exact and saves bytes."""
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not halves_save(array.size) or not np.array_equal(half.astype(np.float32), array):
            return self.constant(role, array)
        return self.add("Cast", [self.constant(role, half)], to=int(ir.DataType.FLOAT))

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
        value = self.add("Div", [value, self.helper(f"{role}_divisors", divisors)])
        value = self.add("Mod", [value, self.helper(f"{role}_base", np.array(base, np.int32))])
        if m * packed.size != count:
            bounds = [
                self.helper(f"{role}_{name}", np.array([number]))
                for name, number in (("flat", -1), ("start", 0), ("stop", count))
            ]
            value = self.add("Slice", [self.add("Reshape", [value, bounds[0]]), *bounds[1:]])
        target = self.helper(f"{role}_shape", np.array(shape, np.int64))
        return self.add("Reshape", [value, target])

    def finish(self, value: ir.Value) -> None:
        """Insert the nodes and let ``value`` stand for the weight, under its name."""
        name = self._weight.name or ""
        value.type, value.shape = self._weight.type, self._weight.shape
        self._graph.insert_before(self._graph[0], self.nodes)
        self._weight.replace_all_uses_with(value)
        self._graph.initializers.pop(name)
        value.name = name
