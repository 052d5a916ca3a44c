"""Union-find against a plain graph search."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.graph.unions import Unions


@given(
    edges=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60),
)
def test_components_are_those_of_the_graph(edges: list[tuple[int, int]]) -> None:
    unions = Unions()
    unions.fresh(30)
    for left, right in edges:
        unions.tie(np.array([left]), np.array([right]))
    roots = unions.solve()
    neighbours: dict[int, set[int]] = {i: {i} for i in range(30)}
    for left, right in edges:
        neighbours[left].add(right)
        neighbours[right].add(left)
    for start in range(30):
        reached, waiting = {start}, [start]
        while waiting:
            new = neighbours[waiting.pop()] - reached
            reached |= new
            waiting += new
        assert roots[start] == min(reached)


def test_long_chain_and_broadcast() -> None:
    unions = Unions()
    chain = unions.fresh(100_000)
    unions.tie(chain[1:], chain[:-1])
    others = unions.fresh(12).reshape(3, 4)
    unions.tie(others, others[:, :1])
    roots = unions.solve()
    assert not roots[:100_000].any()
    np.testing.assert_array_equal(np.unique(roots[100_000:]) - 100_000, [0, 4, 8])
