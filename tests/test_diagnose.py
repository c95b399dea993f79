"""Diagnosis: what the trees show, what alternatives show, and silence where nothing is wrong."""

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from torch import nn as tnn
from torch.nn import functional as F

from mlx_parity import carry
from mlx_parity.diagnose import Diagnosis, diagnose, diagnose_functions, lint
from mlx_parity.equality import Finding
from mlx_parity.localise import Capture, Guilty, ModulePair
from mlx_parity.static import of_pair


def blamed(
    reference: tnn.Module, port: mnn.Module, *inputs: np.ndarray, direction: str = "forward"
) -> list[Diagnosis]:
    """The diagnosis of one pair, whose weights are carried."""
    carry(reference, port)
    finding = Finding("output", "different", 99, 10, 1, 1, 1, 128, 1)
    pair = ModulePair("net.layer", "net.layer", reference, port)
    return diagnose(Guilty(pair, direction, finding, Capture(inputs, {}, None)))


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


# -------------------------------------------------------------------------------------- static

PAIRS: dict[str, tuple[tnn.Module, mnn.Module, str, str]] = {
    "batch norm eps": (
        tnn.BatchNorm2d(3),
        mnn.BatchNorm(3, eps=1.05e-5),
        "norm-eps",
        "eps is 1.05e-05 in the port and 1e-05 in the original",
    ),
    "momentum": (tnn.BatchNorm1d(3), mnn.BatchNorm(3, momentum=0.101), "norm-momentum", "0.101"),
    "groups": (tnn.GroupNorm(2, 4), mnn.GroupNorm(2, 4), "norm-groups", "pytorch_compatible"),
    "number of groups": (
        tnn.GroupNorm(2, 4),
        mnn.GroupNorm(4, 4, pytorch_compatible=True),
        "norm-groups",
        "num_groups is 4 in the port and 2",
    ),
    "rms eps": (tnn.RMSNorm(4), mnn.RMSNorm(4), "rmsnorm-eps", "1.19209e-07 in the original"),
    "layer norm shape": (
        tnn.LayerNorm((3, 4)),
        mnn.LayerNorm(4),
        "layernorm-shape",
        "over 2 axes, [3, 4]",
    ),
    "affine": (tnn.InstanceNorm2d(3, affine=True), mnn.InstanceNorm(3), "norm-affine", "has none"),
    "norm kind": (tnn.LayerNorm(4), mnn.RMSNorm(4), "norm-kind", "RMSNorm stands for LayerNorm"),
    "stride": (tnn.Conv2d(2, 3, 3, stride=2), mnn.Conv2d(2, 3, 3), "conv-geometry", "stride"),
    "dilation": (tnn.Conv1d(2, 3, 3, dilation=2), mnn.Conv1d(2, 3, 3), "conv-geometry", "[2]"),
    "reflected": (
        tnn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        mnn.Conv2d(2, 3, 3, padding=1),
        "padding-mode",
        "'reflect'",
    ),
    "grouped": (
        tnn.ConvTranspose2d(4, 4, 2, groups=2),
        mnn.ConvTranspose2d(4, 4, 2),
        "grouped-conv-transpose",
        "2 groups",
    ),
    "bias": (tnn.Linear(2, 3), mnn.Linear(2, 3, bias=False), "bias-missing", "the port has none"),
    "slope": (tnn.LeakyReLU(0.2), mnn.LeakyReLU(0.2001), "activation-slope", "0.2001"),
    "steep": (tnn.LeakyReLU(1.5), mnn.LeakyReLU(1.5), "leaky-relu-steep", "1.5"),
    "gelu": (tnn.GELU("tanh"), mnn.GELU(), "gelu-approximation", "none in the port and tanh"),
    "activation": (tnn.SiLU(), mnn.GELU(), "activation-kind", "GELU stands for SiLU"),
    "window": (tnn.MaxPool2d(3, 2), mnn.MaxPool2d(2), "pool-window", "kernel_size is [2, 2]"),
    "ceil": (tnn.MaxPool2d(2, ceil_mode=True), mnn.MaxPool2d(2), "pool-window", "ceil_mode"),
    "padding counted": (
        tnn.AvgPool2d(3, 1, 1, count_include_pad=False),
        mnn.AvgPool2d(3, 1, 1),
        "pool-padding",
        "count_include_pad=False",
    ),
    "corners": (
        tnn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        mnn.Upsample(2, "linear"),
        "upsample-corners",
        "align_corners is False",
    ),
    "heads": (
        tnn.MultiheadAttention(8, 2),
        mnn.MultiHeadAttention(8, 4, bias=True),
        "head-count",
        "num_heads is 4 in the port and 2",
    ),
    "attention bias": (
        tnn.MultiheadAttention(8, 2),
        mnn.MultiHeadAttention(8, 2),
        "bias-missing",
        "biases",
    ),
    "norm first": (
        tnn.TransformerEncoderLayer(8, 2),
        mnn.TransformerEncoderLayer(8, 2),
        "norm-first",
        "norm_first is True in the port and False",
    ),
    "dropout": (tnn.Dropout(0.1), mnn.Dropout(0.2), "module-setting", "p is 0.2"),
    "mode": (tnn.Dropout(0.5).eval(), mnn.Dropout(0.5), "training-mode", "training mode"),
}

EQUAL_PAIRS: list[tuple[tnn.Module, mnn.Module]] = [
    (tnn.BatchNorm2d(3), mnn.BatchNorm(3)),
    (tnn.GroupNorm(2, 4), mnn.GroupNorm(2, 4, pytorch_compatible=True)),
    (tnn.GroupNorm(1, 4), mnn.GroupNorm(1, 4)),
    (tnn.LayerNorm(4), mnn.LayerNorm(4)),
    (tnn.InstanceNorm2d(3), mnn.InstanceNorm(3)),
    (tnn.Conv2d(2, 3, 3, 2, 1), mnn.Conv2d(2, 3, 3, 2, 1)),
    (tnn.ConvTranspose2d(2, 3, 4, 2, 1), mnn.ConvTranspose2d(2, 3, 4, 2, 1)),
    (tnn.LeakyReLU(0.2), mnn.LeakyReLU(0.2)),
    (tnn.GELU("tanh"), mnn.GELU("precise")),
    (tnn.MaxPool2d(3, 2, 1), mnn.MaxPool2d(3, 2, 1)),
    (tnn.Upsample(scale_factor=2, mode="bilinear"), mnn.Upsample(2, "linear")),
    (tnn.Dropout(0.3), mnn.Dropout(0.3)),
    (tnn.Linear(2, 3), mnn.Linear(2, 3)),
    (tnn.LSTM(2, 3), mnn.LSTM(2, 3)),
]


@pytest.mark.parametrize("name", PAIRS)
def test_a_rule_reads_it_off_the_modules(name: str):
    reference, port, trap, said = PAIRS[name]
    clues = of_pair(ModulePair("a.b", "a.b", reference, port))
    assert [(c.trap_id, c.where) for c in clues] == [(trap, "a.b")]
    assert said in clues[0].evidence


@pytest.mark.parametrize("pair", EQUAL_PAIRS, ids=lambda p: type(p[0]).__name__)
def test_no_rule_fits_modules_that_are_equal(pair: tuple[tnn.Module, mnn.Module]):
    assert of_pair(ModulePair("a", "a", *pair)) == []


class Tied(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = tnn.Embedding(5, 3), tnn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = tnn.BatchNorm1d(5)
        self.register_buffer("mask", torch.ones(4))


class PortTied(mnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = mnn.Embedding(5, 3), mnn.Linear(3, 5, bias=False)
        self.norm = mnn.BatchNorm(5)
        self.mask = mx.ones(4)


def test_lint_reads_both_trees_as_wholes():
    port = PortTied()
    port.freeze()
    port.unfreeze()
    port.embedding.freeze()
    found = {(d.trap_id, d.where) for d in lint(Tied(), port)}
    assert found == {
        ("frozen-parameter", "embedding.weight"),
        ("batchnorm-unfreeze", "norm.running_mean"),
        ("batchnorm-unfreeze", "norm.running_var"),
        ("buffer-trains", "mask"),
        ("tied-array", "embedding.weight"),
    }


def test_lint_sees_tuples_and_half_precision():
    port = PortTied()
    port.norm.unfreeze()
    port.freeze(keys="mask", recurse=False)
    port.spare = (mnn.Linear(2, 2),)
    port.head.weight = port.head.weight.astype(mx.float16)
    found = {d.trap_id: d for d in lint(Tied(), port)}
    assert "a tuple of modules" in found["parameter-in-tuple"].evidence


def test_lint_of_equal_trees_is_empty():
    reference = tnn.Sequential(tnn.Conv2d(2, 3, 3), tnn.BatchNorm2d(3), tnn.ReLU())
    port = mnn.Sequential(mnn.Conv2d(2, 3, 3), mnn.BatchNorm(3), mnn.ReLU())
    assert lint(reference, port) == []


T_OPT, M_OPT = torch.optim, optim
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Any, list[str]]] = {
    "equal": (lambda p: T_OPT.SGD(p, 0.1, momentum=0.9), M_OPT.SGD(0.1, momentum=0.9), []),
    "momentum": (
        lambda p: T_OPT.SGD(p, 0.1, momentum=0.9),
        M_OPT.SGD(0.1, momentum=0.901),
        ["optimizer-settings"],
    ),
    "rate": (lambda p: T_OPT.SGD(p, 0.1), M_OPT.SGD(0.1001), ["optimizer-settings"]),
    "correction": (lambda p: T_OPT.Adam(p, 1e-3), M_OPT.Adam(1e-3), ["adam-bias-correction"]),
    "in float32": (
        lambda p: T_OPT.Adam(p, 1e-3),
        M_OPT.Adam(1e-3, bias_correction=True),
        ["adam-correction-precision"],
    ),
    "betas": (
        lambda p: T_OPT.Adam(p, 1e-3, betas=(0.5, 0.999)),
        M_OPT.Adam(1e-3, bias_correction=True),
        ["optimizer-settings", "adam-correction-precision"],
    ),
    "coupled": (
        lambda p: T_OPT.Adam(p, 1e-3, weight_decay=0.1),
        M_OPT.AdamW(1e-3, weight_decay=0.1),
        ["weight-decay-coupled"],
    ),
    "adamax": (lambda p: T_OPT.Adamax(p), M_OPT.Adamax(2e-3), ["adamax-bias-correction"]),
    "adagrad": (lambda p: T_OPT.Adagrad(p, 0.1), M_OPT.Adagrad(0.1), ["optimizer-defaults"]),
    "dampening": (
        lambda p: T_OPT.SGD(p, 0.1, momentum=0.9, dampening=0.5),
        M_OPT.SGD(0.1, momentum=0.9, dampening=0.5),
        ["sgd-dampening"],
    ),
    "kind": (lambda p: T_OPT.RMSprop(p, 0.1), M_OPT.SGD(0.1), ["optimizer-settings"]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_compared(name: str):
    theirs, ours, expected = OPTIMIZERS[name]
    reference = tnn.Linear(2, 2)
    found = lint(reference, mnn.Linear(2, 2), [(theirs(reference.parameters()), ours)])
    assert [d.trap_id for d in found] == expected


# ----------------------------------------------------------------------------- alternatives


class Net(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = tnn.Linear(4, 4), tnn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(F.leaky_relu(self.a(x), 0.2))


def net(forward: Callable[[Any, mx.array], mx.array]) -> mnn.Module:
    class Port(mnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mnn.Linear(4, 4), mnn.Linear(4, 4)

        __call__ = forward

    return Port()


def leaky(x: mx.array, slope: float = 0.2) -> mx.array:
    return mx.where(x > 0, x, slope * x)


WRONG = {
    "slope": (lambda m, x: x + m.b(leaky(m.a(x), 0.20001)), "activation-slope", "0.20001 for 0.2"),
    "kind": (lambda m, x: x + m.b(mx.tanh(m.a(x))), "activation-kind", "tanh for leaky_relu"),
    "residual": (lambda m, x: m.b(leaky(m.a(x))), "residual-dropped", "first summand is missing"),
    "swapped": (lambda m, x: x + m.a(leaky(m.b(x))), "layer-order", "a and b are swapped"),
    "skipped": (lambda m, x: x + leaky(m.a(x)), "layer-order", "b is skipped"),
    "bias": (lambda m, x: x + m.b(leaky(m.a(x))) - m.b.bias, "bias-missing", "second linear"),
    "transposed": (
        lambda m, x: x + m.b(leaky(x @ m.a.weight + m.a.bias)),
        "weight-transposed",
        "first linear",
    ),
    "factor": (lambda m, x: 0.75 * (x + m.b(leaky(m.a(x)))), "scale-factor", "times 0.75"),
    "sigmoid": (
        lambda m, x: mx.sigmoid(x + m.b(leaky(m.a(x)))),
        "activation-kind",
        "a sigmoid of the output",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_alternative_that_the_port_computes_is_named(name: str):
    forward, trap, said = WRONG[name]
    found = blamed(Net(), net(forward), drawn(3, 4))
    assert (found[0].trap_id, found[0].where) == (trap, "net.layer")
    assert said in found[0].evidence
    assert said in str(found[0])


def test_a_difference_that_nothing_explains_stays_unexplained():
    assert blamed(Net(), net(lambda m, x: x + m.b(leaky(m.a(x)) ** 2) ** 3), drawn(3, 4)) == []


def test_nothing_is_explained_where_nothing_differs():
    assert blamed(Net(), net(lambda m, x: x + m.b(leaky(m.a(x)))), drawn(3, 4)) == []


def test_a_stopped_gradient_is_named():
    port = net(lambda m, x: x + m.b(mx.stop_gradient(leaky(m.a(x)))))
    found = blamed(Net(), port, drawn(3, 4), direction="backward")
    assert found[0].trap_id == "gradient-stopped"


def test_a_parameter_without_gradient_is_named():
    port = net(lambda m, x: x + leaky(m.a(x)) @ m.b.weight.T + mx.stop_gradient(m.b.bias))
    found = blamed(Net(), port, drawn(3, 4), direction="backward")
    assert (found[0].trap_id, "no gradient of b.bias" in found[0].evidence) == (
        "gradient-stopped",
        True,
    )


class Image(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = tnn.Conv2d(3, 3, 3, padding=1)
        self.fc = tnn.Linear(3 * 4 * 5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).flatten(1))


class PortImage(mnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = mnn.Conv2d(3, 3, 3, padding=1)
        self.fc = mnn.Linear(3 * 4 * 5, 2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc(self.conv(x).flatten(1))


def test_images_are_laid_out_for_the_port():
    found = blamed(Image(), PortImage(), drawn(2, 3, 4, 5))
    assert found[0].trap_id == "flatten-order"


def test_the_modules_are_left_as_they_were():
    reference, port = Image(), PortImage()
    carry(reference, port)
    before = copy.deepcopy(reference.state_dict()), mx.array(port.fc.weight)
    blamed(reference, port, drawn(2, 3, 4, 5))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, before[0][name])
    assert mx.array_equal(port.fc.weight, before[1])
    assert "forward" not in vars(reference.conv)


def test_a_function_is_diagnosed_too():
    found = diagnose_functions(
        F.cross_entropy,
        lambda x, y: mnn.losses.cross_entropy(x, y).sum(),
        (drawn(4, 3), np.array([0, 2, 1, 1])),
    )
    assert found[0].trap_id == "loss-reduction"
    assert "'sum' for 'mean'" in found[0].evidence


def test_a_module_that_cannot_be_called_alone_is_no_crash():
    def broken(m: Any, x: mx.array) -> mx.array:
        raise RuntimeError("only within its model")

    assert blamed(Net(), net(broken), drawn(3, 4)) == []


def test_a_stopped_gradient_is_named_in_a_module_with_running_statistics():
    class Normed(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.fc = tnn.BatchNorm1d(4), tnn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.bn(x))

    class PortNormed(mnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.fc = mnn.BatchNorm(4), mnn.Linear(4, 2)

        def __call__(self, x: mx.array) -> mx.array:
            return self.fc(mx.stop_gradient(self.bn(x)))

    found = blamed(Normed(), PortNormed(), drawn(5, 4), direction="backward")
    assert found[0].trap_id == "gradient-stopped"
    assert "after batch_norm" in found[0].evidence
