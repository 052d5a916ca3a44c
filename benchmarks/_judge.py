"""What the benchmarks share: the independent judge of a folder of models, and the clock."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onnxcompress import model_io
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.errors import OnnxCompressError
from onnxcompress.interface import input_specs
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.runtime import SessionSettings, compare_latency, open_session

Row = dict[str, object]

_SESSIONS = 5
"""Pairs of sessions that are timed for one figure."""

_ROOT = Path(__file__).resolve().parents[1]
"""Where the package is when it is not installed."""


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

    With one thread it is processor time, which other programs on the machine disturb little, the
    median of five pairs of sessions: where a session's memory lies changes its speed by a tenth,
    now and then by a third. With more threads it is the wall clock, with its spread (10th and 90th
    percentile of the ratios).

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
                ratios = []
                for _ in range(_SESSIONS):
                    pair = [open_session(path, settings) for path in (original, result)]
                    times = run_times(pair, feeds, seconds=seconds / _SESSIONS)
                    ratios.append(times[0] / times[1])
                found[key] = round(statistics.median(ratios), 3)
            else:
                latency = compare_latency(before, after, feeds, max_seconds=seconds)
                found[key] = round(latency.ratio, 3)
                found[f"{key}_spread"] = [round(latency.ratio_low, 3), round(latency.ratio_high, 3)]
    return found


def measure_apart(
    row: Row,
    command: Sequence[str],
    judge: Judge,
    *,
    seconds: float,
    threads: Sequence[int] = (1, 2),
    timeout_seconds: int = 1800,
) -> Row:
    """Let a tool compress a model in a process of its own, then evaluate and time the result.

    Args:
        row: What the result is of: ``model`` and more.
        command: The process. It writes the file named by the ``--output`` that is added to it, and
            prints its own figures as JSON in its last line.
        judge: The judge.
        seconds: Time for each measurement of speed.
        threads: Threads inside one operator.
        timeout_seconds: When to give up.

    Returns:
        ``row`` with all figures, or with ``error``.
    """
    name = str(row["model"])
    original = judge.prepare(name)
    found = dict(row)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.onnx"
        try:
            done = subprocess.run(
                [sys.executable, *command, "--output", str(output)],
                check=False,
                capture_output=True,
                text=True,
                timeout=timeout_seconds,
                cwd=folder,  # some tools leave files where they run
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path])},
            )
            if done.returncode or not output.exists():
                lines = [entry for entry in done.stderr.splitlines() if entry.strip()]
                return found | {"error": (lines[-1] if lines else "no message")[:160]}
            found |= json.loads(done.stdout.splitlines()[-1])
            found |= {k: v for k, v in judge.evaluate(name, output).items() if k not in found}
            if "error" not in found:
                specs = input_specs(model_io.load(original))
                data = open_dataset(original.with_suffix(".calib.npz"), specs, limit=8)
                found |= speeds(original, output, data, seconds=seconds, threads=threads)
        except subprocess.TimeoutExpired:
            found["error"] = f"more than {timeout_seconds} s"
        except OnnxCompressError as error:
            found["error"] = str(error)
    return found


def markdown(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> str:
    """Rows as a Markdown table: model, tool, the columns, and what went wrong.

    Args:
        rows: The rows.
        columns: Title, key and format of each column.
    """
    head = ["model", "tool", *(title for title, _, _ in columns), ""]
    lines = [head, ["---"] * 2 + ["---:"] * len(columns) + ["---"]]
    for row in rows:
        values = [(row.get(key), form) for _, key, form in columns]
        cells = [format(v, form) if isinstance(v, int | float) else "-" for v, form in values]
        problem = str(row.get("error", "")).replace("|", "/")
        lines.append([str(row["model"]), str(row["tool"]), *cells, problem])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
