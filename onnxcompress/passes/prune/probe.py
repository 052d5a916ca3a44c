"""What a change does to the outputs of the whole model, measured on a few samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import ModelError
from onnxcompress.runtime import open_session

Array = npt.NDArray[np.float64]

_PROBE_SAMPLES = 64
"""Samples for the measured output error; its scale matters, not its digits."""


class OutputProbe:
    """Measures how far a changed model's outputs are from the original's, on a few samples.

    Args:
        model: The original.
        data: Samples, best such as the changes were not fitted to.
        ctx: The job.
    """

    def __init__(self, model: ir.Model, data: Dataset, ctx: PassContext) -> None:
        self._ctx = ctx
        group = data.layout.group or 1
        probed = data.spread(max(_PROBE_SAMPLES // group, 1) * group)
        size = ctx.batch_size
        while True:
            self._batches = list(probed.batches(size))
            try:
                self._expected = list(self._run(model))
                break
            except (MemoryError, ModelError):
                if size == 1 or data.layout.group is not None:
                    raise
                size = max(size // 2, 1)

    def error_of(self, variant: ir.Model) -> float:
        """``Σ‖y - y₀‖² / Σ‖y₀‖²``, averaged over the floating-point outputs; 1 if not finite."""
        error: dict[str, float] = {}
        energy: dict[str, float] = {}
        for expected, got in zip(self._expected, self._run(variant), strict=True):
            for name, wanted in expected.items():
                difference = float(np.sum((got[name] - wanted) ** 2))
                error[name] = error.get(name, 0.0) + difference
                energy[name] = energy.get(name, 0.0) + float(np.sum(wanted**2))
        ratios = [error[n] / energy[n] for n in error if energy[n] > 0]
        mean = float(np.mean(ratios)) if ratios else 0.0
        return mean if np.isfinite(mean) else 1.0

    def _run(self, model: ir.Model) -> Iterator[dict[str, Array]]:
        session = open_session(model, self._ctx.session, work_dir=self._ctx.work_dir)
        for feeds in self._batches:
            outputs = session.run(feeds)
            yield {n: v.astype(np.float64) for n, v in outputs.items() if v.dtype.kind == "f"}
