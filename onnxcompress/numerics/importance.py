"""How much a unit matters, judged from its weights or from its weights and its activations.

All functions take the weights of the units as rows, ``[units, n]``, and give one score per unit,
float64; small scores go first. Scores of several layers that share their units are added after
:func:`normalized`. The criterion that looks at what the other units could make up for is
:func:`onnxcompress.numerics.least_squares.eliminate`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def magnitude(rows: Array, order: int = 2) -> Array:
    """The norm of each unit's weights: ``‖w_u‖₁`` or ``‖w_u‖₂``.

    Args:
        rows: Weights, [units, n].
        order: 1 or 2.

    Source: Li et al. 2017, "Pruning filters for efficient ConvNets".
    """
    return np.asarray(np.linalg.norm(rows, ord=order, axis=1), np.float64)


def geometric_median(rows: Array) -> Array:
    """How far a unit stands from all others: ``Σ_v ‖w_u - w_v‖₂``.

    The unit nearest to the geometric median of all is the one that the others replace best.

    Args:
        rows: Weights, [units, n].

    Source: He et al. 2019, "Filter pruning via geometric median".
    """
    centred = rows - rows.mean(axis=0)  # distances do not change, cancellation does
    squares = np.einsum("un,un->u", centred, centred)
    distances = squares[:, None] + squares[None, :] - 2 * centred @ centred.T
    np.fill_diagonal(distances, 0.0)
    return np.asarray(np.sqrt(np.maximum(distances, 0.0)).sum(axis=1))


def activation_weighted(rows: Array, energy: Array) -> Array:
    """Weights times the strength of the inputs they see: ``√(Σ_i w_{u,i}² E[x_i²])``.

    Args:
        rows: Weights of the consumer that read unit u, [units, n].
        energy: ``E[x²]`` of the input that each weight multiplies, [units, n] or broadcastable to
            it.

    Source: Sun et al. 2024, "A simple and effective pruning approach for large language models"
    (Wanda).
    """
    return np.asarray(np.sqrt((rows**2 * energy).sum(axis=1)))


def random(units: int, seed: int) -> Array:
    """A seeded random score per unit, uniform in [0, 1): the yardstick any criterion has to beat.

    Args:
        units: Number of units.
        seed: Same seed, same scores.
    """
    return np.random.default_rng(seed).random(units)


def normalized(scores: Array) -> Array:
    """Scores divided by their mean, so that layers can be compared (all zeros stay zeros).

    Source: the layer-wise mean normalization of Fang et al. 2023, "DepGraph: towards any structural
    pruning".
    """
    mean = float(scores.mean())
    return scores / mean if mean > 0 else scores
