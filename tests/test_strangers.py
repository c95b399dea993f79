"""What ports that nobody here wrote look like, in miniature: each was met in a public one."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from torch import nn as tnn

from mlx_parity import check, enlarged, lint
from mlx_parity.enlarged import RUNG as LARGER
from mlx_parity.ladder import Climb, Rung

WORDS, DIM = 11, 8
TOKENS = np.array([[1, 5, 2, 7], [3, 3, 9, 0]])
X = np.random.default_rng(0).standard_normal((3, 5, DIM)).astype(np.float32)


class Block(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = tnn.LayerNorm(DIM)
        self.up, self.down = tnn.Linear(DIM, 2 * DIM), tnn.Linear(2 * DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class BlockPort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down(mx.tanh(self.up(self.norm(x))))


# ------------------------------------------------------------- what a port's modules are


class Uninitialised(nn.Module):
    def __init__(self) -> None:
        self.block = BlockPort()

    def __call__(self, x: mx.array) -> mx.array:
        return self.block(x)


class Around(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def test_a_port_that_never_called_super_init_is_judged_and_told_so():
    port = Uninitialised()
    report = check(Around(), port, X)
    report.assert_ok()
    assert [(d.trap_id, d.where) for d in report.diagnoses] == [
        ("module-not-initialised", "the port")
    ]
    assert "Uninitialised" in report.diagnoses[0].evidence
    assert not {"_no_grad", "_training"} & vars(port).keys()  # left as it was found
    assert "module-not-initialised" in {d.trap_id for d in lint(Around(), port)}


class Scaled(tnn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * DIM**0.5


class Language(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = Scaled(WORDS, DIM), Block()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.block(self.embed(tokens))


class LanguagePort(nn.Module):
    """Scales its embedding one line later, in place."""

    def __init__(self, factor: float = DIM**0.5) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(WORDS, DIM), BlockPort()
        self.factor = factor

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        x *= self.factor
        return self.block(x)


def test_what_a_caller_does_in_a_modules_stead_is_no_fault_of_the_module():
    report = check(Language(), LanguagePort(), TOKENS, until="gradients")
    report.assert_ok()
    assert not report.guilty
    port = LanguagePort()
    port.block.norm.eps = 1e-3
    report = check(Language(), port, TOKENS, until="gradients")
    assert [g.pair.reference_path for g in report.guilty] == ["block.norm"]
    report = check(Language(), LanguagePort(1.0), TOKENS, until="gradients")
    assert [g.pair.reference_path for g in report.guilty] == ["embed"]


def test_an_output_that_is_changed_in_place_is_seen_as_it_was_given():
    class Plain(Language):
        def __init__(self) -> None:
            super().__init__()
            self.embed = tnn.Embedding(WORDS, DIM)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.block(self.embed(tokens) * DIM**0.5)

    port = LanguagePort()
    located = check(Plain(), port, TOKENS, until="gradients", localised=True)
    located.assert_ok()
    assert all(r.forward is None or r.forward.ok for r in located.readings)


# ---------------------------------------------------------------------------- its outputs


class Convolved(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = tnn.Conv2d(2, 3, 3, padding=1), tnn.Conv2d(3, 4, 3)
        self.temperature = tnn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))) * self.temperature


class ConvolvedPort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)
        self.temperature = mx.array(1.0)

    def __call__(self, x: mx.array) -> mx.array:
        return self.second(nn.relu(self.first(x))) * self.temperature


def test_an_output_of_another_shape_is_a_difference_and_has_a_place():
    x = np.random.default_rng(1).standard_normal((2, 2, 8, 8)).astype(np.float32)
    report = check(Convolved(), ConvolvedPort(), x)
    assert report.verdict == "different"
    assert [g.pair.reference_path for g in report.guilty] == ["first"]
    assert "shape: [2, 6, 6, 3]" in str(report)
    assert "conv-geometry" in {d.trap_id for d in report.diagnoses}


# ---------------------------------------------------------------------------- its weights


class Headed(tnn.Module):
    """As published: the files hold ``body`` under bare names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Around()
        self.head = tnn.Linear(DIM, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class HeadedPort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = BlockPort()
        self.head = nn.Linear(DIM, 3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(self.model(x))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return {
            f"model.{n[6:]}" if n.startswith("block.") else n: a.T if n == "block.up.weight" else a
            for n, a in weights.items()
        }


class UpTransposed(BlockPort):
    def __init__(self) -> None:
        super().__init__()
        self.up.weight = self.up.weight.T

    def __call__(self, x: mx.array) -> mx.array:
        up = self.norm(x) @ self.up.weight + self.up.bias
        return x + self.down(mx.tanh(up))


def test_sanitize_may_have_been_written_for_the_model_without_its_head():
    port = HeadedPort()
    port.model = UpTransposed()
    report = check(Headed(), port, X)
    report.assert_ok()
    assert report.carried == "carried through the port's sanitize"


def test_a_sanitize_made_for_other_names_gives_way_to_the_layers():
    class Renamed(HeadedPort):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return {n: a for n, a in weights.items() if "head" in n}

    report = check(Headed(), Renamed(), X)
    report.assert_ok()
    assert any("sanitize leaves out body.block" in n for n in report.notes)


def test_a_bias_that_sanitize_leaves_out_is_a_difference_of_structure():
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BlockPort()
            self.block.down = nn.Linear(2 * DIM, DIM, bias=False)

        def __call__(self, x: mx.array) -> mx.array:
            return self.block(x)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return {n: a for n, a in weights.items() if n != "block.down.bias"}

    reference = Around()
    torch.nn.init.zeros_(reference.block.down.bias)  # as it is in a new model: nothing computes it
    report = check(reference, Same(), X)
    assert report.failed is not None
    assert report.failed.name == "structure"
    assert "block.down.bias [8] of the reference is nothing in the port" in report.rungs[0].message
    assert "bias-missing" in {d.trap_id for d in report.diagnoses}


class FromTheRight(tnn.Module):
    """A linear layer that keeps its weight as (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = tnn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = tnn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def test_a_square_weight_of_a_layer_of_ones_own_is_carried_as_it_is_used():
    square = tnn.Sequential(FromTheRight(DIM, DIM), FromTheRight(DIM, 3))
    check(square, nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, 3)), X).assert_ok()


class Positioned(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.positions = tnn.Embedding(5, DIM)
        with torch.no_grad():
            self.positions.weight.copy_(torch.arange(5 * DIM).reshape(5, DIM).cos())
        self.positions.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x + self.positions.weight)


class PositionedPort(nn.Module):
    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.body = BlockPort()
        self._positions = mx.array(np.cos(np.arange(5 * DIM) + start, dtype=np.float32))
        self._positions = self._positions.reshape(5, DIM)
        self.heads = mx.array([[0, 1], [1, 0]])

    def __call__(self, x: mx.array) -> mx.array:
        return self.body(x + self._positions)


def test_a_frozen_parameter_may_be_a_constant_of_the_port():
    report = check(Positioned(), PositionedPort(), X)
    report.assert_ok()
    assert any("constants of the port's own there: positions.weight" in n for n in report.notes)
    assert any("whole numbers, which the port alone has: heads" in n for n in report.notes)
    assert not lint(Positioned(), PositionedPort())
    assert check(Positioned(), PositionedPort(1), X).verdict == "different"


def test_a_learned_parameter_that_the_port_hides_is_named():
    reference = Positioned()
    reference.positions.requires_grad_(True)
    report = check(reference, PositionedPort(), X)
    assert report.verdict == "undecided"
    assert "no parameters by their names: _positions" in str(report)


def test_weights_that_were_normalised_are_multiplied_out_where_the_port_holds_them_so():
    reference = Around()
    reference.block.up = torch.nn.utils.parametrizations.weight_norm(reference.block.up)

    class Same(Uninitialised):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            super().__init__()

    report = check(reference, Same(), X)
    report.assert_ok()
    assert any("block.up.weight of the reference was multiplied out" in n for n in report.notes)
    assert reference.block.up.weight.shape == (2 * DIM, DIM)  # still computed, not taken away


class Cell(nn.Module):
    """An LSTM written out, with the names of MLX's own."""

    def __init__(self) -> None:
        super().__init__()
        self.Wx = mx.zeros((4 * DIM, DIM))
        self.Wh = mx.zeros((4 * DIM, DIM))
        self.bias = mx.zeros((4 * DIM,))

    def __call__(self, x: mx.array) -> mx.array:
        h = c = mx.zeros((x.shape[0], DIM))
        every = []
        for t in range(x.shape[1]):
            gates = x[:, t] @ self.Wx.T + h @ self.Wh.T + self.bias
            i, f, g, o = mx.split(gates, 4, axis=-1)
            c = mx.sigmoid(f) * c + mx.sigmoid(i) * mx.tanh(g)
            h = mx.sigmoid(o) * mx.tanh(c)
            every.append(h)
        return mx.stack(every, axis=1)


def test_a_recurrent_layer_that_a_port_writes_out_takes_both_biases():
    reference = tnn.LSTM(DIM, DIM, batch_first=True)
    report = check(reference, Cell(), X, call_reference=lambda m, input: m(input)[0])
    report.assert_ok()


def test_a_layer_of_another_width_is_no_constant_that_trains():
    port = BlockPort()
    port.up, port.down = nn.Linear(DIM, 3 * DIM), nn.Linear(3 * DIM, DIM)
    assert "buffer-trains" not in {d.trap_id for d in lint(Block(), port)}


# ------------------------------------------------------------------------------ its caches


class Cache:
    def __init__(self) -> None:
        self.keys: Any = None

    def update(self, keys: torch.Tensor) -> torch.Tensor:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 1)
        return self.keys


class Attention(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = tnn.Linear(DIM, DIM), tnn.Linear(DIM, DIM)
        self.scaling = DIM**-0.5

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        keys = cache.update(self.k(x))
        scores = torch.matmul(self.q(x), keys.transpose(1, 2)) * self.scaling
        return torch.matmul(scores.softmax(-1), keys)


class Cached(tnn.Module):
    """Makes a cache for each call, which its layer writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(x, Cache())


class AttentionPort(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        keys = self.k(x)
        return mx.softmax(self.q(x) @ keys.swapaxes(1, 2) * self.scale, axis=-1) @ keys


class CachedPort(nn.Module):
    def __init__(self, scale: float = DIM**-0.5) -> None:
        super().__init__()
        self.attention = AttentionPort(scale)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.attention(x)


def test_a_layer_that_writes_to_a_cache_is_read_and_explained_by_itself():
    check(Cached(), CachedPort(), X).assert_ok()
    report = check(Cached(), CachedPort(1.0), X)
    assert [g.pair.reference_path for g in report.guilty] == ["attention"]
    assert not [r.note for r in report.readings if r.note]
    assert {"attention-scale", "scale-factor"} & {d.trap_id for d in report.diagnoses}


# ---------------------------------------------------------------------------- the original


def test_an_original_that_only_runs_in_float32_is_told_so():
    class Single(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("expected Float, got Double")
            return self.block(x)

    report = check(Single(), Uninitialised(), X)
    assert report.verdict == "undecided"
    assert "in float64, in which it is the oracle" in " ".join(str(report).split())


class Root(tnn.Module):
    """A norm written out, as most language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = tnn.Parameter(torch.ones(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("skipped", [False, True])
def test_a_norm_of_ones_own_that_is_passed_by_is_explained(skipped: bool):
    class Passed(nn.RMSNorm):
        def __call__(self, x: mx.array) -> mx.array:
            return x if skipped else super().__call__(x)

    reference, port = Around(), Uninitialised()
    reference.block.norm, port.block.norm = Root(), Passed(DIM, eps=1e-6)
    report = check(reference, port, X, until="gradients")
    assert report.ok != skipped
    assert ("with the whole of it skipped" in str(report)) == skipped


# -------------------------------------------------------------------- attention as it is published

HEADS, KEYS, WIDTH = 4, 2, 8


class Rotated(tnn.Module):
    """Grouped queries; cosines, sines and the mask are made by whoever calls."""

    def __init__(self) -> None:
        super().__init__()
        self.q = tnn.Linear(DIM, HEADS * WIDTH, bias=False)
        self.k = tnn.Linear(DIM, KEYS * WIDTH, bias=False)
        self.o = tnn.Linear(HEADS * WIDTH, DIM, bias=False)

    def forward(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        def cut(y: torch.Tensor) -> torch.Tensor:
            return y.view(*y.shape[:2], -1, WIDTH).transpose(1, 2)

        def turned(y: torch.Tensor) -> torch.Tensor:
            half = torch.cat((-y[..., WIDTH // 2 :], y[..., : WIDTH // 2]), dim=-1)
            return y * angles[0] + half * angles[1]

        def every(y: torch.Tensor) -> torch.Tensor:
            many = y[:, :, None].expand(-1, -1, HEADS // KEYS, -1, -1)
            return many.reshape(len(x), HEADS, -1, WIDTH)

        q, k = turned(cut(self.q(x))), turned(cut(self.k(x)))
        scores = torch.matmul(q, every(k).transpose(2, 3)) * WIDTH**-0.5 + mask
        y = torch.matmul(scores.softmax(-1), every(cut(self.k(x))))
        return self.o(y.transpose(1, 2).flatten(2))


class RotatedModel(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Rotated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        powers = 10_000.0 ** (-torch.arange(WIDTH // 2, dtype=x.dtype) / (WIDTH // 2))
        angles = (torch.arange(n, dtype=x.dtype)[:, None] * powers).tile(1, 2)
        mask = torch.full((n, n), -1e9, dtype=x.dtype).triu(1)[None, None]
        return self.attention(x, (angles.cos(), angles.sin()), mask.expand(len(x), 1, n, n))


class RotatedPort(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.q = nn.Linear(DIM, HEADS * WIDTH, bias=False)
        self.k = nn.Linear(DIM, KEYS * WIDTH, bias=False)
        self.o = nn.Linear(HEADS * WIDTH, DIM, bias=False)
        base = 100.0 if fault == "base" else 10_000.0
        self.rope = nn.RoPE(WIDTH, traditional=fault == "traditional", base=base)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        def cut(y: mx.array) -> mx.array:
            return y.reshape(*y.shape[:2], -1, WIDTH).swapaxes(1, 2)

        def every(y: mx.array) -> mx.array:
            if self.fault == "tiled":
                return mx.tile(y, (1, HEADS // KEYS, 1, 1))
            return mx.repeat(y, HEADS // KEYS, axis=1)

        first = 1 if self.fault == "later" else 0
        q, k = self.rope(cut(self.q(x)), offset=first), self.rope(cut(self.k(x)))
        v = self.rope(cut(self.k(x))) if self.fault == "values" else cut(self.k(x))
        ahead = 1 if self.fault == "ahead" else 0
        mask = mx.triu(mx.full((x.shape[1], x.shape[1]), -1e9), 1 + ahead)
        if self.fault == "unmasked":
            mask = mx.zeros_like(mask)
        scores = q @ every(k).swapaxes(2, 3) * WIDTH**-0.5 + mask
        y = mx.softmax(scores, axis=-1) @ every(v)
        return self.o(y.swapaxes(1, 2).flatten(2))


class RotatedModelPort(nn.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.attention = RotatedPort(fault)

    def __call__(self, x: mx.array) -> mx.array:
        return self.attention(x)


@pytest.mark.parametrize(
    ("fault", "trap", "said"),
    [
        ("traditional", "rotary-layout", "pairs of neighbours for halves"),
        ("base", "rotary-base", "a rotary base of about 1e+02 for 1e+04"),
        ("later", "position-offset", "positions +1, in q alone"),
        ("values", "position-offset", "the values rotated too"),
        ("tiled", "repeat-interleaves", "the whole repeated, not each element"),
        ("unmasked", "attention-mask", "no mask"),
        ("ahead", "attention-mask", "a key more for each query"),
    ],
)
def test_attention_whose_rotation_and_mask_are_given_is_explained(fault: str, trap: str, said: str):
    report = check(RotatedModel(), RotatedModelPort(fault), X, until="gradients", weights="random")
    assert [g.pair.reference_path for g in report.guilty] == ["attention"]
    evidence = {d.trap_id: d.evidence for d in report.diagnoses}
    assert said in evidence[trap]


def test_attention_whose_rotation_and_mask_are_given_is_equal():
    check(RotatedModel(), RotatedModelPort(), X, until="gradients").assert_ok()


class Capped(tnn.Module):
    """Made with small weights, as published models are: its cap is far from what it caps."""

    def __init__(self, std: float = 1e-4) -> None:
        super().__init__()
        self.up, self.down = (tnn.Linear(DIM, DIM, bias=False) for _ in range(2))
        for layer in (self.up, self.down):
            torch.nn.init.normal_(layer.weight, std=std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(2 * torch.tanh(self.up(x) / 2))


class CappedPort(nn.Module):
    def __init__(self, cap: bool = True) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(DIM, DIM, bias=False) for _ in range(2))
        self.cap = cap

    def __call__(self, x: mx.array) -> mx.array:
        y = self.up(x)
        return self.down(2 * mx.tanh(y / 2) if self.cap else y)


@pytest.mark.parametrize("until", ["forward", "gradients"])
@pytest.mark.parametrize("cap", [True, False])
def test_a_cap_that_small_weights_never_reach_is_tried_with_larger_ones(cap: bool, until: str):
    report = check(Capped(), CappedPort(cap), X, until=until)
    assert report.ok == cap
    assert [r.name for r in report.rungs if not r.ok] == ([] if cap else [LARGER])
    assert LARGER in {r["rung"] for r in report.to_dict()["rungs"]}
    assert LARGER in report.to_html()
    assert [g.pair.reference_path for g in report.guilty] == ([] if cap else [""])
    if not cap:
        assert "after up and before down" in str(report)
        assert "tanh" in " ".join(d.evidence for d in report.diagnoses)


def test_weights_that_are_not_small_are_tried_as_they_are():
    for std in (DIM**-0.5, 0.5 * DIM**-0.5):
        report = check(Capped(std), CappedPort(), X, until="gradients")
        assert LARGER not in {r.name for r in report.rungs}
    report = check(Capped(), CappedPort(), X, until="gradients", weights="random")
    assert LARGER not in {r.name for r in report.rungs}


@pytest.mark.parametrize(("width", "tried"), [(2, False), (8, True)])
def test_matrices_of_a_few_numbers_may_be_small_by_chance(width: int, tried: bool):
    """PyTorch's own start of so few is as small now and then: the rungs must not depend on it."""
    reference = tnn.Linear(8, width)
    torch.nn.init.normal_(reference.weight, std=0.02)
    x = np.ones((3, 8), np.float32)
    report = check(reference, nn.Linear(8, width), x, until="forward", compiled=False)
    report.assert_ok()
    assert (LARGER in {r.name for r in report.rungs}) == tried


def test_larger_weights_are_tried_without_derivatives(monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []
    usual = Climb.derivatives

    def told(self: Climb, gradients: bool = True) -> list[Rung]:
        asked.append(gradients)
        return usual(self, gradients)

    monkeypatch.setattr(Climb, "derivatives", told)
    check(Capped(), CappedPort(), X, until="gradients").assert_ok()
    assert asked == [True, False]


class Wild(Capped):
    """Calm as long as its weights are small: iterates a parabola."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.down(torch.tanh(self.up(x)))
        y, r = torch.sigmoid(z), 1 + 2.9 * torch.tanh(30 * z.abs().mean())
        for _ in range(60):
            y = r * y * (1 - y)
        return y


class WildPort(CappedPort):
    def __call__(self, x: mx.array) -> mx.array:
        z = self.down(mx.tanh(self.up(x)))
        y, r = mx.sigmoid(z), 1 + 2.9 * mx.tanh(30 * mx.abs(z).mean())
        for _ in range(60):
            y = r * y * (1 - y)
        return y


class Bursting(Capped):
    """Exceeds what float32 holds as soon as its weights are large, on one side or on both."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.up(x))
        return y if self.training else y * torch.exp(200 * y.abs().amax()) / 1e30


class BurstingPort(CappedPort):
    def __call__(self, x: mx.array) -> mx.array:
        y = self.down(self.up(x))
        return y if self.training else y * mx.exp(200 * mx.abs(y).max()) / 1e30


class BurstingAlone(CappedPort):
    def __call__(self, x: mx.array) -> mx.array:
        y = self.down(self.up(x))
        far = y * 3e38
        return y * mx.stop_gradient(far / far)


class Divided(Capped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


@pytest.mark.parametrize(
    ("reference", "port"),
    [(Wild, WildPort), (Bursting, BurstingPort), (Divided, BurstingAlone)],
)
def test_larger_weights_that_turn_a_model_wild_show_nothing(reference: Any, port: Any):
    report = check(reference().eval(), port(), X, until="gradients")
    report.assert_ok()
    assert LARGER not in {r.name for r in report.rungs}


class WrittenOut(tnn.Module):
    """GELU by tanh, as models that are older than PyTorch's have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class SmallWeights(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = tnn.Linear(DIM, DIM), WrittenOut(), tnn.Linear(DIM, DIM)
        for layer in (self.up, self.down):
            torch.nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


class SmallWeightsPort(nn.Module):
    def __init__(self, activation: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down(self.activation(self.up(x)))


@pytest.mark.parametrize(
    ("activation", "trap"), [(nn.gelu, "gelu-approximation"), (nn.silu, "activation-kind")]
)
def test_an_activation_behind_small_weights_is_no_factor(activation, trap: str):
    """Near 0 every GELU is half its input, and any other is that times a constant."""
    torch.manual_seed(0)
    report = check(SmallWeights(), SmallWeightsPort(activation), X, until="gradients")
    assert {d.trap_id for d in report.diagnoses} == {trap}


def test_a_port_in_half_precision_is_not_held_with_larger_weights():
    """Its rounding there is not what it is where it is used."""
    port = SmallWeightsPort(nn.gelu_approx)
    port.set_dtype(mx.bfloat16)
    report = check(SmallWeights(), port, X, until="forward")
    assert LARGER not in {r.name for r in report.rungs}


@pytest.mark.parametrize(
    ("module", "shape", "numbers"),
    [
        (tnn.Linear(8, 6), (6, 8), 8),
        (tnn.Conv2d(4, 6, 3), (6, 4, 3, 3), 36),
        (tnn.Module(), (3, 12, 8), 8),
    ],
)
def test_a_matrix_sums_what_goes_into_each_output(module: tnn.Module, shape, numbers: int):
    """Of a bare parameter of three dimensions the first counts experts."""
    assert enlarged.fan_in(module, shape) == numbers


class Experts(tnn.Module):
    """All experts' matrices in one tensor, two of them fused."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = tnn.Parameter(torch.randn(3, 12, DIM) / DIM**0.5)
        self.down_proj = tnn.Parameter(torch.randn(3, DIM, 6) / 6**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("btd,ehd->ebth", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ebth,edh->btd", torch.sigmoid(gate) * up, self.down_proj)


class Switched(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = mx.zeros((3, outputs, inputs))

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.swapaxes(-1, -2)[:, None]


class ExpertsPort(nn.Module):
    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.up_proj, self.gate_proj = Switched(DIM, 6), Switched(DIM, 6)
        self.down_proj = Switched(6, DIM)
        self.swapped = swapped

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self.gate_proj(x[None]), self.up_proj(x[None])
        if self.swapped:
            gate, up = up, gate
        return self.down_proj(mx.sigmoid(gate) * up).sum(0)


class SplitExperts(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = tnn.Parameter(torch.randn(3, 6, DIM) / DIM**0.5)
        self.up_proj = tnn.Parameter(torch.randn(3, 6, DIM) / DIM**0.5)
        self.down_proj = tnn.Parameter(torch.randn(3, DIM, 6) / 6**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (torch.einsum("btd,ehd->ebth", x, w) for w in (self.gate_proj, self.up_proj))
        return torch.einsum("ebth,edh->btd", torch.sigmoid(gate) * up, self.down_proj)


class FusedExpertsPort(nn.Module):
    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = Switched(DIM, 12), Switched(6, DIM)
        self.swapped = swapped

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x[None]), 2, axis=-1)
        if self.swapped:
            gate, up = up, gate
        return self.down_proj(mx.sigmoid(gate) * up).sum(0)


@pytest.mark.parametrize(
    ("reference", "port"), [(Experts, ExpertsPort), (SplitExperts, FusedExpertsPort)]
)
def test_experts_whose_matrices_are_fused_in_one_tensor_are_carried(reference: Any, port: Any):
    check(reference(), port(), X).assert_ok()
    assert check(reference(), port(swapped=True), X, until="gradients").verdict == "different"
