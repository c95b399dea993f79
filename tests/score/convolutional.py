"""Image models: a classifier, a DCGAN's generator, VGG, a U-Net."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import torch
from torch import nn as tnn
from torch.nn import functional as F

from tests.score.family import (
    Example,
    Family,
    Rng,
    called,
    fault,
    image,
    normal,
    setting,
    size,
    swapped,
)

# --------------------------------------------------------------------------------- classifier


class CNN(tnn.Module):
    def __init__(self, channels: int, width: int, chw: tuple[int, int, int]):
        super().__init__()
        self.conv1 = tnn.Conv2d(channels, width, 3, padding=1)
        self.bn1 = tnn.BatchNorm2d(width)
        self.conv2 = tnn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = tnn.BatchNorm2d(width)
        self.pool = tnn.MaxPool2d(2)
        self.fc = tnn.Linear(width * (chw[1] // 2) * (chw[2] // 2), 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        return self.fc(x.flatten(1))


class PortCNN(mnn.Module):
    def __init__(self, channels: int, width: int, chw: tuple[int, int, int]):
        super().__init__()
        self.conv1 = mnn.Conv2d(channels, width, 3, padding=1)
        self.bn1 = mnn.BatchNorm(width)
        self.conv2 = mnn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = mnn.BatchNorm(width)
        self.pool = mnn.MaxPool2d(2)
        self.fc = mnn.Linear(width * (chw[1] // 2) * (chw[2] // 2), 5)

    def __call__(self, x: mx.array) -> mx.array:
        x = mnn.relu(self.bn1(self.conv1(x)))
        x = self.pool(mnn.relu(self.bn2(self.conv2(x))))
        return self.fc(x.transpose(0, 3, 1, 2).flatten(1))


def cnn(rng: Rng) -> Example:
    channels, width = size(rng, 1, 3), size(rng, 2, 4)
    x = image(rng, channels)
    chw = x.shape[1:]
    return Example(CNN(channels, width, chw), PortCNN(channels, width, chw), x)


def _cnn_hwc(self: Any, x: mx.array) -> mx.array:
    x = mnn.relu(self.bn1(self.conv1(x)))
    x = self.pool(mnn.relu(self.bn2(self.conv2(x))))
    return self.fc(x.flatten(1))


def _cnn_before(self: Any, x: mx.array) -> mx.array:
    x = self.bn1(mnn.relu(self.conv1(x)))
    x = self.pool(mnn.relu(self.bn2(self.conv2(x))))
    return self.fc(x.transpose(0, 3, 1, 2).flatten(1))


def _cnn_no_relu(self: Any, x: mx.array) -> mx.array:
    x = mnn.relu(self.bn1(self.conv1(x)))
    x = self.pool(self.bn2(self.conv2(x)))
    return self.fc(x.transpose(0, 3, 1, 2).flatten(1))


def _cnn_skip(self: Any, x: mx.array) -> mx.array:
    x = mnn.relu(self.bn1(self.conv1(x)))
    x = self.pool(mnn.relu(self.conv2(x)))
    return self.fc(x.transpose(0, 3, 1, 2).flatten(1))


def _kernel(order: tuple[int, ...]) -> Any:
    def forward(self: Any, x: mx.array) -> mx.array:
        y = mx.conv2d(x, self.weight.transpose(order), padding=self.padding)
        return y + self.bias if "bias" in self else y

    return forward


CNN_FAMILY = Family(
    "CNN",
    cnn,
    (
        called("flattened as (H, W, C)", "", "flatten-order", _cnn_hwc),
        called("ReLU before the norm", "", "layer-order activation-kind", _cnn_before),
        called("an activation left out", "", "activation-kind", _cnn_no_relu),
        called("a norm is skipped", "", "layer-order", _cnn_skip),
        fault("BatchNorm eps 5 % off", "bn1", "norm-eps", setting("bn1", eps=1.05e-5), True),
        fault("BatchNorm eps 1e-3", "bn2", "norm-eps", setting("bn2", eps=1e-3)),
        fault("momentum 0.101", "bn1", "norm-momentum", setting("bn1", momentum=0.101), True),
        fault("momentum 0.9", "bn2", "norm-momentum", setting("bn2", momentum=0.9)),
        fault(
            "average pooling", "pool", "pool-window", swapped("pool", lambda _: mnn.AvgPool2d(2))
        ),
        called(
            "a kernel with H and W swapped", "conv2", "conv-kernel-layout", _kernel((0, 2, 1, 3))
        ),
        fault(
            "no padding value", "conv1", "conv-geometry", setting("conv1", padding=2, dilation=2)
        ),
        called(
            "a bias that is not added",
            "conv1",
            "bias-missing",
            lambda self, x: mx.conv2d(x, self.weight, padding=self.padding),
        ),
    ),
)

# ------------------------------------------------------------------------------ DCGAN generator


class Generator(tnn.Module):
    def __init__(self, latent: int, width: int):
        super().__init__()
        self.project = tnn.ConvTranspose2d(latent, 2 * width, 4, 1, 0, bias=False)
        self.bn1 = tnn.BatchNorm2d(2 * width)
        self.up = tnn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False)
        self.bn2 = tnn.BatchNorm2d(width)
        self.keep = tnn.ConvTranspose2d(width, width, 3, 1, 1)
        self.out = tnn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.project(z)))
        x = F.relu(self.bn2(self.up(x)))
        return torch.tanh(self.out(F.relu(self.keep(x))))


class PortGenerator(mnn.Module):
    def __init__(self, latent: int, width: int):
        super().__init__()
        self.project = mnn.ConvTranspose2d(latent, 2 * width, 4, 1, 0, bias=False)
        self.bn1 = mnn.BatchNorm(2 * width)
        self.up = mnn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False)
        self.bn2 = mnn.BatchNorm(width)
        self.keep = mnn.ConvTranspose2d(width, width, 3, 1, 1)
        self.out = mnn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False)

    def __call__(self, z: mx.array) -> mx.array:
        x = mnn.relu(self.bn1(self.project(z)))
        x = mnn.relu(self.bn2(self.up(x)))
        return mx.tanh(self.out(mnn.relu(self.keep(x))))


def dcgan(rng: Rng) -> Example:
    latent, width = size(rng, 2, 5), size(rng, 1, 3)
    return Example(
        Generator(latent, width), PortGenerator(latent, width), normal(rng, 3, latent, 1, 1)
    )


def _generator(activation: Any = mnn.relu, last: Any = mx.tanh) -> Any:
    def forward(self: Any, z: mx.array) -> mx.array:
        x = activation(self.bn1(self.project(z)))
        x = activation(self.bn2(self.up(x)))
        return last(self.out(activation(self.keep(x))))

    return forward


DCGAN_FAMILY = Family(
    "DCGAN",
    dcgan,
    (
        called(
            "a transposed kernel by the plain rule",
            "keep",
            "conv-transpose-kernel-layout",
            lambda self, x: (
                mx.conv_transpose2d(x, self.weight.transpose(3, 1, 2, 0), padding=1) + self.bias
            ),
        ),
        called("sigmoid for tanh", "", "activation-kind", _generator(last=mx.sigmoid)),
        called("leaky ReLU for ReLU", "", "activation-kind", _generator(mnn.leaky_relu)),
        called("no tanh", "", "activation-kind", _generator(last=lambda x: x)),
        fault("eps 1e-6", "bn2", "norm-eps", setting("bn2", eps=1e-6)),
        fault("evaluation mode", "bn1", "training-mode", lambda port: port.bn1.eval() and None),
        called(
            "the kernel rotated",
            "up",
            "conv-kernel-layout",
            lambda self, x: mx.conv_transpose2d(x, self.weight[:, ::-1, ::-1], stride=2, padding=1),
        ),
    ),
)

# ------------------------------------------------------------------------------------------ VGG


class VGG(tnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.features = tnn.Sequential(
            tnn.Conv2d(3, width, 3, padding=1),
            tnn.ReLU(),
            tnn.Conv2d(width, width, 3, padding=1),
            tnn.ReLU(),
            tnn.AvgPool2d(2),
            tnn.Conv2d(width, width, 3, padding=1),
            tnn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        flat = x.flatten(2)
        return flat @ flat.transpose(1, 2) / flat.shape[2]


class PortVGG(mnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.features = mnn.Sequential(
            mnn.Conv2d(3, width, 3, padding=1),
            mnn.ReLU(),
            mnn.Conv2d(width, width, 3, padding=1),
            mnn.ReLU(),
            mnn.AvgPool2d(2),
            mnn.Conv2d(width, width, 3, padding=1),
            mnn.ReLU(),
        )

    def __call__(self, x: mx.array) -> mx.array:
        x = self.features(x)
        flat = x.flatten(1, 2)
        return flat.transpose(0, 2, 1) @ flat / flat.shape[1]


def vgg(rng: Rng) -> Example:
    width = size(rng, 2, 5)
    return Example(VGG(width), PortVGG(width), image(rng, 3))


def _gram(divide: Any) -> Any:
    def forward(self: Any, x: mx.array) -> mx.array:
        flat = self.features(x).flatten(1, 2)
        return flat.transpose(0, 2, 1) @ flat / divide(flat)

    return forward


def _swap_layers(a: int, b: int) -> Any:
    def edit(port: Any) -> None:
        kind = type(port.features)

        def forward(self: Any, x: mx.array) -> mx.array:
            order = list(range(len(self.layers)))
            order[a], order[b] = b, a
            for i in order:
                x = self.layers[i](x)
            return x

        port.features.__class__ = type(kind.__name__, (kind,), {"__call__": forward})

    return edit


def _skip_layer(at: int) -> Any:
    def edit(port: Any) -> None:
        kind = type(port.features)

        def forward(self: Any, x: mx.array) -> mx.array:
            for i, layer in enumerate(self.layers):
                x = x if i == at else layer(x)
            return x

        port.features.__class__ = type(kind.__name__, (kind,), {"__call__": forward})

    return edit


def _ambiguous_kernel(port: Any) -> None:
    """The first kernel used as it lies in PyTorch's file: (O, 3, 3, 3) fits."""
    kind = type(port.features.layers[0])

    def forward(self: Any, x: mx.array) -> mx.array:
        return mx.conv2d(x, self.weight.transpose(0, 3, 1, 2), padding=1) + self.bias

    port.features.layers[0].__class__ = type(kind.__name__, (kind,), {"__call__": forward})


VGG_FAMILY = Family(
    "VGG and Gram",
    vgg,
    (
        fault(
            "an ambiguous kernel not transposed",
            "features.0",
            "conv-kernel-layout",
            _ambiguous_kernel,
        ),
        fault("two convolutions swapped", "features", "layer-order", _swap_layers(2, 5)),
        fault("a convolution skipped", "features", "layer-order", _skip_layer(2)),
        fault(
            "maximum for average pooling",
            "features.4",
            "pool-window",
            swapped("features.4", lambda _: mnn.MaxPool2d(2)),
        ),
        called(
            "Gram matrix over channels as well",
            "",
            "scale-factor",
            _gram(lambda f: f.shape[1] * f.shape[2]),
        ),
        called("Gram matrix not divided", "", "scale-factor", _gram(lambda f: 1)),
        fault(
            "GELU for ReLU",
            "features.3",
            "activation-kind",
            swapped("features.3", lambda _: mnn.GELU()),
        ),
    ),
)

# ---------------------------------------------------------------------------------------- U-Net


class Block(tnn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm = tnn.GroupNorm(groups, inputs)
        self.conv = tnn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = tnn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip(x) + self.conv(F.silu(self.norm(x)))


class UNet(tnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.down = Block(2 * 3, width, 2)
        self.pool = tnn.AvgPool2d(2)
        self.middle = Block(width, width, 2)
        self.up = tnn.Upsample(scale_factor=2, mode="bilinear")
        self.last = Block(2 * width, 4, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * torch.tensor([1.0, 0.1, 0.01], dtype=t.dtype)
        emb = torch.cat([angle.sin(), angle.cos()], 1)[:, :3]
        x = torch.cat([x, x * 0 + emb[:, :, None, None]], 1)
        h = self.down(x)
        y = self.up(self.middle(self.pool(h)))
        return self.last(torch.cat([y, h], 1))


class PortBlock(mnn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm = mnn.GroupNorm(groups, inputs, pytorch_compatible=True)
        self.conv = mnn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = mnn.Conv2d(inputs, outputs, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.skip(x) + self.conv(mnn.silu(self.norm(x)))


class PortUNet(mnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.down = PortBlock(2 * 3, width, 2)
        self.pool = mnn.AvgPool2d(2)
        self.middle = PortBlock(width, width, 2)
        self.up = mnn.Upsample(2, mode="linear")
        self.last = PortBlock(2 * width, 4, 4)

    def __call__(self, x: mx.array, t: mx.array) -> mx.array:
        return self._run(x, t)

    def _run(self, x: mx.array, t: mx.array, first: Any = mx.sin, join: Any = None) -> mx.array:
        angle = t[:, None] * mx.array([1.0, 0.1, 0.01])
        emb = mx.concatenate([first(angle), mx.cos(angle)], 1)[:, :3]
        x = mx.concatenate([x, x * 0 + emb[:, None, None, :]], -1)
        h = self.down(x)
        y = self.up(self.middle(self.pool(h)))
        return self.last(mx.concatenate([y, h] if join is None else join(y, h), -1))


def unet(rng: Rng) -> Example:
    width = 2 * size(rng, 2, 3)
    n, h = size(rng, 2, 3), 2 * size(rng, 3, 4)
    inputs = {"x": normal(rng, n, 3, h, h + 2), "t": rng.uniform(0, 9, n).astype("float32")}
    return Example(UNet(width), PortUNet(width), inputs)


def _block(activation: Any = mnn.silu, residual: bool = True) -> Any:
    def forward(self: Any, x: mx.array) -> mx.array:
        y = self.conv(activation(self.norm(x)))
        return self.skip(x) + y if residual else y

    return forward


UNET_FAMILY = Family(
    "U-Net",
    unet,
    (
        fault(
            "GroupNorm's own groups",
            "middle.norm",
            "norm-groups",
            setting("middle.norm", pytorch_compatible=False),
        ),
        fault(
            "GroupNorm's number of groups",
            "last.norm",
            "norm-groups",
            setting("last.norm", num_groups=2),
        ),
        fault("GroupNorm eps 1e-6", "down.norm", "norm-eps", setting("down.norm", eps=1e-6)),
        fault(
            "GroupNorm eps 20 % off",
            "down.norm",
            "norm-eps",
            setting("down.norm", eps=1.2e-5),
            True,
        ),
        called(
            "a residual dropped", "middle", "residual-dropped layer-order", _block(residual=False)
        ),
        called("ReLU for SiLU", "down", "activation-kind", _block(mnn.relu)),
        called(
            "GELU's fast form for SiLU",
            "down",
            "activation-kind gelu-approximation",
            _block(mnn.gelu_fast_approx),
        ),
        called(
            "the skip first",
            "",
            "concatenation-order",
            lambda self, x, t: self._run(x, t, join=lambda y, h: [h, y]),
        ),
        called(
            "sine and cosine exchanged",
            "",
            "concatenation-order activation-kind",
            lambda self, x, t: self._run(x, t, first=mx.cos),
        ),
        fault("nearest upsampling", "up", "upsample-corners", setting("up", mode="nearest")),
        fault("aligned corners", "up", "upsample-corners", setting("up", align_corners=True)),
    ),
)

FAMILIES = (CNN_FAMILY, DCGAN_FAMILY, VGG_FAMILY, UNET_FAMILY)
