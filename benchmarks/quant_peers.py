"""Int8 quantization beside other tools, on the same models, samples and machine, in one run.

    python benchmarks/quant_peers.py --zoo PATH [--models a,b] [--tools ours,ort-u8s8]
        [--samples 128] [--json FILE] [--markdown FILE]

PATH holds ``zoo.py``, which prepares models and data and evaluates results independently of this
package. Tools that are not installed are left out: onnxruntime is always there; ``pip install
nncf``, ``onnx-neural-compressor`` or ``amd-quark`` in the same environment adds theirs. Every tool
gets the same calibration samples, one by one, in a process of its
own, whose peak memory and time (without imports, and without our comparison of the result with the
original, which the others do not make) are measured. We take the model as it is in its file; the
others get a copy raised to opset 13, below which they refuse or write files that do not load.

Columns: the task metric, the share of equal top classes and the SQNR against float, by the judge;
file size of float / result; time of float / result at batch 1 and 8 on one thread (processor time)
and two threads (wall clock), both models running in turns; seconds (wall clock), processor time (of
ours with the verification on 16 samples) and peak memory of compressing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from _judge import Judge, Row, markdown, measure_apart

from onnxcompress import compress, model_io
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.interface import input_specs
from onnxcompress.verification.gates import Gates

Array = npt.NDArray[np.generic]


class Reader:
    """Samples one by one, in the form that onnxruntime's quantizer and its relatives read.

    Args:
        samples: The calibration samples.
    """

    def __init__(self, samples: Sequence[Mapping[str, Array]]) -> None:
        self._samples = samples
        self.rewind()

    def rewind(self) -> None:
        """Start again."""
        self._left = iter(self._samples)

    def get_next(self) -> dict[str, Array] | None:
        """The next sample; None behind the last."""
        sample = next(self._left, None)
        return None if sample is None else dict(sample)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        self.rewind()
        return (dict(sample) for sample in self._samples)

    def __len__(self) -> int:
        return len(self._samples)


@dataclass(frozen=True, slots=True)
class Task:
    """What a tool is given.

    Attributes:
        model: The float model.
        samples: Calibration samples, each a run's inputs.
        calibration: The file they come from.
        output: Where the result goes.
        scratch: A folder for temporary files.
    """

    model: Path
    samples: Sequence[Mapping[str, Array]]
    calibration: Path
    output: Path
    scratch: Path


def ours(task: Task) -> float:
    """Our quant pass with its defaults; gives the seconds without the verification."""
    result = compress(
        task.model,
        task.output,
        passes=["quant"],
        calib=task.calibration,
        eval=task.calibration,
        calib_samples=len(task.samples),
        eval_samples=16,
        gates=Gates(enforced=False),
        measure=False,
    )
    return sum(taken for stage, taken in result.timings_s.items() if stage != "verify")


def _raised(task: Task) -> Path:
    """The model at opset 13 or later, with shapes inferred, as onnxruntime's tool asks for."""
    model = onnx.load(task.model)
    opset = next(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"})
    if opset < 13:
        model = onnx.version_converter.convert_version(model, 13)
    raised = task.scratch / "raised.onnx"
    onnx.save(model, raised)
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = task.scratch / "prepared.onnx"
    try:
        quant_pre_process(str(raised), str(prepared), skip_symbolic_shape=True)
    except Exception as error:  # noqa: BLE001 - the tool says that it is optional
        logging.warning("quant_pre_process failed: %s", error)
        return raised
    return prepared


def _ort_static(task: Task, **options: Any) -> None:
    from onnxruntime.quantization import QuantFormat, quantize_static

    quantize_static(
        str(_raised(task)),
        str(task.output),
        Reader(task.samples),
        quant_format=QuantFormat.QDQ,
        **options,
    )


def ort_default(task: Task) -> None:
    _ort_static(task)


def ort_u8s8(task: Task) -> None:
    from onnxruntime.quantization import QuantType

    _ort_static(
        task, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
    )


def ort_matmul(task: Task) -> None:
    """For transformers: only products and embeddings, as its documentation advises."""
    from onnxruntime.quantization import QuantType

    _ort_static(
        task,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gather"],
    )


def ort_dynamic(task: Task) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(_raised(task)), str(task.output), per_channel=True, weight_type=QuantType.QInt8
    )


def nncf(task: Task) -> None:
    import nncf as tool

    model = onnx.load(_raised(task))
    computed = {name for node in model.graph.node for name in node.output}
    attends = sum(n.op_type == "MatMul" and computed.issuperset(n.input) for n in model.graph.node)
    extra = {"model_type": tool.ModelType.TRANSFORMER} if attends > 1 else {}
    data = tool.Dataset(list(task.samples))
    made = tool.quantize(
        model, data, preset=tool.QuantizationPreset.MIXED, subset_size=len(task.samples), **extra
    )
    onnx.save(made, task.output)


def neural_compressor(task: Task) -> None:
    from onnx_neural_compressor import data_reader
    from onnx_neural_compressor.quantization import config, quantize

    class Adapter(Reader, data_reader.CalibrationDataReader):  # type: ignore[misc]
        """The same samples under the tool's own base class."""

    settings = config.StaticQuantConfig(
        calibration_data_reader=Adapter(task.samples),
        per_channel=True,
        calibration_sampling_size=len(task.samples),
    )
    quantize(str(_raised(task)), str(task.output), settings)


def quark(task: Task) -> None:
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config import Config, get_default_config

    settings = Config(global_quant_config=get_default_config("U8S8_AAWS"))
    ModelQuantizer(settings).quantize_model(
        str(_raised(task)), str(task.output), Reader(task.samples)
    )


TOOLS: Mapping[str, tuple[str, Callable[[Task], float | None]]] = {
    "ours": ("onnxcompress", ours),
    "ort-default": ("onnxruntime", ort_default),
    "ort-u8s8": ("onnxruntime", ort_u8s8),
    "ort-matmul": ("onnxruntime", ort_matmul),
    "ort-dynamic": ("onnxruntime", ort_dynamic),
    "nncf": ("nncf", nncf),
    "neural-compressor": ("onnx_neural_compressor", neural_compressor),
    "quark": ("quark", quark),
}
"""Name to the module that must be installed, and how to call the tool."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--zoo", required=True, type=Path, help="folder that holds zoo.py")
    parser.add_argument("--models", default="", help="comma-separated names (default: all)")
    parser.add_argument("--models-dir", type=Path, help="folder of prepared models")
    parser.add_argument("--tools", default="", help=f"of {','.join(TOOLS)} (default: all)")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--seconds", type=float, default=3.0, help="per speed measurement")
    parser.add_argument("--timeout", type=int, default=1800, help="most seconds for one result")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.models_dir or Path(scratch) / "zoo"
        judge = Judge(arguments.zoo.resolve(), folder.resolve())
        if arguments.worker:
            print(json.dumps(work(arguments, judge, Path(scratch))))
            return
        wanted = [name for name in arguments.tools.split(",") if name] or list(TOOLS)
        tools = [n for n in wanted if importlib.util.find_spec(TOOLS[n][0]) is not None]
        rows: list[Row] = []
        for model in [n for n in arguments.models.split(",") if n] or judge.names():
            rows += [measure(model, tool, arguments, judge) for tool in tools]
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        table = markdown(rows, _COLUMNS)
        if arguments.markdown:
            arguments.markdown.write_text(table, encoding="utf-8")
        print(table)


def _data(original: Path, samples: int) -> tuple[Path, Dataset]:
    path = original.with_suffix(".calib.npz")
    model = model_io.load(original)
    return path, open_dataset(path, input_specs(model), limit=samples)


def work(arguments: argparse.Namespace, judge: Judge, scratch: Path) -> Row:
    """Let one tool compress one model in this process."""
    original = judge.prepare(arguments.models)
    path, data = _data(original, arguments.samples)
    samples = list(data.batches(1))
    module, tool = TOOLS[arguments.worker]
    importlib.import_module(module)
    task = Task(original, samples, path, arguments.output, scratch)
    started, computed = time.monotonic(), time.process_time()
    seconds = tool(task) or time.monotonic() - started
    computed = time.process_time() - computed
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(computed, 2),
        "peak_bytes": peak * 1024,
    }


def measure(model: str, tool: str, arguments: argparse.Namespace, judge: Judge) -> Row:
    """One row: compress in a process of its own, then evaluate and time the result."""
    command = [str(Path(__file__).resolve()), "--zoo", str(arguments.zoo.resolve())]
    command += ["--models-dir", str(judge.folder), "--models", model, "--worker", tool]
    command += ["--samples", str(arguments.samples)]
    row = measure_apart(
        {"model": model, "tool": tool},
        command,
        judge,
        seconds=arguments.seconds,
        timeout_seconds=arguments.timeout,
    )
    peak = row.get("peak_bytes")
    if isinstance(peak, int):
        row["peak_gb"] = peak / 1e9
    print(markdown([row], _COLUMNS).splitlines()[-1], file=sys.stderr, flush=True)
    return row


_COLUMNS: Sequence[tuple[str, str, str]] = (
    ("float", "reference_value", ".4g"),
    ("int8", "value", ".4g"),
    ("agreement", "agreement", ".4f"),
    ("SQNR dB", "sqnr_db", ".1f"),
    ("size", "size_ratio", ".2f"),
    ("b1 t1", "speed_b1_t1", ".2f"),
    ("b8 t1", "speed_b8_t1", ".2f"),
    ("b1 t2", "speed_b1_t2", ".2f"),
    ("b8 t2", "speed_b8_t2", ".2f"),
    ("seconds", "seconds", ".1f"),
    ("CPU s", "cpu_seconds", ".1f"),
    ("peak GB", "peak_gb", ".2f"),
)


if __name__ == "__main__":
    main()
