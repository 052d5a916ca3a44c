"""Quantization on real models: fidelity, size and speed of the result against float.

    python benchmarks/quant.py --zoo PATH [--models a,b] [--samples 128] [--set ranges=minmax]
    [--json FILE]

PATH holds ``zoo.py``, which prepares models and data and evaluates results independently of this
package. One row per model: the task metric before and after, the share of equal top classes, SQNR,
size, and the speed as float time / integer time at batch 1 and 8 with one thread (processor time)
and two (wall clock): both models take turns. ``--models-dir`` keeps what ``zoo.py prepare`` writes
between runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from _judge import Judge, Row, speeds

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import OnnxCompressError
from onnxcompress.interface import input_specs
from onnxcompress.passes.fold import FoldPass
from onnxcompress.passes.quant import QuantOptions, QuantPass
from onnxcompress.passes.simplify import SimplifyPass
from onnxcompress.targets import target_by_name

HEADER = (
    f"{'model':22s} {'metric':>9s} {'float':>8s} {'int8':>8s} {'agree':>6s} {'dB':>6s} "
    f"{'size':>5s} {'b1':>5s} {'b8':>5s} {'b1 t2':>5s} {'b8 t2':>5s} {'nodes':>7s} "
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

    names = [n for n in arguments.models.split(",") if n]
    rows: list[Row] = []
    print(HEADER)
    with tempfile.TemporaryDirectory() as scratch:
        judge = Judge(arguments.zoo, arguments.models_dir or Path(scratch))
        for name in names or judge.names():
            row = measure(name, judge, arguments, Path(scratch))
            rows.append(row)
            print(line(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(name: str, judge: Judge, arguments: argparse.Namespace, scratch: Path) -> Row:
    """Quantize one model as a user would and evaluate the result."""
    original = judge.prepare(name)
    row: Row = {"model": name}
    try:
        model = model_io.load(original)
        row["notes"] = list(model_io.normalize(model))
        data = open_dataset(
            original.with_suffix(".calib.npz"), input_specs(model), limit=arguments.samples
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
        row |= speeds(original, result, data, seconds=arguments.seconds)
    except OnnxCompressError as error:
        return row | {"error": str(error)}
    return judge.evaluate(name, result) | row


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
        f"{number('size_ratio', '5.2')} {number('speed_b1_t1', '5.2')} "
        f"{number('speed_b8_t1', '5.2')} {number('speed_b1_t2', '5.2')} "
        f"{number('speed_b8_t2', '5.2')} {nodes:>7s} "
        f"{number('seconds', '4.0')}  {row.get('placement', '')}"
    )


if __name__ == "__main__":
    main()
