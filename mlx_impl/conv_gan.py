"""Convolutional GAN of document 000, in MLX.

Sources
    Document 000, repaired: ERRATA.md lists what was wrong. Goodfellow et al. 2014
    (arXiv 1406.2661), Algorithm 1. What the field does instead is in ``dcgan.py``.

Repairs that show here: the generator projects the noise to a map of a quarter of the image's size,
not to a single pixel, so that two stages reach the image (000-E6); the discriminator's last layer
fits that size (000-E7) and D(G(z)) composes at every one (000-E9); its ReLU, which the document
calls and never makes, is there (000-E8); it returns logits, not probabilities (000-E10).
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_impl.layers import Conv2d, ConvTranspose2d, Linear
from mlx_impl.losses import discriminator_loss, generator_loss_nonsaturating
from mlx_impl.optimizers import Adam


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
        x = nn.relu(self.fc(z))
        x = x.reshape(-1, *self.map_shape)  # (B, H / 4, W / 4, 2 * width)
        x = nn.relu(self.deconv1(x))  # (B, H / 2, W / 2, width)
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
        x = nn.relu(self.conv1(x))  # (B, H / 2, W / 2, width)
        x = nn.relu(self.conv2(x))  # (B, H / 4, W / 4, 2 * width)
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


def train_step(
    generator: Generator,
    discriminator: Discriminator,
    optimizer_g: optim.Optimizer,
    optimizer_d: optim.Optimizer,
    real: mx.array,
    noise: mx.array,
) -> tuple[mx.array, mx.array]:
    """One alternating step on real (B, H, W, C) and noise (B, latent_dim).

    Goodfellow Algorithm 1, k = 1. Both halves see the same fakes, and the generator's half the
    discriminator just updated. Returns the discriminator's and the generator's loss, each before
    its own update.
    """

    def d_loss_fn(discriminator: Discriminator, fake: mx.array) -> mx.array:
        return discriminator_loss(discriminator(real), discriminator(fake))

    def g_loss_fn(generator: Generator) -> tuple[mx.array, mx.array]:
        # MLX keeps no tape to come back to, so the discriminator's half is in here: the fakes that
        # it was updated on are then those that the generator's loss differentiates.
        fake = generator(noise)
        d_loss_and_grad = nn.value_and_grad(discriminator, d_loss_fn)
        d_loss, d_grads = d_loss_and_grad(discriminator, mx.stop_gradient(fake))
        optimizer_d.update(discriminator, d_grads)
        return generator_loss_nonsaturating(discriminator(fake)), d_loss

    (g_loss, d_loss), g_grads = nn.value_and_grad(generator, g_loss_fn)(generator)
    optimizer_g.update(generator, g_grads)
    return d_loss, g_loss
