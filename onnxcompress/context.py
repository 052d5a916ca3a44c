"""What a pass may know about the job it is part of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from onnxcompress.calibration.collector import collect
from onnxcompress.calibration.sources import Dataset
from onnxcompress.calibration.statistics import Request, Statistics
from onnxcompress.errors import DataError
from onnxcompress.progress import Progress, SilentProgress
from onnxcompress.runtime import SessionSettings
from onnxcompress.search.parallel import Workers
from onnxcompress.targets import Target
from onnxcompress.verification.gates import Gates


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """The job around a pass; frozen, so that no pass can influence another through it.

    Attributes:
        target: The hardware profile to compress for.
        work_dir: A private folder for scratch files, removed when the job ends.
        calibration: Samples to collect statistics from; None when no pass needs any.
        session: How to run models for statistics (providers, threads).
        batch_size: Samples per run during calibration.
        seed: Seed of everything random.
        progress: Where to report progress.
        goals: Limits of the user's that the result is judged by at the end, against ``original``.
        original: The file of the original model; None in a job without one.
        workers: How many processes may measure versions of the model.
        passes: Names of all passes of the job, in their order.
    """

    target: Target
    work_dir: Path
    calibration: Dataset | None = None
    session: SessionSettings = field(default_factory=SessionSettings)
    batch_size: int = 8
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)
    goals: Gates = field(default_factory=Gates)
    original: Path | None = None
    workers: Workers = field(default_factory=Workers)
    passes: tuple[str, ...] = ()

    def at_most(self, samples: int) -> PassContext:
        """The job with no more than ``samples`` calibration samples, spread over all; 0: all."""
        if self.calibration is None or not samples or self.calibration.sample_count <= samples:
            return self
        return replace(self, calibration=self.calibration.spread(samples))

    def collect(
        self,
        model: ir.Model,
        requests: Iterable[Request],
        *,
        reference: ir.Model | None = None,
        description: str = "calibrating",
        finite_only: bool = False,
    ) -> Statistics:
        """Run ``model`` over the calibration samples and gather the requested statistics.

        See :func:`onnxcompress.calibration.collector.collect`.

        Raises:
            DataError: If the job has no calibration data, or it does not fit the model.
        """
        if self.calibration is None:
            raise DataError(
                "this needs calibration data and the job has none",
                hint="Give --calib, or put NAME.calib.npz beside NAME.onnx.",
            )
        return collect(
            model,
            requests,
            self.calibration,
            reference=reference,
            settings=self.session,
            batch_size=self.batch_size,
            seed=self.seed,
            work_dir=self.work_dir,
            progress=self.progress,
            description=description,
            finite_only=finite_only,
        )
