"""Passes that do small, known things to a model, and a model for them."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

import onnxcompress.passes
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.errors import ModelError
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.passes.base import Change, PassOptions, PassReport, Skip, Stage, option

Floats = npt.NDArray[np.float32]

CLASSES = 4
FEATURES = 6


def save_classifier(path: Path, *, seed: int = 0) -> Path:
    """Write x [N, 6] -> Gemm -> Relu -> Gemm -> Softmax -> y [N, 4]."""
    rng = np.random.default_rng(seed)
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        tiny (float[N,6] x) => (float[N,4] y) {
            h = Gemm(x, w1, b1)
            r = Relu(h)
            z = Gemm(r, w2, b2)
            y = Softmax(z)
        }
        """
    )
    shapes = {"w1": (FEATURES, 16), "b1": (16,), "w2": (16, CLASSES), "b2": (CLASSES,)}
    for name, shape in shapes.items():
        array = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def samples(count: int, *, seed: int = 1) -> Floats:
    """Inputs of the classifier, [count, 6]."""
    return np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)


def save_data(model: Path, *, calib: int = 0, evaluation: int = 0) -> None:
    """Write samples beside a model, under the names that are found by themselves."""
    if calib:
        np.savez(model.with_suffix(".calib.npz"), x=samples(calib, seed=2))
    if evaluation:
        np.savez(model.with_suffix(".eval.npz"), x=samples(evaluation, seed=3))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GainOptions(PassOptions):
    """Options of :class:`GainPass`."""

    factor: float = option(1.0, "What to multiply the first weight with.", minimum=-10, maximum=10)
    names: tuple[str, ...] = option((), "Names that do nothing.")


class FakePass:
    """A pass that applies :attr:`edit`."""

    name: ClassVar[str]
    summary: ClassVar[str] = "Does something small for tests."
    stage: ClassVar[Stage] = Stage.PRECISION
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    options_type: ClassVar[type[PassOptions]] = PassOptions

    def __init__(self, options: PassOptions | None = None) -> None:
        self.options = options or self.options_type()

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        return PassReport(changes=(Change("w1", "", "to be edited"),))

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        self.edit(model)
        return PassReport(
            changes=(Change("w1", "", "edited"),),
            skips=tuple(Skip(f"n{i}", "Relu", "it has no weights") for i in range(5)),
            figures={"edited_ratio": 0.5},
            notes=("An edit was made.",),
        )

    def edit(self, model: ir.Model) -> None:
        """Change the model; nothing by default."""


class SimplifyPass(FakePass):
    name = "simplify"
    stage = Stage.PREPARE


class FoldPass(FakePass):
    name = "fold"
    stage = Stage.PREPARE


class PrunePass(FakePass):
    name = "prune"
    stage = Stage.STRUCTURE


class GainPass(FakePass):
    name = "gain"
    options_type = GainOptions

    def edit(self, model: ir.Model) -> None:
        assert isinstance(self.options, GainOptions)
        factor = self.options.factor
        change_weight(model, lambda w: w * np.float32(factor))


class LitterPass(FakePass):
    """Leaves a constant that nothing reads."""

    name = "litter"

    def edit(self, model: ir.Model) -> None:
        set_initializer(model.graph, "litter", np.zeros(3, np.float32))


class WreckPass(FakePass):
    """Turns the weights around, so that the classes are other ones."""

    name = "wreck"

    def edit(self, model: ir.Model) -> None:
        change_weight(model, lambda w: -w[::-1], name="w2")


class NanPass(FakePass):
    name = "nan"

    def edit(self, model: ir.Model) -> None:
        change_weight(model, lambda w: w * np.float32("nan"))


class InvalidPass(FakePass):
    """Names an operator that does not exist."""

    name = "invalid"

    def edit(self, model: ir.Model) -> None:
        node(model, "Relu").op_type = "NoSuchOperator"


class UnloadablePass(FakePass):
    """A valid model whose shapes do not fit together once it runs."""

    name = "unloadable"

    def edit(self, model: ir.Model) -> None:
        change_weight(model, lambda w: w[:-1], name="w2")


class RenamePass(FakePass):
    name = "rename"

    def edit(self, model: ir.Model) -> None:
        model.graph.outputs[0].name = "renamed"


class RetypePass(FakePass):
    """Fixes the batch axis of the input."""

    name = "fixbatch"

    def edit(self, model: ir.Model) -> None:
        model.graph.inputs[0].shape = ir.Shape([1, FEATURES])


class CrashPass(FakePass):
    name = "crash"

    def edit(self, model: ir.Model) -> None:
        raise ZeroDivisionError("a bug")


class RefusePass(FakePass):
    name = "refuse"

    def edit(self, model: ir.Model) -> None:
        raise ModelError("this model is not for me", hint="Try another.")


class InterruptPass(FakePass):
    name = "interrupt"

    def edit(self, model: ir.Model) -> None:
        raise KeyboardInterrupt


class SleepPass(FakePass):
    """Says that it runs by making a file, then waits to be interrupted."""

    name = "sleep"

    def edit(self, model: ir.Model) -> None:
        Path(os.environ["FAKE_SLEEP_FILE"]).touch()
        time.sleep(60)


class HungryPass(FakePass):
    """Needs calibration data and says how many samples it got."""

    name = "hungry"
    needs = frozenset({Statistic.MEAN})

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        assert ctx.calibration is not None
        first = float(next(iter(ctx.calibration.first().values())).ravel()[0])
        return PassReport(
            changes=(Change("w1", "", "measured"),),
            figures={"samples": ctx.calibration.sample_count, "first": first, "seed": ctx.seed},
        )


_ALL = (
    SimplifyPass,
    FoldPass,
    PrunePass,
    GainPass,
    LitterPass,
    WreckPass,
    NanPass,
    InvalidPass,
    UnloadablePass,
    RenamePass,
    RetypePass,
    CrashPass,
    RefusePass,
    InterruptPass,
    SleepPass,
    HungryPass,
)


def install(patch: pytest.MonkeyPatch) -> None:
    """Put these passes in the place of the real ones."""
    patch.setattr(
        onnxcompress.passes,
        "PASSES",
        MappingProxyType({made.name: f"{__name__}:{made.__name__}" for made in _ALL}),
    )


def node(model: ir.Model, op_type: str) -> ir.Node:
    """The first node of a type."""
    return next(n for n in model.graph if n.op_type == op_type)


def change_weight(model: ir.Model, change: Callable[[Floats], Floats], *, name: str = "w1") -> None:
    """Replace an initializer by what ``change`` makes of it."""
    value = model.graph.initializers[name]
    array = constant_of(value)
    assert array is not None
    changed = change(array.astype(np.float32))
    value.const_value = ir.tensor(np.ascontiguousarray(changed), name=name)
    value.shape = ir.Shape(changed.shape)


def leftovers(folder: Path, *expected: str) -> list[str]:
    """Names in a folder, hidden ones too, that are not expected."""
    return sorted(path.name for path in folder.iterdir() if path.name not in expected)


def interrupt_when(file: Path, pid: int, number: signal.Signals, *, within_s: float = 60) -> None:
    """Send a signal to a process as soon as a file exists."""
    end = time.monotonic() + within_s
    while not file.exists():
        assert time.monotonic() < end, f"{file} did not appear"
        time.sleep(0.05)
    os.kill(pid, number)
