"""Normalisations at inputs so faint that their eps decides."""

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from torch import nn as tnn

import mlx_parity
from mlx_parity.faint import RUNG, guilty_norms
from mlx_parity.localise import pairs
from mlx_parity.weights import find_plan

CHANNELS = 6


class ByHand(nn.Module):
    """A layer norm as people write it."""

    def __init__(self, eps: float):
        super().__init__()
        self.weight, self.bias = mx.ones(CHANNELS), mx.zeros(CHANNELS)
        self._delta = eps

    def __call__(self, x: mx.array) -> mx.array:
        x = x - x.mean(-1, keepdims=True)
        return (
            self.weight * x * mx.rsqrt(mx.square(x).mean(-1, keepdims=True) + self._delta)
            + self.bias
        )


CASES = {
    "batch 1d": (tnn.BatchNorm1d(CHANNELS), lambda eps: nn.BatchNorm(CHANNELS, eps=eps), 1e-5),
    "batch 2d": (tnn.BatchNorm2d(CHANNELS), lambda eps: nn.BatchNorm(CHANNELS, eps=eps), 1e-5),
    "batch, kept": (
        tnn.BatchNorm2d(CHANNELS).eval(),
        lambda eps: nn.BatchNorm(CHANNELS, eps=eps).eval(),
        1e-5,
    ),
    "group": (
        tnn.GroupNorm(2, CHANNELS, eps=1e-6),
        lambda eps: nn.GroupNorm(2, CHANNELS, eps=eps, pytorch_compatible=True),
        1e-6,
    ),
    "instance": (
        tnn.InstanceNorm2d(CHANNELS, affine=True),
        lambda eps: nn.InstanceNorm(CHANNELS, eps=eps, affine=True),
        1e-5,
    ),
    "layer": (
        tnn.LayerNorm(CHANNELS, eps=1e-12),
        lambda eps: nn.LayerNorm(CHANNELS, eps=eps),
        1e-12,
    ),
    "layer, by hand": (tnn.LayerNorm(CHANNELS), ByHand, 1e-5),
    "rms": (tnn.RMSNorm(CHANNELS, eps=1e-6), lambda eps: nn.RMSNorm(CHANNELS, eps=eps), 1e-6),
}


def found(name: str, factor: float) -> list[str]:
    reference, make, eps = CASES[name]
    port = make(eps * factor)
    find_plan(reference, port).carry()
    return [g.pair.reference_path for g in guilty_norms(pairs(reference, port))]


@pytest.mark.parametrize("name", CASES)
def test_an_eps_five_percent_off_is_seen_and_the_right_one_is_equal(name: str):
    assert found(name, 1.05) == [""]
    assert found(name, 1.0) == []


def test_a_port_in_sixteen_bits_is_left_alone():
    reference, make, eps = CASES["layer, by hand"]
    port = make(eps)
    find_plan(reference, port).carry()
    port.set_dtype(mx.bfloat16)
    assert guilty_norms(pairs(reference, port)) == []


class Net(tnn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = tnn.Conv2d(3, CHANNELS, 3), tnn.BatchNorm2d(CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class Port(nn.Module):
    def __init__(self, eps: float):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm(CHANNELS, eps=eps)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.conv(x))


def test_check_names_the_norm_and_the_cause_and_leaves_the_port_as_it_was():
    x = 9 * torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    port = Port(1.05e-5)
    kept = mx.array(port.norm.running_var)
    report = mlx_parity.check(Net(), port, x, compiled=False)
    assert not report.ok
    assert report.failed is not None
    assert report.failed.name == RUNG
    assert [g.pair.reference_path for g in report.guilty] == ["norm"]
    assert [d.trap_id for d in report.diagnoses] == ["norm-eps"]
    assert mx.array_equal(port.norm.running_var, kept)
    assert mlx_parity.check(Net(), Port(1e-5), x, compiled=False).ok
