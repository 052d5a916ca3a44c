"""Quantization on real models: fidelity, size and speed of the result against float.

    python benchmarks/quant.py --zoo PATH [--models a,b] [--samples 128] [--set ranges=minmax]
    [--json FILE]

PATH holds ``zoo.py``, which prepares models and data and evaluates results independently of this
package. One row per model: the task metric before and after, the share of equal top classes, SQNR,
size, and the speed as float time / integer time with one thread at batch 1 and 8: both models take
turns, and the time is the processor time of the thread they run in, so that other programs on the
machine disturb little (``wall``: the median ratio on the wall clock instead). ``--models-dir``
keeps what ``zoo.py prepare`` writes between runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from onnxcompress import model_io
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import OnnxCompressError
from onnxcompress.interface import input_specs
from onnxcompress.passes.fold import FoldPass
from onnxcompress.passes.quant import QuantOptions, QuantPass
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.passes.simplify import SimplifyPass
from onnxcompress.runtime import SessionSettings, compare_latency, open_session
from onnxcompress.targets import target_by_name

Row = dict[str, object]

HEADER = (
    f"{'model':22s} {'metric':>9s} {'float':>8s} {'int8':>8s} {'agree':>6s} {'dB':>6s} "
    f"{'size':>5s} {'b1':>5s} {'b8':>5s} {'wall1':>5s} {'wall8':>5s} {'nodes':>7s} "
    f"{'sec':>4s}  placement"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--zoo", required=True, type=Path, help="folder that holds zoo.py")
    parser.add_argument("--models", default="", help="comma-separated names (default: all)")
    parser.add_argument("--models-dir", type=Path, help="folder of prepared models")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--set", action="append", default=[], help="option=value of the pass")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--seconds", type=float, default=3.0, help="per speed measurement")
    parser.add_argument("--plain", action="store_true", help="without simplify and fold")
    parser.add_argument("--keep", type=Path, help="folder for the quantized models")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()

    judge = [sys.executable, str(arguments.zoo / "zoo.py")]
    listed = subprocess.run([*judge, "list"], check=True, capture_output=True, text=True).stdout
    names = [n for n in arguments.models.split(",") if n]
    rows: list[Row] = []
    print(HEADER)
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or [line.split()[0] for line in listed.splitlines()]:
            row = measure(name, judge, arguments, Path(scratch))
            rows.append(row)
            print(line(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(name: str, judge: list[str], arguments: argparse.Namespace, scratch: Path) -> Row:
    """Quantize one model as a user would and evaluate the result."""
    folder: Path = arguments.models_dir or scratch
    original = folder / f"{name}.onnx"
    if not original.exists():
        subprocess.run([*judge, "prepare", name, str(folder)], check=True, capture_output=True)
    row: Row = {"model": name}
    try:
        model = model_io.load(original)
        row["notes"] = list(model_io.normalize(model))
        data = open_dataset(
            folder / f"{name}.calib.npz", input_specs(model), limit=arguments.samples
        )
        context = PassContext(
            target=target_by_name(arguments.target), work_dir=scratch, calibration=data
        )
        if not arguments.plain:
            for before in (SimplifyPass(), FoldPass()):
                before.run(model, context)
        values = dict(pair.split("=", 1) for pair in arguments.set)
        started = time.monotonic()
        report = QuantPass(QuantOptions.parse(values, owner="quant")).run(model, context)
        row["seconds"] = round(time.monotonic() - started, 1)
        row |= {**report.figures, "notes": [*row["notes"], *report.notes]}  # type: ignore[misc]
        row["skips"] = sorted({f"{s.op_type}: {s.reason}" for s in report.skips})
        result = (arguments.keep or scratch) / f"{name}.int8.onnx"
        result.parent.mkdir(parents=True, exist_ok=True)
        model_io.save(model, result)
        row |= speeds(original, result, data, arguments.seconds)
    except OnnxCompressError as error:
        return row | {"error": str(error)}
    judged = subprocess.run(
        [*judge, "evaluate", name, str(result)], check=False, capture_output=True, text=True
    )
    return dict(json.loads(judged.stdout)) | row


def speeds(original: Path, result: Path, data: Dataset, seconds: float) -> Row:
    """Float time / integer time, one thread, at the natural batch and at 8 where it is dynamic."""
    settings = SessionSettings(threads=1)
    before, after = (open_session(path, settings) for path in (original, result))
    found: Row = {}
    for batch in (1, 8):
        feeds = next(iter(data.batches(batch)))
        if batch > 1 and {a.shape[:1] for a in feeds.values()} <= {(1,), ()}:
            continue
        times = run_times([before, after], feeds, seconds=seconds)
        found[f"speed_b{batch}"] = round(times[0] / times[1], 2)
        latency = compare_latency(before, after, feeds, max_seconds=seconds)
        found[f"wall_b{batch}"] = round(latency.ratio, 2)
        found[f"wall_b{batch}_spread"] = [round(latency.ratio_low, 2), round(latency.ratio_high, 2)]
    return found


def line(row: Row) -> str:
    """One row of the table."""

    def number(key: str, form: str) -> str:
        value = row.get(key)
        width = int(form.split(".")[0])
        return format(value, f"{form}f") if isinstance(value, int | float) else "-".rjust(width)

    if "error" in row:
        return f"{row['model']:22s} {row['error']}"
    nodes = f"{row.get('integer_weighted_nodes', 0)}/{row.get('integer_nodes', 0)}"
    return (
        f"{row['model']:22s} {row.get('metric', ''):>9s} {number('reference_value', '8.4')} "
        f"{number('value', '8.4')} {number('agreement', '6.4')} {number('sqnr_db', '6.1')} "
        f"{number('size_ratio', '5.2')} {number('speed_b1', '5.2')} {number('speed_b8', '5.2')} "
        f"{number('wall_b1', '5.2')} {number('wall_b8', '5.2')} {nodes:>7s} "
        f"{number('seconds', '4.0')}  {row.get('placement', '')}"
    )


if __name__ == "__main__":
    main()
