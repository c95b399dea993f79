"""Another axis of the softmax, another scale, mask and number of heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mlx_parity.counterfactual.calls import Call, Change, Proposals, Proposer, T


def _softmax(call: Call) -> Proposals:
    x = call.x
    dim = call.get("dim", -1)
    if call.name == "log_softmax":
        yield Change("activation-kind", "softmax for log_softmax", lambda c: c.x.softmax(dim))
        yield Change("activation-kind", "no log_softmax", lambda c: c.x * 1)
    else:
        yield Change("activation-kind", "log_softmax for softmax", lambda c: c.x.log_softmax(dim))
        yield Change("activation-kind", "no softmax", lambda c: c.x * 1)
    for axis in range(x.ndim):
        if axis != dim % x.ndim:
            yield Change(
                "softmax-axis",
                f"softmax over axis {axis} for {dim % x.ndim}",
                lambda c, a=axis: getattr(torch, c.name)(c.x, a),
            )
    yield Change(
        "attention-scale",
        "the softmax's logits times {:.6g}",
        lambda c, s: getattr(torch, c.name)(s * c.x, dim),
        fit=(1.0, False),
    )
    if x.ndim >= 3 and x.shape[-1] == x.shape[-2]:
        infinite = torch.full(x.shape[-2:], -math.inf, dtype=x.dtype)
        yield Change(
            "attention-mask",
            "a causal mask",
            lambda c: torch.softmax(c.x + infinite.to(c.x.dtype).triu(1), dim),
        )


def _sdpa(call: Call) -> Proposals:
    q = call.x
    start = call.get("scale") or q.shape[-1] ** -0.5
    yield Change(
        "attention-scale",
        f"scale {{:.6g}} for {start:.6g}",
        lambda c, s: c.run(scale=s),
        fit=(start, False),
    )
    mask = call.get("attn_mask")
    if mask is not None:
        yield Change("attention-mask", "no mask", lambda c: c.run(attn_mask=None))
        if mask.dtype == torch.bool:
            yield Change(
                "attention-mask",
                "the opposite mask",
                lambda c: c.run(attn_mask=~c.get("attn_mask")),
            )
    causal = bool(call.get("is_causal", False))
    if mask is None:
        yield Change(
            "attention-mask",
            "no causal mask" if causal else "a causal mask",
            lambda c: c.run(is_causal=not causal),
        )
    yield Change("softmax-axis", "softmax over the queries", lambda c: _by_hand(c, -2))
    if q.ndim == 4:
        yield Change("axes-order", "attention over the heads", _over_heads)
    for what, order in (("query and key", "kqv"), ("key and value", "qvk")):
        if len({a.shape for a in call.args[:3]}) == 1:
            yield Change(
                "layer-order",
                f"{what} exchanged",
                lambda c, o=order: c.func(
                    *(c.args["qkv".index(a)] for a in o), *c.args[3:], **c.kwargs
                ),
            )
    # Attention runs for each head by itself, so another number of heads can be had from here.
    if q.ndim == 4:
        heads, width = q.shape[1], q.shape[1] * q.shape[-1]
        for other in range(1, width + 1):
            if width % other == 0 and other != heads:
                yield Change(
                    "head-count",
                    f"{other} heads for {heads}",
                    lambda c, h=other: _regrouped(c, h),
                )


def _by_hand(call: Call, axis: int) -> T:
    """The same attention, its softmax over another axis."""
    q, k, v = call.args[:3]
    scores = q @ k.transpose(-1, -2) * (call.get("scale") or q.shape[-1] ** -0.5)
    mask = call.get("attn_mask")
    if call.get("is_causal", False):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(axis).nan_to_num() @ v


def _over_heads(call: Call) -> T:
    """(B, H, L, D) taken for (B, L, H, D)."""
    q, k, v = (a.transpose(1, 2) for a in call.args[:3])
    rest = {n: w for n, w in call.kwargs.items() if n not in ("attn_mask", "is_causal")}
    return F.scaled_dot_product_attention(q, k, v, **rest).transpose(1, 2)


def _regrouped(call: Call, heads: int) -> T:
    """Attention of (B, H, L, D) tensors with the same channels cut into ``heads`` heads."""

    def cut(a: T, n: int) -> T:
        b, _, length, _ = a.shape
        return a.transpose(1, 2).reshape(b, length, n, -1).transpose(1, 2)

    q, k, v = (cut(a, heads) for a in call.args[:3])
    rest = {k: w for k, w in call.kwargs.items() if k != "scale"}
    out = F.scaled_dot_product_attention(q, k, v, *call.args[3:], **rest)
    return cut(out, call.args[0].shape[1])


def opposite(mask: T) -> T:
    """What was kept hidden, and what was hidden kept."""
    if mask.dtype == torch.bool:
        return ~mask
    return torch.where(mask == mask.max(), mask.min(), mask.max())


def _projected(call: Call, change: Callable[[list[T]], Sequence[T]]) -> Any:
    """Weights and biases of query, key and value, where they are one matrix, changed alike."""
    weight, bias = (
        None if whole is None else torch.cat(list(change(list(whole.chunk(3)))))
        for whole in call.args[5:7]
    )
    return call.func(*call.args[:5], weight, bias, *call.args[7:], **call.kwargs)


def _mha(call: Call) -> Proposals:
    width, heads = call.args[3], call.args[4]
    padding = call.kwargs.get("key_padding_mask")
    if padding is not None:
        for said, mask in (
            ("no mask of the padding", lambda m: None),
            ("the opposite mask of the padding", opposite),
        ):
            yield Change(
                "attention-mask",
                said,
                lambda c, f=mask: c.func(
                    *c.args,
                    **{**c.kwargs, "key_padding_mask": f(c.kwargs["key_padding_mask"])},
                ),
            )
    if call.kwargs.get("attn_mask") is None and not call.kwargs.get("is_causal", False):
        n, m = call.args[0].shape[0], call.args[1].shape[0]
        causal = torch.ones(n, m, dtype=torch.bool).triu(1)
        if padding is not None and padding.dtype != torch.bool:
            causal = torch.zeros(n, m).masked_fill(causal, -math.inf).to(padding.dtype)
        yield Change(
            "attention-mask",
            "a causal mask",
            lambda c: c.func(*c.args, **{**c.kwargs, "attn_mask": causal}),
        )
    yield Change(
        "attention-scale",
        "the queries times {:.6g}",
        lambda c, s: _projected(c, lambda parts: (s * parts[0], *parts[1:])),
        fit=(1.0, False),
    )
    for what, order in (("query and key", (1, 0, 2)), ("key and value", (0, 2, 1))):
        yield Change(
            "layer-order",
            f"{what} exchanged",
            lambda c, o=order: _projected(c, lambda parts: [parts[i] for i in o]),
        )

    def changed(c: Call, at: int, value: Any) -> Any:
        return c.func(*c.args[:at], value, *c.args[at + 1 :], **c.kwargs)

    for other in range(1, width + 1):
        if width % other == 0 and other != heads:
            yield Change(
                "head-count",
                f"{other} heads for {heads}",
                lambda c, h=other: changed(c, 4, h),
            )
    if call.args[6] is not None:
        yield Change(
            "bias-missing",
            "attention without any bias",
            lambda c: c.func(*c.args[:6], None, *c.args[7:12], None, *c.args[13:], **c.kwargs),
        )
        yield Change("bias-missing", "no bias of in_proj", lambda c: changed(c, 6, None))
        yield Change("bias-missing", "no bias of out_proj", lambda c: changed(c, 12, None))
    if call.kwargs.get("attn_mask") is not None:
        yield Change(
            "attention-mask",
            "no mask",
            lambda c: c.func(
                *c.args,
                **{**c.kwargs, "attn_mask": None, "is_causal": False, "need_weights": False},
            ),
        )


PROPOSALS: dict[str, Proposer] = {
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    "scaled_dot_product_attention": _sdpa,
    "multi_head_attention_forward": _mha,
}
