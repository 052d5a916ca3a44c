"""The coupling analysis on real models: what can be removed, how long it takes, is the law kept.

    python benchmarks/coupling.py ZOO_FOLDER [NAME ...] [--json OUT.json]

For every ``NAME.onnx`` of the folder (with ``NAME.calib.npz`` beside it for the inputs) it prints
the number of nodes, the CPU seconds of the analysis, groups, units, the coverage (share of the
multiply-accumulates in nodes that some removal makes cheaper) and the error of the law with 20 %,
50 % and all but one unit removed: pruned against masked model, relative to the largest output.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io, runtime
from onnxcompress.errors import OnnxCompressError
from onnxcompress.graph import canonical, labels, surgery
from onnxcompress.graph.coupling import Coupling
from onnxcompress.interface import input_specs

Array = npt.NDArray[np.generic]
FRACTIONS = {"20 %": 0.2, "50 %": 0.5, "one left": 1.0}
SETTINGS = runtime.SessionSettings(threads=1, optimization=runtime.Optimization.BASIC)


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured on one model.

    Attributes:
        canonical_error: Error of the canonical model against the original; None if it does not run.
        law: Removed share to the error of the law.
        frozen: Reason to number of places.
    """

    name: str
    nodes: int
    analysis_seconds: float
    groups: int
    units: int
    coverage: float
    canonical_error: float | None
    law: Mapping[str, float]
    frozen: Mapping[str, int]


def sample(path: Path, model: ir.Model) -> dict[str, Array]:
    """The first samples of the calibration data: two, or one where inputs are whole samples."""
    specs = input_specs(model)
    with np.load(path.with_suffix(".calib.npz")) as data:
        arrays = {spec.name: data[spec.name] for spec in specs}
    whole = {s.name for s in specs if s.rank is not None and arrays[s.name].ndim == s.rank + 1}
    count = 1 if whole else 2
    return {
        s.name: np.asarray(arrays[s.name][0])
        if s.name in whole
        else arrays[s.name][: s.batch or count]
        for s in specs
    }


def relative_error(expected: Mapping[str, Array], got: Mapping[str, Array]) -> float:
    worst = 0.0
    for name, reference in expected.items():
        a, b = reference.astype(np.float64), got[name].astype(np.float64)
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)))
    return worst


def removal(coupling: Coupling, fraction: float, seed: int) -> dict[int, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return {
        g.index: np.sort(rng.permutation(g.size)[: min(round(g.size * fraction), g.size - 1)])
        for g in coupling.groups
    }


def run(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    return runtime.open_session(model, SETTINGS).run(feeds)


def measure(path: Path) -> Row:
    model = model_io.load(path)
    model_io.normalize(model)
    try:
        feeds = sample(path, model)
        before: dict[str, Array] | None = run(model, feeds)
    except (OnnxCompressError, FileNotFoundError):
        feeds, before = {}, None
    canonical.canonicalize(model)
    start = time.process_time()
    coupling = labels.analyse(model)
    seconds = time.process_time() - start
    macs = surgery.MacsModel(model, coupling)
    law: dict[str, float] = {}
    if before is not None:
        for label, fraction in FRACTIONS.items():
            removed = removal(coupling, fraction, seed=0)
            masked = run(surgery.mask(model, coupling, removed), feeds)
            small = model_io.clone(model)
            surgery.remove(small, coupling, removed)
            law[label] = relative_error(masked, run(small, feeds))
    return Row(
        name=path.stem,
        nodes=sum(1 for _ in model.graph.all_nodes()),
        analysis_seconds=seconds,
        groups=len(coupling.groups),
        units=sum(g.size for g in coupling.groups),
        coverage=macs.covered() / max(macs.total, 1),
        canonical_error=None if before is None else relative_error(before, run(model, feeds)),
        law=law,
        frozen=dict(Counter(f.reason for f in coupling.frozen)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for path in sorted(arguments.folder.glob("*.onnx")):
        if arguments.names and path.stem not in arguments.names:
            continue
        row = measure(path)
        rows.append(row)
        errors = ", ".join(f"{label} {error:.1e}" for label, error in row.law.items())
        print(
            f"{row.name:22} {row.nodes:4} nodes {row.analysis_seconds:6.3f} s "
            f"{row.groups:3} groups {row.units:5} units  coverage {row.coverage:.3f}  "
            f"law {errors or 'model does not run'}",
            flush=True,
        )
        for reason, count in row.frozen.items():
            print(f"{'':22} {count:4} x {reason}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
