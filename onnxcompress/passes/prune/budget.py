"""What is left of a model, as a fraction, when groups lose units.

Two ways to know: :func:`remaining` adds up what the groups share of tensors and
multiply-accumulates, quickly; a :class:`Ledger` cuts a copy and counts what is really there, with
the constants that cutting adds. Plans are made with the first and checked with the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.dataset import Dataset
from onnxcompress.graph.constants import constant_tensor, initializers
from onnxcompress.graph.cost import ModelCost, Shape, cost_of
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.surgery import MacsModel, remove
from onnxcompress.passes.prune.options import Measure

Removed = Mapping[int, npt.NDArray[np.int64]]


Shapes = Mapping[str, Shape]


def remaining(
    model: ir.Model, coupling: Coupling, measure: Measure, feeds_shapes: Shapes | None = None
) -> Callable[[Removed], float]:
    """A function from removed units to the fraction of ``measure`` that is left.

    Args:
        model: The model that was analysed.
        coupling: Its groups.
        measure: What is counted.
        feeds_shapes: Shapes of graph inputs by name; otherwise dynamic axes count as 1.
    """
    if measure is Measure.MACS:
        macs = MacsModel(model, coupling, feeds_shapes)
        whole = max(macs.remaining({}), 1)
        return lambda removed: macs.remaining(removed) / whole
    weights = _Weights.of(model, coupling, measure)
    total = weights.size({})
    return lambda removed: weights.size(removed) / max(total, 1.0)


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a cut model costs next to the one that the user gave.

    Attributes:
        before: Cost of the user's model.
        feeds_shapes: Shapes of graph inputs by name; otherwise dynamic axes count as 1.
    """

    before: ModelCost
    feeds_shapes: Shapes | None

    @classmethod
    def of(cls, model: ir.Model, data: Dataset | None) -> Ledger:
        """Count ``model`` as it runs on a sample of ``data``."""
        shapes = None if data is None else {n: a.shape for n, a in data.first().items()}
        return cls(cost_of(model, shapes), shapes)

    def ratio(self, after: ModelCost, measure: Measure) -> float:
        """What is left of ``measure``, as a fraction of the user's model."""
        counts = [
            {
                Measure.MACS: cost.macs,
                Measure.PARAMS: cost.parameters,
                Measure.BYTES: cost.weight_bytes,
            }[measure]
            for cost in (after, self.before)
        ]
        return counts[0] / max(counts[1], 1)

    def cut_ratio(
        self, model: ir.Model, coupling: Coupling, removed: Removed, measure: Measure
    ) -> float:
        """What is left of ``measure`` once ``removed`` is cut from a copy of ``model``."""
        cut = model_io.clone(model)
        remove(cut, coupling, removed)
        return self.ratio(cost_of(cut, self.feeds_shapes), measure)


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
        for name, value in initializers(model):
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
