"""What public ports of vision, diffusion, speech and graph models do, in miniature: each was met in
a package that others wrote, and the kit went wrong on it, or said too little."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from torch import nn as tnn
from torch.nn import functional as F

from mlx_parity import Report, check, counterfactual
from mlx_parity.bench import Bench
from mlx_parity.counterfactual import Alternative
from mlx_parity.double import InDouble
from mlx_parity.equality import compare
from mlx_parity.localise import _Isolated

DIM = 8
X = np.random.default_rng(0).standard_normal((2, 6, DIM)).astype(np.float32)


def causes(report: Report) -> dict[str, str]:
    return {d.trap_id: d.evidence for d in report.diagnoses}


def guilty(report: Report) -> list[str]:
    return [g.pair.reference_path for g in report.guilty]


# ------------------------------------------------------------------------------ shifted windows


class Windows(tnn.Module):
    """A bias for each pair of places, and a roll there and back, as shifted windows have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = tnn.Parameter(torch.randn(3, DIM))
        self.register_buffer("places", torch.tensor([0, 1, 2, 2, 1, 0]), persistent=False)
        self.fc = tnn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.roll(x, (-2,), dims=(1,)) + self.table[self.places]
        return torch.roll(self.fc(x), (2,), dims=(1,))


class WindowsPort(nn.Module):
    def __init__(self, ways: int = 1, hidden: bool = True) -> None:
        super().__init__()
        self.table = mx.zeros((3, DIM))
        name = "_places" if hidden else "places"
        setattr(self, name, mx.array([0, 1, 2, 2, 1, 0]))
        self.fc = nn.Linear(DIM, DIM)
        self.ways, self.hidden = ways, hidden

    def __call__(self, x: mx.array) -> mx.array:
        places = self._places if self.hidden else self.places
        x = mx.roll(x, -2 * self.ways, 1) + self.table[places]
        return mx.roll(self.fc(x), 2 * self.ways, 1)


def test_a_roll_the_other_way_is_named():
    check(Windows(), WindowsPort(), X, until="gradients").assert_ok()
    report = check(Windows(), WindowsPort(-1), X, until="gradients")
    assert "rolled the other way, in every roll" in causes(report)["roll-direction"]


def test_an_index_among_the_parameters_is_named_and_the_rest_is_compared():
    """MLX counts it as trainable, and raises as soon as it is to be differentiated."""
    report = check(Windows(), WindowsPort(hidden=False), X, until="gradients")
    assert not report.ok
    rungs = {r.name: r for r in report.rungs}
    assert [r.ok for r in rungs.values()] == [True, True, True, False]
    assert "places: whole numbers count as trainable" in rungs["gradients"].message
    assert rungs["gradients"].findings
    assert all(f.ok for f in rungs["gradients"].findings)
    assert [(d.trap_id, d.where) for d in report.diagnoses] == [("buffer-trains", "places")]
    # Beside another fault it is said as well.
    report = check(Windows(), WindowsPort(-1, hidden=False), X, until="gradients")
    assert {"roll-direction", "buffer-trains"} <= causes(report).keys()
    assert "gradients: the port raises" in str(report)


# ----------------------------------------------------------------------- eps that nobody declares


class Written(tnn.Module):
    """A layer before a function without parameters."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.function = tnn.Linear(DIM, DIM), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.fc(x))


class WrittenPort(nn.Module):
    def __init__(self, function: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(DIM, DIM), function

    def __call__(self, x: mx.array) -> mx.array:
        return self.function(self.fc(x))


def length(x: mx.array) -> mx.array:
    return mx.linalg.norm(x, axis=-1, keepdims=True)


def response(x: Any, norm: Any, eps: float) -> Any:
    """Global response normalisation without parameters."""
    return x * norm / (norm.mean(-1) + eps)[..., None]


WRITTEN = {
    "added to the length": (
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / (length(x) + 1e-5),
        ("norm-eps", "1e-05 added to the length"),
    ),
    "under the root": (
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / mx.sqrt(mx.square(x).sum(-1, keepdims=True) + 1e-4),
        ("norm-eps", "0.0001 added under the root"),
    ),
    "a mean square": (
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / mx.sqrt(mx.square(x).mean(-1, keepdims=True)),
        ("norm-kind", "RMSNorm for a length of 1"),
    ),
    "another axis": (
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / mx.linalg.norm(x, axis=1, keepdims=True),
        ("norm-axis", "a length of 1 along axis 1 for 2"),
    ),
    "an eps in a sum": (
        lambda x: response(x, x.norm(dim=1, keepdim=True), 1e-6),
        lambda x: response(x, mx.linalg.norm(x, axis=1, keepdims=True), 1e-3),
        ("norm-eps", "0.001 for 1e-06"),
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_eps_that_is_written_out_is_measured(name: str):
    theirs, ours, (trap, said) = WRITTEN[name]
    report = check(Written(theirs), WrittenPort(ours), X, until="forward")
    evidence = causes(report)[trap]
    if "{" not in said and trap == "norm-eps":  # measured: to three digits
        number, _, rest = said.partition(" ")
        found, _, rest_found = evidence.removeprefix("with ").partition(" ")
        assert float(found) == pytest.approx(float(number), rel=0.01)
        assert rest_found.startswith(rest)
    else:
        assert said in evidence
    assert not {"scale-factor", "attention-scale"} & causes(report).keys()


# ------------------------------------------------------------------------------------ frequencies


class Times(tnn.Module):
    """Times (B,) to sines and cosines of 64 frequencies, in float32 whatever it is given."""

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = torch.arange(64, dtype=torch.float32)
        rates = torch.exp(half * -(math.log(10_000) / 63))
        angles = 1000 * t[:, None].float() * rates[None]
        return torch.cat([angles.sin(), angles.cos()], -1)


class Timed(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.times, self.fc = Times(), tnn.Linear(128, 4)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.fc(self.times(t))


class TimesPort(nn.Module):
    def __init__(self, scale: float = 1000, steps: int = 63, swapped: bool = False) -> None:
        super().__init__()
        self.how = scale, steps, swapped

    def __call__(self, t: mx.array) -> mx.array:
        scale, steps, swapped = self.how
        angles = scale * t[:, None] * mx.exp(mx.arange(64) * -(math.log(10_000) / steps))[None]
        pair = [mx.sin(angles), mx.cos(angles)]
        return mx.concatenate(pair[::-1] if swapped else pair, axis=-1)


class TimedPort(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.times, self.fc = TimesPort(**how), nn.Linear(128, 4)

    def __call__(self, t: mx.array) -> mx.array:
        return self.fc(self.times(t))


@pytest.mark.parametrize(
    ("how", "trap", "said"),
    [
        ({"scale": 100}, "scale-factor", "a factor of 100 for 1000"),
        ({"steps": 64}, "constant-differs", "rates over 64 for 63"),
        ({"swapped": True}, "concatenation-order", "in the order [1, 0]"),
    ],
)
def test_frequencies_too_steep_to_be_fitted_are_named(how: dict[str, Any], trap: str, said: str):
    t = np.random.default_rng(0).random(3).astype(np.float32)
    report = check(Timed(), TimedPort(**how), t, until="forward")
    assert guilty(report) == ["times"]
    assert not any(reading.note for reading in report.readings)  # each can be called alone
    assert said in causes(report)[trap]


def test_a_reference_that_casts_to_float32_is_an_oracle_all_the_same():
    t = np.random.default_rng(0).random(3).astype(np.float32)
    check(Timed(), TimedPort(), t, until="gradients").assert_ok()


def test_in_double_every_way_to_float32_leads_to_float64():
    x = torch.arange(3)
    with InDouble():
        made = [
            x.float(),
            x.to(torch.float32),
            x.to(dtype=torch.float32),
            x.type(torch.float32),
            torch.arange(3, dtype=torch.float32),
            torch.arange(3.0),
            torch.zeros(2),
            torch.tensor(0.1),
            torch.linspace(0, 1, 3),
            F.softmax(x.double(), dim=0, dtype=torch.float32),
        ]
        assert {a.dtype for a in made} == {torch.float64}
        assert float(made[7]) == 0.1
        assert torch.arange(3).dtype == torch.int64
        assert x.to(torch.float16).dtype == torch.float16
        torch.manual_seed(0)
        drawn = torch.rand(4)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(4))  # in float64 other numbers would be drawn
    assert torch.zeros(1).dtype == torch.float32


# ---------------------------------------------------------------------------------- convolutions


class Padded(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = tnn.Linear(DIM, DIM), tnn.Conv1d(DIM, DIM, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.tanh(self.fc(x)).transpose(1, 2)).transpose(1, 2)


class PaddedPort(nn.Module):
    """Pads by itself before a convolution that does not."""

    def __init__(self, before: int = 2, act: Callable[[mx.array], mx.array] = mx.tanh) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(DIM, DIM), nn.Conv1d(DIM, DIM, 5)
        self.before, self.act = before, act

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(
            mx.pad(self.act(self.fc(x)), [(0, 0), (self.before, 4 - self.before), (0, 0)])
        )


def test_a_convolution_that_is_padded_by_its_caller_is_innocent():
    check(Padded(), PaddedPort(), X, until="gradients").assert_ok()
    report = check(Padded(), PaddedPort(act=mx.sigmoid), X, until="gradients")
    assert guilty(report) == [""]
    assert list(causes(report)) == ["activation-kind"]
    (conv,) = (r for r in report.readings if r.pair.reference_path == "conv")
    assert conv.note == "takes another shape in the port"
    assert conv.isolated is None


@pytest.mark.parametrize(("before", "said"), [(4, "padding before"), (0, "padding behind")])
def test_padding_on_one_side_is_named(before: int, said: str):
    report = check(Padded(), PaddedPort(before), X, until="gradients")
    assert guilty(report) == [""]
    assert said in causes(report)["conv-geometry"]


def test_a_pointwise_convolution_as_a_product_from_the_wrong_side():
    class Pointwise(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = tnn.Conv2d(DIM, DIM, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    class PointwisePort(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Linear(DIM, DIM)

        def __call__(self, x: mx.array) -> mx.array:
            return x @ self.conv.weight + self.conv.bias

    x = np.random.default_rng(0).standard_normal((2, DIM, 3, 4))
    report = check(Pointwise(), PointwisePort(), x, until="forward")
    assert "the weight transposed" in causes(report)["weight-transposed"]


@pytest.mark.parametrize("shape", [(2, DIM, 6), (2, DIM, 5, 6)])
@pytest.mark.parametrize("images", [None, ["x"], ["x", "output"]])
def test_channels_go_last_where_a_norm_alone_tells(shape: tuple[int, ...], images: Any):
    class Normed(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = tnn.GroupNorm(4, DIM)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.norm(x))

    class NormedPort(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(4, DIM, pytorch_compatible=True)

        def __call__(self, x: mx.array) -> mx.array:
            return mx.tanh(self.norm(x))

    x = np.random.default_rng(0).standard_normal(shape)
    check(Normed(), NormedPort(), x, until="forward", images=images).assert_ok()


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


# ----------------------------------------------------------------------------------------- blocks


class Cache:
    """What a layer reads and writes; its tensors are its own affair."""

    def __init__(self) -> None:
        self.seen, self._count = torch.zeros(1), torch.tensor(0)


class Layer(tnn.Module):
    """Two branches, and how they stand to their norms and to each other."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm, self.norm2 = tnn.LayerNorm(DIM), tnn.LayerNorm(DIM)
        self.up, self.down = tnn.Linear(DIM, DIM), tnn.Linear(DIM, DIM)
        self.gain = tnn.Parameter(torch.randn(DIM) / 10)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        x = x + cache.seen.to(x.dtype)
        if self.how == "before":
            x = x + torch.tanh(self.up(self.norm(x)))
        elif self.how == "behind":
            x = self.norm(x + torch.tanh(self.up(x)))
        elif self.how == "parallel":
            y = self.norm(x)
            return x + self.up(y) + torch.sigmoid(self.down(y))
        return x + self.down(self.norm2(x) * (1 + self.gain))


class Layered(tnn.Module):
    def __init__(self, how: str, layers: int) -> None:
        super().__init__()
        self.layers = tnn.ModuleList(Layer(how) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = Cache()
        for layer in self.layers:
            x = layer(x, cache=cache)
        return x


class LayerPort(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how
        self.norm, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.up, self.down = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.gain = mx.zeros(DIM)

    def __call__(self, x: mx.array) -> mx.array:
        if self._how == "before":
            x = x + mx.tanh(self.up(self.norm(x)))
        elif self._how == "behind":
            x = self.norm(x + mx.tanh(self.up(x)))
        elif self._how in ("parallel", "in a row"):
            y = self.norm(x)
            first = self.up(y)
            return x + first + mx.sigmoid(self.down(y + first if self._how == "in a row" else y))
        one = 0 if self._how == "no 1" else 1
        return x + self.down(self.norm2(x) * (one + self.gain))


class LayeredPort(nn.Module):
    def __init__(self, how: str, layers: int) -> None:
        super().__init__()
        self.layers = [LayerPort(how) for _ in range(layers)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


SLIPS = {
    "behind for before": ("before", "behind", "norm-first", "norm of the second add, not of"),
    "before for behind": ("behind", "before", "norm-first", "norm of one summand's branch, not of"),
    "in a row": ("parallel", "in a row", "another-tensor", "added to the input of the second"),
    "no 1": ("plain", "no 1", "norm-affine", "no 1 added"),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_in_every_block_is_searched_for_once(name: str, monkeypatch: pytest.MonkeyPatch):
    theirs, ours, trap, said = SLIPS[name]
    tried: dict[int, int] = {}
    usual = Bench.errors

    def counted(self: Bench, *args: Any) -> float:
        tried[id(self)] = tried.get(id(self), 0) + 1
        return usual(self, *args)

    monkeypatch.setattr(Bench, "errors", counted)
    kept: list[Bench] = []  # or another would have its id
    made = Bench.__post_init__
    monkeypatch.setattr(Bench, "__post_init__", lambda self: (kept.append(self), made(self))[1])
    report = check(Layered(theirs, 3), LayeredPort(ours, 3), X, until="forward", weights="random")
    assert guilty(report) == ["layers.0", "layers.1", "layers.2"]
    assert [d.where for d in report.diagnoses if d.trap_id == trap] == guilty(report)
    assert said in causes(report)[trap]
    first, *others = tried.values()
    assert first > 20
    assert max(others) < 6


@pytest.mark.parametrize("how", ["before", "behind", "parallel", "plain"])
def test_blocks_that_are_alike_are_equal(how: str):
    check(Layered(how, 2), LayeredPort(how, 2), X, until="gradients").assert_ok()


class Capped(tnn.Module):
    """A cap behind layers in which many more calls could be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = Layered("before", 3), tnn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.head(self.layers(x)))


class CappedPort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = LayeredPort("before", 3), nn.Linear(DIM, DIM)

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(self.layers(x))


def test_what_lies_behind_the_last_that_agrees_is_tried_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counterfactual, "MANY", 100)
    tried: list[str] = []
    usual = Bench.errors

    def noted(self: Bench, alternative: Alternative, points: Any) -> float:
        tried.append(alternative.what)
        return usual(self, alternative, points)

    monkeypatch.setattr(Bench, "errors", noted)
    report = check(Capped(), CappedPort(), X, until="forward", weights="random")
    assert guilty(report) == [""]
    assert report.guilty[0].between == ("head", "")
    (found,) = (i for i, what in enumerate(tried) if what.startswith("no tanh, in the 4th tanh"))
    assert found < 20
    assert len(tried) > 20


class MeanSquareNorm(tnn.Module):
    """A norm as language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = tnn.Parameter(torch.ones(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.float32)
        return (self.weight * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class CentredNorm(MeanSquareNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y - y.mean(-1, keepdim=True)
        return self.weight * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


class Sandwich(tnn.Module):
    """``beside``: the second branch reads the same norm's result as the first."""

    def __init__(self, norm: type[tnn.Module], beside: bool) -> None:
        super().__init__()
        self.norm, self.norm2 = norm(), norm()
        self.up, self.down = tnn.Linear(DIM, DIM), tnn.Linear(DIM, DIM)
        self.beside = beside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.beside:
            y = self.norm(x)
            return x + self.up(y) + torch.tanh(self.down(y))
        return 3 * (x + self.norm2(self.down(torch.tanh(self.up(self.norm(x))))))


class SandwichPort(nn.Module):
    def __init__(self, how: str, norm: type[nn.Module]) -> None:
        super().__init__()
        self._how = how
        self.norm, self.norm2 = norm(DIM, eps=1e-6), norm(DIM, eps=1e-6)
        self.up, self.down = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def __call__(self, x: mx.array) -> mx.array:
        if self._how == "in a row":
            x = x + self.up(self.norm(x))
            return x + mx.tanh(self.down(self.norm(x)))
        y = self.down(mx.tanh(self.up(self.norm(x))))
        if self._how == "of the sum":
            return 3 * self.norm2(x + y)
        return (3 / 4 if self._how == "factor" else 3) * (x + self.norm2(y))


NORMS = {
    "of the sum": (MeanSquareNorm, False, "norm-first", "norm2 of the"),
    "in a row": (MeanSquareNorm, True, "another-tensor", "added to what norm takes for the second"),
    "factor": (MeanSquareNorm, False, "scale-factor", "times 0.25 more"),
}


@pytest.mark.parametrize("how", NORMS)
def test_norms_that_are_modules_of_their_own_move_too(how: str):
    norm, beside, trap, said = NORMS[how]
    report = check(
        Sandwich(norm, beside), SandwichPort(how, nn.RMSNorm), X, until="forward", weights="random"
    )
    assert guilty(report) == [""]
    assert said in causes(report)[trap]


def test_a_mean_that_is_not_subtracted_is_named():
    report = check(
        Sandwich(CentredNorm, False),
        SandwichPort("", nn.RMSNorm),
        X,
        until="forward",
        weights="random",
    )
    assert guilty(report) == ["norm", "norm2"]
    assert "no mean subtracted" in causes(report)["norm-kind"]
    check(Sandwich(MeanSquareNorm, False), SandwichPort("", nn.RMSNorm), X).assert_ok()


class Worded(tnn.Module):
    """Positions from 2, as RoBERTa has them, and a word that stands for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.words = tnn.Embedding(11, DIM, padding_idx=1)
        self.places = tnn.Embedding(9, DIM)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.words(tokens) + self.places(2 + torch.arange(tokens.shape[1]))


class WordedPort(nn.Module):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, DIM), nn.Embedding(9, DIM)
        self._first = first

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.words(tokens) + self.places(self._first + mx.arange(tokens.shape[1]))


def test_what_concerns_gradients_explains_no_output():
    tokens = np.array([[3, 5, 2, 7]])
    check(Worded(), WordedPort(2), tokens, until="forward").assert_ok()
    report = check(Worded(), WordedPort(0), tokens, until="gradients")
    assert report.failed is not None
    assert report.failed.name == "forward"
    assert "embedding-padding" not in causes(report)
    assert "off by -2" in causes(report)["index-out-of-bounds"]


def test_rounding_that_tokens_alone_do_not_vary_is_no_difference():
    """A factor behind a language model: all points are the same, and so is every rounding."""

    class Model(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layers = tnn.Embedding(31, DIM), Layered("before", 2)
            self.head = tnn.Linear(DIM, 31)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers(self.words(tokens))) / 2

    class Port(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layers = nn.Embedding(31, DIM), LayeredPort("before", 2)
            self.head = nn.Linear(DIM, 31)

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.head(self.layers(self.words(tokens))) * 2

    tokens = np.random.default_rng(0).integers(0, 31, (4, 24))
    report = check(Model(), Port(), tokens, until="forward", weights="random")
    assert guilty(report) == [""]
    assert "times 4 more (div)" in causes(report)["scale-factor"]
    assert list(causes(report)) == ["scale-factor"]
