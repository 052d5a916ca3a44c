"""How much the passes before have cost already, and how much more would hardly count beside it.

Every default budget is made for a pass that runs alone. Where several run, a later one sees a model
that has given up what it could spare, and its default may cost more than all before. So a pass that
the user set no budget for looks at what the outputs have lost by now, on samples that nothing was
fitted to, and spends what adds little to that, or what the outputs can stand anyway:

    allowed = max(PART · lost, room - lost)

``lost`` is the relative error ``Σ‖y - y₀‖² / Σ‖y₀‖²`` of the model as it is against the original.
``room`` is 20 dB; where all outputs are a classifier's it is the error at which 3 in 100 samples
get another class. How far that is depends on the model: ten classes stand 17 dB, a thousand not 30.
It is found by scaling the error that is there, ``y₀ + t (y - y₀)``, and is no less than 15 dB: of
images that a network was trained on it is too sure. The first pass has nothing to compare with;
what it may cost where others follow is ``bearable``: 17 dB, or 1 in 10 classes and no less than 13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import OnnxCompressError
from onnxcompress.passes.prune.probe import Errors
from onnxcompress.passes.prune.samples import split
from onnxcompress.passes.quant.samples import macs_of, samples_for
from onnxcompress.runtime import open_session
from onnxcompress.verification.compare import ComparisonMeter

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]

PART = 0.5
"""What a pass may add to what is lost already: 1.8 dB."""
ROOM = 0.01
"""Error that outputs are taken to stand: 20 dB."""
CHANGED = 0.03
"""Samples that may get another class, as a fraction."""
MOST_ROOM = 0.03
"""Error that classes are taken to stand at most: 15 dB."""
BEARABLE = 0.02
"""Error that the first of several passes may cost: 17 dB."""
MOST_BEARABLE = 0.05
"""The same for classes, at most: 13 dB."""
BEARABLY_CHANGED = 0.1
"""Samples that may get another class by it, as a fraction."""
_UNTOUCHED = 1e-6
"""Error (60 dB) below which no pass has lost anything on purpose."""
_SAMPLES = 256
"""Samples at most: enough to see 3 in 100."""
_WORK = 2e11
"""Multiply-accumulates at most."""
_BYTES = 64 * 2**20
"""Rows of classifiers that are kept, at most."""
_SCALES = 2.0 ** np.linspace(-6, 4, 81)
"""Factors of the error's amplitude, 0.75 dB apart."""


@dataclass(frozen=True, slots=True)
class Lost:
    """What has been lost of the outputs of a model.

    Attributes:
        error: ``Σ‖y - y₀‖² / Σ‖y₀‖²`` on held-out samples, averaged over the outputs.
        room: Error that the outputs can stand.
        bearable: Error that the first of several passes may cost.
    """

    error: float
    room: float
    bearable: float

    @property
    def allowed(self) -> float:
        """What a pass without a budget of its own may add."""
        return max(PART * self.error, self.room - self.error)


class Comparison:
    """Compares models with the original on the same samples.

    Args:
        ctx: The job; it has calibration data and knows the original's file.
        data: Its samples.
        model: Any model of the job, to know how much work a run is.

    Raises:
        OnnxCompressError: If the original does not run on the samples.
    """

    def __init__(self, ctx: PassContext, data: Dataset, model: ir.Model) -> None:
        if ctx.original is None:
            raise ValueError("the job does not say what the original is")
        self._ctx = ctx
        count = samples_for(_SAMPLES, _WORK, 2 * macs_of(model, data))
        fitting, held_out = split(data)
        parts = [fitting, held_out] if held_out is not None else [fitting]
        share = count / data.sample_count
        group = data.layout.group or 1
        self._parts = [
            p.spread(min(max(int(p.sample_count * share) // group, 1) * group, p.sample_count))
            for p in parts
        ]
        self._original = open_session(ctx.original, ctx.session)
        self._expected = [
            [self._original.run(feeds) for feeds in part.batches(ctx.batch_size)]
            for part in self._parts
        ]

    def of(self, model: ir.Model) -> Lost:
        """What ``model`` has lost.

        Raises:
            OnnxCompressError: If it does not run.
        """
        session = open_session(model, self._ctx.session, work_dir=self._ctx.work_dir)
        found = [
            [session.run(feeds) for feeds in part.batches(self._ctx.batch_size)]
            for part in self._parts
        ]
        floats = [
            {n: a.astype(np.float64) for n, a in run.items() if a.dtype.kind == "f"}
            for run in self._expected[-1]
        ]
        return Lost(Errors(floats).of(found[-1]), *self._rooms(found))

    def _rooms(self, found: list[list[dict[str, Array]]]) -> tuple[float, float]:
        """The errors at which too many samples get another class; fixed ones for other outputs."""
        meter = ComparisonMeter(self._original.inputs, self._original.outputs)
        rows = _Rows()
        for part, wanted_runs, got_runs in zip(self._parts, self._expected, found, strict=True):
            counted = part.counted_batches(self._ctx.batch_size)
            for (count, _), wanted, got in zip(counted, wanted_runs, got_runs, strict=True):
                meter.update(wanted, got, count)
                rows.add(wanted, got)
        names = {n for n, a in self._expected[-1][0].items() if a.dtype.kind == "f"}
        classes = {agreement.output for agreement in meter.finish().agreements}
        if not names or names != classes or rows.too_large:
            return ROOM, BEARABLE
        pairs = [rows.pair(name) for name in names]
        return (
            min(MOST_ROOM, *(class_room(y, z, CHANGED, ROOM) for y, z in pairs)),
            min(
                MOST_BEARABLE,
                *(class_room(y, z, BEARABLY_CHANGED, BEARABLE) for y, z in pairs),
            ),
        )


@dataclass(slots=True)
class _Rows:
    """The outputs of two models, kept while they are small."""

    wanted: dict[str, list[Floats]] = field(default_factory=dict)
    got: dict[str, list[Floats]] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def too_large(self) -> bool:
        return self.nbytes > _BYTES

    def add(self, wanted: Mapping[str, Array], got: Mapping[str, Array]) -> None:
        for name, array in wanted.items():
            self.nbytes += 2 * array.size * 8
            if array.dtype.kind != "f" or array.ndim < 2 or self.too_large:
                continue
            shape = array.shape
            while len(shape) > 2 and shape[-1] == 1:
                shape = shape[:-1]
            self.wanted.setdefault(name, []).append(_rows(array, shape[-1]))
            self.got.setdefault(name, []).append(_rows(got[name], shape[-1]))

    def pair(self, name: str) -> tuple[Floats, Floats]:
        """An output of both models, [N, C]."""
        return np.concatenate(self.wanted[name]), np.concatenate(self.got[name])


def _rows(array: Array, width: int) -> Floats:
    return array.reshape(-1, width).astype(np.float64)


def class_room(y: Floats, z: Floats, changed: float, unknown: float) -> float:
    """The relative error up to which few rows have another largest entry.

    Args:
        y: What the original says, [N, C].
        z: The same with the error that is scaled, [N, C].
        changed: Fraction of the rows that may.
        unknown: What to answer where there is no error to scale.
    """
    error, classes = z - y, y.argmax(axis=1)
    energy = float(np.sum(y**2))
    if energy <= 0 or not np.any(error):
        return unknown
    ratio = float(np.sum(error**2)) / energy
    stands = 0.0
    for scale in _SCALES:
        if np.mean((y + scale * error).argmax(axis=1) != classes) > changed:
            break
        stands = float(scale)
    return ratio * stands**2


def losses_for(ctx: PassContext, model: ir.Model) -> tuple[Comparison, Lost] | None:
    """What to compare with the original by, and what is lost before a pass begins.

    None where the original or samples are not known, or no pass before has lost anything.
    """
    data = ctx.calibration
    if ctx.original is None or data is None or data.synthetic:
        return None
    try:
        comparison = Comparison(ctx, data, model)
        lost = comparison.of(model)
    except (OnnxCompressError, MemoryError, ValueError):
        return None  # defaults will do
    return (comparison, lost) if lost.error > _UNTOUCHED else None
