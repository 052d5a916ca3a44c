"""Make the graph smaller without changing what it computes: fold constants, remove needless nodes.

Two simplifiers run one after the other, onnxscript's optimizer and onnxsim, each on a copy. A copy
is adopted only if it passes the gate:

1. inputs and outputs have the same names, types and order;
2. no more nodes than before, and no more that only read shapes or change them; from onnxsim no
   more Shape and Reshape nodes either (it rewrites MatMul + Add on transformers as Reshape + Gemm +
   Shape chains, which are slower and freeze the axes they touch);
3. not more bytes than before (constants of a quantized or half-precision model stay as they are);
4. the checker passes and onnxruntime loads it;
5. its outputs equal the original's on sample inputs, within rounding: for every output,
   max |y − ŷ| ≤ tolerance · max |y|, and exactly for integers, booleans and strings.

Where the first simplifier does not pass, weaker levels of it are tried. Why each choice was made,
with figures, is in docs/adr/0006-simplify-gated.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.sources import synthetic_dataset
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.errors import DataError, ModelError
from onnxcompress.passes._onnxsim import OnnxsimError, simplify
from onnxcompress.passes._rewrites import Level, RewriteError, rewrite, strip_metadata
from onnxcompress.passes._views import VIEWS
from onnxcompress.passes.base import Change, PassOptions, PassReport, Skip, Stage, option
from onnxcompress.runtime import open_session

Array = npt.NDArray[np.generic]

_SAMPLES = 4
_OF_SHAPES = VIEWS - {"Transpose"} | {"Shape"}
_ONNXSIM_LIMIT_BYTES = 2_000_000_000
# Largest difference of an output, relative to its magnitude: room for another order of sums.
_TOLERANCE: Mapping[str, float] = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class SimplifyOptions(PassOptions):
    """Options of :class:`SimplifyPass`."""

    onnxsim: bool = option(True, "run onnxsim after onnxscript's optimizer")
    max_folded_bytes: int = option(
        1 << 20, "constants larger than this many bytes are not computed in advance", minimum=0
    )


class SimplifyPass:
    """Fold constants and remove needless nodes, with every step checked against the original."""

    name: ClassVar[str] = "simplify"
    summary: ClassVar[str] = "fold constants and remove nodes that do nothing"
    stage: ClassVar[Stage] = Stage.PREPARE
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    options_type: ClassVar[type[PassOptions]] = SimplifyOptions

    def __init__(self, options: SimplifyOptions | None = None) -> None:
        self.options = options or SimplifyOptions()

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """What onnxscript's optimizer would remove; onnxsim and the gate are not run."""
        del ctx
        copy = model.clone()
        rewrite(copy, Level.FULL, max_folded_bytes=self.options.max_folded_bytes)
        return PassReport(
            changes=_removed(model, copy, "onnxscript"),
            figures={"nodes_before": _measure(model).nodes, "nodes_after": _measure(copy).nodes},
        )

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Simplify in place; a model that no simplifier improves is left as it is."""
        before = _measure(model)
        gate = _Gate.open(model, ctx)
        skips: list[Skip] = []
        changes = self._by_onnxscript(model, gate, skips)
        if self.options.onnxsim:
            changes += self._by_onnxsim(model, ctx, gate, skips)
        if changes:
            model_io.name_nodes(model)
            model_io.infer_shapes(model)
        after = _measure(model)
        return PassReport(
            changes=changes,
            skips=tuple(skips),
            figures={
                "nodes_before": before.nodes,
                "nodes_after": after.nodes,
                "bytes_before": before.size_bytes,
                "bytes_after": after.size_bytes,
            },
            notes=gate.notes,
        )

    def _by_onnxscript(self, model: ir.Model, gate: _Gate, skips: list[Skip]) -> tuple[Change, ...]:
        # What cannot be compared with the original gets only what cannot change a result.
        for level in Level if gate.compares else (Level.CLEAN,):
            candidate = model.clone()
            reason: str | None
            try:
                rewrite(candidate, level, max_folded_bytes=self.options.max_folded_bytes)
            except RewriteError as error:
                reason = str(error)
            else:
                if not _better(candidate, model):
                    continue
                reason = gate.refuses(candidate, model)
            if reason is None:
                return _adopt(model, candidate, "onnxscript")
            skips.append(Skip("", "", f"onnxscript's {level.value} was not adopted: {reason}"))
        return ()

    def _by_onnxsim(
        self, model: ir.Model, ctx: PassContext, gate: _Gate, skips: list[Skip]
    ) -> tuple[Change, ...]:
        size_bytes = _measure(model).size_bytes
        if not gate.compares:
            return ()
        if size_bytes > _ONNXSIM_LIMIT_BYTES:
            reason = f"the model has {size_bytes / 1e9:.1f} GB and onnxsim copies it several times"
            skips.append(Skip("", "", f"onnxsim was not run: {reason}"))
            return ()
        try:
            candidate = simplify(
                model,
                work_dir=ctx.work_dir,
                max_folded_bytes=self.options.max_folded_bytes,
                size_bytes=size_bytes,
            )
        except OnnxsimError as error:
            skips.append(Skip("", "", f"onnxsim's result was not adopted: {error}"))
            return ()
        if (refusal := gate.refuses(candidate, model, foreign=True)) is not None:
            skips.append(Skip("", "", f"onnxsim's result was not adopted: {refusal}"))
            return ()
        return _adopt(model, candidate, "onnxsim") if _better(candidate, model) else ()


# --- the gate ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Size:
    """What must not grow."""

    nodes: int
    view_nodes: int
    shape_nodes: int
    size_bytes: int


def _measure(model: ir.Model) -> _Size:
    """Count nodes (constants are none) and bytes.

    Among the nodes, those that read or change shapes count apart, and Shape and Reshape.

    The bytes are those of the constants and of the nodes with their names; inferred types do not
    count.
    """
    nodes = [n for n in model.graph.all_nodes() if n.op_type != "Constant" or n.domain]
    tensors = [v.const_value for g in model.graphs() for v in g.initializers.values()]
    size_bytes = sum(t.nbytes for t in tensors if t is not None)
    for graph in model.graphs():
        size_bytes += sum(len(name) + 8 for name in graph.initializers)
        for node in graph:
            names = (node.name, *(v.name for v in (*node.inputs, *node.outputs) if v is not None))
            size_bytes += sum(len(n or "") + 2 for n in names) + len(node.op_type) + 8
            size_bytes += sum(
                a.as_tensor().nbytes
                for a in node.attributes.values()
                if a.type == ir.AttributeType.TENSOR
            )
    view_nodes = sum(n.op_type in _OF_SHAPES for n in nodes)
    shape_nodes = sum(n.op_type in ("Shape", "Reshape") for n in nodes)
    return _Size(len(nodes), view_nodes, shape_nodes, size_bytes)


def _better(candidate: ir.Model, model: ir.Model) -> bool:
    """Whether there is anything to gain: fewer nodes, fewer bytes, or other operators."""
    ours, theirs = _measure(candidate), _measure(model)
    return (ours.nodes, ours.size_bytes) < (theirs.nodes, theirs.size_bytes)


@dataclass(slots=True)
class _Gate:
    """Decides whether a simplified copy may stand for the original.

    Attributes:
        ctx: The job.
        original: A copy of the original, for its inputs and outputs.
        feeds: Sample inputs.
        expected: The original's outputs on them.
        notes: Remarks for the report.
    """

    ctx: PassContext
    original: ir.Model
    feeds: list[dict[str, Array]] = field(default_factory=list)
    expected: list[dict[str, Array]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def compares(self) -> bool:
        """Whether there are outputs to compare with."""
        return bool(self.expected)

    @classmethod
    def open(cls, model: ir.Model, ctx: PassContext) -> _Gate:
        """Run the original once on calibration samples, or on synthetic ones."""
        gate = cls(ctx, model.clone())
        try:
            data = ctx.calibration or synthetic_dataset(model, samples=_SAMPLES, seed=ctx.seed)
            gate.feeds = list(data.take(_SAMPLES).batches(ctx.batch_size))
            gate.expected = gate.outputs(model)
        except (ModelError, DataError) as error:
            gate.expected = []
            gate.notes = (
                f"Only unused and double parts were removed: the model cannot be run ({error}).",
            )
        return gate

    def outputs(self, model: ir.Model) -> list[dict[str, Array]]:
        """Outputs for every sample batch; the session is closed again."""
        session = open_session(model, self.ctx.session, work_dir=self.ctx.work_dir)
        return [session.run(feeds) for feeds in self.feeds]

    def refuses(
        self, candidate: ir.Model, current: ir.Model, *, foreign: bool = False
    ) -> str | None:
        """Why ``candidate`` may not replace ``current``; None if it may.

        Args:
            candidate: The copy.
            current: The model as it is.
            foreign: Whether the copy may hold a Reshape for other reasons than :mod:`._views`.
        """
        if not _restore_interface(candidate, self.original):
            return "it changes the names of the inputs or outputs"
        new, old = _measure(candidate), _measure(current)
        if new.nodes > old.nodes:
            return f"it has {new.nodes} nodes instead of {old.nodes}"
        if new.view_nodes > old.view_nodes:
            change = f"{new.view_nodes} nodes that read or change shapes instead of"
            return f"it has {change} {old.view_nodes}"
        if foreign and new.shape_nodes > old.shape_nodes:
            return f"it has {new.shape_nodes} Shape and Reshape nodes instead of {old.shape_nodes}"
        if new.size_bytes > old.size_bytes:
            return f"it has {new.size_bytes} bytes instead of {old.size_bytes}"
        try:
            model_io.check(candidate)
            found = self.outputs(candidate) if self.compares else []
        except ModelError as error:
            return error.message
        for ours, theirs in zip(found, self.expected, strict=True):
            for name, expected in theirs.items():
                if (difference := _differs(name, ours[name], expected)) is not None:
                    return difference
        return None


def _differs(name: str, found: Array, expected: Array) -> str | None:
    """How ``found`` differs from ``expected`` beyond rounding; None if it does not."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        was = f"{expected.dtype}{list(expected.shape)}"
        return f"output '{name}' is {found.dtype}{list(found.shape)} instead of {was}"
    if expected.dtype.name not in _TOLERANCE:
        return None if np.array_equal(found, expected) else f"output '{name}' differs"
    ours, theirs = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(theirs)
    if not np.array_equal(ours[~finite], theirs[~finite], equal_nan=True):
        return f"output '{name}' differs where it is not finite"
    error = float(np.abs(ours[finite] - theirs[finite]).max(initial=0.0))
    scale = float(np.abs(theirs[finite]).max(initial=0.0))
    if not error <= _TOLERANCE[expected.dtype.name] * scale:
        return f"output '{name}' differs by {error:.2g} at a magnitude of {scale:.2g}"
    return None


# --- adopting a copy -----------------------------------------------------------------------------


def _removed(before: ir.Model, after: ir.Model, by: str) -> tuple[Change, ...]:
    """The nodes that are gone, and how many new ones stand for them."""
    kept = {(n.name, n.op_type) for n in after.graph.all_nodes()}
    old = {(n.name, n.op_type) for n in before.graph.all_nodes()}
    gone = [n for n in before.graph.all_nodes() if (n.name, n.op_type) not in kept]
    changes = [Change(n.name or "", n.op_type, f"removed by {by}") for n in gone]
    added = Counter(n.op_type for n in after.graph.all_nodes() if (n.name, n.op_type) not in old)
    changes += [Change("", op, f"{n} added by {by}") for op, n in sorted(added.items())]
    return tuple(changes) or (Change("", "", f"initializers removed by {by}"),)


def _adopt(model: ir.Model, candidate: ir.Model, by: str) -> tuple[Change, ...]:
    changes = _removed(model, candidate, by)
    strip_metadata(candidate.graph)
    model.graph = candidate.graph
    return changes


def _restore_interface(model: ir.Model, original: ir.Model) -> bool:
    """Give inputs and outputs the types and shapes, dynamic axes too, of the original.

    Returns:
        False, with nothing changed, if their names or order differ.
    """
    ours = (*model.graph.inputs, *model.graph.outputs)
    theirs = (*original.graph.inputs, *original.graph.outputs)
    if [v.name for v in ours] != [v.name for v in theirs]:
        return False
    for value, kept in zip(ours, theirs, strict=True):
        value.type, value.shape, value.doc_string = kept.type, kept.shape, kept.doc_string
    return True
