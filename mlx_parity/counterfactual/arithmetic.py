"""Summands, factors, roots, sums and variances."""

from __future__ import annotations

from typing import Any

import torch

from mlx_parity.counterfactual.calls import Call, Change, Proposals, Proposer, T


def _add(call: Call) -> Proposals:
    a, b = call.args[0], call.args[1] if len(call.args) > 1 else None
    if not (isinstance(a, T) and isinstance(b, T)):
        return
    if a.shape == b.shape or b.numel() < a.numel():
        yield Change("residual-dropped", "the second summand is missing", lambda c: c.args[0] * 1)
    if a.shape == b.shape or a.numel() < b.numel():
        yield Change("residual-dropped", "the first summand is missing", lambda c: c.args[1] * 1)
    yield Change("residual-dropped", "a difference for a sum", lambda c: c.args[0] - c.args[1])


def _mul(call: Call) -> Proposals:
    a, b = call.args[0], call.args[1] if len(call.args) > 1 else None
    if isinstance(a, T) and isinstance(b, T) and a.shape != b.shape and b.numel() > 1:
        return
    if isinstance(a, T):
        yield Change("scale-factor", "no factor", lambda c: c.args[0] * 1)
        yield Change(
            "scale-factor",
            f"times {{:.6g}} more ({call.name})",
            lambda c, s: s * c.run(),
            fit=(1.0, False),
        )


def _sqrt(call: Call) -> Proposals:
    yield Change("root-missing", f"no {call.name}", lambda c: c.x * 1)
    yield Change("root-missing", f"{call.name} twice", lambda c: c.func(c.run()))
    yield Change(
        "scale-factor",
        f"{call.name} times {{:.6g}}",
        lambda c, s: s * c.run(),
        fit=(1.0, False),
    )


def _reduction(call: Call) -> Proposals:
    other = torch.sum if call.name == "mean" else torch.mean
    yield Change(
        "scale-factor",
        f"{other.__name__} for {call.name}",
        lambda c: other(*c.args, **c.kwargs),
    )


def _variance(call: Call) -> Proposals:
    def biased(c: Call) -> Any:
        kwargs = {k: v for k, v in c.kwargs.items() if k not in ("unbiased", "correction")}
        args = c.args if len(c.args) < 3 or not isinstance(c.args[2], bool) else c.args[:2]
        before = c.kwargs.get("unbiased", c.kwargs.get("correction", 1))
        return c.func(*args, **kwargs, correction=0 if before else 1)

    yield Change("variance-ddof", "another divisor, N for N - 1 or the reverse", biased)


PROPOSALS: dict[str, Proposer] = {
    **dict.fromkeys(("add", "add_"), _add),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _mul),
    **dict.fromkeys(("sqrt", "rsqrt"), _sqrt),
    **dict.fromkeys(("mean", "sum"), _reduction),
    **dict.fromkeys(("var", "std"), _variance),
}
