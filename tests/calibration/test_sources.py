"""Datasets from every kind of source, and what bad data get."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.sources import find_beside, open_dataset
from onnxcompress.errors import DataError, UsageError
from onnxcompress.interface import TensorSpec
from tests.calibration.builders import Array, savez, specs

F32 = np.dtype(np.float32)
X23 = specs(("N", 2, 3))


def _all(dataset: Dataset, batch_size: int = 2, name: str = "x") -> Array:
    return np.concatenate([feeds[name] for feeds in dataset.batches(batch_size)])


def _data(count: int = 5) -> Array:
    return np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)


# ------------------------------------------------------------------ forms of data


def test_npz_in_batches_again_and_again(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=_data(), labels=np.arange(5))
    dataset = open_dataset(tmp_path / "d.npz", X23)
    for _ in range(2):
        sizes = [len(feeds["x"]) for feeds in dataset.batches(2)]
        assert sizes == [2, 2, 1]
        np.testing.assert_array_equal(_all(dataset), _data())
    assert dataset.sample_count == 5
    assert dataset.labels is not None
    np.testing.assert_array_equal(dataset.labels, np.arange(5))
    assert not dataset.synthetic
    assert "d.npz" in dataset.description
    assert dataset.specs == X23


@pytest.mark.parametrize("name", ["x", "anything"])
def test_one_array_feeds_one_input_under_any_name(tmp_path: Path, name: str) -> None:
    savez(tmp_path / "d.npz", {name: _data()})
    np.save(tmp_path / f"{name}.npy", _data())
    for source in (tmp_path / "d.npz", tmp_path / f"{name}.npy", {name: _data()}, _data()):
        np.testing.assert_array_equal(_all(open_dataset(source, X23)), _data())


def test_npz_shards_in_a_folder(tmp_path: Path) -> None:
    for i, part in enumerate(np.array_split(_data(7), 3)):
        np.savez(tmp_path / f"{i}.npz", x=part, labels=np.full(len(part), i))
    dataset = open_dataset(tmp_path, X23)
    np.testing.assert_array_equal(_all(dataset, 4), _data(7))
    np.testing.assert_array_equal(dataset.labels, [0, 0, 0, 1, 1, 2, 2])
    np.savez(tmp_path / "9.npz", y=_data())
    with pytest.raises(DataError, match=r"9\.npz' holds \['y'\], but"):
        open_dataset(tmp_path, X23)


def test_npy_per_input_in_a_folder(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", _data())
    np.save(tmp_path / "x1.npy", np.arange(5))
    np.save(tmp_path / "labels.npy", np.arange(5))
    two = (*X23, TensorSpec("x1", np.dtype(np.int64), ("N",)))
    dataset = open_dataset(tmp_path, two)
    np.testing.assert_array_equal(_all(dataset, 2, "x1"), np.arange(5))
    assert dataset.labels is not None


def test_npy_pieces_in_a_folder_for_one_input(tmp_path: Path) -> None:
    for i in range(3):
        np.save(tmp_path / f"piece{i}.npy", _data()[i : i + 1])
    np.testing.assert_array_equal(_all(open_dataset(tmp_path, X23)), _data()[:3])


def test_onnx_test_data(tmp_path: Path) -> None:
    two = (*X23, TensorSpec("x1", F32, ("N", 1)))
    for i in (2, 10, 0):
        folder = tmp_path / f"test_data_set_{i}"
        folder.mkdir()
        # One tensor is named after its input, the other goes by its number.
        tensors = [("x1", np.full((1, 1), i, np.float32)), ("", _data(1) + i)]
        for number, (name, array) in zip((1, 0), tensors, strict=True):
            tensor = onnx.numpy_helper.from_array(array, name)
            (folder / f"input_{number}.pb").write_bytes(tensor.SerializeToString())
    dataset = open_dataset(tmp_path, two)
    np.testing.assert_array_equal(_all(dataset, 2, "x1").ravel(), [0, 2, 10])
    np.testing.assert_array_equal(_all(dataset), np.concatenate([_data(1) + i for i in (0, 2, 10)]))
    assert dataset.labels is None
    assert open_dataset(tmp_path / "test_data_set_2", two).sample_count == 1
    (tmp_path / "test_data_set_2" / "input_0.pb").write_bytes(b"\xff\xff nonsense")
    with pytest.raises(DataError, match="not a serialized tensor"):
        open_dataset(tmp_path, two)


def test_a_function_is_called_anew_for_each_reading() -> None:
    calls = 0

    def give() -> Iterator[dict[str, Array]]:
        nonlocal calls
        calls += 1
        for i in range(5):
            yield {"x": _data()[i : i + 1]}

    dataset = open_dataset(give, X23)
    assert [len(feeds["x"]) for feeds in dataset.batches(2)] == [2, 2, 1]
    np.testing.assert_array_equal(_all(dataset, 3), _data())
    np.testing.assert_array_equal(_all(dataset.skip(1).take(3), 2), _data()[1:4])
    assert calls == 4  # one to count, three readings


def test_function_items_of_any_length_are_regrouped() -> None:
    cuts = np.split(_data(9), [4, 5, 7])
    dataset = open_dataset(lambda: iter([{"x": part} for part in cuts]), X23)
    assert dataset.sample_count == 9
    assert [len(feeds["x"]) for feeds in dataset.batches(3)] == [3, 3, 3]
    np.testing.assert_array_equal(_all(dataset.skip(3), 2), _data(9)[3:])


def test_function_items_of_different_shapes_stay_apart() -> None:
    items = [{"x": np.zeros((1, n), np.float32)} for n in (2, 2, 3, 2)]
    dataset = open_dataset(lambda: iter(items), specs(("N", "L")))
    shapes = [feeds["x"].shape for feeds in dataset.batches(8)]
    assert shapes == [(2, 2), (1, 3), (1, 2)]


def test_function_items_for_fixed_inputs_are_fed_as_they_are() -> None:
    fixed = (*specs((2, 1, 3)), TensorSpec("rate", np.dtype(np.int64), ()))
    items = [{"x": np.full((2, 1, 3), i, np.float32), "rate": np.array(i)} for i in range(3)]
    dataset = open_dataset(lambda: iter(items), fixed)
    assert [feeds["rate"].shape for feeds in dataset.batches(8)] == [(), (), ()]
    assert dataset.sample_count == 3


def test_module_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given_data_one.py").write_text(
        "import numpy as np\n"
        "def samples():\n    yield {'x': np.ones((1, 2, 3), np.float32)}\n"
        "def broken():\n    raise KeyError('lost')\n    yield\n"
        "def number():\n    return 3\n"
        "value = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert open_dataset("given_data_one:samples", X23).sample_count == 1
    assert open_dataset(f"{tmp_path / 'given_data_one.py'}:samples", X23).sample_count == 1
    with pytest.raises(DataError, match="KeyError: 'lost'"):
        open_dataset("given_data_one:broken", X23)
    with pytest.raises(DataError, match="gave a int, nothing to iterate"):
        open_dataset("given_data_one:number", X23)
    with pytest.raises(DataError, match="has no function 'value'"):
        open_dataset("given_data_one:value", X23)
    with pytest.raises(DataError, match=r"cannot be imported: ModuleNotFoundError"):
        open_dataset("no_such_module_here:samples", X23)
    with pytest.raises(DataError, match="does not exist"):
        open_dataset("nowhere.py:samples", X23)
    assert sys.path == path


def test_find_beside(tmp_path: Path) -> None:
    (tmp_path / "digits.calib.npz").touch()
    assert find_beside(tmp_path / "digits.onnx", "calib") == tmp_path / "digits.calib.npz"
    assert find_beside(tmp_path / "digits.onnx", "eval") is None


# ------------------------------------------------------------------ layouts


def test_whole_inputs_and_scalars() -> None:
    three = (
        TensorSpec("input", F32, ("N", 4)),
        TensorSpec("state", F32, (2, "N", 3)),
        TensorSpec("rate", np.dtype(np.int64), ()),
    )
    data: dict[str, Array] = {
        "input": np.zeros((5, 4), np.float32),
        "state": np.arange(30, dtype=np.float32).reshape(5, 2, 1, 3),
        "rate": np.arange(5),
    }
    dataset = open_dataset(data, three)
    batches = list(dataset.batches(4))
    assert len(batches) == 5
    assert {name: array.shape for name, array in batches[3].items()} == {
        "input": (1, 4),
        "state": (2, 1, 3),
        "rate": (),
    }
    assert batches[3]["rate"] == 3
    np.testing.assert_array_equal(batches[3]["state"], data["state"][3])


def test_a_fixed_batch_axis_groups_samples() -> None:
    dataset = open_dataset({"x": _data(7), "labels": np.arange(7)}, specs((3, 2, 3)))
    assert dataset.sample_count == 6
    assert "1 left out because the model takes 3 at once" in dataset.description
    assert [len(feeds["x"]) for feeds in dataset.batches(1)] == [3, 3]
    np.testing.assert_array_equal(dataset.labels, np.arange(6))
    assert len(dataset.first()["x"]) == 3
    with pytest.raises(DataError, match="only 2 samples"):
        open_dataset(_data(2), specs((3, 2, 3)))
    with pytest.raises(DataError, match="2 samples left"):
        dataset.take(2)


def test_take_skip_limit_and_first() -> None:
    dataset = open_dataset({"x": _data(8), "labels": np.arange(8)}, X23, limit=6)
    assert dataset.sample_count == 6
    assert len(dataset.first()["x"]) == 1
    part = dataset.skip(2).take(3)
    np.testing.assert_array_equal(_all(part), _data(8)[2:5])
    np.testing.assert_array_equal(part.labels, [2, 3, 4])
    assert dataset.take(100).sample_count == 6
    with pytest.raises(DataError, match="0 samples left"):
        dataset.skip(6)


def test_unknown_rank_is_batch_first() -> None:
    np.testing.assert_array_equal(_all(open_dataset(_data(), specs(None))), _data())


# ------------------------------------------------------------------ labels


def test_labels_from_a_file_replace_those_of_the_source(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.arange(5) + 10)
    data = {"x": _data(), "labels": np.arange(5)}
    dataset = open_dataset(data, X23, labels=tmp_path / "y.npy")
    np.testing.assert_array_equal(dataset.labels, np.arange(5) + 10)
    np.testing.assert_array_equal(open_dataset(data, X23, labels=np.ones(5)).labels, np.ones(5))


def test_bad_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 labels for 5 samples"):
        open_dataset({"x": _data(), "labels": np.arange(4)}, X23)
    with pytest.raises(DataError, match="3 labels for 5 samples"):
        open_dataset(_data(), X23, labels=np.arange(3))
    with pytest.raises(UsageError, match=r"not a \.npy file"):
        open_dataset(_data(), X23, labels=tmp_path / "y.csv")
    np.save(tmp_path / "y.npy", np.int64(3))
    with pytest.raises(DataError, match="scalar"):
        open_dataset(_data(), X23, labels=tmp_path / "y.npy")
    with pytest.raises(DataError, match="one entry per sample"):
        open_dataset({"x": _data(), "labels": np.array(3)}, X23)


def test_an_input_called_labels_is_an_input() -> None:
    own = (TensorSpec("labels", F32, ("N", 2, 3)),)
    dataset = open_dataset({"labels": _data()}, own)
    assert dataset.labels is None
    np.testing.assert_array_equal(_all(dataset, 2, "labels"), _data())


# ------------------------------------------------------------------ element types


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("float64", "float32"),
        ("float32", "float16"),
        ("float16", "float64"),
        ("uint8", "float32"),
        ("int16", "float32"),
        ("int32", "float64"),
        ("int64", "int32"),
        ("int32", "uint8"),
        ("bool", "float32"),
        ("bool", "int64"),
    ],
)
def test_conversions_that_keep_every_value(given: str, wanted: str) -> None:
    x = np.array([[0], [1], [1]]).astype(given)
    dataset = open_dataset(x, specs(("N", 1), dtype=wanted))
    fed = _all(dataset)
    assert fed.dtype == wanted
    np.testing.assert_array_equal(fed, x.astype(wanted))
    assert f"{given} fed as {wanted}" in dataset.description


@pytest.mark.parametrize(
    ("given", "wanted", "why"),
    [
        ("float32", "int64", "Fractions would be lost"),
        ("int64", "float32", "Not every int64 is a float32"),
        ("int32", "bool", "Convert it"),
        ("complex64", "float32", "Convert it"),
        ("<U3", "float32", "Convert it"),
    ],
)
def test_conversions_that_would_lose_values(given: str, wanted: str, why: str) -> None:
    with pytest.raises(DataError, match=f"{np.dtype(given)} array for input") as raised:
        open_dataset(np.zeros((2, 1), given), specs(("N", 1), dtype=wanted))
    assert raised.value.hint is not None
    assert why in raised.value.hint


def test_integers_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="values of the int64 array do not fit"):
        open_dataset(np.array([[3], [300]]), specs(("N", 1), dtype="uint8"))


def test_strings_feed_string_inputs() -> None:
    text = specs(("N", 1), dtype="object")
    for x in (np.array([["a"], ["bc"]]), np.array([["a"], ["bc"]], dtype=object)):
        np.testing.assert_array_equal(_all(open_dataset(x, text)), [["a"], ["bc"]])
    with pytest.raises(DataError, match="Python objects"):
        open_dataset(np.array([["a"], [3]], dtype=object), text)


# ------------------------------------------------------------------ what does not fit


def test_wrong_names_are_told_with_the_right_ones() -> None:
    two = (TensorSpec("input_ids", F32, ("N",)), TensorSpec("mask", F32, ("N",)))
    with pytest.raises(DataError, match="no array for 'input_ids'; 'input_id' is no input") as e:
        open_dataset({"input_id": np.zeros(2), "mask": np.zeros(2)}, two)
    assert e.value.hint is not None
    assert e.value.hint.startswith("Did you write 'input_id' instead of 'input_ids'?")
    with pytest.raises(DataError, match="'label' is no input") as e:
        open_dataset({"x": _data(), "label": np.zeros(5)}, X23)
    assert e.value.hint is not None
    assert "instead of 'labels'" in e.value.hint


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 2, 4), r"samples of shape \[2, 4\] do not fit"),
        ((5, 6), "has 2 axes"),
        ((5, 2, 3, 1, 1), "has 5 axes"),
        ((5, 2, 3, 1), r"samples of shape \[2, 3, 1\] do not fit"),
        ((0, 2, 3), "no samples"),
    ],
)
def test_wrong_shapes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(np.zeros(shape, np.float32), X23)


def test_shapes_of_several_inputs() -> None:
    two = specs(("N", 2), ("N", 2))
    with pytest.raises(DataError, match="different numbers of samples"):
        open_dataset({"x": np.zeros((2, 2)), "x1": np.zeros((3, 2))}, two)
    with pytest.raises(DataError, match="different fixed lengths"):
        open_dataset({"x": np.zeros((6, 2)), "x1": np.zeros((6, 2))}, specs((1, 2), (3, 2)))
    with pytest.raises(DataError, match="takes 3 samples at once"):
        open_dataset({"x": np.zeros((6, 2)), "x1": np.zeros((6, 3, 2))}, specs((3, 2), (3, 2)))
    with pytest.raises(DataError, match="empty axis"):
        open_dataset(np.zeros((2, 0), np.float32), specs(("N", "L")))
    with pytest.raises(DataError, match=r"1 axis \(one scalar per sample\)"):
        open_dataset(np.zeros((2, 2), np.float32), specs(()))


def test_transposed_images_are_recognized() -> None:
    with pytest.raises(DataError) as raised:
        open_dataset(np.zeros((2, 8, 9, 3), np.float32), specs(("N", 3, 8, 9)))
    assert raised.value.hint is not None
    assert "channels first or last" in raised.value.hint


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_the_sample(bad: float) -> None:
    x = _data()
    x[3, 1, 2] = bad
    with pytest.raises(DataError, match="sample 3 of input 'x: float32"):
        open_dataset(x, X23)
    np.testing.assert_array_equal(_all(open_dataset(x, X23, limit=3)), _data()[:3])
    given = open_dataset(lambda: iter([{"x": x}]), X23)
    with pytest.raises(DataError, match="sample 3 of input 'x: float32"):
        _all(given)


def test_overflow_in_conversion_is_found_and_large_values_are_fine() -> None:
    with pytest.raises(DataError, match="infinite values as float32"):
        open_dataset(np.full((1, 2, 3), 1e300), X23)
    large = np.full((4, 2, 3), 3.4e38, np.float32)
    np.testing.assert_array_equal(_all(open_dataset(large, X23)), large)


def test_objects_in_memory() -> None:
    with pytest.raises(DataError, match="holds Python objects"):
        open_dataset(np.array([[1], [1, 2]], dtype=object), specs(("N", "L")))


def test_sources_of_no_known_form(tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="not of a known data format"):
        open_dataset(tmp_path / "x.csv", X23)
    with pytest.raises(DataError, match="holds no data"):
        open_dataset(tmp_path / "empty", X23)
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "nothing.npz", X23)
    with pytest.raises(UsageError, match="data of type int"):
        open_dataset(3, X23)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no inputs"):
        open_dataset(_data(), ())


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "gave no samples"),
        ([np.zeros(3)], "not a dict of arrays"),
        ([{"x": np.zeros((1, 2, 4), np.float32)}], r"shape \[1, 2, 4\] does not fit"),
        ([{"x": np.zeros((2, 3), np.float32)}], "does not fit"),
        ([{"x": np.zeros((1, 2, 3), np.int64)}], "int64 array for input"),
        ([{"a": _data(), "b": _data()}], "no array for 'x'"),
    ],
)
def test_functions_that_give_nonsense(items: list[dict[str, Array]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(lambda: iter(items), X23)


def test_functions_whose_inputs_have_different_lengths() -> None:
    item = {"x": np.zeros((1, 2)), "x1": np.zeros((2, 2))}
    with pytest.raises(DataError, match="first axes have different lengths"):
        open_dataset(lambda: iter([item]), specs(("N", 2), ("N", 2)))


def test_a_function_that_gives_less_the_second_time() -> None:
    lengths = iter([5, 3])

    def give() -> Iterator[dict[str, Array]]:
        yield {"x": _data(next(lengths))}

    dataset = open_dataset(give, X23)
    with pytest.raises(DataError, match="gave 3 samples this time, 5 expected"):
        _all(dataset)


def test_rows_of_different_lengths_and_functions_that_exit_are_data_errors() -> None:
    def ragged() -> list[dict[str, object]]:
        return [{"x": [[1.0, 2.0], [3.0]]}]

    def leaves() -> list[dict[str, object]]:
        raise SystemExit(5)

    for function, message in [(ragged, "differ in length"), (leaves, "SystemExit: 5")]:
        with pytest.raises(DataError, match=message):
            list(open_dataset(function, X23).batches(1))  # type: ignore[arg-type]
