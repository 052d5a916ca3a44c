"""Image folders as inputs."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from onnxcompress.calibration.sources import ImageOptions, open_dataset
from onnxcompress.errors import DataError, UsageError
from tests.calibration.builders import specs

Image = pytest.importorskip("PIL.Image")

Pixels: TypeAlias = npt.NDArray[np.uint8]

NCHW = specs(("N", 3, 4, 6))


def _write(path: Path, pixels: Pixels) -> Pixels:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def _pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_pixels_mean_and_std(tmp_path: Path) -> None:
    first = _write(tmp_path / "a.png", _pixels(4, 6, 3))
    second = _write(tmp_path / "b.PNG", _pixels(4, 6, 3, seed=1))
    options = ImageOptions(mean=(1.0, 2.0, 3.0), std=(50.0, 60.0, 70.0))
    dataset = open_dataset(tmp_path, NCHW, image=options)
    expected = (np.stack([first, second]).astype(np.float32) - [1, 2, 3]) / [50, 60, 70]
    (feeds,) = dataset.batches(8)
    given = feeds["x"].astype(np.float64)
    np.testing.assert_allclose(given, expected.transpose(0, 3, 1, 2), rtol=1e-5)
    assert feeds["x"].dtype == np.float32
    assert dataset.labels is None
    assert "(pixel - [1, 2, 3]) / [50, 60, 70]" in dataset.description


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_layouts_and_channel_orders(tmp_path: Path, channels: str) -> None:
    pixels = _write(tmp_path / "a.png", _pixels(4, 6, 3)).astype(np.float32) / 255
    options = ImageOptions(channels="BGR" if channels == "BGR" else "RGB")
    (feeds,) = open_dataset(tmp_path, specs((1, 4, 6, 3)), image=options).batches(1)
    expected = pixels[..., ::-1] if channels == "BGR" else pixels
    np.testing.assert_allclose(feeds["x"][0].astype(np.float64), expected, rtol=1e-6)


def test_uint8_and_grey_inputs(tmp_path: Path) -> None:
    grey = _write(tmp_path / "a.png", _pixels(4, 6))
    (feeds,) = open_dataset(tmp_path, specs(("N", 1, 4, 6), dtype="uint8")).batches(1)
    np.testing.assert_array_equal(feeds["x"][0, 0], grey)


def test_size_by_crop_and_by_stretch(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 12:] = 200  # left half black, right half light
    _write(tmp_path / "a.png", pixels)
    cropped, stretched = (
        next(open_dataset(tmp_path, NCHW, image=ImageOptions(fit=fit, std=(1.0,))).batches(1))["x"]
        for fit in ("crop", "stretch")
    )
    assert cropped.shape == stretched.shape == (1, 3, 4, 6)
    # 8 x 24 scales to 4 x 12, of which the middle 6 columns stay.
    assert cropped[0, 0, 0, 0] == 0
    assert cropped[0, 0, 0, 5] == 200
    assert stretched[0, 0, 0, 0] == 0
    assert stretched[0, 0, 0, 5] == 200


def test_dynamic_sizes_keep_each_image_or_take_the_option(tmp_path: Path) -> None:
    _write(tmp_path / "a.png", _pixels(4, 6, 3))
    _write(tmp_path / "b.png", _pixels(5, 5, 3))
    dynamic = specs(("N", 3, "H", "W"))
    shapes = [feeds["x"].shape for feeds in open_dataset(tmp_path, dynamic).batches(8)]
    assert shapes == [(1, 3, 4, 6), (1, 3, 5, 5)]
    sized = open_dataset(tmp_path, dynamic, image=ImageOptions(size=(3, 2)))
    assert [feeds["x"].shape for feeds in sized.batches(8)] == [(2, 3, 3, 2)]


@pytest.mark.parametrize(
    ("names", "expected"), [(("cat", "ant"), [0, 1, 1]), (("7", "3"), [3, 7, 7])]
)
def test_class_subfolders_give_labels(
    tmp_path: Path, names: Sequence[str], expected: list[int]
) -> None:
    for i, name in enumerate((names[0], names[0], names[1])):
        _write(tmp_path / name / f"{i}.png", _pixels(4, 6, 3))
    dataset = open_dataset(tmp_path, NCHW)
    np.testing.assert_array_equal(dataset.labels, expected)
    _write(tmp_path / "loose.png", _pixels(4, 6, 3))
    assert open_dataset(tmp_path, NCHW).labels is None


def test_a_fixed_batch_groups_images(tmp_path: Path) -> None:
    for i in range(5):
        _write(tmp_path / f"{i}.png", _pixels(4, 6, 3))
    dataset = open_dataset(tmp_path, specs((2, 3, 4, 6)))
    assert [feeds["x"].shape[0] for feeds in dataset.batches(1)] == [2, 2]


def test_damaged_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    with pytest.raises(DataError, match=r"a\.png' is not a readable image"):
        open_dataset(tmp_path, NCHW).first()


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([("N", 3, 4, 6), ("N", 1)], {}, "model of one input, this one has 2"),
        ([("N", 3)], {}, "no batch of images"),
        ([("N", 5, 4, 6)], {}, "has 5 channels"),
        ([("N", 1, 4, 6)], {"mean": (1.0, 2.0, 3.0)}, "images of one channel"),
        ([("N", 3, 4, 6)], {"size": (4, 7)}, "does not fit"),
        ([("N", 3, 4, "W")], {}, "fixes only one side"),
    ],
)
def test_inputs_that_are_no_images(
    tmp_path: Path,
    shapes: list[tuple[int | str, ...]],
    options: Mapping[str, tuple[float, ...]],
    message: str,
) -> None:
    _write(tmp_path / "a.png", _pixels(4, 6, 3))
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, specs(*shapes), image=ImageOptions(**options))  # type: ignore[arg-type]


def test_integer_inputs_take_no_images(tmp_path: Path) -> None:
    _write(tmp_path / "a.png", _pixels(4, 6, 3))
    with pytest.raises(DataError, match="neither floating-point nor uint8"):
        open_dataset(tmp_path, specs(("N", 3, 4, 6), dtype="int64"))


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="must be positive"):
        ImageOptions(size=(0, 4))
    with pytest.raises(UsageError, match="must not be 0"):
        ImageOptions(std=(0.0,))
    with pytest.raises(UsageError, match="one number, or one per channel"):
        ImageOptions(mean=(1.0, 2.0))


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.png", _pixels(4, 6, 3))
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="needs Pillow") as raised:
        open_dataset(tmp_path, NCHW)
    assert raised.value.hint == "Install it: pip install 'onnxcompress[images]'."


@pytest.mark.parametrize("wrong", [{"mean": (float("nan"),)}, {"std": (float("inf"),)}])
def test_mean_and_std_are_finite(wrong: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(UsageError, match="finite"):
        ImageOptions(**wrong)  # type: ignore[arg-type]
