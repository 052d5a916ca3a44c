"""What a run returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxcompress.contributions import Contribution
from onnxcompress.passes.base import PassReport, Stage
from onnxcompress.recipe import Recipe
from onnxcompress.verification.side_by_side import Verification


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRun:
    """One pass of a run.

    Attributes:
        name: Name of the pass.
        stage: When it ran.
        automatic: Whether the tool added it.
        options: All its options, with their defaults.
        report: What it changed and skipped (or would, in a dry run).
        seconds: Time it took, with the checks after it.
        after: The model after it beside the original; None where the pass changed nothing, or where
            it alone was asked for and the verification shows what it contributed.
    """

    name: str
    stage: Stage
    automatic: bool
    options: Mapping[str, object]
    report: PassReport
    seconds: float
    after: Contribution | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionResult:
    """What a run did, what it cost and what it brought.

    Attributes:
        input_path: The original.
        output_path: Where the result was to go.
        written: Whether it is there.
        dry_run: Whether nothing was to be written.
        passes: The passes in the order they ran.
        verification: Original against result; None in a dry run.
        recipe: What was asked for.
        target: Name of the hardware profile that was used.
        calibration: What the calibration samples were; None when no pass needed any.
        timings_s: Stage of the run to seconds.
        original_sha256: SHA-256 of the original's file, without external data.
        result_sha256: The same of the result; None when it was not written.
        version: Version of onnxcompress.
        notes: What the user should know, one sentence each.
        warnings: What the user should know before trusting the result, one sentence each.
    """

    input_path: Path
    output_path: Path
    written: bool
    dry_run: bool
    passes: tuple[PassRun, ...]
    verification: Verification | None
    recipe: Recipe
    target: str
    calibration: str | None
    timings_s: Mapping[str, float]
    original_sha256: str
    result_sha256: str | None
    version: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the result passed its verification (a dry run has nothing to fail)."""
        return self.verification is None or self.verification.passed

    @property
    def exit_code(self) -> int:
        """0 when the result passed, else 1."""
        return 0 if self.passed else 1
