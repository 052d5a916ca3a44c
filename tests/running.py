"""Run models in tests and compare what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.sources import Dataset
from onnxcompress.context import PassContext
from onnxcompress.runtime import SessionSettings, open_session
from onnxcompress.targets import target_by_name
from tests.builder import Array

SETTINGS = SessionSettings(threads=1)


def run_model(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of one run on one thread."""
    return open_session(model, SETTINGS).run(feeds)


def largest_error(found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """Largest difference of all outputs, each relative to its largest magnitude."""
    assert list(found) == list(expected)
    worst = 0.0
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype
        ours, theirs = found[name].astype(np.float64), array.astype(np.float64)
        assert np.isfinite(ours).all()
        scale = np.abs(theirs).max(initial=0.0)
        worst = max(worst, float(np.abs(ours - theirs).max(initial=0.0) / max(scale, 1e-30)))
    return worst


def context(work_dir: Path, calibration: Dataset | None = None) -> PassContext:
    """A job as the pipeline would make it."""
    return PassContext(
        target=target_by_name("x86-vnni"),
        work_dir=work_dir,
        calibration=calibration,
        session=SETTINGS,
    )


def interface(model: ir.Model) -> list[tuple[str | None, object, str]]:
    """Names, types and shapes of the inputs and outputs."""
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(v.name, v.dtype, str(v.shape)) for v in values]
