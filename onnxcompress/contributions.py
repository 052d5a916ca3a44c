"""What each pass of a run contributed: size, work, fidelity and speed of the model after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxcompress.calibration.padding import without_padding
from onnxcompress.calibration.sources import Dataset
from onnxcompress.graph.cost import cost_of
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.runtime import SessionSettings, open_session
from onnxcompress.verification.compare import ComparisonMeter
from onnxcompress.verification.metrics import Array

_SAMPLES = 32
"""Samples on which the model is compared after each pass; the whole set is for the result."""

_REFERENCE_BYTES = 64 * 2**20
"""Outputs of the original kept in memory; with larger ones fewer samples are compared."""

_SECONDS = 0.6
"""Time to time the model after each pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """The model after a pass, beside the original.

    Attributes:
        weight_bytes: Bytes of all constants, packed as they are stored.
        parameters: Elements of all weights.
        macs: Multiply-accumulates of one sample, of the lengths that the first one has.
        samples: Samples compared.
        sqnr_db: SQNR of the output that is farthest from the original, in dB; None where no output
            is floating point.
        agreement_ratio: Share of equal top classes, 0 to 1; None where no output is a classifier's.
        speed_ratio: Time of the original / of this model on one thread (processor time), batch 1;
            None where it was not measured.
    """

    weight_bytes: int
    parameters: int
    macs: int
    samples: int
    sqnr_db: float | None
    agreement_ratio: float | None
    speed_ratio: float | None


class Contributions:
    """Compares the model after every pass with the original.

    Args:
        original: The original's file.
        evaluation: Samples; the first few are used.
        settings: How to run.
        timed: Whether to measure speed, too.
        work_dir: Where temporary files may be made.
    """

    def __init__(
        self,
        original: Path,
        evaluation: Dataset,
        settings: SessionSettings,
        *,
        timed: bool,
        work_dir: Path,
    ) -> None:
        self._settings, self._work_dir = settings, work_dir
        self._single = SessionSettings(threads=1) if timed else None
        session = open_session(original, settings)
        self._inputs, self._outputs = session.inputs, session.outputs
        self._reference: list[tuple[Mapping[str, Array], Mapping[str, Array], int]] = []
        kept_bytes = samples = 0
        evaluation = without_padding(evaluation, lambda: session.run) or evaluation
        for count, feeds in evaluation.counted_batches(1):
            outputs = session.run(feeds)
            self._reference.append((feeds, outputs, count))
            samples += count
            kept_bytes += sum(a.nbytes for a in (*outputs.values(), *feeds.values()))
            if samples >= _SAMPLES or kept_bytes > _REFERENCE_BYTES:
                break
        self._baseline = None if self._single is None else open_session(original, self._single)

    def after(self, model: ir.Model) -> Contribution:
        """Measure ``model``, which is not changed.

        Raises:
            ModelError: If it does not run.
        """
        first = self._reference[0][0]
        cost = cost_of(model, {name: array.shape for name, array in first.items()})
        session = open_session(model, self._settings, work_dir=self._work_dir)
        meter = ComparisonMeter(self._inputs, self._outputs)
        for feeds, wanted, count in self._reference:
            meter.update(wanted, session.run(feeds), count)
        found = meter.finish()
        ratios = [o.sqnr_db for o in found.outputs if o.sqnr_db is not None]
        agreements = [a.top1_ratio for a in found.agreements]
        return Contribution(
            weight_bytes=cost.weight_bytes,
            parameters=cost.parameters,
            macs=cost.macs,
            samples=found.samples,
            sqnr_db=min(ratios, default=None),
            agreement_ratio=min(agreements, default=None),
            speed_ratio=self._speed(model),
        )

    def _speed(self, model: ir.Model) -> float | None:
        if self._single is None or self._baseline is None:
            return None
        session = open_session(model, self._single, work_dir=self._work_dir)
        feeds = self._reference[0][0]
        before, after = run_times([self._baseline, session], feeds, seconds=_SECONDS)
        return before / after if after else None
