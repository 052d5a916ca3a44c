"""Speed and fidelity of whole models, whatever is in them, against the float model.

Ranges and errors of single nodes can only be measured in the main graph; what branches, loops and
recurrent nodes do shows in the outputs. So here models are run as they are, on the same samples.

Where accuracy and speed pull apart, one number decides:

    score = ln(1 / time) + 0.01 min(SQNR, 40 dB) + 0.05 ln(1 / bytes)

One decibel is worth one percent of speed, up to 40 dB, beyond which nobody sees a difference; a
file of a quarter of the size is worth seven percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.errors import ModelError
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.passes.quant.correction import sqnr_db
from onnxcompress.runtime import Array, Session, SessionSettings, open_session

_SAMPLES = 32
"""Samples to compare outputs on, at even distances over the set: neighbours may be alike."""

_BATCH = 8
"""Samples per run: where a range is taken over the whole tensor, each loses by the others."""

_SATURATED_DB = 40.0
_PER_DB = 0.01
_PER_BYTES = 0.05
_SECONDS = 0.3
_CLEAR = 1.3
"""Slower than the fastest by this factor, no accuracy makes up for it: times need not be exact."""
_UNUSABLE = -200.0


@dataclass(frozen=True, slots=True, eq=False)
class Rated:
    """A model and what was measured of it.

    Attributes:
        model: The model.
        sqnr_db: SQNR of the output that is farthest from float.
        bytes: Size of its weights.
    """

    model: ir.Model
    sqnr_db: float
    bytes: int

    @property
    def merit(self) -> float:
        """The part of the score that the clock has no say in."""
        fidelity = _PER_DB * min(self.sqnr_db, _SATURATED_DB)
        return fidelity - _PER_BYTES * math.log(max(self.bytes, 1))

    def score(self, seconds: float) -> float:
        """The number that decides, for a run that takes ``seconds``."""
        return self.merit - math.log(seconds)


class Judge:
    """Rates models against one float model.

    Args:
        reference: The float model.
        samples: Inputs to compare outputs on; a few are used.
        timed: One run's inputs to take times with; the first sample when None.
        count: How many samples to compare outputs on.
        filled: The same samples with their padding, where ``samples`` are without. Models are run
            on these, since filling widens ranges that are taken while they run, and compared where
            both reach.
    """

    def __init__(
        self,
        reference: ir.Model,
        samples: Dataset,
        timed: Mapping[str, Array] | None = None,
        count: int = _SAMPLES,
        filled: Dataset | None = None,
    ) -> None:
        self.reference = reference
        self._settings = SessionSettings(threads=1)
        count = min(samples.sample_count, count)
        chosen = samples.spread(count)
        self._feeds = list(chosen.batches(_BATCH if filled is None else 1))
        self._timed = chosen.first() if timed is None else timed
        session = self._open(reference)
        try:
            self._wanted = [session.run(feeds) for feeds in self._feeds]
        except ModelError:  # a batch axis by name alone
            self._feeds = list(chosen.batches(1))
            self._wanted = [session.run(feeds) for feeds in self._feeds]
        if filled is not None:
            self._feeds = list(filled.spread(count).batches(1))

    @property
    def timed(self) -> Mapping[str, Array]:
        """One run's inputs to take times with."""
        return self._timed

    def rate(self, model: ir.Model, session: Session | None = None) -> Rated:
        """Run ``model`` on the samples and compare its outputs; -200 dB where it does not run.

        Args:
            model: The model.
            session: The model opened already, if it is.
        """
        size = sum(
            v.const_value.nbytes
            for graph in model.graphs()
            for v in graph.initializers.values()
            if v.const_value is not None
        )
        try:
            session = session or self._open(model)
            found = [session.run(feeds) for feeds in self._feeds]
        except ModelError:
            return Rated(model, _UNUSABLE, size)
        return Rated(model, _worst(self._wanted, found), size)

    def times(self, models: Sequence[ir.Model]) -> list[float]:
        """Seconds of one run of each model with one thread, the better of two sessions.

        Where a session's memory happens to lie changes its speed by up to a tenth.
        """
        best = [math.inf] * len(models)
        for _ in range(2):
            sessions = [self._open(model) for model in models]
            times = run_times(sessions, self._timed, seconds=_SECONDS * len(models), clear=_CLEAR)
            best = [min(pair) for pair in zip(best, times, strict=True)]
        return best

    def _open(self, model: ir.Model) -> Session:
        return open_session(model, self._settings)


def _worst(wanted: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]]) -> float:
    """SQNR in dB, over all samples, of the floating-point output that is farthest off."""
    worst = math.inf
    for name, first in wanted[0].items():
        if first.dtype.kind != "f":
            continue
        signal = noise = 0.0
        for theirs, ours in zip(wanted, found, strict=True):
            expected = theirs[name].astype(np.float64)
            got = _front(ours[name], expected.shape)
            if got is None:
                return _UNUSABLE
            with np.errstate(invalid="ignore", over="ignore"):
                difference = expected - got.astype(np.float64)
                signal += float(np.square(expected[np.isfinite(expected)]).sum())
                noise += float(np.square(difference[np.isfinite(expected)]).sum())
        if not math.isfinite(noise):
            return _UNUSABLE
        worst = min(worst, sqnr_db(signal, noise))
    return 200.0 if math.isinf(worst) else worst


def _front(array: Array, shape: tuple[int, ...]) -> Array | None:
    """The front of ``array`` of that shape; None where it does not reach so far."""
    if array.ndim != len(shape) or any(a < b for a, b in zip(array.shape, shape, strict=True)):
        return None
    return array[tuple(slice(0, extent) for extent in shape)]
