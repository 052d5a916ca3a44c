"""Merge filters that compute the same: one does the work, and its readers weigh it for both.

If everything that makes unit ``j`` of a group of coupled channels (filters, biases, factors of
normalizations) equals what makes unit ``i``, then ``x_j = x_i``, and every layer that reads them
can do without ``j``:

    W_i x_i + W_j x_j = (W_i + W_j) x_i

With a tolerance the same is done where the constants are nearly equal: the relative distance

    |f_i - f_j|₂ <= ε |f_i|₂

holds for every tensor that makes the units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph import canonical, labels, surgery
from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.coupling import Coupling, Cut, Group, Sink
from onnxcompress.passes.base import Change, Skip

Float64 = npt.NDArray[np.float64]
Units = npt.NDArray[np.int64]

_READERS = frozenset({"Conv", "Gemm", "MatMul"})
"""Layers whose weights can take over the share of a removed input."""

_MOST_UNITS = 8192
"""Larger groups are not compared: distances between all pairs would take more than 0.5 GB."""


@dataclass(frozen=True, slots=True)
class MergedFilters:
    """What merging filters did."""

    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    count: int


def merge_filters(model: ir.Model, tolerance: float) -> MergedFilters:
    """Merge filters in place.

    Args:
        model: A normalized model.
        tolerance: ``ε``; 0 merges equal filters only.
    """
    canonical.canonicalize(model)
    coupling = labels.analyse(model)
    nodes = {node.name or "": node for node in model.graph.all_nodes()}
    weights = {value.name or "": value for value in _initializers(model)}
    changes: list[Change] = []
    skips: list[Skip] = []
    removed: dict[int, Units] = {}
    for group in coupling.groups:
        op_type = nodes[group.name].op_type if group.name in nodes else ""
        leaders = _leaders(group, weights, tolerance)
        gone = np.flatnonzero(leaders != np.arange(group.size))
        if not gone.size:
            continue
        reason = _obstacle(group, coupling, nodes, weights)
        if reason is not None:
            skips.append(Skip(group.name, op_type, f"{gone.size} duplicate filters stay: {reason}"))
            continue
        for sink in {(s.weight, s.weight_axis): s for s in group.sinks}.values():
            _add_up(sink, weights, leaders, gone)
        removed[group.index] = gone
        what = f"{gone.size} of {group.size} filters merged with their duplicates"
        changes.append(Change(group.name, op_type, what))
    if removed:
        surgery.remove(model, coupling, removed)
    return MergedFilters(tuple(changes), tuple(skips), sum(map(len, removed.values())))


def _initializers(model: ir.Model) -> list[ir.Value]:
    return [value for graph in model.graphs() for value in graph.initializers.values()]


def _read_cuts(group: Group) -> set[tuple[str, int]]:
    """Axes of initializers on which the group is summed over."""
    return {
        (s.weight, s.weight_axis) for s in group.sinks if s.weight and s.weight_axis is not None
    }


def _obstacle(
    group: Group,
    coupling: Coupling,
    nodes: dict[str, ir.Node],
    weights: dict[str, ir.Value],
) -> str | None:
    """Why the readers of a group cannot take over."""
    if coupling.ports:
        return "the model has states, which pass single cells on"
    made = {(s.weight, s.weight_axis) for s in group.sources}
    for sink in group.sinks:
        node = nodes.get(sink.node)
        if node is None or node.op_type not in _READERS or node.domain not in {"", "ai.onnx"}:
            return f"'{sink.node}' reads them, which has no weights to add up"
        if node.attributes.get_int("group", 1) != 1:
            return f"the grouped convolution '{sink.node}' reads them"
        if sink.weight is None or sink.weight_axis is None:
            return f"the weight of '{sink.node}' is computed"
        if (sink.weight, sink.weight_axis) in made:
            return f"the weight '{sink.weight}' makes and reads them"
        array = constant_of(weights[sink.weight])
        if array is None or array.dtype not in (np.float32, np.float64):
            return f"the weight of '{sink.node}' is no float"
    return None


def _leaders(group: Group, weights: dict[str, ir.Value], tolerance: float) -> Units:
    """For every unit the first one that it equals, maybe itself, [units]."""
    themselves = np.arange(group.size)
    read = _read_cuts(group)
    makers = [cut for cut in group.cuts if (cut.initializer, cut.axis) not in read]
    if not makers or not group.sources or group.size > _MOST_UNITS:
        return themselves
    alike = np.ones((group.size, group.size), bool)
    for cut in makers:
        rows = _rows(cut, weights)
        if rows is None:
            return themselves
        alike &= _alike(rows, tolerance)
        if alike.sum() == group.size:
            return themselves
    # The first unit that is alike and leads itself: what follows a follower need not be near.
    leaders = themselves.copy()
    for unit in range(1, group.size):
        for other in np.flatnonzero(alike[unit, :unit]):
            if leaders[other] == other:
                leaders[unit] = other
                break
    return leaders


def _rows(cut: Cut, weights: dict[str, ir.Value]) -> Float64 | None:
    """What an initializer holds of each unit, [units, elements]."""
    array = constant_of(weights[cut.initializer])
    if array is None or array.dtype.kind not in "fiub":
        return None
    moved = np.moveaxis(array.astype(np.float64), cut.axis, 0)[cut.indices]
    return np.asarray(moved.reshape(len(cut.indices), -1))


def _alike(rows: Float64, tolerance: float) -> npt.NDArray[np.bool_]:
    """Which pairs of rows are equal, or nearly so, [units, units]."""
    if tolerance == 0.0:
        _, numbers = np.unique(rows, axis=0, return_inverse=True)
        numbers = numbers.reshape(-1)
        return np.asarray(numbers[:, None] == numbers[None, :])
    energy = np.einsum("ue,ue->u", rows, rows)
    # |a - b|² from products loses half of the digits, far below any useful tolerance.
    distance = energy[:, None] + energy[None, :] - 2 * rows @ rows.T
    return np.asarray(distance <= tolerance**2 * energy[None, :] + 1e-30)


def _add_up(sink: Sink, weights: dict[str, ir.Value], leaders: Units, gone: Units) -> None:
    """``W_i += W_j`` in one reader."""
    if sink.weight is None or sink.weight_axis is None:
        raise TypeError(f"'{sink.node}' has no stored weight")
    value = weights[sink.weight]
    array = constant_of(value)
    if array is None:
        raise TypeError(f"initializer '{sink.weight}' has no data")
    total = np.moveaxis(array.astype(np.float64), sink.weight_axis, 0)
    for unit in gone:
        total[sink.positions[leaders[unit]]] += total[sink.positions[unit]]
    moved = np.moveaxis(total, 0, sink.weight_axis).astype(array.dtype)
    value.const_value = ir.tensor(np.ascontiguousarray(moved), name=value.name)
