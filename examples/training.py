"""Several cases in one file: a training step with its optimizer, right and with MLX's default.

mlx-parity check examples/training.py::adam
mlx-parity check examples/training.py::adam_without_bias_correction
mlx-parity lint examples/training.py
"""

from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import mlx.optimizers as optim
import numpy as np
import torch
from torch import nn as tnn

IMAGES = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1, 0, 2])


class Net(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = tnn.Linear(5, 8), tnn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class NetPort(mnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = mnn.Linear(5, 8), mnn.Linear(8, 3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(mx.tanh(self.fc1(x)))


def case_adam(bias_correction: bool = True) -> dict[str, Any]:
    return {
        "reference": Net(),
        "port": NetPort(),
        "inputs": IMAGES,
        "targets": LABELS,
        "loss": (
            tnn.functional.cross_entropy,
            lambda logits, labels: mnn.losses.cross_entropy(logits, labels, reduction="mean"),
        ),
        "optimizer": (
            lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
            optim.Adam(1e-2, bias_correction=bias_correction),
        ),
    }


def case_adam_without_bias_correction() -> dict[str, Any]:
    return case_adam(bias_correction=False)
