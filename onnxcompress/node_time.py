"""Which nodes of a model take the time: onnxruntime's profile, told in the nodes of the file.

onnxruntime fuses nodes and renames them. A node of the graph it executes is traced back

1. by its own name, or by the name before ``_nchwc`` (there onnxruntime writes the name of a node,
   or of the value that it computes);
2. by a value that it computes and the file has, too.

The node found may be the last one of several that were fused (the Relu behind a Conv): the time
goes to the nearest node before it of the executed operator. What cannot be traced (changes of the
memory layout) is kept apart. Control flow is left out: the nodes inside are timed by themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxcompress import runtime
from onnxcompress.runtime import Array, NodeTime, SessionSettings

_BLOCKED = "_nchwc"
"""What onnxruntime appends where it makes a node work on blocks of channels."""

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})

_LAYOUT = frozenset({"ReorderInput", "ReorderOutput"})
"""What onnxruntime adds around nodes that work on blocks of channels."""

_REACH = 6
"""At most so many nodes lie between a contraction and the last node fused into it."""


@dataclass(frozen=True, slots=True)
class TimeShares:
    """How the time of one run is shared out.

    Attributes:
        nodes: Name of a node of the file to its share of the time, 0 to 1; slowest first.
        elsewhere_ratio: Share of what onnxruntime added by itself, 0 to 1.
        run_ms: Time in kernels of one run, in milliseconds, with the overhead of the profiler.
    """

    nodes: Mapping[str, float]
    elsewhere_ratio: float
    run_ms: float


def time_shares(
    model: ir.Model,
    feeds: Mapping[str, Array],
    settings: SessionSettings,
    *,
    work_dir: Path,
    runs: int = 20,
) -> TimeShares:
    """Measure the share of every node of ``model`` in the time of one run.

    Args:
        model: A model with unique node names; it is not changed.
        feeds: Inputs of one run.
        settings: How to run.
        work_dir: Where temporary files may be made.
        runs: Timed runs.

    Raises:
        ModelError: If the model cannot be loaded or run.
    """
    times = runtime.profile_nodes(model, feeds, settings, runs=runs, work_dir=work_dir)
    executed = runtime.optimized_graph(model, settings, work_dir)
    return attribute(model, executed, times)


def attribute(model: ir.Model, executed: ir.Model, times: tuple[NodeTime, ...]) -> TimeShares:
    """Give the times of executed nodes to the nodes of ``model``.

    Args:
        model: The model as it is in its file.
        executed: The graph that onnxruntime made of it.
        times: Times of the executed nodes.
    """
    nodes = {node.name: node for node in model.graph.all_nodes() if node.name}
    makers = {v.name: n for n in nodes.values() for v in n.outputs if v.name}
    made = {
        node.name: [v.name for v in node.outputs if v.name]
        for node in executed.graph.all_nodes()
        if node.name
    }
    shares: defaultdict[str, float] = defaultdict(float)
    elsewhere = 0.0
    times = tuple(time for time in times if time.op_type not in _CONTROL_FLOW)
    run_ms = sum(time.time_ms for time in times)
    for time in times:
        share = time.time_ms / run_ms if run_ms else 0.0
        plain = time.node.removesuffix(_BLOCKED)
        found = nodes.get(time.node) or nodes.get(plain) or makers.get(plain)
        if found is None and time.op_type not in _LAYOUT:
            by_value = [makers[name] for name in made.get(time.node, ()) if name in makers]
            found = by_value[0] if by_value else None
        if found is None:
            elsewhere += share
        else:
            shares[_principal(found, time.op_type).name or ""] += share
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return TimeShares(ordered, elsewhere, run_ms)


def _principal(last: ir.Node, executed: str) -> ir.Node:
    """The node of the executed operator at or shortly before ``last``, else ``last``."""
    row = [last]
    for _ in range(_REACH):
        for node in row:
            if _same(node.op_type, executed):
                return node
        row = [
            producer
            for node in row
            for value in node.inputs
            if value is not None and (producer := value.producer()) is not None
        ]
    return last


def _same(written: str, executed: str) -> bool:
    """Whether ``executed`` is ``written`` or a fused or integer form of it."""
    return written == executed or executed in {
        f"Fused{written}",
        f"QLinear{written}",
        f"{written}Integer",
        f"{written}IntegerToFloat",
        f"Dynamic{written}",
        f"DynamicQuantize{written}",
        f"Q{written}",
    }
