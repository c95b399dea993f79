"""Tests that show the same thing of both sides: each framework and how it spells things."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).parents[1]

EPS = 2.0**-23
"""One unit in the last place of float32 at 1."""

ULPS = 16 * EPS
"""MLX's exponential on the CPU is good to 8 units (measured), and everything else in these losses
is a handful of roundings of half a unit each: 16 units of the largest number in a sum cover both.
"""


class Side(NamedTuple):
    """One framework. Its attributes are also our files in it: ``side.losses``, ``side.vgg``."""

    name: str
    package: str
    array: Callable
    value_and_grad: Callable  # (loss, x, ...) -> the loss and its gradient by x

    def __getattr__(self, file: str) -> ModuleType:
        name = f"{self.package}.{file}"
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise AttributeError(f"there is no {name}") from error

    def grad(self, loss, *arrays):
        return self.value_and_grad(loss, *arrays)[1]

    def images(self, nhwc):
        return self.array(nhwc if self.name == "mlx" else nhwc.transpose(0, 3, 1, 2).copy())


def mlx_value_and_grad(loss, *numpy_arrays):
    value, gradient = mx.value_and_grad(loss)(*map(mx.array, numpy_arrays))
    return value.item(), np.array(gradient)


def torch_value_and_grad(loss, *numpy_arrays):
    x, *rest = map(torch.tensor, numpy_arrays)
    value = loss(x.requires_grad_(), *rest)
    value.backward()
    return value.item(), x.grad.numpy()


TORCH = Side("torch", "reference", torch.tensor, torch_value_and_grad)
MLX = Side("mlx", "mlx_impl", mx.array, mlx_value_and_grad)
each_side = pytest.mark.parametrize("side", [TORCH, MLX], ids=lambda side: side.name)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="seen on MLX's Linux CPU backend")
compiles = pytest.mark.skipif(
    sys.platform == "linux" and shutil.which("g++") is None, reason="mx.compile needs g++ here"
)


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter; what it does to itself stays there."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
