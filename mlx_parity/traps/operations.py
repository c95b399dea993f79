"""Operations on arrays, the gradients through them, and number types."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import torch
from torch.nn import functional as F

from mlx_parity.traps.trap import A, Rng, T, Trap, arrays

_VECTORS = arrays(x=(3, 8))


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
