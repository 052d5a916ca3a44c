"""Batches hold what fits, in order, and nothing is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.passes._batches import batches_within


@given(sizes=st.lists(st.integers(0, 20)), limit=st.integers(1, 30))
def test_batches_are_whole_ordered_and_bounded(sizes: list[int], limit: int) -> None:
    batches = list(batches_within(sizes, lambda size: size, limit))
    assert [size for batch in batches for size in batch] == sizes
    assert all(sum(batch) <= limit or len(batch) == 1 for batch in batches if max(batch) > limit)
    assert all(sum(batch) <= limit for batch in batches if max(batch) <= limit)
