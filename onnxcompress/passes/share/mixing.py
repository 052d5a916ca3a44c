"""More bits for the weights whose errors hurt the model most, fewer for the others.

Each weight is first given codes alone, of the bits asked for, and the error of the model's outputs
is measured. A bit more or less means a quarter or four times of it, so that weight ``i`` with
``b_i`` bits is expected to cost

    loss_i(b_i) = e_i 4^(b - b_i)

and :func:`onnxcompress.numerics.allocation.allocate` finds the bits of least ``Σ loss_i`` that take
no more bytes together than ``b`` bits each, or, while ``Σ loss_i`` is large, up to ``margin`` more.
Codes in whole bytes are counted as they are in an archive, by their bits, and get no margin.

Source: Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import set_initializer
from onnxcompress.numerics.allocation import Curve, allocate
from onnxcompress.passes.prune.consumers import Consumer
from onnxcompress.passes.prune.lost import losses_for
from onnxcompress.passes.prune.probe import OutputProbe
from onnxcompress.passes.prune.samples import judging_samples, split
from onnxcompress.passes.prune.suffix import SuffixProbe
from onnxcompress.passes.share.emit import code_bytes
from onnxcompress.passes.share.fit import MOST_BITS, Fitted, fit_all
from onnxcompress.passes.share.options import Assign, Codebook, Packing, ShareOptions
from onnxcompress.passes.share.select import Weight

MEASURED = 32
"""Samples for the measured errors, whose order of size matters, not their digits."""
_FEWER = 1
"""Bits that a weight may give up at most."""
_ENOUGH = 1e-5
"""Expected error of the outputs (50 dB) below which no bytes are spent beyond those asked for; more
where passes before have lost more (:mod:`onnxcompress.passes.prune.lost`)."""
_LOSSY = frozenset({"prune", "svd"})
"""Passes that lose more than codes do."""
_BUDGETS = 9
"""Budgets that are tried."""
_ROUNDS = 1
"""Rounds of the fit whose error is measured; the others gain about as much everywhere."""


def mixes(options: ShareOptions, ctx: PassContext) -> bool:
    """Whether weights may get different numbers of bits."""
    return (
        options.mixed
        and options.codebook is Codebook.SCALAR
        and options.assign is Assign.FEEDBACK
        and ctx.calibration is not None
    )


def mixed_bits(
    model: ir.Model,
    weights: Sequence[Weight],
    layers: Mapping[str, Consumer],
    options: ShareOptions,
    ctx: PassContext,
) -> dict[str, int]:
    """The bits of each weight's codes, by its name.

    Args:
        model: The model, which is not changed.
        weights: The weights to treat.
        layers: Name of a weight to its layer, where a bias takes up the mean error.
        options: How to fit codebooks, and the bits on average.
        ctx: The job; it has calibration data.
    """
    errors = measured_errors(model, weights, layers, options, ctx)
    found = None if _LOSSY.isdisjoint(ctx.passes) else losses_for(ctx, model)
    enough = _ENOUGH if found is None else max(_ENOUGH, found[1].allowed)
    return chosen_bits(weights, errors, options, enough)


def chosen_bits(
    weights: Sequence[Weight],
    errors: Mapping[str, float],
    options: ShareOptions,
    enough: float = _ENOUGH,
) -> dict[str, int]:
    """The bits of each weight's codes for errors as :func:`measured_errors` finds them.

    Args:
        weights: The weights.
        errors: Of each.
        options: The bits on average, and how many bytes more there may be.
        enough: Summed error up to which no bytes are spent beyond those asked for.
    """
    curves, whole = [], 0
    for number, weight in enumerate(weights):
        sizes = {b: code_bytes(weight, options, b) for b in _range(errors[weight.name], options)}
        most = max(sizes.values())
        whole += most
        order = sorted(sizes, key=lambda b: (b == options.bits, b))  # of equal size, the ones asked
        points = {most - sizes[b]: b for b in order}
        counts = tuple(sorted(points))
        losses = (errors[weight.name] * _growth(weight, points[c], options) for c in counts)
        curves.append((Curve(number, counts, tuple(losses)), points))
    asked = sum(code_bytes(weight, options, options.bits) for weight in weights)

    def left(saved: Mapping[int, int]) -> float:
        return 1.0 - sum(saved.values()) / max(whole, 1)

    def lose(saved: Mapping[int, int]) -> float:
        return sum(curve.loss(saved[curve.group]) for curve, _ in curves)

    equal = {c.group: next(n for n, b in p.items() if b == options.bits) for c, p in curves}
    plan: dict[int, int] = equal
    margin = options.margin if options.packing is Packing.BITS else 0.0
    for extra in np.linspace(0.0, margin, _BUDGETS if margin else 1):
        kept = (1 + float(extra)) * asked / max(whole, 1) + 1e-12
        plan = allocate([curve for curve, _ in curves], left, kept, exchange=True)
        plan = min(plan, equal, key=lose)  # whole steps can come out worse than no step
        if lose(plan) <= enough:
            break
    return {weight.name: curves[i][1][plan[i]] for i, weight in enumerate(weights)}


def measured_errors(
    model: ir.Model,
    weights: Sequence[Weight],
    layers: Mapping[str, Consumer],
    options: ShareOptions,
    ctx: PassContext,
) -> dict[str, float]:
    """Error of the model's outputs, relative to their energy, when one weight alone has codes."""
    if ctx.calibration is None:
        raise ValueError("errors are measured on calibration data")
    fitting, held_out = split(ctx.calibration)
    judging = fitting if held_out is None else held_out
    samples = judging_samples(model, ctx.calibration, MEASURED, len(weights))
    ctx = dataclasses.replace(ctx, calibration=fitting)
    whole = OutputProbe(model, judging, ctx, samples)
    order = places_of(model, weights)
    bits = {w.name: options.bits for w in weights}
    drafts = sorted(
        fit_all(model, weights, options, ctx, frozenset(layers), bits=bits, rounds=_ROUNDS),
        key=lambda one: order[one.weight.name],
    )
    inner = {i: one.weight.name for i, one in enumerate(drafts) if one.weight.graph is model.graph}
    places = {i: ((), (name,)) for i, name in inner.items()}
    found = {}
    with (
        SuffixProbe(model, whole, ctx, places, "share: running to the next weight") as probe,
        ctx.progress.task("share: measuring errors of codes", len(drafts)) as task,
    ):
        for number, one in enumerate(drafts):
            part = probe.part(number)
            variant = model_io.clone(model) if part is None else part
            _put(one, variant, model, layers)
            error = whole.error_of(variant) if part is None else probe.error_of(number, part)
            found[one.weight.name] = error
            task.advance()
    return found


def places_of(model: ir.Model, weights: Sequence[Weight]) -> dict[str, int]:
    """Where in the main graph each weight is first read, by name; -1 for others."""
    places = {node: i for i, node in enumerate(model.graph)}
    return {
        w.name: min((places.get(u.node, -1) for u in w.value.uses()), default=-1) for w in weights
    }


def _put(one: Fitted, variant: ir.Model, model: ir.Model, layers: Mapping[str, Consumer]) -> None:
    """Give a copy of the model, or of a part of it, the values that the codes stand for."""
    name = one.weight.name
    place = next(i for i, graph in enumerate(model.graphs()) if graph is one.weight.graph)
    set_initializer(variant.graph if place == 0 else [*variant.graphs()][place], name, one.stored())
    if one.shift is not None:
        layer = layers[name]
        layer.write_bias(variant, layer.bias_vector(model) + one.shift * layer.gain)


def _range(error: float, options: ShareOptions) -> range:
    """Bits to choose from; where no error is seen (exact, or never run) nothing is known."""
    if error <= 0:
        return range(options.bits, options.bits + 1)
    return range(max(options.bits - _FEWER, 2), MOST_BITS + 1)


def _growth(weight: Weight, bits: int, options: ShareOptions) -> float:
    if weight.scale is not None and bits == MOST_BITS:
        return 0.0  # the integers are stored as they are
    return float(4.0 ** (options.bits - bits))
