"""Multiply-accumulates of a model with some units removed, without removing them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.cost import Shape, cost_of, probe_shapes
from onnxcompress.graph.coupling import Coupling, MacsTerm, Units

Counts = npt.NDArray[np.int64]

_PER_OUTPUT = 32
"""Multiply-accumulates in the time of which an output is written and read again; convolutions of
16, 32 and 64 channels follow it (``benchmarks/kernel_steps.py``)."""
_BLOCKED_INPUTS = frozenset({"Conv", "FusedConv"})
"""Operators whose kernels read channels in blocks too, unless they are grouped."""


@dataclass(frozen=True, slots=True)
class _Term:
    """The product of the lengths of some axes.

    Attributes:
        outputs: Product of the fixed lengths of the axes of the node's output.
        inner: Product of the other fixed lengths.
        axes: Axes of variable length, as indices into :attr:`MacsModel._axes`.
        made: Which of them are axes of the node's output.
        blocked: Whether the others are read in blocks.
    """

    outputs: int
    inner: int
    axes: tuple[int, ...]
    made: tuple[bool, ...]
    blocked: bool = False


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
        self._nodes = {n.name: n for n in model.graph.all_nodes()}
        self._axes: list[Units] = []
        self._numbers: dict[int, int] = {}
        costs = {n.node: n.macs for n in cost_of(model, feeds_shapes).nodes if n.macs is not None}
        self._terms = [
            self._term(term, lengths) if term.node in costs else _Term(0, 0, (), ())
            for term in coupling.macs
        ]
        self._counter = _Counter(self._axes)
        self._product = _Product(self._terms, len(self._axes))
        self._paths = {term.node: term.path for term in coupling.macs}
        self._branched = any(self._paths.values())
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

        What is left over of the last block of output channels is computed for nothing. So is what
        is left over of the last block of input channels of a convolution, unless there is less than
        one block: then the kernel for inputs in any number is used. Every output costs some
        multiply-accumulates beside its own: it is written, and read again.

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
        node = self._nodes.get(term.node)
        outputs = set() if node is None else {o.name for o in node.outputs}
        fixed, axes, made = {True: 1, False: 1}, [], []
        for value, axis in term.axes:
            units = self._coupling.axes.get(value, ())
            carried = units[axis] if axis < len(units) else None
            if carried is not None:
                axes.append(self._number(carried))
                made.append(value in outputs)
            elif value in lengths and axis < len(lengths[value]):
                fixed[value in outputs] *= lengths[value][axis]
        blocked = (
            node is not None
            and node.op_type in _BLOCKED_INPUTS
            and node.attributes.get_int("group", 1) == 1
        )
        return _Term(fixed[True], fixed[False], tuple(axes), tuple(made), blocked)

    def _number(self, units: Units) -> int:
        """Equal arrays are counted once."""
        known = self._numbers.get(id(units))
        if known is None:
            known = self._numbers[id(units)] = len(self._axes)
            self._axes.append(units)
        return known

    def _sum(
        self, kept: npt.NDArray[np.bool_], only: Collection[str] | None = None, block: int = 0
    ) -> int:
        costs = self._product.of(self._counter.of(kept), block)
        if only is None and not self._branched:
            return self._fixed + int(costs.sum())
        nodes: dict[str, int] = {}
        for term, cost in zip(self._coupling.macs, costs.tolist(), strict=True):
            if only is None or term.node in only:
                nodes[term.node] = nodes.get(term.node, 0) + cost
        return self._fixed + _tree_sum([(self._paths[n], c) for n, c in nodes.items()])


class _Counter:
    """Counts the positions of axes that stay.

    Args:
        axes: The unit of each position of each axis; negative where none can go.
    """

    def __init__(self, axes: Sequence[Units]) -> None:
        self._fixed = np.array([np.count_nonzero(a < 0) for a in axes], np.int64)
        removable = [a[a >= 0] for a in axes]
        self._units = np.concatenate([*removable, np.zeros(0, np.int64)]).astype(np.int64)
        self._owners = np.repeat(np.arange(len(axes)), [len(r) for r in removable])

    def of(self, kept: npt.NDArray[np.bool_]) -> Counts:
        """The length of each axis.

        Args:
            kept: Which units stay.
        """
        stay = self._owners[kept[self._units]]
        return self._fixed + np.bincount(stay, minlength=len(self._fixed))


class _Product:
    """The terms of all contractions as arrays.

    Args:
        terms: The terms.
        axes: Number of axes that they are made of.
    """

    def __init__(self, terms: Sequence[_Term], axes: int) -> None:
        width = max((len(t.axes) for t in terms), default=0)
        shape = (len(terms), width)
        # What a term has no more axes for is one more axis, of length 1.
        self._places = np.full(shape, axes, np.int64)
        self._made = np.ones(shape, np.bool_)
        for number, term in enumerate(terms):
            self._places[number, : len(term.axes)] = term.axes
            self._made[number, : len(term.axes)] = term.made
        self._outputs = np.array([t.outputs for t in terms], np.int64)
        self._inner = np.array([t.inner for t in terms], np.int64)
        self._blocked = np.array([t.blocked for t in terms], np.bool_)[:, np.newaxis]
        self._none = self._places == axes

    def of(self, counts: Counts, block: int) -> Counts:
        """What each term costs; with a ``block`` above 0 as in :meth:`MacsModel.padded`."""
        lengths = np.append(counts, 1)[self._places]
        if block:
            whole = -(-lengths // block) * block
            padded = self._made | (self._blocked & (lengths >= block))
            lengths = np.where(padded & ~self._none, whole, lengths)
        outputs = self._outputs * np.where(self._made, lengths, 1).prod(axis=1)
        inner = self._inner * np.where(self._made, 1, lengths).prod(axis=1)
        if block:
            inner = np.where(inner > 0, inner + _PER_OUTPUT, 0)
        return np.asarray(outputs * inner, np.int64)


def _tree_sum(costs: list[tuple[tuple[tuple[str, int], ...], int]]) -> int:
    """Sum of all costs, of the branches of an If only the most expensive one."""
    total = sum(cost for path, cost in costs if not path)
    nodes: dict[str, dict[int, list[tuple[tuple[tuple[str, int], ...], int]]]] = {}
    for path, cost in costs:
        if path:
            (node, branch), rest = path[0], path[1:]
            nodes.setdefault(node, {}).setdefault(branch, []).append((rest, cost))
    return total + sum(max(_tree_sum(b) for b in branches.values()) for branches in nodes.values())
