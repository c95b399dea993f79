"""The order of what is concatenated, split and flattened; indices; heads cut otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from mlx_parity.counterfactual.calls import Call, Change, Proposals, Proposer, T


def _cat(call: Call) -> Proposals:
    tensors = call.get("tensors", call.x)
    dim = call.get("dim", 0)
    for order in itertools.permutations(range(len(tensors))) if len(tensors) < 5 else ():
        if order != tuple(range(len(tensors))):
            yield Change(
                "concatenation-order",
                f"concatenated in the order {list(order)}",
                lambda c, o=order: torch.cat([c.get("tensors", c.x)[i] for i in o], dim),
            )


def _getitem(call: Call) -> Proposals:
    index = call.args[1]
    keys = index if isinstance(index, tuple) else (index,)
    for i, key in enumerate(keys):
        if isinstance(key, int) and not isinstance(key, bool):
            for other in (key - 1, key + 1):
                if (other < 0) == (key < 0):
                    new = (*keys[:i], other, *keys[i + 1 :])
                    yield Change(
                        "index-out-of-bounds",
                        f"index {other} for {key}",
                        lambda c, n=new: c.args[0][n],
                    )
    if isinstance(index, T) and index.dtype == torch.int64:
        for shift in (-1, 1):
            yield Change(
                "index-out-of-bounds",
                f"indices off by {shift:+d}",
                lambda c, s=shift: c.args[0][(c.args[1] + s).clamp(0, len(c.args[0]) - 1)],
            )


def _chunk(call: Call) -> Proposals:
    parts = call.run()
    count = len(parts)
    if 2 <= count <= 4 and len({tuple(p.shape) for p in parts}) == 1:
        for order in itertools.permutations(range(count)):
            if order != tuple(range(count)):
                yield Change(
                    "gate-order",
                    f"the parts in the order {list(order)}",
                    lambda c, o=order: tuple(c.run()[i] for i in o),
                )


def _flatten(call: Call) -> Proposals:
    x = call.x
    y = call.run()
    if not isinstance(y, T):
        return
    if x.ndim == 4 and y.ndim < 4:
        yield Change(
            "flatten-order",
            "flattened as (H, W, C)",
            lambda c: c.x.permute(0, 2, 3, 1).reshape(c.run().shape),
        )
    if x.ndim == 2 and y.ndim == 4:
        yield Change(
            "flatten-order",
            "reshaped as (H, W, C)",
            lambda c: _unflattened(c.x, c.run().shape),
        )
    if x.ndim == 3 and y.ndim == 4:
        width = x.shape[-1]
        for heads in range(1, width + 1):
            if width % heads == 0 and heads != y.shape[2] and y.shape[2] * y.shape[3] == width:
                yield Change(
                    "head-count",
                    f"{heads} heads for {y.shape[2]}",
                    lambda c, h=heads: c.x.reshape(*c.x.shape[:2], h, -1),
                )
        if y.shape[2] * y.shape[3] == width:
            yield Change(
                "head-count",
                "heads interleaved along the channels",
                lambda c: c.x.reshape(*c.run().shape[:2], *c.run().shape[:1:-1]).transpose(2, 3),
            )


def _unflattened(x: T, shape: Sequence[int]) -> T:
    n, c, h, w = shape
    return x.reshape(n, h, w, c).permute(0, 3, 1, 2)


PROPOSALS: dict[str, Proposer] = {
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(("chunk", "split", "unbind"), _chunk),
    **dict.fromkeys(("flatten", "reshape", "view", "unflatten"), _flatten),
    "__getitem__": _getitem,
}
