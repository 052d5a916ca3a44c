"""Does the memory of calibration grow with the number of samples? It must not.

Collects ranges, tails, histograms and moments of every convolution and matrix product, each number
of samples in a process of its own, and compares the peak resident memory. Without a model it
generates a small CNN and its data.

    python -m benchmarks.memory --samples 32 512
    python -m benchmarks.memory --model net.onnx --calib net.calib.npz --json out.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.collector import collect
from onnxcompress.calibration.geometry import unfold_of
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.calibration.statistics import (
    HistogramRequest,
    MeanRequest,
    MomentsRequest,
    RangeRequest,
    Request,
    Statistics,
    TailRequest,
)
from onnxcompress.graph.constants import constant_of
from onnxcompress.interface import input_specs
from onnxcompress.progress import SilentProgress
from onnxcompress.runtime import SessionSettings

TARGET_RATIO = 1.1


def generate(folder: Path, samples: int) -> tuple[Path, Path]:
    """Write a CNN of six convolutions on 3 x 64 x 64 inputs, and its data."""
    random = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 3, 64, 64]))
    nodes, initializers, value, width = [], [], x, 3
    for i, (channels, stride) in enumerate([(16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)]):
        scale = (2 / (9 * width)) ** 0.5
        kernel = (random.standard_normal((channels, width, 3, 3)) * scale).astype(np.float32)
        weight = ir.Value(name=f"w{i}", const_value=ir.tensor(kernel, name=f"w{i}"))
        attributes = {"pads": [1, 1, 1, 1], "strides": [stride, stride]}
        conv = ir.node("Conv", [value, weight], attributes=attributes, name=f"conv{i}")
        relu = ir.node("Relu", [conv.outputs[0]], name=f"relu{i}")
        nodes += [conv, relu]
        initializers.append(weight)
        value, width = relu.outputs[0], channels
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", 64, 16, 16])
    graph = ir.Graph(
        [x], [value], nodes=nodes, initializers=initializers, opset_imports={"": 13}, name="cnn"
    )
    model_path, data_path = folder / "cnn.onnx", folder / "cnn.calib.npz"
    model_io.save(ir.Model(graph, ir_version=8), model_path)
    np.savez(data_path, x=random.standard_normal((samples, 3, 64, 64), dtype=np.float32))
    return model_path, data_path


def measure(model_path: Path, data_path: Path, samples: int, batch_size: int) -> dict[str, float]:
    """Collect everything in this process.

    Returns:
        ``samples``, ``peak_rss_mib`` and ``seconds``.
    """
    model = model_io.load(model_path)
    model_io.normalize(model)
    dataset = open_dataset(data_path, input_specs(model), limit=samples)
    if dataset.sample_count < samples:
        raise SystemExit(f"'{data_path}' has only {dataset.sample_count} samples, not {samples}")
    layers = [
        node
        for node in model.graph
        if node.op_type in {"Conv", "Gemm", "MatMul"} and constant_of(node.inputs[0]) is None
    ]
    started = time.perf_counter()
    requests: list[Request] = []
    for node in layers:
        name = node.inputs[0].name or "" if node.inputs[0] else ""
        requests += [
            RangeRequest(name),
            TailRequest(name, 1e-4),
            HistogramRequest(name, max_elements=1 << 21),
            MomentsRequest(name, unfold_of(node), max_rows=4096),
            MeanRequest(node.outputs[0].name or "", 1 if node.op_type == "Conv" else -1),
        ]
    _collect(model, requests, dataset, batch_size)
    return {
        "samples": dataset.sample_count,
        "peak_rss_mib": round(_peak_mib(), 1),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _collect(
    model: ir.Model, requests: list[Request], dataset: Dataset, batch_size: int
) -> Statistics:
    with tempfile.TemporaryDirectory() as folder:
        return collect(
            model,
            requests,
            dataset,
            settings=SessionSettings(),
            batch_size=batch_size,
            seed=0,
            work_dir=Path(folder),
            progress=SilentProgress(),
            description="measuring",
        )


def _peak_mib() -> float:
    """Peak resident memory of this process, MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage's, this peak does not start from that of the parent process.
        for line in status.read_text(encoding="utf8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def compare(
    model_path: Path, data_path: Path, samples: list[int], batch_size: int
) -> dict[str, object]:
    """Measure each number of samples in a fresh process."""
    runs = []
    for count in samples:
        command = [sys.executable, "-m", "benchmarks.memory", "--child", "--samples", str(count)]
        command += ["--model", str(model_path), "--calib", str(data_path)]
        command += ["--batch-size", str(batch_size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
        print("{samples:6d} samples: {peak_rss_mib:8.1f} MiB, {seconds:7.2f} s".format(**runs[-1]))
    ratio = runs[-1]["peak_rss_mib"] / runs[0]["peak_rss_mib"]
    return {"model": model_path.name, "runs": runs, "ratio": round(ratio, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.model is None) != (args.calib is None):
        parser.error("--model and --calib go together")
    if args.child:
        print(json.dumps(measure(args.model, args.calib, args.samples[0], args.batch_size)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model, calib = args.model, args.calib
        if model is None:
            model, calib = generate(Path(folder), max(args.samples))
        figures = compare(model, calib, args.samples, args.batch_size)
    print(f"peak memory ratio {figures['ratio']} (target at most {TARGET_RATIO})")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf8")
    return 0 if float(str(figures["ratio"])) <= TARGET_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
