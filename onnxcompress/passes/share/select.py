"""Which weights get a codebook, and how each is a matrix; every other one with its reason."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import MomentsRequest
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes._inputs import moment_requests
from onnxcompress.passes._layout import Layout
from onnxcompress.passes._weights import Chosen, choose_weights, matrix_layout
from onnxcompress.passes.base import Skip
from onnxcompress.passes.share.integers import read_integers
from onnxcompress.passes.share.options import Assign, Codebook, ShareOptions

Float32 = npt.NDArray[np.float32]

_FEW_INPUTS = 16
"""Weights per output below which a small weight is left alone."""

_SMALL_PART = 0.02
"""Part of all weights below which a weight is small."""

_INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that may get a codebook.

    Attributes:
        value: Its initializer.
        graph: The graph that owns it.
        layout: How it is a matrix [R, D].
        requests: What to measure of its inputs; none if they cannot be measured.
        scale: Of integers, their scale per row, [R]; None for floats.
        zero: Of integers, their zero point.
        few: Whether an output is made of so few of its weights that errors do not average out.
    """

    value: ir.Value
    graph: ir.Graph
    layout: Layout
    requests: tuple[MomentsRequest, ...]
    scale: Float32 | None = None
    zero: int = 0
    few: bool = False

    @property
    def name(self) -> str:
        """Name of the initializer."""
        return self.value.name or ""

    @property
    def elements(self) -> int:
        """Number of weights, R D."""
        return self.layout.row_count * self.layout.columns

    @property
    def nbytes(self) -> int:
        """Bytes it takes now."""
        tensor = self.value.const_value
        return 0 if tensor is None else tensor.nbytes

    def matrix(self) -> Float32:
        """The weight as the layer multiplies by it, float32, [R, D]."""
        array = constant_of(self.value)
        if array is None:
            raise TypeError(f"initializer '{self.name}' has no data")
        matrix = np.ascontiguousarray(self.layout.matrix(array)).astype(np.float32)
        return matrix if self.scale is None else (matrix - self.zero) * self.scale[:, None]


Selection = Chosen[Weight]


def select(model: ir.Model, options: ShareOptions) -> Selection:
    """Choose the weights of ``model``, which is not changed.

    Raises:
        UsageError: If a pattern matches no weight.
    """
    chosen = choose_weights(
        model,
        lambda value, graph: _weight(value, graph, model),
        owner="share",
        include=options.include,
        exclude=options.exclude,
        min_elements=options.min_elements,
        dtypes=(ir.DataType.FLOAT, *_INTEGERS),
    )
    return chosen if options.include else _worth_it(chosen, options)


def _worth_it(chosen: Selection, options: ShareOptions) -> Selection:
    """Look after small weights of which few make an output: filters of depthwise convolutions.

    Each output is a sum over ``D`` weights; with ``D`` this small the errors of their codes do not
    average out. They are left out where no data tell how to make up for that.
    """
    total = sum(weight.elements for weight in chosen.weights)
    fed = options.assign is Assign.FEEDBACK and options.codebook is Codebook.SCALAR
    kept, skips = [], list(chosen.skips)
    for weight in chosen.weights:
        few = weight.layout.columns < _FEW_INPUTS
        if not few or weight.elements >= _SMALL_PART * total:
            kept.append(weight)
        elif fed and weight.scale is None and weight.requests:
            kept.append(dataclasses.replace(weight, few=True))
        else:
            reason = (
                f"each output is made of {weight.layout.columns} of its weights alone, and it is "
                f"{weight.elements / total:.1%} of all (name it in share.include to share it)"
            )
            skips.append(Skip(weight.name, "", reason))
    return Selection(tuple(kept), tuple(skips))


def _weight(value: ir.Value, graph: ir.Graph, model: ir.Model) -> Weight | str:
    """The weight of one initializer, or why it is none."""
    if value.dtype in _INTEGERS:
        return _integers(value, graph, model)
    layout = matrix_layout(value)
    if isinstance(layout, str):
        return layout
    return Weight(value, graph, layout, _requests(value, layout, graph, model))


def _integers(value: ir.Value, graph: ir.Graph, model: ir.Model) -> Weight | str:
    """A quantized weight."""
    array = constant_of(value)
    found = read_integers(value)
    if isinstance(found, str) or array is None:
        return found if isinstance(found, str) else "it has no data"
    if np.unique(found.zero).size != 1:
        return "its zero point is not the same for all channels"
    layout = Layout(array.shape, found.rows)
    if found.scale.size == 1:
        per_row = np.full(layout.row_count, found.scale.reshape(()), np.float32)
    else:
        rest = [a for a in range(array.ndim) if a not in found.rows]
        if found.scale.size != layout.row_count or any(found.scale.shape[a] != 1 for a in rest):
            return "its scale does not run along the axis of the output channels alone"
        per_row = found.scale.reshape(-1).astype(np.float32)
    requests = _requests(found.real, layout, graph, model)
    return Weight(value, graph, layout, requests, per_row, int(found.zero.reshape(-1)[0]))


def _requests(
    value: ir.Value | None, layout: Layout, graph: ir.Graph, model: ir.Model
) -> tuple[MomentsRequest, ...]:
    if value is None or graph is not model.graph:
        return ()
    return moment_requests(value, layout.columns, len(layout.rows), model)
