"""What a change does to the outputs of the whole model, measured on a few samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import ModelError
from onnxcompress.runtime import open_session

Array = npt.NDArray[np.float64]

PROBE_SAMPLES = 64
"""Samples for the measured output error; its scale matters, not its digits."""


class Errors:
    """How far outputs are from expected ones.

    Args:
        expected: Floating-point outputs by name, run by run.
    """

    def __init__(self, expected: Sequence[Mapping[str, Array]]) -> None:
        self._expected = expected
        self._energy: dict[str, float] = {}
        for batch in expected:
            for name, wanted in batch.items():
                self._energy[name] = self._energy.get(name, 0.0) + float(np.sum(wanted**2))

    def of(self, runs: Iterable[Mapping[str, npt.NDArray[np.generic]]]) -> float:
        """``Σ‖y - y₀‖² / Σ‖y₀‖²``, averaged over the outputs; 1 if not finite.

        Args:
            runs: The outputs by name, run by run; one that is left out is as expected.
        """
        error = dict.fromkeys(self._energy, 0.0)
        for expected, got in zip(self._expected, runs, strict=True):
            for name, wanted in expected.items():
                if name in got:
                    difference = got[name].astype(np.float64) - wanted
                    error[name] += float(np.sum(difference**2))
        ratios = [error[n] / energy for n, energy in self._energy.items() if energy > 0]
        mean = float(np.mean(ratios)) if ratios else 0.0
        return mean if np.isfinite(mean) else 1.0


class OutputProbe:
    """Measures how far a changed model's outputs are from the original's, on a few samples.

    Args:
        model: The original.
        data: Samples, best such as the changes were not fitted to.
        ctx: The job.
        samples: How many of the samples to use, at most.

    Attributes:
        data: The samples that are run.
        batch_size: How many at a time.
        errors: Compares outputs with the original's.
    """

    def __init__(
        self, model: ir.Model, data: Dataset, ctx: PassContext, samples: int = PROBE_SAMPLES
    ) -> None:
        self._ctx = ctx
        group = data.layout.group or 1
        self.data = data.spread(max(samples // group, 1) * group)
        self.batch_size = ctx.batch_size
        while True:
            self._batches = list(self.data.batches(self.batch_size))
            try:
                self.errors = Errors(list(self._run(model)))
                break
            except (MemoryError, ModelError):
                if self.batch_size == 1 or data.layout.group is not None:
                    raise
                self.batch_size = max(self.batch_size // 2, 1)

    def error_of(self, variant: ir.Model) -> float:
        """``Σ‖y - y₀‖² / Σ‖y₀‖²``, averaged over the floating-point outputs; 1 if not finite."""
        return self.errors.of(self._run(variant))

    def _run(self, model: ir.Model) -> Iterator[dict[str, Array]]:
        session = open_session(model, self._ctx.session, work_dir=self._ctx.work_dir)
        for feeds in self._batches:
            outputs = session.run(feeds)
            yield {n: v.astype(np.float64) for n, v in outputs.items() if v.dtype.kind == "f"}
