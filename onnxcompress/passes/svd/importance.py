"""How much errors in a layer's outputs matter to the layers that read them.

An error in a direction that its readers hardly weigh does little harm. The coupling analysis knows
through activations, pools, reshapes and joins which columns of which weights read an output
channel. With ``W_r[:, i]`` the columns of reader ``r`` that belong to output ``i`` the readers see
an error ``e`` as ``eᵀ M e``,

    M = G / mean(diag G) + I,     G_ij = Σ_r <W_r[:, i], W_r[:, j]> / ‖W_r‖²

The identity stands for the activations in between: where outputs are not active together their
errors do not cancel. Where not all readers are weights (normalizations, products of activations,
outputs of the model) nothing is known and all outputs count alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.coupling import Group
from onnxcompress.graph.labels import analyse
from onnxcompress.numerics.low_rank import Metric
from onnxcompress.passes.svd.sites import Kind, Site

Array = npt.NDArray[np.float64]

_KINDS = frozenset({Kind.CONV, Kind.GEMM, Kind.MATMUL})
_MAX_OUTPUTS = 4096
"""Wider layers are left without a metric: its root would take long."""


def output_metrics(model: ir.Model, sites: Iterable[Site]) -> dict[Site, Metric]:
    """The metric of the outputs of each layer where it is known."""
    probe = model_io.clone(model)
    canonicalize(probe)
    coupling = analyse(probe)
    offsets = coupling.offsets
    grams: dict[int, Array | None] = {}
    found: dict[Site, Metric] = {}
    for site in sites:
        axes = coupling.axes.get(site.output) if site.kind in _KINDS else None
        units = None if axes is None else axes[site.target_axis]
        outputs = site.kernel.outputs
        if units is None or len(units) != outputs or units.min() < 0 or outputs > _MAX_OUTPUTS:
            continue
        owners = np.searchsorted(offsets, units, side="right") - 1
        gram = np.zeros((outputs, outputs))
        for number in np.unique(owners).tolist():
            if number not in grams:
                grams[number] = _gram(probe, coupling.groups[number])
            block = grams[number]
            if block is None:
                break
            places = np.flatnonzero(owners == number)
            own = units[places] - offsets[number]
            gram[np.ix_(places, places)] = block[np.ix_(own, own)]
        else:
            mean = float(np.trace(gram)) / outputs
            if np.isfinite(mean) and mean > 0:
                found[site] = Metric.of(gram / mean + np.eye(outputs))
    return found


def _gram(model: ir.Model, group: Group) -> Array | None:
    """``G`` over the units of a group; None where a reader has no weight or is too wide."""
    if group.size > _MAX_OUTPUTS or not group.sinks:
        return None
    total = np.zeros((group.size, group.size))
    for sink in group.sinks:
        name = sink.weight or ""
        stored = None
        if name in model.graph.initializers:
            stored = constant_of(model.graph.initializers[name])
        if stored is None or sink.weight_axis is None:
            return None
        rows = np.moveaxis(stored.astype(np.float64), sink.weight_axis, 0)
        if sink.positions.max(initial=0) >= len(rows):
            return None
        energy = max(float(np.sum(rows**2)), 1e-300)
        for places in sink.positions.T:
            part = rows[places].reshape(group.size, -1)
            total += part @ part.T / energy
    return total
