"""A layer around any function, on both sides, and what a report says of it."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from torch import nn as tnn

from mlx_parity import Report

DIM = 8
X = np.random.default_rng(0).standard_normal((2, 6, DIM)).astype(np.float32)


def causes(report: Report) -> dict[str, str]:
    return {d.trap_id: d.evidence for d in report.diagnoses}


def guilty(report: Report) -> list[str]:
    return [g.pair.reference_path for g in report.guilty]


class Written(tnn.Module):
    """A layer before a function without parameters."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.function = tnn.Linear(DIM, DIM), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.fc(x))


class WrittenPort(nn.Module):
    def __init__(self, function: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(DIM, DIM), function

    def __call__(self, x: mx.array) -> mx.array:
        return self.function(self.fc(x))
