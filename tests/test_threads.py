"""Threads of numpy's linear algebra while passes run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from onnxcompress._threads import WIDE, linear_algebra


def model(*shapes: tuple[int, ...]) -> ir.Model:
    made = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> m (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    for i, shape in enumerate(shapes):
        name = f"w{i}"
        data = np.broadcast_to(np.float32(0), shape)
        value = ir.Value(name=name, const_value=ir.Tensor(data, name=name))
        made.graph.initializers[name] = value
    return made


def threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize(
    ("shapes", "given", "wanted"),
    [
        ((), None, 1),
        (((64, 64, 3, 3), (10, 64)), None, 1),
        (((50_000, 384),), None, 1),  # an embedding: what is factorized is 384 wide
        (((WIDE + 1, WIDE + 1),), None, 3),
        (((64, WIDE, 3, 3),), None, 3),
        (((64, WIDE, 3, 3),), 2, 2),
    ],
)
def test_only_wide_layers_get_threads(
    shapes: tuple[tuple[int, ...], ...], given: int | None, wanted: int
) -> None:
    with threadpool_limits(limits=3, user_api="blas"):
        before = threads()
        if not before or before == {1}:
            pytest.skip("this numpy has no threads to limit")
        with linear_algebra(model(*shapes), given):
            assert threads() == {wanted}
        assert threads() == before
