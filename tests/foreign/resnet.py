"""A small residual network with batch norms, in training mode."""

import mlx.core as mx
import mlx.nn as nn
import torch
from torch import nn as tnn


class Residual(tnn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = tnn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = tnn.BatchNorm2d(outputs)
        self.relu = tnn.ReLU(inplace=True)
        self.conv2 = tnn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = tnn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = tnn.Sequential(
                tnn.Conv2d(inputs, outputs, 1, stride, bias=False), tnn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(tnn.Module):
    """Images (B, 3, H, W) to logits (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = tnn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = tnn.BatchNorm2d(4)
        self.layer1 = tnn.Sequential(Residual(4, 4, 1), Residual(4, 6, 2))
        self.fc = tnn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        return self.fc(self.layer1(x).mean((2, 3)))


class BatchStatistics(nn.BatchNorm):
    """Normalises with the batch's own statistics in evaluation too."""

    def __call__(self, x: mx.array) -> mx.array:
        mode = self.training
        self._training = True
        mean, var = self.running_mean, self.running_var
        y = super().__call__(x)
        self._training = mode
        if not mode:
            self.running_mean, self.running_var = mean, var
        return y


class ResidualPort(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, fault: str) -> None:
        super().__init__()
        self.fault = fault
        momentum = 0.101 if fault == "momentum" else 0.1
        self.conv_a = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm_a = nn.BatchNorm(outputs)
        self.conv_b = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        norm = BatchStatistics if fault == "statistics" else nn.BatchNorm
        self.norm_b = norm(outputs, momentum=momentum)
        if stride > 1 or inputs != outputs:
            self.shortcut = [
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm(outputs),
            ]

    def __call__(self, x: mx.array) -> mx.array:
        out = self.norm_b(self.conv_b(nn.relu(self.norm_a(self.conv_a(x)))))
        if "shortcut" in self:
            for layer in self.shortcut:
                x = layer(x)
        if self.fault == "residual":
            return nn.relu(out)
        return nn.relu(out + x)


class ResNetPort(nn.Module):
    """NHWC. ``fault`` is in the second residual block; "stop" is between the two."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.stem_conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm(4)
        self.blocks = [ResidualPort(4, 4, 1, ""), ResidualPort(4, 6, 2, fault)]
        self.out = nn.Linear(6, 5)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.stem_norm(self.stem_conv(x)))
        for i, block in enumerate(self.blocks):
            if self.fault == "stop" and i == 1:
                x = mx.stop_gradient(x)
            x = block(x)
        return self.out(x.mean((1, 2)))
