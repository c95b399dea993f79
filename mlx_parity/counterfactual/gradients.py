"""Gradients that stop, and that flow where the original stops them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn as tnn

from mlx_parity.counterfactual.activations import ACTIVATIONS
from mlx_parity.counterfactual.alternative import Alternative
from mlx_parity.counterfactual.calls import Call, Change, Proposals, T
from mlx_parity.counterfactual.norms import NAMES as NORMS

STOPS = (
    *ACTIVATIONS,
    *NORMS,
    *("linear", "matmul", "softmax", "scaled_dot_product_attention", "embedding", "cat"),
    *("conv1d", "conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d", "lstm", "gru"),
    *("mean", "flatten", "reshape"),
)
"""Functions behind which a gradient may stop."""


def _detached(value: Any) -> Any:
    if isinstance(value, T):
        return value.detach()
    return type(value)(_detached(v) for v in value) if isinstance(value, tuple | list) else value


def backward(call: Call) -> Proposals:
    """Changes that the forward pass cannot show."""
    if call.name == "detach":
        yield Change("gradient-flows", "the gradient is not stopped", lambda c: c.args[0])
    if call.name in STOPS:
        yield Change(
            "gradient-stopped",
            f"the gradient stops after {call.name}",
            lambda c: _detached(c.run()),
        )
    if call.name in ("mul", "add", "sub", "matmul", "div") and len(call.args) > 1:
        for i in (0, 1):
            if isinstance(call.args[i], T) and call.args[i].requires_grad:
                yield Change(
                    "gradient-stopped",
                    f"the gradient stops before {call.name}, argument {i + 1}",
                    lambda c, i=i: c.func(
                        *[a.detach() if j == i else a for j, a in enumerate(c.args)], **c.kwargs
                    ),
                )


def of_parameters(module: tnn.Module) -> Iterator[Alternative]:
    """Parameters that get no gradient."""

    def stopped(name: str) -> Alternative:
        @contextlib.contextmanager
        def within(m: tnn.Module) -> Iterator[None]:
            parameter = m.get_parameter(name)
            parameter.requires_grad_(False)
            try:
                yield
            finally:
                parameter.requires_grad_(True)

        return Alternative("gradient-stopped", f"no gradient of {name}", within)

    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield stopped(name)
