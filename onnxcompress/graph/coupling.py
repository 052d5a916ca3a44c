"""What the coupling analysis finds: units that can be removed and the places where they live.

Vocabulary. A *unit* is a set of tensor positions that can only disappear together (one channel of a
residual stream, one attention head, one hidden cell of an LSTM). A *group* is a set of alike units:
they live on the same axes, each with the same number of positions, so any subset may be removed;
all of them only where the model can do without (:mod:`onnxcompress.graph.emptying`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Positions = npt.NDArray[np.int64]
Units = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a group lives in an initializer.

    Attributes:
        initializer: Name of the initializer.
        axis: Its axis that is cut.
        indices: ``[units, m]``; row ``u`` holds the ascending positions of unit ``u`` on the axis.
    """

    initializer: str
    axis: int
    indices: Positions


@dataclass(frozen=True, slots=True)
class Sink:
    """Where a group's units are summed over: input channels of a Conv, rows of a MatMul weight.

    The law of removal masks these places (see :func:`onnxcompress.graph.surgery.mask`).

    Attributes:
        node: Name of the contracting node.
        data_input: Index of the input that carries the activations. For the recurrent weight of an
            RNN it equals ``weight_input``: the activations are the node's own output one step ago.
        axis: Axis of the data input that is summed over.
        weight_input: Index of the weight input; None for a weightless sum (ReduceSum, QKᵀ).
        weight: Name of the weight's initializer, found through DequantizeLinear, Transpose, Cast
            and Identity; None where it is computed in another way.
        weight_axis: Axis of the *initializer* ``weight`` (of the weight input if ``weight`` is
            None) that is summed over.
        positions: ``[units, m]`` positions on ``axis`` of the data input. They are the positions on
            ``weight_axis`` too, except for a grouped Conv, whose weight has ``C / group``
            positions: position ``p`` of the data meets weight position ``p % (C / group)`` of the
            output channels of group ``p // (C / group)``.
    """

    node: str
    data_input: int
    axis: int
    weight_input: int | None
    weight: str | None
    weight_axis: int | None
    positions: Positions


@dataclass(frozen=True, slots=True)
class Source:
    """Where a group's units are made by a weight: output channels of a Conv, columns of a MatMul.

    Attributes:
        node: Name of the producing node.
        data_input: Index of the input that carries the activations.
        axis: Axis of the node's first output that carries the units.
        weight_input: Index of the weight input.
        weight: Name of the weight's initializer, traced as for :class:`Sink`; None if computed.
        weight_axis: Axis of the initializer (of the weight input if ``weight`` is None) that
            carries the units.
        positions: ``[units, m]`` positions on ``weight_axis``.
    """

    node: str
    data_input: int
    axis: int
    weight_input: int | None
    weight: str | None
    weight_axis: int | None
    positions: Positions


@dataclass(frozen=True, slots=True)
class Group:
    """Alike units.

    Attributes:
        index: Position in :attr:`Coupling.groups`.
        name: The node that makes the units, or the first initializer that carries them; unique
            (further groups of a node are ``node:1``, ``node:2``, ...).
        size: Number of units.
        cuts: Every initializer axis the units live on.
        sinks: Every place the units are summed over.
        sources: Every place a weight makes them.
    """

    index: int
    name: str
    size: int
    cuts: tuple[Cut, ...]
    sinks: tuple[Sink, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Frozen:
    """Channels that have to stay, and the node that demands it.

    Attributes:
        node: Name of the node; "" for the model's interface.
        axis: Axis of ``value``.
        value: Name of the tensor.
        reason: Why, in words a user can act on.
        holds: Names of the nodes whose weights make these channels or sum over them.
    """

    node: str
    axis: int
    value: str
    reason: str
    holds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MacsTerm:
    """Multiply-accumulates of a node: the product of the lengths of some tensor axes.

    A node with several terms (RNNs) costs their sum.

    Attributes:
        node: Name of the node.
        axes: ``(value name, axis)`` pairs.
        path: The branches the node is nested in, outermost first: ``(If node, branch number)``.
    """

    node: str
    axes: tuple[tuple[str, int], ...]
    path: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Port:
    """A place where cells of a state pass between the model's interface and its inside.

    The interface keeps all cells, the inside those that stay. A port that reads picks the
    survivors of ``value`` for everybody but ``outside``; one that writes puts zeros in the places
    of the others, for ``outside`` and the graph that ``value`` is an output of.

    Attributes:
        state: Name of the model's input that is read or output that is written.
        value: Name of the tensor.
        outside: Names of nodes that use it at full size.
        writes: Whether cells leave here.
    """

    state: str
    value: str
    outside: tuple[str, ...]
    writes: bool


@dataclass(frozen=True, slots=True)
class Coupling:
    """The result of :func:`onnxcompress.graph.labels.analyse`.

    It describes the graph at that moment: change weight *values* freely, but add and remove nodes
    only after :func:`onnxcompress.graph.surgery.remove`.

    Attributes:
        groups: What can be removed.
        frozen: What can not, and why.
        axes: Value name to one array per axis: the unit number of each position, counted across
            groups (see :attr:`offsets`), -1 where the position belongs to no unit; None for an
            axis without units. Values without units are absent.
        macs: The multiply-accumulates of the model as products of axis lengths.
        ports: Where cells of states of the interface are read and written.
        shapes: Value name to its lengths for two sets of lengths of the model's inputs, one after
            the other. Values of the main graph of unknown shape are absent.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    axes: Mapping[str, tuple[Units | None, ...]] = field(default_factory=dict, repr=False)
    macs: tuple[MacsTerm, ...] = field(default=(), repr=False)
    ports: tuple[Port, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def same_shape(self, left: ir.Value, right: ir.Value) -> bool:
        """Whether two values are known to have one shape on all inputs."""
        lengths = self.shapes.get(left.name or "")
        return lengths is not None and lengths == self.shapes.get(right.name or "")

    @property
    def offsets(self) -> Units:
        """``[groups + 1]``: unit ``u`` of group ``g`` has number ``offsets[g] + u`` in ``axes``."""
        return np.cumsum([0, *(g.size for g in self.groups)], dtype=np.int64)

    def kept(self, removed: Mapping[int, Units]) -> npt.NDArray[np.bool_]:
        """Which units stay.

        Args:
            removed: Group index to unit numbers within the group.

        Returns:
            ``[units of all groups]``, indexed like the numbers in ``axes``.

        Raises:
            IndexError: If a group or unit does not exist.
        """
        offsets = self.offsets
        kept = np.ones(int(offsets[-1]), dtype=np.bool_)
        places = list(removed)
        parts = [np.asarray(removed[index], dtype=np.int64) for index in places]
        owners = np.repeat(np.array(places, np.int64), [part.size for part in parts])
        units = np.concatenate([*parts, np.zeros(0, np.int64)])
        starts = offsets[owners]
        unknown = np.flatnonzero((units < 0) | (units >= offsets[owners + 1] - starts))
        if unknown.size:
            group = self.groups[owners[unknown[0]]]
            raise IndexError(
                f"group {group.index} ('{group.name}') has units 0 to {group.size - 1}, "
                f"not {units[unknown[0]]}"
            )
        kept[starts + units] = False
        return kept
