from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.numerics.blockwise import (
    Blocks,
    balanced,
    fitted,
    nearest,
    output_error,
    pack,
    split,
    unpack,
    with_feedback,
)

Float32 = npt.NDArray[np.float32]

MATRICES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 50)),
    elements=st.floats(-100, 100, width=32),
)
BITS = st.sampled_from([4, 8])


def sqnr_db(matrix: Float32, blocks: Blocks) -> float:
    noise = np.square(matrix - blocks.dequantized(), dtype=np.float64).sum()
    return float(10 * np.log10(np.square(matrix, dtype=np.float64).sum() / noise))


def block_errors(matrix: Float32, blocks: Blocks) -> Float32:
    delta = split(matrix - blocks.dequantized(), blocks.block)
    return np.asarray(np.square(delta).sum(-1))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 33))), st.sampled_from([4, 8])
)
def test_packing_and_back(codes: npt.NDArray[np.uint8], bits: int) -> None:
    codes = codes & np.uint8((1 << bits) - 1)
    packed = pack(codes, bits)
    assert packed.shape[-1] == -(-codes.shape[-1] * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, codes.shape[-1]), codes)


def test_the_first_code_is_in_the_low_half_of_the_byte() -> None:
    assert pack(np.array([1, 2, 15], np.uint8), 4).tolist() == [0x21, 0x0F]


@given(st.integers(1, 5000), st.integers(0, 300))
def test_balanced_blocks_waste_less_than_one_weight_each(columns: int, wanted: int) -> None:
    block = balanced(columns, wanted)
    count = -(-columns // block)
    assert block <= (wanted or columns)
    assert count == (-(-columns // wanted) if wanted else 1)
    assert count * block - columns < count


@settings(max_examples=80, deadline=None)
@given(MATRICES, BITS, st.sampled_from([1, 4, 16, 32]), st.booleans())
def test_nearest_is_within_half_a_step(
    matrix: Float32, bits: int, block: int, symmetric: bool
) -> None:
    blocks = nearest(matrix, bits=bits, block=block, symmetric=symmetric)
    error = np.abs(split(matrix, block) - split(blocks.dequantized(), block))
    bound = np.abs(blocks.scale[..., None]) * 0.5 * (1 + 1e-5)
    # A product of float32 numbers up to 100 is off by less than this.
    assert (error <= bound + 1e-4).all()
    assert int(blocks.codes.max()) < 1 << bits


@settings(max_examples=60, deadline=None)
@given(MATRICES, BITS, st.sampled_from([4, 16, 32]), st.booleans(), st.booleans())
def test_fitted_is_never_worse_than_nearest(
    matrix: Float32, bits: int, block: int, symmetric: bool, negative: bool
) -> None:
    plain = nearest(matrix, bits=bits, block=block, symmetric=symmetric)
    best = fitted(matrix, bits=bits, block=block, symmetric=symmetric, negative=negative)
    before, after = block_errors(matrix, plain), block_errors(matrix, best)
    assert (after <= before * (1 + 1e-3) + 1e-5).all()
    assert (best.scale != 0).all()
    if not negative:
        assert (best.scale > 0).all()
    if symmetric:
        assert (best.zero == 1 << (bits - 1)).all()


@settings(max_examples=30, deadline=None)
@given(MATRICES, BITS, st.sampled_from([4, 16]), st.booleans())
def test_zeros_and_filling_are_exact(
    matrix: Float32, bits: int, block: int, symmetric: bool
) -> None:
    matrix = np.where(np.arange(matrix.shape[1]) % 2, matrix, 0).astype(np.float32)
    for blocks in (
        nearest(matrix, bits=bits, block=block, symmetric=symmetric),
        fitted(matrix, bits=bits, block=block, symmetric=symmetric),
    ):
        assert (blocks.dequantized()[matrix == 0] == 0).all()
        filling = blocks.codes.reshape(len(matrix), -1)[:, matrix.shape[1] :]
        last = np.broadcast_to(blocks.zero[:, -1:], filling.shape)
        np.testing.assert_array_equal(filling, last)


@pytest.mark.parametrize(
    ("symmetric", "plain_db", "best_db"), [(True, 20.2, 21.7), (False, 21.8, 22.1)]
)
def test_search_gains_on_normal_weights(symmetric: bool, plain_db: float, best_db: float) -> None:
    weights = np.random.default_rng(0).normal(0, 0.05, (200, 384)).astype(np.float32)
    plain = nearest(weights, bits=4, block=32, symmetric=symmetric)
    best = fitted(weights, bits=4, block=32, symmetric=symmetric)
    assert sqnr_db(weights, plain) == pytest.approx(plain_db, abs=0.2)
    assert sqnr_db(weights, best) == pytest.approx(best_db, abs=0.2)


def test_many_rows_are_treated_in_parts_with_the_same_result() -> None:
    weights = np.random.default_rng(1).normal(0, 1, (9, 1 << 19)).astype(np.float32)
    whole = fitted(weights, bits=8, block=1 << 19, symmetric=True)
    alone = fitted(weights[8:], bits=8, block=1 << 19, symmetric=True)
    np.testing.assert_array_equal(whole.codes[8:], alone.codes)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([7, 16, 70]), st.booleans())
def test_feedback_never_raises_the_error_of_a_row(seed: int, size: int, symmetric: bool) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 1, (6, size)).astype(np.float32)
    data = rng.normal(0, 1, (200, 3)) @ rng.normal(0, 1, (3, size))
    data += 0.1 * rng.normal(0, 1, data.shape) + 0.3
    moment = data.T @ data / len(data)
    start = fitted(weights, bits=4, block=16, symmetric=symmetric)
    fed = with_feedback(weights, start, moment)
    before, after = output_error(weights, start, moment), output_error(weights, fed, moment)
    assert (after <= before).all()
    # Inputs of rank 3 leave almost everything to be made up for.
    if size > 7:
        assert after.sum() < 0.5 * before.sum()
    np.testing.assert_array_equal(fed.scale, start.scale)


def test_feedback_without_inputs_changes_nothing() -> None:
    start = nearest(np.ones((2, 4), np.float32), bits=4, block=4, symmetric=True)
    assert with_feedback(np.ones((2, 4), np.float32), start, np.zeros((4, 4))) is start
