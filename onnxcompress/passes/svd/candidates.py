"""What one layer can become: chains and ranks with what they save and what they lose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.graph.cost import Shape
from onnxcompress.numerics.allocation import unit_step
from onnxcompress.numerics.low_rank import Chain, Form, Spectrum
from onnxcompress.passes.prune.options import Measure
from onnxcompress.passes.svd.options import SvdOptions
from onnxcompress.passes.svd.sites import Kind, Site

_GRID = 12
"""Values tried for the first rank of a Tucker chain."""
_ENERGY_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Cost:
    """Weights and multiply-accumulates of a layer or chain."""

    parameters: int
    macs: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One chain for a layer.

    Attributes:
        form: Which chain.
        ranks: Its ranks.
        cost: What it costs.
        loss: Part of the layer's output energy that it misses.
    """

    form: Form
    ranks: tuple[int, ...]
    cost: Cost
    loss: float

    def __str__(self) -> str:
        return f"{self.form.value} form, rank {' x '.join(map(str, self.ranks))}"


@dataclass(frozen=True, slots=True)
class Places:
    """How often the parts of a layer are applied in one run.

    Attributes:
        outputs: Positions of the output.
        inputs: Positions of the input.
        between: Positions between the two parts of a spatial chain.
    """

    outputs: int
    inputs: int
    between: int

    @classmethod
    def of(cls, site: Site, shapes: Mapping[str, Shape]) -> Places:
        """Count them; shapes by value name, unknown ones count as 1."""
        data = shapes.get(site.data, ())
        if site.kind is not Kind.CONV:
            axis = site.unfold.axis if hasattr(site.unfold, "axis") else 1
            count = math.prod(data) // max(data[axis], 1) if data else 1
            return cls(count, count, count)
        output = shapes.get(site.output, ())
        outputs = math.prod((*output[:1], *output[2:]))
        inputs = math.prod((*data[:1], *data[2:]))
        between = outputs
        if len(data) == 4 and len(output) == 4:
            between = outputs // max(output[3], 1) * data[3]
        return cls(outputs, inputs, between)

    def macs(self, site: Site, form: Form, ranks: tuple[int, ...]) -> int:
        """Multiply-accumulates of a chain."""
        kernel, (first, last) = site.kernel, (ranks[0], ranks[-1])
        if site.kind is Kind.EMBEDDING:
            return self.outputs * first * kernel.outputs
        if form is Form.OUTPUT:
            return self.outputs * kernel.parameters(form, ranks)
        inside, outside = kernel.split(form)
        if form is Form.SPATIAL:
            second = self.outputs * first * outside * kernel.outputs
            return self.between * first * inside + second
        whole = first * outside * (kernel.outputs if form is Form.INPUT else last)
        outer = 0 if form is Form.INPUT else last * kernel.outputs
        return self.inputs * first * inside + self.outputs * (whole + outer)

    def dense(self, site: Site) -> Cost:
        """What the layer itself costs."""
        table = site.kind is Kind.EMBEDDING
        return Cost(site.parameters, 0 if table else self.outputs * site.parameters // site.batch)


class Menu:
    """All candidates of one layer that save something.

    Args:
        site: The layer.
        spectra: What ranks cost it, one per batch entry.
        places: How often its parts are applied.
        options: What the user asked for.
        align: Multiple that ranks should keep.
    """

    def __init__(
        self,
        site: Site,
        spectra: Sequence[Spectrum],
        places: Places,
        options: SvdOptions,
        align: int,
    ) -> None:
        self.site, self._spectra, self._places = site, spectra, places
        self._options, self._align = options, align
        self.dense = places.dense(site)

    def candidates(self, measure: Measure) -> list[Candidate]:
        """Chains that save, none worse in loss than one that saves as much."""
        found = [self._made(form, ranks) for form, ranks in self._allowed()]
        found = [c for c in found if self._saves(c, measure)]
        found.sort(key=lambda c: (saved(self.dense, c.cost, measure), -c.loss), reverse=True)
        best: list[Candidate] = []
        for candidate in found:
            if not best or candidate.loss < best[-1].loss - 1e-12:
                best.append(candidate)
        return best[::-1]

    def at_energy(self, kept: float) -> Candidate | None:
        """The chain of fewest weights that keeps this part of the energy; None if none saves."""
        limit = 1.0 - kept + _ENERGY_SLACK
        able = [c for c in self.candidates(Measure.PARAMS) if c.loss <= limit]
        return min(able, key=lambda c: c.cost.parameters, default=None)

    def at_rank(self, rank: int) -> Candidate | None:
        """The chain of this rank (for Tucker: of both ranks); None if it does not save."""
        form = next(self._forms(), None)
        if form is None or rank > self.site.kernel.most(form):
            return None
        candidate = self._made(form, (rank,) if form is not Form.TUCKER else (rank, rank))
        return candidate if self._saves(candidate, Measure.PARAMS) else None

    def alternatives(self, wanted: Candidate) -> list[Candidate]:
        """Of every other form the chain of least loss that costs no more than ``wanted``."""
        best: dict[Form, Candidate] = {}
        for form, ranks in self._allowed():
            if form is wanted.form:
                continue
            candidate = self._made(form, ranks)
            small = candidate.cost.parameters <= wanted.cost.parameters
            if not small or candidate.cost.macs > wanted.cost.macs:
                continue
            if form not in best or candidate.loss < best[form].loss:
                best[form] = candidate
        return sorted(best.values(), key=lambda c: c.loss)

    def chains(self, candidate: Candidate) -> list[Chain]:
        """The factors of a candidate."""
        return [s.chain(candidate.form, candidate.ranks) for s in self._spectra]

    def _forms(self) -> Iterator[Form]:
        """Forms the layer allows and the user wants; a matrix has but one."""
        forms = self._spectra[0].forms
        if forms == (Form.OUTPUT,):
            return iter(forms)
        return (f for f in forms if self._options.form.allows(f))

    def _allowed(self) -> Iterator[tuple[Form, tuple[int, ...]]]:
        kernel = self.site.kernel
        for form in self._forms():
            firsts = self._ranks(kernel.most(form))
            if form is not Form.TUCKER:
                yield from ((form, (rank,)) for rank in firsts)
                continue
            lasts = _thinned(self._ranks(kernel.outputs))
            for first in _thinned(firsts):
                full = first * kernel.split(form)[1]
                yield from ((form, (first, last)) for last in lasts if last <= full)

    def _ranks(self, most: int) -> list[int]:
        step = unit_step(most, 1, self._align, strict=self._options.align > 0)
        return list(range(step, most + 1, step))

    def _made(self, form: Form, ranks: tuple[int, ...]) -> Candidate:
        parameters = self.site.batch * self.site.kernel.parameters(form, ranks)
        if self.site.takes_bias and self.site.bias is None:
            parameters += self.site.kernel.outputs
        cost = Cost(parameters, self._places.macs(self.site, form, ranks))
        losses = [s.loss(form, ranks) for s in self._spectra]
        energies = [s.energy for s in self._spectra]
        whole = sum(energies)
        mixed = sum(a * b for a, b in zip(losses, energies, strict=True))
        return Candidate(form, ranks, cost, mixed / whole if whole > 0 else 0.0)

    def _saves(self, candidate: Candidate, measure: Measure) -> bool:
        """Whether it saves what is asked for, and costs no more of the other."""
        if saved(self.dense, candidate.cost, measure) <= 0:
            return False
        if candidate.cost.parameters >= self.dense.parameters:
            return False
        return self.site.kind is Kind.EMBEDDING or candidate.cost.macs <= self.dense.macs


def saved(dense: Cost, cost: Cost, measure: Measure) -> int:
    """What a chain saves, in multiply-accumulates or weights."""
    if measure is Measure.MACS:
        return dense.macs - cost.macs
    return dense.parameters - cost.parameters


def _thinned(values: Sequence[int]) -> list[int]:
    """At most :data:`_GRID` of ``values``, evenly spread, the last one among them."""
    if len(values) <= _GRID:
        return list(values)
    places: npt.NDArray[np.int64] = np.linspace(0, len(values) - 1, _GRID).round().astype(np.int64)
    return [values[i] for i in places]
