"""``python -m mlx_impl stylize``: the picture, its losses, and the weights it is made with."""

import csv
import os
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_impl.__main__ as cli
import mlx_impl.stylize
from mlx_impl.images import read_image, write_png
from mlx_impl.stylize import generated_picture, random_weights
from mlx_impl.vgg import VGG
from mlx_impl.vgg_weights import Weights, read_weights, save_weights
from tests.frameworks import EPS

CHANNELS = (2, 3, 2, 3, 2)


@pytest.fixture(autouse=True)
def narrow_vgg(monkeypatch):
    monkeypatch.setattr(mlx_impl.stylize, "VGG", partial(VGG, channels=CHANNELS))
    monkeypatch.setattr(cli, "_use_fast_blas", lambda console: None)  # it outlasts a test
    mx.disable_compile()  # g++ takes seconds for steps that take milliseconds
    yield
    mx.enable_compile()


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """A content of 24 x 40 in colour and a style of 30 x 20 in grey."""
    rng = np.random.default_rng(0)
    write_png(tmp_path / "content.png", rng.integers(0, 256, (24, 40, 3), np.uint8))
    write_png(tmp_path / "style.png", rng.integers(0, 256, (30, 20, 1), np.uint8))
    return [tmp_path / "content.png", tmp_path / "style.png"]


def stylize(*arguments: str | os.PathLike[str], weights: str = "random") -> int:
    try:
        return cli.main(["stylize", *map(os.fspath, arguments), "--weights", weights])
    except SystemExit as error:
        return int(error.code)


def refused(capsys, *arguments: str | os.PathLike[str], weights: str = "random") -> str:
    assert stylize(*arguments, weights=weights) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_picture_its_losses_and_their_plot(pictures, tmp_path, capsys):
    out = tmp_path / "made" / "picture.png"
    assert stylize(*pictures, "--steps", "3", "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert set(os.listdir(out.parent)) == {
        "picture.png",
        "picture-losses.csv",
        "picture-losses.png",
    }
    made, content = read_image(out), read_image(pictures[0])
    assert made.shape == content.shape
    changed = np.abs(made.astype(int) - content)
    assert 0 < changed.max() <= 3 * 0.03 * 255  # three steps of about the learning rate
    with (out.parent / "picture-losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["content_loss"]) == 0  # it starts from the content
    totals = [sum(float(row[n]) for n in mlx_impl.stylize.NAMES) for row in rows]
    assert totals[2] < totals[0]


def test_the_same_again(pictures, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        given = ["--steps", "2", "--seed", seed, "--out", tmp_path / f"{name}.png"]
        assert stylize(*pictures, *given) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def losses(out: Path) -> list[dict[str, float]]:
    with out.with_name(f"{out.stem}-losses.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_started_from_noise(pictures, tmp_path):
    """It lies where the noise does, not where the content does, which is then far off."""
    made = {}
    for name, seed in (("a", 0), ("b", 1)):
        out = tmp_path / f"{name}.png"
        given = ["--start", "noise", "--steps", "1", "--seed", str(seed), "--out", out]
        assert stylize(*pictures, *given) == 0
        assert losses(out)[0]["content_loss"] > 0
        noise = mx.random.uniform(shape=(1, 24, 40, 3), key=mx.random.key(seed))
        made[name] = read_image(out)
        off = np.abs(made[name] / 255 - np.array(noise[0]))
        assert off.max() < 0.02 + 2 / 255  # one step of the learning rate, and a byte's width
    assert (made["a"] != made["b"]).any()


def test_the_documents_extractor_and_its_generated_content(pictures, tmp_path):
    """All of document 003: its three convolutions, and its last section's content."""
    made = []
    for seed in ("0", "1"):
        out = tmp_path / f"{seed}.png"
        given = ["--steps", "2", "--seed", seed, "--out", out]
        assert stylize("generated", pictures[1], *given, weights="document") == 0
        assert losses(out)[0]["content_loss"] == 0
        assert losses(out)[1]["style_loss"] < losses(out)[0]["style_loss"]
        made.append(read_image(out))
    assert made[0].shape == made[1].shape == (64, 64, 3)
    assert (made[0] != made[1]).any()
    assert (np.abs(made[0].astype(int) - generated_picture(0)) <= 2 * 0.021 * 255 + 1).all()


PAINTED = ["--start", "noise", "--steps", "2"]


@pytest.mark.parametrize(
    "given",
    [
        ["--size", "32"],
        ["--steps", "3"],
        ["--levels", "2"],
        ["--start", "content"],
        ["--content-weight", "2"],
        ["--style-weight", "2"],
        ["--variation-weight", "2"],
        ["--learning-rate", "0.01"],
        ["--pooling", "max"],
        ["--seed", "1"],
        ["--dtype", "bfloat16"],
    ],
    ids=lambda given: given[0],
)
def test_no_option_is_ignored(tmp_path, given):
    made, pictures = [], [tmp_path / "content.png", tmp_path / "style.png"]
    for seed, path in enumerate(pictures):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), np.uint8)
        write_png(path, pixels)
    for name, options in (("a", []), ("b", given)):
        out = tmp_path / f"{name}.png"
        assert stylize(*pictures, *PAINTED, *options, "--out", out) == 0
        made.append((read_image(out).tobytes(), losses(out)))
    assert made[0][0] != made[1][0]
    weights = {"--content-weight": 1.0, "--style-weight": 1e3}
    if given[0] in weights:  # the first step's losses are of the same picture
        name = given[0].removeprefix("--").replace("weight", "loss").replace("-", "_")
        one, two = (history[0][name] for _, history in made)
        assert two == pytest.approx(one * 2 / weights[given[0]], rel=4 * EPS)


def test_every_option_of_painting_is_tried():
    (tried,) = (
        mark.args[1] for mark in test_no_option_is_ignored.pytestmark if mark.name == "parametrize"
    )
    assert {given[0] for given in tried} == {f"--{o.name.replace('_', '-')}" for o in cli.PAINTING}


def test_a_large_picture_is_reduced_and_painted_at_several_sizes(tmp_path):
    out = tmp_path / "a.png"
    given = ["--size", "51", "--steps", "1", "--levels", "2", "--out", out]
    assert stylize("china", "flower", *given) == 0
    assert read_image(out).shape == (34, 50, 3)  # of 427 x 640, both even
    assert len((tmp_path / "a-losses.csv").read_text().splitlines()) == 3


def test_what_is_there_is_not_overwritten_unless_asked(pictures, tmp_path, capsys):
    out = tmp_path / "a.png"
    (tmp_path / "a-losses.csv").write_text("mine")
    message = refused(capsys, *pictures, "--out", out)
    assert "a-losses.csv is there already: replace it (--overwrite)" in message
    assert stylize(*pictures, "--steps", "1", "--out", out, "--overwrite") == 0


def test_bad_input(pictures, tmp_path, capsys):
    content, style = pictures
    out = ["--out", tmp_path / "a.png"]
    (tmp_path / "notes.png").write_text("not a picture")
    write_png(tmp_path / "tiny.png", np.zeros((3, 40, 3), np.uint8))
    for arguments, message in (
        ([content, "no.png", *out], "there is no image file no.png"),
        ([content, "dahlia", *out], "no photograph of that name: china, flower"),
        ([content, tmp_path / "notes.png", *out], "notes.png is not an image that Pillow can"),
        ([content, style, *out, "--size", "8"], "size must be at least 16 with 1 levels, got 8"),
        ([content, style, *out, "--steps", "0"], "0 is not at least 1"),
        ([content, style, *out, "--levels", "0"], "0 is not at least 1"),
        ([content, style, *out, "--learning-rate", "-1"], "-1 is not above 0"),
        ([content, style, *out, "--style-weight", "nan"], "nan is not a number from 0 on"),
        ([content, tmp_path / "tiny.png", *out], "style: images of 3 x 40 are too small"),
        ([content, style, *out, "--start", "white"], "invalid choice: 'white'"),
        ([content, style, "--out", tmp_path / "a.jpg"], "does not end in .png"),
    ):
        assert message in refused(capsys, *arguments), message
    message = refused(capsys, content, style, *out, weights="no.pth")
    assert "there are no weights at no.pth" in message
    message = refused(capsys, content, style, *out, weights="vgg11")
    assert "none of vgg16, vgg19, random and document" in message
    for pooling in ("avg", "max"):
        message = refused(capsys, content, style, *out, "--pooling", pooling, weights="document")
        assert f"pooling {pooling} was asked for, which only VGG lets you choose" in message
        assert "leave pooling out, or take other weights" in message
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    message = refused(capsys, content, style, *out, weights=str(tmp_path / "broken.pth"))
    assert "broken.pth cannot be read, is it damaged? it is no file of tensors" in message
    assert "weights_only" not in message
    assert not (tmp_path / "a.png").exists()


# Weights


def test_the_weights_of_a_file(pictures, tmp_path):
    """Found by :func:`read_weights`, which is tested for itself, and not the random ones."""
    other = VGG("vgg19", channels=CHANNELS)
    random_weights(other, 1)
    save_weights(other, tmp_path / "vgg.safetensors")
    made = {}
    for name, weights, seed in (
        ("file", str(tmp_path / "vgg.safetensors"), "0"),
        ("same", "random", "1"),
        ("other", "random", "0"),
    ):
        given = ["--steps", "2", "--seed", seed, "--out", tmp_path / f"{name}.png"]
        assert stylize(*pictures, *given, weights=weights) == 0
        made[name] = (tmp_path / f"{name}.png").read_bytes()
    assert made["file"] == made["same"]
    assert made["file"] != made["other"]


@pytest.mark.parametrize("config", ["vgg16", "vgg19"])
def test_torchvisions_weights_are_fetched_by_name(pictures, tmp_path, monkeypatch, config):
    def fetched(asked: str) -> Weights:
        assert asked == config
        made = VGG(asked, channels=CHANNELS)
        return read_weights(save(made, tmp_path / "fetched.safetensors"))

    def save(vgg: VGG, path: Path) -> Path:
        save_weights(vgg, path)
        return path

    monkeypatch.setattr(mlx_impl.stylize, "download_weights", fetched)
    given = ["--steps", "1", "--out", tmp_path / "a.png"]
    assert stylize(*pictures, *given, weights=config) == 0


def test_random_weights_keep_the_size_of_features():
    extractor = VGG("vgg19", taps=("relu1_1", "relu5_1"), channels=(32,) * 5, pooling="avg")
    random_weights(extractor, 0)
    features = extractor(mx.random.uniform(shape=(1, 64, 64, 3), key=mx.random.key(0)))
    first, last = (float(np.square(np.array(features[t])).mean()) for t in extractor.taps)
    assert 0.01 < last / first < 10
