"""A look into one model, and the list of passes, for people."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxcompress.inspection import Inspection
from onnxcompress.passes.base import Pass, PassOptions
from onnxcompress.report.units import bytes_text, count_text, percent_text, plural
from onnxcompress.savings import Savings

# What the tool writes into the files it makes, as people read it.
_MADE_BY = {
    "onnxcompress.version": "made by onnxcompress",
    "onnxcompress.recipe": "with the recipe",
    "onnxcompress.original_sha256": "from the file",
}


def inspection(found: Inspection) -> RenderableType:
    """The report of ``onnxcompress inspect``."""
    blocks: list[RenderableType] = [_facts(found), _nodes(found)]
    if found.savings is not None:
        blocks.append(_savings(found.savings))
    if found.groups is not None and found.frozen is not None:
        blocks += [_groups(found), _frozen(found)]
    return Group(*blocks)


def _facts(found: Inspection) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", min_width=8, overflow="fold")
    table.add_column(overflow="fold")
    for name, specs in (("input", found.inputs), ("output", found.outputs)):
        for spec in specs:
            table.add_row(name, Text(str(spec)))
    opsets = ", ".join(
        f"{domain or 'ai.onnx'} {version}" for domain, version in found.opsets.items()
    )
    table.add_row("opset", f"{opsets} (IR version {found.ir_version})")
    if found.producer:
        table.add_row("producer", Text(found.producer))
    for name, value in found.compressed_by.items():
        table.add_row(_MADE_BY.get(name, name), Text(value))
    table.add_row(
        "size", f"{bytes_text(found.raw_bytes)}, deflated {bytes_text(found.deflated_bytes)}"
    )
    table.add_row(
        "parameters", f"{count_text(found.parameters)} in {bytes_text(found.weight_bytes)}"
    )
    uncounted = f" ({plural(len(found.uncounted), 'node')} not counted)" if found.uncounted else ""
    table.add_row("MACs", f"{count_text(found.macs)}{uncounted}")
    operators = ", ".join(f"{name} {count}" for name, count in found.operators.items())
    table.add_row("nodes", Text(f"{found.nodes}: {operators}"))
    for note in found.notes:
        table.add_row("note", Text(note))
    return table


def _nodes(found: Inspection) -> RenderableType:
    if not found.top_nodes:
        return Text("")
    table = _table("most expensive nodes", "")
    table.add_column("operator", overflow="fold")
    for name in ("MACs", "share", "parameters", "weights"):
        table.add_column(name, justify="right", overflow="fold")
    if found.time is not None:
        table.add_column("time", justify="right")
    if found.savings is not None:
        table.add_column("passes that could treat it, and what they save", overflow="fold")
    for node in found.top_nodes:
        share = (node.macs or 0) / found.macs if found.macs else 0.0
        cells: list[RenderableType] = [
            Text(node.node),
            node.op_type,
            count_text(node.macs),
            percent_text(share),
            count_text(node.parameters),
            bytes_text(node.weight_bytes),
        ]
        if found.time is not None:
            cells.append(percent_text(found.time.nodes.get(node.node, 0.0)))
        if found.savings is not None:
            treatments = found.savings.nodes.get(node.node, ())
            cells.append(", ".join(_treatment(t.name, t.saved_bytes) for t in treatments) or "-")
        table.add_row(*cells)
    if found.time is None or not found.time.elsewhere_ratio:
        return table
    rest = percent_text(found.time.elsewhere_ratio)
    return Group(table, Text(f"onnxruntime itself (memory layout, ...): {rest} of the time\n"))


def _treatment(name: str, saved_bytes: int | None) -> str:
    return name if saved_bytes is None else f"{name} {bytes_text(saved_bytes)}"


def _savings(found: Savings) -> RenderableType:
    table = _table("what each pass could do, alone and with its default options", "pass")
    for name in ("nodes", "saves"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold")
    for entry in found.passes:
        saved = "by budget" if entry.saved_bytes is None else bytes_text(entry.saved_bytes)
        table.add_row(
            entry.name, str(entry.nodes), saved if entry.nodes else "-", Text(entry.reason)
        )
    return table


def _groups(found: Inspection) -> RenderableType:
    if not found.groups:
        return Text("no channels can be pruned\n")
    table = _table("coupled channels", "made by")
    for name in ("units", "channels each", "parameters", "share of MACs", "nodes", "all"):
        table.add_column(name, justify="right", overflow="fold")
    for group in found.groups[: found.top]:
        table.add_row(
            Text(group.name),
            str(group.units),
            str(group.width),
            count_text(group.parameters),
            percent_text(group.macs_ratio),
            str(len(group.nodes)),
            "no" if group.last_stays else "may go",
        )
    return Group(table, *_more(found, len(found.groups), "group"), _coverage(found))


def _coverage(found: Inspection) -> RenderableType:
    """How much of the model pruning can reach, and where the rest is."""
    text = Text.assemble(
        ("coverage  ", "bold"),
        f"{percent_text(found.coverage or 0.0)} of the MACs are in nodes that pruning can make "
        "cheaper",
    )
    if found.untouched:
        names = list(found.untouched[:3])
        if len(found.untouched) > len(names):
            names.append(f"{len(found.untouched) - len(names)} more")
        text.append(f"; not in {', '.join(names)}")
    if found.states:
        names = [f"'{name}'" for name in found.states]
        text.append(
            f"\nRemoved cells are written as zeros to {', '.join(names)}; prune.states=false "
            "leaves states alone."
        )
    return Group(text, Text(""))


def _more(found: Inspection, count: int, noun: str) -> list[RenderableType]:
    """What a short report leaves out, and how to see it."""
    if count <= found.top:
        return []
    rest = plural(count - found.top, f"more {noun}")
    return [Text(f"and {rest}: --top {count} lists all, and so does --json\n", "dim")]


def _frozen(found: Inspection) -> RenderableType:
    if not found.frozen:
        return Text("nothing is frozen\n")
    table = _table("frozen, because", "reason")
    table.add_column("axes", justify="right")
    table.add_column("share of MACs", justify="right")
    table.add_column("for example", overflow="fold")
    for frozen in found.frozen[: found.top]:
        table.add_row(
            Text(frozen.reason),
            str(frozen.places),
            percent_text(frozen.macs_ratio),
            Text(", ".join(frozen.examples)),
        )
    return Group(table, *_more(found, len(found.frozen), "reason"))


def _table(title: str, first: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
    )
    table.add_column(first, overflow="fold")
    return table


def pass_list(passes: Sequence[type[Pass]]) -> RenderableType:
    """All passes with what they do."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("pass", "stage", "what it does"):
        table.add_column(name, overflow="fold")
    for found in passes:
        table.add_row(Text(found.name, "bold"), found.stage.name.lower(), Text(found.summary))
    return table


def pass_page(found: type[Pass]) -> RenderableType:
    """One pass with its options."""
    blocks: list[RenderableType] = [
        Text.assemble((found.name, "bold"), f"  {found.summary}"),
        Text(
            f"stage: {found.stage.name.lower()}; calibration data: {'yes' if found.needs else 'no'}"
        ),
    ]
    fields = dataclasses.fields(found.options_type)
    if not fields:
        return Group(*blocks, Text("It has no options."))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("option", "values", "default", "what it does"):
        table.add_column(name, overflow="fold")
    hints = typing.get_type_hints(found.options_type)
    for f in fields:
        table.add_row(
            Text(f"{found.name}.{f.name}", "bold"),
            Text(_values(f, hints[f.name])),
            Text(_default(f.default)),
            Text(str(f.metadata.get("help", ""))),
        )
    return Group(*blocks, table)


def _values(field: dataclasses.Field[PassOptions], hint: object) -> str:
    """The values an option takes, in words."""
    optional = ""
    if isinstance(hint, types.UnionType):
        optional = " or none"
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    if typing.get_origin(hint) is tuple:
        return f"names, comma-separated{optional}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ", ".join(str(member.value) for member in hint) + optional
    words = {bool: "true, false", int: "whole number", float: "number", str: "text"}
    name = words.get(typing.cast(type, hint), str(hint))
    low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
    if low is not None and high is not None:
        name += f" {low:g} to {high:g}"
    elif low is not None:
        name += f" from {low:g}"
    elif high is not None:
        name += f" up to {high:g}"
    return name + optional


def _default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
