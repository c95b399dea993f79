"""The order of what is concatenated, split and flattened; indices; heads cut otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mlx_parity.counterfactual.calls import Call, Change, Proposals, Proposer, T


def _cat(call: Call) -> Proposals:
    tensors = call.get("tensors", call.x)
    dim = call.get("dim", 0)
    if len({t.shape for t in tensors}) == 1 and len(tensors) > 1:
        yield Change(
            "concatenation-order",
            "interleaved, not one behind the other",
            lambda c: torch.stack(
                tuple(c.get("tensors", c.x)), dim if dim < 0 else dim + 1
            ).flatten(*((dim - 1, dim) if dim < 0 else (dim, dim + 1))),
        )
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
    yield from _pooled(call, keys)
    yield from _shifted(call, keys)
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


def _pooled(call: Call, keys: tuple[Any, ...]) -> Proposals:
    """One position of a sequence taken: the first, the last, the mean in its stead."""
    x, y = call.x, call.run()
    if not isinstance(y, T) or x.ndim < 3 or y.ndim != x.ndim - 1 or y.shape[0] != x.shape[0]:
        return
    if y.shape != x[:, 0].shape:
        return
    for said, pooled in (
        ("the first position", lambda x: x[:, 0]),
        ("the last position", lambda x: x[:, -1]),
        ("the mean over the positions", lambda x: x.mean(1)),
        ("the maximum over the positions", lambda x: x.amax(1)),
    ):
        if not torch.equal(pooled(x), y):
            yield Change("pooling-kind", said, lambda c, f=pooled: f(c.x))


def _shifted(call: Call, keys: tuple[Any, ...]) -> Proposals:
    """A slice that begins elsewhere, as after a convolution that is padded on both sides."""
    x = call.x
    keys = tuple(k for k in keys if k is not None)
    at = next((i for i, k in enumerate(keys) if k is Ellipsis), None)
    for i, key in enumerate(keys):
        if not isinstance(key, slice) or key.step not in (None, 1):
            continue
        axis = i if at is None or i < at else x.ndim - len(keys) + i
        start, stop, _ = key.indices(x.shape[axis])
        for shift in (1, 2, 3, -1, -2, -3):
            if (
                stop - start < x.shape[axis]
                and start + shift >= 0
                and stop + shift <= x.shape[axis]
            ):
                yield Change(
                    "slice-shifted",
                    f"elements {start + shift} to {stop + shift} for {start} to {stop}",
                    lambda c, a=axis, s=start + shift, n=stop - start: c.x.narrow(a, s, n),
                )


def _permuted(call: Call) -> Proposals:
    """Axes left as they are, where the shape allows it."""
    x, y = call.x, call.run()
    if isinstance(y, T) and y.shape == x.shape and x.ndim > 2:
        yield Change("axes-order", f"no {call.name}", lambda c: c.x * 1)


def _repeat(call: Call) -> Proposals:
    """Repeated in turn, or each element by itself."""
    x = call.x
    if call.name == "repeat_interleave":
        count, dim = call.get("repeats", call.args[1] if len(call.args) > 1 else 1), None
        dim = call.get("dim", call.args[2] if len(call.args) > 2 else None)
        if isinstance(count, int) and dim is not None:
            yield Change(
                "repeat-interleaves",
                "the whole repeated, not each element",
                lambda c: torch.cat([c.x] * count, dim),
            )
        return
    sizes = call.args[1:] if isinstance(call.args[1], int) else call.args[1]
    axes = [i for i, n in enumerate(sizes) if n > 1]
    if len(sizes) == x.ndim and len(axes) == 1:
        yield Change(
            "repeat-interleaves",
            "each element repeated, not the whole",
            lambda c: c.x.repeat_interleave(sizes[axes[0]], axes[0]),
        )


def _expand(call: Call) -> Proposals:
    """A new axis behind another, to be merged with it: each head several times, or all in turn."""
    x, y = call.x, call.run()
    for axis in range(1, x.ndim) if isinstance(y, T) and y.ndim == x.ndim else ():
        if x.shape[axis] == 1 < y.shape[axis] and y.shape[axis - 1] > 1:
            yield Change(
                "repeat-interleaves",
                "the whole repeated, not each element",
                lambda c, a=axis: c.run().transpose(a - 1, a).reshape(c.run().shape),
            )


def _topk(call: Call) -> Proposals:
    k, dim = call.args[1], call.get("dim", call.args[2] if len(call.args) > 2 else -1)
    yield Change("topk-order", "the smallest for the largest", lambda c: c.x.topk(k, dim, False))
    for other in (k - 1, k + 1):
        if 0 < other <= call.x.shape[dim]:
            yield Change(
                "module-setting",
                f"the {other} largest for {k}",
                lambda c, n=other: c.x.topk(n, dim),
            )


def _extreme(call: Call) -> Proposals:
    other = {"argmax": torch.argmin, "argmin": torch.argmax}[call.name]
    yield Change(
        "topk-order", f"{other.__name__} for {call.name}", lambda c: other(*c.args, **c.kwargs)
    )


def _pixel_shuffle(call: Call) -> Proposals:
    r = call.args[1]

    def reordered(c: Call, order: str) -> T:
        n, _, h, w = c.x.shape
        sizes = {"c": c.x.shape[1] // r**2, "i": r, "j": r}
        x = c.x.reshape(n, *(sizes[a] for a in order), h, w)
        channel, row, column = (1 + order.index(a) for a in "cij")
        return x.permute(0, channel, 4, row, 5, column).reshape(n, -1, r * h, r * w)

    for order, said in (
        ("ijc", "the block's rows and columns before the channels"),
        ("cji", "columns of a block before its rows"),
        ("jic", "the block's columns and rows before the channels"),
    ):
        yield Change("pixel-shuffle-order", said, lambda c, o=order: reordered(c, o))


def _arange(call: Call) -> Proposals:
    """Positions that begin at 0, or one further, or are turned."""
    y = call.run()
    if y.ndim != 1 or len(y) < 2:
        return
    if y[0] != 0:
        yield Change("position-offset", "positions from 0", lambda c: c.run() - c.run()[0])
    for shift in (1, -1):
        yield Change("position-offset", f"positions {shift:+d}", lambda c, s=shift: c.run() + s)
    yield Change("position-offset", "positions backwards", lambda c: c.run().flip(0))


def _roll(call: Call) -> Proposals:
    """Rolled the other way, or one of the axes not at all."""

    def rolled(sign: int, only: int | None = None) -> Callable[[Call], T]:
        def run(c: Call) -> T:
            shifts, dims = c.get("shifts"), c.get("dims")
            shifts = (shifts,) if isinstance(shifts, int) else tuple(shifts)
            some = [sign * s if only in (None, i) else 0 for i, s in enumerate(shifts)]
            return c.run(shifts=some if dims else some[0], **({"dims": dims} if dims else {}))

        return run

    yield Change("roll-direction", "rolled the other way", rolled(-1))
    yield Change("roll-direction", "not rolled", lambda c: c.x * 1)
    axes = call.get("dims")
    for i, axis in enumerate(axes) if isinstance(axes, Sequence) and len(axes) > 1 else ():
        yield Change("roll-direction", f"rolled along axis {axis} alone", rolled(1, i))


def _chunk(call: Call) -> Proposals:
    parts = call.run()
    count = len(parts)
    if 2 <= count <= 4:
        for order in itertools.permutations(range(count)):
            alike = all(parts[i].shape == parts[j].shape for i, j in enumerate(order))
            if alike and order != tuple(range(count)):
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
    if x.ndim == 4 and y.ndim == 3 and x.shape[0] == y.shape[0]:
        yield Change(
            "axes-order",
            "axes 1 and 2 not exchanged before",
            lambda c: c.x.transpose(1, 2).reshape(c.run().shape),
        )
        yield Change(
            "axes-order",
            "the last two axes exchanged before",
            lambda c: c.x.transpose(2, 3).reshape(c.run().shape),
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
    **dict.fromkeys(("repeat", "tile", "repeat_interleave"), _repeat),
    "expand": _expand,
    **dict.fromkeys(("transpose", "permute", "swapaxes"), _permuted),
    **dict.fromkeys(("argmax", "argmin"), _extreme),
    "__getitem__": _getitem,
    "arange": _arange,
    "pixel_shuffle": _pixel_shuffle,
    "roll": _roll,
    "topk": _topk,
}
