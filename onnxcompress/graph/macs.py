"""Multiply-accumulates of a model with some units removed, without removing them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.cost import Shape, cost_of, probe_shapes
from onnxcompress.graph.coupling import Coupling, MacsTerm, Units

_PER_OUTPUT = 32
"""Multiply-accumulates in the time of which an output is written and read again; convolutions of
16, 32 and 64 channels follow it (``benchmarks/kernel_steps.py``)."""


@dataclass(frozen=True, slots=True)
class _Term:
    """The product of the lengths of some axes.

    Attributes:
        outputs: Product of the fixed lengths of the axes of the node's output.
        inner: Product of the other fixed lengths.
        axes: Axes of variable length, as indices into :attr:`MacsModel._axes`.
        made: Which of them are axes of the node's output.
    """

    outputs: int
    inner: int
    axes: tuple[int, ...]
    made: tuple[bool, ...]


class MacsModel:
    """Counts multiply-accumulates for any set of removed units; built once, evaluated often.

    Every contraction costs a product of axis lengths. An axis that carries units is as long as its
    surviving positions, all others keep their length. Branches of an ``If`` count as the most
    expensive one.

    Args:
        model: The model that was analysed.
        coupling: Its coupling.
        feeds_shapes: Shapes of graph inputs by name; otherwise dynamic axes count as 1.
    """

    def __init__(
        self,
        model: ir.Model,
        coupling: Coupling,
        feeds_shapes: Mapping[str, Shape] | None = None,
    ) -> None:
        self._coupling = coupling
        lengths = {
            value.name: shape
            for value, shape in probe_shapes(model, feeds_shapes).items()
            if value.name
        }
        self._outputs = {n.name: {o.name for o in n.outputs} for n in model.graph.all_nodes()}
        self._axes: list[Units] = []
        self._numbers: dict[int, int] = {}
        costs = {n.node: n.macs for n in cost_of(model, feeds_shapes).nodes if n.macs is not None}
        self._terms = [
            self._term(term, lengths) if term.node in costs else _Term(0, 0, (), ())
            for term in coupling.macs
        ]
        # Bodies of loops and fused operators cost the same whatever is removed elsewhere.
        known = {term.node for term in coupling.macs}
        self._fixed = sum(macs for node, macs in costs.items() if node not in known)
        self._total = self._sum(coupling.kept({}))

    @property
    def total(self) -> int:
        """Multiply-accumulates with nothing removed."""
        return self._total

    def remaining(self, removed: Mapping[int, Units]) -> int:
        """Multiply-accumulates if these units were removed.

        Args:
            removed: Group index to unit numbers.
        """
        return self._sum(self._coupling.kept(removed))

    def padded(self, removed: Mapping[int, Units], block: int) -> int:
        """What a run costs in multiply-accumulates for kernels that compute channels in blocks.

        What is left over of the last block of output channels is computed for nothing, and every
        output costs some multiply-accumulates beside its own: it is written, and read again.

        Args:
            removed: Group index to unit numbers.
            block: Channels per block.
        """
        return self._sum(self._coupling.kept(removed), block=block)

    def covered(self) -> int:
        """Multiply-accumulates of the nodes that some unit's removal makes cheaper."""
        nodes = {t.node for t, s in zip(self._coupling.macs, self._terms, strict=True) if s.axes}
        return self._sum(self._coupling.kept({}), only=nodes) - self._fixed

    def _term(self, term: MacsTerm, lengths: Mapping[str, Shape]) -> _Term:
        outputs = self._outputs.get(term.node, set())
        fixed, axes, made = {True: 1, False: 1}, [], []
        for value, axis in term.axes:
            units = self._coupling.axes.get(value, ())
            carried = units[axis] if axis < len(units) else None
            if carried is not None:
                axes.append(self._number(carried))
                made.append(value in outputs)
            elif value in lengths and axis < len(lengths[value]):
                fixed[value in outputs] *= lengths[value][axis]
        return _Term(fixed[True], fixed[False], tuple(axes), tuple(made))

    def _number(self, units: Units) -> int:
        """Equal arrays are counted once."""
        known = self._numbers.get(id(units))
        if known is None:
            known = self._numbers[id(units)] = len(self._axes)
            self._axes.append(units)
        return known

    def _costs(self, kept: npt.NDArray[np.bool_], block: int) -> Iterator[tuple[str, int]]:
        """Of each node; with a ``block`` above 0 as in :meth:`padded`."""
        counts = [int(np.count_nonzero(kept[u] | (u < 0))) for u in self._axes]
        costs: dict[str, int] = {}
        for term, counted in zip(self._coupling.macs, self._terms, strict=True):
            outputs, inner = counted.outputs, counted.inner
            for axis, made in zip(counted.axes, counted.made, strict=True):
                if not made:
                    inner *= counts[axis]
                else:
                    outputs *= -(-counts[axis] // block) * block if block else counts[axis]
            if block and inner:
                inner += _PER_OUTPUT
            costs[term.node] = costs.get(term.node, 0) + outputs * inner
        yield from costs.items()

    def _sum(
        self, kept: npt.NDArray[np.bool_], only: Collection[str] | None = None, block: int = 0
    ) -> int:
        paths = {term.node: term.path for term in self._coupling.macs}
        costs = self._costs(kept, block)
        counted = [(paths[n], c) for n, c in costs if only is None or n in only]
        return self._fixed + _tree_sum(counted)


def _tree_sum(costs: list[tuple[tuple[tuple[str, int], ...], int]]) -> int:
    """Sum of all costs, of the branches of an If only the most expensive one."""
    total = sum(cost for path, cost in costs if not path)
    nodes: dict[str, dict[int, list[tuple[tuple[tuple[str, int], ...], int]]]] = {}
    for path, cost in costs:
        if path:
            (node, branch), rest = path[0], path[1:]
            nodes.setdefault(node, {}).setdefault(branch, []).append((rest, cost))
    return total + sum(max(_tree_sum(b) for b in branches.values()) for branches in nodes.values())
