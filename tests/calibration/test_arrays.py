"""Arrays on disk: read in pieces, and every way in which files can be bad."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from onnxcompress.calibration.arrays import ArrayFile, Shards, open_npy, open_npz
from onnxcompress.errors import DataError
from tests.calibration.builders import savez


@pytest.fixture
def data() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.arange(60, dtype=np.float32).reshape(5, 4, 3)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_members_are_read_by_rows(tmp_path: Path, compressed: bool) -> None:
    x, names = np.arange(60.0).reshape(5, 4, 3), np.array(["a", "bc"])
    savez(tmp_path / "d.npz", {"scope/x:0": x, "names": names}, compressed=compressed)
    arrays = open_npz(tmp_path / "d.npz")
    assert set(arrays) == {"scope/x:0", "names"}
    assert arrays["scope/x:0"].shape == (5, 4, 3)
    np.testing.assert_array_equal(arrays["scope/x:0"][slice(1, 4)], x[1:4])
    np.testing.assert_array_equal(arrays["scope/x:0"][slice(3, 99)], x[3:])
    np.testing.assert_array_equal(arrays["names"][slice(0, 2)], names)
    assert arrays["scope/x:0"][slice(2, 2)].shape == (0, 4, 3)


def test_npy_in_either_memory_order(
    tmp_path: Path, data: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> None:
    np.save(tmp_path / "c.npy", data)
    np.save(tmp_path / "f.npy", np.asfortranarray(data))
    for name in ("c.npy", "f.npy"):
        array = open_npy(tmp_path / name)
        assert isinstance(array, ArrayFile)
        np.testing.assert_array_equal(array[slice(1, 3)], data[1:3])


def test_only_the_rows_asked_for_are_read(
    tmp_path: Path,
    data: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.savez(tmp_path / "d.npz", x=data)
    array = open_npz(tmp_path / "d.npz")["x"]
    sizes: list[int] = []
    make = np.empty

    def counting(
        count: int, dtype: np.dtype[np.generic]
    ) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
        sizes.append(count)
        return make(count, dtype)

    monkeypatch.setattr("onnxcompress.calibration.arrays.np.empty", counting)
    _ = array[slice(1, 3)]
    assert sizes == [24]


def test_shards_continue_each_other() -> None:
    parts = [np.arange(6).reshape(3, 2), np.arange(4).reshape(2, 2), np.arange(2).reshape(1, 2)]
    shards = Shards([(str(i), part) for i, part in enumerate(parts)])
    whole = np.concatenate(parts)
    assert shards.shape == (6, 2)
    for start in range(7):
        for stop in range(start, 7):
            np.testing.assert_array_equal(shards[slice(start, stop)], whole[start:stop])
    with pytest.raises(DataError, match="does not continue"):
        Shards([("a", np.zeros((2, 2))), ("b", np.zeros((2, 3)))])


@pytest.mark.parametrize("cut", [4, 60, 100, 200])
def test_truncated_npy(tmp_path: Path, cut: int) -> None:
    np.save(tmp_path / "x.npy", np.arange(60.0))
    path = tmp_path / "x.npy"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"x\.npy' is (cut short|not a \.npy array)"):
        open_npy(path)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_truncated_npz(tmp_path: Path, compressed: bool, keep: float) -> None:
    path = tmp_path / "x.npz"
    (np.savez_compressed if compressed else np.savez)(path, x=np.arange(600.0))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DataError, match=r"x\.npz' is not a valid \.npz file"):
        open_npz(path)


def test_damaged_compressed_member(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).random(600))
    raw = bytearray(path.read_bytes())
    raw[300:310] = b"\xff" * 10
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"array 'x' of .* cannot be unpacked"):
        open_npz(path)


def test_damaged_stored_member(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.arange(600.0))
    raw = bytearray(path.read_bytes())
    raw[3000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"array 'x' of .* has a wrong checksum"):
        open_npz(path)


def test_a_header_with_a_negative_shape(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(60.0))
    path.write_bytes(path.read_bytes().replace(b"(60,),", b"(-6,),"))
    with pytest.raises(DataError, match=r"announces the shape \[-6\]"):
        open_npy(path)


def test_stored_member_shorter_than_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.save(tmp_path / "x.npy", np.arange(60.0))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes()[:-8])
    with pytest.raises(DataError, match="480 bytes announced, 472 there"):
        open_npz(path)


def test_wrong_local_header(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.arange(60.0))
    raw = bytearray(path.read_bytes())
    raw[:4] = struct.pack("<I", 0)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="cut short"):
        open_npz(path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}, None], dtype=object))
    np.save(tmp_path / "x.npy", np.array([[1], [1, 2]], dtype=object))
    with pytest.raises(DataError, match="never unpickled"):
        open_npz(tmp_path / "x.npz")
    with pytest.raises(DataError, match="never unpickled"):
        open_npy(tmp_path / "x.npy")


def test_a_file_that_changes_under_our_feet(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(60.0))
    array = open_npy(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(b"")
    with pytest.raises(DataError, match="cut short"):
        _ = array[slice(0, 60)]
    (tmp_path / "x.npy").unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        _ = array[slice(0, 60)]


def test_a_scalar_has_no_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.float32(3))
    with pytest.raises(DataError, match="scalar"):
        _ = open_npy(tmp_path / "x.npy")[slice(0, 1)]
