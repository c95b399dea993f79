"""Fully connected GAN of documents 001 and 002, in MLX.

Sources
    Documents 001 (widths 128, 256, 512) and 002 (widths 256, 512, 1024, on MNIST), repaired:
    ERRATA.md lists what was wrong. Goodfellow et al. 2014 (arXiv 1406.2661), whose
    Algorithm 1 is the step of ``gan.py``.

Repairs that show here: the discriminator returns logits, not probabilities (001-E4, 002-E4); the
generator returns images and the discriminator flattens them, so D(G(z)) composes (002-E3).
"""

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.gan import train_step
from mlx_impl.layers import Linear, leaky_relu, relu
from mlx_impl.losses import discriminator_loss, generator_loss_nonsaturating
from mlx_impl.optimizers import Adam

__all__ = [  # all that training takes, shared or not
    "DOCUMENT_001",
    "DOCUMENT_002",
    "Discriminator",
    "Generator",
    "discriminator_loss",
    "generator_loss_nonsaturating",
    "make_optimizer",
    "train_step",
]

DOCUMENT_001 = (128, 256, 512)
DOCUMENT_002 = (256, 512, 1024)


class Generator(nn.Module):
    """Noise (B, latent_dim) to images (B, H, W, C) in [-1, 1]."""

    def __init__(
        self,
        latent_dim: int = 100,
        widths: tuple[int, int, int] = DOCUMENT_002,
        image_size: tuple[int, int] = (28, 28),
        channels: int = 1,
    ):
        super().__init__()
        self.image_shape = (*image_size, channels)
        self.fc1 = Linear(latent_dim, widths[0])
        self.fc2 = Linear(widths[0], widths[1])
        self.fc3 = Linear(widths[1], widths[2])
        self.fc4 = Linear(widths[2], math.prod(self.image_shape))

    def __call__(self, z: mx.array) -> mx.array:
        x = relu(self.fc1(z))
        x = relu(self.fc2(x))
        x = relu(self.fc3(x))
        x = mx.tanh(self.fc4(x))
        return x.reshape(-1, *self.image_shape)  # (B, H, W, C)


class Discriminator(nn.Module):
    """Images (B, H, W, C) in [-1, 1] to logits (B, 1), positive for real.

    ``widths`` are the generator's, narrow to wide; the discriminator goes through them in reverse.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = DOCUMENT_002,
        image_size: tuple[int, int] = (28, 28),
        channels: int = 1,
    ):
        super().__init__()
        self.fc1 = Linear(channels * math.prod(image_size), widths[2])
        self.fc2 = Linear(widths[2], widths[1])
        self.fc3 = Linear(widths[1], widths[0])
        self.fc4 = Linear(widths[0], 1)

    def __call__(self, x: mx.array) -> mx.array:
        x = x.flatten(1)  # (B, H * W * C)
        x = leaky_relu(self.fc1(x), 0.2)
        x = leaky_relu(self.fc2(x), 0.2)
        x = leaky_relu(self.fc3(x), 0.2)
        return self.fc4(x)


def make_optimizer(module: nn.Module) -> Adam:
    """Adam with both documents' settings."""
    optimizer = Adam(learning_rate=2e-4, betas=(0.5, 0.999))
    optimizer.init(module.trainable_parameters())  # before a compiled step captures its state
    return optimizer
