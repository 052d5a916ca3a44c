"""The layers to refit: which, in what order, and towards what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import ConvUnfold
from onnxcompress.graph.coupling import Coupling
from onnxcompress.passes._residual import residual_target, trace
from onnxcompress.passes.prune.clipping import Bounds, bounds_of
from onnxcompress.passes.prune.consumers import Consumer, Layers
from onnxcompress.passes.prune.norms import Norm, norm_of
from onnxcompress.passes.prune.rows import RowPlan
from onnxcompress.passes.prune.score import staying

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for the ridge, relative to the mean variance of the inputs."""


@dataclass(frozen=True, slots=True)
class Refit:
    """What became of one layer.

    Attributes:
        consumer: The layer.
        ridges: The ridge used for each group; infinite where only the bias changed, None where
            nothing did.
        rows_per_column: Rows seen per unfolded input.
    """

    consumer: Consumer
    ridges: tuple[float | None, ...]
    rows_per_column: float

    @property
    def used(self) -> bool:
        """Whether any group got new weights."""
        return any(r is not None for r in self.ridges)


@dataclass(frozen=True, slots=True)
class Job:
    """One layer to refit.

    Attributes:
        consumer: The layer.
        data: Name of its (masked) data input in the masked model.
        target: What to fit to.
        inputs: Which input channels stay, [C].
        outputs: Which outputs stay, [O].
        bounds: What the activation that follows clips to; None where none follows.
    """

    consumer: Consumer
    data: str
    target: tuple[tuple[str, float], ...]
    inputs: npt.NDArray[np.bool_]
    outputs: npt.NDArray[np.bool_]
    bounds: Bounds | None

    @property
    def written(self) -> tuple[str, ...]:
        """Initializers that get new values."""
        consumer = self.consumer
        return (consumer.weight,) if consumer.bias is None else (consumer.weight, consumer.bias)

    def plan(
        self, names: Mapping[str, str], folds: int, seed: int, limit: Callable[[int], int]
    ) -> RowPlan:
        """Which rows to draw.

        Args:
            names: What values of the original are called in the joined graph.
            folds: Parts the samples are divided into.
            seed: Of the choice of rows.
            limit: From the width of a layer to about how many rows.
        """
        consumer = self.consumer
        (total, _), *rest = self.target
        whole = consumer.groups > 1
        return RowPlan(
            data=self.data,
            unfold=consumer.unfold,
            total=names.get(total, total),
            axis=consumer.target_axis,
            shortcut=names.get(rest[0][0], rest[0][0]) if rest else None,
            channels=np.ones_like(self.inputs) if whole else self.inputs,
            outputs=np.ones_like(self.outputs) if whole else self.outputs,
            max_rows=limit(consumer.width),
            folds=folds,
            seed=seed,
        )


def jobs_of(
    model: ir.Model,
    masked: ir.Model,
    coupling: Coupling,
    kept: npt.NDArray[np.bool_],
    layers: Layers,
    everything: bool,
) -> tuple[list[list[Job | Norm]], dict[str, str]]:
    """The layers to refit, in levels that do not depend on one another, and those that cannot be.

    A BatchNormalization is one of them if the values of its inputs changed.


    A layer is refitted if it lost inputs, or if the shortcut that its output is added to changed;
    with ``everything``, also if only the values of its inputs changed.
    """
    consumers = {n: c for n, c in layers.consumers.items() if c.obstacle is None}
    nodes = {n.name or "": n for n in masked.graph}
    found = {n.name or "": norm_of(n, nodes[n.name or ""]) for n in model.graph}
    norms = {name: norm for name, norm in found.items() if norm is not None}
    names = [n.name or "" for n in masked.graph if n.name in consumers or n.name in norms]
    order = {name: i for i, name in enumerate(names)}
    flow = trace(masked, {n.name or "" for n in model.graph}, order)
    levels: list[list[Job | Norm]] = []
    level_of: dict[int, int] = {}

    def add(job: Job | Norm, index: int, upstream: int) -> None:
        level = 1 + max((depth for j, depth in level_of.items() if upstream >> j & 1), default=-1)
        level_of[index] = level
        if level == len(levels):
            levels.append([])
        levels[level].append(job)

    for index, name in enumerate(names):
        data = nodes[name].inputs[0]
        if name in norms:
            if data in flow.touched:
                add(norms[name], index, flow.jobs.get(data, 0) if data is not None else 0)
            continue
        consumer = consumers[name]
        target = residual_target(nodes[name], consumer.output, flow, index)
        axis = 1 if isinstance(consumer.unfold, ConvUnfold) else consumer.target_axis
        channels = consumer.width // consumer.taps * consumer.groups
        inputs = staying(coupling, kept, consumer.data, axis, channels)
        lost = not inputs.all() or target.shortcut is not None
        if data is None or not (lost or (everything and data in flow.touched)):
            continue
        upstream = flow.jobs.get(data, 0)
        if target.shortcut is not None:
            upstream |= flow.jobs.get(target.shortcut, 0)
        outputs = staying(coupling, kept, consumer.output, consumer.target_axis, consumer.outputs)
        bounds = bounds_of(target.result)
        job = Job(consumer, data.name or "", target.terms, inputs, outputs, bounds)
        add(job, index, upstream)
    contractions = {t.node for t in coupling.macs} - set(names)
    untreated = {
        name: layers.obstacle(name)
        for name, node in nodes.items()
        if name in contractions and any(v in flow.touched for v in node.inputs)
    }
    return levels, untreated
