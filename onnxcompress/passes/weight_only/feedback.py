"""What calibration tells about the inputs that meet a weight, for rounding with error feedback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import MomentsRequest, Statistics
from onnxcompress.context import PassContext
from onnxcompress.numerics import signs
from onnxcompress.numerics.blockwise import Blocks, with_feedback
from onnxcompress.numerics.signs import Signs
from onnxcompress.passes._inputs import moment_requests
from onnxcompress.passes.weight_only.select import Weight

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

Stored: TypeAlias = Blocks | Signs
"""A weight as it is stored."""

_BATCH_BYTES = 512 * 2**20
"""Second moments collected in one pass over the data."""


@dataclass(frozen=True, slots=True)
class Fed:
    """A weight and what to measure for it; no requests if it has to be rounded to nearest."""

    weight: Weight
    requests: tuple[MomentsRequest, ...]

    @property
    def bytes(self) -> int:
        """Size of its second moments."""
        return 8 * self.weight.layout.columns**2 * len(self.requests)


def batches(weights: tuple[Weight, ...], model: ir.Model) -> Iterator[list[Fed]]:
    """Weights in groups whose second moments fit into memory together."""
    group: list[Fed] = []
    used = 0
    seen: set[MomentsRequest] = set()
    for weight in weights:
        fed = Fed(weight, _requests(weight, model))
        more = 0 if seen.issuperset(fed.requests) else fed.bytes
        if group and used + more > _BATCH_BYTES:
            yield group
            group, used, seen = [], 0, set()
            more = fed.bytes
        group.append(fed)
        seen.update(fed.requests)
        used += more
    if group:
        yield group


def _requests(weight: Weight, model: ir.Model) -> tuple[MomentsRequest, ...]:
    """One request per use; none unless every use can be measured."""
    if weight.graph is not model.graph:
        return ()
    layout = weight.layout
    return moment_requests(weight.value, layout.columns, len(layout.rows), model)


class Feedback:
    """Second moments of the inputs of a group of weights."""

    def __init__(self, model: ir.Model, group: list[Fed], ctx: PassContext) -> None:
        wanted = dict.fromkeys(r for fed in group for r in fed.requests)
        self._statistics: Statistics | None = None
        if wanted:
            self._statistics = ctx.collect(
                model, wanted, description="measuring the inputs of weights"
            )

    def improve(self, fed: Fed, matrix: Float32, blocks: Stored) -> Stored:
        """Codes rounded with feedback from the inputs of all uses of a weight."""
        if self._statistics is None or not fed.requests:
            return blocks
        results = [self._statistics[request] for request in fed.requests]
        moments = [r.covariance + r.mean[:, :, None] * r.mean[:, None, :] for r in results]
        total = np.sum(moments, axis=0)
        if isinstance(blocks, Signs):
            return _signs_by_group(matrix, blocks, total)
        return _by_group(matrix, blocks, total)


def _by_group(matrix: Float32, blocks: Blocks, moments: Float64) -> Blocks:
    """Each group of a convolution has inputs of its own."""
    rows = len(matrix) // len(moments)
    parts = []
    for g, moment in enumerate(moments):
        own = slice(g * rows, (g + 1) * rows)
        start = Blocks(
            blocks.codes[own], blocks.scale[own], blocks.zero[own], blocks.bits, blocks.columns
        )
        parts.append(with_feedback(matrix[own], start, moment).codes)
    return Blocks(np.concatenate(parts), blocks.scale, blocks.zero, blocks.bits, blocks.columns)


def _signs_by_group(matrix: Float32, start: Signs, moments: Float64) -> Signs:
    """The same for binary and ternary weights."""
    rows = len(matrix) // len(moments)
    return signs.joined(
        [
            signs.with_feedback(matrix[own], start.rows(own), moment)
            for g, moment in enumerate(moments)
            for own in [slice(g * rows, (g + 1) * rows)]
        ]
    )
