"""Pictures are read as they are, written whole, and what cannot be read is named."""

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_impl.images import (
    cover,
    grid,
    plot_losses,
    read_image,
    replacing,
    to_float,
    to_pixels,
    write_png,
)
from tests.frameworks import run

Image = pytest.importorskip("PIL.Image")


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# Reading and writing


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read(tmp_path, channels):
    pixels = picture(5, 7, channels)
    write_png(tmp_path / "new" / "a.png", pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "new" / "a.png"), pixels)


def test_every_byte_survives_as_float():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(to_float(pixels)), pixels)
    assert (to_float(pixels).min(), to_float(pixels).max()) == (-1, 1)


def test_what_is_outside_the_range_is_cut_off_and_nan_is_refused():
    np.testing.assert_array_equal(to_pixels([-np.inf, -2, 0, 1.001, np.inf]), [0, 0, 128, 255, 255])
    with pytest.raises(ValueError, match="NaN among the pixels"):
        to_pixels([0, np.nan])


def test_colour_and_grey_are_converted_only_when_asked(tmp_path):
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 0] = 255
    write_png(tmp_path / "red.png", red)
    assert read_image(tmp_path / "red.png").shape == (2, 3, 3)
    np.testing.assert_array_equal(read_image(tmp_path / "red.png", 1), np.full((2, 3, 1), 76))
    write_png(tmp_path / "grey.png", red[..., :1])
    assert read_image(tmp_path / "grey.png").shape == (2, 3, 1)
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png", 3), np.full((2, 3, 3), 255))


def test_transparency_is_refused_or_put_onto_white(tmp_path):
    pixels = np.zeros((1, 2, 4), np.uint8)
    pixels[0, 1, 3] = 255  # black, once transparent, once not
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has transparent pixels: ask for 1 or 3 channels"):
        read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 1)[..., 0], [[255, 0]])


@pytest.mark.parametrize("mode", ["1", "P"])
def test_palettes_and_bitmaps(tmp_path, mode):
    Image.fromarray(picture(4, 5, 3)).convert(mode).save(tmp_path / "a.png")
    expected = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert read_image(tmp_path / "a.png").shape == (4, 5, 1 if mode == "1" else 3)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 3), expected)


def test_a_photograph_taken_on_its_side_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.fromarray(picture(16, 32, 3)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (32, 16, 3)


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(20)]
)
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png is not an image that Pillow can read"):
        read_image(tmp_path / "a.png")


def test_a_truncated_image_is_named(tmp_path):
    write_png(tmp_path / "a.png", picture(50, 50, 3))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:-500])
    with pytest.raises(ValueError, match=r"a\.png is not an image .*truncated"):
        read_image(tmp_path / "a.png")


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="mode 'I;16': save it as grey or RGB of 8 bits"):
        read_image(tmp_path / "a.png")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no image file .*a\.png"):
        read_image(tmp_path / "a.png")


def test_without_pillow_or_matplotlib_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        read_image(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_losses(tmp_path / "a.png", [{"epoch": 1, "loss": 1}])


# Resizing


@pytest.mark.parametrize("channels", [1, 3])
def test_cover_keeps_the_middle_and_the_proportions(channels):
    pixels = np.zeros((20, 60, channels), np.uint8)
    pixels[:, 20:40] = 200
    np.testing.assert_array_equal(cover(pixels, (20, 20)), np.full((20, 20, channels), 200))
    np.testing.assert_array_equal(cover(pixels, (20, 60)), pixels)
    upright = pixels.transpose(1, 0, 2)
    np.testing.assert_array_equal(cover(upright, (20, 20)), np.full((20, 20, channels), 200))
    reduced = cover(upright, (10, 10))[2:-2]  # at its edges the filter sees what was cut off
    assert np.abs(reduced.astype(int) - 200).max() <= 1


def test_reducing_averages_instead_of_picking():
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    reduced = cover(stripes, (8, 8))
    assert np.abs(reduced[:, 1:-1].astype(int) - 128).max() <= 2


# Grids


@given(
    n=st.integers(1, 12),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    columns=st.none() | st.integers(1, 12),
    scale=st.integers(1, 3),
)
def test_each_image_has_its_place_in_a_grid(n, size, columns, scale):
    images = np.linspace(-1, 1, n, dtype=np.float32)[:, None, None, None] * np.ones((*size, 1))
    made = grid(images, columns, scale=scale)
    side = columns or int(np.ceil(n**0.5))
    side = min(side, n)
    h, w = size[0] * scale + 2, size[1] * scale + 2
    assert made.shape == (-(-n // side) * h + 2, side * w + 2, 1)
    for i in range(n):
        top, left = i // side * h + 2, i % side * w + 2
        tile = made[top : top + h - 2, left : left + w - 2]
        np.testing.assert_array_equal(tile, np.full_like(tile, to_pixels(images[i, 0, 0])[0]))
    assert (made[:2] == 255).all()


# Plots and files written whole


def test_a_plot_is_a_picture(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's own, on its first import
        plot_losses(tmp_path / "a.png", [{"step": i, "d": i, "g": 1 / i} for i in (1, 2)], log=True)
    assert read_image(tmp_path / "a.png", 3).std() > 5


def test_a_plot_opens_no_window(tmp_path):
    """pyplot is what would; without it matplotlib draws into the file alone."""
    code = (
        "import sys; from pathlib import Path; from mlx_impl.images import plot_losses; "
        "plot_losses(Path('a.png'), [{'step': i, 'd': i} for i in (1, 2)]); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert run(code, tmp_path).stdout == "False\n"


def test_a_file_that_was_not_finished_leaves_the_one_before(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            assert path.read_text() == "before"
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "before"
    with replacing(path) as partial:
        partial.write_text("after")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "after"


def test_images_are_imported_without_their_libraries(tmp_path):
    import subprocess

    code = "import sys, mlx_impl.images; print({'PIL', 'matplotlib', 'torch'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert out.stdout == "set()\n"
