"""What the benchmarks share: the independent judge of a folder of models, and the clock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from onnxcompress.calibration.sources import Dataset
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.runtime import SessionSettings, compare_latency, open_session

Row = dict[str, object]


class Judge:
    """``zoo.py`` of a folder: prepares models and data, and evaluates any result by itself.

    Args:
        zoo: Folder that holds ``zoo.py``.
        folder: Where prepared models and data are kept.
    """

    def __init__(self, zoo: Path, folder: Path) -> None:
        self._command = [sys.executable, str(zoo / "zoo.py")]
        self.folder = folder

    def names(self) -> list[str]:
        """All models there are."""
        listed = subprocess.run(
            [*self._command, "list"], check=True, capture_output=True, text=True
        ).stdout
        return [line.split()[0] for line in listed.splitlines()]

    def prepare(self, name: str) -> Path:
        """The float model; data lie beside it."""
        original = self.folder / f"{name}.onnx"
        if not original.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                [*self._command, "prepare", name, str(self.folder)], check=True, capture_output=True
            )
        return original

    def evaluate(self, name: str, result: Path) -> Row:
        """The judge's figures; ``error`` among them when the model does not run."""
        judged = subprocess.run(
            [*self._command, "evaluate", name, str(result)],
            check=False,
            capture_output=True,
            text=True,
        )
        try:
            return dict(json.loads(judged.stdout))
        except json.JSONDecodeError:
            return {"error": judged.stderr.strip().splitlines()[-1:] or "no answer"}


def speeds(
    original: Path,
    result: Path,
    data: Dataset,
    *,
    seconds: float,
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1, 2),
) -> Row:
    """Time of the original / time of the result, both running in turns.

    With one thread it is processor time, which other programs on the machine disturb little; with
    more it is the wall clock, with its spread (10th and 90th percentile of the ratios).

    Args:
        original: The model before.
        result: The model after.
        data: Samples.
        seconds: Time for each measurement.
        batches: Samples per run; those that the model cannot take are left out.
        threads: Threads inside one operator.
    """
    found: Row = {}
    for count in threads:
        settings = SessionSettings(threads=count)
        before, after = (open_session(path, settings) for path in (original, result))
        for batch in batches:
            feeds = next(iter(data.batches(batch)))
            if batch > 1 and {a.shape[:1] for a in feeds.values()} <= {(1,), ()}:
                continue
            key = f"speed_b{batch}_t{count}"
            if count == 1:
                times = run_times([before, after], feeds, seconds=seconds)
                found[key] = round(times[0] / times[1], 3)
            else:
                latency = compare_latency(before, after, feeds, max_seconds=seconds)
                found[key] = round(latency.ratio, 3)
                found[f"{key}_spread"] = [round(latency.ratio_low, 3), round(latency.ratio_high, 3)]
    return found
