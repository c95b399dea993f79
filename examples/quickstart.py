"""A model, its port, and whether they compute the same.

mlx-parity check examples/quickstart.py
"""

import mlx.core as mx
import mlx.nn as mnn
import torch
from torch import nn as tnn


class Classifier(tnn.Module):
    """Images (B, 3, H, W) to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = tnn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = tnn.BatchNorm2d(8)
        self.conv2 = tnn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = tnn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


class ClassifierPort(mnn.Module):
    """Images (B, H, W, 3) to logits (B, 10); the names are the porter's own."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.stem = mnn.Conv2d(3, 8, 3, padding=1)
        self.norm = mnn.BatchNorm(8, eps=eps)
        self.down = mnn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = mnn.Linear(16, 10)

    def __call__(self, x: mx.array) -> mx.array:
        x = mnn.relu(self.norm(self.stem(x)))
        x = mnn.relu(self.down(x))
        return self.head(x.mean((1, 2)))


reference, port, inputs = Classifier(), ClassifierPort(), torch.randn(4, 3, 9, 12)
