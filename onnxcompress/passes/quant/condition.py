"""Bring a float model into the form that loses least on integers, as far as the outputs show it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.context import PassContext
from onnxcompress.passes.base import Change, Skip
from onnxcompress.passes.equalize.balance import equalize, largest_spread
from onnxcompress.passes.quant.build import Builder
from onnxcompress.passes.quant.measure import Measured
from onnxcompress.passes.quant.options import Equalize, QuantOptions, RangeMethod, Rounding
from onnxcompress.passes.quant.placement import Network
from onnxcompress.passes.quant.samples import few_samples, macs_of
from onnxcompress.passes.quant.smoothing import Applied, Choice, apply, choose, find_sites

_FEEDBACKS = (1.0, 0.4)
"""Weight of the noise of rounded weights: all of it, and what error feedback leaves of it."""

_CHEAP_COLUMNS = 512
"""Up to so many columns the comparison rounds with error feedback as the result will."""

_LEAST_GAIN_DB = 1.0
"""A model is smoothed if its worst output gains this much: on a small vision transformer a gain of
0.7 dB on calibration samples was none on others, and each Mul costs time."""

_ROUNDS = 20
"""Most turns through the layers of an equalization."""

_WORTH_A_LOOK = 300.0
"""Equalization is measured where its factors for one tensor differ this much."""

_LEAST_EQUALIZATION_DB = 3.0
"""What it must gain with nearest rounding: below, error feedback and corrected biases make up for
what it gains (see docs/adr/0010-equalize-seldom.md)."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditioned:
    """What :func:`condition` found.

    Attributes:
        choices: How to smooth; empty where that gains nothing.
        skips: Products that could not take part.
        tried: Ways compared.
        gain_db: What the worst output gained.
        equalized_db: What it gained by cross-layer equalization, which comes first; None where the
            weights stay as they are.
    """

    choices: tuple[Choice, ...] = ()
    skips: tuple[Skip, ...] = ()
    tried: int = 0
    gain_db: float = 0.0
    equalized_db: float | None = None

    @property
    def changes_model(self) -> bool:
        """Whether there is anything to carry out."""
        return bool(self.choices) or self.equalized_db is not None


def condition(
    ctx: PassContext,
    model: ir.Model,
    options: QuantOptions,
    chosen: frozenset[str],
    measured: Measured,
    even: frozenset[str] = frozenset(),
) -> Conditioned:
    """Find the equalization and the smoothing with which the outputs of ``model`` keep most.

    Args:
        ctx: The job.
        model: The float model, prepared; it is not changed.
        options: How to quantize.
        chosen: Nodes that will run on integers.
        measured: What is known of the model.
        even: Values whose channels share their range already; only an exponent that was asked for
            smooths them.
    """
    copy, gained = _equalized(ctx, model, options, chosen)
    if gained is None:
        return _smoothing(ctx, model, options, chosen, measured, even)
    found = _smoothing(ctx, copy, options, chosen, Measured(), even)
    return replace(found, equalized_db=gained)


def _equalized(
    ctx: PassContext, model: ir.Model, options: QuantOptions, chosen: frozenset[str]
) -> tuple[ir.Model, float | None]:
    """The model with equalized weights and what it gains; the model itself where it does not.

    Weights with a scale per channel hardly need it, so it is measured only where channels differ
    very much, and as cheaply as can be: whole ranges, nearest rounding, a few samples.
    """
    if options.equalize is Equalize.OFF or largest_spread(model) < _WORTH_A_LOOK:
        return model, None
    copy = model_io.clone(model)
    equalize(copy, _ROUNDS)
    few = few_samples(ctx, macs_of(model, ctx.calibration))
    cheap = replace(options, weights=Rounding.NEAREST, ranges=RangeMethod.MINMAX)
    before, after = (_sqnr_db(few, each, cheap, chosen, Measured()) for each in (model, copy))
    gain = after - before
    return (copy, gain) if gain >= _LEAST_EQUALIZATION_DB else (model, None)


def _smoothing(
    ctx: PassContext,
    model: ir.Model,
    options: QuantOptions,
    chosen: frozenset[str],
    measured: Measured,
    even: frozenset[str],
) -> Conditioned:
    if options.smooth == "off":
        return Conditioned()
    network = Network(model, symmetric=ctx.target.symmetric_activations)
    alpha = options.smoothing_alpha()
    sites, skips = find_sites(ctx, model, network, chosen, even if alpha is None else frozenset())
    if not sites:
        return Conditioned(skips=skips)
    if alpha is not None:
        return Conditioned(choose(model, sites, 1.0, alpha), skips)
    few = few_samples(ctx, macs_of(model, ctx.calibration))
    if max(site.data.square.size for site in sites) > _CHEAP_COLUMNS:
        options = replace(options, weights=Rounding.NEAREST)
        measured = replace(measured, covariances={})
    before: float | None = None
    best: tuple[Choice, ...] = ()
    gain, tried = _LEAST_GAIN_DB, 0
    for feedback in _FEEDBACKS:
        choices = choose(model, sites, feedback)
        copy = model_io.clone(model)
        done = apply(copy, choices)
        if not done.changes:
            continue
        if before is None:
            before = _sqnr_db(few, model, options, chosen, measured)
        tried += 1
        known = measured.rescaled(done.moved, done.factors)
        gained = _sqnr_db(few, copy, options, chosen, known) - before
        if gained > gain:
            best, gain = choices, gained
    return Conditioned(best, skips, tried, gain if best else 0.0)


def smoothed(model: ir.Model, found: Conditioned) -> Applied:
    """Carry out ``found`` on the model it was made for, or an equal copy, in place."""
    changes: tuple[Change, ...] = ()
    if found.equalized_db is not None:
        balanced, _, _ = equalize(model, _ROUNDS)
        changes = tuple(
            Change(b.node, b.op_type, f"balanced with {b.layers - 1} other layers")
            for b in balanced
        )
    done = apply(model, found.choices)
    return replace(done, changes=changes + done.changes)


def _sqnr_db(
    ctx: PassContext,
    model: ir.Model,
    options: QuantOptions,
    chosen: frozenset[str],
    measured: Measured,
) -> float:
    builder = Builder(model, options, ctx, measured)
    builder.measure(chosen)
    found = builder.quick_sqnr_db(chosen)
    return found if np.isfinite(found) else 200.0
