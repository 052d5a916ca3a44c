"""A look into one model: interface, operators, cost, and which channels can be pruned together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxcompress import model_io
from onnxcompress.calibration.sources import DataSource
from onnxcompress.graph.cost import NodeCost, cost_of
from onnxcompress.groups import CoupledGroup, CouplingSummary, FrozenReason, summarize
from onnxcompress.interface import TensorSpec, input_specs, output_specs
from onnxcompress.node_time import TimeShares, time_shares
from onnxcompress.output import scratch
from onnxcompress.progress import Progress, SilentProgress
from onnxcompress.runtime import SessionSettings
from onnxcompress.savings import Savings, savings_of
from onnxcompress.selection import evaluation_data
from onnxcompress.targets import target_by_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What is in a model.

    Attributes:
        path: The file.
        inputs: What has to be fed.
        outputs: What comes out.
        ir_version: ONNX IR version.
        opsets: Operator set domain ("" is the default one) to version.
        producer: Tool that wrote the file.
        compressed_by: What onnxcompress wrote into the file, if it made it.
        operators: Operator to number of nodes, most frequent first.
        nodes: Number of nodes, subgraphs included.
        raw_bytes: Size of the file with its external data.
        deflated_bytes: The same after DEFLATE.
        weight_bytes: Bytes of all constants.
        parameters: Elements of all weights.
        macs: Multiply-accumulates of one sample, dynamic axes as 1.
        uncounted: Nodes whose MACs could not be counted.
        top_nodes: The nodes that take the most time, where it was measured, else those with the
            most MACs (then parameters), largest first.
        coverage: Share of the MACs in nodes that pruning can make cheaper; None when not asked for.
        groups: Coupled channels, largest share of MACs first; None when they were not asked for.
        frozen: What keeps the other channels, largest share of MACs first; None when it was not
            asked for.
        untouched: Nodes with MACs that pruning cannot make cheaper, most expensive first.
        states: Outputs that carry states whose cells may go; they are written as zeros.
        top: How many nodes, groups and reasons a short report lists.
        time: Share of every node in the time of one run; None when it was not asked for.
        savings: What the passes could do; None when it was not asked for.
        notes: What was done to the model in order to look into it.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    compressed_by: Mapping[str, str]
    operators: Mapping[str, int]
    nodes: int
    raw_bytes: int
    deflated_bytes: int
    weight_bytes: int
    parameters: int
    macs: int
    uncounted: tuple[str, ...]
    top_nodes: tuple[NodeCost, ...]
    coverage: float | None
    groups: tuple[CoupledGroup, ...] | None
    frozen: tuple[FrozenReason, ...] | None
    untouched: tuple[str, ...]
    states: tuple[str, ...]
    top: int
    time: TimeShares | None
    savings: Savings | None
    notes: tuple[str, ...]


def inspect(
    path: str | Path,
    *,
    groups: bool = False,
    profile: bool = False,
    savings: bool = False,
    data: DataSource | None = None,
    target: str = "auto",
    top: int = 10,
    progress: Progress | None = None,
) -> Inspection:
    """Look into a model file.

    Args:
        path: The model.
        groups: Whether to analyse which channels are coupled.
        profile: Whether to measure the share of every node in the time of one run, on one thread.
        savings: Whether to ask every pass what it could do to every node.
        data: Inputs of the timed run; by default those beside the model (NAME.eval.npz), else
            invented ones.
        target: Hardware profile that ``savings`` are meant for.
        top: How many of the most expensive nodes to list, and of groups and reasons to print.
        progress: Where to report progress.

    Raises:
        ModelError: If the file is not a model that can be used.
        DataError: If the data cannot be used with the model.
        UsageError: If there is no such target.
    """
    path = Path(path)
    progress = progress or SilentProgress()
    profile_of = target_by_name(target)
    model = model_io.load(path)
    sizes = model_io.file_sizes(path)
    inlined = model_io.clone(model)
    model_io.inline(inlined)
    cost = cost_of(inlined)
    operators = Counter(
        node.op_type if not node.domain else f"{node.domain}::{node.op_type}"
        for node in model.graph.all_nodes()
    )
    coupled: CouplingSummary | None = None
    notes: tuple[str, ...] = ()
    shares: TimeShares | None = None
    could: Savings | None = None
    if groups or profile or savings:
        prepared = model_io.clone(model)
        notes = model_io.normalize(prepared)
        with scratch() as work_dir:
            if profile:
                with progress.task("timing nodes"):
                    feeds = evaluation_data(prepared, path, data).first()
                    settings = SessionSettings(threads=1)
                    shares = time_shares(prepared, feeds, settings, work_dir=work_dir)
            if savings:
                with progress.task("asking the passes"):
                    could = savings_of(prepared, profile_of, work_dir)
        if groups:
            coupled = summarize(prepared)
    times = {} if shares is None else shares.nodes
    expensive = sorted(
        cost.nodes,
        key=lambda n: (times.get(n.node, 0.0), n.macs or 0, n.parameters),
        reverse=True,
    )
    return Inspection(
        path=path,
        inputs=input_specs(model),
        outputs=output_specs(model),
        ir_version=model.ir_version,
        opsets=dict(model.opset_imports),
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        compressed_by={
            k: v for k, v in model.metadata_props.items() if k.startswith("onnxcompress.")
        },
        operators=dict(operators.most_common()),
        nodes=operators.total(),
        raw_bytes=sizes.raw_bytes,
        deflated_bytes=sizes.deflated_bytes,
        weight_bytes=cost.weight_bytes,
        parameters=cost.parameters,
        macs=cost.macs,
        uncounted=cost.unknown,
        top_nodes=tuple(
            n for n in expensive[:top] if n.macs or n.parameters or times.get(n.node, 0.0)
        ),
        coverage=None if coupled is None else coupled.coverage,
        groups=None if coupled is None else coupled.groups,
        frozen=None if coupled is None else coupled.frozen,
        untouched=() if coupled is None else coupled.untouched,
        states=() if coupled is None else coupled.states,
        top=top,
        time=shares,
        savings=could,
        notes=notes,
    )
