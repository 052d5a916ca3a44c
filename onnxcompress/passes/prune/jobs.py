"""The layers to refit: which, in what order, towards what, and the fit of one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.join import join
from onnxcompress.calibration.statistics import (
    ConvUnfold,
    CrossMomentsRequest,
    CrossMomentsResult,
    Statistics,
)
from onnxcompress.context import PassContext
from onnxcompress.errors import DataError, ModelError
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.surgery import mask
from onnxcompress.numerics.least_squares import Moments, choose_ridge, regress, residual_energy
from onnxcompress.passes._residual import residual_target, trace
from onnxcompress.passes.prune.clipping import Bounds, bounds_of, clipped_target
from onnxcompress.passes.prune.consumers import Consumer, Layers
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.passes.prune.samples import split
from onnxcompress.passes.prune.score import row_limit, staying
from onnxcompress.passes.prune.stages import plan_stages
from onnxcompress.passes.prune.store import ActivationStore
from onnxcompress.passes.prune.stream import Stream

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for the ridge, relative to the mean variance of the inputs."""
_FALLBACK_RIDGE = 1e-1
"""Where there are too few samples to hold any out."""


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
class Fit:
    weight: Array
    bias: Array
    refit: Refit


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

    def request(self) -> CrossMomentsRequest:
        """The statistics it needs."""
        consumer = self.consumer
        return CrossMomentsRequest(
            self.data,
            consumer.unfold,
            self.target,
            consumer.target_axis,
            row_limit(consumer.width),
        )

    def solve(self, model: ir.Model, results: Sequence[CrossMomentsResult], ridge: float) -> Fit:
        """New weights from the moments on the fitting samples and, if any, the held-out ones."""
        consumer = self.consumer
        weight, bias = consumer.matrix(model), consumer.bias_vector(model)
        share = consumer.outputs // consumer.groups
        channels = len(self.inputs) // consumer.groups
        ridges: list[float | None] = []
        for g in range(consumer.groups):
            rows = np.flatnonzero(self.outputs[g * share : (g + 1) * share])
            here = np.flatnonzero(self.inputs[g * channels : (g + 1) * channels])
            columns = consumer.columns(here)
            if len(rows) == 0 or len(columns) == 0:
                ridges.append(None)
                continue
            parts = [_moments(r, g, rows + g * share).select(columns) for r in results]
            if consumer.bias is None:
                parts = [p.uncentred() for p in parts]
            prior = weight[g][np.ix_(rows, columns)]
            chosen = _choose(parts, prior, bias[rows + g * share], ridge)
            ridges.append(chosen)
            if chosen is None:
                continue
            whole = parts[0] if len(parts) == 1 else parts[0].merge(parts[1])
            fitted = prior
            if np.isfinite(chosen):
                fitted = regress(whole, prior, chosen)[0]
                weight[g][np.ix_(rows, columns)] = fitted
            if consumer.bias is not None:
                bias[rows + g * share] = whole.mean_y - fitted @ whole.mean_x
        used = int(np.count_nonzero(self.inputs)) // consumer.groups * consumer.taps
        rows_seen = sum(r.count for r in results)
        return Fit(weight, bias, Refit(consumer, tuple(ridges), rows_seen / max(used, 1)))


def _choose(parts: Sequence[Moments], prior: Array, bias: Array, ridge: float) -> float | None:
    """The ridge that serves the held-out part best.

    Infinite stands for the old weights with a new bias, None for no change at all.
    """
    if len(parts) == 1:
        return ridge or _FALLBACK_RIDGE
    fit, held_out = parts
    candidates = (ridge,) if ridge else RIDGES
    chosen, fitted = choose_ridge(fit, held_out, prior, candidates)
    shifted = fit.mean_y - prior @ fit.mean_x
    old, moved = (float(residual_energy(held_out, prior, b).sum()) for b in (bias, shifted))
    energies: list[tuple[float, float | None]] = [(fitted, chosen), (moved, np.inf), (old, None)]
    return min(energies, key=lambda e: e[0])[1]


def _moments(result: CrossMomentsResult, group: int, rows: Indices) -> Moments:
    share = result.cross.shape[2]
    return Moments(
        count=result.count,
        mean_x=result.mean_x[group],
        mean_y=result.mean_y[rows],
        covariance=result.covariance[group],
        cross=result.cross[group][:, rows - group * share],
    )


def jobs_of(
    model: ir.Model,
    masked: ir.Model,
    coupling: Coupling,
    kept: npt.NDArray[np.bool_],
    layers: Layers,
    everything: bool,
) -> tuple[list[list[Job]], dict[str, str]]:
    """The layers to refit, in levels that do not depend on one another, and those that cannot be.

    A layer is refitted if it lost inputs, or if the shortcut that its output is added to changed;
    with ``everything``, also if only the values of its inputs changed.
    """
    consumers = {n: c for n, c in layers.consumers.items() if c.obstacle is None}
    names = [n.name or "" for n in masked.graph if n.name in consumers]
    order = {name: i for i, name in enumerate(names)}
    flow = trace(masked, {n.name or "" for n in model.graph}, order)
    nodes = {n.name or "": n for n in masked.graph}
    levels: list[list[Job]] = []
    level_of: dict[int, int] = {}
    for index, name in enumerate(names):
        consumer, data = consumers[name], nodes[name].inputs[0]
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
        level = 1 + max((depth for j, depth in level_of.items() if upstream >> j & 1), default=-1)
        level_of[index] = level
        if level == len(levels):
            levels.append([])
        levels[level].append(
            Job(
                consumer,
                data.name or "",
                target.terms,
                inputs,
                staying(coupling, kept, consumer.output, consumer.target_axis, consumer.outputs),
                bounds_of(target.result),
            )
        )
    contractions = {t.node for t in coupling.macs} - set(names)
    untreated = {
        name: layers.obstacle(name)
        for name, node in nodes.items()
        if name in contractions and any(v in flow.touched for v in node.inputs)
    }
    return levels, untreated


