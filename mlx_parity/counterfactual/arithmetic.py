"""Summands, factors, roots, sums and variances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mlx_parity.counterfactual.activations import ACTIVATIONS
from mlx_parity.counterfactual.attention import opposite
from mlx_parity.counterfactual.calls import Call, Change, Proposals, Proposer, T


def _add(call: Call) -> Proposals:
    a, b = call.args[0], call.args[1] if len(call.args) > 1 else None
    if not isinstance(b, T) and b == 1:  # a norm's weight that is kept as its distance from 1
        yield Change("norm-affine", "no 1 added", lambda c: c.args[0] * 1)
    if isinstance(b, float) and 0 < b <= SMALL:  # what keeps a divisor or a root from zero
        yield Change("norm-eps", f"{{:.4g}} for {b:g}", lambda c, e: c.args[0] + e, fit=(b, True))
    if not (isinstance(a, T) and isinstance(b, T)):
        return
    if _like_a_mask(b, a):
        yield from _masked()
    elif _spans(a, b):
        yield Change("residual-dropped", "the second summand is missing", lambda c: c.args[0] * 1)
    if _spans(b, a):
        yield Change("residual-dropped", "the first summand is missing", lambda c: c.args[1] * 1)
    yield Change("residual-dropped", "a difference for a sum", lambda c: c.args[0] - c.args[1])
    for i, said in ((1, "second"), (0, "first")):
        yield Change(
            "scale-factor",
            f"the {said} summand times {{:.6g}}",
            lambda c, s, i=i: c.args[1 - i] + s * c.args[i],
            fit=(1.0, False),
        )


SMALL = 1e-2
"""A number added to a tensor that is no larger is an eps."""

LARGE = 10.0
"""A factor that is as large scales a time or an angle, whose sines no small step leads to."""


def _masked() -> Proposals:
    """What is done instead of adding a mask to the scores."""

    def exchanged(mask: T) -> T:
        return mask.transpose(-1, -2)

    def shifted(by: int) -> Callable[[T], T]:
        """Each query sees a key more, or one less; the first key stays as it is for the first."""

        def shift(mask: T) -> T:
            moved = mask.roll(by, -1)
            return torch.cat([mask[..., :1, :1].expand_as(mask[..., :1]), moved[..., 1:]], -1)

        return shift

    yield Change("attention-mask", "no mask", lambda c: c.args[0] * 1)
    for said, change in (
        ("the mask's last two axes exchanged", exchanged),
        ("the opposite mask", opposite),
        ("a key more for each query", shifted(1)),
        ("a key less for each query", shifted(-1)),
    ):
        yield Change("attention-mask", said, lambda c, f=change: c.args[0] + f(c.args[1]))


def _like_a_mask(mask: T, scores: T) -> bool:
    """Whether a summand is spread over scores' rows or columns: zeros and what is far below."""
    if not mask.ndim == scores.ndim > 2 or scores.shape == mask.shape:
        return False
    hidden = mask < -50
    return bool(hidden.any() and (mask == 0).any() and (hidden | (mask == 0)).all())


def _mul(call: Call) -> Proposals:
    a, b = call.args[0], call.args[1] if len(call.args) > 1 else None
    said = "divisor" if call.name.startswith("div") else "factor"
    if not isinstance(a, T):
        return
    if not isinstance(b, T) or _spans(a, b):
        yield Change("scale-factor", f"no {said}", lambda c: c.args[0] * 1)
    if isinstance(b, T) and said == "factor":
        yield from _product(a, b)
    if isinstance(b, int | float):
        yield from _constant(a, b, said)
    if not isinstance(b, T) or b.numel() == 1 or a.shape == b.shape:
        yield Change(
            "scale-factor",
            f"times {{:.6g}} more ({call.name})",
            lambda c, s: s * c.run(),
            fit=(1.0, False),
        )


def _constant(a: T, b: float, said: str) -> Proposals:
    """Another constant, where what follows is too steep for it to be found step by step."""
    if a.ndim == 1 and len(a) > 2:
        for m, n in ((len(a), len(a) - 1), (len(a) - 1, len(a))):
            yield Change(
                "constant-differs",
                f"rates over {m} for {n}, or the reverse",
                lambda c, m=m, n=n: c.run() * n / m,
            )
    for other in (b / 100, b / 10, b * 10, b * 100) if abs(b) >= LARGE else ():
        yield Change(
            "scale-factor",
            f"a {said} of {other:g} for {b:g}",
            lambda c, o=other: c.func(c.args[0], o, *c.args[2:], **c.kwargs),
        )


def _product(a: T, b: T) -> Proposals:
    if _spans(b, a):
        yield Change("scale-factor", "no first factor", lambda c: c.args[1] * 1)
    if a.shape == b.shape and a.is_floating_point():
        yield Change("scale-factor", "a sum for a product", lambda c: c.args[0] + c.args[1])
        for kind, function in ACTIVATIONS.items():
            yield Change(  # x * sigmoid(1.702 x), written out
                "gelu-approximation" if "gelu" in kind else "activation-kind",
                f"{kind} for a product",
                lambda c, f=function: f(c.args[0]),
            )


def _spans(a: T, b: T) -> bool:
    """Whether ``a`` alone has the shape that both have together."""
    return torch.broadcast_shapes(a.shape, b.shape) == a.shape


def _sub(call: Call) -> Proposals:
    """``x - x.mean()``, of a norm that is written out."""
    a, b = call.args[0], call.args[1] if len(call.args) > 1 else None
    if isinstance(a, T) and isinstance(b, T) and a.shape != b.shape and _spans(a, b):
        yield Change("norm-kind", "no mean subtracted", lambda c: c.args[0] * 1)


def _from_one(call: Call) -> Proposals:
    """``1 - x``."""
    yield Change("scale-factor", "no complement (x for 1 - x)", lambda c: c.args[0] * 1)


def _matmul(call: Call) -> Proposals:
    yield Change(
        "attention-scale",
        "a product of matrices times {:.6g}",
        lambda c, s: s * c.run(),
        fit=(1.0, False),
    )
    b = call.args[1]
    if b.ndim > 1 and b.shape[-1] == b.shape[-2]:
        yield Change(
            "weight-transposed",
            "the second matrix transposed",
            lambda c: c.func(c.args[0], c.args[1].transpose(-1, -2)),
        )


def _norm(call: Call) -> Proposals:
    yield Change("root-missing", "the norm's square", lambda c: c.run() ** 2)
    for p in (1, torch.inf):
        yield Change(
            "scale-factor",
            f"a norm of order {p}",
            lambda c, p=p: torch.linalg.vector_norm(
                c.x, p, c.kwargs.get("dim"), c.kwargs.get("keepdim", False)
            ),
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
    dim = call.get("dim", call.args[1] if len(call.args) > 1 else None)
    if dim is None:
        return
    keep = bool(call.kwargs.get("keepdim", False))
    for name, function in (("maximum", torch.amax), ("minimum", torch.amin)):
        yield Change(
            "pooling-kind",
            f"the {name} for the {call.name}",
            lambda c, f=function: f(c.x, dim, keep),
        )
    if isinstance(dim, int):
        for at, said in ((0, "first"), (-1, "last")):
            yield Change(
                "pooling-kind",
                f"the {said} for the {call.name}",
                lambda c, i=at: c.x.select(dim, i).unsqueeze(dim) if keep else c.x.select(dim, i),
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
    **dict.fromkeys(("norm", "vector_norm"), _norm),
    **dict.fromkeys(("rsub", "__rsub__"), _from_one),
    "sub": _sub,
    "matmul": _matmul,
    **dict.fromkeys(("sqrt", "rsqrt"), _sqrt),
    **dict.fromkeys(("mean", "sum"), _reduction),
    **dict.fromkeys(("var", "std"), _variance),
}
