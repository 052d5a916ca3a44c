"""How many cores there are, and what runs on them side by side while passes run."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from onnxcompress._serialize import initializers

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

WIDE = 2048
"""Inputs or outputs of a layer from which on its factorizations are worth several threads."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Each(Protocol):
    """As :func:`map`: does something to each item, perhaps side by side."""

    def __call__(
        self, function: Callable[[_Item], _Result], items: Iterable[_Item], /
    ) -> Iterator[_Result]:
        """The results, in the order of the items."""
        ...


@contextmanager
def side_by_side(workers: int) -> Iterator[Each]:
    """A :func:`map` that does ``workers`` things at a time, or :func:`map` itself for one.

    Items are taken as the work on those before them comes to an end, by the thread that asks for
    results: few are held at a time. The function must not use the same map.
    """
    if workers < 2:
        yield map
        return
    with ThreadPoolExecutor(workers) as pool:

        def each(
            function: Callable[[_Item], _Result], items: Iterable[_Item], /
        ) -> Iterator[_Result]:
            running: deque[Future[_Result]] = deque()
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

        yield each


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
