"""Another activation, another parameter of it, and none; dropout left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from mlx_parity.counterfactual.calls import Call, Change, Proposals, Proposer, T

ACTIVATIONS: dict[str, Callable[[T], T]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "mish": F.mish,
    "selu": F.selu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "x * sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
}


def _activation(call: Call) -> Proposals:
    name = call.name
    if name == "leaky_relu":
        slope = call.get("negative_slope", 0.01)
        yield Change(
            "activation-slope",
            f"slope {{:.6g}} for {slope:g}",
            lambda c, s: c.run(negative_slope=s),
            fit=(slope, False),
        )
        yield Change(
            "leaky-relu-kink",
            "a derivative of 1 at exactly 0",
            lambda c: torch.where(c.x >= 0, c.x, c.get("negative_slope", 0.01) * c.x),
        )
    if name == "elu":
        alpha = call.get("alpha", 1.0)
        yield Change(
            "activation-slope",
            f"alpha {{:.6g}} for {alpha:g}",
            lambda c, a: c.run(alpha=a),
            fit=(alpha, False),
        )
    if name == "gelu":
        other = "none" if call.get("approximate", "none") == "tanh" else "tanh"
        said = {"none": "the exact GELU", "tanh": "GELU's approximation by tanh"}
        yield Change("gelu-approximation", said[other], lambda c: F.gelu(c.x, approximate=other))
        yield Change(
            "gelu-approximation",
            "x * sigmoid(1.702 x) for GELU",
            lambda c: c.x * torch.sigmoid(1.702 * c.x),
        )
    for kind, function in ACTIVATIONS.items():
        if kind != name and not (name == "gelu" and " " in kind):  # those have a trap of their own
            yield Change(
                "activation-kind",
                f"{kind} for {name}",
                lambda c, f=function: f(c.x),
            )
    yield Change("activation-kind", f"no {name}", lambda c: c.x * 1)


def _dropout(call: Call) -> Proposals:
    training = bool(call.get("training", True))
    if not training:
        return
    yield Change("training-mode", "no dropout", lambda c: c.run(training=False))


def inserted(call: Call) -> Proposals:
    """An activation where the original has none."""
    for kind in ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"):
        yield Change(
            "activation-kind",
            f"{kind} after {call.name}",
            lambda c, f=ACTIVATIONS[kind]: f(c.run()),
        )


PROPOSALS: dict[str, Proposer] = {
    **dict.fromkeys(ACTIVATIONS, _activation),
    "dropout": _dropout,
}
