"""Training and its parts: optimizers, losses, the diffusion process, compiled steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import mlx.optimizers as optim
import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn as tnn
from torch.nn import functional as F

from mlx_impl.optimizers import Adam
from mlx_impl.training import compile_step
from mlx_parity import Case, Loss, System
from tests.score.family import Example, Family, Fault, Rng, fault, normal, size

# ----------------------------------------------------------------------------------- optimizers


class Small(tnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = tnn.Linear(3, width), tnn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class PortSmall(mnn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = mnn.Linear(3, width), mnn.Linear(width, 2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(mx.tanh(self.fc1(x)))


def trained(rng: Rng, theirs: Callable[..., Any], ours: Callable[[], Any]) -> Example:
    width = size(rng, 2, 6)
    options = {"optimizer": (theirs, ours())}
    return Example(Small(width), PortSmall(width), normal(rng, size(rng, 2, 5), 3), options)


def _adam(rng: Rng) -> Example:
    return trained(
        rng,
        lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.5, 0.999)),
        lambda: Adam(1e-3, (0.5, 0.999)),
    )


def _sgd(rng: Rng) -> Example:
    return trained(
        rng,
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lambda: optim.SGD(0.01, momentum=0.9),
    )


def _ours(name: str, why: str, make: Callable[[], Any], subtle: bool = False) -> Fault:
    """The port's optimizer is another."""

    def change(example: Example) -> Example:
        theirs = example.options["optimizer"][0]
        return replace(example, options={**example.options, "optimizer": (theirs, make())})

    return Fault(name, "optimizer step", tuple(why.split()), change, subtle)


def _both(name: str, why: str, theirs: Callable[..., Any], make: Callable[[], Any]) -> Fault:
    def change(example: Example) -> Example:
        return replace(example, options={**example.options, "optimizer": (theirs, make())})

    return Fault(name, "optimizer step", tuple(why.split()), change)


class Growing(Adam):
    """The learning rate grows by 1 % an update."""

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        found = super().apply_gradients(gradients, parameters)
        self.learning_rate = self.learning_rate * 1.01
        return found


class Placed(Adam):
    """Adam as written by hand: eps added before the second moment is corrected, if it is."""

    def __init__(self, rate: float, betas: tuple[float, float], second: bool = True):
        super().__init__(rate, betas)
        self.second = second

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        b1, b2 = self.betas
        state["m"] = b1 * state["m"] + (1 - b1) * gradient
        state["v"] = b2 * state["v"] + (1 - b2) * mx.square(gradient)
        c1, c2 = (-mx.expm1(self.step * math.log(b)) for b in (b1, b2))
        root = mx.sqrt(state["v"]) + self.eps
        root = root * mx.rsqrt(c2) if self.second else root
        return parameter - self.learning_rate / c1 * state["m"] / root


ADAM_FAMILY = Family(
    "optimizers: Adam",
    _adam,
    (
        _ours("no bias correction", "adam-bias-correction", lambda: optim.Adam(1e-3, [0.5, 0.999])),
        replace(
            _ours(
                "the correction in float32",
                "adam-correction-precision",
                lambda: optim.Adam(1e-3, [0.5, 0.999], bias_correction=True),
            ),
            subtle=True,
            noted=True,
        ),
        _ours(
            "eps before the correction",
            "adam-eps-placement",
            lambda: Placed(1e-3, (0.5, 0.999)),
            True,
        ),
        _ours(
            "the second moment not corrected",
            "adam-bias-correction",
            lambda: Placed(1e-3, (0.5, 0.999), second=False),
        ),
        _ours("beta1 0.9", "optimizer-settings", lambda: Adam(1e-3, (0.9, 0.999))),
        _ours("beta1 0.501", "optimizer-settings", lambda: Adam(1e-3, (0.501, 0.999)), True),
        _ours(
            "learning rate 0.1 % off",
            "optimizer-settings",
            lambda: Adam(1.001e-3, (0.5, 0.999)),
            True,
        ),
        _ours("eps 1e-5", "optimizer-defaults", lambda: Adam(1e-3, (0.5, 0.999), eps=1e-5)),
        _ours(
            "AdamW",
            "optimizer-settings weight-decay-coupled",
            lambda: optim.AdamW(1e-3, [0.5, 0.999], bias_correction=True, weight_decay=0.1),
        ),
        _ours("SGD", "optimizer-settings", lambda: optim.SGD(1e-3)),
        replace(
            _ours(
                "a growing learning rate",
                "optimizer-settings schedule-end",
                lambda: Growing(1e-3, (0.5, 0.999)),
            ),
            where="trajectory",
        ),
        _both(
            "weight decay decoupled",
            "weight-decay-coupled",
            lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
            lambda: optim.AdamW(1e-3, bias_correction=True, weight_decay=0.1),
        ),
        _both(
            "Adamax without correction",
            "adamax-bias-correction",
            lambda p: torch.optim.Adamax(p, lr=1e-3),
            lambda: optim.Adamax(1e-3),
        ),
    ),
)

SGD_FAMILY = Family(
    "optimizers: SGD",
    _sgd,
    (
        replace(
            _ours(
                "momentum 0.901",
                "optimizer-settings",
                lambda: optim.SGD(0.01, momentum=0.901),
                True,
            ),
            where="trajectory",
        ),
        replace(
            _ours("no momentum", "optimizer-settings", lambda: optim.SGD(0.01)),
            where="optimizer step",
        ),
        replace(
            _ours(
                "Nesterov's momentum",
                "optimizer-settings",
                lambda: optim.SGD(0.01, momentum=0.9, nesterov=True),
            ),
            where="optimizer step",
        ),
        _ours(
            "weight decay",
            "optimizer-settings",
            lambda: optim.SGD(0.01, momentum=0.9, weight_decay=0.01),
        ),
        _both(
            "dampening",
            "sgd-dampening",
            lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5),
            lambda: optim.SGD(0.01, momentum=0.9, dampening=0.5),
        ),
        _both(
            "Adagrad's eps",
            "optimizer-defaults",
            lambda p: torch.optim.Adagrad(p, lr=0.01),
            lambda: optim.Adagrad(0.01, eps=1e-3),
        ),
        _both(
            "RMSprop's alpha",
            "optimizer-settings",
            lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99),
            lambda: optim.RMSprop(0.01, alpha=0.9),
        ),
    ),
)

# --------------------------------------------------------------------------------------- losses


def criterion(rng: Rng) -> Example:
    """A classifier's loss with smoothing, an L2 part and a binary part, as one function."""
    n = size(rng, 2, 6)
    inputs = {
        "logits": normal(rng, n, 3),
        "labels": rng.integers(0, 3, n),
        "scores": normal(rng, n),
        "target": rng.uniform(0.1, 0.9, n).astype(np.float32),
    }
    return Example(_criterion, _PORT, inputs)


def _criterion(
    logits: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor, target: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {
        "classes": F.cross_entropy(logits, labels),
        "binary": F.binary_cross_entropy_with_logits(scores, target),
        "distance": F.smooth_l1_loss(scores, target),
        "divergence": F.kl_div(
            F.log_softmax(logits, 1), F.softmax(logits.flip(0), 1), reduction="batchmean"
        ),
    }


def _port(
    classes: Any = lambda x, y: mnn.losses.cross_entropy(x, y, reduction="mean"),
    binary: Any = lambda x, y: mnn.losses.binary_cross_entropy(x, y),
    distance: Any = lambda x, y: mnn.losses.smooth_l1_loss(x, y),
    divergence: Any = lambda p, q: (q * (mx.log(q) - p)).sum(1).mean(),
) -> Callable[..., dict[str, mx.array]]:
    def losses(
        logits: mx.array, labels: mx.array, scores: mx.array, target: mx.array
    ) -> dict[str, mx.array]:
        return {
            "classes": classes(logits, labels),
            "binary": binary(scores, target),
            "distance": distance(scores, target),
            "divergence": divergence(
                mnn.log_softmax(logits, axis=1), mx.softmax(logits[::-1], axis=1)
            ),
        }

    return losses


_PORT = _port()


def _wrong(name: str, why: str, subtle: bool = False, **parts: Any) -> Fault:
    return fault(name, "forward", why, lambda port: _port(**parts), subtle)


LOSS_FAMILY = Family(
    "losses",
    criterion,
    (
        _wrong(
            "summed", "loss-reduction", classes=lambda x, y: mnn.losses.cross_entropy(x, y).sum()
        ),
        _wrong("one number per sample", "loss-reduction", classes=mnn.losses.cross_entropy),
        _wrong(
            "labels smoothed",
            "loss-kind module-setting",
            classes=lambda x, y: mnn.losses.cross_entropy(
                x, y, label_smoothing=0.1, reduction="mean"
            ),
        ),
        _wrong(
            "probabilities to a loss of logits",
            "bce-with-logits",
            binary=lambda x, y: mnn.losses.binary_cross_entropy(mx.sigmoid(x), y),
        ),
        _wrong("L1 for smooth L1", "loss-kind", distance=mnn.losses.l1_loss),
        _wrong("L2 for smooth L1", "loss-kind", distance=mnn.losses.mse_loss),
        _wrong(
            "beta 1.001",
            "loss-kind module-setting",
            True,
            distance=lambda x, y: mnn.losses.smooth_l1_loss(x, y, beta=1.001),
        ),
        _wrong(
            "the mean of all elements",
            "kl-divergence",
            divergence=lambda p, q: (q * (mx.log(q) - p)).mean(),
        ),
        _wrong(
            "log targets missing",
            "kl-divergence",
            divergence=lambda p, q: (mx.exp(q) * (q - p)).sum(1).mean(),
        ),
    ),
)

# ------------------------------------------------------------------------------------ diffusion


def diffusion(rng: Rng) -> Example:
    """Noising x0 to step t, and the mean of the step back, by a linear schedule of 20."""
    n, m = size(rng, 1, 4), size(rng, 2, 5)
    inputs = {
        "x0": normal(rng, n, m),
        "noise": normal(rng, n, m),
        "t": rng.integers(1, 20, n),
        "betas": np.linspace(1e-3, 0.1, 20).astype(np.float32),
    }
    return Example(_diffusion, _port_diffusion(), inputs)


def _diffusion(
    x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, betas: torch.Tensor
) -> dict[str, torch.Tensor]:
    alphas = 1 - betas
    bars = torch.cumprod(alphas, 0)
    bar = bars[t][:, None]
    xt = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    mean = (xt - betas[t][:, None] / (1 - bar).sqrt() * noise) / alphas[t][:, None].sqrt()
    variance = betas[t] * (1 - bars[t - 1]) / (1 - bars[t])
    return {"xt": xt, "mean": mean, "variance": variance}


def _port_diffusion(
    shift: int = 0,
    previous: int = -1,
    root: Any = mx.sqrt,
    scale: Any = mx.sqrt,
    posterior: bool = True,
    bars: Any = mx.cumprod,
) -> Callable[..., dict[str, mx.array]]:
    def process(x0: mx.array, noise: mx.array, t: mx.array, betas: mx.array) -> dict[str, mx.array]:
        alphas = 1 - betas
        cumulative = bars(alphas)
        bar = cumulative[mx.clip(t + shift, 0, 19)][:, None]
        xt = scale(bar) * x0 + root(1 - bar) * noise
        mean = (xt - betas[t][:, None] / mx.sqrt(1 - bar) * noise) / mx.sqrt(alphas[t])[:, None]
        variance = betas[t] * (1 - cumulative[t + previous]) / (1 - cumulative[t])
        return {"xt": xt, "mean": mean, "variance": variance if posterior else betas[t]}

    return process


def _process(name: str, why: str, subtle: bool = False, **wrong: Any) -> Fault:
    return fault(name, "forward", why, lambda port: _port_diffusion(**wrong), subtle)


DIFFUSION_FAMILY = Family(
    "diffusion schedule",
    diffusion,
    (
        _process("the schedule off by one", "index-out-of-bounds", shift=-1),
        _process("the variance of the step itself", "index-out-of-bounds", previous=0),
        _process("no root over 1 - bar", "module-setting root-missing", root=lambda v: v),
        _process("no root over bar", "module-setting root-missing", scale=lambda v: v),
        _process(
            "beta for the posterior's variance", "scale-factor residual-dropped", posterior=False
        ),
        _process(
            "a sum for the product",
            "module-setting scale-factor",
            bars=lambda a: 1 - mx.cumsum(1 - a),
        ),
        _process(
            "root 1e-5 off",
            "module-setting scale-factor",
            True,
            root=lambda v: mx.sqrt(v) * (1 + 1e-5),
        ),
    ),
)

# ---------------------------------------------------------------------------------- compilation


def _step(model: Any, opt: Any, x: Any) -> Any:
    if isinstance(model, tnn.Module):
        opt.zero_grad()
        loss = (model(x) ** 2).mean()
        loss.backward()
        opt.step()
        return (loss,)
    loss, grads = mnn.value_and_grad(model, lambda m: mx.square(m(x)).mean())(model)
    opt.update(model, grads)
    return (loss,)


def _compiled_case(compiled: Any = compile_step) -> Case:
    def build(library: Any, shape: Any) -> System:
        model, opt = library()
        return System(
            modules={"model": model},
            forward=lambda x: {"y": model(x)},
            losses={"loss": Loss(lambda x: (model(x) ** 2).mean(), ("model",))},
            optimizers={"model": opt},
            step=_step,
        )

    def theirs() -> Any:
        model = Small(4)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def ours() -> Any:
        return PortSmall(4), optim.SGD(0.1, momentum=0.9)

    return Case(
        name="compiled",
        shapes=st.fixed_dictionaries({"batch": st.integers(1, 5)}),
        build=build,
        reference=theirs,
        port=ours,
        inputs=lambda shape, rng: {"x": normal(rng, shape["batch"], 3)},
        compile_step=compiled,
    )


def compiled(rng: Rng) -> Example:
    return Example(_compiled_case(), None, {"batch": size(rng, 1, 5)})


def _compiles(name: str, why: str, step: Any) -> Fault:
    return Fault(
        name,
        "compiled",
        tuple(why.split()),
        lambda example: replace(example, reference=_compiled_case(step)),
    )


def _forgotten_optimizer(step: Any, model: Any, opt: Any) -> Any:
    state = [model.state]
    return partial(mx.compile, inputs=state, outputs=state)(lambda x: step(model, opt, x))


def _forgotten_model(step: Any, model: Any, opt: Any) -> Any:
    state = [opt.state]
    return partial(mx.compile, inputs=state, outputs=state)(lambda x: step(model, opt, x))


def _not_returned(step: Any, model: Any, opt: Any) -> Any:
    state = [model.state, opt.state]
    return partial(mx.compile, inputs=state)(lambda x: step(model, opt, x))


def _retraced(step: Any, model: Any, opt: Any) -> Any:
    made = compile_step(lambda m, o, x, n: step(m, o, x), model, opt)
    calls: list[None] = []

    def take(x: mx.array) -> Any:
        calls.append(None)
        return made(x, float(len(calls)))

    return take


def _frozen_noise(step: Any, model: Any, opt: Any) -> Any:
    state = [model.state, opt.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def take(x: mx.array) -> Any:
        return step(model, opt, x + 0.1 * mx.random.normal(x.shape))

    return take


def _evaluated(step: Any, model: Any, opt: Any) -> Any:
    def wrapped(m: Any, o: Any, x: mx.array) -> Any:
        losses = step(m, o, x)
        losses[0].item()
        return losses

    return compile_step(wrapped, model, opt)


COMPILED_FAMILY = Family(
    "compiled steps",
    compiled,
    (
        _compiles("the optimizer's state left out", "compile-state", _forgotten_optimizer),
        _compiles("the model's state left out", "compile-state", _forgotten_model),
        _compiles("state that is not returned", "compile-state", _not_returned),
        _compiles("a number that changes", "compile-attribute", _retraced),
        _compiles("noise drawn inside", "compile-random-state", _frozen_noise),
        _compiles("a loss read inside", "compile-eval", _evaluated),
    ),
)

FAMILIES = (ADAM_FAMILY, SGD_FAMILY, LOSS_FAMILY, DIFFUSION_FAMILY, COMPILED_FAMILY)
