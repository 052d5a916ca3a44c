"""What calibration tells about the inputs of a layer, as second moments for truncation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import AxisUnfold, MomentsRequest, MomentsResult
from onnxcompress.context import PassContext
from onnxcompress.numerics.least_squares import approximated
from onnxcompress.numerics.low_rank import Metric, Spectrum
from onnxcompress.passes._batches import batches_within
from onnxcompress.passes.prune.score import row_limit
from onnxcompress.passes.svd.sites import Kind, Site

Array = npt.NDArray[np.float64]

_BYTES = 1 << 30
"""Second moments and their factorizations held at a time."""
_COPIES = 4
"""Matrices of the size of the moment that a spectrum of a convolution holds."""
_UNSEEN = 0.5
"""Share of an embedding's moment that comes from the whole table, seen in calibration or not."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known about one layer.

    Attributes:
        spectra: What ranks cost it, one per batch entry.
        mean: Mean of its inputs [D], or of its outputs [O] if these were measured; None without
            data.
    """

    spectra: list[Spectrum]
    mean: Array | None = None


def request_of(site: Site) -> MomentsRequest:
    """The moments that whiten a layer."""
    if site.measured_at_output:
        value = site.data if site.kind is Kind.EMBEDDING else site.output
        axis = -1 if site.kind is Kind.EMBEDDING else site.target_axis
        return MomentsRequest(value, AxisUnfold(axis), row_limit(site.kernel.outputs))
    return MomentsRequest(site.data, site.unfold, row_limit(site.kernel.width))


def batches(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites whose moments fit into memory together."""

    def size_bytes(site: Site) -> int:
        side = site.kernel.outputs if site.measured_at_output else site.kernel.width
        return 8 * side**2 * (_COPIES if len(site.kernel.forms) > 1 else 2)

    return batches_within(sites, size_bytes, _BYTES)


def whitened(
    model: ir.Model,
    sites: Sequence[Site],
    ctx: PassContext,
    metrics: Mapping[Site, Metric],
    description: str,
) -> Iterator[tuple[Site, Measured]]:
    """Spectra of layers for the inputs seen in calibration.

    Args:
        model: The model.
        sites: The layers.
        ctx: The job; it has calibration data.
        metrics: How errors of their outputs count, where that is known.
        description: What to call the work.
    """
    requests = {site: request_of(site) for site in sites}
    found = ctx.collect(model, requests.values(), description=description)
    for site in sites:
        result, metric = found[requests[site]], metrics.get(site)
        if site.measured_at_output:
            matrix = site.matrices(model)[0]
            moment = _output_moment(site, matrix, result)
            spectra = [Spectrum(matrix, site.kernel, outputs=moment, metric=metric)]
        else:
            moment = moment_of(site, result)
            spectra = [
                Spectrum(w, site.kernel, moment, metric=metric) for w in site.matrices(model)
            ]
        yield site, Measured(spectra, result.mean[0])


def plain(model: ir.Model, site: Site) -> Measured:
    """Spectra of a layer from its weights alone."""
    spectra = []
    for matrix in site.matrices(model):
        own = None
        if site.kind is Kind.EMBEDDING:
            own = np.asarray(matrix @ matrix.T, np.float64)
        spectra.append(Spectrum(matrix, site.kernel, outputs=own))
    return Measured(spectra)


def moment_of(site: Site, result: MomentsResult) -> Array:
    """The covariance where a bias can take up the mean, else the moment about 0."""
    covariance = approximated(result.covariance[0], result.count)
    if site.takes_bias:
        return covariance
    return np.asarray(covariance + np.outer(result.mean[0], result.mean[0]), np.float64)


def _output_moment(site: Site, matrix: Array, result: MomentsResult) -> Array:
    seen = result.covariance[0]
    if not site.takes_bias:
        seen = seen + np.outer(result.mean[0], result.mean[0])
    if site.kind is not Kind.EMBEDDING:
        return np.asarray(seen, np.float64)
    table = np.asarray(matrix @ matrix.T, np.float64)
    share = _UNSEEN * max(float(np.trace(seen)), 1e-300) / max(float(np.trace(table)), 1e-300)
    return np.asarray((1 - _UNSEEN) * seen + share * table, np.float64)
