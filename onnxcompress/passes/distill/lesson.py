"""The graph that says how far a compressed model is from the original, and how to come nearer.

With ``s_i`` and ``r_i`` what the two have at place ``i``, the loss is the mean of relative errors,

    L = 1/P Σᵢ E(s_i - r_i)² / Var(r_i)

and the graph computes its parts, and its gradient for every weight that may learn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common

from onnxcompress import model_io
from onnxcompress.calibration.join import join
from onnxcompress.calibration.statistics import REFERENCE_PREFIX
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.gradient import OPSET, differentiate
from onnxcompress.graph.gradient.tape import Tape
from onnxcompress.graph.probe import probe
from onnxcompress.opset import upgrade
from onnxcompress.passes.distill.places import places_of
from onnxcompress.runtime import Session, open_session

Array = npt.NDArray[np.generic]
Float = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

_SCALES = "distill/scales"
_IR_VERSION = 8
"""The oldest that knows operator set 18, and that takes initializers for no inputs."""


class NoGradientError(Exception):
    """No gradient reaches a weight.

    Args:
        stopped: Nodes that gradients cannot pass, with the reason.
    """

    def __init__(self, stopped: Mapping[str, str]) -> None:
        super().__init__("no gradient reaches a weight")
        self.stopped = stopped


@dataclass(frozen=True, slots=True)
class Lesson:
    """A model beside its original, ready to run on batches of one shape.

    Attributes:
        places: Names of the values that are compared.
        weights: What may learn, by name of the initializer; changed in place by who teaches.
        stopped: Nodes that gradients cannot pass, with the reason.
    """

    places: tuple[str, ...]
    weights: dict[str, Float]
    stopped: Mapping[str, str]
    _sizes: Floats
    _measuring: Session
    _learning: Session
    _errors: tuple[str, ...]
    _energies: tuple[str, ...]
    _gradients: Mapping[str, str]

    @classmethod
    def of(
        cls,
        model: ir.Model,
        original: ir.Model,
        feeds: Mapping[str, Array],
        wanted: Iterable[str],
        ctx: PassContext,
    ) -> Self:
        """Put the two side by side.

        Args:
            model: The compressed model; it is not changed.
            original: The original; it is not changed.
            feeds: Inputs of a run; all others must have their shapes.
            wanted: Names of the initializers that may learn.
            ctx: How to run.

        Raises:
            NoGradientError: If no gradient reaches what may learn.
            ModelError: If the two cannot be brought to one operator set, or do not run.
        """
        student, teacher = (_fixed(m, feeds) for m in (model, original))
        version = max(OPSET, *(m.opset_imports.get("", OPSET) for m in (student, teacher)))
        upgrade(student, version)
        upgrade(teacher, version)
        shapes = probe(student).static
        places = places_of(student, shapes, teacher, probe(teacher).static)
        graph = student.graph
        ours = {v.name: v for node in graph for v in node.outputs}
        weights: dict[str, Float] = {}
        for name in wanted:
            array = constant_of(graph.initializers.get(name))
            if array is not None:
                weights[name] = np.array(array, np.float32)
                # A tensor of its own, for the original must keep the old one.
                graph.initializers[name].const_value = ir.Tensor(weights[name], name=name)
        theirs = join(student, teacher)
        tape = Tape(student, {}, ())
        errors, energies, differences = [], [], []
        for name in places:
            own, other = ours[name], theirs[f"{REFERENCE_PREFIX}{name}"]
            difference = tape.op("Sub", own, other)
            errors.append(_square_mean(tape, difference))
            flat = tape.reshape(other, -1)
            energies.append(_square_mean(tape, tape.op("Sub", flat, tape.mean(flat, [0]))))
            differences.append(difference)
        graph.extend(tape.take())
        graph.outputs[:] = [*errors, *energies]
        measured = model_io.clone(student)
        scales = ir.val(_SCALES, ir.DataType.FLOAT, [len(places)])
        seeds = {}
        for number, (name, difference) in enumerate(zip(places, differences, strict=True)):
            scale = tape.op("Gather", scales, tape.constant(np.array(number)))
            seeds[ours[name]] = tape.op("Mul", difference, scale)
        graph.extend(tape.take())
        gradients = differentiate(
            student, seeds, [graph.initializers[n] for n in weights], probe(student).static
        )
        found = {w.name or "": g for w, g in gradients.of.items()}
        if not found:
            raise NoGradientError(gradients.stopped)
        graph.outputs[:] = [*errors, *found.values()]
        sizes = [np.prod([n or 1 for n in shapes[ours[p]]]) for p in places]
        return cls(
            places,
            {n: weights[n] for n in found},
            gradients.stopped,
            np.array(sizes, np.float64),
            _session(measured, found, (), ctx),
            _session(student, found, [scales], ctx),
            tuple(v.name or "" for v in errors),
            tuple(v.name or "" for v in energies),
            {n: g.name or "" for n, g in found.items()},
        )

    def measured(self, batches: Iterable[Mapping[str, Array]]) -> tuple[Floats, Floats]:
        """The mean squared error at each place, and the variance of the original there, [P] each.

        Raises:
            ModelError: If the graph does not run.
        """
        found = []
        for feeds in batches:
            made = self._measuring.run({**feeds, **self.weights})
            found.append([[made[n] for n in names] for names in (self._errors, self._energies)])
        errors, energies = np.mean(np.array(found, np.float64).reshape(len(found), 2, -1), axis=0)
        return errors, energies

    def gradients(
        self, feeds: Mapping[str, Array], energies: Floats
    ) -> tuple[float, dict[str, Float]]:
        """The loss on a batch, and its gradient for every weight.

        Args:
            feeds: Inputs of the run.
            energies: ``Var(r_i)``, [P]; a place with an infinite one does not count.

        Raises:
            ModelError: If the graph does not run.
        """
        share = 1 / (np.isfinite(energies).sum() * energies)
        scales = (2 * share / self._sizes).astype(np.float32)
        made = self._learning.run({**feeds, **self.weights, _SCALES: scales})
        errors = np.array([made[n] for n in self._errors], np.float64).reshape(-1)
        of = {n: np.asarray(made[g], np.float32) for n, g in self._gradients.items()}
        return float(errors @ share), of


def activation_bytes(model: ir.Model, feeds: Mapping[str, Array]) -> int:
    """Bytes of all values that the nodes of a model make in a run, as far as they are known."""
    fixed = _fixed(model, feeds)
    shapes = probe(fixed).static
    lengths = (shapes.get(v, ()) for node in fixed.graph for v in node.outputs)
    return 4 * sum(math.prod(n or 1 for n in shape) for shape in lengths)


def _fixed(model: ir.Model, feeds: Mapping[str, Array]) -> ir.Model:
    """A copy of a model whose inputs have the shapes of ``feeds``."""
    found = model_io.clone(model)
    found.ir_version = max(found.ir_version, _IR_VERSION)
    for value in found.graph.inputs:
        if value.name and value.name in feeds:
            value.shape = ir.Shape(feeds[value.name].shape)
    for node in found.graph:
        for value in node.outputs:
            value.shape = None  # what a file says of other lengths would contradict
    model_io.infer_shapes(found)
    return found


def _square_mean(tape: Tape, value: ir.Value) -> ir.Value:
    """The mean of the squares of all entries, [1]."""
    squares = tape.reshape(tape.op("Mul", value, value), -1)
    return tape.mean(squares, [0])


def _session(
    model: ir.Model, weights: Iterable[str], others: Iterable[ir.Value], ctx: PassContext
) -> Session:
    """Open a model with some of its initializers, and other values, as inputs."""
    for name in weights:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    model.graph.inputs.extend(others)
    for output in model.graph.outputs:
        output.dtype = ir.DataType.FLOAT
    # onnxruntime would run the end of the original, which is compared with nothing, too.
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return open_session(model, ctx.session, work_dir=ctx.work_dir)
