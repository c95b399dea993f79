"""Batch and group normalisation: MLX's own numbers, to the second derivative."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_impl import convolution, norms
from tests.frameworks import assert_equal_but_for_rounding, assert_layers_alike

EPS = float(np.finfo(np.float32).eps)
ON_CUDA = convolution.backend() == "cuda"


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([(), (1,), (3,), (2, 3), (4, 4)]),
    st.sampled_from(["cpu", "metal"]),
    st.booleans(),
)
def test_group_norm_is_mlxs_by_both_formulas(batch, groups, each, sizes, backend, affine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "backend", lambda: backend)
        dims = groups * each
        x = np.random.default_rng(0).normal(size=(batch, *sizes, dims)).astype(np.float32)
        assert_layers_alike(
            nn.GroupNorm(groups, dims, 1e-3, affine, pytorch_compatible=True),
            norms.GroupNorm(groups, dims, 1e-3, affine),
            x,
        )


@given(
    st.integers(2, 5),
    st.integers(1, 4),
    st.sampled_from([(), (1,), (3,), (2, 3)]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_batch_norm_is_mlxs(batch, dims, sizes, affine, track, training):
    settings = {"eps": 1e-3, "momentum": 0.3, "affine": affine, "track_running_stats": track}
    plain, ours = nn.BatchNorm(dims, **settings), norms.BatchNorm(dims, **settings)
    x = np.random.default_rng(0).normal(1, 2, (batch, *sizes, dims)).astype(np.float32)
    for norm in (plain, ours):
        norm(mx.array(x))  # statistics that are not 0 and 1
        norm.train(training)
    if track:
        for name in ("running_mean", "running_var"):
            assert mx.allclose(ours[name], plain[name], rtol=4 * EPS, atol=4 * EPS), name
    assert_layers_alike(plain, ours, x)


@pytest.mark.parametrize(
    ("shape", "message"), [((3,), "2 to 4"), ((1, 3), "more than one value per channel")]
)
def test_batch_norm_says_what_it_cannot_take(shape, message):
    with pytest.raises(ValueError, match=message):
        norms.BatchNorm(3)(mx.zeros(shape))


@pytest.mark.parametrize(
    "ours", [norms.BatchNorm(6), norms.GroupNorm(2, 6)], ids=["batch", "group"]
)
def test_second_derivatives_are_mlxs(ours):
    """By way of the mean and the variance too, which a gradient's own formula takes as given."""
    batch = isinstance(ours, nn.BatchNorm)
    plain = nn.BatchNorm(6) if batch else nn.GroupNorm(2, 6, pytorch_compatible=True)
    exact = copy.deepcopy(plain)
    with mx.stream(mx.cpu):
        exact.set_dtype(mx.float64)

    def penalty_and_gradients(norm, point):
        def loss(x, weight):
            norm.weight = weight
            return (mx.array(point["by_y"]) * norm(x)).sum()

        def penalty(x, weight):
            by_x, by_weight = mx.grad(loss, argnums=(0, 1))(x, weight)
            return (mx.array(point["by_gradient"]) * by_x).sum() + mx.square(by_weight).sum()

        dtype = norm.bias.dtype
        with mx.stream(mx.cpu):
            x, weight = (mx.array(point[name]).astype(dtype) for name in ("x", "weight"))
        value, gradients = mx.value_and_grad(penalty, argnums=(0, 1))(x, weight)
        found = [value, *gradients]
        mx.eval(found)
        return {
            n: np.array(a, np.float64)
            for n, a in zip(("penalty", "x", "weight"), found, strict=True)
        }

    def in_float64(point):
        with mx.stream(mx.cpu):
            return penalty_and_gradients(exact, point)

    rng = np.random.default_rng(0)
    point = {name: rng.normal(size=(3, 4, 5, 6)) for name in ("x", "by_y", "by_gradient")}
    point["weight"] = rng.normal(1, 0.2, 6)
    point = {name: a.astype(np.float32) for name, a in point.items()}
    for norm in (plain, ours):
        assert_equal_but_for_rounding(
            in_float64,
            lambda point: penalty_and_gradients(plain, point),
            lambda point, norm=norm: penalty_and_gradients(norm, point),
            point,
        )


def gradient_of_the_fused_norm(size: int, stream: mx.Device | None = None) -> mx.array:
    x, cotangent = (mx.random.normal((3, size), key=mx.random.key(i)) for i in (0, 1))

    def norm(x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, None, None, 1e-5, stream=stream)

    return mx.vjp(norm, [x], [cotangent])[1][0]


@pytest.mark.skipif(not ON_CUDA, reason="a defect of MLX's CUDA backend")
@pytest.mark.xfail(reason="MLX 0.32.4: the rest behind whole reads meets another place's cotangent")
def test_mlxs_gradient_of_the_fused_norm_over_no_multiple_of_four():
    expected = gradient_of_the_fused_norm(6, mx.cpu)
    assert mx.allclose(gradient_of_the_fused_norm(6), expected, atol=1e-4)


@pytest.mark.skipif(not ON_CUDA, reason="which sizes MLX's CUDA backend gets right")
@pytest.mark.parametrize("size", [3, 4, 8, 32, 100])
def test_mlxs_gradient_of_the_fused_norm_over_multiples_of_four(size):
    expected = gradient_of_the_fused_norm(size, mx.cpu)
    assert mx.allclose(gradient_of_the_fused_norm(size), expected, atol=1e-4)
