"""MLX's erf, which is not good to its last place: no port's fault, and nothing hides behind it."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mlx_parity
from mlx_parity.elementary import OfMLX
from tests.test_equality import pair

on_cpu = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="only MLX's CPU backend has this erf"
)
HALVES = {torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}


def errors(low: float, high: float) -> np.ndarray:
    """Of ``mx.erf``, over a fine grid."""
    x = np.linspace(low, high, 100_001).astype(np.float32)
    exact = torch.erf(torch.from_numpy(x).double()).numpy()
    return np.array(mx.erf(mx.array(x))).astype(np.float64) - exact


@on_cpu
def test_mlx_erf_has_a_bias_and_no_last_place():
    """As the module says. If this fails, MLX has another erf, and the module can go."""
    found = errors(-4, 4)
    assert 3e-7 < np.abs(found).max() < 6e-7
    assert np.abs(errors(0, 0.01)).max() > 2e-7  # of values below 0.011: 20,000 of its units
    locally = errors(0.05, 0.2).reshape(-1)[:100_000].reshape(100, -1).mean(1)
    assert 3e-8 < np.abs(locally).max() < 2e-7  # nearby points share it


def test_within_the_context_erf_and_gelu_have_mlx_values_and_pytorch_derivatives():
    x = torch.linspace(-4, 4, 1001)
    ours = np.array(mx.erf(mx.array(x.numpy())))
    with OfMLX():
        for erf in (torch.erf, torch.special.erf, torch.Tensor.erf):
            assert np.abs(erf(x).numpy() - ours).max() <= 2**-24
        gelu = F.gelu(x).numpy()
        assert torch.equal(torch.erf(x.double()), x.double().erf())
        assert torch.equal(F.gelu(x, approximate="tanh"), torch.nn.GELU("tanh")(x))
        assert torch.erf(torch.arange(3)).dtype == torch.float32
    assert np.abs(gelu - np.array(mnn.gelu(mx.array(x.numpy())))).max() < 2**-21
    assert torch.equal(torch.erf(x), torch.special.erf(x))  # outside PyTorch's own

    for f in (torch.erf, F.gelu):
        y = x.clone().requires_grad_()
        with OfMLX():
            (first,) = torch.autograd.grad(f(y).sum(), y, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), y)
        z = x.double().requires_grad_()
        (right,) = torch.autograd.grad(f(z).sum(), z, create_graph=True)
        assert (first - right).abs().max() < 1e-6
        assert (second - torch.autograd.grad(right.sum(), z)[0]).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", HALVES)
def test_in_half_precision_it_is_rounded_once(dtype: torch.dtype):
    x = torch.linspace(-4, 4, 1001).to(dtype)
    with OfMLX():
        found = torch.erf(x), F.gelu(x)
    assert {a.dtype for a in found} == {dtype}
    exact = F.gelu(x.double())
    assert (found[1] - exact).abs().max() <= (torch.finfo(dtype).eps / 2) * 4


def test_within_torch_func_it_stays_pytorchs():
    x = torch.linspace(-1, 1, 7)
    with OfMLX():
        found = torch.func.vmap(torch.func.grad(torch.erf))(x)
    assert torch.allclose(found, 2 / math.sqrt(math.pi) * torch.exp(-x * x))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("scale", [0.03, 0.1])
def test_where_erf_is_worst_it_is_no_difference(scale: float, seed: int):
    x = scale * np.random.default_rng(seed).standard_normal((3, 37))
    wrong = [f for f in pair(torch.erf, mx.erf, x, seed=seed) if not f.ok]
    assert wrong == []


SLOPE = 2 / math.sqrt(math.pi)


@pytest.mark.parametrize(
    ("ours", "scale"),
    [
        (lambda x: mx.tanh(SLOPE * x), 0.1),
        (lambda x: mx.erf(x) * (1 + 1e-5), 0.3),
        (lambda x: mx.erf(x) + 3e-6, 0.03),
        (lambda x: mx.erf(x / 1.0001), 0.3),
    ],
    ids=["tanh", "scaled", "shifted", "of another number"],
)
def test_what_is_no_erf_is_different(ours: Any, scale: float):
    for seed in range(5):
        x = scale * np.random.default_rng(seed).standard_normal((3, 37))
        assert not all(f.ok for f in pair(torch.erf, ours, x, seed=seed))


class ByHand(torch.nn.Module):
    """Exact GELU as it is often written, with an erf that PyTorch computes to the last place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


@pytest.mark.parametrize("reference", [torch.nn.GELU(), ByHand()], ids=["GELU", "by hand"])
@pytest.mark.parametrize("centre", [-3.5, -2.5, 0.0])
def test_check_tells_exact_gelu_from_its_approximation(reference: torch.nn.Module, centre: float):
    """Far below zero a GELU is what is left of 1 + erf, and MLX's error is most of it."""
    for seed in range(3):
        noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
        x = centre + (0.2 if centre else 0.5) * noise
        right = mlx_parity.check(reference, mnn.GELU(), x, compiled=False, seed=seed)
        assert right.ok, str(right)
        wrong = mlx_parity.check(
            reference, mnn.GELU("tanh"), x, compiled=False, explain=False, seed=seed
        )
        assert not wrong.ok
