"""Smooth the data of integer products: move outlier channels from activations into weights.

A *site* is a tensor whose readers are matrix products with constant weights. Its channels are
divided by factors ``f``, the rows of the weights multiplied. The division costs nothing where the
operators before the site take it up (a normalization with no other readers, the value projection
of an attention; see :mod:`onnxcompress.graph.scaling`); elsewhere one Mul stands before the
QuantizeLinear. Factors come from the predicted noise of both roundings
(:mod:`onnxcompress.numerics.equalization`); whether the whole is kept is measured on the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.statistics import MeanRequest, RangeRequest
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import Array, constant_of, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.scaling import Region, apply_factors, find_region
from onnxcompress.numerics.affine import FloatArray
from onnxcompress.numerics.equalization import ChannelStatistics, Smoothing, best_smoothing
from onnxcompress.passes.base import Change, Skip
from onnxcompress.passes.quant.operators import WEIGHT, attribute
from onnxcompress.passes.quant.placement import Network, make_plan

_LEAST_GAIN_DB = 0.5
"""A site whose predicted noise falls by less is left alone."""

_LEAST_GAIN_MUL_DB = 1.5
"""The same where smoothing costs a Mul."""

_MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A tensor that feeds matrix products.

    Attributes:
        value: Its name.
        readers: Products that multiply its last axis with a constant weight.
        data: What was measured of it, per channel.
        comes_as_integers: Whether an integer node makes it: then a Mul would cost two changes
            between float and integer, and only the operators before it may take the factors up.
    """

    value: str
    readers: tuple[str, ...]
    data: ChannelStatistics
    comes_as_integers: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How to smooth one site.

    Attributes:
        site: The site.
        smoothing: Its factors.
    """

    site: Site
    smoothing: Smoothing


def find_sites(
    ctx: PassContext,
    model: ir.Model,
    network: Network,
    chosen: frozenset[str],
    even: frozenset[str] = frozenset(),
) -> tuple[tuple[Site, ...], tuple[Skip, ...]]:
    """Measure the data of the chosen matrix products.

    Args:
        ctx: The job.
        model: The float model.
        network: The same model as placement sees it.
        chosen: Nodes that will run on integers.
        even: Values whose channels share their range already; they are left as they are.
    """
    readers, skips = _readers(model, chosen)
    readers = {value: nodes for value, nodes in readers.items() if value.name not in even}
    made = _made_on_integers(network, chosen)
    ranks = {value: len(value.shape) for value in readers if value.shape is not None}
    ranges = {v: RangeRequest(v.name or "", rank - 1) for v, rank in ranks.items()}
    means = {v: MeanRequest(v.name or "", rank - 1) for v, rank in ranks.items()}
    if not ranks:
        return (), skips
    found = ctx.collect(
        model, [*ranges.values(), *means.values()], description="measuring channels"
    )
    sites = []
    for value, nodes in readers.items():
        if value not in ranks:
            continue
        extremes, mean = found[ranges[value]], found[means[value]]
        data = ChannelStatistics(
            np.asarray(extremes.minimum), np.asarray(extremes.maximum), mean.mean**2 + mean.variance
        )
        names = tuple(node.name or "" for node in nodes)
        sites.append(Site(value.name or "", names, data, value.name in made))
    return tuple(sites), skips


def _made_on_integers(network: Network, chosen: frozenset[str]) -> frozenset[str]:
    """Values that integer nodes make as integers."""
    plan = make_plan(network, chosen)
    results = (network.result(network.nodes[name]).name or "" for name in plan.nodes)
    return frozenset(results) & frozenset(plan.points)


def _readers(
    model: ir.Model, chosen: frozenset[str]
) -> tuple[dict[ir.Value, list[ir.Node]], tuple[Skip, ...]]:
    """Matrix products by the tensor they read, looked up behind Reshape."""
    found: dict[ir.Value, list[ir.Node]] = {}
    skips = []
    for node in model.graph:
        if node.op_type not in {"Gemm", "MatMul"} or node.name not in chosen:
            continue
        weight = node.inputs[WEIGHT]
        data = node.inputs[0]
        if weight is None or data is None:
            continue
        if len(weight.uses()) > 1:
            skips.append(Skip(node.name or "", node.op_type, "not smoothed: its weight is shared"))
            continue
        source = _source(data)
        if source.shape is None or not isinstance(source.shape[-1], int):
            reason = f"not smoothed: the channels of '{source.name}' are unknown"
            skips.append(Skip(node.name or "", node.op_type, reason))
        elif source.producer() is not None:
            found.setdefault(source, []).append(node)
    return found, tuple(skips)


def _source(value: ir.Value) -> ir.Value:
    """The tensor that ``value`` only regroups, as long as its last axis stays."""
    while True:
        node = value.producer()
        if node is None or node.op_type not in _MOVES or node.domain not in {"", "ai.onnx"}:
            return value
        before = node.inputs[0]
        if before is None or before.shape is None or value.shape is None:
            return value
        if not len(before.shape) or not len(value.shape):
            return value
        if not isinstance(value.shape[-1], int) or before.shape[-1] != value.shape[-1]:
            return value
        value = before


def weights_of(nodes: Mapping[str, ir.Node], names: tuple[str, ...]) -> Array:
    """The weights of several products side by side, [C, outputs of all]."""
    made = []
    for name in names:
        node = nodes[name]
        weight = np.asarray(constant_of(node.inputs[WEIGHT]), np.float64)
        transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
        made.append(weight.T if transposed else weight)
    return np.concatenate(made, axis=1)


def choose(
    model: ir.Model, sites: tuple[Site, ...], feedback: float, alpha: float | None = None
) -> tuple[Choice, ...]:
    """The factors of every site, from the predicted noise or from a given exponent."""
    nodes = {node.name or "": node for node in model.graph}
    choices = []
    for site in sites:
        weights = np.asarray(weights_of(nodes, site.readers), np.float64)
        choices.append(Choice(site, best_smoothing(site.data, weights, feedback, alpha)))
    return tuple(choices)


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """What smoothing changed.

    Attributes:
        changes: For the report.
        moved: Values of the model before that are other ones now.
        factors: What the data of each product were divided by, [D], by its name.
    """

    changes: tuple[Change, ...]
    moved: frozenset[str]
    factors: Mapping[str, FloatArray]


def apply(model: ir.Model, choices: tuple[Choice, ...]) -> Applied:
    """Smooth ``model`` in place; what it computes stays the same, to rounding.

    Args:
        model: The model whose sites were measured, or an equal copy.
        choices: What to do; sites that gain too little are left alone.
    """
    namer = Namer(model)
    changes: list[Change] = []
    moved: set[str] = set()
    all_factors: dict[str, FloatArray] = {}
    for choice in choices:
        if choice.smoothing.gain_db < _LEAST_GAIN_DB:
            continue
        values = {v.name: v for node in model.graph for v in node.outputs}
        nodes = {node.name or "": node for node in model.graph}
        value, smoothing = values[choice.site.value], choice.smoothing
        region = find_region(value, -1)
        if isinstance(region, Region) and _fits(region, value, choice.site):
            units = region.values[value].reshape(-1)
            factors = np.ones(region.units)
            factors[units] = 1 / smoothing.factors
            moved |= {each.name or "" for each in region.values}
            apply_factors(model, region, factors, namer, "quant")
            how = "taken up by the operators before it"
        elif smoothing.gain_db < _LEAST_GAIN_MUL_DB or choice.site.comes_as_integers:
            continue
        else:
            _insert(model, namer, value, [nodes[n] for n in choice.site.readers], smoothing)
            how = "by a Mul"
        all_factors |= dict.fromkeys(
            choice.site.readers, np.asarray(smoothing.factors, np.float64).reshape(-1)
        )
        changes.append(
            Change(
                choice.site.readers[0],
                nodes[choice.site.readers[0]].op_type,
                f"data '{choice.site.value}' smoothed with alpha {smoothing.alpha:.2f}, {how}",
            )
        )
    return Applied(tuple(changes), frozenset(moved), all_factors)


def _fits(region: Region, value: ir.Value, site: Site) -> bool:
    """Whether the region has a unit for each channel and its only readers are those of the site."""
    if region.units != region.values[value].size:
        return False
    sinks = {a.node.name for a in region.sinks if a.contracts}
    return sinks == set(site.readers)


def _insert(
    model: ir.Model, namer: Namer, value: ir.Value, readers: list[ir.Node], smoothing: Smoothing
) -> None:
    """Divide ``value`` by the factors for ``readers`` alone, and multiply their weights."""
    name = value.name or ""
    inverse = set_initializer(
        model.graph,
        namer.value(f"{name}/quant_smoothing"),
        (1 / smoothing.factors).astype(np.float32),
    )
    smoothed = ir.Value(
        name=namer.value(f"{name}/quant_smoothed"), shape=value.shape, type=value.type
    )
    node = ir.node(
        "Mul", [value, inverse], outputs=[smoothed], name=namer.node(f"{name}/quant_smooth_op")
    )
    producer = value.producer()
    if producer is None:
        raise ValueError(f"'{name}' is an input of the model")
    model.graph.insert_after(producer, node)
    copies: dict[ir.Value, ir.Value] = {value: smoothed}
    for reader in readers:
        data = reader.inputs[0]
        reader.replace_input_with(0, _moved(model, namer, data, copies))
        _drop_unread(model, data)
        weight = reader.inputs[WEIGHT]
        array = constant_of(weight)
        if weight is None or array is None:
            continue
        transposed = reader.op_type == "Gemm" and attribute(reader, "transB", 0)
        spread = smoothing.factors if transposed else smoothing.factors[:, None]
        scaled = set_initializer(
            model.graph,
            namer.value(f"{weight.name}/quant_smoothed"),
            (array.astype(np.float64) * spread).astype(array.dtype),
        )
        reader.replace_input_with(WEIGHT, scaled)
        if not weight.uses() and weight.is_initializer() and not weight.is_graph_output():
            del model.graph.initializers[weight.name or ""]


def _drop_unread(model: ir.Model, value: ir.Value | None) -> None:
    """Remove the nodes that only made ``value``, if nobody reads it any more."""
    while value is not None and not value.uses() and not value.is_graph_output():
        node = value.producer()
        if node is None or node.op_type not in _MOVES:
            return
        value = node.inputs[0]
        model.graph.remove(node, safe=True)


def _moved(
    model: ir.Model, namer: Namer, data: ir.Value | None, copies: dict[ir.Value, ir.Value]
) -> ir.Value:
    """``data`` as it follows from the smoothed tensor: its Reshape nodes again, once each."""
    node = None if data is None else data.producer()
    if data is None:
        raise ValueError("a product without data")
    if data in copies:
        return copies[data]
    if node is None:
        raise ValueError(f"'{data.name}' does not follow from the smoothed tensor")
    source = _moved(model, namer, node.inputs[0], copies)
    made = ir.Value(
        name=namer.value(f"{data.name}/quant_smoothed"), shape=data.shape, type=data.type
    )
    copy = ir.node(
        node.op_type,
        [source, *node.inputs[1:]],
        attributes=dict(node.attributes),
        outputs=[made],
        name=namer.node(f"{node.name}/quant_smoothed"),
    )
    model.graph.insert_after(node, copy)
    copies[data] = made
    return made
