"""Let a compressed model learn from the original, without labels.

What prune, svd and sparse refit layer by layer, this pass refits all at once: it follows the
gradient of the error that the layers of the compressed model make together
(:mod:`onnxcompress.passes.distill.lesson`). It starts from what closed forms found and moves the
weights by a few percent. The gradient is a graph that onnxruntime runs.

Source: Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network"; Romero et al.
2015, "FitNets"; Li et al. 2021, "BRECQ" (reconstruction from a few samples after training).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress._serialize import tensor_bytes
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.errors import ModelError
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.cost import cost_of
from onnxcompress.passes._unpadded import unpadded
from onnxcompress.passes.base import Change, PassOptions, PassReport, Skip, Stage, option
from onnxcompress.passes.distill.coordinates import LINEAR, biases_of, coordinates_of
from onnxcompress.passes.distill.learning import learn
from onnxcompress.passes.distill.lesson import Lesson, NoGradientError, activation_bytes
from onnxcompress.passes.distill.samples import Runs

_BATCH = 32
"""Samples per step, at most, and what ``rate`` is meant for."""
_LEAST_BATCH = 4
_STEPS = 32
"""Steps that a pass over the samples has at least, if there are enough samples."""
_MOST_BYTES = 1 << 30
"""Weights that may learn; each needs a gradient and two moments beside."""
_ACTIVATION_BYTES = 1 << 29
"""Activations of a step, which holds their gradients and those of the original besides."""
_MEASURED = 128
"""Samples by which the error before and after is measured."""
_COMPARABLE = 0.5
"""Relative error from which on a value is not what it was in the original, whatever its name."""
_ROUNDING = 1e-9
"""Relative error that two orders of summation make."""
_EPOCHS = 10
_WORK = 4e12
"""Multiply-accumulates of all steps, where the user does not say how many passes there are."""
_LEAST_STEPS = 64
"""However much work they are."""
_FEW = 32
"""Fewer samples than this teach nothing but themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions(PassOptions):
    """Options of :class:`DistillPass`."""

    epochs: int = option(
        0,
        "passes over the calibration samples; more lose less, and take longer; 0 makes "
        f"{_EPOCHS}, or fewer where a run is much work",
        minimum=0,
    )
    rate: float = option(
        0.007,
        "how far weights move in a step at most, relative to the size of their channel, for "
        f"{_BATCH} samples a step",
        minimum=1e-6,
        maximum=1.0,
    )
    batch: int = option(
        0, "samples per step; 0 takes 4 to 32, by how many there are", minimum=0, maximum=4096
    )


class DistillPass:
    """Follow the gradient of the difference from the original.

    Args:
        options: How; the defaults when None.
    """

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "let all weights learn from the original, without labels"
    stage: ClassVar[Stage] = Stage.RECOVER
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.MOMENTS})
    options_type: ClassVar[type[DistillOptions]] = DistillOptions

    def __init__(self, options: DistillOptions | None = None) -> None:
        self._options = DistillOptions() if options is None else options
        self._options.validate(self.name)

    @property
    def options(self) -> DistillOptions:
        """The options this pass was made with."""
        return self._options

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say which weights could learn."""
        changes = tuple(Change(name, "", "would learn") for name in _learners(model))
        return PassReport(changes=changes, figures={"weights": len(changes)})

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Let ``model`` learn, in place.

        Raises:
            DataError: If a sample cannot be read.
        """
        ctx = unpadded(model, ctx)
        data = ctx.calibration
        if ctx.original is None or data is None:
            return _nothing("there is no original, or there are no samples, to learn from")
        if data.synthetic:
            return _nothing("the samples are invented: give --calib")
        if data.sample_count < _FEW:
            return _nothing(f"{data.sample_count} samples are too few; {_FEW} are the least")
        learners = _learners(model)
        if tensor_bytes(model, external=True) > _MOST_BYTES:
            return _nothing("its weights, and a gradient for each, would take too much memory")
        one = data.first()
        sample_bytes = activation_bytes(model, one) // (data.layout.group or 1)
        size = int(np.clip(data.sample_count // _STEPS, _LEAST_BATCH, _BATCH))
        size = min(self._options.batch or size, max(_ACTIVATION_BYTES // max(sample_bytes, 1), 1))
        runs = Runs(data, size)
        if 2 * runs.left_out > data.sample_count:
            return _nothing(
                "the samples are of many lengths without their padding, and runs must be of one"
            )
        original = model_io.load(ctx.original)
        try:
            lesson = Lesson.of(model, original, runs.first, learners, ctx)
        except ModelError as error:
            return _nothing(f"the two models cannot be compared: {error}")
        except NoGradientError as error:
            return _nothing(str(error), error.stopped)
        try:
            return self._taught(model, original, lesson, runs, ctx)
        except (MemoryError, ModelError) as error:
            return _nothing(f"a step does not run ({error}); a smaller distill.batch may")

    def _taught(
        self,
        model: ir.Model,
        original: ir.Model,
        lesson: Lesson,
        runs: Runs,
        ctx: PassContext,
    ) -> PassReport:
        errors, energies = lesson.measured(runs.some(_MEASURED))
        counts = errors < _COMPARABLE * energies
        if not counts.any():
            return _nothing("nothing in it resembles the original")
        energies = np.where(counts, energies, np.inf)
        before = float(np.mean((errors / energies)[counts]))
        if not before > _ROUNDING:
            return _nothing("it does not differ from the original")
        old = {name: array.copy() for name, array in lesson.weights.items()}
        steps, notes = self._steps(model, original, runs)
        rate = learn(
            lesson,
            runs,
            energies,
            before,
            coordinates_of(model, old, ctx),
            steps,
            self._options.rate * runs.size / _BATCH,
            ctx,
        )
        errors, _ = lesson.measured(runs.some(_MEASURED))
        after = float(np.mean((errors / energies)[counts]))
        if not after < before:
            return _nothing(f"the error did not fall ({before:.3g} before, {after:.3g} after)")
        changes = []
        for name, array in lesson.weights.items():
            set_initializer(model.graph, name, array)
            norm = float(np.linalg.norm(old[name])) or 1.0
            moved = float(np.linalg.norm(array - old[name])) / norm
            changes.append(Change(name, "", f"moved by {moved:.1%}"))
        return PassReport(
            changes=tuple(changes),
            skips=_skips(lesson.stopped),
            figures={
                "steps": steps,
                "samples_per_step": runs.size,
                "rate": rate * _BATCH / runs.size,
                "places_compared": int(counts.sum()),
                "relative_error_before": before,
                "relative_error_after": after,
            },
            notes=notes,
        )

    def _steps(
        self, model: ir.Model, original: ir.Model, runs: Runs
    ) -> tuple[int, tuple[str, ...]]:
        """How many steps there are, and what to say about that."""
        if self._options.epochs:
            return self._options.epochs * len(runs), ()
        shapes = {name: array.shape for name, array in runs.first.items()}
        # A gradient is twice the work of what it is the gradient of.
        work = cost_of(original, shapes).macs + 3 * cost_of(model, shapes).macs
        wanted = _EPOCHS * len(runs)
        steps = min(wanted, max(int(_WORK / max(work, 1)), _LEAST_STEPS))
        if steps == wanted:
            return steps, ()
        note = (
            f"{steps} steps instead of {wanted}, for a run is much work. distill.epochs={_EPOCHS} "
            "makes them all."
        )
        return steps, (note,)


def _nothing(reason: str, stopped: Mapping[str, str] | None = None) -> PassReport:
    return PassReport(skips=_skips(stopped or {}), notes=(f"Nothing was learned: {reason}.",))


def _skips(stopped: Mapping[str, str]) -> tuple[Skip, ...]:
    return tuple(Skip(n, "", f"gradients stop here: {r}") for n, r in stopped.items())


def _learners(model: ir.Model) -> list[str]:
    """The weights and biases of linear layers."""
    layers = (node for node in model.graph if not node.domain and node.op_type in LINEAR)
    weights = [v.name or "" for node in layers if (v := node.inputs[1]) is not None]
    names = [*weights, *biases_of(model)]
    known = model.graph.initializers
    return [
        n
        for n in dict.fromkeys(names)
        if n in known and known[n].dtype == ir.DataType.FLOAT and constant_of(known[n]) is not None
    ]
