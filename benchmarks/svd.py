"""Factorization on real models: the task metric before and after, plain SVD in the same table.

    python benchmarks/svd.py --zoo PATH --models-dir FOLDER                 # the whole table
    python benchmarks/svd.py cifar_resnet20 --zoo PATH --models-dir FOLDER --budget params=0.75

PATH holds ``zoo.py``, which prepares models and data (once, into FOLDER) and evaluates results
independently of this package. One row per model, budget and method; ``--json`` writes all that was
measured. ``plain`` cuts to the largest singular values of the weights, ``whitened`` to what matters
for the inputs seen, ``svd`` also refits (the default of the pass). All share the allocation by
measured loss. ``--set`` passes further options, ``--then quant`` runs other passes afterwards.

``matmul=0.75`` as a budget keeps that fraction of the parameters of the layers alone, embeddings
left whole. Times are processor time of one thread, interleaved; speed is before / after.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress._threads import linear_algebra
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import OnnxCompressError
from onnxcompress.graph.cost import cost_of
from onnxcompress.interface import input_specs
from onnxcompress.passes import make_pass
from onnxcompress.passes.fold import FoldPass
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.passes.simplify import SimplifyPass
from onnxcompress.passes.svd import SvdOptions
from onnxcompress.passes.svd.sites import find_sites
from onnxcompress.runtime import SessionSettings, open_session
from onnxcompress.targets import target_by_name

METHODS: dict[str, dict[str, object]] = {
    "plain": {"whiten": False, "recover": False},
    "whitened": {"recover": False},
    "svd": {},
}

TABLE = [
    ("mnist_lenet", "params=0.124"),
    ("cifar_resnet20", "params=0.75"),
    ("squeezenet11", "params=0.75"),
    ("minilm_l6_v2", "matmul=0.75"),
    ("minilm_l6_v2", "matmul=0.5"),
]
"""Models and budgets when none are named."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="*", help="names in the zoo; none for the whole table")
    parser.add_argument("--zoo", required=True, type=Path, help="folder that holds zoo.py")
    parser.add_argument("--models-dir", required=True, type=Path, help="folder of prepared models")
    parser.add_argument("--budget", default="params=0.75", help="comma-separated budgets")
    parser.add_argument("--methods", default="plain,whitened,svd", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--set", action="append", default=[], help="OPTION=VALUE of svd")
    parser.add_argument("--then", default="", help="comma-separated passes to run afterwards")
    parser.add_argument("--samples", type=int, default=512, help="calibration samples")
    parser.add_argument("--limit", type=int, help="evaluation samples")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--keep", type=Path, help="keep the results in this folder")
    arguments = parser.parse_args()

    rows: list[dict[str, object]] = []
    print(
        f"{'model':20s} {'budget':13s} {'method':9s} {'params':>6s} {'macs':>6s} {'size':>6s} "
        f"{'metric':>8s} {'before':>8s} {'agree':>6s} {'SQNR':>6s} {'speed':>6s} {'seconds':>7s}"
    )
    budgets = arguments.budget.split(",")
    wanted = [(name, budget) for name in arguments.models for budget in budgets] or TABLE
    for name, budget in wanted:
        for method in arguments.methods.split(","):
            row = measure(name, budget, method, arguments)
            rows.append(row)
            print(line(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(
    name: str, budget: str, method: str, arguments: argparse.Namespace
) -> dict[str, object]:
    """Factorize one model one way and evaluate the result."""
    row: dict[str, object] = {"model": name, "budget": budget, "method": method}
    source = arguments.models_dir / f"{name}.onnx"
    calibration = arguments.models_dir / f"{name}.calib.npz"
    zoo = [sys.executable, str(arguments.zoo / "zoo.py")]
    if not source.exists() or not calibration.exists():
        command = [*zoo, "prepare", name, str(arguments.models_dir)]
        subprocess.run([*command, "--calib-n", str(arguments.samples)], check=True)
    model = model_io.load(source)
    model_io.normalize(model)
    settings = SessionSettings(threads=arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = open_dataset(calibration, input_specs(model), limit=arguments.samples)
        context = PassContext(
            target=target_by_name(arguments.target),
            work_dir=Path(folder),
            calibration=data,
            session=settings,
            batch_size=32,
        )
        SimplifyPass().run(model, context)
        FoldPass().run(model, context)
        dense = model_io.clone(model)
        further = dict(item.split("=", 1) for item in arguments.set)
        values = {**budget_values(model, budget), **METHODS[method], **further}
        start = time.perf_counter()
        try:
            with linear_algebra(model, arguments.threads or None):
                report = make_pass("svd", values).run(model, context)
                for other in filter(None, arguments.then.split(",")):
                    make_pass(other, {}).run(model, context)
        except OnnxCompressError as error:
            return {**row, "error": f"{error.message} {error.hint or ''}"}
        row["seconds"] = time.perf_counter() - start
        row["figures"] = dict(report.figures)
        row["changes"] = [f"{c.node}: {c.what}" for c in report.changes]
        row["notes"] = list(report.notes)
        result = (arguments.keep or Path(folder)) / f"{name}.{budget}.{method}.onnx"
        model_io.save(model, result)
        single = SessionSettings(threads=1)
        before, after = run_times(
            [open_session(dense, single), open_session(result, single)], data.first(), seconds=2.0
        )
        row["speed"] = before / after
        limit = [] if arguments.limit is None else ["--limit", str(arguments.limit)]
        threads = str(arguments.threads or os.cpu_count() or 1)
        found = subprocess.run(
            [*zoo, "evaluate", name, str(result), *limit, "--threads", threads],
            capture_output=True,
            text=True,
            check=False,
        )
        row["evaluation"] = json.loads(found.stdout)
    return row


def budget_values(model: ir.Model, budget: str) -> dict[str, object]:
    """Options for a budget; ``matmul`` counts the parameters of layers without embeddings."""
    key, _, value = budget.partition("=")
    if key != "matmul":
        return {key: value}
    sites = find_sites(model, SvdOptions()).sites
    inside = sum(s.parameters for s in sites if s.op_type != "Gather")
    whole = cost_of(model).parameters
    return {"params": 1 - (1 - float(value)) * inside / whole, "embeddings": False}


def line(row: dict[str, object]) -> str:
    """One row of the table."""
    head = f"{row['model']:20s} {row['budget']:13s} {row['method']:9s}"
    figures, result = row.get("figures"), row.get("evaluation")
    if not isinstance(figures, dict) or not isinstance(result, dict) or "error" in result:
        reason = result.get("error") if isinstance(result, dict) else row.get("error")
        return f"{head} failed: {reason}"
    agreement = result.get("agreement")
    value, before = result.get("value"), result.get("reference_value")
    return (
        f"{head} {figures['params_kept_ratio']:6.3f} {figures['macs_kept_ratio']:6.3f} "
        f"{result['size_ratio']:6.2f} {'-' if value is None else f'{value:.4f}':>8s} "
        f"{'-' if before is None else f'{before:.4f}':>8s} "
        f"{'-' if agreement is None else f'{agreement:.4f}':>6s} {result['sqnr_db']:6.2f} "
        f"{row['speed']:6.2f} {row['seconds']:7.1f}"
    )


if __name__ == "__main__":
    main()
