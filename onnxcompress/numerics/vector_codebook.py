"""Product codebooks: runs of neighbouring weights stored as one index into a table of vectors.

The rows of ``W`` [R, D] are cut into runs of ``d`` weights, and each run, divided by the scale of
its row, is replaced by one of ``k`` vectors ``t`` of a table,

    ŵ_{r, jd:(j+1)d} = s_r · t_{q_rj}

which takes ``log₂ k / d`` bits per weight and follows the joint distribution of neighbours. The
table comes from weighted k-means (seeded far apart); codes are assigned with error feedback, run by
run: what a run gets wrong moves the weights after it.

Source: Jégou, Douze and Schmid 2011, "Product quantization for nearest neighbor search"; Arthur and
Vassilvitskii 2007, "k-means++"; van Baalen et al. 2024, "GPTVQ: the blessing of dimensionality for
LLM quantization".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.codebook import Codes, Float32
from onnxcompress.numerics.feedback import Factor, FloatArray, InputMoments, output_error

_ROUNDS = 12
_SAMPLE = 65_536
"""Runs that the table is fitted to, at most."""
_PANEL = 8_192
"""Runs compared with the table at a time."""
_DAMP = 0.01


@dataclass(frozen=True, slots=True)
class VectorCoded:
    """Codes of runs of ``d`` weights, and the table they stand for.

    Attributes:
        codes: [R, D / d].
        table: [k, d].
        scale: One factor per row, [R]; None where it is 1.
    """

    codes: Codes
    table: Float32
    scale: Float32 | None

    def decoded(self) -> Float32:
        """``Ŵ``, [R, D], in the float32 arithmetic that onnxruntime uses at load."""
        values = self.table[self.codes].reshape(len(self.codes), -1)
        return values if self.scale is None else values * self.scale[:, None]

    def error(self, weight: FloatArray, moments: InputMoments | None) -> FloatArray:
        """The output error of each row, [R]."""
        return output_error(weight - self.decoded(), moments)


def divisor(columns: int, wanted: int) -> int:
    """The longest run, up to ``wanted``, that ``columns`` is a multiple of."""
    return max(d for d in range(1, wanted + 1) if columns % d == 0)


def fit(
    weight: Float32,
    moments: InputMoments | None,
    *,
    bits: int,
    length: int,
    scales: bool = True,
    seed: int = 0,
) -> VectorCoded:
    """Fit a table to the runs of a matrix.

    At most ``2^bits`` different runs are reproduced exactly.

    Args:
        weight: ``W``, finite, [R, D].
        moments: ``H``; None for the identity, and nearest vectors.
        bits: Bits of a code, up to 8.
        length: ``d``, a divisor of D.
        scales: Whether rows have a scale of their own.
        seed: Seed of the start of k-means.

    Returns:
        The best of what was tried in the H-norm.
    """
    rows, columns = weight.shape
    runs = weight.reshape(rows, columns // length, length)
    distinct, codes = np.unique(runs.reshape(-1, length), axis=0, return_inverse=True)
    if len(distinct) <= 1 << bits:
        found = codes.reshape(rows, -1).astype(np.uint8)
        return VectorCoded(found, distinct.astype(np.float32), None)
    exact = weight.astype(np.float64)
    scale = None
    if scales:
        spread = np.sqrt(np.mean(exact**2, axis=1))
        scale = np.where(spread > 0, spread, 1.0).astype(np.float32)
    factors = np.ones(rows) if scale is None else scale.astype(np.float64)
    variance = np.ones_like(exact) if moments is None else moments.diagonal()
    importance = (factors[:, None] ** 2 * variance).reshape(-1, length)
    relative = (exact / factors[:, None]).reshape(-1, length)
    table = _table(relative, importance, min(1 << bits, len(distinct)), seed)
    start = _nearest(relative, importance, table).reshape(rows, -1).astype(np.uint8)
    best = VectorCoded(start, table.astype(np.float32), scale)
    if moments is None:
        return best
    inputs = moments.damped(_DAMP)
    fed = _with_feedback(exact, best, moments)
    wins = fed.error(exact, inputs) < best.error(exact, inputs)
    best = dataclasses.replace(best, codes=np.where(wins[:, None], fed.codes, best.codes))
    # A table that weighs all inputs alike may turn out the better one, as k-means starts at random.
    plain = fit(weight, None, bits=bits, length=length, scales=scales, seed=seed)
    tried = (best, _refit_scale(exact, best, inputs), plain)
    return min(tried, key=lambda coded: float(coded.error(exact, inputs).sum()))


def _table(values: FloatArray, weights: FloatArray, count: int, seed: int) -> FloatArray:
    """k-means of ``values`` [N, d] under ``weights`` [N, d], [count, d]."""
    rng = np.random.default_rng(seed)
    if len(values) > _SAMPLE:
        picked = rng.choice(len(values), _SAMPLE, replace=False)
        values, weights = values[picked], weights[picked]
    table = np.empty((count, values.shape[1]))
    distance = np.full(len(values), np.inf)
    place = int(rng.integers(len(values)))
    for k in range(count):  # k-means++: the next one with probability ~ squared distance
        table[k] = values[place]
        distance = np.minimum(distance, (weights * (values - table[k]) ** 2).sum(axis=1))
        total = float(distance.sum())
        if total <= 0:
            table[k:] = table[k]
            break
        place = int(np.searchsorted(np.cumsum(distance), rng.random() * total))
        place = min(place, len(values) - 1)
    for _ in range(_ROUNDS):
        codes = _nearest(values, weights, table)
        moved = table.copy()
        for axis in range(values.shape[1]):
            mass = np.bincount(codes, weights[:, axis], minlength=count)
            sums = np.bincount(codes, weights[:, axis] * values[:, axis], minlength=count)
            moved[:, axis] = np.where(mass > 0, sums / np.where(mass > 0, mass, 1), table[:, axis])
        if np.allclose(moved, table, rtol=1e-6, atol=0):
            break
        table = moved
    return table


def _nearest(values: FloatArray, weights: FloatArray, table: FloatArray) -> npt.NDArray[np.int64]:
    """The vector of least ``Σ w (v - t)²`` for each run, [N]; without the term ``Σ w v²``."""
    codes = np.empty(len(values), np.int64)
    for start in range(0, len(values), _PANEL):
        own = slice(start, start + _PANEL)
        cost = weights[own] @ (table**2).T - 2 * (weights[own] * values[own]) @ table.T
        codes[own] = cost.argmin(axis=1)
    return codes


def _with_feedback(weight: FloatArray, start: VectorCoded, moments: InputMoments) -> VectorCoded:
    """Codes run by run, each run's error spread over the columns after it.

    Within a run ``H`` is taken as diagonal; the runs keep their order, by falling ``H``.
    """
    length = start.table.shape[1]
    table = start.table.astype(np.float64)
    factors = np.ones(len(weight)) if start.scale is None else start.scale.astype(np.float64)
    codes = start.codes.copy()
    for rows, moment in moments.parts():
        variance = np.maximum(moment.diagonal(), 0).reshape(-1, length)
        order = np.argsort(-variance.sum(axis=1), kind="stable")
        columns = (order[:, None] * length + np.arange(length)).ravel()
        factor = Factor.of(moment, damp=_DAMP, order=columns)
        if factor is None:
            continue
        own, found = factors[rows][:, None], codes[rows]
        floor = 1e-12 * float(variance.mean())

        def project(
            places: npt.NDArray[np.int64],
            left: FloatArray,
            own: FloatArray = own,
            found: Codes = found,
            variance: FloatArray = variance,
            floor: float = floor,
        ) -> FloatArray:
            run = int(places[0]) // length
            weights = np.broadcast_to(variance[run] + floor, left.shape)
            picked = _nearest(left / own, weights, table)
            found[:, run] = picked
            return table[picked] * own

        factor.replace(weight[rows], project, width=length)
    return dataclasses.replace(start, codes=codes)


def _refit_scale(weight: FloatArray, start: VectorCoded, moments: InputMoments) -> VectorCoded:
    """The scales of least error for the codes."""
    if start.scale is None:
        return start
    values = dataclasses.replace(start, scale=None).decoded().astype(np.float64)
    product = moments.times(values)
    power = np.einsum("rd,rd->r", product, values)
    match = np.einsum("rd,rd->r", product, weight)
    good = (power > 0) & (match > 0)
    scale = np.where(good, match / np.where(good, power, 1), start.scale)
    return dataclasses.replace(start, scale=scale.astype(np.float32))
