"""What a refitted layer should aim at, so that it also repairs what came before it.

Where the output of a layer is added to a shortcut, the best target is not the layer's original
output ``y₀`` but the original sum less the shortcut *as it is now*,

    y = y₀ + (shortcut₀ - shortcut)

for then the branch makes up for what the shortcut lost.

Source: He et al. 2017, "Channel pruning for accelerating very deep networks" (asymmetric
reconstruction of residual branches).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.calibration.statistics import REFERENCE_PREFIX


@dataclass(frozen=True, slots=True)
class Flow:
    """What lies upstream of each value of the changed model.

    Attributes:
        jobs: Bit ``j`` is set where layer ``j``, which may be refitted, lies upstream.
        touched: The values that can differ from the original's.
    """

    jobs: dict[ir.Value, int]
    touched: set[ir.Value]


def trace(changed: ir.Model, original: set[str], order: Mapping[str, int]) -> Flow:
    """Follow the data through ``changed``.

    Args:
        changed: The changed model.
        original: Names of the original's nodes; any other node is a change.
        order: Node name to number of the layers that may be refitted, in topological order.
    """
    jobs: dict[ir.Value, int] = {}
    touched: set[ir.Value] = set()
    for node in changed.graph:
        name = node.name or ""
        upstream = 1 << order[name] if name in order else 0
        differs = name not in original
        for value in node.inputs:
            if value is not None:
                upstream |= jobs.get(value, 0)
                differs = differs or value in touched
        for output in node.outputs:
            jobs[output] = upstream
            if differs:
                touched.add(output)
    return Flow(jobs, touched)


@dataclass(frozen=True, slots=True)
class Detour:
    """The way around branches of the changed model that are gone: sums with nothing.

    Attributes:
        dead: Names of nodes that nothing needs any longer.
        silent: Names of values that are zero.
    """

    dead: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()

    def readers(self, value: ir.Value) -> list[tuple[ir.Node, int]]:
        """The nodes, with the number of their input, that read a value and are not gone."""
        return [(u.node, u.idx) for u in value.uses() if not self._gone(u.node)]

    def _gone(self, node: ir.Node) -> bool:
        """Whether a node is dead, or (a mask) read by dead nodes alone."""
        if not self.dead or node.name in self.dead:
            return bool(self.dead)
        uses = [u for o in node.outputs for u in o.uses()]
        return bool(uses) and all(u.node.name in self.dead for u in uses)

    def beyond(self, value: ir.Value) -> ir.Value:
        """The last value that ``value`` alone decides, as sums with nothing follow upon it.

        Behind an activation that is applied once more after the sum, that is the later sum.
        """
        while self.silent:
            follower = self._sum(value)
            if follower is None and (relu := self._relu(value)) is not None:
                later = self._sum(relu)
                while later is not None and (after := self._sum(later)) is not None:
                    later = after
                if later is not None and self._relu(later) is not None:
                    follower = later
            if follower is None:
                break
            value = follower
        return value

    def _reader(self, value: ir.Value, op_type: str) -> tuple[ir.Node, int] | None:
        readers = self.readers(value)
        if len(readers) != 1 or value.is_graph_output() or readers[0][0].op_type != op_type:
            return None
        return readers[0]

    def _relu(self, value: ir.Value) -> ir.Value | None:
        use = self._reader(value, "Relu")
        return None if use is None else use[0].outputs[0]

    def _sum(self, value: ir.Value) -> ir.Value | None:
        """The sum of ``value`` with nothing that is all that reads it."""
        use = self._reader(value, "Add")
        if use is None:
            return None
        node, index = use
        other = node.inputs[1 - index]
        return node.outputs[0] if other is not None and other.name in self.silent else None


@dataclass(frozen=True, slots=True)
class ResidualTarget:
    """What to fit a layer to.

    Attributes:
        terms: Pairs of a tensor name and its factor; the target is their sum.
        result: The value of the changed model that should then equal the original's: the layer's
            output, or the sum.
        shortcut: The value subtracted, in the changed model; None where there is none.
        moved: Whether the layer has to do the work of branches that are gone.
    """

    terms: tuple[tuple[str, float], ...]
    result: ir.Value
    shortcut: ir.Value | None = None
    moved: bool = False


def residual_target(
    node: ir.Node, output_name: str, flow: Flow, index: int, detour: Detour | None = None
) -> ResidualTarget:
    """The original's output, or, before a residual Add, the original's sum less today's shortcut.

    The shortcut must not depend on layers that are refitted later: of two branches that meet, the
    last one repairs what the first one left.
    """
    output = node.outputs[0]
    if output.name != output_name:  # the bias is an Add of its own
        output = next(iter(output.uses())).node.outputs[0]
    detour = detour or Detour()
    final = detour.beyond(output)
    moved = final is not output
    plain = ResidualTarget(((f"{REFERENCE_PREFIX}{final.name}", 1.0),), final, moved=moved)
    if moved:
        output = final
    else:
        plain = ResidualTarget(((REFERENCE_PREFIX + output_name, 1.0),), output)
    uses = detour.readers(output)
    if len(uses) != 1 or uses[0][0].op_type != "Add" or output.is_graph_output():
        return plain
    add, place = uses[0]
    shortcut = add.inputs[1 - place]
    if shortcut is None or shortcut.shape is None or shortcut.shape != output.shape:
        return plain
    if flow.jobs.get(shortcut, 0) >> index:
        return plain
    total = add.outputs[0]
    final = detour.beyond(total)
    moved = moved or final is not total
    if shortcut not in flow.touched and not moved:
        return plain
    terms = ((f"{REFERENCE_PREFIX}{final.name}", 1.0), (shortcut.name or "", -1.0))
    return ResidualTarget(terms, final, shortcut, moved)
