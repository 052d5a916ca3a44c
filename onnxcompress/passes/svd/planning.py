"""Which layers become which chains: one budget, spent where a saved weight does least harm.

Every layer offers a curve: what its chains save against the output energy they miss. The curves
have the right shape but not the right height, for the same error can matter more in one layer than
in another, so each is scaled by one measurement: the error of the model's outputs when this layer
alone is replaced. :func:`onnxcompress.numerics.allocation.allocate` then spends the budget.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import PassError
from onnxcompress.graph.constants import constant_tensor
from onnxcompress.graph.cost import Shape, cost_of, probe_shapes
from onnxcompress.numerics.allocation import Curve, allocate, unit_step, within
from onnxcompress.numerics.low_rank import Chain, Form, Metric
from onnxcompress.passes.base import Skip
from onnxcompress.passes.prune.options import Budget, Measure
from onnxcompress.passes.prune.probe import OutputProbe
from onnxcompress.passes.prune.samples import judging_note, judging_samples, split
from onnxcompress.passes.svd.candidates import Candidate, Menu, Places, saved
from onnxcompress.passes.svd.emit import bias_vector
from onnxcompress.passes.svd.importance import output_metrics
from onnxcompress.passes.svd.moments import Array, Measured, batches, plain, whitened
from onnxcompress.passes.svd.options import SvdOptions
from onnxcompress.passes.svd.sites import Site, find_sites
from onnxcompress.passes.svd.timing import Stopwatch
from onnxcompress.passes.svd.trial import Trial

_JUDGES = 64
"""Samples for the measured losses, whose scale matters, not their digits."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One layer to replace.

    Attributes:
        site: The layer.
        candidate: The chain it becomes.
        chains: Its factors, one chain per batch entry.
        bias: New bias [O]; None to leave it.
        loss: Predicted loss of the model's outputs, or of the layer's where that is not measured.
    """

    site: Site
    candidate: Candidate
    chains: list[Chain]
    bias: Array | None
    loss: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to replace and how errors of the layers' outputs count, what not to replace and why."""

    entries: tuple[Entry, ...]
    metrics: Mapping[Site, Metric]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]

    @property
    def loss(self) -> float:
        """Predicted loss of all entries together."""
        return sum(entry.loss for entry in self.entries)


@dataclass(frozen=True, slots=True)
class _Offer:
    """What one layer can become, with the factor from its own loss to that of the model."""

    site: Site
    candidates: tuple[Candidate, ...]
    scale: float


@dataclass(frozen=True, slots=True)
class _Ranked:
    """What all layers can become, in groups that are measured together, with menus at hand."""

    groups: Sequence[Sequence[Site]]
    menus: Mapping[Site, tuple[Menu, Measured]]
    offers: Sequence[_Offer]


class Planner:
    """Plans the factorization of one model, which it does not change.

    Args:
        model: The model.
        options: What the user asked for.
        ctx: The job.

    Raises:
        UsageError: If a name pattern matches no layer.
    """

    def __init__(self, model: ir.Model, options: SvdOptions, ctx: PassContext) -> None:
        self._model, self._options, self._ctx = model, options, ctx
        found = find_sites(model, options)
        self._sites, self._found_skips = found.sites, found.skips
        self._feeds = {} if ctx.calibration is None else _shapes(ctx.calibration)
        known = probe_shapes(model, self._feeds)
        self._shapes: dict[str, Shape] = {v.name: s for v, s in known.items() if v.name}
        step = ctx.target.channel_alignment
        self._align = options.align or (step if options.for_latency else max(step // 4, 1))
        self._stopwatch = Stopwatch(model, self._shapes, ctx)
        self._metrics = output_metrics(model, self._sites) if options.whiten else {}
        self._skips: list[Skip] = []
        self._notes: list[str] = []
        self._ranked: _Ranked | None = None

    def skips(self) -> tuple[Skip, ...]:
        """Layers that cannot become chains at all, each reason once per operator."""
        places: dict[tuple[str, str], list[str]] = {}
        for skip in self._found_skips:
            places.setdefault((skip.op_type, skip.reason), []).append(skip.node)
        skips = []
        for (op_type, reason), nodes in places.items():
            more = f" (and {len(nodes) - 1} more such layers)" if len(nodes) > 1 else ""
            skips.append(Skip(nodes[0], op_type, reason + more))
        return tuple(skips)

    def possible(self) -> list[tuple[Site, str]]:
        """The layers that could become chains, with how far; looks at shapes only."""
        found = []
        for site in self._sites:
            form = Form.OUTPUT
            step = unit_step(site.kernel.most(form), 1, self._align, strict=self._options.align > 0)
            least = site.batch * site.kernel.parameters(form, (step,))
            if least < site.parameters and (self._options.embeddings or not _is_table(site)):
                found.append((site, f"down to {least} of {site.parameters} weights"))
        return found

    def plan(self, allowed: float | None = None) -> Plan:
        """Measure the layers, the first time, and choose.

        Args:
            allowed: Most summed loss, whatever the budget says; None for the budget alone.

        Raises:
            PassError: If the budget that was asked for cannot be reached.
        """
        if self._ranked is None:
            self._ranked = self._rank()
        ranked = self._ranked
        chosen = self._choose(ranked.offers, allowed)
        losses = {o.site: o.scale for o in ranked.offers}
        entries, slow = [], []
        for site, menu, measured in self._again(ranked.groups, ranked.menus, chosen):
            candidate = chosen[site]
            chains: list[Chain] | None = menu.chains(candidate)
            if self._options.for_latency:
                candidate, chains = self._fast(menu, candidate)
            if chains is None:
                reason = "a chain is not faster than the layer, by the clock"
                slow.append(Skip(site.node, site.op_type, reason))
                continue
            bias = self._bias(site, measured, chains)
            loss = losses[site] * candidate.loss
            entries.append(Entry(site, candidate, chains, bias, loss))
        order = {site: i for i, site in enumerate(self._sites)}
        entries.sort(key=lambda e: order[e.site])
        notes = tuple(dict.fromkeys(self._notes))
        return Plan(tuple(entries), self._metrics, (*self._skips, *slow), notes)

    def _rank(self) -> _Ranked:
        """What every layer can become and what that costs."""
        sites = [s for s in self._sites if self._wanted(s)]
        groups = list(batches(sites))
        menus: dict[Site, tuple[Menu, Measured]] = {}
        offers: list[_Offer] = []
        ranking, whole = self._probe()
        with contextlib.ExitStack() as stack:
            trial = None
            if whole is not None:
                trial = stack.enter_context(Trial(self._model, whole, self._ctx, sites))
            for number, group in enumerate(groups, start=1):
                part = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
                with self._ctx.progress.task(f"svd: ranking layers{part}", len(group)) as task:
                    for site, measured in self._measure(group, ranking):
                        menu = self._menu(site, measured)
                        offer = self._offer(menu, measured, trial)
                        if offer is not None:
                            offers.append(offer)
                        if len(groups) == 1 and ranking is self._ctx:
                            menus[site] = (menu, measured)
                        task.advance()
        return _Ranked(groups, menus, offers)

    def faster(self, changed: ir.Model) -> bool:
        """Whether ``changed`` as a whole is faster than the model, by the clock."""
        data = self._ctx.calibration
        if data is None:
            return True  # nothing to run it on; its layers were timed one by one
        before, after = self._stopwatch.times((self._model, changed), data.first())
        return after < before

    def _wanted(self, site: Site) -> bool:
        options = self._options
        if _is_table(site) and not options.embeddings:
            self._skips.append(Skip(site.node, site.op_type, "left alone by svd.embeddings=false"))
            return False
        if options.rank:
            return any(fnmatch.filter(site.names, pattern) for pattern, _ in options.ranks)
        return True

    def _measure(self, sites: Sequence[Site], ctx: PassContext) -> Iterator[tuple[Site, Measured]]:
        if not self._options.whiten:
            return ((site, plain(self._model, site)) for site in sites)
        text = "svd: second moments of inputs"
        return whitened(self._model, sites, ctx, self._metrics, text)

    def _again(
        self,
        groups: Sequence[Sequence[Site]],
        menus: Mapping[Site, tuple[Menu, Measured]],
        chosen: Mapping[Site, Candidate],
    ) -> Iterator[tuple[Site, Menu, Measured]]:
        """The chosen sites with their menus, measured once more where only a part ranked them."""
        for group in groups:
            wanted = [s for s in group if s in chosen]
            if menus:
                yield from ((s, *menus[s]) for s in wanted)
            elif wanted:
                for site, measured in self._measure(wanted, self._ctx):
                    yield site, self._menu(site, measured), measured

    def _menu(self, site: Site, measured: Measured) -> Menu:
        places = Places.of(site, self._shapes)
        return Menu(site, measured.spectra, places, self._options, self._align)

    def _probe(self) -> tuple[PassContext, OutputProbe | None]:
        """The job to rank by, and what measures the model's output error.

        Chains are judged on samples that they were not made from: with few rows per input they
        seem far better on their own. No probe where nothing is allocated or measured.
        """
        data = self._ctx.calibration
        if data is None or self._options.budget is None:
            return self._ctx, None
        fitting, held_out = split(data)
        samples = judging_samples(self._model, data, _JUDGES, len(self._sites))
        self._notes += judging_note("Losses of layers", samples, _JUDGES)
        if held_out is None:
            return self._ctx, OutputProbe(self._model, fitting, self._ctx, samples)
        probe = OutputProbe(self._model, held_out, self._ctx, samples)
        if not self._options.whiten:
            return self._ctx, probe
        return dataclasses.replace(self._ctx, calibration=fitting), probe

    def _offer(self, menu: Menu, measured: Measured, trial: Trial | None) -> _Offer | None:
        site, options, budget = menu.site, self._options, self._options.budget
        if budget is not None:
            candidates = menu.candidates(budget.measure)
        elif options.energy is not None:
            found = menu.at_energy(options.energy)
            candidates = [] if found is None else [found]
        else:
            rank = next(r for p, r in options.ranks if fnmatch.filter(site.names, p))
            found = menu.at_rank(rank)
            candidates = [] if found is None else [found]
        if not candidates:
            self._skips.append(Skip(site.node, site.op_type, _no_chain(site, options)))
            return None
        scale = 1.0
        if trial is not None and budget is not None:
            scale = self._scale(menu, measured, trial, candidates, budget)
        return _Offer(site, tuple(candidates), scale)

    def _scale(
        self,
        menu: Menu,
        measured: Measured,
        trial: Trial,
        candidates: Sequence[Candidate],
        budget: Budget,
    ) -> float:
        """Measured error of the model's outputs per loss, at about the budget's own fraction."""
        site = menu.site
        whole = menu.dense.macs if budget.measure is Measure.MACS else menu.dense.parameters
        goal = min(1 - budget.kept, 0.9) * whole
        tried = min(candidates, key=lambda c: abs(saved(menu.dense, c.cost, budget.measure) - goal))
        if tried.loss <= 0:
            return 1.0
        chains = menu.chains(tried)
        return trial.error_of(site, chains, self._bias(site, measured, chains)) / tried.loss

    def _bias(self, site: Site, measured: Measured, chains: Sequence[Chain]) -> Array | None:
        """The bias that makes up for the mean of what the chain misses."""
        if not site.takes_bias or measured.mean is None:
            return None
        old = bias_vector(self._model, site.bias, site.kernel.outputs)
        if site.measured_at_output:
            metric = self._metrics.get(site) or Metric(*[np.eye(len(old))] * 2)
            span = np.linalg.qr(metric.root @ chains[0].factors[-1])[0]
            made = measured.mean - old
            kept = metric.inverse @ (span @ (span.T @ (metric.root @ made)))
            return np.asarray(old + made - kept)
        weight = site.matrices(self._model)[0]
        return np.asarray(old + (weight - chains[0].dense()) @ measured.mean)

    # --- choice ----------------------------------------------------------------------------------

    def _choose(
        self, offers: Sequence[_Offer], allowed: float | None = None
    ) -> dict[Site, Candidate]:
        """One candidate per site that is replaced.

        Raises:
            PassError: If the budget that was asked for cannot be reached.
        """
        budget = self._options.budget
        if budget is None:
            return {offer.site: offer.candidates[0] for offer in offers}
        whole = cost_of(self._model, self._feeds)
        total = {
            Measure.MACS: whole.macs,
            Measure.PARAMS: whole.parameters,
            Measure.BYTES: whole.weight_bytes,
        }[budget.measure]
        tables = [self._savings(offer, budget.measure) for offer in offers]
        curves = []
        for number, (offer, table) in enumerate(zip(offers, tables, strict=True)):
            losses = (offer.scale * c.loss for c in table.values())
            curves.append(Curve(number, (0, *table), (0.0, *losses)))

        def left(counts: Mapping[int, int]) -> float:
            return 1.0 - sum(counts.values()) / max(total, 1)

        plan = allocate(curves, left, budget.kept)
        reached = left(plan)
        if offers and reached > budget.kept + 1e-9:
            self._unreachable(budget, reached)
            return {}
        if allowed is not None:
            plan = within(curves, left, budget.kept, plan, allowed)
        return {offers[i].site: tables[i][n] for i, n in plan.items() if n}

    def _savings(self, offer: _Offer, measure: Measure) -> dict[int, Candidate]:
        """Candidates by what they save, increasing."""
        dense = Places.of(offer.site, self._shapes).dense(offer.site)
        factor = 1
        if measure is Measure.BYTES:
            tensor = constant_tensor(self._model.graph.initializers[offer.site.weight])
            factor = 4 if tensor is None else int(tensor.dtype.itemsize)
        return {factor * saved(dense, c.cost, measure): c for c in offer.candidates}

    def _unreachable(self, budget: Budget, reached: float) -> None:
        """Refuse a budget that was asked for; leave the default one with a note."""
        message = (
            f"{budget.measure.value}={budget.kept:g} cannot be reached: with every layer at its "
            f"least rank, {reached:.3f} is left"
        )
        if not self._options.asks_for_budget:
            self._notes.append(
                f"Nothing was factorized: {message}. Set a budget to factorize all the same."
            )
            return
        possible = math.ceil(reached * 100) / 100
        hint = "Lower svd.align, or leave the pass out."
        if possible < 1:
            hint = f"Ask for {budget.measure.value}={possible:.2f} or more, or lower svd.align."
        raise PassError("svd", message, hint=hint)

    def _fast(self, menu: Menu, wanted: Candidate) -> tuple[Candidate, list[Chain] | None]:
        """The wanted chain if the clock agrees, else one of another form that saves as much."""
        for candidate in (wanted, *menu.alternatives(wanted)):
            chains = menu.chains(candidate)
            if self._stopwatch.faster(menu.site, chains):
                return candidate, chains
        return wanted, None


def _shapes(data: Dataset) -> dict[str, Shape]:
    return {name: tuple(array.shape) for name, array in data.first().items()}


def _is_table(site: Site) -> bool:
    return site.op_type == "Gather"


def _no_chain(site: Site, options: SvdOptions) -> str:
    shape = " x ".join(map(str, site.shape))
    if options.energy is not None:
        return f"no chain that saves keeps {options.energy:g} of the energy of its outputs"
    if options.rank:
        return f"a chain of this rank is no smaller than its weight ({shape})"
    return f"no chain of an aligned rank is smaller than its weight ({shape})"
