"""Names for the values and nodes that passes add: ``<original>/<pass>_<role>``, unique everywhere.

Subgraphs see the values of the graphs around them, and onnxruntime keys its profile by node name,
so one set of names covers the values and nodes of the model and of all its subgraphs.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Collection, Iterator

import onnx_ir as ir


def used_names(model: ir.Model) -> set[str]:
    """Every value and node name of ``model``, its subgraphs and its functions."""
    used: set[str] = set()
    for graph in model.graphs():
        used.update(v.name for v in (*graph.inputs, *graph.initializers.values()) if v.name)
        _add_nodes(used, graph)
    for function in model.functions.values():
        used.update(v.name for v in function.inputs if v.name)
        _add_nodes(used, function)
    return used


def _add_nodes(used: set[str], graph: ir.Graph | ir.Function) -> None:
    for node in graph:
        if node.name:
            used.add(node.name)
        used.update(output.name for output in node.outputs if output.name)


class Namer:
    """Hands out names that are unused so far; reads the model's names once.

    Names that others give after construction are not seen, so one transformation uses one namer.

    Args:
        model: The model to find names for; it is not changed.
    """

    def __init__(self, model: ir.Model) -> None:
        self._used = used_names(model)

    def value(self, wanted: str) -> str:
        """``wanted`` for a value if it is free, else ``wanted_1``, ...; it is then taken."""
        return self._take(wanted)

    def node(self, wanted: str) -> str:
        """``wanted`` for a node if it is free, else ``wanted_1``, ...; it is then taken."""
        return self._take(wanted)

    def _take(self, wanted: str) -> str:
        name, count = wanted, 0
        while name in self._used or not name:
            count += 1
            name = f"{wanted}_{count}"
        self._used.add(name)
        return name


def fresh_name(model: ir.Model, wanted: str) -> str:
    """``wanted`` if no value or node of ``model`` has it, else ``wanted_1``, ``wanted_2``, ...

    It reads all names of the model; for many insertions use one :class:`Namer`.
    """
    return Namer(model).value(wanted)


def shorten(model: ir.Model, kept: Collection[str]) -> int:
    """Give everything inside ``model`` a short name, except what is called like one of ``kept``.

    Values get names of one to three letters, nodes lose theirs, which ONNX allows. Inputs and
    outputs of graphs, subgraphs among them, keep their names, and so does what is in functions.

    Args:
        model: The model to change.
        kept: Names of nodes and values to keep.

    Returns:
        How many names were changed.
    """
    short = _short_names(used_names(model))
    changed = 0
    for graph in model.graphs():
        boundary = {id(value) for value in (*graph.inputs, *graph.outputs)}
        made = [*graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        for value in made:
            if value.name and value.name not in kept and id(value) not in boundary:
                value.name = next(short)
                changed += 1
        for node in graph:
            if node.name and node.name not in kept:
                node.name = ""
                changed += 1
    return changed


def _short_names(used: Collection[str]) -> Iterator[str]:
    """``a``, ``b``, ..., ``Z``, ``aa``, ...: all that are not in ``used``."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_letters, repeat=length):
            if (name := "".join(letters)) not in used:
                yield name
