"""Pruning on real models: the task metric before and after, for several budgets and criteria.

    python benchmarks/prune.py cifar_resnet20 --zoo PATH --models-dir FOLDER --macs 0.8,0.5
    python benchmarks/prune.py --suite --zoo PATH --models-dir FOLDER

The second form is the table of the documentation: one budget per model, with the default options.
PATH holds ``zoo.py``, which prepares models and data (once, into FOLDER) and evaluates results
independently of this package. One row per model, budget and method; ``--json`` writes all that was
measured.

The methods ending in ``+ls`` refit the layers behind what was removed; the others only cut. All of
them share coupling, allocation and alignment, so rows differ in the criterion and the repair alone.
With ``--distill`` the result then learns from the original as ``distill`` by default does it.
``cpu`` is processor time in seconds: on a busy machine ``seconds`` says little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import OnnxCompressError
from onnxcompress.interface import input_specs
from onnxcompress.passes.distill import DistillPass
from onnxcompress.passes.fold import FoldPass
from onnxcompress.passes.prune import Importance, PruneOptions, PrunePass
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.passes.simplify import SimplifyPass
from onnxcompress.runtime import SessionSettings, compare_latency, open_session
from onnxcompress.targets import target_by_name

SUITE: tuple[tuple[str, dict[str, object]], ...] = (
    ("mnist_lenet", {"params": 0.3}),
    ("mobilenetv1_025_224", {"macs": 0.8}),
    ("squeezenet11", {"macs": 0.8}),
    ("cifar_resnet20", {"macs": 0.7}),
    ("cifar_resnet20", {"macs": 0.5}),
    ("cifar_resnet56", {"macs": 0.7}),
    ("cifar_resnet56", {"macs": 0.5}),
    ("minilm_l6_v2", {"total": "*intermediate*:0.5"}),
    ("minilm_l6_v2", {"keep": "*intermediate*:0.5", "rounds": 1}),
    ("minilm_l6_v2", {"keep": "*intermediate*:0.7,*attention*:0.833", "rounds": 1}),
    ("dtln_1", {"macs": 0.8}),
    ("silero_vad", {"macs": 0.8}),
)
"""Models and budgets of the documentation's table."""

METHODS: dict[str, tuple[Importance, bool]] = {
    "random": (Importance.RANDOM, False),
    "l1": (Importance.L1, False),
    "l2": (Importance.L2, False),
    "geometric_median": (Importance.GEOMETRIC_MEDIAN, False),
    "activation": (Importance.ACTIVATION, False),
    "obs": (Importance.OBS, False),
    "l2+ls": (Importance.L2, True),
    "obs+ls": (Importance.OBS, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="*", help="names in the zoo")
    parser.add_argument("--suite", action="store_true", help="the documentation's table")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--distill", action="store_true", help="let the results learn, too")
    parser.add_argument("--zoo", required=True, type=Path, help="folder that holds zoo.py")
    parser.add_argument("--models-dir", required=True, type=Path, help="folder of prepared models")
    parser.add_argument("--macs", default="0.8", help="comma-separated fractions to keep")
    parser.add_argument("--methods", default="l2,obs+ls", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--samples", type=int, default=512, help="calibration samples")
    parser.add_argument("--align", type=int, default=0, help="0: the target's")
    parser.add_argument("--limit", type=int, help="evaluation samples")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()

    rows: list[dict[str, object]] = []
    print(
        f"{'model':24s} {'budget':12s} {'method':18s} {'kept':>6s} {'params':>6s} "
        f"{'metric':>8s} {'before':>8s} {'agree':>6s} {'SQNR':>6s} {'speed':>6s} "
        f"{'at 8':>6s} {'seconds':>7s} {'cpu':>6s}"
    )
    given: dict[str, object] = dict(pair.split("=", 1) for pair in arguments.set)
    runs = [
        (name, method, {**given, "macs": kept})
        for name in arguments.models
        for kept in map(float, arguments.macs.split(","))
        for method in arguments.methods.split(",")
    ]
    if arguments.suite:
        runs += [(name, "obs+ls", {**given, **budget}) for name, budget in SUITE]
    for name, method, options in runs:
        row = measure(name, method, options, arguments)
        rows.append(row)
        print(line(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(
    name: str, method: str, given: Mapping[str, object], arguments: argparse.Namespace
) -> dict[str, object]:
    """Prune one model one way and evaluate the result."""
    row: dict[str, object] = {"model": name, "method": method, "options": dict(given)}
    source = arguments.models_dir / f"{name}.onnx"
    calibration = arguments.models_dir / f"{name}.calib.npz"
    if not source.exists() or not calibration.exists():
        command = [
            sys.executable,
            str(arguments.zoo / "zoo.py"),
            "prepare",
            name,
            str(arguments.models_dir),
        ]
        subprocess.run([*command, "--calib-n", str(arguments.samples)], check=True)
    model = model_io.load(source)
    model_io.normalize(model)
    importance, recover = METHODS[method]
    settings = SessionSettings(threads=arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        context = PassContext(
            target=target_by_name(arguments.target),
            work_dir=Path(folder),
            calibration=open_dataset(calibration, input_specs(model), limit=arguments.samples),
            session=settings,
            batch_size=32,
            original=source,
        )
        SimplifyPass().run(model, context)
        FoldPass().run(model, context)
        dense = model_io.clone(model)
        fixed = {"importance": importance.value, "recover": recover, "align": arguments.align}
        options = PruneOptions.parse({**fixed, **given}, owner="prune")
        start, processor = time.perf_counter(), time.process_time()
        try:
            report = PrunePass(options).run(model, context)
            if arguments.distill:
                taught = DistillPass().run(model, context)
                row["distill"] = {**taught.figures, "notes": taught.notes}
        except OnnxCompressError as error:
            return {**row, "error": error.message}
        row["seconds"] = time.perf_counter() - start
        row["processor_seconds"] = time.process_time() - processor
        row["figures"] = dict(report.figures)
        result = Path(folder) / f"{name}.onnx"
        model_io.save(model, result)
        feeds = context.calibration.first() if context.calibration is not None else {}
        latency = compare_latency(
            open_session(dense, settings), open_session(result, settings), feeds
        )
        row["speed"] = latency.ratio
        row["speed_8"] = speed_of_eight(dense, result, context)
        limit = [] if arguments.limit is None else ["--limit", str(arguments.limit)]
        found = subprocess.run(
            [sys.executable, str(arguments.zoo / "zoo.py"), "evaluate", name, str(result), *limit,
             "--threads", str(arguments.threads or os.cpu_count() or 1)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        row["evaluation"] = json.loads(found.stdout)
    return row


def speed_of_eight(dense: ir.Model, result: Path, context: PassContext) -> float | None:
    """Processor time of the original / the result at batch 8 on one thread; None if it is fixed."""
    data = context.calibration
    if data is None or data.layout.group is not None or data.sample_count < 8:
        return None
    one = SessionSettings(threads=1)
    before, after = run_times(
        [open_session(dense, one), open_session(result, one)],
        next(data.batches(8)),
        seconds=3.0,
    )
    return before / after


def line(row: dict[str, object]) -> str:
    """One row of the table."""
    given = row["options"]
    budget = given if isinstance(given, dict) else {}
    text = " ".join(
        f"{k}={v}" for k, v in budget.items() if k in {"macs", "params", "bytes", "keep", "total"}
    )
    head = f"{row['model']:24s} {text:12s} {row['method']:18s}"
    figures, result = row.get("figures"), row.get("evaluation")
    if not isinstance(figures, dict) or not isinstance(result, dict) or "error" in result:
        reason = result.get("error") if isinstance(result, dict) else row.get("error")
        return f"{head} failed: {reason}"
    agreement = result.get("agreement")
    return (
        f"{head} {figures['macs_kept_ratio']:6.3f} {figures['params_kept_ratio']:6.3f} "
        f"{result['value']:8.4f} {result['reference_value'] or 0:8.4f} "
        f"{'-' if agreement is None else f'{agreement:.4f}':>6s} {result['sqnr_db']:6.2f} "
        f"{row['speed']:6.2f} {row['speed_8'] or 0:6.2f} {row['seconds']:7.1f} "
        f"{row['processor_seconds']:6.1f}"
    )


if __name__ == "__main__":
    main()
