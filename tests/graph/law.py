"""The law of removal, measured: the small model against the masked one on random inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io, runtime
from onnxcompress.graph import canonical, labels, surgery
from onnxcompress.graph.coupling import Coupling

Array = npt.NDArray[np.generic]
Removal = dict[int, npt.NDArray[np.int64]]

SETTINGS = runtime.SessionSettings(threads=1, optimization=runtime.Optimization.BASIC)


def prepared(model: ir.Model) -> ir.Model:
    """A model as passes meet it: normalized and canonical."""
    model_io.normalize(model)
    canonical.canonicalize(model)
    return model


def sizes(model: ir.Model, **options: object) -> dict[str, int]:
    """Group name to number of units."""
    coupling = labels.analyse(prepared(model), **options)  # type: ignore[arg-type]
    found = {group.name: group.size for group in coupling.groups}
    assert len(found) == len(coupling.groups), "two groups share a name"
    return found


def outputs(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a model."""
    return runtime.open_session(model, SETTINGS).run(feeds)


def error(reference: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """Largest error relative to the largest reference value, over all outputs."""
    assert reference.keys() == other.keys()
    worst = 0.0
    for name, expected in reference.items():
        got = other[name]
        assert got.shape == expected.shape, name
        if expected.dtype.kind != "f":
            continue
        a, b = expected.astype(np.float64), got.astype(np.float64)
        assert np.array_equal(np.isfinite(a), np.isfinite(b)), f"{name}: other finite values"
        a, b = a[np.isfinite(a)], b[np.isfinite(b)]
        if a.size:
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)))
    return worst


def removal(coupling: Coupling, fraction: float, seed: int) -> Removal:
    """Random units of every group; at least one stays (``fraction`` 1: exactly one)."""
    rng = np.random.default_rng(seed)
    removed: Removal = {}
    for group in coupling.groups:
        count = min(round(group.size * fraction), group.size - 1)
        removed[group.index] = np.sort(rng.permutation(group.size)[:count])
    return removed


def law_error(
    model: ir.Model, coupling: Coupling, removed: Removal, feeds: Mapping[str, Array]
) -> float:
    """Error of the pruned model against the masked one; the model itself is not changed."""
    masked = outputs(surgery.mask(model, coupling, removed), feeds)
    small = model_io.clone(model)
    surgery.remove(small, coupling, removed)
    model_io.check(small)
    return error(masked, outputs(small, feeds))
