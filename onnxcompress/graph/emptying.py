"""Whether groups may lose all of their units, and what then becomes of the graph.

Without a single input channel a Conv, Gemm or MatMul answers its bias, at the borders too. So if a
group is emptied,

- tensors that have no elements left, and all that only they need, *die*;
- a layer all of whose inputs died becomes a *constant*, one number per output channel, and so does
  what elementwise operators make of it;
- a constant *joins* the living where it is broadcast against a tensor that has the shape of the
  result (the Add behind a residual branch, the Mul behind a squeeze-and-excitation gate);
- a Concat loses the inputs that died.

All else that a tensor without elements or a constant would reach is a reason to refuse, as is an
output of the model that would no longer depend on all inputs that it depended on before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.answers import BINARY, STANDARD, UNARY, answer
from onnxcompress.graph.constants import is_constant
from onnxcompress.graph.coupling import Coupling, Units

Array = npt.NDArray[np.generic]

_SHAPE_READERS = frozenset({"Shape", "Size"})


class RefusedError(Exception):
    """Groups that cannot be emptied; the message says why."""


@dataclass(frozen=True, slots=True)
class Emptied:
    """What becomes of a graph whose groups lose all units; all entries are names.

    Attributes:
        dead: Nodes that nothing needs any longer.
        layers: Nodes that answer their bias.
        constants: Values that are the same everywhere but along their channel axis, in the order
            of the graph: the outputs of ``layers`` and of the elementwise nodes behind them.
        joins: Nodes that read a constant and a tensor of the shape of their result.
        implied: Further groups that nothing alive sums over.
    """

    dead: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()
    constants: tuple[str, ...] = ()
    joins: frozenset[str] = frozenset()
    implied: tuple[int, ...] = ()


class Emptying:
    """Answers for one model which of its groups may be emptied.

    Args:
        model: The model that was analysed.
        coupling: Its coupling.
    """

    def __init__(self, model: ir.Model, coupling: Coupling) -> None:
        self._graph, self._coupling = model.graph, coupling
        self._inner = {n.name for n in model.graph.all_nodes()} - {n.name for n in model.graph}
        self._nodes = [_Reads.of(node) for node in model.graph]
        self._owners = _owners(coupling)
        self._before = self._dependence({}, frozenset())
        self._known: dict[frozenset[int], Emptied | str] = {}

    def reason(self, group: int) -> str | None:
        """Why a group cannot be emptied, others being as they are; None if it can."""
        try:
            self.of((group,))
        except RefusedError as error:
            return str(error)
        return None

    def of(self, groups: Iterable[int]) -> Emptied:
        """What becomes of the graph.

        Args:
            groups: The groups that lose all units.

        Raises:
            RefusedError: If they cannot all be emptied.
        """
        key = frozenset(groups)
        if key not in self._known:
            try:
                self._known[key] = self._found(key)
            except RefusedError as error:
                self._known[key] = str(error)
        known = self._known[key]
        if isinstance(known, str):
            raise RefusedError(known)
        return known

    def _found(self, groups: frozenset[int]) -> Emptied:
        if not groups:
            return Emptied()
        fates = self._fates(self._void(groups))
        live = self._live(fates)
        for node in live:
            fate = fates.get(node)
            if fate is not None and fate.refused:
                raise RefusedError(fate.refused)
        constants = [
            o for n in live if (f := fates.get(n)) and f.constant for o in n.outputs if o.name
        ]
        if any(value.is_graph_output() for value in constants):
            raise RefusedError("an output of the model would be constant")
        dead = frozenset(r.node.name or "" for r in self._nodes if r.node not in live)
        for index in groups:
            self._check(index, dead)
        if self._dependence(fates, dead) != self._before:
            raise RefusedError("an output of the model would no longer depend on an input")
        placed = {v.name for v in constants}
        return Emptied(
            dead=dead,
            layers=frozenset(n.name or "" for n in live if (f := fates.get(n)) and f.layer),
            constants=tuple(
                o.name or "" for r in self._nodes for o in r.node.outputs if o.name in placed
            ),
            joins=frozenset(n.name or "" for n in live if (f := fates.get(n)) and f.joins),
            implied=tuple(
                g.index
                for g in self._coupling.groups
                if g.index not in groups and g.sinks and all(s.node in dead for s in g.sinks)
            ),
        )

    def _check(self, index: int, dead: Collection[str]) -> None:
        group = self._coupling.groups[index]
        for sink in group.sinks:
            if sink.node in dead:
                continue
            if sink.node in self._inner:
                raise RefusedError("it reaches into a branch of an If or Loop")
            if sink.weight_input is None:
                raise RefusedError("it is summed over by a product of two activations")
            if sink.data_input == sink.weight_input:
                raise RefusedError("its units are cells of a recurrent layer")
        for port in self._coupling.ports:
            for units in self._coupling.axes.get(port.value, ()):
                if units is not None and index in self._owners[id(units)]:
                    raise RefusedError("its units are cells of a state of the model")

    def _void(self, groups: frozenset[int]) -> set[str]:
        """Names of the values that have no elements left."""
        return {
            name
            for name, axes in self._coupling.axes.items()
            if any(units is not None and self._owners[id(units)] <= groups for units in axes)
        }

    def _fates(self, void: Collection[str]) -> dict[ir.Node, _Fate]:
        """What becomes of every node that reads what died or became constant."""
        fates: dict[ir.Node, _Fate] = {}
        constant: set[ir.Value] = set()
        for reads in self._nodes:
            node = reads.node
            dying = [v for v in reads.values if v.name in void]
            if not dying and constant.isdisjoint(reads.values):
                continue
            fate = _fate(reads, self._coupling, void, constant)
            fates[node] = fate
            if fate.constant:
                constant.update(node.outputs)
        return fates

    def _live(self, fates: Mapping[ir.Node, _Fate]) -> dict[ir.Node, None]:
        """The nodes that outputs of the model need, outputs first."""
        live: dict[ir.Node, None] = {}
        reads = {r.node: r.values for r in self._nodes}
        todo = [p for v in self._graph.outputs if (p := v.producer()) is not None]
        while todo:
            node = todo.pop()
            if node in live or node not in reads:
                continue
            live[node] = None
            fate = fates.get(node)
            needed = reads[node] if fate is None or fate.needs is None else fate.needs
            todo.extend(p for v in needed if (p := v.producer()) is not None)
        return live

    def _dependence(
        self, fates: Mapping[ir.Node, _Fate], dead: Collection[str]
    ) -> list[frozenset[ir.Value]]:
        """The inputs of the model, by value and not only by shape, behind each of its outputs."""
        behind: dict[ir.Value, frozenset[ir.Value]] = {
            v: frozenset({v}) for v in self._graph.inputs
        }
        nothing: frozenset[ir.Value] = frozenset()
        for reads in self._nodes:
            node = reads.node
            if node.name in dead or node.op_type in _SHAPE_READERS:
                continue
            fate = fates.get(node)
            needed = reads.values if fate is None or fate.needs is None else fate.needs
            found = nothing.union(*(behind.get(v, nothing) for v in needed))
            behind.update((output, found) for output in node.outputs)
        return [behind.get(v, nothing) for v in self._graph.outputs]


@dataclass(frozen=True, slots=True)
class _Reads:
    """A node of the main graph and all values that it reads, captured ones too."""

    node: ir.Node
    values: tuple[ir.Value, ...]
    captures: bool

    @classmethod
    def of(cls, node: ir.Node) -> _Reads:
        values = {v: None for v in node.inputs if v is not None}
        inner = list(_inner_nodes(node))
        made = {o for n in inner for o in n.outputs}
        for other in inner:
            values.update({v: None for v in other.inputs if v is not None and v not in made})
        for graph in _graphs(node):
            values.update({v: None for v in graph.outputs if v not in made})
        return cls(node, tuple(values), bool(list(_graphs(node))))


@dataclass(frozen=True, slots=True)
class _Fate:
    """What becomes of a node.

    Attributes:
        refused: Why it can not go on; "" if it can.
        constant: Whether its output is constant.
        layer: Whether that is because it lost all inputs.
        joins: Whether it takes a constant up.
        needs: The values that it still reads; None for all.
    """

    refused: str = ""
    constant: bool = False
    layer: bool = False
    joins: bool = False
    needs: tuple[ir.Value, ...] | None = None


def _graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _inner_nodes(node: ir.Node) -> Iterator[ir.Node]:
    for graph in _graphs(node):
        yield from graph.all_nodes()


def _owners(coupling: Coupling) -> dict[int, frozenset[int]]:
    """For each array of units, the groups that have to be emptied for it to be empty."""
    offsets = coupling.offsets
    found: dict[int, frozenset[int]] = {}
    for axes in coupling.axes.values():
        for units in axes:
            if units is None or id(units) in found:
                continue
            owners = np.unique(np.searchsorted(offsets, units[units >= 0], side="right") - 1)
            # A position that belongs to no unit (-1) stays for ever: no group has that number.
            stays = frozenset({-1}) if not units.size or (units < 0).any() else frozenset()
            found[id(units)] = frozenset(owners.tolist()) | stays
    return found


def _fate(
    reads: _Reads, coupling: Coupling, void: Collection[str], constant: Collection[ir.Value]
) -> _Fate:
    node = reads.node
    label = f"{node.op_type} '{node.name}'"
    used = [o for o in node.outputs if o.name and (o.uses() or o.is_graph_output())]
    lost = [o for o in used if o.name in void]
    if reads.captures:
        return _Fate(refused=f"it reaches into the branches of {label}")
    if lost:
        partly = f"{label} would be left with some of its outputs only"
        return _Fate(refused=partly if len(lost) < len(used) else f"{label} would have no elements")
    if any(v.name in void for v in reads.values):
        return _bereft(node, label, void)
    return _elementwise(node, label, coupling, constant)


def _bereft(node: ir.Node, label: str, void: Collection[str]) -> _Fate:
    """A node that loses inputs and not its output."""
    inputs = [v for v in node.inputs if v is not None]
    if node.op_type == "Concat" and node.domain in STANDARD:
        return _Fate(needs=tuple(v for v in inputs if v.name not in void))
    if answer(node) is not None and (inputs[0].name or "") in void:
        return _Fate(constant=True, layer=True, needs=())
    return _Fate(refused=f"{label} needs a tensor that would have no elements")


def _elementwise(
    node: ir.Node, label: str, coupling: Coupling, constant: Collection[ir.Value]
) -> _Fate:
    """A node that reads constants, none of its inputs having died."""
    refused = _Fate(refused=f"{label} would read a constant")
    if node.domain not in STANDARD or any(o.uses() for o in node.outputs[1:]):
        return refused
    inputs = [v for v in node.inputs if v is not None]
    if node.op_type == "BatchNormalization" and all(is_constant(v) for v in inputs[1:]):
        return refused if node.attributes.get_int("training_mode", 0) else _Fate(constant=True)
    full = [v for v in inputs if v not in constant and not is_constant(v)]
    if not full:
        known = len(inputs) == 2 and node.op_type in BINARY
        unary = inputs[0] in constant and node.op_type in UNARY
        plain = all(v in constant or _small(v) for v in inputs)
        return _Fate(constant=True) if (known or unary) and plain else refused
    if node.op_type not in BINARY or len(inputs) != 2 or "broadcast" in node.attributes:
        return refused
    return _Fate(joins=True) if coupling.same_shape(full[0], node.outputs[0]) else refused


def _small(value: ir.Value) -> bool:
    """Whether a stored constant has no more than one axis that is longer than 1."""
    return value.shape is not None and sum(d != 1 for d in value.shape) <= 1


def whole(coupling: Coupling, removed: Mapping[int, Units]) -> list[int]:
    """The groups that lose all of their units."""
    return [i for i, units in removed.items() if _covers(units, coupling.groups[i].size)]


def _covers(units: Units, size: int) -> bool:
    """Whether ``units`` are all of 0 to ``size - 1``."""
    if len(units) < size:
        return False
    missing = np.ones(size, np.bool_)
    missing[units] = False
    return not missing.any()
