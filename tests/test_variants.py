"""Compiled in every way: what is frozen is found and named, and a crash is another process's."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import mlx.optimizers as optim
import pytest
import torch

from mlx_parity import check, compiles, probe_compiled
from mlx_parity.variants import Variant, of_port
from tests.frameworks import EPS

pytestmark = pytest.mark.skipif(not compiles(), reason="mx.compile compiles nothing here")

X = mx.random.normal((4, 3), key=mx.random.key(0))


class Model(mnn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc = mnn.Linear(3, 3)
        self.norm = mnn.BatchNorm(3)
        self.drop = mnn.Dropout(dropout)

    def __call__(self, x: mx.array) -> mx.array:
        return self.drop(self.norm(self.fc(x)))


def by_name(found: list[Variant]) -> dict[str, Variant]:
    return {v.name: v for v in found}


def test_a_port_is_traced_once_and_keeps_the_mode_it_was_traced_in():
    model = Model()
    found = by_name(of_port(model, model, [X]))
    assert found["compiled"].traces == 1
    frozen = found["compiled in training, run in evaluation"]
    assert not frozen.ok
    assert "training flag is frozen" in frozen.said
    assert model.training


class Scale(mnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = mx.arange(3.0)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.tanh(x * self.scale)


def test_a_shapeless_port_runs_at_another_batch():
    model = Scale()
    assert by_name(of_port(model, model, [X]))["shapeless"].ok


def test_a_linear_layer_without_shapes_is_wrong_at_another_batch():
    """MLX 0.32.4: the product with a bias added keeps the batch it was traced with, and is wrong
    without a word. Where MLX has it right, the kit has to say so."""
    linear = mnn.Linear(3, 2)
    mx.eval(linear.parameters())
    larger = mx.concatenate([X, X[:1]])
    compiled = mx.compile(lambda x: linear(x), shapeless=True)
    mx.eval(compiled(X))
    # Three products and a bias: eight roundings at most between two orders of adding them up.
    size = mx.abs(larger) @ mx.abs(linear.weight.T) + mx.abs(linear.bias)
    off = mx.abs(compiled(larger) - linear(larger))
    right = bool((off <= 8 * EPS * size).all())
    assert by_name(of_port(linear, linear, [X]))["shapeless"].ok is right


def test_wrong_shapes_without_a_word_are_found():
    linear = mnn.Linear(3, 3)

    def run(x: mx.array) -> mx.array:
        return linear(x) + mx.zeros((x.shape[0], 1))

    found = by_name(of_port(linear, run, [X]))
    assert not found["shapeless"].ok


def test_a_shapeless_function_that_kills_the_interpreter_kills_another():
    """MLX 0.32.4's CPU: a reduction over an axis of length 1, compiled without shapes."""
    linear = mnn.Linear(3, 1)

    def run(x: mx.array) -> mx.array:
        y = linear(x)
        return y - mx.sum(y, axis=-1, keepdims=True)

    found = by_name(of_port(linear, run, [X]))
    if mx.default_device() == mx.Device(mx.cpu):
        assert not found["shapeless"].ok
        assert "kills the interpreter" in found["shapeless"].said


def test_the_report_lists_them():
    report = check(
        torch.nn.Linear(3, 2), mnn.Linear(3, 2), torch.randn(4, 3), variants=True, localised=False
    )
    assert {v.name for v in report.variants} >= {"compiled", "shapeless"}
    assert "compiled: as uncompiled (traced 1 times)" in str(report)
    assert report.to_dict()["variants"]


# ------------------------------------------------------------------- the user's own compiled


def test_frozen_weights_and_mode_of_a_compiled_forward():
    model = Model()
    bare = by_name(probe_compiled(mx.compile(lambda x: model(x)), model, [X], module=model))
    assert "state" in bare or not bare["weights"].ok
    model = Model()
    state = [model.state]
    full = mx.compile(lambda x: model(x), inputs=state, outputs=state)
    found = by_name(probe_compiled(full, model, [X], module=model))
    assert found["result"].ok
    assert found["result"].traces == 1
    assert found["weights"].ok
    assert not found["training flag"].ok


def test_frozen_random_state():
    model = Model(dropout=0.5)
    state = [model.state]
    frozen = mx.compile(lambda x: model(x), inputs=state, outputs=state)
    assert not by_name(probe_compiled(frozen, model, [X], module=model))["random state"].ok
    state = [model.state, mx.random.state]
    alive = mx.compile(lambda x: model(x), inputs=state, outputs=state)
    assert by_name(probe_compiled(alive, model, [X], module=model))["random state"].ok


def step_of(model: mnn.Module, optimizer: Any) -> Callable[[mx.array], mx.array]:
    def step(x: mx.array) -> mx.array:
        loss, grads = mnn.value_and_grad(model, lambda x: (model(x) ** 2).mean())(x)
        optimizer.update(model, grads)
        return loss

    return step


@pytest.mark.parametrize("forgotten", [False, True], ids=["", "optimizer forgotten"])
def test_frozen_optimizer(forgotten: bool):
    model, optimizer = mnn.Linear(3, 2), optim.SGD(0.1)
    optimizer.init(model.trainable_parameters())
    step = step_of(model, optimizer)
    state = [model.state] if forgotten else [model.state, optimizer.state]
    compiled = mx.compile(step, inputs=state, outputs=state)
    before = mx.array(model.weight)
    found = by_name(probe_compiled(compiled, step, [X], module=model, optimizer=optimizer))
    assert mx.array_equal(model.weight, before)
    if not forgotten:
        assert all(v.ok for v in found.values()), [str(v) for v in found.values()]
        return
    wrong = [v.name for v in found.values() if not v.ok]
    assert set(wrong) & {"state", "optimizer step", "learning rate"}, found
