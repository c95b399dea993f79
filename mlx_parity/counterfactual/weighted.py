"""Linear layers, convolutions, embeddings and recurrent layers: what goes wrong with weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from mlx_parity.counterfactual.calls import Call, Change, Proposals, Proposer, T, ints


def _linear(call: Call) -> Proposals:
    weight, bias = call.get("weight"), call.get("bias")
    if bias is not None:
        yield Change("bias-missing", "no bias", lambda c: c.run(bias=None))
        yield Change("bias-missing", "the bias added twice", lambda c: c.run() + c.get("bias"))
    if weight.shape[0] == weight.shape[1]:
        yield Change(
            "weight-transposed", "the weight transposed", lambda c: c.run(weight=c.get("weight").T)
        )
    for parts in (2, 3, 4):
        if weight.shape[0] % parts == 0 and weight.shape[0] > parts:
            for order in itertools.permutations(range(parts)):
                if order != tuple(range(parts)):
                    yield Change(
                        "gate-order",
                        f"the {parts} blocks of its rows in the order {list(order)}",
                        lambda c, o=order: torch.cat([c.run().chunk(len(o), -1)[i] for i in o], -1),
                    )


def _conv(call: Call) -> Proposals:
    weight, bias = call.get("weight"), call.get("bias")
    transposed = "transpose" in call.name
    axes = weight.ndim
    if bias is not None:
        yield Change("bias-missing", "no bias", lambda c: c.run(bias=None))
    if transposed and weight.shape[0] == weight.shape[1]:
        yield Change(
            "conv-transpose-kernel-layout",
            "the kernel carried by the plain convolution's rule",
            lambda c: c.run(weight=c.get("weight").transpose(0, 1)),
        )
    for order in itertools.permutations(range(1, axes)):
        if order == tuple(range(1, axes)):
            continue
        if tuple(weight.permute(0, *order).shape) == tuple(weight.shape):
            yield Change(
                "conv-kernel-layout",
                f"the kernel's axes in the order {[0, *order]}",
                lambda c, o=order: c.run(weight=c.get("weight").permute(0, *o)),
            )
    if not transposed and set(weight.shape[2:]) == {1} and weight.shape[0] == weight.shape[1]:
        yield Change(
            "weight-transposed",
            "the weight transposed",
            lambda c: c.run(weight=c.get("weight").transpose(0, 1)),
        )
    yield Change(
        "conv-kernel-layout",
        "the kernel flipped",
        lambda c: c.run(weight=c.get("weight").flip(*range(2, axes))),
    )
    stride, padding, dilation = (
        ints(call.get(n, d), axes - 2) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    for p, d, s in itertools.product(range(4), range(1, 4), range(1, 4)):
        new = tuple((v,) * (axes - 2) for v in (s, p, d))
        if new != (stride, padding, dilation):
            yield Change(
                "conv-geometry",
                f"stride {s}, padding {p}, dilation {d}",
                lambda c, n=new: c.run(stride=n[0], padding=n[1], dilation=n[2]),
            )
    if not transposed and axes == 3 and not any(padding):  # padded before, on one side
        for other in (1, 2, 4, 8):
            if other < dilation[0]:
                yield Change(
                    "conv-geometry",
                    f"dilation {other} for {dilation[0]}, padded to match",
                    lambda c, n=other: c.run(dilation=n)[..., -c.run().shape[-1] :],
                )
    if not transposed and any(padding):
        for share in (2, 0):
            before = [p for q in reversed(padding) for p in (share * q, (2 - share) * q)]
            yield Change(
                "conv-geometry",
                f"all of the padding {'before' if share else 'behind'}, none on the other side",
                lambda c, w=before: c.run(input=F.pad(c.x, w), padding=0),
            )
        widths = [p for q in reversed(padding) for p in (q, q)]
        for mode in ("reflect", "replicate", "circular"):
            yield Change(
                "padding-mode",
                f"{mode} padding for zeros",
                lambda c, m=mode: c.run(input=F.pad(c.x, widths, mode=m), padding=0),
            )


def _embedding(call: Call) -> Proposals:
    for shift in (-1, 1, -2, 2):
        yield Change(
            "index-out-of-bounds",
            f"indices off by {shift:+d}",
            lambda c, s=shift: c.func(
                (c.args[0] + s).clamp(0, c.args[1].shape[0] - 1), *c.args[1:], **c.kwargs
            ),
        )


def _recurrent(call: Call) -> Proposals:
    gates = {"lstm": 4, "gru": 3}.get(call.name, 1)

    def rerun(c: Call, weights: list[T]) -> Any:
        return c.func(c.args[0], c.args[1], weights, *c.args[3:], **c.kwargs)

    def permuted(c: Call, order: tuple[int, ...]) -> Any:
        return rerun(c, [torch.cat([w.chunk(gates)[i] for i in order]) for w in c.args[2]])

    for order in itertools.permutations(range(gates)):
        if order != tuple(range(gates)):
            yield Change(
                "gate-order",
                f"the gates in the order {list(order)}",
                lambda c, o=order: permuted(c, o),
            )
    if any(a is True for a in call.args[-3:]):  # bidirectional, and perhaps batch first
        time = 1 if call.args[-1] is True else 0

        def back(c: Call, change: Callable[[T, T], T]) -> Any:
            states, *rest = c.run()
            return (change(*states.chunk(2, -1)), *rest)

        yield Change(
            "sequence-reversed",
            "the backward direction's states left in its own order",
            lambda c: back(c, lambda a, b: torch.cat([a, b.flip(time)], -1)),
        )
        yield Change(
            "concatenation-order",
            "the two directions exchanged",
            lambda c: back(c, lambda a, b: torch.cat([b, a], -1)),
        )
    if len(call.args[2]) % 4:
        return

    def biases(c: Call, change: Callable[[T, T], tuple[T, T]]) -> Any:
        weights = list(c.args[2])
        for i in range(2, len(weights), 4):
            weights[i], weights[i + 1] = change(weights[i], weights[i + 1])
        return rerun(c, weights)

    for what, change in (
        ("no input bias", lambda a, b: (a * 0, b)),
        ("no hidden bias", lambda a, b: (a, b * 0)),
        ("no bias", lambda a, b: (a * 0, b * 0)),
        ("both biases added to the input's", lambda a, b: (a + b, b * 0)),
    ):
        yield Change("recurrent-biases", what, lambda c, f=change: biases(c, f))


PROPOSALS: dict[str, Proposer] = {
    **{f"conv{t}{n}d": _conv for t in ("", "_transpose") for n in (1, 2, 3)},
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "linear": _linear,
    "embedding": _embedding,
}
