"""Which nodes round their data at run time, and in which form: found by clock and fidelity.

As in :mod:`.search` one property after another is decided and all its alternatives are timed in
turns: the form of products, LSTM, Conv, and from which size on products take part. Of what stays
float the weights are stored in 8 bits: onnxruntime computes them at load, so that the executed
graph, and its speed, are those of float.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.numerics.affine import Grid
from onnxcompress.passes.quant.dynamic_rules import (
    RULES,
    Form,
    element_count,
    forms_of,
    product_of,
)
from onnxcompress.passes.quant.dynamic_write import Memory, write_forms
from onnxcompress.passes.quant.judge import Judge, Rated
from onnxcompress.progress import Progress

Forms = Mapping[str, Form]

_MARGIN = 0.02
"""What a change must gain in score: less is within the noise of the clock."""

_STEPS = (16384, 65536, 262144)
"""Sizes of weights below which products are tried in float."""

_FEW_ROWS = 4
"""Up to so many rows a product by blocks is the faster one."""


@dataclass(frozen=True, slots=True)
class Item:
    """A node with a dynamic form.

    Attributes:
        name: Its name.
        op_type: Its operator.
        forms: The forms it can take, STORED left out.
        idle: What it is otherwise: STORED, or None for float where that is not possible.
        elements: Size of its weights.
        rows: Rows of its data in one run, where known; 0 otherwise.
    """

    name: str
    op_type: str
    forms: tuple[Form, ...]
    idle: Form | None
    elements: int
    rows: int


def find_items(
    model: ir.Model,
    refuse: Callable[[ir.Node], str | None],
    *,
    convolutions: bool,
    stored: bool = False,
) -> tuple[tuple[Item, ...], dict[str, str]]:
    """Nodes with a dynamic form, and the reason for each other node that might have had one.

    Args:
        model: The model.
        refuse: Gives a reason to leave a node alone, or None.
        convolutions: Whether to take a Conv of the main graph that is no product. Its integer
            kernel seldom pays, and static quantization has had its turn.
        stored: Whether such a Conv, where it is not taken, can have its weights stored.
    """
    items, reasons = [], {}
    opset = model.opset_imports.get("", 0)
    for node in model.graph.all_nodes():
        if node.op_type not in RULES or node.domain not in {"", "ai.onnx"}:
            continue
        name = node.name or ""
        reason = refuse(node)
        found: tuple[Form, ...] | str = forms_of(node, opset) if reason is None else reason
        if isinstance(found, str):
            reasons[name] = found
            continue
        if Form.CONV in found and node.graph is model.graph and not convolutions:
            found = tuple(form for form in found if form is Form.STORED and stored)
            if not found:
                reasons[name] = "a dynamic convolution is slower than one in float"
                continue
        idle = Form.STORED if Form.STORED in found else None
        forms = tuple(form for form in found if form is not Form.STORED)
        items.append(Item(name, node.op_type, forms, idle, element_count(node), _rows(node)))
    return tuple(items), reasons


def _rows(node: ir.Node) -> int:
    product = product_of(node)
    if isinstance(product, str) or product.data.shape is None:
        return 0
    rows = 1
    for length in product.data.shape[:-1]:
        rows *= length if isinstance(length, int) else 0
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What the search ended with.

    Attributes:
        forms: The form of each node that takes one.
        rated: The model.
        timed: Alternatives timed.
    """

    forms: Forms
    rated: Rated
    timed: int


def start(items: Sequence[Item]) -> dict[str, Form]:
    """The forms that are usually best: everything dynamic but Conv."""
    chosen = {}
    for item in items:
        form = item.forms[0] if item.forms and item.forms[0] is not Form.CONV else item.idle
        if form is not None:
            chosen[item.name] = form
    return chosen


class Search:
    """Builds and rates one model with different forms.

    Args:
        base: The model to write forms into; it is not changed.
        items: Its nodes with a dynamic form.
        judge: Rates the results.
        grid: The grid of weights.
        least_db: SQNR below which a result is no use.
    """

    def __init__(
        self, base: ir.Model, items: Sequence[Item], judge: Judge, grid: Grid, least_db: float
    ) -> None:
        self._base, self._items, self._judge = base, items, judge
        self._grid, self._least_db = grid, least_db
        self._memory: Memory = {}

    def build(self, forms: Forms) -> Rated:
        """The model with ``forms`` written into it."""
        return self._judge.rate(self.written(forms)[0])

    def written(self, forms: Forms) -> tuple[ir.Model, frozenset[str]]:
        """The model with ``forms`` written into it, and the nodes that were really changed."""
        model = model_io.clone(self._base)
        return model, write_forms(model, forms, self._grid, self._memory)

    def untimed(self) -> Found:
        """The usual forms; those that are too far from float stay float."""
        forms = start(self._items)
        rated = self.build(forms)
        if rated.sqnr_db < self._least_db:
            forms = self._sound(forms)
            rated = self.build(forms)
        return Found(forms, rated, 0)

    def _sound(self, forms: Forms) -> dict[str, Form]:
        """``forms`` without the nodes that alone bring the output below the limit."""
        kept: dict[str, Form] = {}
        for group in _groups(self._items):
            part = {item.name: forms[item.name] for item in group if item.name in forms}
            idle = {item.name: item.idle for item in group if item.idle is not None}
            for choice in (part, idle, {}):
                if self.build({**kept, **choice}).sqnr_db >= self._least_db:
                    kept |= choice
                    break
        return kept

    def run(self, *, seconds: float, progress: Progress) -> Found:
        """Find the forms with the best score.

        Args:
            seconds: No further property is searched after this time.
            progress: Where to report progress.
        """
        started = time.monotonic()
        best = self.untimed()
        timed = 0
        properties = list(self._properties())
        with progress.task("timing dynamic forms", total=len(properties)) as task:
            for alternatives in properties:
                if time.monotonic() - started > seconds:
                    break
                rivals = [best]
                for forms in alternatives(best.forms):
                    if any(forms == rival.forms for rival in rivals):
                        continue
                    rated = self.build(forms)
                    if rated.sqnr_db >= self._least_db:
                        rivals.append(Found(forms, rated, 0))
                if len(rivals) > 1:
                    timed += len(rivals) - 1
                    best = self._best(rivals, progress)
                task.advance()
        return Found(best.forms, best.rated, timed)

    def _best(self, rivals: Sequence[Found], progress: Progress) -> Found:
        times = self._judge.times([rival.rated.model for rival in rivals])
        scores = [r.rated.score(seconds) for r, seconds in zip(rivals, times, strict=True)]
        scores[0] += _MARGIN
        for rival, seconds, score in zip(rivals, times, scores, strict=True):
            used = ", ".join(sorted({form.name for form in rival.forms.values()})) or "float"
            progress.log(
                f"{seconds * 1e3:.3f} ms, {rival.rated.sqnr_db:.1f} dB, score {score:.3f}: {used}"
            )
        return rivals[scores.index(max(scores))]

    def _properties(self) -> Iterator[Callable[[Forms], list[dict[str, Form]]]]:
        """Each property as a function from the best forms so far to its alternatives."""
        for group in _groups(self._items):
            yield partial(_variants, group)
        products = [item for item in self._items if Form.TENSOR in item.forms]
        sizes = {item.elements for item in products}
        if len(sizes) > 1:
            yield lambda best: [
                _with(best, [item for item in products if item.elements < step], None)
                for step in _STEPS
                if min(sizes) < step <= max(sizes)
            ]


def _groups(items: Sequence[Item]) -> list[list[Item]]:
    """Items that take the same forms: products, LSTM, Conv."""
    made: dict[Form, list[Item]] = {}
    for item in items:
        if item.forms:
            made.setdefault(item.forms[0], []).append(item)
    return list(made.values())


def _variants(group: Sequence[Item], best: Forms) -> list[dict[str, Form]]:
    forms = dict.fromkeys(form for item in group for form in item.forms)
    made = [_with(best, group, form) for form in forms]
    few = [item for item in group if 0 < item.rows <= _FEW_ROWS and Form.BLOCKS in item.forms]
    if 0 < len(few) < len(group):
        made.append(_with(_with(best, group, Form.TENSOR), few, Form.BLOCKS))
    return [*made, _with(best, group, None)]


def _with(best: Forms, group: Sequence[Item], form: Form | None) -> dict[str, Form]:
    """``best`` with ``form`` for the items of ``group`` that can take it, idle for the others."""
    changed = dict(best)
    for item in group:
        wanted = form if form in item.forms else item.idle
        if wanted is None:
            changed.pop(item.name, None)
        else:
            changed[item.name] = wanted
    return changed
