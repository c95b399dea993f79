"""Pictures in and out: read and resize them, lay samples out in a grid, plot losses.

Pixels are NumPy: bytes (H, W, C) in files, float32 (N, H, W, C) in [-1, 1] everywhere else. Files
are written whole or not at all. Pillow and matplotlib are imported where they are used.
"""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
Pixels = NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg")

# Pillow's modes by what they hold; the others (16 or 32 bits a value, CMYK, Lab) have no single
# right way to 8 bits.
_GREY, _COLOUR, _ALPHA = ("1", "L"), ("RGB", "P"), ("LA", "La", "PA", "RGBA", "RGBa")


def read_image(path: str | os.PathLike[str], channels: int | None = None) -> Pixels:
    """Read a PNG or JPEG file: (H, W, C), C = 1 for grey and 3 for colour, turned as EXIF says.

    channels
        None: as many as the file has, which must not be transparent.
        1 or 3: convert to grey (ITU-R 601 luma) or to colour; what is transparent goes onto white.

    Raises ValueError: not an image, damaged, transparent, or neither grey nor colour with 8 bits.
    FileNotFoundError: no such file. ImportError: Pillow is missing.
    """
    Image, ImageOps = _pillow("Image", "ImageOps")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image file {path}")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's own message for an unknown format repeats the path and says no more.
        why = "" if isinstance(error, Image.UnidentifiedImageError) else f": {error}"
        raise ValueError(f"{path} is not an image that Pillow can read{why}") from error
    transparent = image.mode in _ALPHA or "transparency" in image.info
    if not transparent and image.mode not in _GREY + _COLOUR:
        raise ValueError(
            f"{path} has pixels of Pillow's mode {image.mode!r}: save it as grey or RGB of 8 bits"
        )
    if channels is None and transparent:
        raise ValueError(f"{path} has transparent pixels: ask for 1 or 3 channels to convert it")
    if transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if channels is None:
        channels = 1 if image.mode in _GREY else 3
    pixels = np.asarray(image.convert({1: "L", 3: "RGB"}[channels]), np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels)


def cover(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The middle of pixels (H, W, C), as large as can be, resized to ``size`` with antialiasing."""
    (Image,) = _pillow("Image")
    (h, w, c), (out_h, out_w) = pixels.shape, size
    scale = min(h / out_h, w / out_w)
    left, top = (w - out_w * scale) / 2, (h - out_h * scale) / 2
    box = (left, top, left + out_w * scale, top + out_h * scale)
    image = Image.fromarray(pixels[..., 0] if c == 1 else pixels)
    resized = image.resize((out_w, out_h), Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized, np.uint8).reshape(*size, c)


def to_float(pixels: Pixels) -> Images:
    """Bytes 0..255 of any shape to float32 in [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def to_pixels(images: Any) -> Pixels:
    """Numbers of any shape to bytes, [-1, 1] to 0..255; what lies outside is cut off.

    Raises ValueError for NaN, which has no colour.
    """
    images = np.asarray(images, np.float32)
    if np.isnan(images).any():
        raise ValueError("NaN among the pixels of an image")
    return np.rint((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def grid(images: Any, columns: int | None = None, gap: int = 2, scale: int = 1) -> Pixels:
    """Images (N, H, W, C) in [-1, 1] side by side, row by row: (H', W', C) pixels.

    ``columns`` is the side of the square that holds them all unless given, ``gap`` the white space
    between two images, ``scale`` how many pixels a pixel is wide and high.
    """
    pixels = to_pixels(images)
    n, h, w, c = pixels.shape
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    rows = -(-n // columns)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    h, w = h * scale + gap, w * scale + gap
    canvas = np.full((rows * h + gap, columns * w + gap, c), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * h + gap, i % columns * w + gap
        canvas[top : top + h - gap, left : left + w - gap] = image
    return canvas


def write_png(path: str | os.PathLike[str], pixels: Pixels) -> None:
    """Write pixels (H, W, C), C = 1 or 3, as PNG."""
    (Image,) = _pillow("Image")
    with replacing(Path(path)) as partial:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(partial, "png")


Rows = Sequence[Mapping[str, float | int]]
"""Losses by name, and the "epoch" or "step" that they are of."""


def write_losses(path: str | os.PathLike[str], rows: Rows) -> None:
    """Write a CSV file with a line for each row, every digit of each number."""
    with replacing(Path(path)) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot_losses(path: str | os.PathLike[str], rows: Rows, log: bool = False) -> None:
    """Write a PNG with one line for each loss. ImportError: matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ImportError as error:
        raise ImportError(
            "the plot of the losses needs matplotlib: python -m pip install matplotlib"
        ) from error
    over, *others = rows[0]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=over, ylabel="loss", yscale="log" if log else "linear")
    for name in (name for name in others if name != "step"):
        values = [row[name] for row in rows]
        if any(values):
            marker = "." if len(rows) < 30 else ""
            axes.plot([row[over] for row in rows], values, label=name, marker=marker)
    axes.grid(alpha=0.3)
    if axes.lines:  # none of losses that were 0 all along
        axes.legend(frameon=False)
    with replacing(Path(path)) as partial:
        figure.savefig(partial, dpi=120)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to, and put what was written in ``path``'s place once it is whole.

    The folder is made. After an exception, or when the power fails, the file of before is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def require_pillow() -> None:
    """Raise ImportError where Pillow is missing: better before a run than at its first grid."""
    _pillow("Image")


def _pillow(*modules: str) -> list[Any]:
    try:
        from importlib import import_module

        return [import_module(f"PIL.{module}") for module in modules]
    except ImportError as error:
        raise ImportError("image files need Pillow: python -m pip install pillow") from error
