"""What a region of scaled tensors asks of the weights at its border, and how they are changed.

All tensors ``v`` of a region are multiplied by positive factors ``f``, one per *unit*: element
``i`` of ``v`` by ``f[ids_v[i]]``, where ``ids_v`` broadcasts against ``v``. A weight that makes a
tensor of the region is multiplied, one that reads it is divided:

    W' = W * f[ids]**power        power +1 at a source, -1 at a sink
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.naming import Namer

Ids = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Absorb:
    """A constant input of a node that takes the factors up.

    Attributes:
        node: The node.
        place: Which input.
        ids: Units; broadcasts against the constant (or the constant against it).
        power: +1 or -1.
        contracts: Whether the node multiplies data by this constant and sums (a weight).
    """

    node: ir.Node
    place: int
    ids: Ids
    power: int
    contracts: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Tensors that have to be scaled together.

    Attributes:
        values: Each tensor to its units; the array broadcasts against the tensor.
        absorbs: The constants at the border.
        units: Number of units.
    """

    values: Mapping[ir.Value, Ids]
    absorbs: tuple[Absorb, ...]
    units: int

    @property
    def sources(self) -> tuple[Absorb, ...]:
        """Weights and vectors that make the tensors."""
        return tuple(a for a in self.absorbs if a.power > 0)

    @property
    def sinks(self) -> tuple[Absorb, ...]:
        """Weights and vectors that read them."""
        return tuple(a for a in self.absorbs if a.power < 0)


def unit_maxima(absorbs: Sequence[Absorb], units: int) -> FloatArray:
    """Largest magnitude of a weight entry that belongs to each unit, [units]; 0 without any."""
    found = np.zeros(units)
    for absorb in absorbs:
        constant = constant_of(absorb.node.inputs[absorb.place])
        if constant is None:
            continue
        sizes, ids = np.broadcast_arrays(np.abs(constant.astype(np.float64)), absorb.ids)
        np.maximum.at(found, ids.reshape(-1), sizes.reshape(-1))
    return found


def apply_factors(
    model: ir.Model, region: Region, factors: FloatArray, namer: Namer, owner: str
) -> None:
    """Multiply the tensors of ``region`` by ``factors`` [units] > 0; the outputs stay the same.

    Args:
        model: The model the region was found in; changed in place.
        region: The region.
        factors: One per unit.
        namer: Names for new constants.
        owner: The pass, for names.
    """
    replaced: dict[ir.Value, None] = {}
    for absorb in region.absorbs:
        old = absorb.node.inputs[absorb.place]
        constant = constant_of(old)
        if old is None or constant is None:
            raise ValueError(f"input {absorb.place} of '{absorb.node.name}' is no constant")
        made = constant.astype(np.float64) * factors[absorb.ids] ** absorb.power
        own = old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output()
        if own and made.shape == constant.shape:
            set_initializer(model.graph, old.name or "", made.astype(constant.dtype))
            continue
        name = namer.value(f"{old.name}/{owner}_scaled")
        new = set_initializer(model.graph, name, made.astype(constant.dtype))
        absorb.node.replace_input_with(absorb.place, new)
        replaced[old] = None
    for value in replaced:
        if not value.uses() and not value.is_graph_output() and value.is_initializer():
            del model.graph.initializers[value.name or ""]
