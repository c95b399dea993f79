"""Kinks, ties, saturation and constant data have verdicts of their own; halves their own noise."""

import mlx.core as mx
import mlx.nn as mnn
import numpy as np
import pytest
import torch
from torch import nn as tnn
from torch.nn import functional as F

from mlx_parity import carry, compare, jitter
from mlx_parity.probes import probe, probe_at


class Where(mnn.Module):
    """Leaky ReLU with PyTorch's derivative at 0."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.where(x > 0, x, 0.2 * x)


def test_the_kink_of_leaky_relu_is_found():
    (kink, saturated) = probe(tnn.LeakyReLU(0.2), mnn.LeakyReLU(0.2))
    assert (kink.place, kink.ok, kink.trap_id) == ("kink", False, "leaky-relu-kink")
    assert str(kink) == (
        "LeakyReLU, kink: the gradient of input 0 is 1 at [0, 0], the original's 0.2"
    )
    assert saturated.ok
    assert all(p.ok for p in probe(tnn.LeakyReLU(0.2), Where()))


def test_ties_of_a_pool_are_found():
    (ties,) = probe(tnn.MaxPool2d(2), mnn.MaxPool2d(2))
    assert (ties.ok, ties.trap_id) == (False, "maximum-ties")
    assert "0.25 at" in ties.detail
    assert "the original's 1" in ties.detail
    (equal,) = probe(tnn.AvgPool2d(2), mnn.AvgPool2d(2))
    assert equal.ok


def test_a_saturated_probability_is_found():
    class Loss(tnn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return F.binary_cross_entropy_with_logits(z, torch.ones_like(z))

    class OnProbabilities(mnn.Module):
        def __call__(self, z: mx.array) -> mx.array:
            p = mx.sigmoid(z)
            return mnn.losses.binary_cross_entropy(p, mx.ones_like(p), with_logits=False)

    class OnLogits(mnn.Module):
        def __call__(self, z: mx.array) -> mx.array:
            return mnn.losses.binary_cross_entropy(z, mx.ones_like(z))

    z = np.array([20.0, 0.5])
    wrong = probe_at(Loss(), OnProbabilities(), (z,), "saturation")
    assert (wrong.ok, wrong.trap_id) == (False, "bce-saturation")
    assert "the gradient of input 0 is nan" in wrong.detail
    assert probe_at(Loss(), OnLogits(), (z,), "saturation").ok


SMOOTH = [
    (tnn.ReLU(), mnn.ReLU()),
    (tnn.GELU(), mnn.GELU()),
    (tnn.SiLU(), mnn.SiLU()),
    (tnn.Tanh(), mnn.Tanh()),
    (tnn.Sigmoid(), mnn.Sigmoid()),
    (tnn.Softplus(), mnn.Softplus()),
    (tnn.LayerNorm(4), mnn.LayerNorm(4)),
    (tnn.RMSNorm(4, eps=1e-5), mnn.RMSNorm(4)),
    (tnn.GroupNorm(2, 4), mnn.GroupNorm(2, 4, pytorch_compatible=True)),
    (tnn.BatchNorm2d(3), mnn.BatchNorm(3)),
]


@pytest.mark.parametrize("pair", SMOOTH, ids=lambda p: type(p[0]).__name__)
def test_no_probe_finds_anything_where_the_frameworks_agree(pair):
    assert [str(p) for p in probe(*pair) if not p.ok] == []
    assert probe(*pair)


def test_a_model_is_probed_layer_by_layer():
    reference = tnn.Sequential(tnn.Conv2d(1, 2, 3), tnn.LeakyReLU(0.1), tnn.MaxPool2d(2))
    port = mnn.Sequential(mnn.Conv2d(1, 2, 3), mnn.LeakyReLU(0.1), mnn.MaxPool2d(2))
    carry(reference, port)
    found = {(p.where, p.place) for p in probe(reference, port) if not p.ok}
    assert found == {("1", "kink"), ("2", "ties")}


HALVES = {"float16": (torch.float16, mx.float16), "bfloat16": (torch.bfloat16, mx.bfloat16)}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("slope", "verdict"), [(0.2, "equal"), (0.25, "different")])
def test_half_precision_is_judged_by_its_own_noise(dtype: str, slope: float, verdict: str):
    """Rounded to half on the way, a right layer is equal to float64 and a wrong one is not."""
    theirs, ours = HALVES[dtype]
    rng = np.random.default_rng(0)
    point = {
        "x": rng.standard_normal((8, 16)).astype(np.float32),
        "w": (rng.standard_normal((6, 16)) / 4).astype(np.float32),
    }

    def reference(kind: torch.dtype):
        def run(p):
            x, w = (torch.tensor(p[k]).to(kind) for k in ("x", "w"))
            return {"y": F.leaky_relu(x @ w.T, 0.2).double().numpy()}

        return run

    def port(p):
        x, w = (mx.array(p[k]).astype(ours) for k in ("x", "w"))
        y = x @ w.T
        y = mx.where(y > 0, y, slope * y)
        return {"y": np.array(y.astype(mx.float32), dtype=np.float64)}

    (finding,) = compare(
        reference(torch.float64), reference(theirs), port, lambda: jitter(point, rng, 0.1)
    )
    assert finding.verdict == verdict, str(finding)
