"""Layers: activations, pooling, convolutions, attention, and how they follow one another."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from torch.nn import functional as F

from mlx_parity.traps.trap import A, Rng, T, Trap, arrays

_VECTORS = arrays(x=(3, 8))

_IMAGE = arrays(x=(2, 3, 7, 6))


class ActivationSlope(Trap):
    """The slope of a leaky ReLU (or another parameter of an activation) differs.

    Both frameworks default to 0.01; GANs use 0.2. Off by 1e-5 it changes the output by 1e-5 of
    itself, which a tolerance of 1e-4 passes; the bias is in the hundreds.
    """

    id = "activation-slope"
    title = "An activation's slope differs"
    fix = "nn.LeakyReLU(0.2): pass the original's negative_slope"
    error = 1.3e-5
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return F.leaky_relu(x, 0.2)

    @staticmethod
    def naive(x: A) -> A:
        return nn.leaky_relu(x, 0.20001)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.leaky_relu(x, 0.2)


class ActivationKind(Trap):
    """Another activation than the original's: SiLU for GELU, ReLU for leaky ReLU, none at all."""

    id = "activation-kind"
    title = "Another activation function"
    fix = "use the original's activation"
    error = 0.19
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return F.gelu(x)

    @staticmethod
    def naive(x: A) -> A:
        return nn.silu(x)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.gelu(x)


class GeluApproximation(Trap):
    """There are three GELUs: exact, by tanh, and by a sigmoid.

    `nn.GELU()` is exact in both frameworks. PyTorch's `approximate="tanh"` is MLX's
    `approx="precise"` or `"tanh"`; MLX's `"fast"` is `x * sigmoid(1.702 x)`, 2e-2 away. The one by
    tanh is 5e-4 away from the exact one and passes a tolerance of 1e-3.
    """

    id = "gelu-approximation"
    title = "Another approximation of GELU"
    rows = ("55",)
    fix = "nn.GELU(approx='none') for PyTorch's default, 'tanh' for approximate='tanh'"
    error = 0.00028
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return F.gelu(x)

    @staticmethod
    def naive(x: A) -> A:
        return nn.gelu_approx(x)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.gelu(x)


class LeakyReluKink(Trap):
    """At exactly 0 the derivative of leaky ReLU is 1 in MLX and the slope in PyTorch.

    MLX computes `maximum(slope * x, x)`, whose gradient at a tie goes to the second. Zero biases
    and a blank image sit on the kink, and drawn inputs never do: it needs a probe of its own.
    """

    id = "leaky-relu-kink"
    title = "The derivative of leaky ReLU at 0"
    rows = ("44",)
    fix = "mx.where(x > 0, x, slope * x)"
    error = 0.86
    gradients = True
    exact = True

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": np.array([0.0, 0.0, -1.0, 2.0])}

    @staticmethod
    def reference(x: T) -> T:
        return F.leaky_relu(x, 0.2)

    @staticmethod
    def naive(x: A) -> A:
        return nn.leaky_relu(x, 0.2)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.where(x > 0, x, 0.2 * x)


class LeakyReluSteep(Trap):
    """With a slope above 1 MLX's leaky ReLU is another function: a maximum of x and slope * x."""

    id = "leaky-relu-steep"
    title = "Leaky ReLU with a slope above 1"
    rows = ("44",)
    fix = "mx.where(x > 0, x, slope * x)"
    error = 0.37
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return F.leaky_relu(x, 1.5)

    @staticmethod
    def naive(x: A) -> A:
        return nn.leaky_relu(x, 1.5)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.where(x > 0, x, 1.5 * x)


class PoolPadding(Trap):
    """MLX's average pooling counts the padding, as PyTorch's does by default.

    `count_include_pad=False` has no counterpart, nor have `ceil_mode`, `dilation`, returned
    indices, and the adaptive pools.
    """

    id = "pool-padding"
    title = "Average pooling that counts the padding"
    rows = ("46",)
    fix = "pool(x) / pool(mx.ones_like(x))"
    error = 0.39
    images = frozenset({"x", "output"})
    shapes = _IMAGE

    @staticmethod
    def reference(x: T) -> T:
        return F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)

    @staticmethod
    def naive(x: A) -> A:
        return nn.AvgPool2d(3, 2, 1)(x)

    @staticmethod
    def fixed(x: A) -> A:
        pool = nn.AvgPool2d(3, 2, 1)
        return pool(x) / pool(mx.ones_like(x))


class PoolWindow(Trap):
    """Another pooling: average for maximum, another window, stride, or a rounded-up size."""

    id = "pool-window"
    title = "Another pooling"
    rows = ("46",)
    fix = "use the original's pooling, kernel_size, stride and padding"
    error = 0.96
    images = frozenset({"x", "output"})
    shapes = _IMAGE

    @staticmethod
    def reference(x: T) -> T:
        return F.max_pool2d(x, 2)

    @staticmethod
    def naive(x: A) -> A:
        return nn.AvgPool2d(2)(x)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.MaxPool2d(2)(x)


class UpsampleSize(Trap):
    """Upsampling agrees where the new size is whole, and samples other places where it is not.

    7 pixels times 1.5 are 10.5. PyTorch makes 10 and, unless `recompute_scale_factor`, keeps
    stepping by 1 / 1.5; MLX rounds the size and steps by another rule. There is no `size=`.
    """

    id = "upsample-size"
    title = "Upsampling to a size that is not whole"
    rows = ("47",)
    fix = "index the source pixels yourself: x[:, mx.floor(mx.arange(10) / 1.5).astype(mx.int32)]"
    error = 0.82
    shapes = arrays(x=(2, 3, 7))

    images = frozenset({"x", "output"})

    @staticmethod
    def reference(x: T) -> T:
        return F.interpolate(x, scale_factor=1.5, mode="nearest")

    @staticmethod
    def naive(x: A) -> A:
        return nn.Upsample(1.5, mode="nearest")(x)

    @staticmethod
    def fixed(x: A) -> A:
        return x[:, mx.floor(mx.arange(10) / 1.5).astype(mx.int32)]


class UpsampleCorners(Trap):
    """`align_corners`, or the mode of an upsampling, is not the original's.

    Off by default in both frameworks. With it the first and last pixels keep their place, and all
    others move.
    """

    id = "upsample-corners"
    title = "Upsampling with other corners or another mode"
    rows = ("47",)
    fix = "nn.Upsample(scale, mode='linear', align_corners=...) as in the original"
    error = 0.29
    images = frozenset({"x", "output"})
    shapes = _IMAGE

    @staticmethod
    def reference(x: T) -> T:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    @staticmethod
    def naive(x: A) -> A:
        return nn.Upsample(2, mode="linear", align_corners=True)(x)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.Upsample(2, mode="linear", align_corners=False)(x)


class PaddingMode(Trap):
    """MLX's convolutions pad with zeros only, and by numbers only.

    No `padding_mode`, no `"same"`. `mx.pad` has `constant`, `edge`, `reflect` and `symmetric`;
    circular padding is a concatenation.
    """

    id = "padding-mode"
    title = "Another padding of a convolution"
    rows = ("48",)
    fix = "pad before: mx.pad(x, widths, mode='reflect'), then a convolution without padding"
    error = 0.47
    images = frozenset({"x", "output"})
    shapes = arrays(x=(2, 3, 7, 6), w=(4, 3, 3, 3))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w)

    @staticmethod
    def naive(x: A, w: A) -> A:
        return mx.conv2d(x, w.transpose(0, 2, 3, 1), padding=1)

    @staticmethod
    def fixed(x: A, w: A) -> A:
        x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
        return mx.conv2d(x, w.transpose(0, 2, 3, 1))


class ConvGeometry(Trap):
    """A convolution's stride, padding, dilation, groups or output padding differ.

    None of them is in the weights. Padding 2 with dilation 2 gives the size of padding 1 with
    dilation 1.
    """

    id = "conv-geometry"
    title = "A convolution's stride, padding or dilation differs"
    fix = "nn.Conv2d(..., stride=, padding=, dilation=, groups=) as in the original"
    error = 1.3
    images = frozenset({"x", "output"})
    shapes = arrays(x=(2, 3, 7, 6), w=(4, 3, 3, 3))

    @staticmethod
    def reference(x: T, w: T) -> T:
        return F.conv2d(x, w, padding=1)

    @staticmethod
    def naive(x: A, w: A) -> A:
        return mx.conv2d(x, w.transpose(0, 2, 3, 1), padding=2, dilation=2)

    @staticmethod
    def fixed(x: A, w: A) -> A:
        return mx.conv2d(x, w.transpose(0, 2, 3, 1), padding=1)


class AttentionScale(Trap):
    """Attention's logits are scaled by another number than the root of a head's width.

    By the root of the whole width, by nothing, twice, or before and after a cast.
    """

    id = "attention-scale"
    title = "The scale of attention's logits"
    fix = "scale = head_dim ** -0.5"
    error = 0.074
    shapes = arrays(q=(2, 2, 3, 4), k=(2, 2, 3, 4), v=(2, 2, 3, 4))

    @staticmethod
    def reference(q: T, k: T, v: T) -> T:
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def naive(q: A, k: A, v: A) -> A:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5)

    @staticmethod
    def fixed(q: A, k: A, v: A) -> A:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=4**-0.5)


class AttentionMask(Trap):
    """A mask that is left out, is not causal, or means the opposite.

    True means "may be seen" in `scaled_dot_product_attention` of both frameworks, and "is hidden"
    in `torch.nn.MultiheadAttention`.
    """

    id = "attention-mask"
    title = "Another attention mask"
    fix = "mask='causal' for is_causal=True; ~mask for torch.nn.MultiheadAttention's attn_mask"
    error = 0.54
    shapes = arrays(q=(2, 2, 3, 4), k=(2, 2, 3, 4), v=(2, 2, 3, 4))

    @staticmethod
    def reference(q: T, k: T, v: T) -> T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @staticmethod
    def naive(q: A, k: A, v: A) -> A:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5)

    @staticmethod
    def fixed(q: A, k: A, v: A) -> A:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask="causal")


class RotaryLayout(Trap):
    """Rotary embeddings turn pairs of neighbours, or pairs half the width apart.

    `nn.RoPE(traditional=True)` pairs neighbours, as in RoFormer; `False`, MLX's default, pairs x[i]
    with x[i + d / 2], as Hugging Face's Llama does. The weights of one give nonsense in the other.
    """

    id = "rotary-layout"
    title = "The pairs of a rotary embedding"
    fix = "nn.RoPE(dims, traditional=True) for neighbours, False for halves"
    error = 0.68
    shapes = arrays(x=(2, 3, 8))

    @staticmethod
    def reference(x: T) -> T:
        angle = torch.arange(3)[:, None] * 10000.0 ** (-torch.arange(4).to(x) / 4)
        a, b, cos, sin = x[..., ::2], x[..., 1::2], angle.cos(), angle.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    @staticmethod
    def naive(x: A) -> A:
        return nn.RoPE(8)(x)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.RoPE(8, traditional=True)(x)


class ResidualDropped(Trap):
    """A residual connection is missing: f(x) for x + f(x)."""

    id = "residual-dropped"
    title = "A residual connection is missing"
    fix = "return x + f(x)"
    error = 0.6
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return x + torch.tanh(x)

    @staticmethod
    def naive(x: A) -> A:
        return mx.tanh(x)

    @staticmethod
    def fixed(x: A) -> A:
        return x + mx.tanh(x)


class LayerSkipped(Trap):
    """A layer is built, given its weights, and not called; or called twice, or out of order.

    Everything is carried and every shape fits, where layers keep their width.
    """

    id = "layer-order"
    title = "A layer is skipped, repeated or swapped"
    fix = "call the layers in the original's order, each once"
    error = 1.9
    shapes = arrays(x=(4, 4), v=(4, 4), w=(4, 4))

    @staticmethod
    def reference(x: T, v: T, w: T) -> T:
        return torch.tanh(x @ v) @ w

    @staticmethod
    def naive(x: A, v: A, w: A) -> A:
        return mx.tanh(x @ w) @ v

    @staticmethod
    def fixed(x: A, v: A, w: A) -> A:
        return mx.tanh(x @ v) @ w


class ModuleSetting(Trap):
    """A number or a flag of a module of one's own differs: a window, a temperature, a depth.

    Both sides keep it under the same name, so the two trees show it; or it is tried out.
    """

    id = "module-setting"
    title = "A setting of a module differs"
    fix = "copy the setting from the original"
    error = 0.081
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return torch.softmax(x / 0.7, -1)

    @staticmethod
    def naive(x: A) -> A:
        return mx.softmax(x / 0.8, axis=-1)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.softmax(x / 0.7, axis=-1)
