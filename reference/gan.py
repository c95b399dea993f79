"""The step that trains every GAN here, in PyTorch.

Sources
    Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv 1406.2661): Algorithm 1 with k = 1,
    and the generator's loss of section 3, last paragraph. Documents 000, 001 and 002 mean this
    step; ERRATA.md 000-E16 and 001-E13 tell what is theirs and what is repaired.

``mlp_gan.py``, ``conv_gan.py`` and ``dcgan.py`` hold the networks, and each hands this step on as
its own.
"""

from torch import Tensor, nn
from torch.optim import Optimizer

from reference.losses import discriminator_loss, generator_loss_nonsaturating


def train_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer_g: Optimizer,
    optimizer_d: Optimizer,
    real: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """One alternating step on real (B, C, H, W) and noise (B, latent_dim).

    Both halves see the same fakes; the generator's runs through the discriminator just updated and
    moves the generator alone. Each call of a network moves its running statistics, if it keeps any:
    once the generator's, three times the discriminator's (real, fake, fake again after its update).
    Returns the discriminator's and the generator's loss, each before its own update.
    """
    fake = generator(noise)
    d_loss = discriminator_loss(discriminator(real), discriminator(fake.detach()))
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    g_loss = generator_loss_nonsaturating(discriminator(fake))
    optimizer_g.zero_grad()
    g_loss.backward(inputs=list(generator.parameters()))  # no gradients for the discriminator here
    optimizer_g.step()
    return d_loss.detach(), g_loss.detach()
