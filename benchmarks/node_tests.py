"""Every node test of ONNX through the coupling analysis: no crash, no wrong result.

    python benchmarks/node_tests.py [--only TEXT] [--json OUT.json]

Each test runs twice: as it is, and rebuilt so that every axis may carry channels (float inputs
become weights, outputs are weighted and summed). Wherever units are found, 50 % and all but one of
every group go, heads and head dimensions, and the pruned model is compared with the masked one.
The tests come with the installed onnx package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from onnxcompress import model_io  # noqa: E402
from onnxcompress.errors import OnnxCompressError  # noqa: E402
from onnxcompress.graph import canonical, labels  # noqa: E402
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
    found = False
    for policy in ("heads", "head_dims"):
        coupling = labels.analyse(model, reshape_policy=policy)
        found = found or bool(coupling.groups)
        for seed, fraction in enumerate((0.5, 1.0)):
            removed = law.removal(coupling, fraction, seed)
            error = law.law_error(model, coupling, removed, feeds)
            if error > TOLERANCE:
                return f"WRONG by {error:.1e} ({policy}, {fraction:.0%})"
    return "pruned" if found else "nothing to prune"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="tests whose name holds this text")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, str] = {}
    for case in operator_cases(single=False):
        if arguments.only not in case.name:
            continue
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
    print(Counter(r.split(" by ")[0].split(":")[0] for r in results.values()).most_common())
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
