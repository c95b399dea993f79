"""Padding, pooling and interpolation."""

from __future__ import annotations

import itertools

from torch.nn import functional as F

from mlx_parity.counterfactual.calls import Call, Change, Proposals, Proposer, T, ints


def _pad(call: Call) -> Proposals:
    widths = call.get("pad", call.args[1] if len(call.args) > 1 else ())
    if len(widths) == 2 and sum(widths) > 0:
        total = sum(widths)
        for before in {0, total // 2, total - total // 2, total} - {widths[0]}:
            yield Change(
                "conv-geometry",
                f"padded by {before} before and {total - before} behind",
                lambda c, b=before: F.pad(c.x, (b, total - b), *c.args[2:], **c.kwargs),
            )
    for mode in ("constant", "reflect", "replicate", "circular"):
        if mode != call.get("mode", "constant"):
            yield Change(
                "padding-mode",
                f"{mode} padding for {call.get('mode', 'constant')}",
                lambda c, m=mode: c.run(mode=m, value=None),
            )


def _pool(call: Call) -> Proposals:
    kernel = ints(call.get("kernel_size"), 2)
    stride = ints(call.get("stride") or kernel, 2)
    padding = ints(call.get("padding", 0), 2)
    other = F.avg_pool2d if call.name == "max_pool2d" else F.max_pool2d
    said = "average" if call.name == "max_pool2d" else "maximum"
    yield Change("pool-window", f"the {said}", lambda c: other(c.x, kernel, stride, padding))
    if call.name == "avg_pool2d":
        counted = bool(call.get("count_include_pad", True))
        yield Change(
            "pool-padding",
            "the padding left out of the mean" if counted else "the padding counted in the mean",
            lambda c: c.run(count_include_pad=not counted),
        )
    else:
        yield Change("maximum-ties", "the gradient split at ties", _split_at_ties)
    for k, s, p in itertools.product(range(2, 5), range(1, 5), range(3)):
        if ((k, k), (s, s), (p, p)) != (kernel, stride, padding) and 2 * p <= k:
            yield Change(
                "pool-window",
                f"window {k}, stride {s}, padding {p}",
                lambda c, w=(k, s, p): c.run(kernel_size=w[0], stride=w[1], padding=w[2]),
            )


def _split_at_ties(call: Call) -> T:
    x = call.x
    kernel = ints(call.get("kernel_size"), 2)
    stride = ints(call.get("stride") or kernel, 2)
    windows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    return windows.amax((-1, -2))


def _interpolate(call: Call) -> Proposals:
    size, scale = call.get("size"), call.get("scale_factor")
    for mode, corners in (
        ("nearest", None),
        ("bilinear", False),
        ("bilinear", True),
        ("bicubic", False),
    ):
        if (mode, bool(corners)) != (call.get("mode", "nearest"), bool(call.get("align_corners"))):
            yield Change(
                "upsample-corners",
                f"{mode}{' with align_corners' if corners else ''}",
                lambda c, m=mode, a=corners: F.interpolate(c.x, size, scale, m, a),
            )


PROPOSALS: dict[str, Proposer] = {
    **dict.fromkeys(("max_pool2d", "avg_pool2d"), _pool),
    "pad": _pad,
    "interpolate": _interpolate,
}
