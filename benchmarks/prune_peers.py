"""Structured pruning beside other tools, at equal MACs and without fine-tuning.

    python benchmarks/prune_peers.py --zoo PATH [--models a,b] [--keep 0.8,0.5]
        [--samples 512] [--json FILE] [--markdown FILE]

PATH holds ``zoo.py``, which prepares models and data and evaluates results independently of this
package. Tools: ours; onnxsim's ``apply_structured_pruning`` (weights) and
``apply_structured_wanda_pruning`` (weights times activations); Torch-Pruning with L2 magnitude and
with its LAMP criterion where ``torch``, ``torch_pruning`` and ``onnx2torch`` are installed (the
model is converted to torch, pruned and exported; where its dependency graph fails on a shortcut,
layers in front of an Add are left out). The pruning ratio of the others is bisected until the MACs
that are left are those asked for, or as near as the tool gets; MACs are counted by us for all.

Columns: MACs left; the task metric, agreement and SQNR against the original, by the judge; time of
the original / result on one thread at batch 1 and 8, both running in turns; seconds of pruning.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from _judge import Judge, Row, markdown, measure_apart

from onnxcompress import compress, model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.graph.cost import cost_of
from onnxcompress.interface import input_specs
from onnxcompress.verification.gates import Gates

Array = npt.NDArray[np.generic]

_STEPS = 8
"""Halvings of the interval of pruning ratios."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a tool is given.

    Attributes:
        model: The original.
        prepared: The same, normalized and simplified.
        samples: Samples, each a run's inputs.
        calibration: The file they come from.
        keep: Share of the MACs to keep.
        output: Where the result goes.
    """

    model: Path
    prepared: Path
    samples: Sequence[Mapping[str, Array]]
    calibration: Path
    keep: float
    output: Path


def _macs(path: Path) -> int:
    model = model_io.load(path)
    model_io.inline(model)
    return cost_of(model).macs


def _bisect(ratio_left: Callable[[float], float], keep: float) -> float:
    """The pruning ratio at which ``ratio_left`` of the MACs is nearest to ``keep``.

    Args:
        ratio_left: MACs left / MACs before at a pruning ratio of 0 to 1; falls with it.
        keep: What it should be.
    """
    low, high = 0.0, 0.95
    best, error = low, abs(1.0 - keep)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        left = ratio_left(middle)
        if abs(left - keep) < error:
            best, error = middle, abs(left - keep)
        low, high = (middle, high) if left > keep else (low, middle)
    return best


def ours(task: Task) -> float:
    result = compress(
        task.model,
        task.output,
        passes=["prune"],
        calib=task.calibration,
        eval=task.calibration,
        calib_samples=len(task.samples),
        eval_samples=16,
        options={"prune": {"macs": task.keep}},
        gates=Gates(enforced=False),
        measure=False,
    )
    return sum(taken for stage, taken in result.timings_s.items() if stage != "verify")


def _onnxsim(task: Task, prune: Callable[[float], onnx.ModelProto]) -> None:
    before = _macs(task.prepared)

    def left(ratio: float) -> float:
        onnx.save(prune(ratio), task.output)
        return _macs(task.output) / before

    onnx.save(prune(_bisect(left, task.keep)), task.output)


def onnxsim_l2(task: Task) -> None:
    import onnxsim

    model = onnx.load(task.prepared)
    _onnxsim(task, lambda ratio: onnxsim.apply_structured_pruning(model, sparsity=ratio))


def onnxsim_wanda(task: Task) -> None:
    import onnxsim

    model = onnx.load(task.prepared)
    samples = [dict(sample) for sample in task.samples[:64]]
    _onnxsim(
        task,
        lambda ratio: onnxsim.apply_structured_wanda_pruning(model, samples, sparsity=ratio),
    )


def _torch_pruning(task: Task, importance: str) -> None:
    import onnx2torch
    import torch
    import torch_pruning as tool

    network = onnx2torch.convert(str(task.prepared)).eval()
    example = {n: torch.from_numpy(np.array(a)) for n, a in task.samples[0].items()}
    inputs = tuple(example.values())

    def pruned(ratio: float, ignored: Sequence[str]) -> Any:
        made = copy.deepcopy(network)
        layers = dict(made.named_modules())
        kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
        weighted = [layer for layer in layers.values() if isinstance(layer, kinds)]
        tool.pruner.MagnitudePruner(
            made,
            inputs,
            importance=getattr(tool.importance, importance)(),
            global_pruning=True,
            max_pruning_ratio=0.9,
            pruning_ratio=ratio,
            ignored_layers=[weighted[-1], *(layers[name] for name in ignored)],
        ).step()
        made(*inputs)
        return made

    ignored: Sequence[str] = ()
    try:
        pruned(0.3, ignored)
    except (IndexError, RuntimeError):
        ignored = _before_additions(network)
    before, _ = tool.utils.count_ops_and_params(network, inputs)

    def left(ratio: float) -> float:
        macs, _ = tool.utils.count_ops_and_params(pruned(ratio, ignored), inputs)
        return float(macs / before)

    result = pruned(_bisect(left, task.keep), ignored)
    original = onnx.load(task.model, load_external_data=False).graph
    outputs = [value.name for value in original.output]
    batch = {name: {0: "N"} for name in (*example, *outputs)}
    torch.onnx.export(
        result,
        inputs,
        str(task.output),
        input_names=list(example),
        output_names=outputs,
        dynamic_axes=batch,
        dynamo=False,
    )


def _before_additions(network: Any) -> list[str]:
    """Names of the modules whose output goes into an Add, maybe through an activation."""
    found: set[str] = set()
    for node in network.graph.nodes:
        if node.op == "call_module" and "add" in node.name.lower():
            row = list(node.all_input_nodes)
            while row:
                source = row.pop()
                if source.op != "call_module":
                    continue
                found.add(str(source.target))
                if not hasattr(network.get_submodule(source.target), "weight"):
                    row.extend(source.all_input_nodes)
    return sorted(found)


TOOLS: Mapping[str, tuple[Sequence[str], Callable[[Task], float | None]]] = {
    "ours": (("onnxcompress",), ours),
    "onnxsim l2": (("onnxsim",), onnxsim_l2),
    "onnxsim wanda": (("onnxsim",), onnxsim_wanda),
    "torch-pruning l2": (
        ("torch", "torch_pruning", "onnx2torch"),
        lambda task: _torch_pruning(task, "GroupMagnitudeImportance"),
    ),
    "torch-pruning lamp": (
        ("torch", "torch_pruning", "onnx2torch"),
        lambda task: _torch_pruning(task, "LAMPImportance"),
    ),
}
"""Name to the modules that must be installed, and how to call the tool."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--zoo", required=True, type=Path, help="folder that holds zoo.py")
    parser.add_argument("--models", default="", help="comma-separated names (default: all)")
    parser.add_argument("--models-dir", type=Path, help="folder of prepared models")
    parser.add_argument("--tools", default="", help=f"of {','.join(TOOLS)} (default: all)")
    parser.add_argument("--keep", default="0.8,0.5", help="shares of the MACs to keep")
    parser.add_argument("--samples", type=int, default=512, help="calibration samples, at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="per speed measurement")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.models_dir or Path(scratch) / "zoo"
        judge = Judge(arguments.zoo.resolve(), folder.resolve())
        if arguments.worker:
            print(json.dumps(work(arguments, judge)))
            return
        wanted = [name for name in arguments.tools.split(",") if name] or list(TOOLS)
        tools = [n for n in wanted if all(map(importlib.util.find_spec, TOOLS[n][0]))]
        rows: list[Row] = []
        for model in [n for n in arguments.models.split(",") if n] or judge.names():
            prepared = Path(scratch) / f"{model}.prepared.onnx"
            compress(judge.prepare(model), prepared, passes=["simplify", "fold"], measure=False)
            for keep in map(float, arguments.keep.split(",")):
                rows += [measure(model, t, keep, prepared, arguments, judge) for t in tools]
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        table = markdown(rows, _COLUMNS)
        if arguments.markdown:
            arguments.markdown.write_text(table, encoding="utf-8")
        print(table)


def work(arguments: argparse.Namespace, judge: Judge) -> Row:
    """Let one tool prune one model in this process."""
    original = judge.prepare(arguments.models)
    path = original.with_suffix(".calib.npz")
    data = open_dataset(path, input_specs(model_io.load(original)), limit=arguments.samples)
    modules, tool = TOOLS[arguments.worker]
    for module in modules:
        importlib.import_module(module)
    task = Task(
        original,
        arguments.prepared,
        list(data.batches(1)),
        path,
        float(arguments.keep),
        arguments.output,
    )
    started = time.monotonic()
    seconds = tool(task) or time.monotonic() - started
    left = _macs(arguments.output) / max(_macs(arguments.prepared), 1)
    return {"seconds": round(seconds, 1), "macs_left": round(left, 3)}


def measure(
    model: str,
    tool: str,
    keep: float,
    prepared: Path,
    arguments: argparse.Namespace,
    judge: Judge,
) -> Row:
    """One row: prune in a process of its own, then evaluate and time the result."""
    command = [str(Path(__file__).resolve()), "--zoo", str(arguments.zoo.resolve())]
    command += ["--models-dir", str(judge.folder), "--models", model, "--worker", tool]
    command += ["--samples", str(arguments.samples), "--keep", str(keep)]
    command += ["--prepared", str(prepared)]
    row: Row = {"model": model, "tool": tool, "keep": keep}
    row = measure_apart(row, command, judge, seconds=arguments.seconds, threads=(1,))
    print(markdown([row], _COLUMNS).splitlines()[-1], file=sys.stderr, flush=True)
    return row


_COLUMNS: Sequence[tuple[str, str, str]] = (
    ("MACs asked", "keep", ".2f"),
    ("MACs left", "macs_left", ".3f"),
    ("before", "reference_value", ".4g"),
    ("after", "value", ".4g"),
    ("agreement", "agreement", ".3f"),
    ("SQNR dB", "sqnr_db", ".1f"),
    ("b1", "speed_b1_t1", ".2f"),
    ("b8", "speed_b8_t1", ".2f"),
    ("seconds", "seconds", ".0f"),
)


if __name__ == "__main__":
    main()
