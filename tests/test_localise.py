"""Ports as others write them, right and with one thing wrong: verdict, module and direction."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import numpy as np
import pytest
import torch
from torch import nn as tnn

import mlx_parity
from mlx_parity import Report, pairs
from mlx_parity.capture import port_calls
from mlx_parity.layers import port_modules
from tests.foreign import encoder, language, lstm, resnet

rng = np.random.default_rng(0)
TOKENS = rng.integers(0, 11, (3, 6))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CAUSAL = torch.full((7, 7), float("-inf")).triu(1)


check = partial(mlx_parity.check, localised=True, explain=False, compiled=False)


def seeded(make: Callable[[], tnn.Module]) -> tnn.Module:
    torch.manual_seed(0)
    return make()


@cache
def check_encoder(fault: str) -> Report:
    x = rng.standard_normal((2, 5, encoder.DIM))
    port = encoder.EncoderPort(fault)
    return check(seeded(encoder.Encoder), port, x, kwargs={"mask": PADDED})


@cache
def check_lstm(fault: str) -> Report:
    return check(seeded(lstm.Classifier), lstm.ClassifierPort(fault), TOKENS)


@cache
def check_resnet(fault: str) -> Report:
    x = rng.standard_normal((3, 3, 6, 9))
    return check(seeded(resnet.ResNet), resnet.ResNetPort(fault), x)


@cache
def check_language(fault: str) -> Report:
    return check(
        seeded(language.Language),
        language.LanguagePort(fault),
        {"tokens": TOKENS[:, :1] + np.arange(7) % 3, "mask": CAUSAL},
        call_port=lambda port, tokens, mask: port(mask, tokens),
    )


CHECKS = {
    "encoder": check_encoder,
    "lstm": check_lstm,
    "resnet": check_resnet,
    "language": check_language,
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_right_port_is_equal_and_every_module_with_it(name: str):
    report = CHECKS[name]("")
    report.assert_ok()
    assert not report.guilty
    assert all(r.ok for r in report.readings), [str(r) for r in report.readings if not r.ok]
    assert {r.name for r in report.rungs} >= {"structure", "forward", "loss", "gradients"}


@pytest.mark.parametrize(
    ("name", "fault", "path", "direction"),
    [
        ("encoder", "eps", "blocks.1.ln_1", "forward"),
        ("encoder", "mask", "blocks.1.attn", "forward"),
        ("encoder", "gelu", "blocks.1", "forward"),
        ("encoder", "gradient", "blocks.1.attn", "backward"),
        ("lstm", "order", "", "forward"),
        ("lstm", "last", "", "forward"),
        ("resnet", "residual", "layer1.1", "forward"),
        ("resnet", "momentum", "layer1.1.bn2", "forward"),
        ("resnet", "stop", "", "backward"),
        ("language", "positions", "", "forward"),
        ("language", "tied", "", "backward"),
    ],
)
def test_one_fault_is_found_in_its_module(name: str, fault: str, path: str, direction: str):
    report = CHECKS[name](fault)
    assert report.verdict == "different", str(report)
    assert [(g.pair.reference_path, g.direction) for g in report.guilty] == [(path, direction)]


def test_what_differs_between_two_modules_is_said_to_lie_between_them():
    (guilty,) = check_encoder("gelu").guilty
    assert guilty.between == ("blocks.1.mlp.0", "blocks.1.mlp.2")
    assert "after blocks.1.mlp.0 and before blocks.1.mlp.2" in guilty.where
    (guilty,) = check_language("positions").guilty
    assert guilty.between == ("wte", "h.0.ln1")


def test_the_page_colours_the_tree_by_each_modules_own_bias():
    """Behind a fault everything differs; alone, only the faulty module does, and what holds it."""
    page = check_encoder("eps").to_html()
    tree = page[page.index("<h2>Modules</h2>") : page.index("<h2>Modules without")]
    red = [row for row in tree.split("<div>") if "var(--different)" in row]
    assert any("attention_norm" in row for row in red)
    assert len(red) <= 3, red


def test_an_alternative_is_tried_in_the_guilty_module_alone():
    (guilty,) = check_encoder("eps").guilty
    assert guilty.judge is not None
    right = mnn.LayerNorm(encoder.DIM, eps=1e-6)
    as_it_is, tried = guilty.judge(None), None

    def alternative(x: mx.array) -> mx.array:
        right.weight, right.bias = guilty.pair.port.weight, guilty.pair.port.bias
        return right(x)

    tried = guilty.judge(alternative)
    assert not all(f.ok for f in as_it_is)
    assert all(f.ok for f in tried), [str(f) for f in tried]


def test_a_second_fault_shows_beside_the_first():
    port = encoder.EncoderPort("eps")
    port.final_norm = mnn.LayerNorm(encoder.DIM, eps=1e-3)
    report = check(seeded(encoder.Encoder), port, rng.standard_normal((2, 5, 12)))
    assert [g.pair.reference_path for g in report.guilty] == ["blocks.1.ln_1", "norm"]


# ------------------------------------------------------------------------------------ pairing


def paired(reference: tnn.Module, port: mnn.Module, mapping: Any = None) -> dict[str, str]:
    return {p.reference_path: p.port_path for p in pairs(reference, port, mapping)}


def test_pairs_by_structure_through_other_names_and_nesting():
    found = paired(encoder.Encoder(), encoder.EncoderPort())
    assert found["blocks.1.attn"] == "layers.1.attention"
    assert found["blocks.1.attn.out_proj"] == "layers.1.attention.o_proj"
    assert found["blocks.0.mlp.2"] == "layers.0.fc2"
    assert found["norm"] == "final_norm"


def test_what_has_no_counterpart_is_listed_with_a_reason():
    found = pairs(encoder.Encoder(1), encoder.EncoderPort(depth=1)).unpaired
    reasons = {u.path: u.reason for u in found}
    assert "a function there, probably" in reasons["blocks.0.mlp.1"]
    assert "attn.q_proj" in reasons["layers.0.attention.q_proj"]


def test_the_users_map_wins_over_names_and_shapes():
    class Two(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = tnn.Linear(3, 3), tnn.Linear(3, 3)

    class Other(mnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mnn.Linear(3, 3), mnn.Linear(3, 3)

    assert paired(Two(), Other()) == {"": "", "a": "a", "b": "b"}
    assert paired(Two(), Other(), {"a": "b", "b": "a"}) == {"": "", "a": "b", "b": "a"}


def test_hundreds_of_layers_are_paired_in_order():
    reference = tnn.Sequential(*(tnn.Linear(2, 2) for _ in range(300)))

    class Deep(mnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = [mnn.Linear(2, 2) for _ in range(300)]

    found = paired(reference, Deep())
    assert all(found[str(i)] == f"steps.{i}" for i in range(300))


# ------------------------------------------------------------------------------------ capture


def test_classes_are_restored_after_an_error():
    """Of the port's own, in the midst of a call."""
    port = encoder.EncoderPort()
    modules = port_modules(port)
    before = [type(m) for m in modules.values()]
    with port_calls(modules):
        assert type(port.final_norm) is not mnn.LayerNorm
        assert isinstance(port.final_norm, mnn.LayerNorm)
        with pytest.raises(ValueError, match="same size"):
            port(mx.zeros((1, 2, 3)))
    assert [type(m) for m in modules.values()] == before


def test_a_zero_tap_gives_pytorchs_gradient_at_every_output():
    report = check_resnet("")
    read = [r for r in report.readings if r.backward is not None]
    assert {"stem", "layer1.0.bn1", "layer1.1", "fc"} <= {r.pair.reference_path for r in read}
    assert all(r.backward is not None and r.backward.ok for r in read)
