"""Divide work into batches whose statistics fit into memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def batches_within(
    items: Iterable[_T], size_bytes: Callable[[_T], int], limit_bytes: int
) -> Iterator[list[_T]]:
    """Consecutive items of at most ``limit_bytes`` together; one that is larger stands alone.

    Args:
        items: What to divide.
        size_bytes: Memory that an item takes.
        limit_bytes: Memory of a batch.
    """
    batch: list[_T] = []
    used = 0
    for item in items:
        size = size_bytes(item)
        if batch and used + size > limit_bytes:
            yield batch
            batch, used = [], 0
        batch.append(item)
        used += size
    if batch:
        yield batch
