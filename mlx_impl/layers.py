"""Layers that compute what MLX's do, faster, and right where MLX's are not.

Under :func:`mlx_impl.precision.autocast` they are what PyTorch's are under ``torch.autocast``.
"""

import math
import platform
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.convolution import backend, conv2d, conv_transpose2d
from mlx_impl.precision import lowered, raised, single_on_cpu


class Linear(nn.Linear):
    """``nn.Linear``, faster to train with on the CPU: (..., in) to (..., out), same parameters.

    ``x @ weight.T`` makes the gradient of the weight come out as a transposed view of ``x.T @ dy``.
    Adam's kernel must then walk each gradient, moment and weight with strides, which costs three
    times what reading them in order does. Multiplied as ``weight @ x.T`` instead, the gradient is
    ``dy.T @ x``, in the weight's own order, and the forward product reads the weight in order too.
    The result is a transposed view, (out, batch) in memory, which is the order the next layer's
    product wants. A GPU does not mind strides, so there, and for other ranks, MLX's own form runs.
    """

    def __call__(self, x: mx.array) -> mx.array:
        bias = (self.bias,) if "bias" in self else ()
        product = _product_by_weight if x.ndim == 2 and _on_cpu() else _product_by_input
        return single_on_cpu(product, *lowered(x, self.weight, *bias))


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _product_by_input(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """MLX's own."""
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def _product_by_weight(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    y = weight @ x.T if bias is None else mx.addmm(bias[:, None], weight, x.T)
    return y.T


def once(x: mx.array) -> mx.array:
    """``x``, computed by itself on a CPU.

    Under ``mx.compile`` all that is element-wise becomes one kernel, which on a CPU has two prices.
    What is small and spread over something large is computed again for each element of it: a
    reciprocal root for each pixel instead of each channel. And one operation that the compiler
    cannot take eight at a time, a root or a choice behind something spread, keeps it from taking
    any so. A GPU has the time while it waits for memory, and would wait for one more kernel.
    """
    return mx.contiguous(x, allow_col_major=True) if _on_cpu() else x


def relu(x: mx.array) -> mx.array:
    """``nn.relu``, on a CPU a kernel of its own: fused with the bias before it, it jumps."""
    return nn.relu(once(x))


def leaky_relu(x: mx.array, negative_slope: float = 0.01) -> mx.array:
    """``x`` where positive, else ``negative_slope * x``; any shape, any slope.

    PyTorch's function, at the kink too: the derivative at exactly 0 is ``negative_slope``.
    ``nn.leaky_relu`` is a maximum of the two, whose derivative at 0 is 1, and which is another
    function altogether for slopes above 1. Zero biases and a blank image sit on the kink.
    """
    if x.dtype == mx.float32 and 0 < negative_slope <= 1:
        return cast(mx.array, _leaky_relu(negative_slope)(x))
    # A Python number takes the array's type, and 0.2 in bfloat16 is 0.2002.
    return mx.where(x > 0, x, (negative_slope * raised(x)).astype(x.dtype))


@lru_cache
def _leaky_relu(slope: float) -> Callable[[mx.array], object]:
    """For slopes in (0, 1], without a choice: ``mx.where`` takes a CPU 5 ns for each element."""

    @mx.custom_function
    def function(x: mx.array) -> mx.array:
        return mx.maximum(x, slope * x)

    @function.vjp
    def function_vjp(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        return cotangent * mx.maximum(slope, (x > 0).astype(x.dtype))

    return function


# MLX's wheel for Linux on x86-64 is built without fused multiplication and addition, so that its
# exponential calls a function for each of the eight it takes: 14 ns a number. libm's power has one
# tuned for each processor: 3 ns, and nearly as accurate.
_SLOW_EXPONENTIAL = sys.platform == "linux" and platform.machine() == "x86_64"


@mx.custom_function
def _sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + mx.power(2.0, x * (-1 / math.log(2))))


@_sigmoid.vjp
def _sigmoid_vjp(_primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output * (1 - output)  # autodiff's is infinity times 0 below -88


def silu(x: mx.array) -> mx.array:
    """``nn.silu``, ``x * sigmoid(x)``, three times as fast on an x86-64 CPU; any shape."""
    if not (_SLOW_EXPONENTIAL and backend() == "cpu" and x.dtype == mx.float32):
        return nn.silu(x)
    return x * cast(mx.array, _sigmoid(x))


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` with gradients on fast routes: (N, H, W, in) to (N, H', W', out).

    Same arguments and parameters, same results; see :mod:`mlx_impl.convolution`.
    """

    def __call__(self, x: mx.array) -> mx.array:
        x, weight = lowered(x, self.weight)
        y = conv2d(x, weight, self.stride, self.padding, self.dilation, self.groups)
        return _biased(y, self)


class ConvTranspose2d(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with gradients on fast routes: (N, H, W, in) to (N, H', W', out).

    Same arguments and parameters, same results; see :mod:`mlx_impl.convolution`.
    """

    def __call__(self, x: mx.array) -> mx.array:
        x, weight = lowered(x, self.weight)
        y = conv_transpose2d(
            x, weight, self.stride, self.padding, self.dilation, self.output_padding
        )
        return _biased(y, self)


def _biased(y: mx.array, layer: nn.Module) -> mx.array:
    return y + lowered(layer.bias)[0] if "bias" in layer else y
