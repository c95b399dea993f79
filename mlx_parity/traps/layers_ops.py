"""Layers and operations."""

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


class MaximumTies(Trap):
    """Where the largest value occurs twice, MLX splits the gradient; PyTorch gives it to one.

    Max pooling over a flat region of an image: a quarter each for MLX, all to the first for
    PyTorch. Both are subgradients; the images that a style transfer optimises differ all the same.
    Windows of zeros after a ReLU agree, since there the gradient stops anyway.
    """

    id = "maximum-ties"
    title = "The gradient of a maximum at ties"
    rows = ("45",)
    fix = "pick one: mx.take_along_axis(w, mx.stop_gradient(mx.argmax(w, -1, keepdims=True)), -1)"
    error = 0.77
    gradients = True
    exact = True

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": np.array([[1.0, 1.0, 0.5], [2.0, 2.0, 2.0]])}

    @staticmethod
    def reference(x: T) -> T:
        return F.max_pool1d(x, 3)

    @staticmethod
    def naive(x: A) -> A:
        return x.max(1, keepdims=True)

    @staticmethod
    def fixed(x: A) -> A:
        first = mx.stop_gradient(mx.argmax(x, 1, keepdims=True))
        return mx.take_along_axis(x, first, 1)


class GradientStopped(Trap):
    """The forward pass is right and the gradient does not arrive.

    A `stop_gradient`, a detour through NumPy or through Python numbers, an argmax. Only a backward
    pass shows it.
    """

    id = "gradient-stopped"
    title = "A gradient that stops on its way"
    fix = "remove mx.stop_gradient (or the detour through NumPy) from the port"
    error = 0.5
    gradients = True
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return torch.tanh(x) ** 2

    @staticmethod
    def naive(x: A) -> A:
        return mx.stop_gradient(mx.tanh(x)) * mx.tanh(x)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.tanh(x) ** 2


class GradientFlows(Trap):
    """The original detaches something and the port does not.

    A target network, a stop-gradient in a self-supervised loss, a generated image shown to the
    discriminator.
    """

    id = "gradient-flows"
    title = "A gradient that the original stops"
    fix = "mx.stop_gradient where the original has .detach() or no_grad()"
    error = 1.0
    gradients = True
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return torch.tanh(x).detach() * torch.tanh(x)

    @staticmethod
    def naive(x: A) -> A:
        return mx.tanh(x) ** 2

    @staticmethod
    def fixed(x: A) -> A:
        return mx.stop_gradient(mx.tanh(x)) * mx.tanh(x)


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


class NaiveSummation(Trap):
    """On the CPU MLX sums long reductions one by one, and the error grows with their length.

    The mean of a million numbers between 0 and 1 is off by some 1e-5, PyTorch's by 1e-8. It is
    rounding, no fault of the port, and so shows as noise and not as bias.
    """

    id = "naive-summation"
    shows = "noise"
    title = "Long sums are inexact on the CPU"
    rows = ("52",)
    fix = "sum in two steps: x.reshape(-1, 512).mean(1).mean()"
    error = 7.8e-6

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": rng.uniform(0, 1, 1_000_448)}

    @staticmethod
    def reference(x: T) -> T:
        return x.mean()

    @staticmethod
    def naive(x: A) -> A:
        return x.mean()

    @staticmethod
    def fixed(x: A) -> A:
        return x.reshape(-1, 512).mean(1).mean()


class TypePromotion(Trap):
    """A scalar array of float32 turns a half-precision tensor into float32 in MLX.

    PyTorch does not promote for tensors without axes, and neither framework does for Python's
    floats. One entry of a noise schedule upcasts a whole model from there on: slower, and rounded
    elsewhere than the original.
    """

    id = "type-promotion"
    shows = "noise"
    title = "A scalar array upcasts half precision"
    rows = ("53",)
    fix = "x * scale.astype(x.dtype), or a Python float"
    error = 0.00021
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return (x.half() * torch.tensor(3.0)).to(x.dtype)

    @staticmethod
    def naive(x: A) -> A:
        return x.astype(mx.float16) * mx.array(3.0)

    @staticmethod
    def fixed(x: A) -> A:
        return x.astype(mx.float16) * mx.array(3.0).astype(mx.float16)


class SplitSections(Trap):
    """`mx.split(x, 2)` makes 2 parts; `torch.split(x, 2)` makes parts of 2.

    `torch.chunk` is the one that counts parts, and it allows an uneven last one; MLX raises.
    """

    id = "split-sections"
    title = "split counts parts"
    rows = ("54",)
    fix = "mx.split(x, x.shape[0] // size), or split points: mx.split(x, [size, 2 * size])"
    error = 0.81
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return torch.split(x, 2, dim=1)[0].sum(1)

    @staticmethod
    def naive(x: A) -> A:
        return mx.split(x, 2, axis=1)[0].sum(1)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.split(x, [2, 4, 6], axis=1)[0].sum(1)


class RepeatInterleaves(Trap):
    """`mx.repeat` repeats each element; `torch.Tensor.repeat` repeats the whole.

    `mx.repeat` is `torch.repeat_interleave`, and `mx.tile` is `torch.Tensor.repeat`. Key and value
    heads of grouped attention are interleaved.
    """

    id = "repeat-interleaves"
    title = "repeat interleaves"
    rows = ("54",)
    fix = "mx.tile(x, (1, 2))"
    error = 1.0
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return x.repeat(1, 2)

    @staticmethod
    def naive(x: A) -> A:
        return mx.repeat(x, 2, axis=1)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.tile(x, (1, 2))


class TopkOrder(Trap):
    """`mx.topk` returns the k largest values in no order; PyTorch's are sorted, largest first."""

    id = "topk-order"
    title = "topk is not sorted"
    rows = ("54",)
    fix = "mx.sort(x, axis=1)[:, ::-1][:, :k]"
    error = 0.74
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return x.topk(3, dim=1).values

    @staticmethod
    def naive(x: A) -> A:
        return mx.topk(x, 3, axis=1)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.sort(x, axis=1)[:, ::-1][:, :3]


class SoftmaxAxis(Trap):
    """A softmax over another axis. Rows that should sum to 1 do not."""

    id = "softmax-axis"
    title = "A softmax over the wrong axis"
    fix = "mx.softmax(x, axis=...) over the axis that is the original's in this layout"
    error = 0.47
    shapes = arrays(x=(2, 4, 4))

    @staticmethod
    def reference(x: T) -> T:
        return x.softmax(-1)

    @staticmethod
    def naive(x: A) -> A:
        return mx.softmax(x, axis=1)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.softmax(x, axis=-1)


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


class ConcatenationOrder(Trap):
    """The parts of a concatenation are in another order, or on another axis.

    The skip connection of a U-Net first or last: both have the right shape.
    """

    id = "concatenation-order"
    title = "A concatenation in another order"
    fix = "mx.concatenate in the original's order, channels on the last axis"
    error = 1.5
    shapes = arrays(x=(2, 3), skip=(2, 3))

    @staticmethod
    def reference(x: T, skip: T) -> T:
        return torch.cat([x, skip], 1)

    @staticmethod
    def naive(x: A, skip: A) -> A:
        return mx.concatenate([skip, x], 1)

    @staticmethod
    def fixed(x: A, skip: A) -> A:
        return mx.concatenate([x, skip], 1)


class ScaleFactor(Trap):
    """The result is the original's times a constant.

    An embedding scaled by the root of the width or not, a mean for a sum, a factor of 2.
    """

    id = "scale-factor"
    title = "A constant factor"
    fix = "multiply by the factor that the report names"
    error = 7.0
    shapes = _VECTORS

    @staticmethod
    def reference(x: T) -> T:
        return x.mean(1)

    @staticmethod
    def naive(x: A) -> A:
        return x.sum(1)

    @staticmethod
    def fixed(x: A) -> A:
        return x.mean(1)


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


class RootMissing(Trap):
    """A variance stands where a standard deviation should, or the reverse.

    Schedules are tables of betas, of alphas, of their products and of the roots of these. Noise is
    scaled by the root of 1 - alpha bar.
    """

    id = "root-missing"
    title = "A variance for a standard deviation"
    fix = "mx.sqrt(1 - alphas_cumprod[t]) * noise"
    error = 0.23

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"bar": rng.uniform(0.1, 0.9, 5), "noise": rng.standard_normal(5)}

    @staticmethod
    def reference(bar: T, noise: T) -> T:
        return torch.sqrt(1 - bar) * noise

    @staticmethod
    def naive(bar: A, noise: A) -> A:
        return (1 - bar) * noise

    @staticmethod
    def fixed(bar: A, noise: A) -> A:
        return mx.sqrt(1 - bar) * noise


class HalfPrecisionNumber(Trap):
    """A Python number takes the type of the array beside it, and is rounded to it.

    In bfloat16 0.999 is 1, 0.2 is 0.2002 and an eps of 1e-5 is 0.14 % off. PyTorch keeps the number
    as it is and rounds the result only.
    """

    id = "half-precision-number"
    title = "A Python number is rounded to the array's type"
    fix = "(0.999 * x.astype(mx.float32)).astype(x.dtype)"
    error = 1.0e-3

    @staticmethod
    def reference(x: T) -> T:
        return 0.999 * x.bfloat16().to(x.dtype)

    @staticmethod
    def naive(x: A) -> A:
        return (0.999 * x.astype(mx.bfloat16)).astype(mx.float32)

    @staticmethod
    def fixed(x: A) -> A:
        return 0.999 * x.astype(mx.bfloat16).astype(mx.float32)


class HalfPrecisionTimesteps(Trap):
    """Timesteps, or positions, are cast to bfloat16 before their sines are taken.

    It has 8 bits: of the steps from 512 to 1,000 only every fourth is left, and the angle of the
    fastest wave is off by up to 2 and more. The result may be bfloat16, which its size bears.
    """

    id = "half-precision-timesteps"
    title = "Timesteps in bfloat16 before sin and cos"
    fix = "compute the angles in float32: mx.sin(t.astype(mx.float32) * frequencies)"
    error = 1.15

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"t": rng.integers(512, 1000, 9), "frequencies": rng.uniform(0.01, 1, 5)}

    @staticmethod
    def reference(t: T, frequencies: T) -> T:
        return torch.sin(t[:, None] * frequencies)

    @staticmethod
    def naive(t: A, frequencies: A) -> A:
        half = t.astype(mx.bfloat16)[:, None] * frequencies.astype(mx.bfloat16)
        return mx.sin(half).astype(mx.float32)

    @staticmethod
    def fixed(t: A, frequencies: A) -> A:
        return mx.sin(t.astype(mx.float32)[:, None] * frequencies)
