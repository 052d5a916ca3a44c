"""Load and save a model larger than a protobuf message; print time and memory as JSON.

    python benchmarks/large_model.py --size-gb 2.5 --folder /tmp

Makes a chain of MatMul and Relu with random weights in an external file. Loads it, normalizes it,
saves it and opens a session, each in a process of its own so that the peak memory is that of the
one step, and removes the files. Of the peak, the anonymous part is memory of its own; the rest are
pages of mapped files, which the system can drop. The last step does the same with the onnx package
alone, for comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from onnxcompress import model_io, runtime

WIDTH = 8192


def make(path: Path, size_gb: float) -> int:
    """Write a chain of square MatMuls of about ``size_gb`` 10**9 bytes; return their number."""
    layers = max(1, math.ceil(size_gb * 1e9 / (4 * WIDTH * WIDTH)))
    data_path = path.with_name("weights.bin")
    rng = np.random.default_rng(0)
    nodes, tensors, name = [], [], "x"
    with data_path.open("wb") as file:
        for layer in range(layers):
            tensor = onnx.TensorProto(
                name=f"w{layer}",
                dims=[WIDTH, WIDTH],
                data_type=onnx.TensorProto.FLOAT,
                data_location=onnx.TensorProto.EXTERNAL,
            )
            fields = {
                "location": data_path.name,
                "offset": file.tell(),
                "length": 4 * WIDTH * WIDTH,
            }
            for key, value in fields.items():
                tensor.external_data.add(key=key, value=str(value))
            (rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / WIDTH).tofile(file)
            tensors.append(tensor)
            nodes.append(onnx.helper.make_node("MatMul", [name, f"w{layer}"], [f"m{layer}"]))
            nodes.append(onnx.helper.make_node("Relu", [f"m{layer}"], [f"r{layer}"]))
            name = f"r{layer}"
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "large",
        [info("x", onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        [info(name, onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        tensors,
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    )
    return layers


class PeakMemory:
    """Samples this process's resident memory, in bytes, every 5 ms while a ``with`` block runs."""

    def __init__(self) -> None:
        self.total = self.anonymous = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            fields = {k: v for k, _, v in (line.partition(":") for line in lines)}
            self.total = max(self.total, 1024 * int(fields["VmRSS"].split()[0]))
            self.anonymous = max(self.anonymous, 1024 * int(fields["RssAnon"].split()[0]))
            if self._stop.wait(0.005):
                return


def step(name: str, source: Path, target: Path) -> dict[str, float]:
    """Run one step in this process; return seconds and peak bytes above the start."""
    model = None if name in {"load", "onnx_load_and_save"} else model_io.load(source)
    actions: dict[str, Callable[[], object]] = {
        "load": lambda: model_io.load(source),
        "normalize": lambda: model_io.normalize(model) if model else None,
        "save": lambda: model_io.save(model, target) if model else None,
        "session": lambda: runtime.open_session(model) if model else None,
        "onnx_load_and_save": lambda: onnx.save(
            onnx.load(source), target, save_as_external_data=True, location="onnx.data"
        ),
    }
    with PeakMemory() as before:
        time.sleep(0.02)
    start = time.perf_counter()
    with PeakMemory() as peak:
        actions[name]()
    return {
        "seconds": round(time.perf_counter() - start, 3),
        "peak_rss_mib": round((peak.total - before.total) / 2**20, 1),
        "peak_anonymous_mib": round((peak.anonymous - before.anonymous) / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-gb", type=float, default=2.5, help="weights in 10**9 bytes")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files")
    parser.add_argument("--step", nargs=3, metavar=("NAME", "IN", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        name, source, target = arguments.step
        print(json.dumps(step(name, Path(source), Path(target))))
        return
    folder = Path(tempfile.mkdtemp(prefix="large-model-", dir=arguments.folder))
    try:
        source, target = folder / "in.onnx", folder / "out.onnx"
        layers = make(source, arguments.size_gb)
        result: dict[str, object] = {
            "weights_gb": round(layers * 4 * WIDTH * WIDTH / 1e9, 3),
            "layers": layers,
            "cores": os.cpu_count(),
        }
        for name in ("load", "normalize", "save", "session", "onnx_load_and_save"):
            command = [sys.executable, __file__, "--step", name, str(source), str(target)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result[name] = json.loads(done.stdout)
        print(json.dumps(result, indent=2))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
