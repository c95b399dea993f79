"""Tests that show the same thing of both sides: each framework and how it spells things."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from mlx_parity import compare, jitter

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


def assert_within(found: np.ndarray, expected: np.ndarray, bound: np.ndarray | float) -> None:
    """Every element within its own bound, which follows from rounding."""
    excess = np.abs(found - expected) - np.broadcast_to(bound, found.shape)
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    assert (excess <= 0).all(), (
        f"{found[worst]} for {expected[worst]} at {[int(i) for i in worst]}: "
        f"{excess[worst]:.2g} over its bound"
    )


def assert_equal_but_for_rounding(
    oracle: Callable[[Mapping], Mapping],
    usual: Callable[[Mapping], Mapping],
    port: Callable[[Mapping], Mapping],
    point: Mapping[str, np.ndarray],
) -> None:
    """By the kit's own decision, bias against noise, at points near ``point``.

    Each maps named arrays to named arrays of float64 numbers: ``oracle`` is what is right, computed
    in float64, ``usual`` the same in float32, which says how much rounding is to be expected.
    """
    rng = np.random.default_rng(0)
    findings = compare(oracle, usual, port, lambda: jitter(point, rng))
    assert all(f.ok for f in findings), "\n".join(map(str, findings))


Around = Callable[[], AbstractContextManager]


def assert_layers_alike(
    plain: nn.Module,
    ours: nn.Module,
    x: np.ndarray,
    around: Around = nullcontext,
    double: tuple[nn.Module, Around] | None = None,
) -> None:
    """``ours``, called in ``around()``, is MLX's ``plain`` with the same weights, gradients too.

    Both have to equal, but for rounding, a layer in float64: ``plain`` or, where MLX cannot run
    that in float64, the ``double`` given and what is around it.
    """
    plain.update(ours.parameters())
    exact, around_exact = double or (plain, nullcontext)
    with mx.stream(mx.cpu):
        exact = copy.deepcopy(exact)
        exact.set_dtype(mx.float64)

    def call(layer: nn.Module, x: mx.array, around: Around) -> dict[str, np.ndarray]:
        def loss(weights: dict, x: mx.array) -> tuple[mx.array, mx.array]:
            layer.update(weights)
            with around():
                y = layer(x)  # the gradients are taken outside
            return (y**2).mean(), y

        weights = layer.parameters()
        (value, y), (by_weights, by_x) = mx.value_and_grad(loss, argnums=(0, 1))(weights, x)
        layer.update(weights)
        found = {"loss": value, "y": y, "dx": by_x, **dict(tree_flatten(by_weights))}
        mx.eval(found)
        return {name: np.array(a).astype(np.float64) for name, a in found.items()}

    def oracle(point: Mapping) -> Mapping:
        with mx.stream(mx.cpu):
            return call(exact, mx.array(point["x"], mx.float64), around_exact)

    def usual(point: Mapping) -> Mapping:
        return call(plain, mx.array(point["x"]), nullcontext)

    def port(point: Mapping) -> Mapping:
        return call(ours, mx.array(point["x"]), around)

    assert_equal_but_for_rounding(oracle, usual, usual, {"x": x})
    assert_equal_but_for_rounding(oracle, usual, port, {"x": x})


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
