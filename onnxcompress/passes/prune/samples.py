"""Which calibration samples are fitted to, and which are kept back to judge by."""

from __future__ import annotations

from onnxcompress.calibration.dataset import Dataset

EVERY = 4
"""One sample in so many is kept back, at even distances: a set may be sorted by class."""
MIN_SAMPLES = 8
"""With fewer samples nothing is kept back."""


def split(data: Dataset) -> tuple[Dataset, Dataset | None]:
    """Samples to fit on, and samples to judge by (None if there are too few to divide)."""
    if data.sample_count < max(MIN_SAMPLES, EVERY * (data.layout.group or 1)):
        return data, None
    return data.divide(EVERY)
