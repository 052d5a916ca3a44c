"""How many samples the steps of quantization look at: fewer where one sample is much work.

Counted in multiply-accumulates of the float model, never in seconds, so that results are the same
on every machine and with any number of processes. Up to about a billion multiply-accumulates per
sample nothing is cut.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.context import PassContext
from onnxcompress.graph.cost import cost_of

_FEW = 16
"""Enough to compare two versions of a model, or to see that a node fails. Scales chosen on 32 cost
3 dB on an image classifier."""

_FEW_MACS = 2e10

_BIAS = 48
"""Enough to correct biases: the mean of the errors of so many samples is off by a seventh of their
deviation at most, which adds 0.09 dB to the noise. Three batches of the correction."""

_BIAS_MACS = 5e10

_LEAST = 4
"""Fewer samples say nothing, however much work each is."""

_MIX_MACS = 6e11
"""Most multiply-accumulates of all mixes of precisions tried: about a minute on one core."""

_MIXES = 24
"""Mixes that a search usually tries: so many should fit."""

_LEAST_MIXES = 4


def macs_of(model: ir.Model, data: Dataset | None) -> int:
    """Multiply-accumulates of ``model`` for one sample of ``data``, at least 1."""
    if data is None:
        return 1
    shapes = {name: array.shape for name, array in data.first().items()}
    return max(cost_of(model, shapes).macs // (data.layout.group or 1), 1)


def samples_for(most: int, work: float, macs: int) -> int:
    """As many samples as ``work`` multiply-accumulates allow: at most ``most``, at least 4."""
    return max(min(_LEAST, most), min(most, int(work / max(macs, 1))))


def few_samples(ctx: PassContext, macs: int = 1) -> PassContext:
    """The job with fewer samples, to compare versions; scales need them all.

    Args:
        ctx: The job.
        macs: Multiply-accumulates of one sample.
    """
    return _at_most(ctx, samples_for(_FEW, _FEW_MACS, macs))


def bias_samples(ctx: PassContext, macs: int = 1) -> PassContext:
    """The job with as many samples as means need: what biases lack."""
    return _at_most(ctx, samples_for(_BIAS, _BIAS_MACS, macs))


def parted_samples(ctx: PassContext, macs: int = 1) -> tuple[PassContext, PassContext, float]:
    """A few samples, those that means need besides, and what share of all of these the latter are.

    The share is 0 where the few are all there are, and 1 where the second part holds the few, too,
    as it does where data come in batches of a fixed size.
    """
    few, enough = few_samples(ctx, macs), bias_samples(ctx, macs)
    if few.calibration is None or enough.calibration is None or few is ctx:
        return few, few, 0.0
    count, most = few.calibration.sample_count, enough.calibration.sample_count
    if most % count or most < 2 * count or enough.calibration.layout.group is not None:
        return few, enough, 1.0
    rest, apart = enough.calibration.divide(most // count, 0)  # the few
    return replace(ctx, calibration=apart), replace(ctx, calibration=rest), 1.0 - count / most


def _at_most(ctx: PassContext, samples: int) -> PassContext:
    group = 1 if ctx.calibration is None else ctx.calibration.layout.group or 1
    return ctx.at_most(max(samples, group))


def mix_bounds(macs: int, available: int) -> tuple[int, int]:
    """Samples to measure a mix of precisions on, and how many mixes to try at most.

    Args:
        macs: Multiply-accumulates of one sample.
        available: Samples that there are.
    """
    samples = samples_for(available, _MIX_MACS / _MIXES, macs)
    return samples, max(_LEAST_MIXES, int(_MIX_MACS / (samples * macs)))
