"""Images to train on: real digits without a network, MNIST, or a local file.

Sources
    Document 002 loads MNIST through torchvision and maps it to [-1, 1], the range of the
    generator's tanh; documents 001 and 000 leave the mapping out (ERRATA.md 001-E10). The default
    here needs no download: the 1,797 scans of 8 x 8 pixels that scikit-learn ships (Alpaydin and
    Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", test part).

All arrays are NumPy, (N, H, W, C), float32 in [-1, 1]. Libraries are imported where they are used.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]

DATASETS = ("digits", "mnist")
MNIST_FILE = "train-images-idx3-ubyte"

# IDX type codes that images come in: bytes 0..255, or numbers that are in [-1, 1] already.
_IDX_DTYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}


def load_images(
    source: str | os.PathLike[str] = "digits",
    image_size: tuple[int, int] = (28, 28),
    root: str | os.PathLike[str] = "data",
) -> Images:
    """Load images (N, H, W, 1), float32 in [-1, 1], with ``(H, W) = image_size``.

    source
        ``"digits"``: scikit-learn's digits, resized bilinearly to ``image_size``.
        ``"mnist"``: MNIST's 60,000 training images, 28 x 28, which torchvision downloads (11 MB)
        to ``root`` when they are not there.
        A path: an IDX file of images, gzipped or not, or a folder that holds MNIST's
        ``train-images-idx3-ubyte``. Bytes 0..255 are mapped to [-1, 1]; floats must lie there.

    Raises
        ValueError: unknown name, an ``image_size`` that is not positive or not the file's, a file
            that is not IDX or is cut short, values that are NaN or outside [-1, 1].
        FileNotFoundError: no such file. RuntimeError: the download failed.
        ImportError: scikit-learn or torchvision is missing.
    """
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be two positive numbers (H, W), got {image_size}")
    if source == "digits":
        images = _digits(image_size)
    elif source == "mnist":
        images = _read_idx(_mnist_file(Path(root)))
    else:
        images = _read_idx(_local_file(source))
    if images.shape[1:] != tuple(image_size):
        h, w = images.shape[1:]
        raise ValueError(
            f"the images of {os.fspath(source)!r} are {h} x {w}, but image_size asks for "
            f"{image_size[0]} x {image_size[1]}; only 'digits' is resized"
        )
    return check_images(images[..., None])


def batches(images: Images, batch_size: int, rng: np.random.Generator) -> Iterator[Images]:
    """Shuffle images (N, H, W, C) with ``rng`` and yield full batches (batch_size, H, W, C).

    The ``N % batch_size`` images left over are dropped: a smaller last batch is another shape, for
    which a compiled step is traced and built again (ERRATA.md 002-E10).

    Raises ValueError at the call, not at the first batch: ``batch_size`` below 1 or above N, images
    that are NaN or outside [-1, 1].
    """
    check_images(images)
    n = len(images)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size > n:
        raise ValueError(f"batch_size {batch_size} is larger than the data set of {n} images")
    order = rng.permutation(n)
    return (images[order[i : i + batch_size]] for i in range(0, n - batch_size + 1, batch_size))


def check_images(images: Images) -> Images:
    """Return images (N, H, W, C) unchanged if every value is a number in [-1, 1].

    A GAN's real images have to share the range of its generator's tanh, or the discriminator tells
    them apart by their range alone. Raises ValueError.
    """
    if images.ndim != 4 or images.size == 0:
        raise ValueError(f"images must be (N, H, W, C), none of them 0, got shape {images.shape}")
    if np.isnan(images).any():
        broken = int(np.isnan(images).any(axis=(1, 2, 3)).sum())
        raise ValueError(f"NaN in {broken} of {len(images)} images")
    low, high = float(images.min()), float(images.max())
    if low < -1 or high > 1:
        raise ValueError(f"images must be in [-1, 1], got values from {low} to {high}")
    return images


def _digits(image_size: tuple[int, int]) -> Images:
    try:
        from scipy.ndimage import zoom
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the data set 'digits' needs scikit-learn: python -m pip install scikit-learn"
        ) from error
    pixels = load_digits().images  # (1797, 8, 8) in 0..16
    h, w = image_size
    # Bilinear with pixels as areas: PyTorch's F.interpolate(align_corners=False).
    factors = (1, h / pixels.shape[1], w / pixels.shape[2])
    pixels = zoom(pixels, factors, order=1, mode="nearest", grid_mode=True)
    return (pixels / 8 - 1).astype(np.float32)


def _mnist_file(root: Path) -> Path:
    folder = root / "MNIST" / "raw"  # where torchvision puts it
    if not (folder / MNIST_FILE).is_file():
        try:
            from torchvision.datasets import MNIST
        except ImportError as error:
            raise ImportError(
                "the data set 'mnist' needs torchvision to download it: "
                "python -m pip install torchvision"
            ) from error
        try:
            MNIST(root, train=True, download=True)
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"could not download MNIST to {folder}: {error}\nWithout a network, use the data "
                f"set 'digits', or put {MNIST_FILE} there yourself, or give the path to it"
            ) from error
    return folder / MNIST_FILE


def _local_file(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.is_dir():
        for name in (MNIST_FILE, MNIST_FILE + ".gz"):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"the folder {path} holds neither {MNIST_FILE} nor {MNIST_FILE}.gz")
    if path.is_file():
        return path
    if isinstance(source, str) and path.name == source and not path.suffix:
        raise ValueError(
            f"unknown data set {source!r}: choose one of {', '.join(map(repr, DATASETS))}, "
            "or give the path to an IDX file"
        )
    raise FileNotFoundError(f"there is no image file {path}")


def _read_idx(path: Path) -> Images:
    """Images (N, H, W) in [-1, 1] from an IDX file: two zero bytes, type, rank, sizes, numbers."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_DTYPES:
        raise ValueError(f"{path} is not an IDX file of bytes or floats")
    dtype, rank = _IDX_DTYPES[content[2]], content[3]
    if rank != 3:
        raise ValueError(f"{path} holds no images: its rank is {rank}, images (N, H, W) have 3")
    start = 4 + 4 * rank
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) < start or len(content) != expected:
        raise ValueError(
            f"{path} is truncated or damaged: it has {len(content)} bytes, "
            f"but {expected} are in {shape[0]} images of {shape[1]} x {shape[2]}"
        )
    numbers = np.frombuffer(content, dtype, offset=start).reshape(shape).astype(np.float32)
    return numbers / np.float32(127.5) - 1 if dtype.kind == "u" else numbers
