"""Layers that compute what MLX's do and lay their results out for speed."""

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.convolution import conv2d, conv_transpose2d


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
        if x.ndim != 2 or mx.default_device().type != mx.DeviceType.cpu:
            return super().__call__(x)
        if "bias" in self:
            return mx.addmm(self.bias[:, None], self.weight, x.T).T
        return (self.weight @ x.T).T


def leaky_relu(x: mx.array, negative_slope: float = 0.01) -> mx.array:
    """``x`` where positive, else ``negative_slope * x``; any shape, any slope.

    PyTorch's function, at the kink too: the derivative at exactly 0 is ``negative_slope``.
    ``nn.leaky_relu`` is a maximum of the two, whose derivative at 0 is 1, and which is another
    function altogether for slopes above 1. Zero biases and a blank image sit on the kink.
    """
    return mx.where(x > 0, x, negative_slope * x)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` with gradients on fast routes: (N, H, W, in) to (N, H', W', out).

    Same arguments and parameters, same results; see :mod:`mlx_impl.convolution`.
    """

    def __call__(self, x: mx.array) -> mx.array:
        y = conv2d(x, self.weight, self.stride, self.padding, self.dilation, self.groups)
        return y + self.bias if "bias" in self else y


class ConvTranspose2d(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with gradients on fast routes: (N, H, W, in) to (N, H', W', out).

    Same arguments and parameters, same results; see :mod:`mlx_impl.convolution`.
    """

    def __call__(self, x: mx.array) -> mx.array:
        y = conv_transpose2d(
            x, self.weight, self.stride, self.padding, self.dilation, self.output_padding
        )
        return y + self.bias if "bias" in self else y
