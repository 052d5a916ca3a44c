"""What gets no codes, in half precision: biases, factors and small weights.

    constant = Cast(half)

which depends on a constant alone, so that onnxruntime computes it at load. It has to pay: one bit
more of every code takes ``B / b`` bytes of a model of ``B`` bytes and makes the error ``e`` of the
codes a quarter, so that ``S`` bytes buy ``ln 4 · b e S / B`` of it. Halves that save ``S`` bytes
may cost no more than that. Where there are no data to tell, they are taken where codes lose more
than rounding to half precision does. Constants that together cost too much are divided into two
parts again and again, to find the ones that do.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.passes._foldable import CAST_BYTES, Chain, halves_save
from onnxcompress.passes.base import Change
from onnxcompress.passes.fp16.halves import as_half
from onnxcompress.passes.prune.probe import OutputProbe
from onnxcompress.passes.prune.samples import judging_samples, split
from onnxcompress.passes.share.fit import Fitted
from onnxcompress.passes.share.options import ShareOptions

Half = npt.NDArray[np.float16]

_READERS = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Add", "Sub", "Mul", "Div", "PRelu"),
        *("BatchNormalization", "LayerNormalization", "InstanceNormalization"),
        *("GroupNormalization", "LSTM", "GRU", "RNN"),
    }
)
"""Operators that compute with a constant; for others it may say how to compute."""
_SAMPLES = 32
"""Samples that errors are measured on."""
_PARTS = 16
"""Constants that save a smaller part of all that halves save are not looked at one by one."""
_RUNS = 2 * _PARTS
"""Errors that are measured, about, where most constants are refused."""
_ROUNDING_DB = 60.0
"""SQNR that constants in half precision have at least (see :func:`as_half`)."""


@dataclass(frozen=True, slots=True)
class Rest:
    """A constant that may be stored in half precision.

    Attributes:
        value: Its initializer.
        graph: The graph that owns it.
        half: Its data, rounded.
    """

    value: ir.Value
    graph: ir.Graph
    half: Half

    @property
    def saved_bytes(self) -> int:
        """Bytes that the file becomes smaller by."""
        return 2 * self.half.size - CAST_BYTES


def rest_of(model: ir.Model, options: ShareOptions, coded: Sequence[Fitted]) -> tuple[Rest, ...]:
    """The constants of ``model`` without codes that half precision can hold."""
    names = {one.weight.value for one in coded}
    found = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value in names or not _may_change(value, options):
                continue
            array = constant_of(value)
            half = "it has no data" if array is None else as_half(array)
            if not isinstance(half, str):
                found.append(Rest(value, graph, half))
    return tuple(found)


def _may_change(value: ir.Value, options: ShareOptions) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or not halves_save(tensor.size):
        return False
    if value.is_graph_input() or value.is_graph_output():
        return False
    users = [use.node for use in value.uses()]
    names = [value.name or "", *(node.name or "" for node in users)]
    if any(fnmatch.filter(names, p) for p in options.exclude):
        return False
    if options.include and not any(fnmatch.filter(names, p) for p in options.include):
        return False
    return bool(users) and all(n.op_type in _READERS and n.domain == "" for n in users)


def affordable(
    model: ir.Model,
    original: ir.Model,
    rest: Sequence[Rest],
    coded: Sequence[Fitted],
    options: ShareOptions,
    ctx: PassContext,
) -> tuple[Rest, ...]:
    """Those whose halves cost less than the bytes that they save would gain in codes.

    Args:
        model: The model with codes.
        original: The model before.
        rest: What could be stored in half precision.
        coded: The weights with codes.
        options: The bits of codes.
        ctx: The job.
    """
    if not rest or not coded:
        return ()
    if ctx.calibration is None:
        return tuple(rest) if min(one.sqnr_db for one in coded) < _ROUNDING_DB else ()
    fitting, held_out = split(ctx.calibration)
    samples = judging_samples(model, ctx.calibration, _SAMPLES, _RUNS)
    probe = OutputProbe(original, fitting if held_out is None else held_out, ctx, samples)
    nbytes = sum(
        v.const_value.nbytes
        for g in model.graphs()
        for v in g.initializers.values()
        if v.const_value is not None
    )
    price = math.log(4) * options.bits * probe.error_of(model) / max(nbytes, 1)
    least = sum(one.saved_bytes for one in rest) / _PARTS
    places = {id(graph): place for place, graph in enumerate(model.graphs())}

    def taken(some: Sequence[Rest]) -> tuple[Rest, ...]:
        saved = sum(one.saved_bytes for one in some)
        if probe.error_of(_rounded(original, some, places)) <= price * saved:
            return tuple(some)
        if len(some) == 1 or saved < least:
            return ()
        middle = len(some) // 2
        return (*taken(some[:middle]), *taken(some[middle:]))

    return taken(rest)


def _rounded(original: ir.Model, rest: Sequence[Rest], places: Mapping[int, int]) -> ir.Model:
    """The model before codes with its own constants rounded: the fit has moved biases since."""
    rounded = model_io.clone(original)
    graphs = list(rounded.graphs())
    for one in rest:
        graph, name = graphs[places[id(one.graph)]], one.value.name or ""
        before = constant_of(graph.initializers.get(name))
        if before is not None:
            set_initializer(graph, name, before.astype(np.float16).astype(np.float32))
    return rounded


def store(model: ir.Model, rest: Sequence[Rest]) -> tuple[list[Change], list[str]]:
    """Put the halves in the place of the constants.

    Returns:
        What changed, and the names of the nodes that were added.
    """
    namer, changes, nodes = Namer(model), [], []
    for one in rest:
        name = one.value.name or ""
        chain = Chain(namer, one.value, one.graph, "share")
        half = chain.constant("half", one.half)
        chain.finish(chain.add("Cast", [half], to=int(ir.DataType.FLOAT)))
        nodes += [node.name or "" for node in chain.nodes]
        sizes = f"({4 * one.half.size} to {2 * one.half.size} bytes)"
        changes.append(Change(name, "", f"stored in half precision {sizes}"))
    return changes, nodes
