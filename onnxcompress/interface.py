"""The inputs and outputs of a model: names, element types and shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import ModelError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One graph input or output.

    Attributes:
        name: Tensor name.
        dtype: Element type; strings are ``object``.
        shape: One entry per axis: its length, or the name of a dynamic axis ("" when it has none).
            None when the rank is unknown.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | str, ...] | None

    @property
    def rank(self) -> int | None:
        """Number of axes; None when unknown."""
        return None if self.shape is None else len(self.shape)

    @property
    def batch(self) -> int | None:
        """Length of the first axis; None when it is dynamic, absent or unknown."""
        if not self.shape:
            return None
        return self.shape[0] if isinstance(self.shape[0], int) else None

    def __str__(self) -> str:
        shape = (
            "unknown shape"
            if self.shape is None
            else f"[{', '.join(str(d) or '?' for d in self.shape)}]"
        )
        return f"{self.name}: {self.dtype} {shape}"


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """The graph inputs that have to be fed (initializers are not inputs).

    Raises:
        ModelError: If an input is not a dense tensor of a known element type.
    """
    initializers = model.graph.initializers
    return tuple(_spec(v) for v in model.graph.inputs if v.name not in initializers)


def output_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """The graph outputs.

    Raises:
        ModelError: If an output is not a dense tensor of a known element type.
    """
    return tuple(_spec(v) for v in model.graph.outputs)


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or (
        value.type is not None and not isinstance(value.type, ir.TensorType)
    ):
        raise ModelError(
            f"graph input or output '{value.name}' is not a tensor of a known element type"
            f" ({value.type})",
            hint="Sequences, maps, optionals and sparse tensors are not supported there.",
        )
    shape = None
    if value.shape is not None:
        shape = tuple(d if isinstance(d, int) else (d.value or "") for d in value.shape)
    return TensorSpec(value.name or "", np.dtype(value.dtype.numpy()), shape)
