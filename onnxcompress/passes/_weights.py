"""The loop over the stored weights of a model that passes on weights have in common."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import UsageError
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes._layout import Layout, row_axes
from onnxcompress.passes.base import Skip

_T = TypeVar("_T")


@dataclass(frozen=True)  # no slots: typing notes the parameter on what Chosen[...]() makes
class Chosen(Generic[_T]):
    """Which weights a pass treats, which it does not, and why."""

    weights: tuple[_T, ...]
    skips: tuple[Skip, ...]


def choose_weights(
    model: ir.Model,
    plan: Callable[[ir.Value, ir.Graph], _T | str],
    *,
    owner: str,
    include: Sequence[str],
    exclude: Sequence[str],
    min_elements: int,
    dtypes: Sequence[ir.DataType] = (ir.DataType.FLOAT,),
) -> Chosen[_T]:
    """Go through the initializers of ``model`` and its subgraphs.

    Args:
        model: The model; it is not changed.
        plan: What to do with a weight, or why nothing can be done.
        owner: Name of the pass, for messages.
        include: Patterns of names (of initializers, or of the nodes that read them); all if empty.
        exclude: Patterns of names to leave alone.
        min_elements: Smaller tensors are left alone, and those of one axis.
        dtypes: Types of weights that the pass can treat.

    Raises:
        UsageError: If a pattern matches no weight.
    """
    weights: list[_T] = []
    skips: list[Skip] = []
    small: list[int] = []
    matched: set[str] = set()
    patterns = (*include, *exclude)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not (tensor.dtype.is_floating_point() or tensor.dtype in dtypes):
                continue
            names = [value.name or "", *(user.name or "" for user, _ in value.uses())]
            matched.update(p for p in patterns if fnmatch.filter(names, p))
            if tensor.size < min_elements or len(tensor.shape) < 2:
                small.append(tensor.size)
                continue
            found = _refusal(value, names, include, exclude, dtypes) or plan(value, graph)
            if isinstance(found, str):
                skips.append(Skip(value.name or "", "", found))
            else:
                weights.append(found)
    for pattern in patterns:
        if pattern not in matched:
            raise UsageError(
                f"the pattern '{pattern}' of the pass '{owner}' matches no weight",
                hint="Patterns match names of initializers and of the nodes that read them; see "
                "onnxcompress inspect MODEL.",
            )
    if small:
        reason = (
            f"biases, factors and others of one axis or fewer than min_elements={min_elements} "
            f"elements, {sum(small)} elements in all"
        )
        skips.append(Skip(f"{len(small)} small tensors", "", reason))
    return Chosen(tuple(weights), tuple(skips))


def _refusal(
    value: ir.Value,
    names: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    dtypes: Sequence[ir.DataType],
) -> str | None:
    if any(fnmatch.filter(names, p) for p in exclude):
        return "excluded by name"
    if include and not any(fnmatch.filter(names, p) for p in include):
        return "not among the names to include"
    if value.is_graph_output():
        return "it is an output of the graph"
    if value.is_graph_input():
        return "it is an input of the graph, which callers can replace"
    if value.dtype not in dtypes:
        known = " and ".join(dtype.name for dtype in dtypes)
        return f"its type is {value.dtype}; only {known} can be treated"
    return None


def rows_of(value: ir.Value) -> tuple[int, ...] | str:
    """The axes of a weight that are output channels, or why it is no weight.

    Uses may disagree about them (a table that is an embedding and an output layer): the first one
    decides.
    """
    rank = 0 if value.shape is None else len(value.shape)
    rows: tuple[int, ...] | None = None
    for user, index in value.uses():
        found = row_axes(user, index, rank)
        if found is None:
            return f"{user.op_type} '{user.name}' reads it, which multiplies by no constant weight"
        rows = rows or found
    return "no node reads it" if rows is None else rows


def matrix_layout(value: ir.Value) -> Layout | str:
    """How a stored weight is a matrix of output channels and what they contract, or why not."""
    rows = rows_of(value)
    if isinstance(rows, str):
        return rows
    array = constant_of(value)
    if array is None or not np.isfinite(array).all():
        return "it holds numbers that are not finite"
    return Layout(array.shape, rows)
