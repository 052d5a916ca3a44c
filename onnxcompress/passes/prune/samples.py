"""Which samples are fitted to, which are kept back to judge by, and how many of them."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.passes.quant.samples import macs_of, samples_for

EVERY = 4
"""One sample in so many is kept back, at even distances: a set may be sorted by class."""
MIN_SAMPLES = 8
"""With fewer samples nothing is kept back."""


def split(data: Dataset, place: int = -1) -> tuple[Dataset, Dataset | None]:
    """Samples to fit on, and samples to judge by (None if there are too few to divide).

    Args:
        data: The samples.
        place: Which one of each :data:`EVERY` judges; the last one by default.
    """
    if data.sample_count < max(MIN_SAMPLES, EVERY * (data.layout.group or 1)):
        return data, None
    return data.divide(EVERY, place)


_WORK = 1e12
"""Multiply-accumulates of all measurements of single layers: about half a minute on one core."""
_CONTEST_SAMPLES = 256
"""Samples that plans are refitted with, to be compared."""
_FEWER_SAMPLES = 64
"""What is done with before plans are compared that are too few to learn from."""
_LEARNING_PLANS = 12
_CONTEST_PLANS = 4
"""Plans that are compared however much work that is."""


def judging_samples(model: ir.Model, data: Dataset, most: int, layers: int) -> int:
    """Samples to measure what a change of each of ``layers`` layers does to the outputs.

    Args:
        model: The model; half of it runs for one layer, on average.
        data: The samples.
        most: How many are enough.
        layers: How many layers are measured.
    """
    return samples_for(most, _WORK, max(layers, 1) * max(macs_of(model, data) // 2, 1))


def judging_note(what: str, samples: int, most: int) -> tuple[str, ...]:
    """A note where fewer samples than usual judged."""
    if samples >= most:
        return ()
    return (
        f"{what} were measured on {samples} samples instead of {most}, since a run of this model "
        "is much work.",
    )


def contest_size(model: ir.Model, data: Dataset, plans: int) -> tuple[int, int]:
    """Plans to compare, and samples to refit and judge each with: less where runs are much work.

    Args:
        model: The model; it runs beside the original.
        data: The samples.
        plans: How many plans are wanted.
    """
    macs = 2 * macs_of(model, data)
    least = min(plans, _CONTEST_PLANS)
    samples = max(
        samples_for(_CONTEST_SAMPLES, _WORK, min(plans, _LEARNING_PLANS) * macs),
        samples_for(_FEWER_SAMPLES, _WORK, least * macs),
    )
    return max(least, min(plans, int(_WORK / (macs * samples)))), samples
