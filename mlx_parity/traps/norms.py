"""Normalisations and the statistics they are made of."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import torch
from torch.nn import functional as F

from mlx_parity.traps.trap import A, Rng, T, Trap, arrays

_FEATURES = arrays(x=(5, 6))

_IMAGE = arrays(x=(2, 6, 4, 5))


class NormGroups(Trap):
    """MLX's GroupNorm puts every n-th channel in a group; PyTorch's groups are neighbours.

    Unless `pytorch_compatible=True`. With one group, or as many groups as channels, the two are
    the same, so a test with such a model passes. In between every channel is normalised by
    the statistics of another group.
    """

    id = "norm-groups"
    title = "GroupNorm's groups are strided channels"
    rows = ("5",)
    fix = "nn.GroupNorm(groups, channels, pytorch_compatible=True)"
    error = 0.17
    images = frozenset({"x", "output"})
    shapes = _IMAGE

    @staticmethod
    def reference(x: T) -> T:
        return F.group_norm(x, 3)

    @staticmethod
    def naive(x: A) -> A:
        return nn.GroupNorm(3, 6, affine=False)(x)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.GroupNorm(3, 6, affine=False, pytorch_compatible=True)(x)


class NormEps(Trap):
    """The small number under a normalisation's root is another one.

    Defaults differ from library to library and from model to model: BatchNorm 1e-5 in both
    frameworks and 1e-3 in TensorFlow's checkpoints, vision transformers 1e-6. On activations of
    size 1 a wrong eps moves the output by about half of the difference, here 1e-5 of it: less than
    most tolerances, and it grows where the variance is small.
    """

    id = "norm-eps"
    title = "A normalisation's eps differs"
    fix = "pass the original's eps: nn.LayerNorm(dims, eps=1e-6); or put it where the original does"
    error = 1.7e-5
    shapes = _FEATURES

    @staticmethod
    def reference(x: T) -> T:
        return F.layer_norm(x, (6,), eps=1e-6)

    @staticmethod
    def naive(x: A) -> A:
        return nn.LayerNorm(6, affine=False)(x)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.LayerNorm(6, eps=1e-6, affine=False)(x)


class NormMomentum(Trap):
    """Running statistics move at another rate.

    Both frameworks call the weight of the new batch `momentum`, 0.1 by default. TensorFlow, and
    papers, mean the weight of the old value: 0.9 there is 0.1 here. Outputs in training mode do
    not show it; evaluation after training does.
    """

    id = "norm-momentum"
    title = "A normalisation's momentum differs"
    fix = "pass the original's momentum to the MLX layer: nn.BatchNorm(channels, momentum=0.1)"
    error = 8.0
    shapes = _FEATURES

    @staticmethod
    def reference(x: T) -> T:
        mean = torch.zeros(6, dtype=x.dtype)
        F.batch_norm(x, mean, torch.ones(6, dtype=x.dtype), training=True, momentum=0.1)
        return mean

    @staticmethod
    def naive(x: A) -> A:
        norm = nn.BatchNorm(6, momentum=0.9)
        norm(x)
        return norm.running_mean

    @staticmethod
    def fixed(x: A) -> A:
        norm = nn.BatchNorm(6, momentum=0.1)
        norm(x)
        return norm.running_mean


class NormAffine(Trap):
    """A normalisation has a weight and a bias on one side only.

    InstanceNorm has none by default in both frameworks, the other normalisations have both. An
    affine layer at its initial values, ones and zeros, computes what a plain one does: only
    weights that were trained, or drawn, show the difference.
    """

    id = "norm-affine"
    title = "A normalisation's weight or bias is on one side only"
    rows = ("15",)
    fix = "nn.InstanceNorm(channels, affine=True), and the like, as in the original"
    error = 0.75

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {
            "x": rng.standard_normal(_IMAGE["x"]),
            "weight": rng.uniform(0.5, 1.5, 6),
            "bias": rng.standard_normal(6),
        }

    images = frozenset({"x", "output"})

    @staticmethod
    def reference(x: T, weight: T, bias: T) -> T:
        return F.instance_norm(x, weight=weight, bias=bias)

    @staticmethod
    def naive(x: A, weight: A, bias: A) -> A:
        return nn.InstanceNorm(6)(x)

    @staticmethod
    def fixed(x: A, weight: A, bias: A) -> A:
        norm = nn.InstanceNorm(6, affine=True)
        norm.weight, norm.bias = weight, bias
        return norm(x)


class NormAxis(Trap):
    """The normalisation runs over another axis than the original's.

    In NCHW a LayerNorm over channels needs a permutation and back. In NHWC channels come last and
    it needs none; a port that keeps the permutation normalises over the width.
    """

    id = "norm-axis"
    title = "A normalisation over the wrong axis"
    fix = "normalise over the axis that holds the channels in NHWC: the last"
    error = 0.68
    images = frozenset({"x", "output"})
    shapes = _IMAGE

    @staticmethod
    def reference(x: T) -> T:
        return F.layer_norm(x.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2)

    @staticmethod
    def naive(x: A) -> A:
        return nn.LayerNorm(5, affine=False)(x.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.LayerNorm(6, affine=False)(x)


class NormKind(Trap):
    """Another normalisation: RMSNorm for LayerNorm, InstanceNorm for BatchNorm.

    Their weights have the same names and shapes. RMSNorm does not subtract the mean; on data whose
    mean is near zero the difference is small.
    """

    id = "norm-kind"
    title = "Another normalisation"
    fix = "use the original's normalisation"
    error = 0.48
    shapes = _FEATURES

    @staticmethod
    def reference(x: T) -> T:
        return F.layer_norm(x, (6,))

    @staticmethod
    def naive(x: A) -> A:
        return nn.RMSNorm(6)(x)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.LayerNorm(6, affine=False)(x)


class LayerNormShape(Trap):
    """MLX's LayerNorm normalises the last axis only; PyTorch's takes a shape of several.

    `nn.LayerNorm((C, H, W))` normalises each image as a whole. `nn.LayerNorm(C)` on NHWC gives
    every pixel a mean of its own. A tuple is refused by MLX.
    """

    id = "layernorm-shape"
    title = "LayerNorm over several axes"
    rows = ("14",)
    fix = "flatten the axes first: mx.fast.layer_norm(x.flatten(1), None, None, eps), then reshape"
    error = 0.48
    images = frozenset({"x", "output"})
    shapes = _IMAGE

    @staticmethod
    def reference(x: T) -> T:
        return F.layer_norm(x, x.shape[1:])

    @staticmethod
    def naive(x: A) -> A:
        return nn.LayerNorm(6, affine=False)(x)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.fast.layer_norm(x.flatten(1), None, None, 1e-5).reshape(x.shape)


class BatchNormBiasedVariance(Trap):
    """The running variance is fed by the biased variance.

    A batch is normalised by its biased variance, divided by N, and the running variance is fed by
    the unbiased one, divided by N - 1. MLX did not make the difference before 0.32.1 (measured
    with 0.32.4: it does), and layers written by hand often do not.
    """

    id = "batchnorm-biased-variance"
    title = "A running variance that is biased"
    rows = ("8",)
    fix = "nn.BatchNorm of mlx 0.32.1 or later, or feed the running value x.var(axis, ddof=1)"
    error = 0.2
    shapes = _FEATURES

    @staticmethod
    def reference(x: T) -> T:
        var = torch.zeros(6, dtype=x.dtype)
        F.batch_norm(x, torch.zeros(6, dtype=x.dtype), var, training=True)
        return var

    @staticmethod
    def naive(x: A) -> A:
        return 0.1 * x.var(0)

    @staticmethod
    def fixed(x: A) -> A:
        return 0.1 * x.var(0, ddof=1)


class BatchNormVolumes(Trap):
    """MLX's BatchNorm takes 2 to 4 axes; volumes (N, D, H, W, C) are refused.

    Fold the depth into the height: the statistics run over all axes but the last, so nothing
    changes.
    """

    id = "batchnorm-volumes"
    shows = "raises"
    title = "BatchNorm of five axes"
    rows = ("9",)
    fix = "reshape around it: norm(x.reshape(N, D * H, W, C)).reshape(x.shape)"
    error = None
    images = frozenset({"x", "output"})
    shapes = arrays(x=(2, 4, 2, 3, 5))

    @staticmethod
    def reference(x: T) -> T:
        return F.batch_norm(x, None, None, training=True)

    @staticmethod
    def naive(x: A) -> A:
        return nn.BatchNorm(4)(x)

    @staticmethod
    def fixed(x: A) -> A:
        n, d, h, w, c = x.shape
        return nn.BatchNorm(4)(x.reshape(n, d * h, w, c)).reshape(x.shape)


class BatchNormUnfreeze(Trap):
    """Unfreezing a model makes the running statistics of its BatchNorms trainable.

    `BatchNorm.unfreeze` protects them, but a parent's `unfreeze` reaches its children's records
    directly. From then on the optimizer updates them: their gradient is zero in training mode, so
    momentum and Adam leave them alone, and weight decay does not. Typical of a GAN that freezes
    its discriminator for the generator's step.
    """

    id = "batchnorm-unfreeze"
    title = "Running statistics that train after unfreeze()"
    rows = ("10",)
    fix = "after model.unfreeze(), freeze them: norm.freeze(keys=['running_mean', 'running_var'])"
    error = 0.1
    shapes = _FEATURES

    @staticmethod
    def reference(x: T) -> T:
        var = torch.ones(6, dtype=x.dtype)
        F.batch_norm(x, torch.zeros(6, dtype=x.dtype), var, training=True)
        return var

    @staticmethod
    def naive(x: A) -> A:
        model = nn.Sequential(nn.BatchNorm(6))
        model.freeze()
        model.unfreeze()
        model(x)
        zeros = nn.utils.tree_map(mx.zeros_like, model.trainable_parameters())
        optim.AdamW(0.1, weight_decay=1.0, bias_correction=True).update(model, zeros)
        return model.layers[0].running_var

    @staticmethod
    def fixed(x: A) -> A:
        model = nn.Sequential(nn.BatchNorm(6))
        model.freeze()
        model.unfreeze()
        for norm in model.layers:
            norm.unfreeze()  # BatchNorm's own, which leaves the statistics out
        model(x)
        zeros = nn.utils.tree_map(mx.zeros_like, model.trainable_parameters())
        optim.AdamW(0.1, weight_decay=1.0, bias_correction=True).update(model, zeros)
        return model.layers[0].running_var


class BatchNormFrozenMoves(Trap):
    """Freezing a BatchNorm does not stop its statistics, in either framework.

    They move with every call in training mode, also when a frozen discriminator only scores the
    generator. A port that calls the network once more or once less, or puts it in evaluation mode
    for the frozen half of the step, ends up with other statistics. Count the calls.
    """

    id = "batchnorm-frozen-moves"
    title = "Statistics of a frozen BatchNorm move"
    rows = ("11",)
    fix = "call the network as often as the original does, in the same mode; freeze() is not eval()"
    error = 0.47
    shapes = _FEATURES

    @staticmethod
    def reference(x: T) -> T:
        norm = torch.nn.BatchNorm1d(6).to(x.dtype).requires_grad_(False)
        norm(x)
        norm(x)
        return norm.running_mean  # type: ignore[return-value]

    @staticmethod
    def naive(x: A) -> A:
        norm = nn.BatchNorm(6)
        norm(x)
        norm.freeze()
        norm.eval()
        norm(x)
        return norm.running_mean

    @staticmethod
    def fixed(x: A) -> A:
        norm = nn.BatchNorm(6)
        norm(x)
        norm.freeze()
        norm(x)
        return norm.running_mean


class RMSNormEps(Trap):
    """RMSNorm's eps is 1e-5 in MLX; PyTorch's default is the precision's own, 1.2e-7.

    On inputs of size 1 that is 5e-6 of the output, on inputs of size 1e-3 everything.
    """

    id = "rmsnorm-eps"
    title = "RMSNorm's default eps"
    rows = ("13",)
    fix = "nn.RMSNorm(dims, eps=torch.finfo(torch.float32).eps), or the eps of the model's config"
    error = 0.73

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": 1e-3 * rng.standard_normal((5, 6))}

    @staticmethod
    def reference(x: T) -> T:
        return F.rms_norm(x, (6,), eps=torch.finfo(torch.float32).eps)

    @staticmethod
    def naive(x: A) -> A:
        return nn.RMSNorm(6)(x)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.RMSNorm(6, eps=torch.finfo(torch.float32).eps)(x)


class VarianceDdof(Trap):
    """`mx.var` divides by N; `torch.var` by N - 1.

    The same for the standard deviation. On three numbers that is a factor of 1.5.
    """

    id = "variance-ddof"
    title = "var and std divide by N"
    rows = ("16",)
    fix = "mx.var(x, axis, ddof=1), mx.std(x, axis, ddof=1)"
    error = 0.17
    shapes = _FEATURES

    @staticmethod
    def reference(x: T) -> T:
        return x.var(1)

    @staticmethod
    def naive(x: A) -> A:
        return x.var(1)

    @staticmethod
    def fixed(x: A) -> A:
        return x.var(1, ddof=1)


class StdGradientAtZero(Trap):
    """The gradient of a standard deviation or a norm at zero is NaN in MLX, and 0 in PyTorch.

    The root's slope is infinite there, and MLX multiplies it by zero. One constant channel in a
    minibatch-stddev layer, or one zero gradient in a gradient penalty, and every weight is NaN.
    """

    id = "std-gradient-at-zero"
    shows = "not finite"
    title = "NaN gradient of std and norm at zero"
    rows = ("17",)
    fix = "keep the root off zero: mx.where(v > 0, mx.sqrt(mx.where(v > 0, v, 1)), 0)"
    error = None
    gradients = True
    exact = True

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": np.zeros((2, 3))}

    @staticmethod
    def reference(x: T) -> T:
        return torch.linalg.vector_norm(x, dim=1)

    @staticmethod
    def naive(x: A) -> A:
        return mx.linalg.norm(x, axis=1)

    @staticmethod
    def fixed(x: A) -> A:
        square = (x * x).sum(1)
        positive = square > 0
        return mx.where(positive, mx.sqrt(mx.where(positive, square, 1)), 0)


class HalfPrecisionStatistics(Trap):
    """Statistics of float16 data are accumulated in float16 by MLX, and overflow.

    The variance of 2,000 numbers of size 8 is infinite: their sum of squares exceeds 65,504.
    BatchNorm's running variance becomes NaN while its output stays finite. PyTorch accumulates in
    float32.
    """

    id = "half-precision-statistics"
    shows = "not finite"
    title = "float16 statistics overflow"
    rows = ("18",)
    fix = "x.astype(mx.float32) before mean, var or a normalisation, and back after"
    error = None

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": 8 * rng.standard_normal(2_000)}

    @staticmethod
    def reference(x: T) -> T:
        return x.half().to(x.dtype).var(correction=0)

    @staticmethod
    def naive(x: A) -> A:
        return x.astype(mx.float16).var()

    @staticmethod
    def fixed(x: A) -> A:
        return x.astype(mx.float16).astype(mx.float32).var()


class VarianceOfOffsetData(Trap):
    """On the CPU `mx.var` loses the variance of data that is far from zero.

    The mean is summed in one float32 accumulator, and its error enters squared: of 100,000 numbers
    of variance 1 around 10,000 nothing is left. PyTorch's sums in blocks keep it.
    """

    id = "variance-of-offset-data"
    title = "The variance of data far from zero"
    rows = ("19",)
    fix = "subtract any one element, then the mean of the rows' means, before squaring"
    error = 55.0

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": rng.standard_normal(100_000)}

    @staticmethod
    def reference(x: T) -> T:
        return (x.float() + 1e4).to(x.dtype).var(correction=0)

    @staticmethod
    def naive(x: A) -> A:
        return (x + 1e4).var()

    @staticmethod
    def fixed(x: A) -> A:
        rows = (x + 1e4).reshape(-1, 500)
        rows = rows - rows[0, 0]
        rows = rows - rows.mean(1).mean()
        return mx.square(rows).mean(1).mean()


class NormMode(Trap):
    """One side is in training mode and the other in evaluation mode.

    A module of MLX starts in training mode, as PyTorch's do, and `model.eval()` must be called on
    both sides. BatchNorm then uses other statistics, Dropout draws or does not.
    """

    id = "training-mode"
    title = "Training mode on one side, evaluation on the other"
    fix = "model.eval() or model.train() on both sides"
    error = 0.95

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {
            "x": rng.standard_normal((5, 6)),
            "mean": rng.standard_normal(6),
            "var": rng.uniform(0.5, 2, 6),
        }

    @staticmethod
    def reference(x: T, mean: T, var: T) -> T:
        return F.batch_norm(x, mean, var)

    @staticmethod
    def naive(x: A, mean: A, var: A) -> A:
        norm = nn.BatchNorm(6)
        norm.running_mean, norm.running_var = mean, var
        return norm(x)

    @staticmethod
    def fixed(x: A, mean: A, var: A) -> A:
        norm = nn.BatchNorm(6)
        norm.running_mean, norm.running_var = mean, var
        return norm.eval()(x)
