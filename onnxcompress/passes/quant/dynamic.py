"""Dynamic quantization of a model, alone or on top of what static quantization leaves in float.

``quant.mode=dynamic`` needs no data: every product, convolution and LSTM is a candidate. With
``auto`` static quantization comes first and dynamic forms are tried for what it leaves in float:
LSTM, nodes in branches and loops, nodes that lost against the clock. Where the static result is far
from float and its products hold most of the weights, the model with static convolutions and dynamic
products is built as well, and the better one by clock, fidelity and size is taken
(:mod:`.judge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.padding import without_padding
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import DataError
from onnxcompress.numerics.affine import weight_grid
from onnxcompress.passes.base import Change, PassReport, Skip
from onnxcompress.passes.quant.aim import Aim, find_aim
from onnxcompress.passes.quant.budget import Budget
from onnxcompress.passes.quant.constant_chains import drop_unread, fold_weight_chains
from onnxcompress.passes.quant.cores import MAY_BE_SLOWER, Arena, thread_counts
from onnxcompress.passes.quant.dynamic_plan import Refuse, supported, unsupported
from onnxcompress.passes.quant.dynamic_rules import RULES, Form, element_count, forms_of
from onnxcompress.passes.quant.dynamic_search import Item, Search, find_items, start
from onnxcompress.passes.quant.dynamic_write import write_forms
from onnxcompress.passes.quant.embeddings import quantize_embeddings
from onnxcompress.passes.quant.judge import Judge
from onnxcompress.passes.quant.options import Objective, QuantOptions
from onnxcompress.passes.quant.samples import macs_of, samples_for
from onnxcompress.passes.quant.static import NOT_FASTER, Static, StaticRun
from onnxcompress.runtime import open_session
from onnxcompress.search.goals import MARGIN_DB
from onnxcompress.targets import detect_target

_MUST_GAIN = 0.05
"""What dynamic products must gain in score: speeds scatter by as much between sessions."""

_LOSES = 0.98
"""Below this speed against float a result is not shipped (objective=latency)."""

_WORTH = 0.02
"""Share of the model's weights below which dynamic forms are not tried."""

_SYNTHETIC_SAMPLES = 8

_RATED, _RATED_MACS = 32, 4e10
"""Samples to compare results on, and the work that each comparison may take."""

_BY_TENSOR = frozenset({Form.CONV, Form.LSTM, Form.TENSOR})

_BATCH_NOTE = (
    "Dynamic quantization takes one range per tensor, over the whole batch: a sample's result "
    "depends a little on the samples beside it."
)

_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})


def add_dynamic(
    model: ir.Model,
    ctx: PassContext,
    options: QuantOptions,
    refuse: Refuse,
    static: StaticRun | None,
    budget: Budget,
) -> PassReport:
    """Quantize ``model`` in place.

    Args:
        model: The model.
        ctx: The job.
        options: How to quantize.
        refuse: Gives a reason to leave a node alone, or None.
        static: Static quantization; None to quantize dynamically only.
        budget: The time for searching.

    Raises:
        DataError: If ``static`` needs calibration data and there is none.
    """
    if not supported(ctx):
        if static is not None:
            return static(model, frozenset()).report
        return unsupported(model, ctx)
    return _Run(model, ctx, options, refuse, static, budget).report()


@dataclass(frozen=True, slots=True, eq=False)
class _Base:
    """A model with a static part, and what can be dynamic in the rest of it."""

    model: ir.Model
    static: Static
    items: tuple[Item, ...]
    reasons: Mapping[str, str]
    embedded: tuple[Change, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Result:
    """A whole result: a base and the forms written on top of it."""

    base: _Base
    model: ir.Model
    forms: Mapping[str, Form]


class _Run:
    """One run; collects what happened for the report."""

    def __init__(
        self,
        model: ir.Model,
        ctx: PassContext,
        options: QuantOptions,
        refuse: Refuse,
        static: StaticRun | None,
        budget: Budget,
    ) -> None:
        self._budget = budget
        self._model, self._ctx, self._options = model, ctx, options
        self._refuse, self._static = refuse, static
        self._work = model_io.clone(model)
        if fold_weight_chains(self._work):
            drop_unread(self._work)
        self._grid = weight_grid(reduce_range=ctx.target.reduce_range)
        self._figures: dict[str, float | int | str] = {}
        self._notes: list[str] = []
        self._aim: Aim | None = None
        asked = ctx.goals.min_sqnr_db
        aimed = options.min_sqnr_db if asked is None else asked + MARGIN_DB
        self._least_db = max(options.min_sqnr_db, aimed)

    def report(self) -> PassReport:
        """Quantize and say what was done."""
        base = self._based(frozenset())
        rivals = self._rivals(base)
        if not base.items and not rivals:
            result = _Result(base, base.model, {})
        else:
            result = self._chosen(base, rivals)
        if result.forms or result.base.static.nodes:
            self._model.graph = result.model.graph
            self._model.opset_imports.update(result.model.opset_imports)
        return self._merged(result)

    def _based(self, kept: frozenset[str], *, before: Static | None = None) -> _Base:
        """Static quantization of everything but ``kept``; the rest may become dynamic.

        Args:
            kept: Nodes that stay float.
            before: What static quantization made of the whole, where that is known.
        """
        model = model_io.clone(self._work)
        static = Static(PassReport(), frozenset())
        run = self._static if before is None else before.again
        if run is not None:
            static = run(model, kept)
        embedded: tuple[Change, ...] = ()
        if not static.nodes and self._options.embeddings and not self._options.op_types:
            refused = frozenset(n.name or "" for n in model.graph if self._refuse(n))
            embedded, _ = quantize_embeddings(model, refused, self._options.min_sqnr_db)
        items, reasons = find_items(
            model,
            lambda node: self._refuse(node) if node.name not in static.nodes else "it is static",
            convolutions=self._static is None,
            stored=not static.nodes,
        )
        reasons = {name: why for name, why in reasons.items() if name not in static.nodes}
        if 0 < sum(item.elements for item in items) < _WORTH * _elements(model):
            few = "it is too small a part of the model to matter"
            reasons |= {item.name: few for item in items}
            items = ()
        return _Base(model, static, items, reasons, embedded)

    def _rivals(self, base: _Base) -> frozenset[str]:
        """Static products that a dynamic form could replace; none unless they matter."""
        if not base.static.nodes or not self._timed():
            return frozenset()
        products, weights, others = set(), 0, 0
        opset = self._work.opset_imports.get("", 0)
        for node in self._work.graph:
            if node.name not in base.static.nodes or node.op_type not in RULES:
                continue
            size = element_count(node)
            found = forms_of(node, opset)
            if isinstance(found, tuple) and Form.TENSOR in found:
                products.add(node.name)
                weights += size
            else:
                others += size
        return frozenset(products) if weights >= others else frozenset()

    def _chosen(self, base: _Base, rivals: frozenset[str]) -> _Result:
        try:
            judge = self._judge()
        except DataError as error:
            self._notes.append(
                f"The dynamic forms were neither timed nor checked: {error.message}."
            )
            forms = start(base.items)
            model = model_io.clone(base.model)
            done = write_forms(model, forms, self._grid)
            return _Result(base, model, {n: f for n, f in forms.items() if n in done})
        if not self._timed():
            result = self._searched(base, judge)
            return result if self._keeps(result.model) else _Result(base, base.model, {})
        results = [self._searched(base, judge)] if base.items else []
        if rivals and self._budget.left > 0 and self._better_dynamic(base, rivals, judge):
            other = self._searched(self._based(rivals, before=base.static), judge)
            if other.forms:
                results.append(other)
        if not results and not base.items:
            return _Result(base, base.model, {})
        idle = {item.name: item.idle for item in base.items if item.idle is not None}
        results.append(
            self._built(base, Search(base.model, base.items, judge, self._grid, least_db=0.0), idle)
        )
        return self._fastest(results, judge)

    def _better_dynamic(self, base: _Base, rivals: frozenset[str], judge: Judge) -> bool:
        """Whether a static result gains by dynamic products, as a draft shows it.

        The draft is the static model with its products in float, and these in their usual form.
        """
        if base.static.draft is None:
            return True
        draft = base.static.draft(rivals)
        items, _ = find_items(
            draft,
            lambda node: None if node.name in rivals else "it is static",
            convolutions=False,
        )
        if not items:
            return False
        write_forms(draft, start(items), self._grid)
        rated, other = judge.rate(base.model), judge.rate(draft)
        with self._budget.spend():
            times = judge.times([base.model, draft])
        self._ctx.progress.log(
            f"static {times[0] * 1e3:.3f} ms, {rated.sqnr_db:.1f} dB; dynamic products, a draft: "
            f"{times[1] * 1e3:.3f} ms, {other.sqnr_db:.1f} dB"
        )
        return other.score(times[1]) > rated.score(times[0]) + _MUST_GAIN

    def _searched(self, base: _Base, judge: Judge) -> _Result:
        search = Search(base.model, base.items, judge, self._grid, least_db=self._least_db)
        if self._timed():
            with self._budget.spend() as seconds:
                found = search.run(seconds=seconds, progress=self._ctx.progress)
            timed = int(self._figures.get("dynamic_forms_timed", 0)) + found.timed
            self._figures["dynamic_forms_timed"] = timed
        else:
            found = search.untimed()
        return self._built(base, search, found.forms)

    def _built(self, base: _Base, search: Search, forms: Mapping[str, Form]) -> _Result:
        model, done = search.written(forms)
        return _Result(base, model, {n: f for n, f in forms.items() if n in done})

    def _fastest(self, results: Sequence[_Result], judge: Judge) -> _Result:
        """The best result that is not slower than float; the last one if there is none."""
        for _ in range(2):  # a verdict is heard twice where it goes against all
            times = judge.times([self._model, *(result.model for result in results)])
            rated = [judge.rate(result.model) for result in results]
            scores = [
                (each.score(seconds), place)
                for place, (each, seconds) in enumerate(zip(rated, times[1:], strict=True))
                if times[0] / seconds >= _LOSES and each.sqnr_db >= self._least_db
            ]
            scores = [each for each in scores if self._keeps(results[each[1]].model)]
            if scores:
                break
        last = results[-1]  # its executed graph is that of the base, so time need not decide
        if not scores and (rated[-1].sqnr_db < self._least_db or not self._keeps(last.model)):
            return _Result(last.base, last.base.model, {})
        place = len(results) - 1
        for _, contender in sorted(scores, reverse=True):
            if contender == place or not self._slower_on_cores(results[contender].model, judge):
                place = contender
                break
        if results[place].forms:
            self._figures["dynamic_sqnr_db"] = round(rated[place].sqnr_db, 1)
            self._figures["speed_ratio"] = round(times[0] / times[place + 1], 3)
        return results[place]

    def _slower_on_cores(self, model: ir.Model, judge: Judge) -> bool:
        """Whether a model is slower than float with the threads that it will run on."""
        for threads in set(thread_counts(self._ctx.session.threads)) - {1}:
            verdict = Arena(threads, _LOSES).hear(
                partial(open_session, self._model), partial(open_session, model), judge.timed
            )
            self._ctx.progress.log(str(verdict))
            if verdict.slower:
                return True
            self._figures |= verdict.figures
            self._notes += verdict.notes
        return False

    def _keeps(self, model: ir.Model) -> bool:
        """Whether ``model`` keeps the user's limits on the calibration samples."""
        if self._ctx.goals.are_default or self._ctx.calibration is None:
            return True
        if self._aim is None:
            self._aim = find_aim(self._model, self._ctx, self._options.min_sqnr_db)
        session = open_session(model, self._aim.settings)
        return not self._aim.goals.missed(self._aim.reference.compare(session))

    def _timed(self) -> bool:
        return (
            self._options.objective is Objective.LATENCY
            and self._options.search_seconds > 0
            and self._ctx.target == detect_target()
        )

    def _judge(self) -> Judge:
        """What rates results: samples as they are, outputs without what comes of padding."""
        samples = self._ctx.calibration
        if samples is None:
            synthetic = synthetic_dataset(
                self._model, samples=_SYNTHETIC_SAMPLES, seed=self._ctx.seed
            )
            return Judge(self._model, synthetic)
        cut = without_padding(samples, lambda: open_session(self._model, self._ctx.session).run)
        filled = None if cut is None else samples
        count = samples_for(_RATED, _RATED_MACS, macs_of(self._model, samples))
        return Judge(self._model, cut or samples, samples.first(), count, filled)

    def _merged(self, result: _Result) -> PassReport:
        """The static report and what became dynamic, in one."""
        static, forms = result.base.static.report, result.forms
        nodes = {node.name or "": node for node in self._work.graph.all_nodes()}
        types = {name: node.op_type for name, node in nodes.items()}
        inner = {name for name, node in nodes.items() if node.graph is not self._work.graph}
        embedded = {change.node for change in result.base.embedded} if forms else set()
        treated = embedded | set(forms)
        skips = {skip.node: skip for skip in static.skips if skip.node not in treated}
        for item in result.base.items:
            if item.name not in forms and item.name not in skips:
                reason = "by the clock or the outputs it is better in float"
                skips[item.name] = Skip(item.name, item.op_type, reason)
        for name, reason in result.base.reasons.items():
            # Static quantization does not look into branches nor at recurrent nodes.
            if name not in skips or name in inner or types.get(name) in _RECURRENT:
                skips[name] = Skip(name, types.get(name, ""), reason)
        changes = [Change(name, types.get(name, ""), form.value) for name, form in forms.items()]
        computed = sum(form is not Form.STORED for form in forms.values())
        figures = dict(static.figures) | self._figures
        if self._budget.spent:
            figures["search_seconds"] = round(self._budget.spent, 1)
        figures["integer_nodes"] = int(figures.get("integer_nodes", 0)) + computed
        if forms:
            figures |= {"dynamic_nodes": computed, "stored_nodes": len(forms) - computed}
        notes = list(static.notes)
        if forms and notes and result.base.static.left_in_float:
            notes.pop()
        if forms:  # the speed of the static part alone, which is not what is shipped
            notes = [n for n in notes if not n.startswith((NOT_FASTER, MAY_BE_SLOWER))]
        notes += self._notes
        if forms and not computed:
            notes.append(
                "Dynamic forms are no faster than float here: weights are stored in 8 bits, which "
                "onnxruntime turns back into float once, at load."
            )
        if _BY_TENSOR & set(forms.values()):
            notes.append(_BATCH_NOTE)
        if forms:
            changes = [*result.base.embedded, *changes]
        return PassReport(
            (*static.changes, *changes),
            tuple(skips.values()),
            figures,
            tuple(notes),
            static.tables,
        )


def _elements(model: ir.Model) -> int:
    """Elements of all floating-point or 8-bit constants."""
    return sum(
        v.const_value.size
        for graph in model.graphs()
        for v in graph.initializers.values()
        if v.const_value is not None
    )
