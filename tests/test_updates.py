"""Optimizers held against each other by themselves."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
import torch
from torch import nn as tnn

import mlx_parity
from mlx_impl.optimizers import Adam
from mlx_parity.updates import alone, explained, forgiven

P = [tnn.Parameter(torch.zeros(3))]
T = torch.optim


class ByHand(optim.Adam):
    """Adam with the corrections in double precision, and ``eps`` where it is told."""

    def __init__(self, eps: str, first: bool = True, second: bool = True):
        super().__init__(1e-3)
        self.place, self.corrected = eps, (first, second)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        b1, b2 = self.betas
        m = state["m"] = b1 * state["m"] + (1 - b1) * gradient
        v = state["v"] = b2 * state["v"] + (1 - b2) * mx.square(gradient)
        c1, c2 = (
            -mx.expm1(self.step * math.log(b)) if do else mx.array(1.0)
            for b, do in zip((b1, b2), self.corrected, strict=True)
        )
        root = {
            "behind": mx.sqrt(v) * mx.rsqrt(c2) + self.eps,
            "before": (mx.sqrt(v) + self.eps) * mx.rsqrt(c2),
            "under": mx.sqrt(v / c2 + self.eps),
        }[self.place]
        return parameter - self.learning_rate / c1 * m / root


RIGHT = {
    "Adam": (T.Adam(P, 1e-3), Adam(1e-3)),
    "Adam of GANs": (T.Adam(P, 2e-4, betas=(0.5, 0.999)), Adam(2e-4, (0.5, 0.999))),
    "Adam by hand": (T.Adam(P, 1e-3), ByHand("behind")),
    "SGD": (
        T.SGD(P, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "RMSprop": (T.RMSprop(P, 0.01), optim.RMSprop(0.01)),
    "Adagrad": (T.Adagrad(P, 0.01), optim.Adagrad(0.01, eps=1e-10)),
    "Adadelta": (T.Adadelta(P, 1.0), optim.AdaDelta(1.0)),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("seed", range(3))
def test_a_right_optimizer_is_equal(name: str, seed: int):
    assert all(f.ok for f in alone(*RIGHT[name], seed))


def test_mlxs_own_corrections_are_seen_and_forgiven():
    pair = T.Adam(P, 1e-3), optim.Adam(1e-3, bias_correction=True)
    assert not all(f.ok for f in alone(*pair))
    assert all(f.ok for f in forgiven(*pair))


@pytest.mark.parametrize(
    ("ours", "trap"),
    [
        (optim.Adam(1e-3), "adam-bias-correction"),
        (ByHand("behind", first=False), "adam-bias-correction"),
        (ByHand("behind", second=False), "adam-bias-correction"),
        (ByHand("before"), "adam-eps-placement"),
        (ByHand("under"), "adam-eps-placement"),
    ],
    ids=["MLX's", "first", "second", "before", "under"],
)
def test_what_an_adam_computes_is_found_out(ours: optim.Adam, trap: str):
    theirs = T.Adam(P, 1e-3)
    assert not all(f.ok for f in forgiven(theirs, ours))
    cause = explained(theirs, ours)
    assert cause is not None
    assert cause[0] == trap


def test_check_notes_the_rounded_corrections_and_refuses_another_eps():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def checked(ours: optim.Adam) -> mlx_parity.Report:
        torch.manual_seed(0)
        pair = (lambda p: T.Adam(p, 1e-3), ours)
        net = tnn.Linear(3, 2)
        return mlx_parity.check(net, nn.Linear(3, 2), x, optimizer=pair, compiled=False)

    noted = checked(optim.Adam(1e-3, bias_correction=True))
    assert noted.ok
    assert [d.trap_id for d in noted.diagnoses] == ["adam-correction-precision"]
    wrong = checked(ByHand("before"))
    assert wrong.failed is not None
    assert wrong.failed.name == "optimizer step"
    assert [d.trap_id for d in wrong.diagnoses] == ["adam-eps-placement"]
    assert checked(Adam(1e-3)).diagnoses == []
