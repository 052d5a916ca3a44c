"""Samples and what the original makes of them, kept so that many versions can be compared to it.

The original runs once; every version then costs its own runs alone. The samples are bounded by
memory and by work, never by time, so that the same request always compares the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.errors import ModelError
from onnxcompress.interface import TensorSpec
from onnxcompress.runtime import Array, Session
from onnxcompress.verification.compare import Comparison, ComparisonMeter

_MOST_BYTES = 1 << 28
"""Most memory for samples and outputs: 256 MiB."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One run.

    Attributes:
        samples: Samples in it.
        feeds: Input name to array.
        outputs: Output name to what the original gives.
        labels: Class numbers [samples]; None without labels.
    """

    samples: int
    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]
    labels: Array | None


@dataclass(frozen=True, slots=True)
class Reference:
    """What the original makes of some samples; it pickles.

    Attributes:
        inputs: Inputs of the original.
        outputs: Outputs of the original.
        batches: The samples.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batches: tuple[Batch, ...]

    @property
    def sample_count(self) -> int:
        """Samples in all batches."""
        return sum(batch.samples for batch in self.batches)

    @property
    def labelled(self) -> bool:
        """Whether the samples have labels."""
        return all(batch.labels is not None for batch in self.batches)

    def first(self, samples: int) -> Reference:
        """The first batches, with at least ``samples`` samples where there are so many."""
        kept: list[Batch] = []
        for batch in self.batches:
            if kept and sum(b.samples for b in kept) >= samples:
                break
            kept.append(batch)
        return Reference(self.inputs, self.outputs, tuple(kept))

    def compare(self, session: Session) -> Comparison:
        """Run a version over the samples and compare its outputs to the original's.

        A version that does not run is told in ``fatal``.
        """
        meter = ComparisonMeter(self.inputs, self.outputs)
        for batch in self.batches:
            try:
                got = session.run(batch.feeds)
                meter.update(batch.outputs, got, batch.samples, batch.labels)
            except (ModelError, ValueError) as error:
                return Comparison(fatal=(str(error),))
        return meter.finish()


def make_reference(original: Session, data: Dataset, *, samples: int, batch_size: int) -> Reference:
    """Run the original over the first samples of ``data``.

    Args:
        original: The original.
        data: Samples; their labels are kept.
        samples: Most samples; fewer where they and the outputs take more than 256 MiB.
        batch_size: Samples per run.

    Raises:
        ModelError: If the original does not run.
    """
    batches: list[Batch] = []
    done = size = 0
    for count, feeds in data.take(max(samples, data.layout.group or 1)).counted_batches(batch_size):
        outputs = original.run(feeds)
        labels = None if data.labels is None else np.asarray(data.labels[done : done + count])
        batches.append(Batch(count, feeds, outputs, labels))
        done += count
        size += sum(array.nbytes for array in (*feeds.values(), *outputs.values()))
        if size > _MOST_BYTES:
            break
    return Reference(original.inputs, original.outputs, tuple(batches))


def noise_ratio(comparison: Comparison) -> float:
    """Noise energy over signal energy, summed over the floating-point outputs.

    The unit in which losses of different nodes add up: ``Σ_outputs Σ(y - ŷ)² / Σy²``. Infinite
    where a version does not run or gives values that are not finite; without floating-point
    outputs the share of unequal elements.
    """
    if comparison.fatal:
        return float("inf")
    floats = [o.sqnr_db for o in comparison.outputs if o.is_float and o.sqnr_db is not None]
    if not floats:
        return float(sum(1.0 - o.equal_ratio for o in comparison.outputs))
    return float(sum(10.0 ** (-db / 10.0) for db in floats))


def worst_sqnr_db(comparison: Comparison) -> float:
    """SQNR in dB of the floating-point output that is farthest from the original's.

    ``-inf`` where a version does not run, ``inf`` without such outputs.
    """
    if comparison.fatal:
        return float("-inf")
    return min(
        (o.sqnr_db for o in comparison.outputs if o.is_float and o.sqnr_db is not None),
        default=float("inf"),
    )
