"""Write codebooks into a graph, in operators that onnxruntime computes at load.

    indices = Cast(codes)  [ or planes of bits put together, see packing ]  [ + first level of row ]
    weight  = Gather(levels, indices) [ reshaped ] [ * scale of row ]
    weight  = Cast(codes) * scale of row               where levels are the integers themselves

Scales and larger tables of levels lie in half precision behind a Cast where they were fitted so.

All of it depends on constants alone, so that constant folding leaves a plain initializer of the
type that the weight had.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.naming import Namer
from onnxcompress.numerics.even_codes import MIDDLE
from onnxcompress.passes._foldable import Chain, Common, float_bytes
from onnxcompress.passes._packing import NIBBLE_OPSET, Plane, bits_for, planes, stored_bytes
from onnxcompress.passes.share.fit import Fitted, even, vector_length
from onnxcompress.passes.share.options import Packing, ShareOptions
from onnxcompress.passes.share.select import Weight

Array = npt.NDArray[np.generic]

_NODE_BYTES = 40
"""What a node and its constant take in a file, with short names."""
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
        self._common: Common = {}
        self.names: list[str] = []

    def write(self, fitted: Fitted) -> None:
        """Put levels and codes in the place of a weight, whose data are dropped."""
        weight = fitted.weight
        layout = weight.layout
        chain = Chain(self._namer, weight.value, weight.graph, "share", self._common)
        if fitted.even:
            self._even(chain, fitted)
            return
        codes, target = fitted.stored_codes()
        indices = self._indices(chain, codes, bits_for(fitted.level_count))
        first = fitted.first_levels()
        if first is not None:
            offset = chain.constant("offsets", first)
            indices = chain.add("Add", [indices, offset])
        value = chain.add("Gather", [_levels(chain, fitted.stored_levels()), indices])
        if target is not None:
            value = chain.add("Reshape", [value, chain.helper("shape", np.array(target))])
            if layout.back != tuple(range(len(layout.back))):
                value = chain.add("Transpose", [value], perm=list(layout.back))
        self._scaled(chain, fitted, value)

    def _even(self, chain: Chain, fitted: Fitted) -> None:
        """Integers times the scale of their row."""
        codes, _ = fitted.stored_codes()
        integers = (codes.astype(np.int16) - MIDDLE).astype(np.int8)
        value = chain.add("Cast", [chain.constant("codes", integers)], to=int(ir.DataType.FLOAT))
        self._scaled(chain, fitted, value)

    def _scaled(self, chain: Chain, fitted: Fitted, value: ir.Value) -> None:
        """The last step of a chain."""
        if fitted.scale is not None:
            scale = chain.floats("scale", fitted.scale.reshape(fitted.weight.layout.per_row))
            value = chain.add("Mul", [value, scale])
        chain.finish(value)
        self.names += [node.name or "" for node in chain.nodes]

    def _indices(self, chain: Chain, codes: npt.NDArray[np.uint8], bits: int) -> ir.Value:
        """The codes as int32, of their shape."""
        total: ir.Value | None = None
        for plane in planes(bits, whole_bytes=self._whole_bytes):
            part = self._plane(chain, codes, plane)
            if plane.shift:
                factor = chain.helper(f"place{plane.shift}", np.array(1 << plane.shift, np.int32))
                part = chain.add("Mul", [part, factor])
            total = part if total is None else chain.add("Add", [total, part])
        if total is None:
            raise ValueError(f"codes of {bits} bits have no planes")
        return total

    def _plane(self, chain: Chain, codes: npt.NDArray[np.uint8], plane: Plane) -> ir.Value:
        role = "codes" if plane.shift == 0 else f"codes{plane.shift}"
        if plane.width == 8:
            return chain.integers(chain.constant(role, plane.of(codes)))
        if plane.width == 4 and self._nibbles:
            return chain.integers(chain.constant(role, plane.of(codes), ir.DataType.UINT4))
        return chain.unpacked(role, plane.packed(codes), plane.width, codes.shape)


def _levels(chain: Chain, levels: Array) -> ir.Value:
    if levels.dtype == np.float32:
        return chain.floats("levels", levels.astype(np.float32))
    return chain.constant("levels", levels)


def stored_size(weight: Weight, options: ShareOptions, bits: int) -> int:
    """About how many bytes of a file a codebook takes: codes, levels, scales, nodes, names."""
    return _size(weight, options, bits, whole_bytes=options.packing is Packing.BYTES)


def code_bytes(weight: Weight, options: ShareOptions, bits: int) -> int:
    """The same where every code takes its bits alone, as in a deflated file."""
    return _size(weight, options, bits, whole_bytes=False)


def _size(weight: Weight, options: ShareOptions, bits: int, *, whole_bytes: bool) -> int:
    elements, rows = math.prod(weight.layout.shape), weight.layout.row_count
    length = vector_length(weight, options)
    data = stored_bytes(elements // length, bits, whole_bytes=whole_bytes)
    books = -(-rows // options.group) if options.group and length == 1 else 1
    levels = books * length << bits
    if weight.scale is not None:
        data += levels
    elif not even(weight, options, bits):
        data += float_bytes(levels)
    scaled = options.scales and weight.scale is None and rows > 1
    data += float_bytes(rows) * scaled + 4 * rows * (books > 1)
    nodes = 2 * len(planes(bits, whole_bytes=whole_bytes)) + scaled + (books > 1)
    return data + nodes * _NODE_BYTES
