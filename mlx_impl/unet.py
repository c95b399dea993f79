"""The U-Net of denoising diffusion, in MLX.

Sources
    Ho, Jain and Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239),
    section 4 and appendix B, and their code for CIFAR-10: residual blocks with group
    normalisation (eps 1e-6), self-attention with one head at 16x16 and in the middle, and a last
    layer of every residual branch that starts at zero. Wu and He 2018 (arXiv 1803.08494), group
    normalisation. Class labels are added to the time embedding, the class after the last standing
    for none: Ho and Salimans 2022 (arXiv 2207.12598), section 3. Document 004's network sees no
    timestep (004-E9), no attention and no skip connection (004-E29).

There is no dropout, which Ho et al. set to 0.1 for CIFAR-10: a step of ours draws nothing.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from mlx_impl.diffusion import sinusoidal_embedding
from mlx_impl.layers import Conv2d, Linear, silu
from mlx_impl.norms import GroupNorm
from mlx_impl.precision import single_on_cpu

EPS = 1e-6
"""Of group normalisation: TensorFlow's default, which Ho et al. use, and a tenth of MLX's."""


def group_norm(groups: int, channels: int) -> GroupNorm:
    """Group normalisation of (B, H, W, channels) as Ho et al. have it."""
    return GroupNorm(groups, channels, EPS)


class TimeEmbedding(nn.Module):
    """Timesteps (B,) to features (B, 4 * channels): sinusoids, then two layers."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.dense0 = Linear(channels, 4 * channels)
        self.dense1 = Linear(4 * channels, 4 * channels)

    def __call__(self, timesteps: mx.array) -> mx.array:
        x = sinusoidal_embedding(timesteps, self.channels, self.dense0.weight.dtype)
        return self.dense1(silu(self.dense0(x)))


class ResNetBlock(nn.Module):
    """Features (B, H, W, in) and the time embedding (B, time) to features (B, H, W, out).

    ``time_channels=None`` makes a block that takes no time embedding.
    """

    def __init__(self, in_channels: int, out_channels: int, time_channels: int | None, groups: int):
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.temb_proj = Linear(time_channels, out_channels)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: mx.array, temb: mx.array | None = None) -> mx.array:
        h = self.conv1(silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(silu(temb))[:, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention with one head among the pixels of (B, H, W, C), added to its input.

    The key's bias adds the same to all of a query's scores, so that the softmax undoes it: its
    gradient is zero but for rounding, and Adam walks it at random. Ho et al. have it.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q = Linear(channels, channels)
        self.k = Linear(channels, channels)
        self.v = Linear(channels, channels)
        self.proj_out = Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.norm(x).flatten(1, 2)[:, None]  # (B, 1 head, H * W, C)
        q, k, v = self.q(h), self.k(h), self.v(h)
        attend = partial(mx.fast.scaled_dot_product_attention, scale=q.shape[-1] ** -0.5)
        h = self.proj_out(single_on_cpu(attend, q, k, v))
        return x + h.reshape(x.shape)


class Downsample(nn.Module):
    """(B, H, W, C) to (B, H / 2, W / 2, C), H and W even: a strided convolution.

    Padded at the bottom and at the right only, as TensorFlow pads to the "same" size.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """(B, H, W, C) to (B, 2 H, 2 W, C): each pixel four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(nn.Upsample(2)(x))


class DownLevel(nn.Module):
    """One resolution on the way down: (B, H, W, in) to all the features made there.

    ``num_res_blocks`` of (B, H, W, out), each behind its attention where the level has it, and
    (B, H / 2, W / 2, out) where ``downsample``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        num_res_blocks: int,
        groups: int,
        attention: bool,
        downsample: bool,
    ):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (num_res_blocks - 1)
        self.block = [ResNetBlock(c, out_channels, time_channels, groups) for c in inputs]
        self.attn = [
            AttentionBlock(out_channels, groups) if attention else nn.Identity() for _ in inputs
        ]
        self.downsample = Downsample(out_channels) if downsample else None

    def __call__(self, x: mx.array, temb: mx.array) -> list[mx.array]:
        made = []
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x, temb))
            made.append(x)
        if self.downsample is not None:
            made.append(self.downsample(x))
        return made


class UpLevel(nn.Module):
    """One resolution on the way up: (B, H, W, in) to (B, H, W, out), twice as large at the end
    where ``upsample``.

    Each block takes one of the features that the way down made, the last of ``skips``, beside its
    input; ``skip_channels`` are their widths in that order.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        time_channels: int,
        groups: int,
        attention: bool,
        upsample: bool,
    ):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.block = [
            ResNetBlock(c + skip, out_channels, time_channels, groups)
            for c, skip in zip(inputs, skip_channels, strict=True)
        ]
        self.attn = [
            AttentionBlock(out_channels, groups) if attention else nn.Identity() for _ in inputs
        ]
        self.upsample = Upsample(out_channels) if upsample else None

    def __call__(self, x: mx.array, temb: mx.array, skips: list[mx.array]) -> mx.array:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(mx.concatenate([x, skips.pop()], axis=-1), temb))
        return x if self.upsample is None else self.upsample(x)


class UNet(nn.Module):
    """Noisy images (B, H, W, C) and timesteps (B,) to the predicted noise (B, H, W, C).

    ``channels`` times ``channel_multipliers`` are the levels' widths; each level but the last
    halves the resolution, so H and W must be multiples of 2 ** (levels - 1). Attention stands at
    the levels where an image of ``image_size`` has one of ``attention_resolutions``; images of
    other sizes, square or not, have it at the same levels. With ``num_classes``, labels (B,) are
    0 to ``num_classes``, the last for "no class" (:attr:`null_label`). The defaults are Ho et
    al.'s network for CIFAR-10, of 35,746,307 parameters.

    Raises ValueError where widths, groups and sizes do not fit, and for inputs of other shapes;
    IndexError for a label that is none, unless inside a compiled step, where no value is known.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        image_size: int = 32,
        groups: int = 32,
        num_classes: int | None = None,
    ):
        super().__init__()
        widths = [channels * m for m in channel_multipliers]
        sizes = [image_size // 2**i for i in range(len(widths))]
        time_channels, last = 4 * channels, len(widths) - 1
        if channels < 4 or any(w % groups for w in (channels, *widths)):
            raise ValueError(
                f"channels={channels} and the levels' widths {widths} must be multiples of "
                f"groups={groups}, and channels at least 4, which the time embedding needs"
            )
        if image_size % 2**last:
            raise ValueError(
                f"image_size={image_size} cannot be halved {last} times, once between the levels: "
                f"make it a multiple of {2**last} or channel_multipliers shorter"
            )
        if not set(attention_resolutions) <= set(sizes):
            raise ValueError(
                f"attention_resolutions={attention_resolutions} are not all among the levels' "
                f"sizes {sizes}, which start at image_size and halve"
            )
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.multiple_of = 2**last  # what H and W must be

        self.temb = TimeEmbedding(channels)
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, time_channels)
        self.conv_in = Conv2d(in_channels, channels, 3, padding=1)

        down, up, skips, width = [], [], [channels], channels
        for i, out in enumerate(widths):
            attention = sizes[i] in attention_resolutions
            down.append(
                DownLevel(width, out, time_channels, num_res_blocks, groups, attention, i < last)
            )
            skips += [out] * (num_res_blocks + (i < last))
            width = out
        self.down = down

        self.mid_block1 = ResNetBlock(width, width, time_channels, groups)
        self.mid_attn = AttentionBlock(width, groups)
        self.mid_block2 = ResNetBlock(width, width, time_channels, groups)

        for i, out in reversed(list(enumerate(widths))):
            attention = sizes[i] in attention_resolutions
            taken = [skips.pop() for _ in range(num_res_blocks + 1)]
            up.append(UpLevel(width, taken, out, time_channels, groups, attention, i > 0))
            width = out
        self.up = up  # in the order of evaluation, the lowest resolution first

        self.norm_out = group_norm(groups, width)
        self.conv_out = Conv2d(width, in_channels, 3, padding=1)
        _initialise(self)

    @property
    def null_label(self) -> int:
        """The label that stands for no class. Raises ValueError without classes."""
        if self.num_classes is None:
            raise ValueError("this U-Net has no classes: make it with num_classes")
        return self.num_classes

    def __call__(
        self, x: mx.array, timesteps: mx.array, labels: mx.array | None = None
    ) -> mx.array:
        self._check_inputs(x, timesteps, labels)
        temb = self.temb(timesteps)  # (B, 4 * channels)
        if labels is not None:
            temb = temb + self.class_embedding(labels)

        skips = [self.conv_in(x)]
        for down in self.down:
            skips += down(skips[-1], temb)
        h = self.mid_block1(skips[-1], temb)
        h = self.mid_block2(self.mid_attn(h), temb)
        for up in self.up:
            h = up(h, temb, skips)
        return self.conv_out(silu(self.norm_out(h)))

    def _check_inputs(self, x: mx.array, timesteps: mx.array, labels: mx.array | None) -> None:
        if (
            x.ndim != 4
            or x.shape[-1] != self.in_channels
            or any(size % self.multiple_of for size in x.shape[1:3])
        ):
            raise ValueError(
                f"images {list(x.shape)}: this U-Net takes (B, H, W, C) with {self.in_channels} "
                f"channels, H and W multiples of {self.multiple_of}"
            )
        batch = x.shape[0]
        if timesteps.shape != (batch,):
            raise ValueError(
                f"timesteps {list(timesteps.shape)} for {batch} images: give one to each, [{batch}]"
            )
        if (labels is None) != (self.num_classes is None):
            raise ValueError(
                "this U-Net was made without num_classes and takes no labels"
                if labels is not None
                else f"this U-Net takes labels, 0 to {self.num_classes} (no class), for each image"
            )
        if labels is not None and self.num_classes is not None:
            _check_labels(labels, batch, self.num_classes)


def _check_labels(labels: mx.array, batch: int, num_classes: int) -> None:
    if "int" not in str(labels.dtype):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != (batch,):
        raise ValueError(
            f"labels {list(labels.shape)} for {batch} images: give one to each, [{batch}]"
        )
    try:
        values = np.array(labels)
    except ValueError:  # being compiled: MLX has no values yet
        return
    wrong = values[(values < 0) | (values > num_classes)]
    if wrong.size:
        raise IndexError(
            f"label {wrong[0]} is not one of 0 to {num_classes - 1}, the classes, and "
            f"{num_classes}, none of them"
        )


_ZERO = ("bias", "conv2.weight", "proj_out.weight", "conv_out.weight")


def _initialise(model: UNet) -> None:
    """Ho et al.'s: uniform by fan-in and fan-out, biases zero, residual branches ending in zero."""
    uniform = nn.init.glorot_uniform()

    def initial(name: str, parameter: mx.array) -> mx.array:
        if name.endswith(_ZERO):
            return mx.zeros_like(parameter)
        if name == "class_embedding.weight":
            return mx.random.normal(parameter.shape)
        return uniform(parameter, 1.0) if parameter.ndim > 1 else parameter

    model.update(tree_map_with_path(initial, model.parameters()))
