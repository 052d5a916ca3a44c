"""Codebooks of 16 and 64 values, beside plain k-means and behind other passes.

    python benchmarks/share.py --zoo PATH [--models a,b] [--variants plain-16,16,64]
        [--data FOLDER] [--keep FOLDER] [--json FILE]

PATH holds ``zoo.py``, which prepares models and data (kept in ``--data``) and evaluates results
independently of this package. Every variant goes through ``onnxcompress.compress`` with the
calibration samples that ``zoo.py prepare`` gives (200 or fewer).

Columns: the task metric of float and result, the share of equal top classes and the SQNR, by the
judge; size of float / result, raw and deflated; time of one run, result / float, at batch 1 and at
batch 8 (processor time, one thread, in turns, both optimized by onnxruntime); time to make a
session, result / float (the same clock); peak memory of a process that loads and runs the model,
result / float.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from _judge import Judge, Row, speeds
from rich.console import Console
from rich.table import Table

from onnxcompress import compress, model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.errors import OnnxCompressError
from onnxcompress.interface import input_specs
from onnxcompress.runtime import SessionSettings, open_session
from onnxcompress.verification.footprint import peak_memory

PLAIN = {"assign": "nearest", "scales": "false"}
VARIANTS: Mapping[str, tuple[str, Mapping[str, object]]] = MappingProxyType(
    {
        "plain-16": ("share", {"bits": 4, **PLAIN}),
        "16": ("share", {"bits": 4}),
        "plain-64": ("share", {"bits": 6, **PLAIN}),
        "64": ("share", {"bits": 6}),
        "64-bytes": ("share", {"bits": 6, "packing": "bytes"}),
        "16-once": ("share", {"bits": 4, "steps": 1}),
        "pairs-256": ("share", {"bits": 8, "codebook": "vector"}),
        "int8-16": ("share,quant", {"bits": 4}),
        "int8": ("quant", {}),
        "four": ("prune,svd,share,quant", {"bits": 4, "steps": 4}),
    }
)
BEFORE: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {"prune": {"macs": 0.75, "align": 16}, "svd": {"params": 0.97}}
)
"""Budgets of the passes in front of codebooks in the variant "four"."""
MODELS = (
    "cifar_resnet20,cifar_resnet56,squeezenet11,mnist_lenet,mobilenetv1_025_224,magika_v3_3,"
    "minilm_l6_v2"
)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True, help="folder that holds zoo.py")
    parser.add_argument("--models", default=MODELS, help="comma-separated names, or 'all'")
    parser.add_argument("--variants", default="plain-16,16,64", help=", ".join(VARIANTS))
    parser.add_argument("--data", type=Path, help="folder of prepared models (default: temporary)")
    parser.add_argument("--keep", type=Path, help="folder for the compressed models")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each clock")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if unknown := sorted(set(options.variants.split(",")) - set(VARIANTS)):
        parser.error(f"no such variant: {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        judge = Judge(options.zoo, options.data or folder / "data")
        kept: Path = options.keep or folder / "results"
        kept.mkdir(parents=True, exist_ok=True)
        names = judge.names() if options.models == "all" else options.models.split(",")
        for name in names:
            original = judge.prepare(name)
            for variant in options.variants.split(","):
                row = run(judge, name, original, variant, kept, folder, options.seconds)
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    Console(width=170).print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if any("error" in row for row in rows) else 0


def run(
    judge: Judge,
    name: str,
    original: Path,
    variant: str,
    kept: Path,
    scratch: Path,
    seconds: float,
) -> Row:
    """Compress and judge one model in one variant."""
    row: Row = {"model": name, "variant": variant}
    named, values = VARIANTS[variant]
    passes = named.split(",")
    chosen = {**BEFORE, "share": values}
    result = kept / f"{name}.{variant}.onnx"
    start = time.perf_counter()
    try:
        compress(
            original,
            result,
            passes=passes,
            options={name: chosen[name] for name in passes if name in chosen},
            measure=False,
            keep_failed=True,
        )
    except OnnxCompressError as error:
        return row | {"error": error.message}
    row["seconds"] = round(time.perf_counter() - start, 1)
    judged = judge.evaluate(name, result)
    keys = ("metric", "value", "reference_value", "agreement", "sqnr_db", "error")
    row |= {key: judged[key] for key in keys if judged.get(key) is not None}
    before, after = model_io.file_sizes(original), model_io.file_sizes(result)
    row["size_ratio"] = round(before.raw_bytes / after.raw_bytes, 2)
    row["deflated_ratio"] = round(before.deflated_bytes / after.deflated_bytes, 2)
    model = model_io.load(original)
    data = open_dataset(original.with_suffix(".eval.npz"), input_specs(model))
    clocked = speeds(original, result, data, seconds=seconds, batches=(1, 8), threads=(1,))
    for batch, key in ((1, "time_ratio"), (8, "time_ratio_b8")):
        if f"speed_b{batch}_t1" in clocked:
            row[key] = round(1 / float(str(clocked[f"speed_b{batch}_t1"])), 3)
    row["load_ratio"] = round(load_ratio(original, result, seconds), 2)
    memory = [
        peak_memory(path, data.first(), SessionSettings(threads=1), scratch)
        for path in (original, result)
    ]
    if memory[0] and memory[1]:
        row["memory_ratio"] = round(memory[1] / memory[0], 2)
    return row


def load_ratio(original: Path, result: Path, seconds: float) -> float:
    """Median time to make a session of ``result`` / of ``original``, made in turns."""
    settings = SessionSettings(threads=1)
    ratios: list[float] = []
    stop = time.monotonic() + seconds
    while len(ratios) < 5 or time.monotonic() < stop:
        spent = []
        for path in (original, result):
            start = time.thread_time()
            open_session(path, settings)
            spent.append(time.thread_time() - start)
        ratios.append(spent[1] / spent[0])
    return statistics.median(ratios)


def table(rows: list[Row]) -> Table:
    """One row per model and variant."""
    made = Table(title="codebooks")
    columns = (
        "metric",
        "float",
        "result",
        "agree",
        "SQNR dB",
        "size",
        "deflated",
        "time",
        "batch 8",
        "load",
    )
    for column in ("model", "codes", *columns, "memory", "s"):
        made.add_column(column, justify="left" if column in {"model", "codes"} else "right")
    keys: tuple[str, ...] = ("metric", "reference_value", "value", "agreement", "sqnr_db")
    keys += (
        "size_ratio",
        "deflated_ratio",
        "time_ratio",
        "time_ratio_b8",
        "load_ratio",
        "memory_ratio",
        "seconds",
    )
    for row in rows:
        cells = [str(row.get(key, "")) for key in keys]
        made.add_row(str(row["model"]), str(row["variant"]), *cells)
        if "error" in row:
            made.add_row("", f"[red]{row['error']}")
    return made


if __name__ == "__main__":
    sys.exit(main())
