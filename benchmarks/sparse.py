"""Sparsity on real models: what masks and recovery keep, and what packing saves.

    python benchmarks/sparse.py --zoo PATH [--models a,b] [--density 0.5] [--pattern 2:4]
        [--samples 200] [--json FILE]

PATH holds ``zoo.py``, which prepares models and data and evaluates results independently of this
package. One row per model and way: random and magnitude masks without recovery, Wanda and OBS masks
without, and all but random with it. Size is float / result; load is the time that opening the
result in onnxruntime takes, relative to the original (medians of turns); speed is the time of the
original / result on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from _judge import Judge, Row, speeds

from onnxcompress import compress, model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.errors import OnnxCompressError
from onnxcompress.interface import input_specs
from onnxcompress.runtime import SessionSettings
from onnxcompress.verification.footprint import load_times
from onnxcompress.verification.gates import Gates

WAYS = (
    ("random", False),
    ("magnitude", False),
    ("activation", False),
    ("obs", False),
    ("magnitude", True),
    ("activation", True),
    ("obs", True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--zoo", required=True, type=Path, help="folder that holds zoo.py")
    parser.add_argument("--models", default="", help="comma-separated names (default: all)")
    parser.add_argument("--models-dir", type=Path, help="folder of prepared models")
    parser.add_argument("--density", default="0.5", help="share of the weights to keep")
    parser.add_argument("--pattern", default="", help="N:M in place of a density")
    parser.add_argument("--samples", type=int, default=200, help="calibration samples")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.models_dir or Path(scratch) / "zoo"
        judge = Judge(arguments.zoo.resolve(), folder.resolve())
        for name in [n for n in arguments.models.split(",") if n] or judge.names():
            for importance, recover in WAYS:
                row = measure(name, importance, recover, judge, arguments, Path(scratch))
                rows.append(row)
                print(line(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(
    name: str,
    importance: str,
    recover: bool,
    judge: Judge,
    arguments: argparse.Namespace,
    scratch: Path,
) -> Row:
    """Thin out one model in one way and evaluate the result."""
    row: Row = {"model": name, "importance": importance, "recover": recover}
    original, result = judge.prepare(name), scratch / "sparse.onnx"
    calibration = original.with_suffix(".calib.npz")
    wanted = {"pattern": arguments.pattern} if arguments.pattern else {"density": arguments.density}
    try:
        made = compress(
            original,
            result,
            passes=["sparse"],
            calib=calibration,
            eval=calibration,
            calib_samples=arguments.samples,
            eval_samples=16,
            options={"sparse": {"importance": importance, "recover": recover, **wanted}},
            gates=Gates(enforced=False),
            measure=False,
        )
        data = open_dataset(calibration, input_specs(model_io.load(original)), limit=8)
        row |= speeds(original, result, data, seconds=2.0, batches=(1,), threads=(1,))
    except OnnxCompressError as error:
        return row | {"error": str(error)}
    run = next(run for run in made.passes if run.name == "sparse")
    row["seconds"] = round(run.seconds, 1)
    loads = load_times((original, result), SessionSettings(threads=1))
    row["load"] = round(loads[result] / loads[original], 2)
    return judge.evaluate(name, result) | row


def line(row: Row) -> str:
    """One row of the table."""
    head = f"{row['model']!s:22s} {row['importance']!s:11s} {'LS' if row['recover'] else '-':3s}"
    if "error" in row:
        return f"{head} {row['error']}"
    cells = []
    for key, form in (
        ("reference_value", "8.4f"),
        ("value", "8.4f"),
        ("agreement", "7.4f"),
        ("sqnr_db", "6.1f"),
        ("size_ratio", "5.2f"),
        ("speed_b1_t1", "5.2f"),
        ("load", "5.2f"),
        ("seconds", "6.1f"),
    ):
        value = row.get(key)
        cells.append(format(value, form) if isinstance(value, int | float) else "-")
    return f"{head} {' '.join(cells)}"


if __name__ == "__main__":
    main()
