"""Write codebooks into a graph, in operators that onnxruntime computes at load.

    indices = Cast(codes)  [ or planes of bits put together, see packing ]  [ + first level of row ]
    weight  = Gather(levels, indices) [ reshaped ] [ * scale of row ]

All of it depends on constants alone, so that constant folding leaves a plain initializer of the
type that the weight had.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.passes.share.fit import Fitted, vector_length
from onnxcompress.passes.share.options import Packing, ShareOptions
from onnxcompress.passes.share.packing import NIBBLE_OPSET, Plane, bits_for, planes, stored_bytes
from onnxcompress.passes.share.select import Weight

Array = npt.NDArray[np.generic]

_NODE_BYTES = 30
"""What a node takes in a file besides its names; a constant takes about as much."""
_DIVISION_OPSET = 10
"""The first opset with Mod and with Slice whose bounds are inputs."""


class Emitter:
    """Replaces weights of one model.

    Args:
        model: The model to change.
        whole_bytes: Store one code in a byte, whatever its bits.
    """

    def __init__(self, model: ir.Model, *, whole_bytes: bool) -> None:
        self._namer = Namer(model)
        opset = model.opset_imports.get("") or 0
        self._nibbles = opset >= NIBBLE_OPSET
        self._whole_bytes = whole_bytes or opset < _DIVISION_OPSET
        self.names: list[str] = []

    def write(self, fitted: Fitted) -> None:
        """Put levels and codes in the place of a weight, whose data are dropped."""
        weight = fitted.weight
        layout = weight.layout
        chain = _Chain(self._namer, fitted)
        codes, target = fitted.stored_codes()
        indices = self._indices(chain, codes, bits_for(fitted.level_count))
        first = fitted.first_levels()
        if first is not None:
            offset = chain.constant("offsets", first)
            indices = chain.add("Add", [indices, offset])
        value = chain.add("Gather", [chain.constant("levels", fitted.stored_levels()), indices])
        if target is not None:
            value = chain.add("Reshape", [value, chain.constant("shape", np.array(target))])
            if layout.back != tuple(range(len(layout.back))):
                value = chain.add("Transpose", [value], perm=list(layout.back))
        if fitted.scale is not None:
            scale = chain.constant("scale", fitted.scale.reshape(layout.per_row))
            value = chain.add("Mul", [value, scale])
        chain.finish(value)
        self.names += [node.name or "" for node in chain.nodes]

    def _indices(self, chain: _Chain, codes: npt.NDArray[np.uint8], bits: int) -> ir.Value:
        """The codes as int32, of their shape."""
        total: ir.Value | None = None
        for plane in planes(bits, whole_bytes=self._whole_bytes):
            part = self._plane(chain, codes, plane)
            if plane.shift:
                factor = chain.constant(f"place{plane.shift}", np.array(1 << plane.shift, np.int32))
                part = chain.add("Mul", [part, factor])
            total = part if total is None else chain.add("Add", [total, part])
        if total is None:
            raise ValueError(f"codes of {bits} bits have no planes")
        return total

    def _plane(self, chain: _Chain, codes: npt.NDArray[np.uint8], plane: Plane) -> ir.Value:
        role = "codes" if plane.shift == 0 else f"codes{plane.shift}"
        if plane.width == 8:
            return chain.integers(chain.constant(role, plane.of(codes)))
        if plane.width == 4 and self._nibbles:
            return chain.integers(chain.constant(role, plane.of(codes), ir.DataType.UINT4))
        packed = plane.packed(codes)
        m, length = plane.per_byte, packed.shape[1]
        divisors = (1 << (plane.width * np.arange(m))).astype(np.int32)[:, None]
        value = chain.integers(chain.constant(role, packed))
        value = chain.add("Div", [value, chain.constant(f"{role}_divisors", divisors)])
        base = chain.constant(f"{role}_base", np.array(1 << plane.width, np.int32))
        value = chain.add("Mod", [value, base])
        if m * length != codes.size:
            bounds = [
                chain.constant(f"{role}_{name}", np.array([number]))
                for name, number in (("flat", -1), ("start", 0), ("stop", codes.size))
            ]
            value = chain.add("Slice", [chain.add("Reshape", [value, bounds[0]]), *bounds[1:]])
        target = chain.constant(f"{role}_shape", np.array(codes.shape))
        return chain.add("Reshape", [value, target])


def stored_size(weight: Weight, options: ShareOptions, bits: int) -> int:
    """About how many bytes of a file a codebook takes: codes, levels, scales, nodes, names."""
    whole_bytes = options.packing is Packing.BYTES
    elements, rows = math.prod(weight.layout.shape), weight.layout.row_count
    length = vector_length(weight, options)
    data = stored_bytes(elements // length, bits, whole_bytes=whole_bytes)
    books = -(-rows // options.group) if options.group and length == 1 else 1
    data += books * length * 4 << bits
    scaled = options.scales and weight.scale is None and rows > 1
    data += 4 * rows * (scaled + (books > 1))
    nodes = 2 * len(planes(bits, whole_bytes=whole_bytes)) + scaled + (books > 1)
    return data + nodes * (2 * _NODE_BYTES + 5 * len(weight.name))


class _Chain:
    """Nodes at the start of a graph that compute one weight from constants."""

    def __init__(self, namer: Namer, fitted: Fitted) -> None:
        self._namer, self._weight = namer, fitted.weight
        self.nodes: list[ir.Node] = []

    def constant(self, role: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """Add an initializer."""
        name = self._namer.value(f"{self._weight.name}/share_{role}")
        data = array if array.ndim == 0 else np.ascontiguousarray(array)
        return set_initializer(self._weight.graph, name, data, dtype=dtype)

    def integers(self, value: ir.Value) -> ir.Value:
        """``value`` as int32."""
        return self.add("Cast", [value], to=int(ir.DataType.INT32))

    def add(self, op_type: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        """Append a node and return its output."""
        name = self._namer.node(f"{self._weight.name}/share_{op_type.lower()}")
        node = ir.node(op_type, inputs, attributes or None, name=name)
        node.outputs[0].name = self._namer.value(f"{name}_out")
        self.nodes.append(node)
        return node.outputs[0]

    def finish(self, value: ir.Value) -> None:
        """Insert the nodes and let ``value`` stand for the weight, under its name."""
        weight = self._weight
        name = weight.name
        value.type, value.shape = weight.value.type, weight.value.shape
        weight.graph.insert_before(weight.graph[0], self.nodes)
        weight.value.replace_all_uses_with(value)
        weight.graph.initializers.pop(name)
        value.name = name
