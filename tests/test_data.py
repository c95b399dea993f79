"""Images arrive whole, in the right range and layout, and bad input says what is wrong with it."""

import gzip
import hashlib
import struct
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mlx_impl.data import MNIST_FILE, batches, load_dataset, load_images, load_picture
from mlx_impl.images import write_png

UBYTE, FLOAT32 = 0x08, 0x0D


def idx(numbers: np.ndarray, type_code: int = UBYTE) -> bytes:
    """``numbers`` as an IDX file."""
    header = struct.pack(f">2xBB{numbers.ndim}I", type_code, numbers.ndim, *numbers.shape)
    return header + numbers.tobytes()


@pytest.fixture
def scans() -> np.ndarray:
    """Seven images of 3 x 5 bytes, every value different, 0 and 255 among them."""
    numbers = np.arange(7 * 3 * 5, dtype=np.uint8).reshape(7, 3, 5)
    numbers[-1, -1, -1] = 255
    return numbers


@pytest.fixture
def scan_file(tmp_path: Path, scans: np.ndarray) -> Path:
    path = tmp_path / "scans.idx"
    path.write_bytes(idx(scans))
    return path


# Digits


def test_digits_are_all_there_in_nhwc_and_fill_the_range():
    images = load_images()
    assert images.shape == (1797, 28, 28, 1)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (-1, 1)


def test_digits_at_their_own_size_are_the_scans():
    from sklearn.datasets import load_digits

    np.testing.assert_array_equal(
        load_images("digits", (8, 8))[..., 0], (load_digits().images / 8 - 1).astype(np.float32)
    )


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (32, 20), (9, 3), (1, 1)])
def test_digits_are_resized_as_pytorch_does(size):
    from sklearn.datasets import load_digits

    scans = torch.tensor(load_digits().images)[:, None]  # (N, C, H, W), float64
    expected = F.interpolate(scans, size, mode="bilinear", align_corners=False)[:, 0] / 8 - 1
    images = load_images("digits", size)[..., 0]
    # Both resize in float64, with a few roundings of numbers up to 2; then rounding to float32
    # costs half a unit in the last place below 1.
    np.testing.assert_allclose(images, expected, rtol=0, atol=2.0**-25 + 8 * 2.0**-52)


# Local files


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("as_text", [str, Path], ids=["str", "Path"])
def test_idx_file_is_mapped_from_bytes_to_unit_range(tmp_path, scans, compress, as_text):
    path = tmp_path / "scans"  # what it is shows in its first bytes, not in its name
    path.write_bytes(compress(idx(scans)))
    images = load_images(as_text(path), (3, 5))
    assert images.shape == (7, 3, 5, 1)
    assert images.dtype == np.float32
    assert images[0, 0, 0, 0] == -1
    assert images[-1, -1, -1, 0] == 1
    # Two float32 operations on a value of up to 2.
    np.testing.assert_allclose(images[..., 0], scans / 127.5 - 1, rtol=0, atol=2.0**-23)


def test_range_is_document_002s(tmp_path, scans, scan_file):
    """ToTensor divides by 255, Normalize((0.5,), (0.5,)) subtracts and divides by 0.5."""
    from torchvision import transforms

    as_documented = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    )
    expected = np.stack([as_documented(scan)[0].numpy() for scan in scans])  # (N, H, W)
    images = load_images(scan_file, (3, 5))[..., 0]
    np.testing.assert_allclose(images, expected, rtol=0, atol=2.0**-23)


@pytest.mark.parametrize("name", [MNIST_FILE, MNIST_FILE + ".gz"])
def test_folder_with_mnists_file(tmp_path, scans, name):
    content = idx(scans)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert load_images(tmp_path, (3, 5)).shape == (7, 3, 5, 1)


def test_float_idx_file_is_taken_as_it_is(tmp_path):
    numbers = np.linspace(-1, 1, 12, dtype=">f4").reshape(2, 2, 3)
    (tmp_path / "floats").write_bytes(idx(numbers, FLOAT32))
    images = load_images(tmp_path / "floats", (2, 3))
    assert images.dtype == np.dtype("=f4")
    np.testing.assert_array_equal(images[..., 0], numbers)


# Labels, colours, sizes


def test_digits_are_labelled():
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits", (8, 8))
    np.testing.assert_array_equal(dataset.labels, load_digits().target)
    assert dataset.labels.dtype == np.int32


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_mnists_labels_are_read_where_they_lie_beside_the_images(tmp_path, scans, compress):
    (tmp_path / MNIST_FILE).write_bytes(idx(scans))
    assert load_dataset(tmp_path, (3, 5)).labels is None
    name = "train-labels-idx1-ubyte" + (".gz" if compress is gzip.compress else "")
    (tmp_path / name).write_bytes(compress(idx(np.arange(7, dtype=np.uint8))))
    np.testing.assert_array_equal(load_dataset(tmp_path, (3, 5)).labels, np.arange(7))
    np.testing.assert_array_equal(load_dataset(tmp_path, (3, 5), limit=2).labels, [0, 1])


def test_labels_of_other_images_are_refused(tmp_path, scans):
    (tmp_path / MNIST_FILE).write_bytes(idx(scans))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(6, dtype=np.uint8)))
    with pytest.raises(ValueError, match="holds 6 labels for 7 images"):
        load_dataset(tmp_path, (3, 5))


def test_an_idx_file_is_resized_by_a_data_set_and_by_nothing_else(scan_file, scans):
    images = load_dataset(scan_file, (6, 10)).images
    expected = F.interpolate(
        torch.tensor(scans)[:, None] / 127.5 - 1, (6, 10), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(images[..., 0], expected[:, 0], rtol=0, atol=2.0**-22)
    with pytest.raises(ValueError, match="only 'digits' and pictures are resized"):
        load_images(scan_file, (6, 10))


def test_channels_are_converted_when_asked():
    grey = load_dataset("digits", (8, 8), limit=5).images
    np.testing.assert_array_equal(
        load_dataset("digits", (8, 8), 3, limit=5).images, np.concatenate([grey] * 3, axis=-1)
    )
    assert load_dataset("photos", (8, 8), 1, limit=4).images.shape == (4, 8, 8, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"channels": 2}, "channels must be 1 for grey or 3"), ({"limit": 0}, "limit must be at le")],
)
def test_impossible_channels_and_limits(wrong, message):
    with pytest.raises(ValueError, match=message):
        load_dataset("digits", **wrong)


# Photographs


def test_photographs_are_drawn_with_a_seed():
    images = load_dataset("photos", (16, 24), limit=6).images
    assert images.shape == (6, 16, 24, 3)
    assert images.dtype == np.float32
    assert images.std() > 0.2
    assert load_dataset("photos", (16, 24), limit=6).labels is None
    np.testing.assert_array_equal(load_dataset("photos", (16, 24), limit=6).images, images)
    assert (load_dataset("photos", (16, 24), limit=6, seed=1).images != images).any()


@pytest.fixture
def album(tmp_path) -> Path:
    """Three colour pictures of 12 x 10, plain red, green and blue."""
    folder = tmp_path / "album"
    for i, name in enumerate(["a.png", "b.jpg", "C.JPEG"]):
        pixels = np.zeros((12, 10, 3), np.uint8)
        pixels[..., i] = 255
        write_png(folder / f"{i}.png", pixels)
        if name != "a.png":
            from PIL import Image

            Image.fromarray(pixels).save(folder / name, "jpeg", quality=100)
            (folder / f"{i}.png").unlink()
    return folder


def test_a_folder_of_images_in_the_order_of_names(album):
    images = load_dataset(album, (8, 8)).images
    assert images.shape == (3, 8, 8, 3)
    strongest = images.mean((1, 2)).argmax(-1)
    np.testing.assert_array_equal(strongest, [0, 2, 1])  # 0.png, C.JPEG, b.jpg
    assert load_dataset(album, (8, 8), 1).images.shape == (3, 8, 8, 1)
    assert load_dataset(album, (8, 8), limit=2).images.shape == (2, 8, 8, 3)


def test_a_file_that_is_no_image_is_named(album):
    (album / "notes.txt").write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.txt is neither \.png, \.jpg nor \.jpeg"):
        load_dataset(album, (8, 8))
    (album / "notes.txt").rename(album / "notes.png")
    with pytest.raises(ValueError, match=r"notes\.png is not an image that Pillow can read"):
        load_dataset(album, (8, 8))


def test_an_image_that_is_too_small_is_named(album):
    with pytest.raises(ValueError, match=r"0\.png is 12 x 10, smaller than the 16 x 8 asked for"):
        load_dataset(album, (16, 8))


def test_grey_among_colour_needs_a_decision(album):
    write_png(album / "grey.png", np.zeros((12, 10, 1), np.uint8))
    with pytest.raises(
        ValueError, match=r"grey\.png is grey, but 0\.png is colour: ask for 1 or 3"
    ):
        load_dataset(album, (8, 8))
    assert load_dataset(album, (8, 8), 3).images.shape == (4, 8, 8, 3)


def test_a_picture_is_a_file_or_a_photograph(album):
    assert load_picture("china").shape == load_picture("flower").shape == (427, 640, 3)
    assert (load_picture("china") != load_picture("flower")).any()
    assert load_picture(album / "0.png").shape == (12, 10, 3)
    assert load_picture(str(album / "0.png"), 1).shape == (12, 10, 1)
    with pytest.raises(FileNotFoundError, match="no photograph of that name: china, flower"):
        load_picture("dahlia")


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nor any image file"):
        load_dataset(tmp_path)


# MNIST through torchvision, on files of its own layout


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Say nothing on standard error."""


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder with MNIST's four files, small, served to torchvision in place of the real ones."""
    from torchvision.datasets import MNIST

    folder = tmp_path / "mirror"
    folder.mkdir()
    scans = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    resources = []
    for part in ("train", "t10k"):
        for kind, numbers in ("images-idx3", scans), ("labels-idx1", np.arange(5, dtype=np.uint8)):
            name, content = f"{part}-{kind}-ubyte.gz", gzip.compress(idx(numbers))
            (folder / name).write_bytes(content)
            resources.append((name, hashlib.md5(content, usedforsecurity=False).hexdigest()))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(MNIST, "resources", resources)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def test_mnist_that_is_there_is_not_downloaded(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [])
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    scans = np.full((2, 28, 28), 255, np.uint8)
    (raw / MNIST_FILE).write_bytes(idx(scans))
    np.testing.assert_array_equal(load_images("mnist", root=tmp_path), np.ones((2, 28, 28, 1)))


def test_mnist_is_downloaded_when_absent_and_read_as_torchvision_reads_it(tmp_path, mirror):
    from torchvision.datasets import MNIST

    images = load_images("mnist", root=tmp_path / "root")
    assert images.shape == (5, 28, 28, 1)
    theirs = MNIST(tmp_path / "root", train=True).data.numpy()
    np.testing.assert_array_equal(np.rint((images[..., 0] + 1) * 127.5), theirs)


ADVICE = rf"(?s)could not download MNIST to .*use the data set 'digits', or put {MNIST_FILE} the"


def test_download_without_a_network_says_what_to_do_instead(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [(tmp_path / "unreachable").as_uri() + "/"])
    with pytest.raises(RuntimeError, match=ADVICE):
        load_images("mnist", root=tmp_path / "root")


def test_download_that_breaks_off_says_so_and_works_the_next_time(tmp_path, mirror):
    file = mirror / (MNIST_FILE + ".gz")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(RuntimeError, match=ADVICE):
        load_images("mnist", root=tmp_path / "root")
    file.write_bytes(content)
    assert load_images("mnist", root=tmp_path / "root").shape == (5, 28, 28, 1)


# Bad input


@pytest.mark.parametrize(
    ("source", "missing", "package"),
    [
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("mnist", "torchvision.datasets", "torchvision"),
        ("photos", "sklearn.datasets", "scikit-learn"),
    ],
)
def test_missing_library_is_named(tmp_path, monkeypatch, source, missing, package):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"'{source}' needs .*pip install {package}"):
        load_images(source, root=tmp_path)


def test_unknown_data_set_names_those_there_are():
    with pytest.raises(ValueError, match=r"unknown data set 'minst': choose one of 'digits', 'mni"):
        load_images("minst")


@pytest.mark.parametrize("source", ["no/such.idx", "such.gz", Path("such")])
def test_missing_file(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no image file {source}"):
        load_images(source)


def test_folder_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"folder .* holds neither {MNIST_FILE} nor"):
        load_images(tmp_path)


@pytest.mark.parametrize("kept", [-1, 17, 9, 4])
@pytest.mark.parametrize("source", ["path", "mnist"])
def test_truncated_file(tmp_path, scans, kept, source):
    path = tmp_path / "MNIST" / "raw" / MNIST_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(idx(scans)[:kept])
    said = rf"{MNIST_FILE} is truncated or damaged: it (has|ends after) \d+ byt"
    with pytest.raises(ValueError, match=said):
        load_images(path if source == "path" else "mnist", (3, 5), root=tmp_path)


def test_file_with_bytes_left_over(tmp_path, scans):
    (tmp_path / "long").write_bytes(idx(scans) + b"\0")
    with pytest.raises(ValueError, match="long is truncated or damaged: it has 122 bytes, but 121"):
        load_images(tmp_path / "long", (3, 5))


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-9], lambda b: b[:12], lambda b: b[:-8] + bytes(8)],
    ids=["cut at the end", "cut in the header", "wrong checksum"],
)
def test_damaged_gzip(tmp_path, scans, damage):
    (tmp_path / "scans.gz").write_bytes(damage(gzip.compress(idx(scans))))
    with pytest.raises(ValueError, match=r"scans\.gz is truncated or damaged"):
        load_images(tmp_path / "scans.gz", (3, 5))


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\x89PNG\r\n\x1a\n" + bytes(99), bytes(99)])
def test_other_file(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match="other is not an IDX file of bytes or floats"):
        load_images(tmp_path / "other")


def test_labels_are_not_images(tmp_path):
    (tmp_path / "labels").write_bytes(idx(np.arange(9, dtype=np.uint8)))
    with pytest.raises(ValueError, match="labels holds no images: its rank is 1"):
        load_images(tmp_path / "labels")


@pytest.mark.parametrize("size", [(28, 28), (5, 3)])
def test_file_of_another_image_size(scan_file, size):
    h, w = size
    with pytest.raises(
        ValueError, match=f"scans.idx' are 3 x 5, but image_size asks for {h} x {w}"
    ):
        load_images(scan_file, size)


@pytest.mark.parametrize("size", [(0, 28), (28, -1), (28,), (1, 28, 28)])
def test_impossible_image_size(size):
    with pytest.raises(ValueError, match=r"image_size must be two positive numbers \(H, W\), got"):
        load_images("digits", size)


def test_nan_in_a_file(tmp_path):
    numbers = np.zeros((4, 2, 2), ">f4")
    numbers[1, 0, 1] = numbers[3] = np.nan
    (tmp_path / "nan").write_bytes(idx(numbers, FLOAT32))
    with pytest.raises(ValueError, match="NaN in 2 of 4 images"):
        load_images(tmp_path / "nan", (2, 2))


@pytest.mark.parametrize("value", [-1.5, 1.0000001, np.inf])
def test_values_out_of_range_in_a_file(tmp_path, value):
    numbers = np.full((1, 1, 2), [0, value], ">f4")
    (tmp_path / "far").write_bytes(idx(numbers, FLOAT32))
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\], got values from"):
        load_images(tmp_path / "far", (1, 2))


def test_file_of_no_images(tmp_path):
    (tmp_path / "none").write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
    with pytest.raises(ValueError, match=r"none of them 0, got shape \(0, 28, 28, 1\)"):
        load_images(tmp_path / "none")


# Batches


@given(n=st.integers(1, 30), batch_size=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
def test_batches_are_full_and_hold_no_image_twice(n, batch_size, seed):
    if batch_size > n:
        n, batch_size = batch_size, n
    images = np.linspace(-1, 1, n, dtype=np.float32).reshape(n, 1, 1, 1)
    drawn = list(batches(images, batch_size, np.random.default_rng(seed)))
    assert len(drawn) == n // batch_size
    assert {b.shape for b in drawn} == {(batch_size, 1, 1, 1)}
    assert all(b.dtype == np.float32 for b in drawn)
    values = np.concatenate(drawn).ravel()
    assert len(set(values)) == len(drawn) * batch_size
    assert set(values) <= set(images.ravel())


def test_order_is_the_generators():
    images = np.linspace(-1, 1, 50, dtype=np.float32).reshape(50, 1, 1, 1)

    def order(seed):
        return np.concatenate(list(batches(images, 10, np.random.default_rng(seed)))).ravel()

    np.testing.assert_array_equal(order(1), order(1))
    assert (order(1) != order(2)).any()
    assert (order(1) != images.ravel()).any()
    np.testing.assert_array_equal(np.sort(order(1)), images.ravel())


def test_epochs_differ_and_the_images_stay_as_they_were():
    images = np.linspace(-1, 1, 50, dtype=np.float32).reshape(50, 1, 1, 1)
    before, rng = images.copy(), np.random.default_rng(0)
    first, second = (np.concatenate(list(batches(images, 25, rng))) for _ in range(2))
    assert (first != second).any()
    first[:] = 0
    np.testing.assert_array_equal(images, before)


# These raise at the call: a generator would only do so at its first batch.


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        batches(np.zeros((5, 1, 1, 1), np.float32), batch_size, np.random.default_rng(0))


def test_batch_larger_than_the_data_set():
    with pytest.raises(ValueError, match="batch_size 6 is larger than the data set of 5 images"):
        batches(np.zeros((5, 1, 1, 1), np.float32), 6, np.random.default_rng(0))


def test_nan_in_the_images():
    images = np.zeros((5, 2, 2, 1), np.float32)
    images[3, 1, 0] = np.nan
    with pytest.raises(ValueError, match="NaN in 1 of 5 images"):
        batches(images, 2, np.random.default_rng(0))


def test_images_that_were_not_scaled():
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], got values from 0.0 to 255.0"):
        batches(np.array([0, 255], np.float32).reshape(2, 1, 1, 1), 1, np.random.default_rng(0))
