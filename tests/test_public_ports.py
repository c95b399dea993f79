"""What public ports of vision, diffusion, speech and graph models do, in miniature: each was met in
a package that others wrote, and the kit went wrong on it, or said too little."""

import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from torch import nn as tnn

from mlx_parity import check
from mlx_parity.equality import compare
from mlx_parity.localise import _Isolated
from tests.ports import DIM, Written, WrittenPort, X, causes, guilty

# ---------------------------------------------------------------------------------------- outputs


class Embedded(tnn.Module):
    """States and one of them projected, as CLIP's text model gives."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = tnn.Linear(DIM, DIM), tnn.Linear(DIM, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        states = torch.tanh(self.fc(x))
        return {"text_embeds": self.head(states[:, -1]), "last_hidden_state": states}


class EmbeddedPort(nn.Module):
    """Gives all states beside, and calls the projected one otherwise."""

    def __init__(self, taken: int = -1) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM, bias=False)
        self.taken = taken

    def __call__(self, x: mx.array) -> dict[str, Any]:
        states = mx.tanh(self.fc(x))
        return {
            "pooled_output": self.head(states[:, self.taken]),
            "last_hidden_state": states,
            "hidden_states": [x, states],
        }


def test_an_output_of_a_size_of_its_own_is_compared_whatever_it_is_called():
    check(Embedded(), EmbeddedPort(), X, until="gradients").assert_ok()
    report = check(Embedded(), EmbeddedPort(0), X, until="gradients")
    assert not report.ok
    assert "the first position" in causes(report)["pooling-kind"]


def test_an_output_that_is_not_compared_stands_in_the_first_line():
    def states(port: nn.Module, x: mx.array) -> dict[str, mx.array]:
        return {"last_hidden_state": port(x)["last_hidden_state"]}

    report = check(Embedded(), EmbeddedPort(0), X, until="gradients", call_port=states)
    assert report.ok
    assert "equal but for text_embeds (" in report.summary()
    assert report.to_dict()["uncompared"] == ["text_embeds"]


class Two(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = tnn.Linear(DIM, DIM), tnn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


class TwoPort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return self.b(x), self.a(x)


def test_exchanged_outputs_are_said_to_be():
    report = check(Two(), TwoPort(), X, until="forward")
    assert not report.ok
    assert "output 0 of the port is output 1 of the reference" in report.notes


def test_a_model_that_differs_in_what_was_not_compared_is_a_note():
    """Two outputs of one size in the port: neither is surely the reference's one."""

    def both(port: nn.Module, x: mx.array) -> dict[str, mx.array]:
        found = port(x)
        pooled = found["pooled_output"]
        states = {"last_hidden_state": found["last_hidden_state"]}
        return {**states, "pooled_output": pooled, "other": 2 * pooled}

    class Root(EmbeddedPort):
        def __call__(self, x: mx.array) -> dict[str, mx.array]:
            return both(super().__call__, x)

    report = check(Embedded(), Root(0), X, until="gradients")
    assert report.uncompared == ["text_embeds"]
    assert report.guilty == []
    assert any("by itself gives something else" in note for note in report.notes)


def test_what_nothing_depends_on_is_a_note_and_nobody_is_guilty():
    """A layer's output is scaled there and back in the port."""

    class Scaled(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Written(torch.tanh)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 1

    class ScaledPort(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = WrittenPort(lambda x: 2 * mx.tanh(x))

        def __call__(self, x: mx.array) -> mx.array:
            return self.inner(x) / 2 + 1

    report = check(Scaled(), ScaledPort(), X, until="gradients")
    report.assert_ok()
    assert report.guilty == []
    assert "Guilty" not in str(report)


# ------------------------------------------------------------------------------ weights and calls


class Apart(tnn.Module):
    """A bias of its own, behind a product that has none: a graph convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bias = tnn.Linear(DIM, 5, bias=False), tnn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) + self.bias


class ApartPort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 5)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x)


@pytest.mark.parametrize("map", [None, {"bias": "linear.bias"}])
def test_a_bias_that_another_layer_holds_is_carried(map: Any):
    report = check(Apart(), ApartPort(), X, until="gradients", map=map)
    report.assert_ok()
    said = "bias is taken for linear.bias, the only one left of its shape"
    assert (said in report.notes) == (map is None)


def test_a_guess_at_the_weights_is_called_one_where_something_differs():
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            return self.one(x), mx.tanh(self.two(x)) ** 3 + x * x

    report = check(Two(), Renamed(), X, until="forward")
    assert "map= says which is which where that went wrong" in " ".join(str(report).split())


class Base(nn.Module):
    def act(self, x: mx.array) -> mx.array:
        return mx.tanh(x)


class ByItsClass(Base):
    """Asks for what it inherits by its own class, which finds itself in any subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)

    def act(self, x: mx.array) -> mx.array:
        return super(self.__class__, self).act(x)

    def __call__(self, x: mx.array) -> mx.array:
        return self.act(self.fc(x))


def test_a_port_that_asks_for_its_own_class_is_not_disturbed():
    port = ByItsClass()
    check(Written(torch.tanh), port, X, until="gradients").assert_ok()
    assert type(port) is ByItsClass


class Encoder(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = tnn.Linear(DIM, DIM)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class EncoderPort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)

    def encode(self, x: mx.array) -> mx.array:
        return self.fc(x)


def test_models_that_cannot_be_called_are_called_as_is_said():
    def encode(model: Any, x: Any) -> Any:
        return model.encode(x)

    how = {"call_reference": encode, "call_port": encode}
    check(Encoder(), EncoderPort(), X, until="gradients", **how).assert_ok()
    problem = check(Encoder(), EncoderPort(), X, call_reference=encode).problem
    assert "call_port=lambda model" in problem


class Picked(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = tnn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.fc(x)[:, index]


class PickedPort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)

    def __call__(self, index: mx.array, x: mx.array) -> mx.array:
        return self.fc(x)[:, index]


def test_arguments_of_equal_names_in_another_order_go_by_name():
    report = check(Picked(), PickedPort(), (X, np.array([2, 0])), until="gradients")
    report.assert_ok()
    assert any("by name, otherwise than the reference" in note for note in report.notes)


def test_a_call_that_does_not_fit_leads_to_call_port():
    class Another(PickedPort):
        def __call__(self, a: mx.array, b: mx.array, c: mx.array) -> mx.array:
            return self.fc(a)

    report = check(Picked(), Another(), (X, np.array([2, 0])), until="gradients")
    assert "call_port= says how" in str(report)


def test_the_whole_of_a_long_error_is_told():
    def refused(port: nn.Module, x: mx.array) -> mx.array:
        raise TypeError("incompatible arguments. These are supported:\n  1. (a: array)\n\nInvoked")

    problem = check(Two(), TwoPort(), X, call_port=refused).problem
    assert "These are supported: 1. (a: array) Invoked" in problem


# ---------------------------------------------------------------------------------------- reports


class Buffered(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = tnn.Linear(DIM, DIM)
        self.register_buffer("gain", torch.rand(DIM))
        self.kind, self.size = f"{__name__}.Buffered", sum(p.numel() for p in self.parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x * self.gain)


class BufferedPort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gain = nn.Linear(DIM, DIM), mx.ones(DIM)
        self.kind, self.size = "BufferedPort", DIM * (DIM + 2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc(x * self.gain)


def test_where_only_the_structure_differs_the_rest_is_compared():
    report = check(Buffered(), BufferedPort(), X, until="gradients")
    found = [(r.name, r.ok) for r in report.rungs]
    assert found == [("structure", False), ("forward", True), ("loss", True), ("gradients", True)]
    assert "No module differs" not in str(report)
    assert {d.trap_id for d in report.diagnoses} == {"buffer-trains"}


class Normal(tnn.Module):
    def __init__(self, norms: int = 6) -> None:
        super().__init__()
        self.norms = tnn.ModuleList(tnn.LayerNorm(DIM, eps=1e-6) for _ in range(norms))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm in self.norms:
            x = x + norm(0.05 * x)
        return x


class NormalPort(nn.Module):
    def __init__(self, norms: int = 6) -> None:
        super().__init__()
        self.norms = [nn.LayerNorm(DIM) for _ in range(norms)]

    def __call__(self, x: mx.array) -> mx.array:
        for norm in self.norms:
            x = x + norm(0.05 * x)
        return x


def test_one_slip_in_many_places_is_told_once():
    report = check(Normal(), NormalPort(), X, until="forward")
    assert guilty(report) == [f"norms.{i}" for i in range(6)]
    assert [d.where for d in report.diagnoses] == guilty(report)
    text = str(report)
    assert text.count("Guilty, forward") == text.count("norm-eps") == 1
    assert "Likewise norms.1, norms.2, norms.3, norms.4 and 1 more." in text
    assert "where  norms.0, norms.1, norms.2, norms.3 and 2 more" in text
    page = report.to_html()
    assert page.count("norm-eps") == 1
    assert "<summary>The same kind differs in 5 more</summary><code>norms.1</code>" in page


def test_half_precision_within_a_port_is_a_note():
    def halved(x: mx.array) -> mx.array:
        return mx.tanh(x.astype(mx.bfloat16)).astype(mx.float32)

    for function, said in ((halved, True), (mx.tanh, False)):
        report = check(Written(torch.tanh), WrittenPort(function), X, until="forward")
        assert ("times as rough as PyTorch's" in str(report)) == said


def test_what_is_known_is_not_computed_again(monkeypatch: pytest.MonkeyPatch):
    """More points are drawn for the modules that are still in doubt."""
    calls: dict[str, int] = {}
    usual = _Isolated.port

    def counted(self: _Isolated, *args: Any) -> Any:
        calls[self.pair.reference_path] = calls.get(self.pair.reference_path, 0) + 1
        return usual(self, *args)

    monkeypatch.setattr(_Isolated, "port", counted)

    class Both(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Written(torch.tanh), Written(torch.tanh)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.one(x), self.two(x)

    class BothPort(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = WrittenPort(mx.sigmoid)
            self.two = WrittenPort(lambda x: mx.tanh(x) * (1 + 3e-6))

        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            return self.one(x), self.two(x)

    report = check(Both(), BothPort(), X, until="forward", explain=False)
    assert guilty(report) == ["one", "two"]
    assert calls["one"] < 20 < 40 < calls["two"]


def test_an_infinite_bound_and_no_spread_are_no_warning():
    """Of many elements none can be judged at eight points, and one may be the same at all."""
    rng = np.random.default_rng(0)
    exact = rng.standard_normal(1 << 16)

    def port(point: Any) -> dict[str, np.ndarray]:
        error = 1e-7 * rng.standard_normal(exact.size)
        error[0] = 0
        return {"y": exact + error}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (finding,) = compare(lambda p: {"y": exact}, port, port, dict, stages=(8,), alpha=1e-4)
    assert finding.ok
