"""The layers to refit: which, in what order, and towards what."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import ConvUnfold
from onnxcompress.graph.coupling import Coupling
from onnxcompress.numerics.clipping import Bounds
from onnxcompress.passes._residual import residual_target, trace
from onnxcompress.passes.prune.branches import Branches
from onnxcompress.passes.prune.clipping import bounds_of
from onnxcompress.passes.prune.consumers import Consumer, Layers, UnsupportedError
from onnxcompress.passes.prune.norms import Norm, norm_of
from onnxcompress.passes.prune.recurrent import GATES, Recurrent, recurrent_of
from onnxcompress.passes.prune.rows import RowPlan
from onnxcompress.passes.prune.score import staying

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for the ridge, relative to the mean variance of the inputs."""


def refitted(ridge: float) -> str:
    """What to say about a layer with new weights, or a new bias (infinite ridge)."""
    if not np.isfinite(ridge):
        return "bias corrected"
    return f"refitted to the original's output (ridge {ridge:g})"


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
        moved: Whether the layer has to do the work of branches that are gone.
    """

    consumer: Consumer
    data: str
    target: tuple[tuple[str, float], ...]
    inputs: npt.NDArray[np.bool_]
    outputs: npt.NDArray[np.bool_]
    bounds: Bounds | None
    moved: bool = False

    @property
    def wanted(self) -> tuple[str, ...]:
        """Values to have at hand, by the names they have in the original.

        First the data, then the total that gives the target, then what is subtracted from it.
        """
        return (self.data, *(name for name, _ in self.target))

    @property
    def written(self) -> tuple[str, ...]:
        """Initializers that get new values."""
        consumer = self.consumer
        return (consumer.weight,) if consumer.bias is None else (consumer.weight, consumer.bias)

    def plan(self, names: Mapping[str, str], folds: int, seed: int, max_rows: int) -> RowPlan:
        """Which rows to draw.

        Args:
            names: What values of the original are called in the joined graph.
            folds: Parts the samples are divided into.
            seed: Of the choice of rows.
            max_rows: About how many rows.
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
            max_rows=max_rows,
            folds=folds,
            seed=seed,
        )


Task: TypeAlias = Job | Norm | Recurrent
"""What recovery can do to a node."""


def jobs_of(
    model: ir.Model,
    masked: ir.Model,
    coupling: Coupling,
    kept: npt.NDArray[np.bool_],
    layers: Layers,
    everything: bool,
    branches: Branches,
) -> tuple[list[list[Task]], dict[str, str]]:
    """The layers to refit, in levels that do not depend on one another, and those that cannot be.

    A layer is refitted if it lost inputs, or if the shortcut that its output is added to changed;
    with ``everything``, also if only the values of its inputs changed. So is a recurrent layer that
    lost inputs or cells, and a BatchNormalization whose inputs changed. A layer that lost all
    inputs gets a bias alone, or is left out with its branch.
    """
    emptied = branches.emptied
    gone = emptied.dead | branches.hushed
    detour = branches.detour(masked)
    consumers = {n: c for n, c in layers.consumers.items() if c.obstacle is None}
    nodes = {n.name or "": n for n in masked.graph}
    found = {n.name or "": norm_of(n, nodes[n.name or ""]) for n in model.graph}
    norms = {name: norm for name, norm in found.items() if norm is not None}
    recurrent, refused = _recurrent(model, nodes)
    treated = {*consumers, *norms, *recurrent}
    names = [n.name or "" for n in masked.graph if n.name in treated]
    order = {name: i for i, name in enumerate(names)}
    flow = trace(masked, {n.name or "" for n in model.graph}, order)
    levels: list[list[Task]] = []
    level_of: dict[int, int] = {}

    def add(job: Task, index: int, upstream: int) -> None:
        level = 1 + max((depth for j, depth in level_of.items() if upstream >> j & 1), default=-1)
        level_of[index] = level
        if level == len(levels):
            levels.append([])
        levels[level].append(job)

    for index, name in enumerate(names):
        data = nodes[name].inputs[0]
        if name in gone:
            continue
        if name in norms:
            if data in flow.touched and nodes[name].outputs[0].name not in emptied.constants:
                add(norms[name], index, flow.jobs.get(data, 0) if data is not None else 0)
            continue
        if name in recurrent:
            layer, values = recurrent[name], [v for v in nodes[name].inputs if v is not None]
            lost = not all(m.all() for m in layer.kept(coupling, kept))
            if lost or (everything and any(v in flow.touched for v in values)):
                add(
                    layer,
                    index,
                    functools.reduce(operator.or_, (flow.jobs.get(v, 0) for v in values), 0),
                )
            continue
        consumer = consumers[name]
        target = residual_target(nodes[name], consumer.output, flow, index, detour)
        axis = 1 if isinstance(consumer.unfold, ConvUnfold) else consumer.target_axis
        channels = consumer.width // consumer.taps * consumer.groups
        inputs = staying(coupling, kept, consumer.data, axis, channels)
        lost = not inputs.all() or target.shortcut is not None or target.moved
        if data is None or not (lost or (everything and data in flow.touched)):
            continue
        before = flow.jobs.get(data, 0)
        if target.shortcut is not None:
            before |= flow.jobs.get(target.shortcut, 0)
        if name in emptied.layers:
            inputs = np.zeros_like(inputs)
        outputs = staying(coupling, kept, consumer.output, consumer.target_axis, consumer.outputs)
        bounds = bounds_of(target.result)
        job = Job(consumer, data.name or "", target.terms, inputs, outputs, bounds, target.moved)
        add(job, index, before)
    contractions = {t.node for t in coupling.macs} - set(names)
    untreated = {
        name: refused.get(name, layers.obstacle(name))
        for name, node in nodes.items()
        if name in contractions - gone and any(v in flow.touched for v in node.inputs)
    }
    return levels, untreated


def _recurrent(
    model: ir.Model, masked: Mapping[str, ir.Node]
) -> tuple[dict[str, Recurrent], dict[str, str]]:
    """The recurrent layers that can be refitted, and why the others can not."""
    found: dict[str, Recurrent] = {}
    refused: dict[str, str] = {}
    for node in model.graph:
        if node.op_type not in GATES or node.domain not in {"", "ai.onnx"}:
            continue
        name = node.name or ""
        try:
            found[name] = recurrent_of(node, masked[name])
        except UnsupportedError as error:
            refused[name] = str(error)
    return found, refused
