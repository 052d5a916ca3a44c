"""In which coordinates the weights of a model learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.context import PassContext
from onnxcompress.numerics.adam import Coordinates, Plain
from onnxcompress.numerics.whitening import LEAST_SIZE, Whitened
from onnxcompress.passes._layers import Layer, measured
from onnxcompress.passes._layout import Layout

Float = npt.NDArray[np.float32]

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators whose weights learn."""
_WIDE = 2048
"""Inputs of a layer whose directions are told apart, at most; wider ones learn entry by entry."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Coordinates of a matrix, for a weight that is that matrix in another shape."""

    layout: Layout
    matrix: Whitened

    @property
    def size(self) -> Float:
        return self.matrix.size

    def gradient(self, gradient: Float) -> Float:
        rows = self.layout.matrix(gradient)
        return self.matrix.gradient(np.asarray(rows, np.float32))

    def move(self, step: Float) -> Float:
        return np.asarray(self.layout.tensor(self.matrix.move(step)), np.float32)


def coordinates_of(
    model: ir.Model, weights: Mapping[str, Float], ctx: PassContext
) -> dict[str, Coordinates]:
    """Coordinates for each weight: whitened where its inputs can be measured.

    Where BatchNormalization was folded, channels differ by orders of magnitude. So do the steps of
    their biases, which have the size of the channel's weights.

    Args:
        model: The model; it is not changed.
        weights: What learns, by name.
        ctx: The job, with calibration samples.
    """
    found: dict[str, Coordinates] = {n: Plain(_scale(a)) for n, a in weights.items()}
    layers = []
    for name, array in weights.items():
        layer = Layer.of(model.graph.initializers[name], model.graph, model)
        if array.ndim < 2 or isinstance(layer, str):
            continue
        found[name] = Plain(_rows(array, layer.layout))
        if layer.layout.columns <= _WIDE:
            layers.append(layer)
    for bias, weight in biases_of(model).items():
        if bias not in weights or weight not in found:
            continue
        rows = found[weight].size.reshape(-1)
        if weights[bias].shape == rows.shape:
            found[bias] = Plain(rows)
    for layer, moments in measured(model, layers, ctx):
        whitened = None if moments is None else Whitened.of(layer.matrix(), moments)
        if whitened is not None:
            found[layer.name] = _Tensor(layer.layout, whitened)
    return found


def _rows(array: Float, layout: Layout) -> Float:
    """The root mean square of each output channel's weights, to be repeated over the weight."""
    rows = layout.matrix(array).astype(np.float64)
    size = np.maximum(np.sqrt(np.mean(rows**2, axis=1)), LEAST_SIZE * _scale(array))
    return np.asarray(size.reshape(layout.per_row), np.float32)


def _scale(array: Float) -> Float:
    """The root mean square of an array."""
    mean = np.mean(np.square(array, dtype=np.float64))
    return np.array(max(float(np.sqrt(mean)), 1e-12), np.float32)


def biases_of(model: ir.Model) -> dict[str, str]:
    """Of each initializer that is added to the output of a layer, the layer's weight."""
    found = {}
    for node in model.graph:
        if node.domain or node.op_type not in LINEAR or node.inputs[1] is None:
            continue
        added = list(node.inputs[2:])
        if node.op_type == "MatMul":
            uses = (use.node for use in node.outputs[0].uses() if use.node.op_type == "Add")
            added += [value for add in uses for value in add.inputs]
        for value in added:
            if value is not None and value.name and value.is_initializer():
                found[value.name] = node.inputs[1].name or ""
    return found
