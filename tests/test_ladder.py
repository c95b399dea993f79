"""The harness itself: each fault makes the right rung fail, and a correct port none.

A mutant is the real port with one thing wrong. The wrong things are those that public ports have.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import mlx_impl.losses as mlx_losses
import mlx_impl.mlp_gan as port
from mlx_impl.training import compile_step
from mlx_parity import (
    CannotCompile,
    CarryError,
    Case,
    EmptyBatchError,
    Loss,
    NotFiniteError,
    NotProven,
    System,
    TF32Error,
    climb,
    compiles,
    ladder,
    proof,
    prove,
)
from mlx_parity.ladder import Climb
from tests.cases import CASES

GAN = next(c for c in CASES if c.name == "001 GAN")
DISCRIMINATOR = next(c for c in CASES if c.name == "001 discriminator")
SHAPE = {
    "batch": 3,
    "latent_dim": 4,
    "widths": (3, 5, 6),
    "image_size": (2, 5),
    "channels": 3,
}

needs_compiler = pytest.mark.skipif(
    not compiles(), reason="mx.compile compiles nothing here: on Linux it needs g++ at run time"
)


def mutant(case: Case = GAN, **wrong: Any) -> Case:
    """``case`` with parts of its port replaced."""
    return replace(case, port=SimpleNamespace(**{**vars(case.port), **wrong}))


def failing_rung(case: Case, examples: int = 12) -> str:
    """At shapes of a fixed seed: where all units behind it are dead, as in 7 of 100 generators this
    small, a stopped gradient is right until the discriminator has been updated."""
    proof = prove(case, examples, shrink=False, seed=0)
    failed = [row.rung for row in proof.rows.values() if not row.ok]
    assert len(failed) == 1, proof.failures()
    return failed[0]


# --------------------------------------------------------------------------------- mutants


class NoBias(port.Discriminator):
    """The last layer has no bias."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.fc4 = mnn.Linear(self.fc4.weight.shape[1], 1, bias=False)


class UnusedBias(port.Discriminator):
    """A bias is there, and carried, and never added."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) - self.fc4.bias


class DefaultSlope(port.Discriminator):
    """LeakyReLU with the default slope of 0.01 for 0.2."""

    def __call__(self, x: mx.array) -> mx.array:
        x = x.flatten(1)
        for layer in (self.fc1, self.fc2, self.fc3):
            x = mnn.leaky_relu(layer(x), 0.01)
        return self.fc4(x)


class NearSlope(port.Discriminator):
    """A slope that is off by 1 in 20,000: nothing that a tolerance of 1e-4 would see."""

    def __call__(self, x: mx.array) -> mx.array:
        x = x.flatten(1)
        for layer in (self.fc1, self.fc2, self.fc3):
            x = mnn.leaky_relu(layer(x), 0.20001)
        return self.fc4(x)


class Detached(port.Generator):
    """The forward pass is right; the gradient stops on its way."""

    def __call__(self, z: mx.array) -> mx.array:
        x = mnn.relu(self.fc1(z))
        x = mx.stop_gradient(mnn.relu(self.fc2(x)))
        x = mnn.relu(self.fc3(x))
        return mx.tanh(self.fc4(x)).reshape(-1, *self.image_shape)


class TrainedConstant(port.Generator):
    """A public array attribute is a parameter in MLX, and trains."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.scale = mx.ones(1)


class Frozen(port.Generator):
    """A layer that trains in the reference is frozen in the port."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.fc1.freeze()


def probability_to_logits_loss(real_logits: mx.array, fake_logits: mx.array) -> mx.array:
    return mlx_losses.discriminator_loss(mx.sigmoid(real_logits), mx.sigmoid(fake_logits))


def adam(**options: Any) -> Callable[[mnn.Module], optim.Adam]:
    def make(module: mnn.Module) -> optim.Adam:
        settings = {"learning_rate": 2e-4, "betas": [0.5, 0.999], "bias_correction": True}
        return optim.Adam(**(settings | options))

    return make


def old_discriminator_step(g: Any, d: Any, opt_g: Any, opt_d: Any, real: Any, noise: Any) -> Any:
    """The generator's half sees the discriminator as it was before its update."""

    def d_loss_fn(d: Any) -> mx.array:
        return mlx_losses.discriminator_loss(d(real), d(g(noise)))

    def g_loss_fn(g: Any) -> mx.array:
        return mlx_losses.generator_loss_nonsaturating(d(g(noise)))

    d_loss, d_grads = mnn.value_and_grad(d, d_loss_fn)(d)
    g_loss, g_grads = mnn.value_and_grad(g, g_loss_fn)(g)
    opt_d.update(d, d_grads)
    opt_g.update(g, g_grads)
    return d_loss, g_loss


def drifting_step(*args: Any) -> Any:
    """Right at the first step; the learning rate grows from then on."""
    opt_g = args[2]
    losses = port.train_step(*args)
    opt_g.learning_rate = opt_g.learning_rate * 1.01
    return losses


MUTANTS = {
    "no bias": (mutant(Discriminator=NoBias), "structure"),
    "trained constant": (mutant(Generator=TrainedConstant), "structure"),
    "frozen layer": (mutant(Generator=Frozen), "structure"),
    "wrong transpose": (replace(GAN, carry=lambda shape: {}), "forward"),
    "unused bias": (mutant(Discriminator=UnusedBias), "forward"),
    "LeakyReLU 0.01": (mutant(Discriminator=DefaultSlope), "forward"),
    "LeakyReLU 0.20001": (mutant(Discriminator=NearSlope), "forward"),
    "probability to a logits loss": (
        mutant(discriminator_loss=probability_to_logits_loss),
        "loss",
    ),
    "minimax for non-saturating": (
        mutant(generator_loss_nonsaturating=mlx_losses.generator_loss_minimax),
        "loss",
    ),
    "stopped gradient": (mutant(Generator=Detached), "gradients"),
    "no bias correction": (mutant(make_optimizer=adam(bias_correction=False)), "optimizer step"),
    "betas 0.9": (mutant(make_optimizer=adam(betas=[0.9, 0.999])), "optimizer step"),
    "old discriminator": (mutant(train_step=old_discriminator_step), "optimizer step"),
}


def test_a_large_models_training_is_compared_kind_by_kind(monkeypatch):
    """The same tensors as a small one's, and a wrong update still ends it."""
    uncorrected, _ = MUTANTS["no bias correction"]

    def training(case: Case) -> dict[str, tuple[bool, set[str]]]:
        climbing = Climb(case, SHAPE, 0)
        climbing.structure()
        rungs = climbing.training()
        return {r.name: (r.ok, {finding.tensor for finding in r.findings}) for r in rungs}

    small = training(GAN)
    assert all(ok for ok, _ in small.values())
    assert any(tensor.endswith(" exp_avg_sq") for tensor in small["optimizer step"][1])
    monkeypatch.setattr(ladder, "LARGE", 0)
    assert training(GAN) == small
    assert [(name, ok) for name, (ok, _) in training(uncorrected).items()] == [
        ("optimizer step", False)
    ]


@pytest.mark.parametrize("name", MUTANTS)
def test_each_fault_fails_its_rung(name: str):
    case, rung = MUTANTS[name]
    assert failing_rung(case) == rung


def test_a_drifting_learning_rate_fails_the_trajectory():
    """Climbed at one shape: each of its 168 points is a training run."""
    proof = climb(mutant(train_step=drifting_step), SHAPE, 0, compiled=False)
    assert [row.rung for row in proof.rows.values() if not row.ok] == ["trajectory"]


def frozen_noise(step: Callable[..., Any], *stateful: Any) -> Callable[..., Any]:
    """The noise is a constant of the trace: every later step repeats the first one's."""
    seen: list[mx.array] = []
    compiled = compile_step(lambda *args: step(*args, seen[0]), *stateful)

    def take(real: mx.array, noise: mx.array) -> Any:
        seen.append(noise)
        return compiled(real)

    return take


def forgotten_optimizer(step: Callable[..., Any], *stateful: Any) -> Callable[..., Any]:
    """One optimizer's state is not among the compiled function's inputs and outputs."""
    state = [s.state for s in stateful[:3]]

    def take(*arrays: mx.array) -> Any:
        return step(*stateful, *arrays)

    return mx.compile(take, inputs=state, outputs=state)


def retraced(step: Callable[..., Any], *stateful: Any) -> Callable[..., Any]:
    """A Python number that changes is a new trace each time."""
    compiled = compile_step(lambda *args: step(*args[:-1]), *stateful)
    calls: list[None] = []

    def take(*arrays: mx.array) -> Any:
        calls.append(None)
        return compiled(*arrays, float(len(calls)))

    return take


@needs_compiler
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (frozen_noise, r"trajectory \w+ 1: different"),
        (forgotten_optimizer, r"MLX cannot run it: .*without a primitive"),
        (retraced, r"step was traced \d+ times"),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_a_wrongly_compiled_step_fails_the_compiled_rung(wrong: Any, message: str):
    rung = Climb(replace(GAN, compile_step=wrong), SHAPE, 0).compiled()
    assert not rung.ok
    assert re.search(message, f"{rung.message} {rung.worst}")


class Forgetful(optim.SGD):
    """Keeps part of its state where saving does not find it."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.1)
        self.calls = 0

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        self.calls += 1
        return parameter - 0.1 / self.calls * gradient


def test_state_that_is_not_saved_fails_the_reloaded_rung():
    case = mutant(make_optimizer=lambda module: Forgetful())
    climbing = Climb(case, SHAPE, 0)
    assert climbing.structure()[0].ok
    (rung,) = climbing.reloaded()
    assert not rung.ok
    assert "one step after reloading" in rung.message


# ---------------------------------------------------------- what a report says, what it refuses


def test_a_failure_names_tensor_figures_shape_and_how_to_repeat_it():
    case = mutant(DISCRIMINATOR, Discriminator=DefaultSlope)
    with pytest.raises(NotProven) as error:
        prove(case, 12).assert_ok()
    text = str(error.value)
    for part in (
        "001 discriminator: forward fails at",
        "forward output: different",
        "bias",
        "noise",
        "relative error",
        "mlx_parity.climb(case",
        "seed=",
    ):
        assert part in text
    shape, seed = re.search(r"climb\(case, (\{.*\}), seed=(\d+)\)", text).groups()
    again = climb(case, eval(shape), int(seed))
    assert [r.rung for r in again.rows.values() if not r.ok] == ["forward"]


def test_a_failure_is_shrunk():
    """The wrong slope shows with every size, so the smallest shape of all is what is reported."""
    proof = prove(mutant(DISCRIMINATOR, Discriminator=DefaultSlope), 12)
    (row,) = [r for r in proof.rows.values() if not r.ok]
    assert row.shape["batch"] == 1
    assert max(row.shape["widths"]) <= 3


def test_a_passed_rung_says_what_it_could_have_seen():
    proof = climb(DISCRIMINATOR, SHAPE, 0, compiled=False)
    assert proof.ok
    for rung in ("forward", "loss", "gradients"):
        assert 0 < proof.rows[rung].visible < 1e-4
    finding = Climb(DISCRIMINATOR, SHAPE, 0)
    finding.structure()
    assert "would have been seen" in str(finding.derivatives()[0].worst)


def test_a_trajectory_says_how_long_it_was_decidable():
    assert 1 <= climb(GAN, SHAPE, 0, compiled=False).rows["trajectory"].decidable_steps <= 20


def with_inputs(change: Callable[[dict[str, np.ndarray]], None]) -> Case:
    def inputs(shape: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        arrays = GAN.inputs(shape, rng)
        change(arrays)
        return arrays

    return replace(GAN, inputs=inputs)


def test_nan_in_the_data_is_refused_by_name():
    case = with_inputs(lambda arrays: arrays["real"].__setitem__((0, 0), np.nan))
    with pytest.raises(NotFiniteError, match="001 GAN: input 'real' holds NaN"):
        climb(case, SHAPE, 0)


def test_a_batch_of_0_is_refused_by_name():
    with pytest.raises(EmptyBatchError, match=r"input 'real' has shape \[0, 3, 2, 5\].*at least 1"):
        climb(GAN, {**SHAPE, "batch": 0}, 0)


def test_a_case_draws_weights_of_its_own():
    """Instead of the ladder's; jittered like them, and held in every rung."""
    name = "discriminator.fc2.bias"
    bias = np.full(5, 3.5, np.float32)
    case = replace(DISCRIMINATOR, weights=lambda shape, rng: {name: bias})
    point = Climb(case, SHAPE, seed=0).point
    assert np.array_equal(point[name], bias)
    assert not np.array_equal(Climb(DISCRIMINATOR, SHAPE, seed=0).point[name], bias)
    climb(case, SHAPE, seed=0, compiled=False).assert_ok()


@pytest.mark.parametrize(
    ("name", "array", "error", "message"),
    [
        ("discriminator.fc9.bias", np.zeros(5), CarryError, r"fc9.bias \[5\], which is none.*fc1"),
        ("discriminator.fc2.bias", np.zeros(4), CarryError, r"\[4\], which has shape \[5\]"),
        ("discriminator.fc2.bias", np.full(5, np.nan), NotFiniteError, "NaN.*fc2.bias"),
    ],
    ids=["name", "shape", "nan"],
)
def test_weights_that_do_not_fit_are_named(name, array, error, message):
    case = replace(DISCRIMINATOR, weights=lambda shape, rng: {name: array})
    with pytest.raises(error, match=message):
        Climb(case, SHAPE, seed=0)


def test_a_port_that_gives_nan_is_named():
    class Broken(port.Discriminator):
        def __call__(self, x: mx.array) -> mx.array:
            return super().__call__(x) * float("nan")

    proof = climb(mutant(DISCRIMINATOR, Discriminator=Broken), SHAPE, 0)
    assert "forward output: not finite: nan at [0, 0]" in proof.failures()[0]


def test_a_port_of_another_shape_is_named():
    class Flat(port.Discriminator):
        def __call__(self, x: mx.array) -> mx.array:
            return super().__call__(x)[:, 0]

    proof = climb(mutant(DISCRIMINATOR, Discriminator=Flat), SHAPE, 0)
    assert "forward output: shape: [3] for the reference's [3, 1]" in proof.failures()[0]


def test_tf32_is_refused_where_it_could_be_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ladder.mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.delenv("MLX_ENABLE_TF32")
    with pytest.raises(TF32Error, match="MLX_ENABLE_TF32=0"):
        climb(DISCRIMINATOR, SHAPE, 0)


def test_without_a_compiler_climb_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proof, "compiles", lambda: False)
    with pytest.raises(CannotCompile, match=r"install g\+\+"):
        climb(DISCRIMINATOR, SHAPE, 0)
    assert "compiled" not in prove(DISCRIMINATOR, 2).rows


# ------------------------------------------------------- other layers, through the whole of the kit


class TorchNet(torch.nn.Module):
    """Convolution, batch norm, transposed convolution: images, buffers, layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, stride=2, padding=1)
        self.bn = torch.nn.BatchNorm2d(3)
        self.up = torch.nn.ConvTranspose2d(3, 3, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(torch.tanh(self.bn(self.conv(x))))


class MLXNet(mnn.Module):
    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.conv = mnn.Conv2d(3, 3, 3, stride=2, padding=1)
        self.bn = mnn.BatchNorm(3, eps=eps)
        self.up = mnn.ConvTranspose2d(3, 3, 2, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.up(mx.tanh(self.bn(self.conv(x))))


def conv_case(make_port: Callable[[], mnn.Module]) -> Case:
    def build(make: Callable[[], Any], shape: Any) -> System:
        net = make()
        return System(
            modules={"net": net},
            forward=lambda x: {"y": net(x)},
            losses={"square": Loss(lambda x: (net(x) ** 2).mean(), ("net",))},
        )

    return Case(
        name="convolutions",
        shapes=st.fixed_dictionaries({"batch": st.integers(2, 3), "height": st.integers(4, 6)}),
        build=build,
        reference=TorchNet,
        port=make_port,
        inputs=lambda shape, rng: {
            "x": rng.standard_normal((shape["batch"], 3, shape["height"], 8)),
        },
        images=frozenset({"x", "y"}),
    )


def test_images_kernels_and_running_statistics():
    proof = prove(conv_case(MLXNet), 6)
    proof.assert_ok()
    climbing = Climb(conv_case(MLXNet), {"batch": 2, "height": 5}, 0)
    climbing.structure()
    names = {f.tensor for rung in climbing.derivatives() for f in rung.findings}
    assert {"forward net.bn.running_var", "gradients square/net.up.weight"} <= names


def test_a_batch_norm_eps_that_no_tolerance_sees():
    """1.2e-5 for 1e-5: the outputs agree to about 1e-6."""
    assert failing_rung(conv_case(lambda: MLXNet(eps=1.2e-5)), 20) in ("forward", "loss")


@needs_compiler
def test_what_is_not_trained_goes_into_the_compiled_function_too():
    """Running statistics that were constants of the trace would be those of the first point."""
    case = replace(
        conv_case(lambda: MLXNet().eval()),
        reference=lambda: TorchNet().eval(),
    )
    rung = Climb(case, {"batch": 2, "height": 5}, 0).compiled()
    assert rung.ok
    assert max(f.noise for f in rung.findings) < 100  # 1e-3 apart are ten thousand roundings


def test_shapes_are_ordered_by_their_numbers_whatever_else_they_hold():
    shape = {"batch": 3, "widths": ((1, 2), (4,)), "kind": "x", "classes": None, "rate": 0.5}
    assert proof._size(shape) == 10.5
