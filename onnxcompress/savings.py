"""What each pass could do to each node of a model, from the plans of the passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.context import PassContext
from onnxcompress.errors import OnnxCompressError
from onnxcompress.passes import make_pass, pass_table
from onnxcompress.passes.base import Change, Stage
from onnxcompress.schedule import PREPARATIONS
from onnxcompress.targets import Target


@dataclass(frozen=True, slots=True)
class Treatment:
    """What one pass, alone and with its default options, could do to one node.

    Attributes:
        name: Name of the pass.
        saved_bytes: Bytes of constants that would go; None where only doing it tells.
    """

    name: str
    saved_bytes: int | None


@dataclass(frozen=True, slots=True)
class PassSavings:
    """What one pass, alone and with its default options, could do to the model.

    Attributes:
        name: Name of the pass.
        nodes: How many nodes it could treat.
        saved_bytes: Bytes of constants that would go, where that is known beforehand.
        reason: Why it could do nothing; "" where it could.
    """

    name: str
    nodes: int
    saved_bytes: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Savings:
    """What the passes could do.

    Attributes:
        passes: One entry per pass that changes the network, in the order of the stages.
        nodes: Node name to what could be done to it.
    """

    passes: tuple[PassSavings, ...]
    nodes: Mapping[str, tuple[Treatment, ...]]


def savings_of(model: ir.Model, target: Target, work_dir: Path) -> Savings:
    """Ask every pass what it could do to ``model``, each for itself and without calibration data.

    Args:
        model: A normalized model; it is not changed.
        target: The hardware to compress for.
        work_dir: Where temporary files may be made.
    """
    ctx = PassContext(target=target, work_dir=work_dir)
    prepared = model_io.clone(model)
    for name in PREPARATIONS:
        make_pass(name, {}).run(prepared, ctx)
        model_io.infer_shapes(prepared)
    users = _users(prepared)
    found: defaultdict[str, list[Treatment]] = defaultdict(list)
    totals: list[PassSavings] = []
    instances = [(name, make_pass(name, {})) for name in pass_table()]
    instances = [(n, i) for n, i in instances if i.stage is not Stage.PREPARE]
    for name, instance in sorted(instances, key=lambda item: item[1].stage):
        try:
            report = instance.plan(model_io.clone(prepared), ctx)
        except OnnxCompressError as error:
            totals.append(PassSavings(name, 0, None, error.message))
            continue
        by_node = _by_node(report.changes, users)
        for node, saved in by_node.items():
            found[node].append(Treatment(name, saved))
        reason = "" if by_node else next((skip.reason for skip in report.skips), "nothing to do")
        totals.append(PassSavings(name, len(by_node), _sum(list(by_node.values())), reason))
    return Savings(tuple(totals), {node: tuple(found[node]) for node in found})


def _users(model: ir.Model) -> dict[str, str]:
    """Name of every node, and of every constant, to the node that is (or first uses) it."""
    users: dict[str, str] = {}
    for node in model.graph.all_nodes():
        users[node.name or ""] = node.name or ""
        for value in node.inputs:
            if value is not None and value.is_initializer():
                users.setdefault(value.name or "", node.name or "")
    return users


def _by_node(changes: Sequence[Change], users: Mapping[str, str]) -> dict[str, int | None]:
    groups: defaultdict[str, list[int | None]] = defaultdict(list)
    for change in changes:
        if change.node in users:
            groups[users[change.node]].append(change.saved_bytes)
    return {node: _sum(saved) for node, saved in groups.items()}


def _sum(saved: Sequence[int | None]) -> int | None:
    known = [number for number in saved if number is not None]
    return sum(known) if known else None
