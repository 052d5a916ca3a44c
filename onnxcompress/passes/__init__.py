"""The passes there are: one literal table, plus the entry points of other packages.

The table names classes and does not import them, so that a run pays only for the passes it asks for
and :mod:`onnxcompress.passes.base` can be imported by each of them.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from onnxcompress.errors import UsageError

if TYPE_CHECKING:
    from onnxcompress.passes.base import Pass, PassOptions

ENTRY_POINT_GROUP = "onnxcompress.passes"

PASSES: Mapping[str, str] = MappingProxyType(
    {
        "simplify": "onnxcompress.passes.simplify:SimplifyPass",
        "fold": "onnxcompress.passes.fold:FoldPass",
        "equalize": "onnxcompress.passes.equalize:EqualizePass",
        "prune": "onnxcompress.passes.prune:PrunePass",
        "svd": "onnxcompress.passes.svd:SvdPass",
        "sparse": "onnxcompress.passes.sparse:SparsePass",
        "distill": "onnxcompress.passes.distill:DistillPass",
        "quant": "onnxcompress.passes.quant:QuantPass",
        "share": "onnxcompress.passes.share:SharePass",
        "fp16": "onnxcompress.passes.fp16:Fp16Pass",
        "weights": "onnxcompress.passes.weight_only:WeightOnlyPass",
        "pack": "onnxcompress.passes.pack:PackPass",
    }
)


def pass_table(installed: Iterable[EntryPoint] | None = None) -> dict[str, str]:
    """Name of every pass to its class as ``module:Class``, built-in ones first.

    Args:
        installed: Entry points to add; those of the installed packages by default.

    Raises:
        UsageError: If two packages offer a pass of the same name.
    """
    table = dict(PASSES)
    found = entry_points(group=ENTRY_POINT_GROUP) if installed is None else installed
    for entry in found:
        if table.get(entry.name, entry.value) != entry.value:
            raise UsageError(
                f"two passes are named '{entry.name}': {table[entry.name]} and {entry.value}",
                hint="Uninstall one of the packages that offer it.",
            )
        table[entry.name] = entry.value
    return table


def pass_class(name: str) -> type[Pass]:
    """Import the pass called ``name``.

    Raises:
        UsageError: If there is no such pass (the message suggests near names), or an installed
            package offers one that cannot be imported.
    """
    table = pass_table()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        guess = f"Did you mean '{near[0]}'? " if near else ""
        raise UsageError(
            f"there is no pass '{name}'", hint=f"{guess}The passes are: {', '.join(table)}."
        )
    module_name, _, class_name = table[name].partition(":")
    try:
        return cast("type[Pass]", getattr(importlib.import_module(module_name), class_name))
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"pass '{name}' cannot be imported from {table[name]}: {error}",
            hint="Reinstall the package that offers it.",
        ) from error


def make_pass(name: str, values: Mapping[str, object]) -> Pass:
    """Make the pass called ``name`` with options from the command line or a recipe.

    Raises:
        UsageError: If there is no such pass, or an option is unknown or out of its bounds.
    """
    found = pass_class(name)
    options = found.options_type.parse(values, owner=name)
    return cast("Callable[[PassOptions], Pass]", found)(options)
