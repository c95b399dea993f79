"""The layers that are not convolutions: MLX's own numbers, and where MLX's are wrong."""

import math
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_impl import convolution, layers

EPS = float(np.finfo(np.float32).eps)
ON_CUDA = convolution.backend() == "cuda"


@pytest.mark.parametrize("compiled", [False, True])
def test_relu_is_mlxs_at_the_kink_and_beyond(compiled):
    x = mx.array([[-math.inf, -1.0, -0.0, 0.0, 1e-45, 2.0, math.inf, math.nan]]).T  # a column
    for f in (lambda relu: relu, lambda relu: mx.grad(lambda x: (relu(x.T + 0) * x.T).sum())):
        ours, theirs = f(layers.relu), f(nn.relu)
        found = mx.compile(ours)(x) if compiled else ours(x)
        assert mx.array_equal(found, theirs(x), equal_nan=True)


FUSED_OVER_NOTHING = """
import mlx.core as mx
print(mx.compile(lambda x: (x * 2 + 1).sum())(mx.zeros((0, 3))).item())
"""


@pytest.mark.skipif(not ON_CUDA, reason="a defect of MLX's CUDA backend")
@pytest.mark.xfail(reason="MLX 0.32.4: a fused operation over an empty array divides by its blocks")
def test_mlxs_fused_operation_over_an_empty_array():
    done = subprocess.run([sys.executable, "-c", FUSED_OVER_NOTHING], check=False)
    assert done.returncode == 0


NUMBERS = np.random.default_rng(0).uniform(-12, 12, 100_000).astype(np.float32)


def silu_and_its_derivatives(silu):
    first = mx.grad(lambda x: silu(x).sum())
    second = mx.grad(lambda x: first(x).sum())
    return [np.array(f(mx.array(NUMBERS)), np.float64) for f in (silu, first, second)]


def test_silu_is_nearly_as_accurate_as_mlxs(monkeypatch):
    """Its errors, in the mean square, are at most half as large again; its derivatives' too."""
    monkeypatch.setattr(layers, "_SLOW_EXPONENTIAL", True)
    x = NUMBERS.astype(np.float64)
    s = 1 / (1 + np.exp(-x))
    slope = s * (1 + x * (1 - s))
    exact = [x * s, slope, s * (1 - s) * (2 + x * (1 - 2 * s))]
    for true, ours, theirs in zip(
        exact,
        silu_and_its_derivatives(layers.silu),
        silu_and_its_derivatives(nn.silu),
        strict=True,
    ):
        errors = [np.sqrt((((found - true) / x) ** 2).mean()) for found in (ours, theirs)]
        assert errors[0] <= 1.5 * errors[1]


def test_silu_is_mlxs_far_out_and_in_other_types(monkeypatch):
    monkeypatch.setattr(layers, "_SLOW_EXPONENTIAL", True)
    far = mx.array([-1e30, -1e4, -200.0, -0.0, 0.0, 200.0, 1e4, 1e30])
    for take in (lambda f: f(far), lambda f: mx.grad(lambda x: f(x).sum())(far)):
        assert mx.array_equal(take(layers.silu), take(nn.silu))
    for dtype in (mx.float16, mx.bfloat16):
        x = mx.array(NUMBERS).astype(dtype)
        assert mx.array_equal(layers.silu(x), nn.silu(x))
    monkeypatch.setattr(layers, "backend", lambda: "metal")
    x = mx.array(NUMBERS)
    assert mx.array_equal(layers.silu(x), nn.silu(x))


@pytest.mark.parametrize("slope", [0.01, 0.2, 1.0, 0.0, 1.5, -0.3])
def test_leaky_relu_is_a_choice_bit_for_bit(slope):
    """So are its derivatives, of the cotangent too, as a gradient penalty takes them."""
    kinks = [0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, float("inf"), -float("inf")]
    x = mx.array(kinks + NUMBERS[:1000].tolist())
    c = mx.random.normal(x.shape, key=mx.random.key(0))

    def choice(x):
        return mx.where(x > 0, x, slope * x)

    def ours(x):
        return layers.leaky_relu(x, slope)

    def pulled(f):
        return lambda c: mx.vjp(f, [x], [c])[1][0]

    for take in (
        lambda f: f(x),
        lambda f: pulled(f)(c),
        lambda f: mx.vjp(pulled(f), [c], [c])[1][0],
    ):
        assert mx.array_equal(take(ours), take(choice), equal_nan=True)
