"""Convolutional GAN of document 000, in MLX.

Sources
    Document 000, repaired: ERRATA.md lists what was wrong. Goodfellow et al. 2014
    (arXiv 1406.2661), whose Algorithm 1 is the step of ``gan.py``. What the field does instead
    is in ``dcgan.py``.

Repairs that show here: the generator projects the noise to a map of a quarter of the image's size,
not to a single pixel, so that two stages reach the image (000-E6); the discriminator's last layer
fits that size (000-E7) and D(G(z)) composes at every one (000-E9); its ReLU, which the document
calls and never makes, is there (000-E8); it returns logits, not probabilities (000-E10).
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.gan import train_step
from mlx_impl.layers import Conv2d, ConvTranspose2d, Linear, relu
from mlx_impl.losses import discriminator_loss, generator_loss_nonsaturating
from mlx_impl.optimizers import Adam

__all__ = [  # all that training takes, shared or not
    "Discriminator",
    "Generator",
    "discriminator_loss",
    "generator_loss_nonsaturating",
    "make_optimizer",
    "train_step",
]


class Generator(nn.Module):
    """Noise (B, latent_dim) to images (B, H, W, C) in [-1, 1].

    ``width`` is the smaller of the two networks' numbers of channels. Raises ValueError unless H
    and W are multiples of 4.
    """

    def __init__(
        self,
        latent_dim: int = 100,
        width: int = 128,
        image_size: tuple[int, int] = (64, 64),
        channels: int = 3,
    ):
        super().__init__()
        self.map_shape = (*_quarter(image_size), 2 * width)
        h, w, c = self.map_shape
        self.fc = Linear(latent_dim, h * w * c)
        self.deconv1 = ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.deconv2 = ConvTranspose2d(width, channels, 4, stride=2, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        x = relu(self.fc(z))
        x = x.reshape(-1, *self.map_shape)  # (B, H / 4, W / 4, 2 * width)
        x = relu(self.deconv1(x))  # (B, H / 2, W / 2, width)
        return mx.tanh(self.deconv2(x))  # (B, H, W, C)


class Discriminator(nn.Module):
    """Images (B, H, W, C) in [-1, 1] to logits (B, 1), positive for real.

    Raises ValueError unless H and W are multiples of 4.
    """

    def __init__(
        self,
        width: int = 128,
        image_size: tuple[int, int] = (64, 64),
        channels: int = 3,
    ):
        super().__init__()
        h, w = _quarter(image_size)
        self.conv1 = Conv2d(channels, width, 4, stride=2, padding=1)
        self.conv2 = Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.fc = Linear(h * w * 2 * width, 1)

    def __call__(self, x: mx.array) -> mx.array:
        x = relu(self.conv1(x))  # (B, H / 2, W / 2, width)
        x = relu(self.conv2(x))  # (B, H / 4, W / 4, 2 * width)
        return self.fc(x.flatten(1))


def _quarter(image_size: tuple[int, int]) -> tuple[int, int]:
    """The size of the smallest map, two stages of stride 2 away from the image."""
    height, width = image_size
    if min(image_size) < 4 or height % 4 or width % 4:
        raise ValueError(
            f"image_size is {height} x {width}: both must be multiples of 4, since two stages "
            "halve or double them"
        )
    return height // 4, width // 4


def make_optimizer(module: nn.Module) -> Adam:
    """Adam with the document's settings."""
    optimizer = Adam(learning_rate=2e-4, betas=(0.5, 0.999))
    optimizer.init(module.trainable_parameters())  # before a compiled step captures its state
    return optimizer
