"""Layers that compute what MLX's do, at more speed, and in half precision where that is in force.

Under :func:`mlx_impl.precision.autocast` they are what PyTorch's are under ``torch.autocast``.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.convolution import conv2d, conv_transpose2d
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


def leaky_relu(x: mx.array, negative_slope: float = 0.01) -> mx.array:
    """``x`` where positive, else ``negative_slope * x``; any shape, any slope.

    PyTorch's function, at the kink too: the derivative at exactly 0 is ``negative_slope``.
    ``nn.leaky_relu`` is a maximum of the two, whose derivative at 0 is 1, and which is another
    function altogether for slopes above 1. Zero biases and a blank image sit on the kink.
    """
    # A Python number takes the array's type, and 0.2 in bfloat16 is 0.2002.
    return mx.where(x > 0, x, (negative_slope * raised(x)).astype(x.dtype))


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


class BatchNorm(nn.BatchNorm):
    """``nn.BatchNorm`` of (N, ..., C), whose statistics of half precision are float32.

    Of bfloat16 MLX's own makes bfloat16's mean and variance, and a float32 result.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(raised(x)).astype(x.dtype)


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` of (N, ..., C), whose result has its input's type.

    Its statistics are float32 anyway where ``pytorch_compatible``, but the weights, being float32,
    would make everything behind it float32.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(raised(x)).astype(x.dtype)
