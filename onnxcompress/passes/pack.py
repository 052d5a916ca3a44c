"""Store tensors of many zeros in less: one bit per element, and the elements that are left.

For a tensor ``w`` of ``n`` elements with ``k`` of them not 0, the file holds ``mask`` (n/8 bytes)
and ``values = [0, w_{i1}, ..., w_{ik}]``, from which

    w = Reshape(Gather(values, CumSum(mask) · mask))

Everything depends on constants alone: onnxruntime computes it once, at load, and then runs on the
plain tensor at the speed of before. ONNX's own sparse tensors take an index of 8 bytes beside each
element and are made dense at load just the same; they are smaller only below a third of the
elements, this below 31/32 of them (float32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.naming import Namer
from onnxcompress.passes._foldable import Chain
from onnxcompress.passes._packing import Plane
from onnxcompress.passes.base import Change, PassOptions, PassReport, Skip, Stage, option

Array = npt.NDArray[np.generic]

_OPSET = 11
"""The first opset with CumSum."""

_CHAIN_BYTES = 700
"""About what the nodes of one tensor take in the file."""

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions(PassOptions):
    """Options of :class:`PackPass`."""

    min_saving: float = option(
        0.1, "pack tensors that become smaller by this share at least", minimum=0.0, maximum=1.0
    )


class PackPass:
    """Stores tensors of many zeros as a bit mask and the elements that are left."""

    name: ClassVar[str] = "pack"
    summary: ClassVar[str] = (
        "store tensors of many zeros in less; unpacked when the model is loaded"
    )
    stage: ClassVar[Stage] = Stage.STORAGE
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    options_type: ClassVar[type[PassOptions]] = PackOptions

    def __init__(self, options: PackOptions | None = None) -> None:
        self.options = options or PackOptions()
        self.options.validate(self.name)

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say which tensors would be packed."""
        del ctx
        return self._packed(model, write=False)

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Pack tensors in place."""
        del ctx
        return self._packed(model, write=True)

    def _packed(self, model: ir.Model, *, write: bool) -> PassReport:
        changes: list[Change] = []
        skips: list[Skip] = []
        namer = Namer(model)
        old = (model.opset_imports.get("") or 0) < _OPSET
        before = after = 0
        for graph in model.graphs():
            for value in list(graph.initializers.values()):
                array = _array(value)
                if array is None:
                    continue
                left = int(np.count_nonzero(array))
                size = packed_bytes(array, left)
                if size > (1 - self.options.min_saving) * array.nbytes:
                    continue
                if old:
                    reason = f"unpacking needs opset {_OPSET}"
                    skips.append(Skip(value.name or "", "", reason))
                    continue
                if write:
                    _write(Chain(namer, value, graph, self.name), array)
                before, after = before + array.nbytes, after + size
                what = f"{left} of {array.size} elements stored ({array.nbytes} to {size} bytes)"
                changes.append(Change(value.name or "", "", what, array.nbytes - size))
        figures = {"packed_bytes_before": before, "packed_bytes_after": after}
        return PassReport(tuple(changes), tuple(skips), figures if changes else {}, _notes(changes))


def _notes(changes: list[Change]) -> tuple[str, ...]:
    if not changes:
        return ()
    return (
        "Tensors of many zeros are unpacked when the model is loaded, which takes longer then; the "
        "runtime multiplies by the zeros as before, so they make nothing faster.",
    )


def _array(value: ir.Value) -> Array | None:
    """The data of an initializer that may be packed."""
    tensor = value.const_value
    if tensor is None or tensor.dtype not in _DTYPES or tensor.nbytes <= _CHAIN_BYTES:
        return None
    if value.is_graph_input() or value.is_graph_output() or not value.uses():
        return None
    return constant_of(value)


def packed_bytes(array: Array, left: int) -> int:
    """About what a packed tensor takes in the file.

    Args:
        array: The tensor.
        left: How many of its elements are not 0.
    """
    return -(-array.size // 8) + (left + 1) * array.itemsize + _CHAIN_BYTES


def _write(chain: Chain, array: Array) -> None:
    flat = array.reshape(-1)
    mask = (flat != 0).astype(np.uint8)
    packed = Plane(shift=0, width=1).packed(mask)
    values = np.concatenate([np.zeros(1, flat.dtype), flat[flat != 0]])
    bits = chain.unpacked("mask", packed, 1, mask.shape)
    axis = chain.constant("axis", np.array(0))
    places = chain.add("Mul", [chain.add("CumSum", [bits, axis]), bits])
    gathered = chain.add("Gather", [chain.constant("values", values), places])
    shape = chain.constant("shape", np.array(array.shape, np.int64))
    chain.finish(chain.add("Reshape", [gathered, shape]))
