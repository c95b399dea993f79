"""Another eps, other axes and groups, no scale or shift, the other kind, no norm at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mlx_parity.counterfactual.calls import Call, Change, Proposals, Proposer, T

NAMES = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")


def _norm(call: Call) -> Proposals:
    name, x = call.name, call.x
    eps = call.get("eps", 1e-5)
    trap = "rmsnorm-eps" if name == "rms_norm" else "norm-eps"
    start = torch.finfo(torch.float32).eps if eps is None else eps
    yield Change(
        trap,
        f"eps {{:.4g}} for {start:.4g}",
        lambda c, e: c.run(eps=e),
        fit=(start, True),
    )
    for part in ("weight", "bias"):
        if call.get(part) is not None:
            yield Change("norm-affine", f"no {part}", lambda c, p=part: c.run(**{p: None}))
    channel_axis = x.ndim - 1 if name in ("layer_norm", "rms_norm") else 1
    if name == "group_norm":
        groups, channels = call.get("num_groups"), x.shape[1]
        if 1 < groups < channels:
            yield Change("norm-groups", "groups of every n-th channel", _strided_groups)
        for other in range(1, channels + 1):
            if channels % other == 0 and other != groups:
                yield Change(
                    "norm-groups",
                    f"{other} groups for {groups}",
                    lambda c, g=other: c.run(num_groups=g),
                )
    if name == "batch_norm" and call.get("running_mean") is not None:
        training = bool(call.get("training", False))
        yield Change(
            "training-mode",
            "statistics of the batch" if not training else "the running statistics",
            lambda c: c.run(training=not training),
        )
        if training:
            momentum = call.get("momentum", 0.1)
            yield Change(
                "norm-momentum",
                f"momentum {{:.6g}} for {momentum:g}",
                lambda c, m: c.run(momentum=m),
                fit=(momentum, False),
            )
            yield Change(
                "batchnorm-biased-variance",
                "a running variance fed by the biased one",
                _biased_running_variance,
            )
    if name in ("batch_norm", "instance_norm", "group_norm") and x.ndim > 2:
        spatial = range(2, x.ndim)
        for said, axes in (
            ("the statistics of each image's own channel", (*spatial,)),
            ("the statistics of the whole batch", (0, *spatial)),
            ("the statistics of each whole image", (1, *spatial)),
            ("the statistics of each pixel over its channels", (1,)),
        ):
            yield Change(
                "norm-axis",
                said,
                lambda c, a=axes: _affine(_standardised(c, a), c, 1),
            )
    if name == "layer_norm":
        last = x.ndim - 1
        if len(call.get("normalized_shape")) > 1:
            for axes in ((last,), (x.ndim - len(call.get("normalized_shape")),)):
                yield Change(
                    "layernorm-shape",
                    f"normalised over axis {axes[0]} alone",
                    lambda c, a=axes: _standardised(c, a) * _or_one(c) + _or_zero(c),
                )
        for axis in range(1, last):
            yield Change(
                "norm-axis",
                f"normalised over axis {axis} for {last}",
                lambda c, a=axis: _standardised(c, (a,)) * _or_one(c) + _or_zero(c),
            )
        yield Change(
            "norm-kind",
            "RMSNorm for LayerNorm (the mean is not subtracted)",
            lambda c: _standardised(c, (c.x.ndim - 1,), centre=False) * _or_one(c) + _or_zero(c),
        )
        yield Change(
            "variance-ddof",
            "a variance divided by N - 1",
            lambda c: _standardised(c, (c.x.ndim - 1,), ddof=1) * _or_one(c) + _or_zero(c),
        )
    if name == "rms_norm":
        yield Change(
            "norm-kind",
            "LayerNorm for RMSNorm (the mean is subtracted)",
            lambda c: _standardised(c, (c.x.ndim - 1,)) * _or_one(c),
        )
        yield Change(
            "norm-affine",
            "a weight of 1 + weight",
            lambda c: c.run(weight=1 + c.get("weight")),
        )
    yield Change("layer-order", f"{name} is skipped", lambda c: c.x * 1)
    yield Change(
        "layer-order",
        f"{name} without its scale and shift",
        lambda c: _affine(c.x, c, channel_axis),
    )


def _strided_groups(call: Call) -> T:
    """MLX's own groups: every n-th channel."""
    x, groups = call.x, call.get("num_groups")
    n, c = x.shape[:2]
    mixed = x.reshape(n, c // groups, groups, -1)
    mean = mixed.mean((1, 3), keepdim=True)
    var = mixed.var((1, 3), keepdim=True, correction=0)
    y = ((mixed - mean) * torch.rsqrt(var + call.get("eps", 1e-5))).reshape(x.shape)
    return _affine(y, call, 1)


def _affine(y: T, call: Call, axis: int) -> T:
    shape = [1] * y.ndim
    shape[axis] = -1
    weight, bias = call.get("weight"), call.get("bias")
    if weight is not None:
        y = y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _standardised(call: Call, axes: Sequence[int], centre: bool = True, ddof: int = 0) -> T:
    x, eps = call.x, call.get("eps", 1e-5)
    mean = x.mean(tuple(axes), keepdim=True) if centre else 0
    square = ((x - mean) ** 2).sum(tuple(axes), keepdim=True)
    count = math.prod(x.shape[a] for a in axes)
    return (x - mean) * torch.rsqrt(square / (count - ddof) + (1e-5 if eps is None else eps))


def _biased_running_variance(call: Call) -> Any:
    kept = 1 - call.get("momentum", 0.1)
    running = call.get("running_var")
    before = running.clone()
    y = call.run()
    n = call.x.numel() // call.x.shape[1]
    running.copy_(kept * before + (running - kept * before) * (n - 1) / n)
    return y


def _or_one(call: Call) -> Any:
    return 1 if call.get("weight") is None else call.get("weight")


def _or_zero(call: Call) -> Any:
    return 0 if call.get("bias") is None else call.get("bias")


def _unit(call: Call) -> Proposals:
    """A vector over its length, which is cut off at eps from below."""
    p, dim = call.get("p", 2.0), call.get("dim", 1)
    if not isinstance(dim, int):
        return

    def length(c: Call) -> T:
        return c.x.norm(p, dim, keepdim=True)

    for said, run in (
        ("{:.4g} added to the length", lambda c, e: c.x / (length(c) + e)),
        ("{:.4g} added under the root", lambda c, e: c.x / (length(c) ** 2 + e).sqrt()),
    ):
        yield Change("norm-eps", said, run, fit=(1e-6, True))
    yield Change(
        "norm-kind",
        "RMSNorm for a length of 1",
        lambda c: c.x / c.x.square().mean(dim, keepdim=True).sqrt(),
    )
    for axis in range(call.x.ndim):
        if axis != dim % call.x.ndim:
            said = f"a length of 1 along axis {axis} for {dim % call.x.ndim}"
            yield Change("norm-axis", said, lambda c, a=axis: c.run(dim=a))
    yield Change("layer-order", "normalize is skipped", lambda c: c.x * 1)


PROPOSALS: dict[str, Proposer] = {**dict.fromkeys(NAMES, _norm), "normalize": _unit}
