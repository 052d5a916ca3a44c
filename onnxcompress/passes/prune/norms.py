"""BatchNormalization whose statistics are those of a network that is no longer there.

A BatchNormalization that could not be folded into a layer still subtracts the mean ``μ`` and
divides by the deviation ``σ`` that its inputs had in training. Behind removed and refitted layers
they have others. With mean ``m`` and variance ``v`` of a channel over the same samples, 0 in the
original and 1 in the model as it is now,

    σ'² = σ² v₁ / v₀        μ' = m₁ + (μ - m₀) √(v₁ / v₀)

makes the output's mean and variance those of the original. Where the samples look like the training
data (``m₀ = μ``, ``v₀ = σ²``), this is the plain new estimate ``μ' = m₁``, ``σ'² = v₁``; where they
do not, their peculiarity cancels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import REFERENCE_PREFIX, AxisUnfold
from onnxcompress.errors import ModelError
from onnxcompress.graph.constants import constant_of, constant_tensor, set_initializer
from onnxcompress.passes.prune.rows import Pairs, RowPlan

Array = npt.NDArray[np.float64]

_ROWS = 16384
"""Rows to take mean and variance over; about as many as layers are fitted to."""
_LEAST_SHARE = 1e-6
"""Variance, as a share of the mean over the channels, below which a channel is no signal."""
_MOST_STRETCH = 16.0
"""Change of a variance, up or down, beyond which the channel is another one than it was."""


@dataclass(frozen=True, slots=True)
class Norm:
    """One BatchNormalization in inference form, its statistics stored and its own.

    Attributes:
        node: Node name.
        data: Name of its input in the masked model.
        original: Name of its input in the original.
        mean: Initializer of ``μ``, [C].
        variance: Initializer of the variance before ``ε`` is added, [C].
        epsilon: ``ε``.
        channels: ``C``.
    """

    node: str
    data: str
    original: str
    mean: str
    variance: str
    epsilon: float
    channels: int

    @property
    def wanted(self) -> tuple[str, ...]:
        """Values to have at hand."""
        return self.data, REFERENCE_PREFIX + self.original

    @property
    def written(self) -> tuple[str, ...]:
        """Initializers that get new values."""
        return self.mean, self.variance

    def plan(self, name: str, seed: int) -> RowPlan:
        """Rows of its input and, under ``name``, of its input in the original."""
        every = np.ones(self.channels, np.bool_)
        return RowPlan(
            data=self.data,
            unfold=AxisUnfold(1),
            total=name,
            axis=1,
            shortcut=None,
            channels=every,
            outputs=every,
            max_rows=_ROWS,
            folds=1,
            seed=seed,
        )

    def match(self, models: Iterable[ir.Model], source: Iterable[Pairs]) -> bool:
        """Write new statistics into ``models``; False where the samples have no signal.

        Args:
            models: Those to change; all hold the same old statistics.
            source: Rows of the input now (``x``) and in the original (``y``).
        """
        now, before = _Spread(self.channels), _Spread(self.channels)
        for pairs in source:
            now.add(pairs.x[0])
            before.add(pairs.y)
        changed = False
        for model in models:
            old_mean, old = (_array(model, n).astype(np.float64) for n in self.written)
            mean, variance = matched(
                old_mean,
                old + self.epsilon,
                (before.mean, before.variance),
                (now.mean, now.variance),
            )
            variance = np.maximum(variance - self.epsilon, 0.0)
            changed = bool(np.any(mean != old_mean) or np.any(variance != old))
            for name, array in zip(self.written, (mean, variance), strict=True):
                stored = _array(model, name).dtype
                set_initializer(model.graph, name, array.astype(stored))
        return changed


def matched(
    mean: Array, variance: Array, before: tuple[Array, Array], now: tuple[Array, Array]
) -> tuple[Array, Array]:
    """``μ'`` and ``σ'²``, [C] each; the old ones of channels without signal.

    Args:
        mean: ``μ``, [C].
        variance: ``σ²``, [C].
        before: ``m₀`` and ``v₀``, [C] each.
        now: ``m₁`` and ``v₁``, [C] each.
    """
    (m0, v0), (m1, v1) = before, now
    alive = (v0 > _LEAST_SHARE * v0.mean()) & (v1 > _LEAST_SHARE * v1.mean())
    stretch = np.divide(v1, v0, out=np.ones_like(v1), where=alive)
    alive &= (stretch < _MOST_STRETCH) & (stretch > 1 / _MOST_STRETCH)
    moved = m1 + (mean - m0) * np.sqrt(stretch)
    return np.where(alive, moved, mean), np.where(alive, variance * stretch, variance)


class _Spread:
    """Mean and variance of channels, from rows that come in parts."""

    def __init__(self, channels: int) -> None:
        self._count, self.mean = 0, np.zeros(channels)
        self._squares = np.zeros(channels)

    @property
    def variance(self) -> Array:
        return self._squares / max(self._count, 1)

    def add(self, rows: npt.NDArray[np.floating]) -> None:
        """Take in rows, [k, C] (Chan, Golub and LeVeque 1979)."""
        count = len(rows)
        if not count:
            return
        mean = rows.mean(axis=0, dtype=np.float64)
        squares = ((rows - mean) ** 2).sum(axis=0)
        total = self._count + count
        self._squares += squares + (mean - self.mean) ** 2 * (self._count * count / total)
        self.mean = self.mean + (mean - self.mean) * (count / total)
        self._count = total


def norm_of(node: ir.Node, masked: ir.Node) -> Norm | None:
    """Read a node as a BatchNormalization; None if it is none or its statistics are not its own.

    Args:
        node: The node of the original.
        masked: The same node of the masked model.
    """
    if node.op_type != "BatchNormalization" or node.domain not in {"", "ai.onnx"}:
        return None
    training = node.attributes.get("training_mode")
    if len(node.inputs) < 5 or (training is not None and training.as_int()):
        return None
    data, statistics = masked.inputs[0], node.inputs[3:5]
    epsilon = node.attributes.get("epsilon")
    names, lengths = [], []
    for value in statistics:
        tensor = constant_tensor(value)
        if value is None or tensor is None or not value.is_initializer():
            return None
        if len(list(value.uses())) > 1 or not tensor.dtype.is_floating_point():
            return None
        names.append(value.name or "")
        lengths.append(int(tensor.size))
    if data is None or node.inputs[0] is None or not lengths[0] or len(set(lengths)) > 1:
        return None
    return Norm(
        node=node.name or "",
        data=data.name or "",
        original=node.inputs[0].name or "",
        mean=names[0],
        variance=names[1],
        epsilon=1e-5 if epsilon is None else epsilon.as_float(),
        channels=lengths[0],
    )


def _array(model: ir.Model, name: str) -> npt.NDArray[np.generic]:
    found = constant_of(model.graph.initializers[name])
    if found is None:
        raise ModelError(f"the statistics '{name}' of a BatchNormalization are not stored")
    return found
