"""DCGAN, the canonical form of document 000's GAN, in MLX.

Sources
    Radford, Metz and Chintala 2016 (arXiv 1511.06434): section 3 for the networks, Fig. 1 for the
    generator's sizes, section 4 for the initial weights and Adam's settings. Where the paper is
    silent, pytorch/examples ``dcgan/main.py``: no biases in the convolutions, kernels of 4, the
    projection a transposed convolution, the discriminator's widths, and N(1, 0.02) for the norms.
    Goodfellow et al. 2014 (arXiv 1406.2661), whose Algorithm 1 is the step of ``gan.py``.

At the defaults, 64 x 64 in four stages, the generator has 3,576,704 parameters and the
discriminator 2,765,568. Both run in the mode of ``train()`` or ``eval()``: BatchNorm keeps running
statistics in the first and uses them in the second.
"""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_impl.gan import train_step
from mlx_impl.layers import Conv2d, ConvTranspose2d, leaky_relu, relu
from mlx_impl.losses import discriminator_loss, generator_loss_nonsaturating
from mlx_impl.norms import BatchNorm
from mlx_impl.optimizers import Adam

__all__ = [  # all that training takes, shared or not
    "Discriminator",
    "Generator",
    "discriminator_loss",
    "generator_loss_nonsaturating",
    "init_weights",
    "make_optimizer",
    "train_step",
]


class Generator(nn.Module):
    """Noise (B, latent_dim) to images (B, H, W, C) in [-1, 1].

    Projected to a map of (H, W) / 2^stages, then doubled ``stages`` times; ``width`` is the number
    of channels before the image, and doubles with each stage away from it. 28 x 28 is
    ``image_size=(28, 28), stages=2``. Raises ValueError unless H and W are multiples of 2^stages.
    """

    def __init__(
        self,
        latent_dim: int = 100,
        width: int = 64,
        image_size: tuple[int, int] = (64, 64),
        channels: int = 3,
        stages: int = 4,
    ):
        super().__init__()
        map_size, widths = _pyramid(width, image_size, stages)
        widths.reverse()  # wide to narrow
        self.project = ConvTranspose2d(latent_dim, widths[0], map_size, bias=False)
        self.deconvs = [
            ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False)
            for wide, narrow in pairwise([*widths, channels])
        ]
        self.norms = [BatchNorm(w) for w in widths]  # one before each deconv

    def __call__(self, z: mx.array) -> mx.array:
        x = self.project(z[:, None, None, :])  # (B, H / 2^s, W / 2^s, width * 2^(stages - 1))
        for norm, deconv in zip(self.norms, self.deconvs, strict=True):
            x = deconv(relu(norm(x)))  # half the channels, twice the height and width
        return mx.tanh(x)  # (B, H, W, C)


class Discriminator(nn.Module):
    """Images (B, H, W, C) in [-1, 1] to logits (B, 1), positive for real.

    The generator's sizes in reverse. Raises ValueError unless H and W are multiples of 2^stages.
    """

    def __init__(
        self,
        width: int = 64,
        image_size: tuple[int, int] = (64, 64),
        channels: int = 3,
        stages: int = 4,
    ):
        super().__init__()
        map_size, widths = _pyramid(width, image_size, stages)
        self.convs = [
            Conv2d(narrow, wide, 4, stride=2, padding=1, bias=False)
            for narrow, wide in pairwise([channels, *widths])
        ]
        self.norms = [BatchNorm(w) for w in widths[1:]]  # none on the image's
        self.score = Conv2d(widths[-1], 1, map_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        x = leaky_relu(self.convs[0](x), 0.2)  # (B, H / 2, W / 2, width)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = leaky_relu(norm(conv(x)), 0.2)  # twice the channels, half the height and width
        return self.score(x).flatten(1)


def _pyramid(
    width: int, image_size: tuple[int, int], stages: int
) -> tuple[tuple[int, int], list[int]]:
    """The size of the smallest map, and each stage's number of channels, narrow to wide."""
    height, breadth = image_size
    factor = 2**stages
    if stages < 1:
        raise ValueError(f"stages is {stages}: it must be at least 1")
    if min(image_size) < 1 or height % factor or breadth % factor:
        raise ValueError(
            f"image_size is {height} x {breadth}: both must be multiples of {factor}, since each "
            f"of {stages} stages halves or doubles them; 28 x 28 takes stages=2"
        )
    return (height // factor, breadth // factor), [width * 2**i for i in range(stages)]


def init_weights(module: nn.Module, seed: int) -> None:
    """Kernels from N(0, 0.02), Radford section 4; norms' weights from N(1, 0.02), their biases 0.

    Drawn from a stream of their own, so that ``seed`` alone decides them.
    """
    key = mx.random.key(seed)

    def draw(name: str, parameter: mx.array) -> mx.array:
        nonlocal key
        if name.endswith("bias"):
            return mx.zeros_like(parameter)
        key, own = mx.random.split(key)
        mean = 0.0 if parameter.ndim == 4 else 1.0
        return mx.random.normal(parameter.shape, loc=mean, scale=0.02, key=own)

    module.update(tree_map_with_path(draw, module.trainable_parameters()))


def make_optimizer(module: nn.Module) -> Adam:
    """Adam with Radford's settings, section 4."""
    optimizer = Adam(learning_rate=2e-4, betas=(0.5, 0.999))
    optimizer.init(module.trainable_parameters())  # before a compiled step captures its state
    return optimizer
