"""Batch and group normalisation as MLX's, right on every backend, in half the passes.

Both subtract the mean of a set of elements, divide by the set's deviation, and scale and shift each
channel. They differ in the sets: of batch normalisation a channel in all images, of group
normalisation a group of channels in one. So what either has to know is made of the sums over each
image's pixels, channel by channel, and a rule that pools these (:data:`Pool`).

Autodiff walks the activations for every mean and difference of the formula. Written out (Ioffe and
Szegedy 2015, arXiv 1502.03167, section 3; Wu and He 2018, arXiv 1803.08494) the gradient takes two
sums over the pixels, which are the bias's and the weight's gradients as well, and one more pass. On
an H200 it is 25 kernels otherwise, and on a CPU as many walks through memory.

Under :func:`mlx_impl.precision.autocast` they are what PyTorch's are under ``torch.autocast``.
"""

import math
from collections.abc import Callable
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.convolution import backend
from mlx_impl.layers import once
from mlx_impl.precision import raised

Pool = Callable[[mx.array], mx.array]
"""Sums over an image's pixels (N or 1, 1, C) to means over the norm's sets, told for each channel.

Told so, a mean is its own adjoint: what pools sums forward pools cotangents on the way back.
"""


class BatchNorm(nn.BatchNorm):
    """``nn.BatchNorm`` of (N, ..., C): same arguments and parameters, same results up to rounding.

    Statistics are float32, and the result has the input's type; of bfloat16 MLX's own makes
    bfloat16's mean and variance, and a float32 result. Raises ValueError unless there are 2 to 4
    axes, and where a training batch has one value per channel, of which there is no variance.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if not 2 <= x.ndim <= 4:
            raise ValueError(f"batch normalisation of {x.ndim} axes: it takes 2 to 4, (N, ..., C)")
        n = x.size // x.shape[-1]
        if self.training and n == 1:
            raise ValueError("batch normalisation trains on more than one value per channel")
        if self.track_running_stats and not self.training:
            scale = mx.rsqrt(self.running_var + self.eps)
            weight, bias = _scale_and_shift(self, x.shape[-1])
            y = (raised(x) - self.running_mean) * once(scale * weight) + bias
            return y.astype(x.dtype)

        def pool(sums: mx.array) -> mx.array:
            return sums.sum(axis=0, keepdims=True) / n

        y, mean, variance = _normalized(x, self, pool)
        if self.track_running_stats:
            keep, unbiased = 1 - self.momentum, n / (n - 1)
            self.running_mean = keep * self.running_mean + self.momentum * mean.reshape(-1)
            self.running_var = (
                keep * self.running_var + self.momentum * unbiased * variance.reshape(-1)
            )
        return y


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` with PyTorch's groups, neighbouring channels: (N, ..., dims), same shape.

    Same arguments and parameters but for ``pytorch_compatible``, which is always set: without it a
    group would be every so-many-th channel. Statistics are float32, and the result has the input's
    type, where float32 weights would make all that is behind it float32.

    On Metal it is MLX's own, which brings the pixels of a group together and hands them to a fused
    layer normalisation. On CUDA the copies there and back take half the time, and the fused norm's
    gradient is wrong for some sizes (``docs/upstream.md``); a CPU has no fused norm.
    """

    def __init__(self, num_groups: int, dims: int, eps: float = 1e-5, affine: bool = True):
        super().__init__(num_groups, dims, eps, affine, pytorch_compatible=True)

    def __call__(self, x: mx.array) -> mx.array:
        if backend() == "metal":
            return super().__call__(raised(x)).astype(x.dtype)
        each = self.dims // self.num_groups
        n = math.prod(x.shape[1:-1]) * each

        def pool(sums: mx.array) -> mx.array:
            means = sums.reshape(sums.shape[0], self.num_groups, each).sum(axis=2) / n
            return mx.repeat(means, each, axis=1)[:, None]

        return _normalized(x, self, pool)[0]


def _scale_and_shift(norm: nn.BatchNorm | nn.GroupNorm, channels: int) -> tuple[mx.array, mx.array]:
    if "weight" in norm:
        return norm.weight, norm.bias
    return mx.ones(channels), mx.zeros(channels)


def _normalized(
    x: mx.array, norm: nn.BatchNorm | nn.GroupNorm, pool: Pool
) -> tuple[mx.array, mx.array, mx.array]:
    """(N, ..., C) normalised, in its own type; mean and variance as told by ``pool``, float32."""

    @mx.custom_function
    def function(
        x: mx.array, weight: mx.array, bias: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        mean = once(pool(_over_pixels(x)))
        centred = x - mean
        variance = once(pool(_over_pixels(mx.square(centred))))
        scale = once(mx.rsqrt(variance + norm.eps) * weight)
        return centred * scale + bias, mean, variance

    @function.vjp
    def function_vjp(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, mx.array, mx.array]:
        x, weight, _ = primals
        cotangent, by_mean, by_variance = cotangents  # the last two: in second derivatives
        _, mean, variance = outputs
        scale = mx.rsqrt(variance + norm.eps)
        centred = x - mean
        by_bias = _over_pixels(cotangent)  # (N, 1, C), as the next
        by_weight = _over_pixels(cotangent * centred) * scale
        shift = scale * pool(by_bias * weight) - pool(by_mean)
        slope = scale * scale * pool(by_weight * weight) - 2 * pool(by_variance)
        by_x = cotangent * once(scale * weight) - once(shift) - centred * once(slope)
        return by_x, by_weight.sum(axis=(0, 1)), by_bias.sum(axis=(0, 1))

    rows = raised(x).reshape(x.shape[0], -1, x.shape[-1])
    found = function(rows, *_scale_and_shift(norm, x.shape[-1]))
    y, mean, variance = cast(tuple[mx.array, mx.array, mx.array], found)
    return y.reshape(x.shape).astype(x.dtype), mean, variance


def _over_pixels(x: mx.array) -> mx.array:
    """Sums of (N, pixels, C) over each image: (N, 1, C). A GPU shares N images out, one sum not."""
    return x.sum(axis=1, keepdims=True)
