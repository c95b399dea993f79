"""Images to train on: real digits and photographs without a network, MNIST, or your own files.

Sources
    Document 002 loads MNIST through torchvision and maps it to [-1, 1], the range of the
    generator's tanh; documents 001 and 000 leave the mapping out (ERRATA.md 001-E10). The default
    here needs no download: the 1,797 scans of 8 x 8 pixels that scikit-learn ships (Alpaydin and
    Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", test part). Documents 000, 003 and
    004 want colour and name no data: scikit-learn also ships two photographs of 427 x 640 pixels.

All images are NumPy, (N, H, W, C), float32 in [-1, 1]. Libraries are imported where they are used.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_impl.images import SUFFIXES, Pixels, cover, read_image, to_float

Images = NDArray[np.float32]
Labels = NDArray[np.int32]

DATASETS = ("digits", "mnist", "photos")
PHOTOGRAPHS = ("china", "flower")
MNIST_FILE = "train-images-idx3-ubyte"
PATCHES = 2048

# IDX type codes that images come in: bytes 0..255, or numbers that are in [-1, 1] already.
_IDX_DTYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}


class Dataset(NamedTuple):
    """Images (N, H, W, C) in [-1, 1], and the class 0, 1, ... of each, (N,), where it is known."""

    images: Images
    labels: Labels | None


def load_images(
    source: str | os.PathLike[str] = "digits",
    image_size: tuple[int, int] = (28, 28),
    root: str | os.PathLike[str] = "data",
) -> Images:
    """The images of :func:`load_dataset`, as they are: neither converted nor resized."""
    return load_dataset(source, image_size, root=root, resize=False).images


def load_dataset(
    source: str | os.PathLike[str] = "digits",
    image_size: tuple[int, int] = (28, 28),
    channels: int | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    root: str | os.PathLike[str] = "data",
    resize: bool = True,
) -> Dataset:
    """Load images (N, H, W, C), float32 in [-1, 1], with ``(H, W) = image_size``, and labels.

    source
        ``"digits"``: scikit-learn's 1,797 digits, resized bilinearly to ``image_size``; labelled.
        ``"mnist"``: MNIST's 60,000 training images, 28 x 28, which torchvision downloads (11 MB)
        to ``root`` when they are not there; labelled.
        ``"photos"``: 2,048 square parts of scikit-learn's two photographs, place and scale drawn
        with ``seed``; colour.
        A path: an IDX file of images, gzipped or not, or a folder that holds MNIST's
        ``train-images-idx3-ubyte``. Bytes 0..255 are mapped to [-1, 1]; floats must lie there.
        Labelled if MNIST's file of labels lies beside it.
        A folder of PNG and JPEG files, in the order of their names: the middle of each, resized.
    channels
        None: what the data has. 1 or 3: converted to grey or colour.
    limit
        At most so many images: the first, or so many parts of the photographs.
    resize
        False: an IDX file of another size than ``image_size`` is an error.

    Raises
        ValueError: unknown name; an ``image_size``, ``channels`` or ``limit`` that cannot be; a
            file that is not IDX, not an image or is cut short; values that are NaN or outside
            [-1, 1]; image files that are too small, transparent, or some grey and some colour.
        FileNotFoundError: no such file. RuntimeError: the download failed.
        ImportError: scikit-learn, Pillow or torchvision is missing.
    """
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be two positive numbers (H, W), got {image_size}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 for grey or 3 for colour, got {channels}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}")
    labels = None
    if source == "digits":
        images, labels = _digits(image_size)
    elif source == "photos":
        images = _patches(limit or PATCHES, image_size, seed)
    elif source != "mnist" and (folder := _image_files(source)):
        images = _read_folder(folder[:limit], image_size, channels)
    else:
        path = _mnist_file(Path(root)) if source == "mnist" else _local_file(source)
        images, labels = _read_idx(path)[:limit, ..., None], _read_labels(path)
    if images.shape[1:3] != tuple(image_size) and not resize:
        h, w = images.shape[1:3]
        raise ValueError(
            f"the images of {os.fspath(source)!r} are {h} x {w}, but image_size asks for "
            f"{image_size[0]} x {image_size[1]}; only 'digits' and pictures are resized"
        )
    images = check_images(images[:limit])
    if images.shape[1:3] != tuple(image_size):
        images = _bilinear(images, image_size).clip(-1, 1)  # rounding can lead outside
    return Dataset(_convert(images, channels), None if labels is None else labels[:limit])


def load_picture(source: str | os.PathLike[str], channels: int | None = None) -> Pixels:
    """Bytes (H, W, C) of an image file, or of a photograph of scikit-learn's: "china", "flower".

    Raises as :func:`mlx_impl.images.read_image`.
    """
    if source in PHOTOGRAPHS:
        return _photographs()[PHOTOGRAPHS.index(str(source))]
    if not Path(source).exists() and not Path(source).suffix:
        raise FileNotFoundError(
            f"there is no image file {source}, and no photograph of that name: "
            f"{', '.join(PHOTOGRAPHS)}"
        )
    return read_image(source, channels)


def batches(images: Images, batch_size: int, rng: np.random.Generator) -> Iterator[Images]:
    """Shuffle images (N, H, W, C) with ``rng`` and yield full batches (batch_size, H, W, C).

    The ``N % batch_size`` images left over are dropped: a smaller last batch is another shape, for
    which a compiled step is traced and built again (ERRATA.md 002-E10).

    Raises ValueError at the call, not at the first batch: ``batch_size`` below 1 or above N, images
    that are NaN or outside [-1, 1].
    """
    check_images(images)
    order = batch_indices(len(images), batch_size, rng)
    return (images[chosen] for chosen in order)


def batch_indices(n: int, batch_size: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """An epoch's order: a row of ``batch_size`` indices below ``n`` for each full batch.

    Raises ValueError: ``batch_size`` below 1 or above ``n``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size > n:
        raise ValueError(f"batch_size {batch_size} is larger than the data set of {n} images")
    return rng.permutation(n)[: n - n % batch_size].reshape(-1, batch_size)


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


def _digits(image_size: tuple[int, int]) -> tuple[Images, Labels]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the data set 'digits' needs scikit-learn: python -m pip install scikit-learn"
        ) from error
    scans = load_digits()
    pixels = _bilinear(scans.images[..., None], image_size)  # (1797, H, W, 1) in 0..16
    return (pixels / 8 - 1).astype(np.float32), scans.target.astype(np.int32)


def _photographs() -> list[Pixels]:
    """(427, 640, 3) each, in the order of their names."""
    try:
        from sklearn.datasets import load_sample_images

        return load_sample_images().images  # read with Pillow
    except ImportError as error:
        raise ImportError(
            "the data set 'photos' needs scikit-learn and Pillow: "
            "python -m pip install scikit-learn pillow"
        ) from error


def _patches(n: int, image_size: tuple[int, int], seed: int) -> Images:
    """Parts of two photographs, from a quarter as wide as the picture is high up to its height."""
    photographs = _photographs()
    rng = np.random.default_rng(seed)
    patches = []
    for i in range(n):
        photograph = photographs[i % len(photographs)]
        h, w = photograph.shape[:2]
        side = int(h * 2 ** rng.uniform(-2, 0))
        top, left = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
        square = photograph[top : top + side, left : left + side]
        patches.append(cover(square, image_size))
    return to_float(np.stack(patches))


def _image_files(source: str | os.PathLike[str]) -> list[Path]:
    """The files of a folder without MNIST's file; empty if ``source`` is no such folder."""
    folder = Path(source)
    if not folder.is_dir() or any((folder / name).is_file() for name in _mnist_names()):
        return []
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def _read_folder(files: list[Path], image_size: tuple[int, int], channels: int | None) -> Images:
    pictures: list[Images] = []
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"{path} is neither {', '.join(SUFFIXES[:-1])} nor {SUFFIXES[-1]}: a folder of "
                "images must hold nothing else"
            )
        pixels = read_image(path, channels)
        h, w, c = pixels.shape
        if h < image_size[0] or w < image_size[1]:
            raise ValueError(
                f"{path} is {h} x {w}, smaller than the {image_size[0]} x {image_size[1]} asked "
                "for: take it out or ask for smaller images"
            )
        if pictures and c != pictures[0].shape[-1]:
            kinds = {1: "grey", 3: "colour"}
            raise ValueError(
                f"{path} is {kinds[c]}, but {files[0].name} is {kinds[pictures[0].shape[-1]]}: "
                "ask for 1 or 3 channels to convert them all"
            )
        pictures.append(to_float(cover(pixels, image_size)))
    return np.stack(pictures)


def _bilinear(images: NDArray[Any], image_size: tuple[int, int]) -> NDArray[Any]:
    """(N, H, W, C) at another size, with pixels as areas: F.interpolate(align_corners=False)."""

    def weights(size: int, out: int) -> NDArray[Any]:
        at = ((np.arange(out) + 0.5) * size / out - 0.5).clip(0, size - 1)
        distance = np.abs(at[:, None] - np.arange(size))
        return (1 - distance).clip(0).astype(images.dtype)  # (out, size), rows that sum to 1

    rows, columns = (weights(s, o) for s, o in zip(images.shape[1:3], image_size, strict=True))
    resized = np.einsum("pw,nhwc->nhpc", columns, images, optimize=True)
    return np.einsum("oh,nhpc->nopc", rows, resized, optimize=True)


def _convert(images: Images, channels: int | None) -> Images:
    if channels in (None, images.shape[-1]):
        return images
    if channels == 3:
        return images.repeat(3, axis=-1)
    luma = np.array([[0.299], [0.587], [0.114]], np.float32)  # ITU-R 601, as Pillow's
    return (images @ luma).clip(-1, 1)


def _mnist_names() -> tuple[str, str]:
    return MNIST_FILE, MNIST_FILE + ".gz"


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
        for name in _mnist_names():
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(
            f"the folder {path} holds neither {MNIST_FILE} nor {MNIST_FILE}.gz nor any image file"
        )
    if path.is_file():
        return path
    if isinstance(source, str) and path.name == source and not path.suffix:
        raise ValueError(
            f"unknown data set {source!r}: choose one of {', '.join(map(repr, DATASETS))}, "
            "or give the path to an IDX file or to a folder of images"
        )
    raise FileNotFoundError(f"there is no image file {path}")


def _read_labels(path: Path) -> Labels | None:
    """The labels beside a file of images, by MNIST's names, or None where there are none."""
    name = path.name.replace("images-idx3", "labels-idx1")
    stem = name.removesuffix(".gz")
    found = [path.with_name(n) for n in (stem, stem + ".gz") if path.with_name(n).is_file()]
    if name == path.name or not found:
        return None
    labels, n = _idx_numbers(found[0], 1, "labels"), len(_idx_numbers(path, 3, "images"))
    if len(labels) != n:
        raise ValueError(f"{found[0]} holds {len(labels)} labels for {n} images")
    return labels.astype(np.int32)


def _read_idx(path: Path) -> Images:
    """Images (N, H, W) in [-1, 1] from an IDX file."""
    numbers = _idx_numbers(path, 3, "images")
    return to_float(numbers) if numbers.dtype.kind == "u" else numbers.astype(np.float32)


def _idx_numbers(path: Path, rank: int, what: str) -> NDArray[Any]:
    """An IDX file's numbers: two zero bytes, type, rank, sizes (big-endian), numbers."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_DTYPES:
        raise ValueError(f"{path} is not an IDX file of bytes or floats")
    if content[3] != rank:
        raise ValueError(f"{path} holds no {what}: its rank is {content[3]}, {what} have {rank}")
    dtype, start = _IDX_DTYPES[content[2]], 4 + 4 * rank
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) < start:
        raise ValueError(f"{path} is truncated or damaged: it ends after {len(content)} bytes")
    if len(content) != expected:
        raise ValueError(
            f"{path} is truncated or damaged: it has {len(content)} bytes, "
            f"but {expected} are in {' x '.join(map(str, shape))} {what}"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape)
