"""Versions of one quantized model that differ in which nodes are on integers.

Scales, integer weights and corrected biases are those of the model with all chosen nodes on
integers; a version takes the part of them that it needs, so it costs one model and a few runs. A
version is described by names alone. Another process that is to measure it gets that and the path of
a *kit*: the float model and everything measured so far, read once per process.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.errors import ModelError
from onnxcompress.numerics.affine import Affine, Grid
from onnxcompress.passes.quant.insertion import insert
from onnxcompress.passes.quant.operators import Kind, data_inputs
from onnxcompress.passes.quant.parameters import Layer
from onnxcompress.passes.quant.placement import Network, Plan, make_plan
from onnxcompress.passes.quant.precision import (
    Precision,
    rescaled_layers,
    store_half,
    wide_points,
)
from onnxcompress.runtime import SessionSettings, open_session
from onnxcompress.search.reference import Reference
from onnxcompress.verification.compare import Comparison


@dataclass(frozen=True, slots=True)
class Kit:
    """What all versions share, apart from the float model; it pickles.

    Attributes:
        chosen: Nodes that may run on integers.
        plan: The placement with all of them.
        affines: The grid of every point.
        wides: The 16-bit grid of every point.
        layers: The integer weight of every weighted node of the plan.
        weight_grid: The grid of weights.
        per_channel: One weight scale per output channel.
        symmetric: Whether activations are symmetric.
        tied: Operators whose output must have the scale of their input.
        on_cpu: See :func:`~onnxcompress.passes.quant.insertion.insert`.
        settings: How to run a version.
        reference: Samples, and what the original makes of them.
    """

    chosen: frozenset[str]
    plan: Plan
    affines: Mapping[str, Affine]
    wides: Mapping[str, Affine]
    layers: Mapping[str, Layer]
    weight_grid: Grid
    per_channel: bool
    symmetric: bool
    tied: frozenset[str]
    on_cpu: bool
    settings: SessionSettings
    reference: Reference


@dataclass(frozen=True, slots=True)
class Variant:
    """One version, by names.

    Attributes:
        lifted: Nodes that are not in int8, with their precision, by name.
        only: If given, no other node than this is on integers.
        samples: Samples to measure on; None takes all.
    """

    lifted: tuple[tuple[str, Precision], ...] = ()
    only: str | None = None
    samples: int | None = None


def variant(lifted: Mapping[str, Precision], samples: int | None = None) -> Variant:
    """The version with some nodes lifted."""
    return Variant(tuple(sorted(lifted.items())), samples=samples)


class Bench:
    """Makes and measures versions.

    Args:
        model: The float model; it is read, never changed.
        kit: What all versions share.
    """

    def __init__(self, model: ir.Model, kit: Kit) -> None:
        self._model = model
        self._network = Network(
            model,
            symmetric=kit.symmetric,
            fixed_point=kit.weight_grid.power_of_two,
            tied=kit.tied,
        )
        self._kit = kit

    @property
    def kit(self) -> Kit:
        """What all versions share."""
        return self._kit

    def model_of(self, wanted: Variant) -> ir.Model:
        """A version of the model."""
        kit, precisions = self._kit, dict(wanted.lifted)
        if wanted.only is not None:
            plan = only_plan(self._network, kit.plan, wanted.only)
        else:
            floats = {n for n, p in precisions.items() if p is not Precision.INT16}
            plan = make_plan(self._network, kit.chosen - floats)
        affines = {point: kit.affines[point] for point in plan.points}
        wide = {n for n, p in precisions.items() if p is Precision.INT16}
        affines |= {p: kit.wides[p] for p in wide_points(self._network, plan, wide)}
        layers = rescaled_layers(
            self._network,
            {name: kit.layers[name] for name in plan.nodes if name in kit.layers},
            affines,
            kit.weight_grid,
            per_channel=kit.per_channel,
        )
        copy = model_io.clone(self._model)
        insert(copy, plan, affines, layers, on_cpu=kit.on_cpu)
        store_half(copy, {n for n, p in precisions.items() if p is Precision.FLOAT16})
        return copy

    def measure(self, wanted: Variant) -> Comparison:
        """Compare a version with the original; one that does not load is told in ``fatal``."""
        reference = self._kit.reference
        if wanted.samples is not None:
            reference = reference.first(wanted.samples)
        try:
            session = open_session(self.model_of(wanted), self._kit.settings)
        except ModelError as error:
            return Comparison(fatal=(error.message,))
        return reference.compare(session)


def only_plan(network: Network, plan: Plan, name: str) -> Plan:
    """The placement with one node alone on integers, whatever it costs there.

    A joining node gets its integers although no neighbour makes or wants them: the question is what
    its rounding costs, not whether it pays.
    """
    node = network.nodes[name]
    inputs = {value.name or "" for value in data_inputs(node)}
    result = network.result(node).name or ""
    touched = inputs | {result}
    return replace(
        plan,
        nodes=(name,),
        folded={a: n for a, n in plan.folded.items() if n == name},
        points=tuple(point for point in plan.points if point in touched),
        joints=(),
        shields=frozenset(plan.shields & inputs),
    )


def measured_nodes(network: Network, plan: Plan) -> tuple[str, ...]:
    """Nodes of a plan that round something of their own: all but those that move integers."""
    return tuple(n for n in plan.nodes if network.rule(n).kind is not Kind.MOVING)


_benches: dict[str, Bench] = {}
"""The kit that this process measures with, by its folder; only one is kept."""


@dataclass(frozen=True, slots=True)
class Order:
    """A version to measure, as another process gets it.

    Attributes:
        folder: Where the kit is (:func:`write_kit`).
        variant: The version.
    """

    folder: str
    variant: Variant


def keep_bench(folder: Path, bench: Bench) -> None:
    """Let this process use ``bench`` for the kit in ``folder`` instead of reading it."""
    _benches.clear()
    _benches[str(folder)] = bench


def forget_bench(folder: Path) -> None:
    """Free what this process keeps of a kit."""
    _benches.pop(str(folder), None)


def write_kit(folder: Path, model: ir.Model, kit: Kit) -> None:
    """Write what other processes need into ``folder``; they must see it under the same path."""
    folder.mkdir(parents=True, exist_ok=True)
    model_io.save(model, folder / "float.onnx")
    (folder / "kit.pickle").write_bytes(pickle.dumps(kit))


def measure(order: Order) -> Comparison:
    """Measure one version; the kit is read when this process sees it first.

    Raises:
        ModelError: If the kit cannot be read, as on a machine that does not share the folder.
    """
    if order.folder not in _benches:
        folder = Path(order.folder)
        try:
            kit = pickle.loads((folder / "kit.pickle").read_bytes())  # noqa: S301 - written by us
        except OSError as error:
            raise ModelError(
                f"a worker cannot read '{folder}': {error.strerror or error}",
                hint="All machines of a cluster must share the temporary folder: set TMPDIR to a "
                "shared one.",
            ) from error
        keep_bench(folder, Bench(model_io.load(folder / "float.onnx"), kit))
    return _benches[order.folder].measure(order.variant)
