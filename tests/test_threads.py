"""What runs side by side while passes run: work on many items, numpy's linear algebra."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from onnxcompress._threads import WIDE, linear_algebra, side_by_side


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


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order_and_few_items_are_taken_ahead(workers: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    with side_by_side(workers) as each:
        for number, square in enumerate(each(lambda n: n * n, items())):
            assert square == number**2
            assert len(taken) <= number + workers + 1
        with pytest.raises(ZeroDivisionError):
            list(each(lambda n: 1 / n, [1, 0]))
