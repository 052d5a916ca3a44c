"""Random layers for tests of rounding."""

from __future__ import annotations

import numpy as np

from onnxcompress.numerics.rounding import FloatArray


def random_layer(seed: int, outputs: int, size: int, groups: int) -> tuple[FloatArray, FloatArray]:
    """Weights [outputs groups, size] and second moments of their inputs [groups, size, size]."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(groups, size, size)) * rng.lognormal(size=(groups, 1, size))
    return rng.normal(size=(outputs * groups, size)), mix.transpose(0, 2, 1) @ mix / size
