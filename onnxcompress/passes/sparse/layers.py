"""The weights to thin out, and what each entry of theirs is worth."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.numerics import sparsity
from onnxcompress.passes._layers import Layer
from onnxcompress.passes._weights import Chosen, choose_weights
from onnxcompress.passes.sparse.options import Importance, SparseOptions

Float64 = npt.NDArray[np.float64]


def choose(model: ir.Model, options: SparseOptions) -> Chosen[Layer]:
    """The weights of ``model`` that can be thinned out.

    Raises:
        UsageError: If a pattern matches no weight.
    """

    def plan(value: ir.Value, graph: ir.Graph) -> Layer | str:
        layer = Layer.of(value, graph, model)
        if isinstance(layer, Layer) and any(u.op_type == "Gather" for u, _ in value.uses()):
            return "it is an embedding table, whose rows are looked up one by one"
        return layer

    return choose_weights(
        model,
        plan,
        owner="sparse",
        include=options.include,
        exclude=options.exclude,
        min_elements=options.min_elements,
    )


def scores(
    layer: Layer, weight: Float64, moments: Float64 | None, importance: Importance, seed: int
) -> Float64:
    """What each weight of a layer is worth: expected squared error relative to the output's energy.

    Without moments, inputs count as uncorrelated and equally large.

    Args:
        layer: The layer.
        weight: ``W``, [O, D].
        moments: ``H``, [G, D, D], or None.
        importance: What to rank by.
        seed: Seed of random scores.

    Returns:
        [O, D].
    """
    if importance is Importance.RANDOM:
        rng = np.random.default_rng((seed, zlib.crc32(layer.name.encode())))
        return np.asarray(rng.random(weight.shape))
    if moments is None or importance is Importance.MAGNITUDE:
        energy = float((weight**2).sum())
        return weight**2 / energy if energy else weight**2
    parts = []
    energy = 0.0
    for part, matrix in zip(np.split(weight, len(moments)), moments, strict=True):
        damped = sparsity.damped(matrix, 0.01)
        energy += float(np.einsum("od,de,oe->", part, matrix, part, optimize=True))
        if damped is None:
            parts.append(np.zeros_like(part))
        elif importance is Importance.ACTIVATION:
            parts.append(part**2 * matrix.diagonal())
        else:
            parts.append(sparsity.obs_scores(part, damped))
    found = np.concatenate(parts)
    return found / energy if energy else found
