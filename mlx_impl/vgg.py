"""VGG-16 and VGG-19 up to their last convolution, with taps by name, in MLX.

Sources
    Simonyan and Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition" (arXiv 1409.1556), Table 1, configurations D and E.
    Gatys, Ecker and Bethge 2016, "Image Style Transfer Using Convolutional Neural Networks" (CVPR),
    section 2: which layers, and average for maximum pooling.
    Document 003, whose class ``VGG19`` is three convolutions: ERRATA.md 003-E3 to 003-E5.

A tap is the output of a convolution (``conv4_2``) or of the ReLU behind it (``relu4_2``). The
paper speaks of filter responses; its authors' code and all that followed take them behind the ReLU,
and so does the default here.
"""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.layers import Conv2d, once, relu

BLOCKS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
"""Convolutions in each block."""

CHANNELS = (64, 128, 256, 512, 512)
"""Channels of each block."""

GATYS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1", "relu4_2")
"""Gatys et al. section 3: five layers for the style, the last for the content."""


@dataclass(frozen=True)
class Preprocessing:
    """From RGB in [0, 1] to what a set of weights was trained on: ``(scale * x - mean) / std``.

    It belongs to the weights, not to the network: fed with another's, features are plausible and
    wrong. ``mean`` and ``std`` are in the network's order of channels, reversed where ``bgr``.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scale: float = 1.0
    bgr: bool = False

    def __call__(self, images: mx.array) -> mx.array:
        """Images (B, H, W, 3), RGB in [0, 1]; the result has the same shape."""
        x = images[..., ::-1] if self.bgr else images
        mean = mx.array(self.mean, dtype=x.dtype)
        std = mx.array(self.std, dtype=x.dtype)
        return (self.scale * x - mean) / std


TORCHVISION = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What torchvision's ImageNet weights expect."""

CAFFE = Preprocessing(mean=(103.939, 116.779, 123.68), scale=255.0, bgr=True)
"""What the original weights, and Keras' copy of them, expect."""


def convolutions(config: str) -> list[str]:
    """Names of the convolutions of ``"vgg16"`` or ``"vgg19"``, first to last: ``conv1_1``, ...

    Raises ValueError on another name.
    """
    if config not in BLOCKS:
        raise ValueError(f"config must be one of {', '.join(BLOCKS)}, got {config!r}")
    return [f"conv{b}_{i + 1}" for b, n in enumerate(BLOCKS[config], start=1) for i in range(n)]


def max_pool(x: mx.array) -> mx.array:
    """The largest of every 2 x 2: (B, H, W, C) to (B, H // 2, W // 2, C), as PyTorch does it.

    Of equal numbers the first, row by row, has the whole gradient. ``nn.MaxPool2d`` splits it among
    them, which in flat parts of a picture is another gradient for the image (ERRATA.md 003-E28).
    An odd last row or column is left out.
    """
    _, height, width, _ = x.shape
    return cast(mx.array, _max_pool(x[:, : height // 2 * 2, : width // 2 * 2]))


def _corners(x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The four pixels of every 2 x 2, row by row, each (B, H / 2, W / 2, C)."""
    return x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]


@mx.custom_function
def _max_pool(x: mx.array) -> mx.array:
    a, b, c, d = _corners(x)  # a reduction over two axes took a quarter of 003's step on CUDA
    return mx.maximum(mx.maximum(a, b), mx.maximum(c, d))


@_max_pool.vjp
def _max_pool_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    a, b, c, _ = ((corner != output).astype(x.dtype) for corner in _corners(x))
    first = once(a * (1 + b * (1 + c)))[:, :, None, :, None]  # of the largest, row by row: 0 to 3
    each = mx.arange(4, dtype=x.dtype).reshape(2, 1, 2, 1)
    # A product, since a choice takes a CPU four times as long.
    return (cotangent[:, :, None, :, None] * (first == each).astype(x.dtype)).reshape(x.shape)


class VGG(nn.Module):
    """Images (B, H, W, 3), RGB in [0, 1], to a dictionary of features, one for each tap.

    A tap of block b is (B, H // 2^(b - 1), W // 2^(b - 1), channels[b - 1]). Nothing is computed
    behind the deepest tap. ``pooling`` is ``"max"`` or ``"avg"``. The parameters are frozen unless
    told otherwise, since style transfer trains the image.

    Raises ValueError: unknown config, tap or pooling; images of another number of channels, or too
    small to be halved as often as the deepest tap needs.
    """

    def __init__(
        self,
        config: str = "vgg19",
        taps: tuple[str, ...] = GATYS,
        pooling: str = "max",
        channels: tuple[int, ...] = CHANNELS,
        preprocessing: Preprocessing = TORCHVISION,
        frozen: bool = True,
    ):
        super().__init__()
        names = convolutions(config)
        known = {*names, *(name.replace("conv", "relu") for name in names)}
        unknown = [tap for tap in taps if tap not in known]
        if unknown or not taps:
            raise ValueError(
                f"{config} has no tap {', '.join(unknown) or '(none given)'}: taps are called "
                f"conv1_1 or relu1_1 to {names[-1]} or {names[-1].replace('conv', 'relu')}"
            )
        if pooling not in ("max", "avg"):
            raise ValueError(f"pooling must be 'max' or 'avg', got {pooling!r}")
        if len(channels) != len(BLOCKS[config]):
            raise ValueError(f"channels must be one number for each block, got {channels}")
        self.config = config
        self.taps = tuple(taps)
        self.pooling = pooling
        self.preprocessing = preprocessing
        self.deepest = max((tap.replace("relu", "conv") for tap in taps), key=names.index)

        width = 3
        for name in names:
            wider = channels[int(name[4]) - 1]
            setattr(self, name, Conv2d(width, wider, 3, padding=1))
            width = wider
        if frozen:
            self.freeze()

    def __call__(self, images: mx.array) -> dict[str, mx.array]:
        self._check(images)
        x = self.preprocessing(images)
        found = {}
        for name in convolutions(self.config):
            if name.endswith("_1") and name != "conv1_1":
                x = max_pool(x) if self.pooling == "max" else nn.AvgPool2d(2)(x)
            x = getattr(self, name)(x)  # (B, H / 2^(block - 1), W / 2^(block - 1), C)
            found[name] = x
            x = relu(x)
            found[name.replace("conv", "relu")] = x
            if name == self.deepest:
                break
        return {tap: found[tap] for tap in self.taps}

    def _check(self, images: mx.array) -> None:
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                f"images must be (B, H, W, 3), RGB, got {tuple(images.shape)}: repeat a grey "
                "channel three times, drop an alpha channel"
            )
        least = 2 ** (int(self.deepest[4]) - 1)
        if min(images.shape[1:3]) < least:
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} are too small: {self.deepest} "
                f"needs at least {least} x {least}"
            )
