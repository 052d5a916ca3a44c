"""Invented samples must make the model run."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.calibration.sources import synthetic_dataset
from onnxcompress.errors import DataError
from tests.calibration.builders import Array, parse, run


def _table(rows: int) -> Array:
    return np.random.default_rng(0).standard_normal((rows, 3)).astype(np.float32)


def test_indices_stay_within_their_table() -> None:
    model = parse(
        """g (int32[N, L] ids, int64[N, L] attention_mask) => (float[A, B, C] y) {
            wide = Cast<to = 7>(ids)
            flat = Reshape(wide, shape)
            e = Gather(table, flat)
            m = Cast<to = 1>(attention_mask)
            u = Unsqueeze(m, last)
            y = Mul(u, u)
        }""",
        {"table": _table(5), "shape": np.array([-1]), "last": np.array([2])},
    )
    dataset = synthetic_dataset(model, samples=20, seed=3)
    batches = list(dataset.batches(8))
    assert dataset.synthetic
    assert dataset.sample_count == 20
    assert [len(feeds["ids"]) for feeds in batches] == [8, 8, 4]
    ids = np.concatenate([feeds["ids"] for feeds in batches])
    assert ids.dtype == np.int32
    assert (ids.min(), ids.max()) == (0, 4)
    assert all((feeds["attention_mask"] == 1).all() for feeds in batches)
    assert "'ids' integers below 5" in dataset.description
    for feeds in batches:
        run(model, feeds)


def test_the_smallest_of_several_tables_decides() -> None:
    model = parse(
        """g (int64[N] i) => (float[N, 3] y) {
            a = Gather(big, i)
            b = Gather(small, i)
            y = Add(a, b)
        }""",
        {"big": _table(50), "small": _table(4)},
    )
    (feeds,) = synthetic_dataset(model, samples=100, seed=0).batches(100)
    assert feeds["i"].max() == 3


def test_one_hot_by_comparison() -> None:
    model = parse(
        """g (int32[N, 4] tokens) => (float[A, B, C] y) {
            column = Unsqueeze(tokens, last)
            hit = Equal(column, numbers)
            y = Cast<to = 1>(hit)
        }""",
        {"numbers": np.arange(7, dtype=np.int32), "last": np.array([2])},
    )
    (feeds,) = synthetic_dataset(model, samples=50, seed=0).batches(50)
    assert feeds["tokens"].max() == 6


def test_samples_do_not_depend_on_batches_and_differ_by_seed() -> None:
    model = parse("g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }")

    def samples(seed: int, batch_size: int) -> Array:
        dataset = synthetic_dataset(model, samples=7, seed=seed)
        return np.concatenate([feeds["x"] for feeds in dataset.batches(batch_size)])

    np.testing.assert_array_equal(samples(0, 2), samples(0, 7))
    assert not np.array_equal(samples(0, 2), samples(1, 2))
    skipped = synthetic_dataset(model, samples=7, seed=0).skip(3)
    np.testing.assert_array_equal(next(skipped.batches(9))["x"], samples(0, 7)[3:])


def test_dynamic_axes_get_lengths_at_which_the_model_runs() -> None:
    model = parse(
        """g (float[N, C, H, W] x) => (float[N, 4, A, B] y) { y = Conv(x, w) }""",
        {"w": np.ones((4, 3, 33, 33), np.float32)},
    )
    (feeds,) = synthetic_dataset(model, samples=2, seed=0).batches(2)
    assert feeds["x"].shape == (2, 3, 224, 224)
    model = parse(
        "g (float[N, L] x) => (float[N, 64] y) { y = MatMul(x, w) }",
        {"w": np.ones((64, 64), np.float32)},
    )
    assert synthetic_dataset(model, samples=1, seed=0).first()["x"].shape == (1, 64)


def test_states_scalars_and_fixed_batches() -> None:
    model = parse(
        """g (float[N, 3] x, float[2, N, 3] state, int64 rate) => (float[A, B, C] y) {
            right = Equal(rate, wanted)
            f = Cast<to = 1>(right)
            z = Add(x, state)
            y = Div(z, f)
        }""",
        {"wanted": np.array(16000)},
    )
    feeds = synthetic_dataset(model, samples=3, seed=0).first()
    assert feeds["state"].shape == (2, 1, 3)
    assert feeds["rate"] == 16000
    fixed = parse("g (float[4, 3] x) => (float[4, 3] y) { y = Relu(x) }")
    dataset = synthetic_dataset(fixed, samples=5, seed=0)
    assert dataset.sample_count == 8
    assert [feeds["x"].shape for feeds in dataset.batches(1)] == [(4, 3), (4, 3)]


def test_positive_inputs_where_noise_gives_nan() -> None:
    model = parse("g (float[N, 9] x) => (float[N, 9] y) { y = Sqrt(x) }")
    assert synthetic_dataset(model, samples=1, seed=0).first()["x"].min() >= 0


def test_booleans_bytes_and_half_precision() -> None:
    model = parse(
        """g (bool[N] b, uint8[N, 9] u, float16[N] h) => (float16[N, 9] y) {
            c = Cast<to = 10>(u)
            k = Cast<to = 10>(b)
            s = Mul(h, k)
            t = Reshape(s, column)
            y = Mul(c, t)
        }""",
        {"column": np.array([-1, 1])},
    )
    feeds = synthetic_dataset(model, samples=1, seed=0).first()
    assert feeds["b"].all()
    assert feeds["u"].max() > 127
    assert feeds["h"].dtype == np.float16


def test_models_that_cannot_be_fed_by_guessing() -> None:
    text = parse("g (string[N] s) => (string[N] t) { t = Identity(s) }")
    with pytest.raises(DataError, match="strings for input 's'"):
        synthetic_dataset(text, samples=1, seed=0)
    never = parse("g (float[N, 3] x) => (float[N, 3] y) { z = Sub(x, x) y = Div(x, z) }")
    with pytest.raises(DataError, match="output 'y' is not finite"):
        synthetic_dataset(never, samples=1, seed=0)
    odd = parse(
        "g (float[N, L] x) => (float[N, 1] y) { y = MatMul(x, w) }",
        {"w": np.ones((37, 1), np.float32)},
    )
    with pytest.raises(DataError, match="on which the model runs: running the model failed"):
        synthetic_dataset(odd, samples=1, seed=0)
    closed = parse("g () => (float[3] y) { y = Relu(w) }", {"w": np.ones(3, np.float32)})
    with pytest.raises(DataError, match="no inputs"):
        synthetic_dataset(closed, samples=1, seed=0)


def test_a_batch_name_on_another_axis_too() -> None:
    model = parse("g (float[N, N] x, float[N, 3] z) => (float[N, 3] y) { y = MatMul(x, z) }")
    dataset = synthetic_dataset(model, samples=3, seed=0)
    shapes = [feeds["x"].shape for feeds in dataset.batches(8)]
    assert shapes == [(1, 1)] * 3
    assert all(np.isfinite(run(model, feeds)["y"]).all() for feeds in dataset.batches(8))
