"""Why public ports differ, in miniature: each slip was met in a package that others wrote, or put
into one, and no cause was named for it, or a wrong one."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from torch import nn as tnn
from torch.nn import functional as F

from mlx_parity import bench, check, counterfactual
from mlx_parity.bench import Bench
from mlx_parity.counterfactual import Alternative
from mlx_parity.double import InDouble
from tests.ports import DIM, Written, WrittenPort, X, causes, guilty

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
        return 2 * torch.tanh(self.head(self.layers(x)))


class CappedPort(nn.Module):
    def __init__(self, end: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.layers, self.head, self.end = LayeredPort("before", 3), nn.Linear(DIM, DIM), end

    def __call__(self, x: mx.array) -> mx.array:
        return self.end(self.head(self.layers(x)))


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda x: 2 * x, "no tanh, in the 4th tanh"),
        (lambda x: 0.3 * mx.tanh(x), "times 0.15 more"),
    ],
)
def test_what_lies_behind_the_last_that_agrees_is_tried_first(
    end: Callable[[mx.array], mx.array], said: str, monkeypatch: pytest.MonkeyPatch
):
    """Numbers too, where there are few calls."""
    monkeypatch.setattr(counterfactual, "MANY", 100)
    tried: list[str] = []
    usual = Bench.errors

    def noted(self: Bench, alternative: Alternative, points: Any) -> float:
        tried.append(alternative.what)
        return usual(self, alternative, points)

    monkeypatch.setattr(Bench, "errors", noted)
    report = check(Capped(), CappedPort(end), X, until="forward", weights="random")
    assert guilty(report) == [""]
    assert report.guilty[0].between == ("head", "")
    first = next(i for i, what in enumerate(tried) if what.startswith(said))
    assert first < next(i for i, what in enumerate(tried) if " is skipped" in what)
    assert len(tried) > 100


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


def test_rounding_that_tokens_alone_do_not_vary_is_no_difference(monkeypatch: pytest.MonkeyPatch):
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

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a mean over points that are all the same")

    monkeypatch.setattr(bench, "compare", never)
    tokens = np.random.default_rng(0).integers(0, 31, (4, 24))
    report = check(Model(), Port(), tokens, until="forward", weights="random")
    assert guilty(report) == [""]
    assert "times 4 more (div)" in causes(report)["scale-factor"]
    assert list(causes(report)) == ["scale-factor"]
