"""Weights as matrices, with what is known about their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import MomentsRequest
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes._inputs import moment_requests
from onnxcompress.passes._layout import Layout
from onnxcompress.passes._weights import matrix_layout

Float64 = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_BATCH_BYTES = 512 * 2**20
"""Second moments held at a time."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight as a matrix [O, D].

    Attributes:
        value: Its initializer.
        graph: The graph that owns it.
        layout: How the tensor is a matrix.
        requests: What to measure of its inputs; none where they cannot be measured.
    """

    value: ir.Value
    graph: ir.Graph
    layout: Layout
    requests: tuple[MomentsRequest, ...]

    @property
    def name(self) -> str:
        """Name of the initializer."""
        return self.value.name or ""

    @property
    def moment_bytes(self) -> int:
        """Size of its second moments."""
        return 8 * self.layout.columns**2 * len(self.requests)

    def matrix(self) -> Float64:
        """``W``, [O, D]."""
        array = constant_of(self.value)
        if array is None:
            raise TypeError(f"initializer '{self.name}' has no data")
        return np.ascontiguousarray(self.layout.matrix(array)).astype(np.float64)

    def store(self, matrix: Float64) -> None:
        """Write the weight back."""
        tensor = self.layout.tensor(matrix.astype(np.float32))
        self.value.const_value = ir.tensor(tensor, name=self.name)

    def neighbours(self) -> Indices:
        """The order of columns in which input channels are neighbours, [D].

        The columns of a convolution are (channel, place in the kernel); hardware for N:M sparsity
        groups channels at one place.
        """
        shape = self.layout.permuted[len(self.layout.rows) :]
        columns = np.arange(self.layout.columns).reshape(shape[0] if shape else 1, -1)
        return np.asarray(columns.T.reshape(-1), np.int64)

    @classmethod
    def of(cls, value: ir.Value, graph: ir.Graph, model: ir.Model) -> Layer | str:
        """The layer of an initializer of ``graph``, or why it is none."""
        layout = matrix_layout(value)
        if isinstance(layout, str):
            return layout
        requests: tuple[MomentsRequest, ...] = ()
        if graph is model.graph:
            requests = moment_requests(value, layout.columns, len(layout.rows), model)
        return cls(value, graph, layout, requests)


def measured(
    model: ir.Model, layers: Sequence[Layer], ctx: PassContext
) -> Iterator[tuple[Layer, Float64 | None]]:
    """Every layer with the second moments ``E[x xᵀ]`` of its inputs, [G, D, D], or None.

    Those of as many layers as fit into memory are measured in one run over the data.
    """
    for batch in _batches(layers):
        wanted = dict.fromkeys(r for layer in batch for r in layer.requests)
        if not wanted:
            yield from ((layer, None) for layer in batch)
            continue
        found = ctx.collect(model, wanted, description="measuring the inputs of weights")
        for layer in batch:
            results = [found[request] for request in layer.requests]
            parts = [r.covariance + r.mean[:, :, None] * r.mean[:, None, :] for r in results]
            yield layer, np.sum(parts, axis=0) if parts else None


def _batches(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    batch: list[Layer] = []
    used = 0
    for layer in layers:
        if batch and used + layer.moment_bytes > _BATCH_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(layer)
        used += layer.moment_bytes
    if batch:
        yield batch
