"""Image files as model inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from onnxcompress.calibration.arrays import Array
from onnxcompress.calibration.checks import Layout
from onnxcompress.errors import DataError, UsageError
from onnxcompress.interface import TensorSpec

if TYPE_CHECKING:
    from types import ModuleType

    from PIL.Image import Image

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How an image file becomes an input: ``x = (pixel - mean) / std`` with pixels of 0 to 255.

    Attributes:
        size: Height and width in pixels; None takes those of the model's input, or of each image.
        mean: Subtracted from each channel, in pixel units; one number for all, or one per channel.
        std: Divides each channel, in pixel units; ``(255.0,)`` gives 0 to 1.
        layout: Order of the input's axes; "auto" finds the channel axis (length 1 or 3).
        channels: Order of the channels; "auto" is RGB, or grey where the input has one channel.
        fit: How to reach ``size``: "crop" scales the shorter side and cuts the middle out,
            "stretch" scales both sides.
        resample: Interpolation.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (255.0,)
    layout: Literal["auto", "NCHW", "NHWC"] = "auto"
    channels: Literal["auto", "RGB", "BGR", "L"] = "auto"
    fit: Literal["crop", "stretch"] = "crop"
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise UsageError(f"image size {self.size} must be positive")
        if len(self.mean) not in (1, 3) or len(self.std) not in (1, 3):
            raise UsageError(
                f"image mean {self.mean} and std {self.std} need one number, or one per channel"
            )
        if not np.isfinite((*self.mean, *self.std)).all():
            raise UsageError(f"image mean {self.mean} and std {self.std} must be finite numbers")
        if 0.0 in self.std:
            raise UsageError(f"image std {self.std} must not be 0")


def find_images(folder: Path) -> tuple[Path, ...]:
    """All image files under a folder, sorted by path."""
    return tuple(
        sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    )


def class_labels(folder: Path, images: Sequence[Path]) -> Array | None:
    """Class numbers from class subfolders.

    Subfolders whose names are all numbers are these classes; others are numbered in sorted order.

    Returns:
        [images] int64; None unless every image lies in a direct subfolder.
    """
    parents = [image.relative_to(folder).parts[:-1] for image in images]
    if not all(len(parts) == 1 for parts in parents):
        return None
    names = sorted({parts[0] for parts in parents})
    numbered = all(name.isdecimal() for name in names)
    number = {name: int(name) if numbered else i for i, name in enumerate(names)}
    return np.array([number[parts[0]] for parts in parents], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Samples decoded from image files when they are needed.

    Attributes:
        paths: The files.
        spec: The model's input.
        options: With ``layout``, ``channels`` and, unless each image keeps its own, ``size`` set.
        description: One line for reports.
        layout: See :class:`onnxcompress.calibration.dataset.Source`.
    """

    paths: tuple[Path, ...]
    spec: TensorSpec
    options: ImageOptions
    description: str
    layout: Layout = field(default_factory=Layout)

    @property
    def sample_count(self) -> int:
        """Number of images."""
        return len(self.paths)

    def pieces(self, start: int, stop: int, size: int) -> Iterator[dict[str, Array]]:
        """See :class:`onnxcompress.calibration.dataset.Source`."""
        pillow = _pillow()
        held: list[Array] = []
        for path in self.paths[start:stop]:
            decoded = self._decode(pillow, path)
            if held and (len(held) == size or held[0].shape != decoded.shape):
                yield {self.spec.name: np.stack(held)}
                held = []
            held.append(decoded)
        if held:
            yield {self.spec.name: np.stack(held)}

    def _decode(self, pillow: ModuleType, path: Path) -> Array:
        options = self.options
        try:
            with pillow.open(path) as image:
                image = image.convert("L" if options.channels == "L" else "RGB")
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise DataError(
                f"'{path}' is not a readable image: {error}", hint="Remove or repair the file."
            ) from error
        if options.size is not None:
            image = _resized(pillow, image, options)
        pixels: Array = np.asarray(image)
        if pixels.ndim == 2:
            pixels = pixels[..., np.newaxis]
        if options.channels == "BGR":
            pixels = pixels[..., ::-1]
        if self.spec.dtype != np.uint8:
            mean, std = (np.asarray(v, np.float32) for v in (options.mean, options.std))
            pixels = ((pixels.astype(np.float32) - mean) / std).astype(self.spec.dtype)
        return pixels.transpose(2, 0, 1) if options.layout == "NCHW" else pixels


def open_images(
    folder: Path,
    paths: Sequence[Path],
    specs: Sequence[TensorSpec],
    options: ImageOptions | None,
) -> tuple[ImageSource, Array | None]:
    """Samples from the images of a folder, and their labels where subfolders are classes.

    Raises:
        DataError: If the model's input is no image, or Pillow is not installed.
    """
    _pillow()
    if len(specs) != 1:
        raise DataError(
            f"images can feed a model of one input, this one has {len(specs)}",
            hint="Prepare the inputs as arrays in a .npz file.",
        )
    spec = specs[0]
    label = f"{len(paths)} images of '{folder}'"
    resolved = _resolve(options or ImageOptions(), spec, label)
    size = "own size" if resolved.size is None else "{}x{}".format(*resolved.size)
    scaling = "pixels 0 to 255"
    if spec.dtype != np.uint8:
        scaling = f"(pixel - {_short(resolved.mean)}) / {_short(resolved.std)}"
    description = f"{label}, {size}, {resolved.fit}, {resolved.channels}, {scaling}"
    layout = Layout(group=spec.batch)
    source = ImageSource(tuple(paths), spec, resolved, description, layout)
    return source, class_labels(folder, paths)


def _resolve(options: ImageOptions, spec: TensorSpec, label: str) -> ImageOptions:
    """Fill in what "auto" and None mean for an input."""
    if spec.shape is None or len(spec.shape) != 4:
        raise DataError(
            f"{label}: input '{spec}' is no batch of images",
            hint="Images need an input of 4 axes; prepare others as arrays in a .npz file.",
        )
    if spec.dtype.kind != "f" and spec.dtype != np.uint8:
        raise DataError(
            f"{label}: input '{spec}' takes neither floating-point nor uint8 pixels",
            hint="Prepare the inputs as arrays in a .npz file.",
        )
    layout = options.layout
    if layout == "auto":
        layout = "NHWC" if spec.shape[3] in (1, 3) and spec.shape[1] not in (1, 3) else "NCHW"
    depth, *sides = (spec.shape[i] for i in ((1, 2, 3) if layout == "NCHW" else (3, 1, 2)))
    channels = options.channels
    if channels == "auto":
        channels = "L" if depth == 1 else "RGB"
    wanted = 1 if channels == "L" else 3
    if isinstance(depth, int) and depth != wanted:
        raise DataError(
            f"{label}: input '{spec}' has {depth} channels as {layout}, {channels} images have "
            f"{wanted}",
            hint="Set the layout or the channels of the images.",
        )
    if max(len(options.mean), len(options.std)) > wanted:
        raise DataError(f"{label}: mean or std per channel for images of one channel")
    height, width = sides
    size = options.size
    if size is None and isinstance(height, int) and isinstance(width, int):
        size = (height, width)
    for seen, side in zip(size or (), sides, strict=False):
        if isinstance(side, int) and side != seen:
            raise DataError(
                f"{label}: size {size} does not fit input '{spec}'",
                hint="Leave the size out to use the model's.",
            )
    if size is None and isinstance(height, int) != isinstance(width, int):
        raise DataError(
            f"{label}: input '{spec}' fixes only one side", hint="Set the size of the images."
        )
    return replace(options, size=size, layout=layout, channels=channels)


def _short(numbers: tuple[float, ...]) -> str:
    return (
        "[" + ", ".join(f"{n:g}" for n in numbers) + "]" if len(numbers) > 1 else f"{numbers[0]:g}"
    )


def _resized(pillow: ModuleType, image: Image, options: ImageOptions) -> Image:
    """The image at ``options.size``."""
    assert options.size is not None  # noqa: S101
    height, width = options.size
    method = getattr(pillow.Resampling, options.resample.upper())
    if options.fit == "stretch":
        return image.resize((width, height), method)
    scale = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if scaled != image.size:
        image = image.resize(scaled, method)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def _pillow() -> ModuleType:
    try:
        import PIL.Image
    except ImportError as error:
        raise DataError(
            "reading images needs Pillow", hint="Install it: pip install 'onnxcompress[images]'."
        ) from error
    return PIL.Image
