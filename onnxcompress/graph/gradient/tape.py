"""What rules of differentiation write nodes with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.emit import Emitter

Shape = tuple[int, ...]
InputGradients = list[ir.Value | None]
"""One for each input of a node, None where it is not needed."""


class StoppedError(Exception):
    """A gradient cannot pass a node; the message says why."""


class Tape(Emitter):
    """Makes nodes for a graph whose shapes are all known.

    Args:
        model: The model that nodes are added to.
        shapes: Static shapes of its values.
        needed: Values whose gradients are needed.
    """

    def __init__(
        self,
        model: ir.Model,
        shapes: Mapping[ir.Value, Sequence[int | None]],
        needed: Collection[ir.Value],
    ) -> None:
        super().__init__(model, "gradient")
        self._shapes = shapes
        self._needed = needed

    def needs(self, value: ir.Value | None) -> bool:
        """Whether the gradient of an input of a node is needed."""
        return value is not None and value in self._needed

    def shape(self, value: ir.Value | None) -> Shape:
        """The shape of a value of the model.

        Raises:
            StoppedError: If it is not known.
        """
        found = None if value is None else self._shapes.get(value)
        if found is None or any(length is None for length in found):
            name = "an absent input" if value is None else f"'{value.name}'"
            raise StoppedError(f"the shape of {name} is not known")
        return tuple(int(length) for length in found if length is not None)

    def floats(self, array: npt.ArrayLike) -> ir.Value:
        """A constant in single precision."""
        return self.constant(np.asarray(array, np.float32))

    def transpose(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """``value`` with its axes in another order."""
        return self.op("Transpose", value, perm=list(order))

    def times(self, value: ir.Value, factor: float) -> ir.Value:
        """``value`` times a number."""
        return value if factor == 1 else self.op("Mul", value, self.floats(factor))

    def where(self, condition: ir.Value, value: ir.Value) -> ir.Value:
        """``value`` where a condition holds, else 0."""
        return self.op("Where", condition, value, self.floats(0.0))

    def sum(self, value: ir.Value, axes: Sequence[int], *, keep: bool = False) -> ir.Value:
        """The sum over axes; over none it is the value itself."""
        if not axes:
            return value
        return self.reduce("ReduceSum", value, axes, keepdims=keep)

    def mean(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """The mean over axes, which stay with length 1."""
        return self.reduce("ReduceMean", value, axes, keepdims=True)

    def unbroadcast(self, value: ir.Value, shape: Shape, wanted: Shape) -> ir.Value:
        """Sum over the axes along which ``wanted`` was repeated to give ``shape``."""
        if shape == wanted:
            return value
        lead = len(shape) - len(wanted)
        axes = [i for i, n in enumerate(shape) if i < lead or (wanted[i - lead] == 1 and n != 1)]
        return self.reshape(self.sum(value, axes), *wanted)

    def place(
        self, value: ir.Value, shape: Shape, starts: Shape, steps: Shape, whole: Shape
    ) -> ir.Value:
        """Zeros of shape ``whole`` with the entries of ``value`` from ``starts`` in ``steps``."""
        if any(s > 1 for s in steps):
            between = [n for pair in zip(shape, [1] * len(shape), strict=True) for n in pair]
            ends = [e for s in steps for e in (0, s - 1)]
            spread = self._padded(self.reshape(value, *between), [0] * len(ends), ends)
            shape = tuple(n * s for n, s in zip(shape, steps, strict=True))
            value = self.reshape(spread, *shape)
        after = [w - b - n for w, b, n in zip(whole, starts, shape, strict=True)]
        return self._padded(value, starts, after)

    def _padded(self, value: ir.Value, before: Sequence[int], after: Sequence[int]) -> ir.Value:
        """``value`` with zeros around it; negative lengths cut."""
        if not any(before) and not any(after):
            return value
        return self.op("Pad", value, self.ints(*before, *after), self.floats(0.0))

    def cut(
        self,
        value: ir.Value,
        starts: Sequence[int],
        ends: Sequence[int],
        axes: Sequence[int],
        steps: Sequence[int] | None = None,
    ) -> ir.Value:
        """A slice of ``value``."""
        strides = [1] * len(axes) if steps is None else list(steps)
        return self.op(
            "Slice",
            value,
            self.ints(*starts),
            self.ints(*ends),
            self.ints(*axes),
            self.ints(*strides),
        )


def known(value: ir.Value | None, what: str) -> list[int]:
    """The integers of a constant.

    Raises:
        StoppedError: If it is computed.
    """
    array = constant_of(value)
    if array is None:
        raise StoppedError(f"its {what} are computed")
    return [int(n) for n in array.reshape(-1)]


def only(grads: Sequence[ir.Value | None]) -> ir.Value:
    """The gradient of an operator's one output."""
    g = grads[0]
    assert g is not None  # noqa: S101 - the engine asks only then
    return g
