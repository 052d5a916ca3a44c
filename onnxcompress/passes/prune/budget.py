"""What is left of a model, as a fraction, when groups lose units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_tensor
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.surgery import MacsModel
from onnxcompress.passes.prune.options import Measure

Removed = Mapping[int, npt.NDArray[np.int64]]


def remaining(model: ir.Model, coupling: Coupling, measure: Measure) -> Callable[[Removed], float]:
    """A function from removed units to the fraction of ``measure`` that is left."""
    if measure is Measure.MACS:
        macs = MacsModel(model, coupling)
        whole = max(macs.remaining({}), 1)
        return lambda removed: macs.remaining(removed) / whole
    weights = _Weights.of(model, coupling, measure)
    total = weights.size({})
    return lambda removed: weights.size(removed) / max(total, 1.0)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An initializer: its shape, bytes (or 1) per element, and who cuts which axis how much.

    ``cuts`` holds (axis, group, positions per unit).
    """

    shape: tuple[int, ...]
    cost: float
    cuts: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Weights:
    tensors: tuple[_Tensor, ...]

    @classmethod
    def of(cls, model: ir.Model, coupling: Coupling, measure: Measure) -> _Weights:
        cuts: dict[str, list[tuple[int, int, int]]] = {}
        for group in coupling.groups:
            for cut in group.cuts:
                entry = (cut.axis, group.index, cut.indices.shape[1])
                cuts.setdefault(cut.initializer, []).append(entry)
        tensors = []
        for name, value in model.graph.initializers.items():
            tensor = constant_tensor(value)
            if tensor is None:
                continue
            counted = tensor.dtype.is_floating_point() or name in cuts
            cost = tensor.dtype.itemsize if measure is Measure.BYTES else float(counted)
            shape = tuple(int(d) for d in tensor.shape.numpy())
            tensors.append(_Tensor(shape, cost, tuple(cuts.get(name, ()))))
        return cls(tuple(tensors))

    def size(self, removed: Removed) -> float:
        total = 0.0
        for tensor in self.tensors:
            lengths = list(tensor.shape)
            for axis, group, width in tensor.cuts:
                lengths[axis] -= width * len(removed.get(group, ()))
            total += tensor.cost * math.prod(lengths)
        return total
