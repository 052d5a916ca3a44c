"""What a model file weighs: bytes, parameters, MACs, peak memory, load time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.graph.cost import cost_of
from onnxcompress.runtime import SessionSettings, open_session
from onnxcompress.verification.metrics import Array

_LEAST_LOADS, _MOST_LOADS = 2, 9
_LOAD_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a model file weighs.

    Attributes:
        raw_bytes: Size of the file with its external data.
        deflated_bytes: The same after DEFLATE, as in a zip, wheel or app package.
        weight_bytes: Bytes of all constants.
        parameters: Elements of all weights, each shared one once.
        macs: Multiply-accumulates of one sample.
        nodes: Nodes in the graph, subgraphs included.
        opset: Version of the default operator set.
        peak_memory_bytes: What loading and running the model adds to the peak memory of a process;
            None when it was not measured.
        load_ms: Median time to open the file in onnxruntime, in milliseconds; it depends on the
            machine's load. None when it was not measured.
    """

    raw_bytes: int
    deflated_bytes: int
    weight_bytes: int
    parameters: int
    macs: int
    nodes: int
    opset: int | None
    peak_memory_bytes: int | None = None
    load_ms: float | None = None


def weigh(
    path: Path,
    model: ir.Model,
    feeds: Mapping[str, Array],
    *,
    peak_memory_bytes: int | None = None,
    load_ms: float | None = None,
) -> Footprint:
    """Weigh a model file.

    Args:
        path: The file.
        model: The same model, loaded.
        feeds: Inputs of one sample; dynamic axes take their lengths from it.
        peak_memory_bytes: From :func:`peak_memory`.
        load_ms: From :func:`load_times`.
    """
    sizes = model_io.file_sizes(path)
    cost = cost_of(model, {name: array.shape for name, array in feeds.items()})
    return Footprint(
        raw_bytes=sizes.raw_bytes,
        deflated_bytes=sizes.deflated_bytes,
        weight_bytes=cost.weight_bytes,
        parameters=cost.parameters,
        macs=cost.macs,
        nodes=sum(1 for _ in model.graph.all_nodes()),
        opset=model.opset_imports.get(""),
        peak_memory_bytes=peak_memory_bytes,
        load_ms=load_ms,
    )


def load_times(paths: Sequence[Path], settings: SessionSettings) -> dict[Path, float]:
    """Median time to open each file, in milliseconds; the files take turns.

    Opening includes what onnxruntime computes once, such as weights from codes.

    Args:
        paths: Model files that load.
        settings: How to open them.
    """
    taken: dict[Path, list[float]] = {path: [] for path in paths}
    stop = time.monotonic() + _LOAD_SECONDS
    for turn in range(_MOST_LOADS):
        if turn >= _LEAST_LOADS and time.monotonic() > stop:
            break
        for path in paths if turn % 2 == 0 else reversed(paths):
            start = time.perf_counter()
            open_session(path, settings)
            taken[path].append(1000 * (time.perf_counter() - start))
    return {path: median(times) for path, times in taken.items()}


def peak_memory(
    path: Path, feeds: Mapping[str, Array], settings: SessionSettings, work_dir: Path
) -> int | None:
    """Bytes that loading and running a model add to the peak memory of a fresh process.

    A process of its own is the only honest way: memory of an earlier model in the same process
    would be reused or still be held.

    Args:
        path: The model.
        feeds: Inputs of one sample.
        settings: How to run it.
        work_dir: Where the inputs are put for the other process.

    Returns:
        Bytes; None where the system does not tell, or the model does not run in a process of its
        own.
    """
    if any(array.dtype.kind not in "biuf" for array in feeds.values()):
        return None
    inputs = work_dir / "peak_memory_inputs.npz"
    np.savez(
        inputs, *feeds.values()
    )  # by position: an input may have any name, savez takes not all
    request = json.dumps(
        {
            "model": str(path.resolve()),
            "inputs": str(inputs),
            "names": list(feeds),
            "providers": settings.providers,
            "threads": settings.threads,
        }
    )
    command = [sys.executable, "-m", "onnxcompress.verification.measure_memory", request]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(  # noqa: S603 - our own interpreter and module
        command, capture_output=True, text=True, check=False, cwd=root
    )
    answer = done.stdout.strip()
    return int(answer) if done.returncode == 0 and answer.isdigit() else None
