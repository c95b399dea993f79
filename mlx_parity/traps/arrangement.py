"""Positions, orders, and which tensor is read."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from torch.nn import functional as F

from mlx_parity.traps.trap import A, Rng, T, Trap, arrays

_SEQUENCE = arrays(x=(2, 5, 4))


class PoolingKind(Trap):
    """A sequence or an image is brought to one vector in another way.

    The first token, the last, the one at the end of the text, the mean, the maximum: all have the
    same shape. CLIP takes the token with the highest index, BERT the first, T5's encoder the mean.
    """

    id = "pooling-kind"
    title = "Pooled in another way"
    fix = "take what the original takes: x[:, 0], x[mx.arange(B), ends], x.mean(1), x.max(1)"
    error = 0.88
    shapes = _SEQUENCE

    @staticmethod
    def reference(x: T) -> T:
        return x[:, 0]

    @staticmethod
    def naive(x: A) -> A:
        return x.mean(1)

    @staticmethod
    def fixed(x: A) -> A:
        return x[:, 0]


class SliceShifted(Trap):
    """A slice of the right length that begins elsewhere.

    After a convolution that PyTorch pads on both sides the original keeps the first elements, or
    the last: one keeps it causal, the other lets it look ahead. A language model's targets are its
    inputs one further.
    """

    id = "slice-shifted"
    title = "A slice that begins elsewhere"
    fix = "x[:, :n] where the original takes [..., :n]: mind which axis is the time"
    error = 1.07
    shapes = arrays(x=(2, 8))

    @staticmethod
    def reference(x: T) -> T:
        return x[:, :5]

    @staticmethod
    def naive(x: A) -> A:
        return x[:, 3:]

    @staticmethod
    def fixed(x: A) -> A:
        return x[:, :5]


class RollDirection(Trap):
    """A roll written by hand, of a slice and a concatenation, that turns the other way.

    `torch.roll(x, n)` brings the last n elements to the front, and so does `mx.roll`. A split at n
    with both parts exchanged brings the first n to the back, which is a roll by -n. Shifted windows
    roll there and back again: both are wrong, shapes and masks fit, and nothing is raised.
    """

    id = "roll-direction"
    title = "Rolled the other way"
    fix = "mx.roll(x, shifts, axes), which is torch.roll"
    error = 1.07
    shapes = arrays(x=(2, 8))

    @staticmethod
    def reference(x: T) -> T:
        return torch.roll(x, 2, 1)

    @staticmethod
    def naive(x: A) -> A:
        front, back = mx.split(x, [2], axis=1)
        return mx.concatenate([back, front], axis=1)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.roll(x, 2, 1)


class AxesOrder(Trap):
    """Axes that are exchanged before a reshape, or are not: the shape comes out the same.

    Attention's heads stand second while attention runs, and behind the time before and after. A
    port that forgets to bring them back reshapes (B, H, L, D) to (B, L, H * D) all the same.
    """

    id = "axes-order"
    title = "Axes not exchanged before a reshape"
    fix = "y.transpose(0, 2, 1, 3).reshape(B, L, -1) behind an attention"
    error = 1.35
    shapes = arrays(x=(2, 3, 5, 4))

    @staticmethod
    def reference(x: T) -> T:
        return x.transpose(1, 2).reshape(2, 5, 12)

    @staticmethod
    def naive(x: A) -> A:
        return x.reshape(2, 5, 12)

    @staticmethod
    def fixed(x: A) -> A:
        return x.transpose(0, 2, 1, 3).reshape(2, 5, 12)


class PixelShuffleOrder(Trap):
    """MLX has no PixelShuffle; PyTorch's channels are (C, r, r), rows of a block before columns.

    Channels last invite (r, r, C), as TensorFlow's `depth_to_space` has them. Both make an image of
    the right shape, with the right colours for one channel.
    """

    id = "pixel-shuffle-order"
    title = "The channels of a pixel shuffle"
    fix = "x.reshape(B, H, W, C, r, r).transpose(0, 1, 4, 2, 5, 3).reshape(B, r * H, r * W, C)"
    error = 1.25
    images = frozenset({"x", "output"})
    shapes = arrays(x=(2, 8, 3, 4))

    @staticmethod
    def reference(x: T) -> T:
        return F.pixel_shuffle(x, 2)

    @staticmethod
    def naive(x: A) -> A:
        return x.reshape(2, 3, 4, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 8, 2)

    @staticmethod
    def fixed(x: A) -> A:
        return x.reshape(2, 3, 4, 2, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(2, 6, 8, 2)


class PositionOffset(Trap):
    """Positions that begin elsewhere, run backwards, or are left out.

    Behind a cache of n tokens the next one stands at n, so `nn.RoPE` needs `offset=n`; without it
    every generated token is the first. Relative positions are key minus query in T5, and the other
    way round elsewhere.
    """

    id = "position-offset"
    title = "Positions that begin elsewhere"
    fix = "rope(x, offset=cache.offset): count from where the original counts"
    error = 1.0

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"x": rng.standard_normal((2, 3, 4)), "table": rng.standard_normal((9, 4))}

    @staticmethod
    def reference(x: T, table: T) -> T:
        return x + table[torch.arange(4, 7)]

    @staticmethod
    def naive(x: A, table: A) -> A:
        return x + table[mx.arange(3)]

    @staticmethod
    def fixed(x: A, table: A) -> A:
        return x + table[mx.arange(4, 7)]


class RotaryBase(Trap):
    """Rotary positions whose base is not the original's.

    ``nn.RoPE`` has 10,000 unless it is told; language models have 500,000 or 1,000,000, under
    ``rope_theta`` or ``rope_parameters`` in their settings, and some another for each kind of
    layer. The first positions, and the first channels, hardly show it.
    """

    id = "rotary-base"
    title = "Rotary positions have another base"
    fix = "nn.RoPE(dims, base=rope_theta) with the original's, which may differ from layer to layer"
    error = 0.114
    shapes = arrays(x=(1, 1, 7, 8))

    @staticmethod
    def reference(x: T) -> T:
        angles = torch.arange(7, dtype=x.dtype)[:, None] * 500_000.0 ** (
            -torch.arange(4, dtype=x.dtype) / 4
        )
        a, b = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    @staticmethod
    def naive(x: A) -> A:
        return nn.RoPE(8)(x)

    @staticmethod
    def fixed(x: A) -> A:
        return nn.RoPE(8, base=500_000.0)(x)


class AnotherTensor(Trap):
    """A layer is given another tensor of the right shape: an earlier one, or the one after it.

    The residual from before the attention, values with the positions that only the keys should
    have, a skip connection taken behind the sum. In both frameworks names are reused freely (`x`,
    `h`, `y`), and a port that renames them picks the wrong one.
    """

    id = "another-tensor"
    title = "A layer reads another tensor"
    fix = "follow each argument of the named call back through the original's forward()"
    error = 0.28
    shapes = arrays(x=(3, 8))

    @staticmethod
    def reference(x: T) -> T:
        h = x + torch.tanh(x)
        return h + F.silu(h)

    @staticmethod
    def naive(x: A) -> A:
        h = x + mx.tanh(x)
        return x + h * mx.sigmoid(h)

    @staticmethod
    def fixed(x: A) -> A:
        h = x + mx.tanh(x)
        return h + h * mx.sigmoid(h)


class SequenceReversed(Trap):
    """The backward half of a bidirectional layer is returned in the sequence's own order.

    PyTorch's does so by itself. In MLX it is a second layer on `x[:, ::-1]`, whose states run
    backwards until they are reversed again.
    """

    id = "sequence-reversed"
    title = "Backward states left reversed"
    fix = "backward(x[:, ::-1])[:, ::-1], then concatenate behind the forward states"
    error = 0.83
    shapes = _SEQUENCE

    @staticmethod
    def reference(x: T) -> T:
        return x.flip(1).cumsum(1).flip(1)

    @staticmethod
    def naive(x: A) -> A:
        return mx.cumsum(x[:, ::-1], axis=1)

    @staticmethod
    def fixed(x: A) -> A:
        return mx.cumsum(x[:, ::-1], axis=1)[:, ::-1]


class ConstantDiffers(Trap):
    """A table that both sides compute for themselves: positions, a window, a noise schedule.

    No weight holds it, so none carries it. Whisper's sinusoids divide by half the width less one,
    the paper's by half the width; sines and cosines stand side by side in one code base and
    alternate in another; MLX and NumPy may make it in another precision.
    """

    id = "constant-differs"
    title = "A constant that the port computes otherwise"
    fix = "compute it by the original's formula, or load it from the original's buffer"
    error = 0.053

    @staticmethod
    def reference(x: T) -> T:
        rates = torch.exp(-np.log(10000) / 3 * torch.arange(4).to(x))
        return x + torch.sin(torch.arange(3).to(x)[:, None] * rates)

    @staticmethod
    def naive(x: A) -> A:
        rates = mx.exp(-np.log(10000) / 4 * mx.arange(4))
        return x + mx.sin(mx.arange(3)[:, None] * rates)

    @staticmethod
    def fixed(x: A) -> A:
        rates = mx.exp(-np.log(10000) / 3 * mx.arange(4))
        return x + mx.sin(mx.arange(3)[:, None] * rates)


class EmbeddingPadding(Trap):
    """`torch.nn.Embedding(padding_idx=0)` gives that row no gradient; MLX's has no such option.

    The forward pass is the same. In training the row of the padding token moves with every batch,
    and with weight decay or tied weights all else follows.
    """

    id = "embedding-padding"
    title = "The padding token's embedding trains"
    rows = ("48",)
    fix = "stop its gradient: mx.where((ids == padding)[..., None], mx.stop_gradient(y), y)"
    error = 0.66
    gradients = True

    @staticmethod
    def draw(rng: Rng) -> dict[str, np.ndarray]:
        return {"w": rng.standard_normal((5, 4)), "ids": np.array([[0, 3, 1], [2, 0, 0]])}

    @staticmethod
    def reference(w: T, ids: T) -> T:
        return F.embedding(ids, w, padding_idx=0)

    @staticmethod
    def naive(w: A, ids: A) -> A:
        return w[ids]

    @staticmethod
    def fixed(w: A, ids: A) -> A:
        y = w[ids]
        return mx.where((ids == 0)[..., None], mx.stop_gradient(y), y)
