"""Codebooks layer after layer, each fitted to make up for what the ones before it lost.

The layers are treated in steps, in the order in which data flow. The inputs ``x`` of a step come
from the model whose earlier layers have their codebooks already, the targets ``y`` from the
original. For each layer, least squares first moves the weights to where they reproduce ``y`` from
those ``x``,

    W', b' = argmin E‖y - W x - b‖² + ρ‖W - W₀‖²

(only where no other layer of the step lies upstream) with ``ρ`` chosen on held-out samples, and the
codebook then follows ``W'`` in the norm of ``Cov(x)``: the error ``E‖y - Ŵx - b‖²`` is that of
``W'`` plus ``tr (W' - Ŵ) Cov(x) (W' - Ŵ)ᵀ``.

Source: He et al. 2017, "Channel pruning for accelerating very deep networks" (asymmetric,
sequential reconstruction).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import CrossMomentsRequest, CrossMomentsResult
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import set_initializer
from onnxcompress.numerics.feedback import InputMoments
from onnxcompress.numerics.least_squares import (
    Moments,
    approximated,
    choose_ridge,
    regress,
    residual_energy,
)
from onnxcompress.passes._residual import residual_target, trace
from onnxcompress.passes._staged import Staged
from onnxcompress.passes.prune.consumers import Consumer
from onnxcompress.passes.prune.jobs import RIDGES
from onnxcompress.passes.prune.samples import split
from onnxcompress.passes.prune.score import row_limit
from onnxcompress.passes.share.fit import Fitted, fit_one
from onnxcompress.passes.share.options import ShareOptions
from onnxcompress.passes.share.select import Weight

Float64 = npt.NDArray[np.float64]

_MAX_WIDTH = 4608
"""Wider inputs (a 3x3 convolution of 512 channels) take too long to solve for."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer to treat.

    Attributes:
        weight: Its weight.
        consumer: The layer as the regression sees it.
        request: What to measure.
        stale: Whether a layer of the same step lies upstream, so that what is measured is not what
            this layer will see; correcting the same error twice would do harm.
    """

    weight: Weight
    consumer: Consumer
    request: CrossMomentsRequest
    stale: bool


def fit_in_steps(
    model: ir.Model,
    weights: Sequence[Weight],
    layers: Mapping[str, Consumer],
    options: ShareOptions,
    ctx: PassContext,
    bits: Mapping[str, int],
) -> dict[str, Fitted]:
    """Fit codebooks and biases step by step.

    Args:
        model: The model; its weights and biases get the values of the codebooks.
        weights: The weights to treat, whose data are those of ``model``.
        layers: Name of a weight to its layer.
        options: How.
        ctx: The job; it has calibration data.
        bits: Bits of a code by name of the weight.

    Returns:
        The codebooks by name of the weight.
    """
    if ctx.calibration is None:
        return {}
    reference = model.clone()
    parts = [part for part in split(ctx.calibration) if part is not None]
    by_node = {layers[w.name].node: w for w in weights if _treatable(w, layers)}
    order = [node.name or "" for node in model.graph if node.name in by_node]
    steps = _steps(order, options.steps)
    found = [
        _layers(model, order, steps[:i], names, by_node, layers) for i, names in enumerate(steps)
    ]
    requests = [[layer.request for layer in step] for step in found]
    names = dict.fromkeys(
        n for step in found for layer in step for n in (layer.weight.name, layer.consumer.bias) if n
    )
    done: dict[str, Fitted] = {}
    with Staged(model, reference, requests, names, parts, ctx) as staged:
        for number, step in enumerate(found):
            text = f"share: fitting codebooks, step {number + 1} of {len(found)}"
            results = staged.measure(number, text)
            with ctx.progress.task(text, len(step)) as task:
                for layer in step:
                    name = layer.weight.name
                    own = [r[layer.request] for r in results]
                    done[name] = _fit(model, layer, own, options, bits[name])
                    _write((staged.model, model), layer.consumer, done[name])
                    task.advance()
    return done


def _write(models: Sequence[ir.Model], layer: Consumer, fitted: Fitted) -> None:
    """Give a layer the values that the codes stand for, and its new bias."""
    bias = layer.bias_vector(models[0])
    for model in models:
        set_initializer(model.graph, fitted.weight.name, fitted.tensor())
        if fitted.shift is not None:
            layer.write_bias(model, bias + fitted.shift)


def _treatable(weight: Weight, layers: Mapping[str, Consumer]) -> bool:
    consumer = layers.get(weight.name)
    return consumer is not None and consumer.width <= _MAX_WIDTH


def _steps(order: Sequence[str], count: int) -> list[Sequence[str]]:
    """The layers in ``count`` runs of about equal length."""
    bounds = np.linspace(0, len(order), min(count, len(order)) + 1).round().astype(int)
    return [order[a:b] for a, b in itertools.pairwise(bounds) if a < b]


def _layers(
    model: ir.Model,
    order: Sequence[str],
    before: Sequence[Sequence[str]],
    step: Sequence[str],
    by_node: Mapping[str, Weight],
    layers: Mapping[str, Consumer],
) -> list[_Layer]:
    """The layers of a step, when those of the steps ``before`` it have changed."""
    flow = trace(model, {n.name or "" for n in model.graph}, {n: i for i, n in enumerate(order)})
    changed = {name for names in before for name in names}
    for node in model.graph:  # here the weights differ, not the nodes
        if node.name in changed or any(v in flow.touched for v in node.inputs):
            flow.touched.update(node.outputs)
    nodes = {n.name or "": n for n in model.graph}
    found = []
    for name in step:
        weight = by_node[name]
        consumer = layers[weight.name]
        target = residual_target(nodes[name], consumer.output, flow, order.index(name))
        data = nodes[name].inputs[0]
        upstream = 0 if data is None else flow.jobs.get(data, 0)
        if target.shortcut is not None:
            upstream |= flow.jobs.get(target.shortcut, 0)
        request = CrossMomentsRequest(
            consumer.data,
            consumer.unfold,
            target.terms,
            consumer.target_axis,
            row_limit(consumer.width),
        )
        stale = any(upstream >> order.index(other) & 1 for other in step)
        found.append(_Layer(weight, consumer, request, stale))
    return found


def _fit(
    model: ir.Model,
    layer: _Layer,
    results: Sequence[CrossMomentsResult],
    options: ShareOptions,
    bits: int,
) -> Fitted:
    """The codebook of a layer, and what its bias lacks."""
    consumer, weight = layer.consumer, layer.weight
    prior, old = consumer.matrix(model), consumer.bias_vector(model)
    share = consumer.outputs // consumer.groups
    moved, covariances, whole = np.empty_like(prior), [], []
    for g in range(consumer.groups):
        parts = [_moments(result, g) for result in results]
        moved[g] = prior[g]
        if not layer.stale:
            moved[g] = _moved(parts, prior[g], old[g * share : (g + 1) * share])
        total = parts[0] if len(parts) == 1 else parts[0].merge(parts[1])
        covariances.append(approximated(total.covariance, total.count))
        whole.append(total)
    rows = (moved / consumer.gain).reshape(consumer.outputs, -1)
    inputs = InputMoments.shared(np.stack(covariances), consumer.outputs)
    fitted = fit_one(weight, inputs, options, bits, rows.astype(np.float32))
    stored = fitted.coded.decoded().astype(np.float64).reshape(prior.shape) * consumer.gain
    if layer.stale:
        lost = [(p - s) @ m.mean_x for m, p, s in zip(whole, prior, stored, strict=True)]
        return dataclasses.replace(fitted, shift=np.concatenate(lost))
    bias = np.concatenate([m.mean_y - w @ m.mean_x for m, w in zip(whole, stored, strict=True)])
    return dataclasses.replace(fitted, shift=bias - old)


def _moments(result: CrossMomentsResult, group: int) -> Moments:
    share = result.cross.shape[2]
    return Moments(
        count=result.count,
        mean_x=result.mean_x[group],
        mean_y=result.mean_y[group * share : (group + 1) * share],
        covariance=result.covariance[group],
        cross=result.cross[group],
    )


def _moved(parts: Sequence[Moments], prior: Float64, bias: Float64) -> Float64:
    """The weights that reproduce the target best; the old ones unless held-out samples agree."""
    if len(parts) == 1:
        return prior
    fit, held_out = parts
    ridge, energy = choose_ridge(fit, held_out, prior, RIDGES)
    shifted = fit.mean_y - prior @ fit.mean_x
    kept = min(float(residual_energy(held_out, prior, b).sum()) for b in (bias, shifted))
    if kept <= energy:
        return prior
    return regress(fit.merge(held_out), prior, ridge)[0]
