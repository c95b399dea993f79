"""The step that trains every GAN here, in MLX.

Sources
    Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv 1406.2661): Algorithm 1 with k = 1,
    and the generator's loss of section 3, last paragraph. Documents 000, 001 and 002 mean this
    step; ERRATA.md 000-E16 and 001-E13 tell what is theirs and what is repaired.

``mlp_gan.py``, ``conv_gan.py`` and ``dcgan.py`` hold the networks, and each hands this step on as
its own.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_impl.losses import discriminator_loss, generator_loss_nonsaturating


def train_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer_g: Optimizer,
    optimizer_d: Optimizer,
    real: mx.array,
    noise: mx.array,
) -> tuple[mx.array, mx.array]:
    """One alternating step on real (B, H, W, C) and noise (B, latent_dim).

    Both halves see the same fakes; the generator's runs through the discriminator just updated and
    moves the generator alone. Each call of a network moves its running statistics, if it keeps any:
    once the generator's, three times the discriminator's (real, fake, fake again after its update).
    Returns the discriminator's and the generator's loss, each before its own update.
    """

    def d_loss_fn(discriminator: nn.Module, fake: mx.array) -> mx.array:
        return discriminator_loss(discriminator(real), discriminator(fake))

    def g_loss_fn(generator: nn.Module) -> tuple[mx.array, mx.array]:
        # MLX keeps no tape to come back to. A second call would make the same fakes and move the
        # running statistics once too often, so the discriminator's half is in here: the fakes that
        # it was updated on are then those that the generator's loss differentiates.
        fake = generator(noise)
        d_loss_and_grad = nn.value_and_grad(discriminator, d_loss_fn)
        d_loss, d_grads = d_loss_and_grad(discriminator, mx.stop_gradient(fake))
        optimizer_d.update(discriminator, d_grads)
        return generator_loss_nonsaturating(discriminator(fake)), d_loss

    (g_loss, d_loss), g_grads = nn.value_and_grad(generator, g_loss_fn)(generator)
    optimizer_g.update(generator, g_grads)
    return d_loss, g_loss
