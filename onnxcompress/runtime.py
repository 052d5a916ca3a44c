"""Run models in onnxruntime: sessions, what it makes of a graph, latency and profiles.

Sessions are built in ``_session`` and nowhere else.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnxcompress._latency import Latency, compare_latency
from onnxcompress._serialize import ONE_FILE_BYTES, tensor_bytes
from onnxcompress._session import (
    MAX_IR_VERSION,
    Array,
    Optimization,
    Session,
    SessionSettings,
    open_session,
    reads_opset,
    resolve_providers,
    unknown_operators,
)

__all__ = [
    "MAX_IR_VERSION",
    "Array",
    "Latency",
    "NodeTime",
    "Optimization",
    "Session",
    "SessionSettings",
    "compare_latency",
    "open_session",
    "optimized_graph",
    "profile_nodes",
    "reads_opset",
    "resolve_providers",
    "unknown_operators",
]


def optimized_graph(
    model: ir.Model, settings: SessionSettings | None = None, work_dir: Path | None = None
) -> ir.Model:
    """The graph that onnxruntime really executes, with its fused and contrib operators.

    Args:
        model: The model.
        settings: The optimization level and providers decide what is fused.
        work_dir: Where the file is written; weights of more than 1.9 GB stay mapped from there, so
            keep the folder as long as the graph. A temporary folder when None, for smaller models.

    Raises:
        ModelError: If onnxruntime does not load the model, or it is large and has no ``work_dir``.
    """
    big = tensor_bytes(model, external=True) > ONE_FILE_BYTES
    if work_dir is None:
        with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
            return _optimized(model, settings, Path(folder), external=False)
    return _optimized(model, settings, Path(tempfile.mkdtemp(dir=work_dir)), external=big)


def _optimized(
    model: ir.Model, settings: SessionSettings | None, folder: Path, *, external: bool
) -> ir.Model:
    path = folder / "optimized.onnx"

    def configure(options: ort.SessionOptions) -> None:
        options.optimized_model_filepath = str(path)
        if external:
            key = "session.optimized_model_external_initializers"
            options.add_session_config_entry(f"{key}_file_name", "optimized.data")
            options.add_session_config_entry(f"{key}_min_size_in_bytes", "1024")

    open_session(model, settings, work_dir=folder, configure=configure)
    optimized = ir.from_proto(onnx.load_model(path, "protobuf", load_external_data=False))
    ir.external_data.set_base_dir(optimized.graph, str(folder))
    return optimized


@dataclass(frozen=True, slots=True)
class NodeTime:
    """How long one node of the optimized graph takes.

    Attributes:
        node: Its name, which onnxruntime derives from the original one where it fuses.
        op_type: Its operator in the optimized graph.
        time_ms: Median over the runs of the time in its kernel, in milliseconds.
        share_ratio: Its part of the sum over all nodes, 0 to 1.
    """

    node: str
    op_type: str
    time_ms: float
    share_ratio: float


def profile_nodes(
    model: ir.Model | Path,
    feeds: Mapping[str, Array],
    settings: SessionSettings | None = None,
    *,
    runs: int = 20,
    work_dir: Path | None = None,
) -> tuple[NodeTime, ...]:
    """Time every node with onnxruntime's profiler, slowest first.

    Profiling adds a few microseconds to each node: the shares of very small models are flatter
    than the truth.

    Args:
        model: A graph, or a file.
        feeds: Inputs of one run.
        settings: How to run.
        runs: Timed runs, after two that are not counted.
        work_dir: Where a temporary folder may be made.

    Raises:
        ModelError: If the model cannot be loaded or run.
    """
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="profile-") as folder:

        def configure(options: ort.SessionOptions) -> None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")

        session = open_session(model, settings, work_dir=work_dir, configure=configure)
        warmup = 2
        for _ in range(warmup + runs):
            session.run(feeds)
        events = json.loads(session.end_profiling().read_text())
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            times[key].append(event["dur"] / 1000)
    return _shares(times, warmup, runs)


def _shares(
    times: Mapping[tuple[str, str], list[float]], warmup: int, runs: int
) -> tuple[NodeTime, ...]:
    """Nodes in loops run several times per run: their times are summed per run."""
    means: dict[tuple[str, str], float] = {}
    for key, values in times.items():
        per_run = max(1, len(values) // (warmup + runs))
        kept = values[per_run * warmup :] or values
        totals = sorted(
            sum(kept[start : start + per_run]) for start in range(0, len(kept), per_run)
        )
        means[key] = totals[len(totals) // 2]
    whole = sum(means.values()) or 1.0
    ordered = sorted(means.items(), key=lambda item: -item[1])
    return tuple(NodeTime(node, op, time, time / whole) for (node, op), time in ordered)
