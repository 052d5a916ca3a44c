"""Every node test of ONNX through the coupling analysis: no crash, no wrong result.

    python benchmarks/node_tests.py [--only TEXT] [--jobs N] [--json OUT.json]

Each test runs twice: as it is, and rebuilt so that every axis may carry channels (float inputs
become weights, outputs are weighted and summed). Wherever units are found, 50 % and all but one of
every group go, heads and head dimensions, and the pruned model is compared with the masked one.
The tests come with the installed onnx package; ``--jobs`` processes (one per core) share them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from onnxcompress import model_io  # noqa: E402
from onnxcompress.errors import OnnxCompressError  # noqa: E402
from onnxcompress.graph import canonical, labels  # noqa: E402
from onnxcompress.graph.coupling import Coupling  # noqa: E402
from tests.graph import law  # noqa: E402
from tests.graph.operators import as_network, operator_cases  # noqa: E402

Array = npt.NDArray[np.generic]
TOLERANCE = 1e-5


def outcome(model: ir.Model, feeds: Mapping[str, Array]) -> str:
    """What became of one model: "pruned", "nothing to prune", or why it was left out."""
    try:
        model_io.normalize(model)
        before = law.outputs(model, feeds)
    except OnnxCompressError:
        return "not run by onnxruntime"
    canonical.canonicalize(model)
    if law.error(before, law.outputs(model, feeds)) > TOLERANCE:
        return "WRONG after canonicalization"
    seen: list[Coupling] = []
    for policy in ("heads", "head_dims"):
        coupling = labels.analyse(model, reshape_policy=policy)
        if any(_alike(coupling, other) for other in seen):
            continue
        seen.append(coupling)
        for seed, fraction in enumerate((0.5, 1.0)):
            removed = law.removal(coupling, fraction, seed)
            error = law.law_error(model, coupling, removed, feeds)
            if error > TOLERANCE:
                return f"WRONG by {error:.1e} ({policy}, {fraction:.0%})"
    return "pruned" if any(c.groups for c in seen) else "nothing to prune"


def _alike(one: Coupling, other: Coupling) -> bool:
    """Whether two analyses found the same units, so that the same would be pruned again."""
    if len(one.groups) != len(other.groups):
        return False
    for a, b in zip(one.groups, other.groups, strict=True):
        places = [(c.initializer, c.axis) for c in a.cuts]
        if places != [(c.initializer, c.axis) for c in b.cuts]:
            return False
        if not all(
            np.array_equal(c.indices, d.indices) for c, d in zip(a.cuts, b.cuts, strict=True)
        ):
            return False
    return True


def results_of(share: int, shares: int, only: str) -> dict[str, str]:
    """Outcome by name of every ``shares``-th test, from number ``share`` on."""
    results: dict[str, str] = {}
    cases = (c for c in operator_cases(single=False) if only in c.name)
    for case in itertools.islice(cases, share, None, shares):
        if case.model is None or not case.data_sets:
            continue
        names = [i.name for i in case.model.graph.input]
        plain = dict(zip(names, case.data_sets[0][0], strict=False))
        network = as_network(case)
        forms = [("", ir.from_proto(case.model), plain)]
        if network is not None:
            forms.append(("/network", network, {"zero": np.array(0.25, np.float32)}))
        for suffix, model, feeds in forms:
            name = case.name + suffix
            try:
                results[name] = outcome(model, feeds)
            except Exception as error:  # noqa: BLE001 - any crash is what this looks for
                results[name] = f"CRASH {type(error).__name__}: {str(error)[:200]}"
            if results[name].startswith(("WRONG", "CRASH")):
                print(name, results[name], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="tests whose name holds this text")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    jobs = arguments.jobs or os.cpu_count() or 1
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(results_of, i, jobs, arguments.only) for i in range(jobs)]
        results = {name: r for future in futures for name, r in future.result().items()}
    print(Counter(r.split(" by ")[0].split(":")[0] for r in results.values()).most_common())
    print(f"{len(results)} models in {time.monotonic() - started:.0f} s, {jobs} processes")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
