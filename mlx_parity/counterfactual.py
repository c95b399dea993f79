"""What the original would have to be for the port to be right: known alternatives, tried out.

A port that differs computes something else, and what people write by mistake is a short list. Each
alternative changes one thing about the *reference*: an argument of one call (found by tracing the
module's calls of torch), a child that is skipped, an attribute, a factor. It is computed in float64
at nearby points, and the port's outputs are held against it by the test of equality. The
alternative under which the bias returns to 1 is what the port computes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn as tnn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

T = torch.Tensor

# ------------------------------------------------------------------------- calls and their changes

_PARAMETERS: dict[str, tuple[str, ...]] = {
    "gelu": ("input", "approximate"),
    "linear": ("input", "weight", "bias"),
    "avg_pool2d": (
        *("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
        "divisor_override",
    ),
    "softplus": ("input", "beta", "threshold"),
    "scaled_dot_product_attention": (
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"),
    ),
    "cat": ("tensors", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "split": ("tensor", "split_size_or_sections", "dim"),
    "max_pool2d": (
        *("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
        "return_indices",
    ),
    **{
        f"conv{n}d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        for n in (1, 2, 3)
    },
    **{
        f"conv_transpose{n}d": (
            *("input", "weight", "bias", "stride", "padding", "output_padding", "groups"),
            "dilation",
        )
        for n in (1, 2, 3)
    },
    **dict.fromkeys(("softmax", "log_softmax"), ("input", "dim", "dtype")),
}
"""Names of the arguments of functions that are built in and have no signature."""


@dataclass(frozen=True)
class Call:
    """One call of a torch function."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return getattr(self.func, "__name__", "")

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def _names(self) -> tuple[str, ...]:
        if self.name in _PARAMETERS and not inspect.isfunction(self.func):
            return _PARAMETERS[self.name]
        try:
            return tuple(inspect.signature(self.func).parameters)
        except (TypeError, ValueError):
            return _PARAMETERS.get(self.name, ())

    def get(self, name: str, default: Any = None) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        names = self._names()
        if name in names and names.index(name) < len(self.args):
            return self.args[names.index(name)]
        return default

    def run(self, **changed: Any) -> Any:
        """Call the function with some arguments changed."""
        args, kwargs = list(self.args), dict(self.kwargs)
        names = self._names()
        for name, value in changed.items():
            if name in names and names.index(name) < len(args):
                args[names.index(name)] = value
            else:
                kwargs[name] = value
        return self.func(*args, **kwargs)


@dataclass(frozen=True)
class Change:
    """One call done otherwise."""

    trap_id: str
    what: str
    run: Callable[..., Any]
    fit: tuple[float, bool] | None = None
    """Where ``run`` takes a number as well: its value in the reference, and whether to search in
    its logarithm."""


Proposals = Iterator[Change]

_ACTIVATIONS: dict[str, Callable[[T], T]] = {
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
    for kind, function in _ACTIVATIONS.items():
        if kind != name and not (name == "gelu" and " " in kind):  # those have a trap of their own
            yield Change(
                "activation-kind",
                f"{kind} for {name}",
                lambda c, f=function: f(c.x),
            )
    yield Change("activation-kind", f"no {name}", lambda c: c.x * 1)


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


def _softmax(call: Call) -> Proposals:
    x = call.x
    dim = call.get("dim", -1)
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


def _regrouped(call: Call, heads: int) -> T:
    """Attention of (B, H, L, D) tensors with the same channels cut into ``heads`` heads."""

    def cut(a: T, n: int) -> T:
        b, _, length, _ = a.shape
        return a.transpose(1, 2).reshape(b, length, n, -1).transpose(1, 2)

    q, k, v = (cut(a, heads) for a in call.args[:3])
    rest = {k: w for k, w in call.kwargs.items() if k != "scale"}
    out = F.scaled_dot_product_attention(q, k, v, *call.args[3:], **rest)
    return cut(out, call.args[0].shape[1])


def _mha(call: Call) -> Proposals:
    width, heads = call.args[3], call.args[4]

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
            lambda c: c.func(*c.args, **{**c.kwargs, "attn_mask": None, "is_causal": False}),
        )


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
    yield Change(
        "conv-kernel-layout",
        "the kernel flipped",
        lambda c: c.run(weight=c.get("weight").flip(*range(2, axes))),
    )
    stride, padding, dilation = (
        _ints(call.get(n, d), axes - 2) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    for p, d, s in itertools.product(range(4), range(1, 4), range(1, 4)):
        new = tuple((v,) * (axes - 2) for v in (s, p, d))
        if new != (stride, padding, dilation):
            yield Change(
                "conv-geometry",
                f"stride {s}, padding {p}, dilation {d}",
                lambda c, n=new: c.run(stride=n[0], padding=n[1], dilation=n[2]),
            )
    if not transposed and any(padding):
        widths = [p for q in reversed(padding) for p in (q, q)]
        for mode in ("reflect", "replicate", "circular"):
            yield Change(
                "padding-mode",
                f"{mode} padding for zeros",
                lambda c, m=mode: c.run(input=F.pad(c.x, widths, mode=m), padding=0),
            )


def _ints(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _pad(call: Call) -> Proposals:
    for mode in ("constant", "reflect", "replicate", "circular"):
        if mode != call.get("mode", "constant"):
            yield Change(
                "padding-mode",
                f"{mode} padding for {call.get('mode', 'constant')}",
                lambda c, m=mode: c.run(mode=m, value=None),
            )


def _pool(call: Call) -> Proposals:
    kernel = _ints(call.get("kernel_size"), 2)
    stride = _ints(call.get("stride") or kernel, 2)
    padding = _ints(call.get("padding", 0), 2)
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
    kernel = _ints(call.get("kernel_size"), 2)
    stride = _ints(call.get("stride") or kernel, 2)
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


def _embedding(call: Call) -> Proposals:
    for shift in (-1, 1):
        yield Change(
            "index-out-of-bounds",
            f"indices off by {shift:+d}",
            lambda c, s=shift: c.func(
                (c.args[0] + s).clamp(0, c.args[1].shape[0] - 1), *c.args[1:], **c.kwargs
            ),
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


def _dropout(call: Call) -> Proposals:
    training = bool(call.get("training", True))
    if not training:
        return
    yield Change("training-mode", "no dropout", lambda c: c.run(training=False))


_DISTANCES: dict[str, Callable[..., T]] = {
    "mse_loss": F.mse_loss,
    "l1_loss": F.l1_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
}


def _loss(call: Call) -> Proposals:
    name, reduction = call.name, call.get("reduction", "mean")
    for other in ("sum", "mean", "none"):
        if other != reduction:
            yield Change(
                "kl-divergence" if name == "kl_div" else "loss-reduction",
                f"reduction {other!r} for {reduction!r}",
                lambda c, r=other: c.run(reduction=r),
            )
    if name == "cross_entropy":
        weight = call.get("weight")
        if weight is not None:
            yield Change("cross-entropy-weights", "no weights", lambda c: c.run(weight=None))
            yield Change(
                "cross-entropy-weights",
                "a mean that is not divided by the weights",
                lambda c: c.run(reduction="none").mean(),
            )
        if call.x.ndim > 2:
            yield Change(
                "cross-entropy-axis",
                "the classes on the last axis",
                lambda c: c.run(input=c.x.transpose(1, -1)),
            )
        yield Change(
            "cross-entropy-ignore-index",
            "ignored labels looked up",
            lambda c: c.run(target=c.get("target").clamp(0, c.x.shape[1] - 1)),
        )
        yield Change(
            "loss-kind",
            "label smoothing {:.4g}",
            lambda c, e: c.run(label_smoothing=min(max(e, 0.0), 1.0)),
            fit=(call.get("label_smoothing", 0.0) or 0.01, False),
        )
    if name == "binary_cross_entropy":
        yield Change(
            "bce-with-logits",
            "probabilities read as logits",
            lambda c: F.binary_cross_entropy_with_logits(c.x, c.get("target")),
        )
    if name == "binary_cross_entropy_with_logits":
        yield Change(
            "bce-with-logits",
            "a sigmoid before a loss that takes logits",
            lambda c: c.run(input=torch.sigmoid(c.x)),
        )
        yield Change(
            "bce-with-logits",
            "logits read as probabilities",
            lambda c: F.binary_cross_entropy(c.x.clamp(1e-12, 1 - 1e-7), c.get("target")),
        )
    if name == "kl_div":
        log = {"log_target": not call.get("log_target", False)}
        mean = {"reduction": "mean" if reduction == "batchmean" else "batchmean"}
        for said, change in (
            (f"the reduction {mean['reduction']!r}", mean),
            ("targets read as logarithms, or the reverse", log),
            (f"both that and the reduction {mean['reduction']!r}", mean | log),
        ):
            yield Change("kl-divergence", said, lambda c, k=change: c.run(**k))
    if name in ("cosine_embedding_loss", "cosine_similarity"):
        yield Change("cosine-similarity-loss", "1 less the result", lambda c: 1 - c.run())
    if name in _DISTANCES:
        for kind, function in _DISTANCES.items():
            if kind != name:
                yield Change(
                    "loss-kind",
                    f"{kind} for {name}",
                    lambda c, f=function: f(c.x, c.get("target"), reduction=reduction),
                )
    for key in ("beta", "delta"):
        if name == {"beta": "smooth_l1_loss", "delta": "huber_loss"}[key]:
            yield Change(
                "loss-kind",
                f"{key} {{:.6g}} for {call.get(key, 1.0):g}",
                lambda c, b, k=key: c.run(**{k: b}),
                fit=(call.get(key, 1.0), False),
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


_PROPOSALS: dict[str, Callable[[Call], Proposals]] = {
    **dict.fromkeys(
        (
            *("cross_entropy", "nll_loss", "binary_cross_entropy", "kl_div", *_DISTANCES),
            *("binary_cross_entropy_with_logits", "cosine_embedding_loss", "cosine_similarity"),
        ),
        _loss,
    ),
    **dict.fromkeys(("sqrt", "rsqrt"), _sqrt),
    **dict.fromkeys(_ACTIVATIONS, _activation),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"), _norm),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **{f"conv{t}{n}d": _conv for t in ("", "_transpose") for n in (1, 2, 3)},
    **dict.fromkeys(("max_pool2d", "avg_pool2d"), _pool),
    **dict.fromkeys(("add", "add_"), _add),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _mul),
    **dict.fromkeys(("chunk", "split", "unbind"), _chunk),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("mean", "sum"), _reduction),
    **dict.fromkeys(("var", "std"), _variance),
    **dict.fromkeys(("flatten", "reshape", "view", "unflatten"), _flatten),
    "scaled_dot_product_attention": _sdpa,
    "multi_head_attention_forward": _mha,
    "linear": _linear,
    "pad": _pad,
    "interpolate": _interpolate,
    "cat": _cat,
    "concat": _cat,
    "embedding": _embedding,
    "__getitem__": _getitem,
    "dropout": _dropout,
}

_STOPS = (
    *_ACTIVATIONS,
    *("linear", "matmul", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"),
    *("softmax", "scaled_dot_product_attention", "conv1d", "conv2d", "embedding", "cat"),
    *("conv_transpose2d", "max_pool2d", "avg_pool2d", "lstm", "gru", "mean", "flatten", "reshape"),
)


def _detached(value: Any) -> Any:
    if isinstance(value, T):
        return value.detach()
    return type(value)(_detached(v) for v in value) if isinstance(value, tuple | list) else value


def _backward(call: Call) -> Proposals:
    """Changes that the forward pass cannot show."""
    if call.name == "detach":
        yield Change("gradient-flows", "the gradient is not stopped", lambda c: c.args[0])
    if call.name in _STOPS:
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


# ------------------------------------------------------------------------------------ alternatives


@dataclass(frozen=True)
class Alternative:
    """A changed reference: ``within()`` is entered around its call."""

    trap_id: str
    what: str
    within: Callable[[tnn.Module], contextlib.AbstractContextManager[Any]]
    fit: tuple[float, bool] | None = None
    at: Callable[[float], Alternative] | None = None
    """Where ``fit`` is given: the alternative with a number put in."""


_TRACED = frozenset((*_PROPOSALS, *_STOPS, "detach", "matmul", "sub"))
"""The functions whose calls are numbered."""


class _Trace(TorchFunctionMode):
    """Records the numbered calls, and what might be changed about each."""

    def __init__(self, backward: bool):
        super().__init__()
        self.backward = backward
        self.calls: list[tuple[str, list[Change]]] = []
        self.recorded: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {})
        if call.name in _TRACED:
            changes: list[Change] = []
            with contextlib.suppress(RuntimeError, IndexError, TypeError, ValueError):
                if call.name in _PROPOSALS:
                    changes += _PROPOSALS[call.name](call)
                if self.backward:
                    changes += _backward(call)
            self.calls.append((call.name, changes))
            self.recorded.append(call)
        return func(*args, **(kwargs or {}))


class _Changed(TorchFunctionMode):
    """Does some of the calls otherwise: ``changes`` by the call's number among those traced."""

    def __init__(self, changes: dict[int, Callable[[Call], Any]]):
        super().__init__()
        self.changes, self.at = changes, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {})
        if call.name not in _TRACED:
            return func(*args, **(kwargs or {}))
        change = self.changes.get(self.at)
        self.at += 1
        return func(*args, **(kwargs or {})) if change is None else change(call)


def _of_calls(calls: Sequence[tuple[str, list[Change]]]) -> Iterator[Alternative]:
    """Each change at each call, and each at all calls of a function at once."""

    def made(change: Change, at: tuple[int, ...], where: str) -> Alternative:
        def alternative(number: float | None) -> Alternative:
            run = change.run if number is None else (lambda c: change.run(c, number))
            what = change.what if number is None else change.what.format(number)
            return Alternative(
                change.trap_id,
                f"{what}{where}",
                lambda module: _Changed(dict.fromkeys(at, run)),
            )

        if change.fit is None:
            return alternative(None)
        return Alternative(
            change.trap_id, change.what, alternative(1.0).within, change.fit, alternative
        )

    groups: dict[tuple[str, str, str], list[tuple[int, Change]]] = {}
    for i, (name, changes) in enumerate(calls):
        for change in changes:
            groups.setdefault((name, change.trap_id, change.what), []).append((i, change))
    several = {name: sum(n == name for n, _ in calls) for name, _ in calls}
    for (name, _, _), members in groups.items():
        if len(members) > 1:
            change = members[0][1]
            yield made(change, tuple(i for i, _ in members), f", in every {name}")
    for (name, _, _), members in groups.items():
        for n, (i, change) in enumerate(members):
            where = f", in the {_ordinal(n + 1)} {name}" if several[name] > 1 else ""
            yield made(change, (i,), where)


_NORM_NAMES = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")


def _of_neighbours(trace: _Trace) -> Iterator[Alternative]:
    """A normalisation and the activation after it, exchanged."""
    for i, ((first, _), (second, _)) in enumerate(itertools.pairwise(trace.calls)):
        if first not in _NORM_NAMES or second not in _ACTIVATIONS:
            continue

        def within(
            module: tnn.Module, i: int = i, activation: Call = trace.recorded[i + 1]
        ) -> _Changed:
            seen: list[Call] = []

            def early(c: Call) -> Any:
                seen[:] = [c]
                return activation.func(c.x, *activation.args[1:], **activation.kwargs)

            def late(c: Call) -> Any:
                norm = seen[0]
                return norm.func(c.x, *norm.args[1:], **norm.kwargs)

            return _Changed({i: early, i + 1: late})

        yield Alternative("layer-order", f"{second} before {first}", within)


def _of_parameters(module: tnn.Module) -> Iterator[Alternative]:
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


def _ordinal(n: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(n, f"{n}th")


@contextlib.contextmanager
def _forward(module: tnn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


_MANY_CHILDREN = 24


def _of_children(module: tnn.Module) -> Iterator[Alternative]:
    """Layers skipped, doubled, and swapped with their like."""
    names = [n for n, m in module.named_modules() if n and not isinstance(m, tnn.ModuleList)]
    if len(names) > _MANY_CHILDREN:
        names = [n for n in names if n.count(".") < 2][:_MANY_CHILDREN]

    def skipped(name: str) -> Alternative:
        def within(m: tnn.Module) -> Any:
            return _forward(m.get_submodule(name), lambda x, *_, **__: x)

        return Alternative("layer-order", f"{name} is skipped", within)

    def doubled(name: str) -> Alternative:
        def within(m: tnn.Module) -> Any:
            child = m.get_submodule(name)
            once = child.forward
            return _forward(child, lambda x, *a, **k: once(once(x, *a, **k), *a, **k))

        return Alternative("layer-order", f"{name} is called twice", within)

    def swapped(a: str, b: str) -> Alternative:
        @contextlib.contextmanager
        def within(m: tnn.Module) -> Iterator[None]:
            one, two = m.get_submodule(a), m.get_submodule(b)
            with _forward(one, two.forward), _forward(two, one.__class__.forward.__get__(one)):
                yield

        return Alternative("layer-order", f"{a} and {b} are swapped", within)

    def replaced(a: str, b: str) -> Alternative:
        def within(m: tnn.Module) -> Any:
            return _forward(m.get_submodule(b), m.get_submodule(a).forward)

        return Alternative("layer-order", f"{a} is called in the place of {b}", within)

    def alike(a: str, b: str) -> bool:
        one, two = module.get_submodule(a), module.get_submodule(b)
        shapes = [[p.shape for p in m.parameters()] for m in (one, two)]
        return type(one) is type(two) and bool(shapes[0]) and shapes[0] == shapes[1]

    for name in names:
        yield skipped(name)
    for a, b in itertools.combinations(names, 2):
        if not b.startswith(f"{a}.") and alike(a, b):
            yield swapped(a, b)
    for name in names:
        yield doubled(name)
    for a, b in itertools.permutations(names, 2):
        if not a.startswith(f"{b}.") and not b.startswith(f"{a}.") and alike(a, b):
            yield replaced(a, b)


_HEADS = ("head", "group")


def _of_settings(module: tnn.Module) -> Iterator[Alternative]:
    """Numbers and flags that the module and its children keep as attributes."""

    def set_to(path: str, key: str, value: Any) -> Callable[[tnn.Module], Any]:
        @contextlib.contextmanager
        def within(m: tnn.Module) -> Iterator[None]:
            owner = m.get_submodule(path)
            before = getattr(owner, key)
            setattr(owner, key, value)
            try:
                yield
            finally:
                setattr(owner, key, before)

        return within

    for path, owner in module.named_modules():
        if type(owner).__module__.startswith("torch.") or path.count(".") > 1:
            continue
        for key, value in vars(owner).items():
            if key.startswith("_") or key in ("training", "call_super_init"):
                continue
            name = ".".join(p for p in (path, key) if p)
            if isinstance(value, bool):
                yield Alternative(
                    "module-setting", f"{name} {not value}", set_to(path, key, not value)
                )
            elif isinstance(value, int):
                near = {value - 1, value + 1, 2 * value, value // 2}
                trap = "head-count" if any(h in key for h in _HEADS) else "module-setting"
                for other in sorted(n for n in near if n > 0 and n != value):
                    yield Alternative(trap, f"{name} {other} for {value}", set_to(path, key, other))
            elif isinstance(value, float):

                def at(
                    number: float, path: str = path, key: str = key, value: float = value
                ) -> Alternative:
                    trap = "attention-scale" if "scale" in key else "module-setting"
                    return Alternative(
                        trap,
                        f"{'.'.join(p for p in (path, key) if p)} {number:.6g} for {value:.6g}",
                        set_to(path, key, number),
                    )

                yield Alternative(
                    "module-setting", name, set_to(path, key, value), (value, False), at
                )


def _of_mode(module: tnn.Module) -> Iterator[Alternative]:
    @contextlib.contextmanager
    def within(m: tnn.Module) -> Iterator[None]:
        before = {s: s.training for s in m.modules()}
        m.train(not m.training)
        try:
            yield
        finally:
            for s, training in before.items():
                s.training = training

    yield Alternative(
        "training-mode", f"{'evaluation' if module.training else 'training'} mode", within
    )


def _halves(x: T) -> T:
    """(x0, x2, ..., x1, x3, ...): neighbours become halves."""
    return torch.cat([x[..., ::2], x[..., 1::2]], -1)


def _neighbours(x: T) -> T:
    a, b = x.chunk(2, -1)
    return torch.stack([a, b], -1).flatten(-2)


def _of_whole(module: tnn.Module) -> Iterator[Alternative]:
    """The module as a whole: a factor, rotary pairs, swapped image axes."""

    def wrapped(change: Callable[..., Any]) -> Callable[[tnn.Module], Any]:
        def within(m: tnn.Module) -> Any:
            once = m.forward
            return _forward(m, lambda x, *a, **k: change(lambda y: once(y, *a, **k), x))

        return within

    for what, into, back in (
        ("pairs half the width apart", _neighbours, _halves),
        ("pairs of neighbours", _halves, _neighbours),
    ):
        yield Alternative(
            "rotary-layout",
            what,
            wrapped(lambda f, x, i=into, b=back: b(f(i(x)))),
        )

    for kind in ("sigmoid", "tanh", "relu"):
        yield Alternative(
            "activation-kind",
            f"a {kind} of the output",
            wrapped(lambda f, x, k=kind: _through(f(x), _ACTIVATIONS[k])),
        )
    yield Alternative(
        "activation-kind",
        "a softmax of the output",
        wrapped(lambda f, x: _through(f(x), lambda y: y.softmax(-1))),
    )

    def factor(number: float) -> Alternative:
        return Alternative(
            "scale-factor",
            f"the output times {number:.6g}",
            wrapped(lambda f, x: _scaled(f(x), number)),
        )

    yield Alternative("scale-factor", "", factor(1.0).within, (1.0, False), factor)

    def of_input(number: float) -> Alternative:
        return Alternative(
            "scale-factor",
            f"the input times {number:.6g}",
            wrapped(lambda f, x: f(_floating_times(x, number))),
        )

    yield Alternative("scale-factor", "", of_input(1.0).within, (1.0, False), of_input)


def _floating_times(x: Any, number: float) -> Any:
    return x * number if isinstance(x, T) and x.is_floating_point() else x


def _scaled(value: Any, number: float) -> Any:
    return _through(value, lambda y: y * number)


def _through(value: Any, function: Callable[[T], T]) -> Any:
    if isinstance(value, T):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_through(v, function) for v in value)
    if isinstance(value, dict):
        return {k: _through(v, function) for k, v in value.items()}
    return value


def alternatives(
    module: tnn.Module, call: Callable[[tnn.Module], Any], backward: bool = False
) -> list[Alternative]:
    """Every alternative for ``module``, likely ones first; ``call(module)`` calls it once."""
    with _Trace(backward) as trace:
        call(copy.deepcopy(module))
    found = list(_of_calls(trace.calls))
    if backward:
        found += _of_parameters(module)
    found += _of_neighbours(trace)
    found += _of_children(module)
    found += _of_settings(module)
    found += _of_mode(module)
    found += _of_whole(module)
    return sorted(found, key=lambda a: a.fit is not None)  # a number found explains the least
