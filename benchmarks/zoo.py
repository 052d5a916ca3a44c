"""The command line on every model of a folder of trained models, with an independent judge.

    python benchmarks/zoo.py --zoo PATH [--passes quant,prune] [--models a,b] [--json FILE]

PATH holds ``zoo.py``, a program with the commands ``list``, ``prepare NAME DIR`` and
``evaluate NAME MODEL``, that shares no code with this project. For every model this prepares the
float file and its data, runs ``onnxcompress`` on it as a user would, and puts what our report says
beside what ``zoo.py evaluate`` measures. The exit status is 1 if any run ended with a traceback, an
exit code other than 0, 1 or 3, or a written file that the judge cannot load.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

EXPECTED_EXITS = (0, 1, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One model.

    Attributes:
        model: Name in the zoo.
        exit_code: Exit code of ``onnxcompress``.
        seconds: Time it took.
        report: Our JSON report, empty if there is none.
        judged: The JSON line of ``zoo.py evaluate``, empty if nothing was written.
        message: Last lines of stderr.
        broken: Whether it is a bug: a traceback, a strange exit code, a file that does not load.
    """

    model: str
    exit_code: int
    seconds: float
    report: dict[str, Any]
    judged: dict[str, Any]
    message: str
    broken: bool


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True, help="folder that holds zoo.py")
    parser.add_argument("--passes", default="quant,prune")
    parser.add_argument("--models", default="", help="comma-separated names (default: all)")
    parser.add_argument("--calib-samples", type=int, default=128)
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the compressed models and reports (default: none kept)",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("extra", nargs="*", help="more arguments for onnxcompress, after --")
    options = parser.parse_args()

    judge = [sys.executable, str(options.zoo / "zoo.py")]
    listed = subprocess.run([*judge, "list"], check=True, capture_output=True, text=True).stdout
    names = [line.split()[0] for line in listed.splitlines()]
    wanted = [n for n in options.models.split(",") if n] or names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(names)}")

    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in wanted:
            folder = Path(scratch) / name
            kept = options.keep or folder
            kept.mkdir(parents=True, exist_ok=True)
            outcome = run(judge, name, folder, kept, options)
            outcomes.append(outcome)
            print(f"{name}: exit {outcome.exit_code}, {outcome.seconds:.0f} s", file=sys.stderr)
            for path in folder.glob("*.npz"):
                path.unlink()
    Console(width=190).print(table(outcomes, options.passes))
    if options.json:
        figures = [{f: getattr(o, f) for f in Outcome.__slots__} for o in outcomes]
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    broken = [o.model for o in outcomes if o.broken]
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def run(
    judge: list[str], name: str, folder: Path, kept: Path, options: argparse.Namespace
) -> Outcome:
    """Prepare, compress and judge one model."""
    subprocess.run(
        [*judge, "prepare", name, str(folder), "--calib-n", str(options.calib_samples)],
        check=True,
        capture_output=True,
    )
    source, target = (
        folder / f"{name}.onnx",
        kept / f"{name}.{options.passes.replace(',', '-')}.onnx",
    )
    target.unlink(missing_ok=True)
    report = target.with_suffix(".json")
    command = [sys.executable, "-m", "onnxcompress", str(source), str(target)]
    command += ["--passes", options.passes, "--json", str(report), *options.extra]
    labels = folder / f"{name}.labels.npy"
    if labels.exists() and has_class_labels(judge, name):
        command += ["--labels", str(labels)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    judged: dict[str, Any] = {}
    if target.exists():
        line = subprocess.run(
            [*judge, "evaluate", name, str(target)], capture_output=True, text=True, check=False
        )
        judged = json.loads(line.stdout or "{}")
    return Outcome(
        model=name,
        exit_code=done.returncode,
        seconds=seconds,
        report=json.loads(report.read_text(encoding="utf-8")) if report.exists() else {},
        judged=judged,
        message=" ".join(done.stderr.split()[-60:]),
        broken="Traceback" in done.stderr
        or done.returncode not in EXPECTED_EXITS
        or "error" in judged
        or (done.returncode == 0 and not judged),
    )


def has_class_labels(judge: list[str], name: str) -> bool:
    """Whether the labels of a model are class numbers (and not similarity scores or images)."""
    manifest = json.loads(Path(judge[1]).with_name("zoo.json").read_text(encoding="utf-8"))
    return bool(manifest[name]["metric"] == "top1")


def table(outcomes: list[Outcome], passes: str) -> Table:
    """One row per model: our figures, then the judge's."""
    made = Table(title=f"--passes {passes}")
    for column in ("model", "exit", "s"):
        made.add_column(column)
    for column in ("size x", "MACs", "speed b1", "agree", "SQNR dB"):
        made.add_column(column, justify="right")
    for column in ("judge: metric", "float", "result", "agree", "SQNR dB"):
        made.add_column(column, justify="right")
    made.add_column("why", max_width=48)
    for o in outcomes:
        made.add_row(*row(o))
    return made


def row(outcome: Outcome) -> list[str]:
    """The cells of one model."""
    report, judged = outcome.report, outcome.judged
    before, after = (
        report.get("verification", {}).get("original"),
        report.get("verification", {}).get("result"),
    )
    cells = [
        outcome.model,
        str(outcome.exit_code) + ("!" if outcome.broken else ""),
        f"{outcome.seconds:.0f}",
    ]
    if before and after:
        timing = next(iter(report["verification"]["timings"]), None)
        outputs = report["verification"]["comparison"]["outputs"]
        sqnr = [o["sqnr_db"] for o in outputs if o.get("sqnr_db") is not None]
        agreements = report["verification"]["comparison"]["agreements"]
        cells += [
            f"{before['raw_bytes'] / after['raw_bytes']:.2f}",
            f"{after['macs'] / before['macs']:.2f}" if before["macs"] else "-",
            f"{timing['speedup_ratio']:.2f}" if timing else "-",
            figure(agreements[0]["top1_ratio"]) if agreements else "-",
            f"{min(sqnr):.1f}" if sqnr else "-",
        ]
    else:
        cells += ["-"] * 5
    cells += [
        str(judged.get("metric", "-")),
        figure(judged.get("reference_value")),
        figure(judged.get("value")),
        figure(judged.get("agreement")),
        f"{judged['sqnr_db']:.1f}" if "sqnr_db" in judged else "-",
    ]
    failures = report.get("verification", {}).get("failures") or []
    why = judged.get("error") or "; ".join(failures)
    return [*cells, why or (outcome.message if outcome.exit_code else "")]


def figure(value: float | None) -> str:
    """A number of the judge, or a dash."""
    return "-" if value is None else f"{value:.4f}" if value < 2 else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
