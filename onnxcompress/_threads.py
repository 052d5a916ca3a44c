"""How many cores there are, and how many threads numpy's linear algebra uses while passes run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from onnxcompress._serialize import initializers

WIDE = 2048
"""Inputs or outputs of a layer from which on its factorizations are worth several threads."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def linear_algebra(model: ir.Model, threads: int | None = None) -> Iterator[None]:
    """Run matrix products and factorizations on one thread unless ``model`` has wide layers.

    OpenBLAS keeps its threads in step by spinning. On a machine that does anything else, or in a
    container that gets less than its cores, a Cholesky factor of 144 x 144 takes 125 ms on two
    threads and 0.7 ms on one; of 576 x 576 it takes 11 times the processor time. On an idle machine
    threads gain little at such sizes.

    Args:
        model: What passes will run on.
        threads: Most threads that the user wants; None for all cores.
    """
    limit = threads if _width(model) > WIDE else 1
    with threadpool_limits(limits=limit, user_api="blas"):
        yield


def _width(model: ir.Model) -> int:
    """The longer side of the largest weight as a matrix [outputs, inputs]."""
    most = 0
    for value in initializers(model):
        shape = () if value.const_value is None else tuple(value.const_value.shape.numpy())
        if len(shape) == 2:
            # Tables of embeddings have many rows; what is factorized is no longer than they wide.
            most = max(most, min(shape))
        elif len(shape) > 2:
            most = max(most, shape[0], math.prod(shape[1:]))
    return most
