"""Which calibration samples are fitted to, and which are kept back to judge by."""

from __future__ import annotations

from onnxcompress.calibration.dataset import Dataset

HELD_OUT = 0.25
"""Share of the samples kept back."""
MIN_SAMPLES = 8
"""With fewer samples nothing is kept back."""


def split(data: Dataset) -> tuple[Dataset, Dataset | None]:
    """Samples to fit on, and samples to judge by (None if there are too few to divide)."""
    held_out = round(data.sample_count * HELD_OUT)
    first = data.sample_count - held_out
    if data.sample_count < MIN_SAMPLES or min(first, held_out) < (data.layout.group or 1):
        return data, None
    return data.take(first), data.skip(first)
