"""Recovery without training: factors refitted to the original's outputs, one after another.

Layers are treated in the order in which data flows. The inputs ``x`` come from the model as
factorized and refitted so far, the target ``y`` from the original (before a residual Add, the
original's sum less today's shortcut). The best chain of rank ``r`` is then the truncation of the
regression: with

    W_LS = argmin E‖y - W x - b‖² + ρ‖W - W₀‖²

the part of ``y`` that ``x`` does not explain is the same for all weights, so that the chain nearest
to ``W_LS`` in the moment of ``x`` is also nearest to ``y`` (reduced-rank regression). A layer that
stays whole takes ``W_LS`` itself.

``ρ`` is chosen on held-out samples; among the candidates are the original weights themselves
(``ρ = ∞``), truncated for the inputs as they are now, so that a regression that does not serve
unseen samples is not used. Where a layer's output is no tensor of the model (the gates inside a
recurrent operator, the sums of a transposed convolution) the target is ``W₀ x₀`` with the
original's inputs.

Source: Izenman 1975, "Reduced-rank regression for the multivariate linear model"; Zhang et al.
2016, "Accelerating very deep convolutional networks" (asymmetric reconstruction); He et al. 2017.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import (
    REFERENCE_PREFIX,
    CrossMomentsRequest,
    CrossMomentsResult,
)
from onnxcompress.context import PassContext
from onnxcompress.errors import DataError
from onnxcompress.numerics.least_squares import Moments, approximated, regress, residual_energy
from onnxcompress.numerics.low_rank import Chain, Metric, Spectrum
from onnxcompress.passes._residual import Flow, residual_target, trace
from onnxcompress.passes._staged import Staged
from onnxcompress.passes.prune.consumers import MAX_WIDTH, Consumer, Layers
from onnxcompress.passes.prune.samples import split
from onnxcompress.passes.prune.score import row_limit
from onnxcompress.passes.svd.emit import Written
from onnxcompress.passes.svd.options import SvdOptions
from onnxcompress.passes.svd.sites import Kind, Site

Array = npt.NDArray[np.float64]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for the ridge, relative to the mean variance of the inputs."""


@dataclass(frozen=True, slots=True)
class Refit:
    """What became of one layer.

    Attributes:
        node: Name of the node it had in the original.
        op_type: Its operator.
        ridge: The ridge used; infinite where the original weights were truncated again with new
            moments, None where nothing changed.
        rows_per_column: Rows seen per unfolded input.
        whole: Whether the layer is no chain.
    """

    node: str
    op_type: str
    ridge: float | None
    rows_per_column: float
    whole: bool


@dataclass(frozen=True, slots=True)
class _Weights:
    """A layer's weights in whatever form it is stored, and the dense matrix they stand for."""

    stored: Array | list[Chain]
    dense: Array


@dataclass(frozen=True, slots=True)
class _Job:
    """One layer to refit, a chain or a whole one."""

    node: ir.Node
    layer: Written | Consumer
    data: str
    terms: tuple[tuple[str, float], ...]
    through_weight: bool

    @property
    def site(self) -> Site | None:
        return self.layer.site if isinstance(self.layer, Written) else None

    @property
    def width(self) -> int:
        layer = self.layer
        return layer.site.kernel.width if isinstance(layer, Written) else layer.width

    @property
    def written(self) -> tuple[str, ...]:
        """Initializers that it may give new values."""
        layer = self.layer
        weights = layer.factors if isinstance(layer, Written) else (layer.weight,)
        return weights if layer.bias is None else (*weights, layer.bias)

    def request(self) -> CrossMomentsRequest:
        """The statistics it needs."""
        layer = self.layer
        source = layer.site if isinstance(layer, Written) else layer
        axis = source.target_axis
        if isinstance(layer, Written) and self.through_weight:
            axis = 1 if layer.site.kind is Kind.TRANSPOSED else 2
        return CrossMomentsRequest(
            self.data, source.unfold, self.terms, axis, row_limit(self.width)
        )


def recover(
    model: ir.Model,
    reference: ir.Model,
    written: Sequence[Written],
    metrics: Mapping[Site, Metric],
    options: SvdOptions,
    ctx: PassContext,
) -> list[Refit]:
    """Refit the chains of ``model``, and the layers behind them, to the outputs of ``reference``.

    Args:
        model: The factorized model; its weights are changed in place.
        reference: The original.
        written: The chains.
        metrics: How errors of their layers' outputs count, where that is known.
        options: How much to refit, and the ridge.
        ctx: The job; it has calibration data.
    """
    if ctx.calibration is None:
        raise DataError("recovery needs calibration data and the job has none")
    parts = [part for part in split(ctx.calibration) if part is not None]
    levels = _levels(model, reference, written, options)
    requests = [{job.layer: job.request() for job in level} for level in levels]
    names = dict.fromkeys(name for level in levels for job in level for name in job.written)
    done: list[Refit] = []
    with Staged(model, reference, [[*r.values()] for r in requests], names, parts, ctx) as staged:
        for number, level in enumerate(levels):
            text = f"svd: refitting layers, step {number + 1} of {len(levels)}"
            found = staged.measure(number, text)
            models = (staged.model, model)
            for job in level:
                results = [s[requests[number][job.layer]] for s in found]
                if isinstance(job.layer, Written):
                    metric = metrics.get(job.layer.site)
                    done.append(_refit_chain(models, reference, job, results, metric, options))
                else:
                    done.append(_refit_whole(models, job.layer, results, options))
    return done


def _levels(
    model: ir.Model, reference: ir.Model, written: Sequence[Written], options: SvdOptions
) -> list[list[_Job]]:
    """The layers to refit, in levels that do not depend on one another."""
    layers: dict[str, Written | Consumer] = {w.last: w for w in written if _can_refit(w.site)}
    if options.recover_all:
        originals = {n.name for n in reference.graph}
        for name, consumer in Layers.of(model).consumers.items():
            if name in originals and name not in layers and consumer.obstacle is None:
                layers[name] = consumer
    names = [n.name or "" for n in model.graph if n.name in layers]
    order = {name: i for i, name in enumerate(names)}
    flow = trace(model, {n.name or "" for n in reference.graph}, order)
    values = {v.name: v for n in model.graph for v in n.outputs}
    values.update({v.name: v for v in model.graph.inputs})
    nodes = {n.name or "": n for n in model.graph}
    levels: list[list[_Job]] = []
    level_of: dict[int, int] = {}
    for index, name in enumerate(names):
        layer, node = layers[name], nodes[name]
        data = values[layer.site.data if isinstance(layer, Written) else layer.data]
        terms, shortcut, through = _target(node, layer, flow, index)
        if data not in flow.touched and shortcut is None:
            continue  # it sees the original's inputs: nothing to repair
        upstream = flow.jobs.get(data, 0)
        if shortcut is not None:
            upstream |= flow.jobs.get(shortcut, 0)
        level = 1 + max((depth for j, depth in level_of.items() if upstream >> j & 1), default=-1)
        level_of[index] = level
        if level == len(levels):
            levels.append([])
        levels[level].append(_Job(node, layer, data.name or "", terms, through))
    return levels


def _can_refit(site: Site) -> bool:
    return site.kind not in {Kind.EMBEDDING, Kind.BATCHED} and site.kernel.width <= MAX_WIDTH


def _target(
    node: ir.Node, layer: Written | Consumer, flow: Flow, index: int
) -> tuple[tuple[tuple[str, float], ...], ir.Value | None, bool]:
    """What to fit to, the shortcut in it, and whether it has yet to pass the original weight."""
    if isinstance(layer, Written) and layer.site.kind in {Kind.RECURRENT, Kind.TRANSPOSED}:
        return ((REFERENCE_PREFIX + layer.site.data, 1.0),), None, True
    output = layer.site.output if isinstance(layer, Written) else layer.output
    target = residual_target(node, output, flow, index)
    return target.terms, target.shortcut, False


def _refit_chain(
    models: Sequence[ir.Model],
    reference: ir.Model,
    job: _Job,
    results: Sequence[CrossMomentsResult],
    metric: Metric | None,
    options: SvdOptions,
) -> Refit:
    chain = job.layer
    if not isinstance(chain, Written):
        raise TypeError(f"'{job.node.name}' is no chain")
    site = chain.site
    prior = site.matrices(reference)[0]
    parts = [_moments(r, prior if job.through_weight else None) for r in results]
    if chain.bias is None:
        parts = [p.uncentred() for p in parts]
    if metric is not None:  # fit R y instead of y, so that plain squares are the ones that count
        parts = [_in_metric(p, metric) for p in parts]
        prior = metric.root @ prior

    def compress(weight: Array, moments: Moments) -> _Weights:
        moment = approximated(moments.covariance, moments.count)
        spectrum = Spectrum(weight, site.kernel, moment)
        made = spectrum.chain(chain.form, chain.ranks)
        return _Weights([made], made.dense())

    ridge, found, shift = _fit(parts, prior, compress, chain.bias is not None, options.ridge)
    if isinstance(found.stored, list):
        made = found.stored
        if metric is not None:
            made, shift = [metric.undo(c) for c in made], metric.inverse @ shift
        for model in models:
            chain.store(model, made, shift)
    return Refit(site.node, site.op_type, ridge, _rows(results, site.kernel.width), False)


def _refit_whole(
    models: Sequence[ir.Model],
    layer: Consumer,
    results: Sequence[CrossMomentsResult],
    options: SvdOptions,
) -> Refit:
    weight = layer.matrix(models[0])
    bias = layer.bias_vector(models[0])
    share = layer.outputs // layer.groups
    ridges: list[float | None] = []
    for g in range(layer.groups):
        rows = slice(g * share, (g + 1) * share)
        parts = [_moments(r, None, g) for r in results]
        if layer.bias is None:
            parts = [p.uncentred() for p in parts]
        ridge, found, shift = _fit(
            parts, weight[g], _as_it_is, layer.bias is not None, options.ridge
        )
        old = _held_out_energy(parts, weight[g], bias[rows])
        new = _held_out_energy(parts, found.dense, shift)
        if new >= old:
            ridges.append(None)
            continue
        ridges.append(ridge)
        weight[g], bias[rows] = found.dense, shift
    used = [r for r in ridges if r is not None]
    if used:
        for model in models:
            layer.write(model, weight, bias)
    rows_seen = _rows(results, layer.width)
    return Refit(layer.node, layer.op_type, min(used) if used else None, rows_seen, True)


def _as_it_is(weight: Array, moments: Moments) -> _Weights:
    del moments
    return _Weights(weight, weight)


def _fit(
    parts: Sequence[Moments],
    prior: Array,
    compress: Callable[[Array, Moments], _Weights],
    has_bias: bool,
    wanted: float,
) -> tuple[float, _Weights, Array]:
    """The ridge that serves the held-out part best, and the weights and bias fitted with it.

    Infinite stands for the original weights, compressed for the inputs as they are now.
    """

    def made(moments: Moments, ridge: float) -> tuple[_Weights, Array]:
        weight = regress(moments, prior, ridge)[0] if np.isfinite(ridge) else prior
        found = compress(weight, moments)
        bias = moments.mean_y - found.dense @ moments.mean_x
        return found, bias if has_bias else np.zeros(len(prior))

    ridge = wanted or np.inf  # with nothing held out to judge by, no regression is to be trusted
    if len(parts) > 1:
        candidates = ((wanted,) if wanted else RIDGES) + (np.inf,)
        scores = []
        for candidate in candidates:
            found, bias = made(parts[0], candidate)
            scores.append((_held_out_energy(parts, found.dense, bias), candidate))
        ridge = min(scores)[1]
    whole = parts[0] if len(parts) == 1 else parts[0].merge(parts[1])
    found, bias = made(whole, ridge)
    return ridge, found, bias


def _held_out_energy(parts: Sequence[Moments], weight: Array, bias: Array) -> float:
    return float(residual_energy(parts[-1], weight, bias).sum())


def _in_metric(moments: Moments, metric: Metric) -> Moments:
    """The moments of ``(x, R y)``."""
    return dataclasses.replace(
        moments, mean_y=metric.root @ moments.mean_y, cross=moments.cross @ metric.root
    )


def _moments(result: CrossMomentsResult, through: Array | None, group: int = 0) -> Moments:
    """The moments of one group; ``through`` turns targets ``x₀`` into ``W₀ x₀``."""
    cross = result.cross[group]
    share = result.cross.shape[2]
    mean_y = result.mean_y[group * share : (group + 1) * share]
    if through is not None:
        cross, mean_y = cross @ through.T, through @ mean_y
    return Moments(result.count, result.mean_x[group], mean_y, result.covariance[group], cross)


def _rows(results: Sequence[CrossMomentsResult], width: int) -> float:
    return sum(r.count for r in results) / max(width, 1)
