"""A small latent diffusion model with classes, in PyTorch.

Sources
    Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv
    2112.10752), sections 3.1 and 3.2 and appendix G: a diffusion model of the latents of an
    autoencoder that was trained before. Kingma and Welling 2014 (arXiv 1312.6114), called K&W here:
    that autoencoder's loss. Ho and Salimans 2022 (arXiv 2207.12598): guidance without a classifier.
    Document 004 calls its network a small Stable Diffusion (004-E1); this is what would be one,
    with digits for images and their class for a text.

Left out of Rombach et al.'s autoencoder: the perceptual and the adversarial part of its loss, and
attention. Images are (B, C, H, W) in [-1, 1], latents (B, latent_channels, h, w), H / h and W / w
being the autoencoder's ``factor``. The diffusion model sees latents times ``latent_scale``, which
makes their standard deviation 1 (:func:`measure_latent_scale`).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.diffusion import Schedule, ddim_sample, loss
from reference.unet import Downsample, ResNetBlock, UNet, Upsample, group_norm

KL_WEIGHT = 1e-6
"""Rombach et al., appendix G: just enough to keep the latents from drifting apart."""

DIGITS: dict[str, Any] = {
    "in_channels": 4,
    "channels": 64,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "image_size": 8,
    "groups": 16,
    "num_classes": 10,
}
"""A U-Net, ``UNet(**DIGITS)``, for the latents that the default autoencoder makes of 32 x 32 grey
digits."""


class Encoder(nn.Module):
    """Images (B, C, H, W) to (B, 2 * latent_channels, h, w): means, then log-variances."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        channels: int,
        channel_multipliers: tuple[int, ...],
        groups: int,
    ):
        super().__init__()
        widths = [channels * m for m in channel_multipliers]
        inputs = [channels, *widths[:-1]]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.block = nn.ModuleList(
            [ResNetBlock(c, out, None, groups) for c, out in zip(inputs, widths, strict=True)]
        )
        self.downsample = nn.ModuleList([Downsample(c) for c in widths[:-1]])
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block[0](self.conv_in(x))
        for downsample, block in zip(self.downsample, self.block[1:], strict=True):
            x = block(downsample(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) to images (B, C, H, W)."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        channels: int,
        channel_multipliers: tuple[int, ...],
        groups: int,
    ):
        super().__init__()
        widths = [channels * m for m in reversed(channel_multipliers)]
        inputs = [widths[0], *widths[:-1]]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.block = nn.ModuleList(
            [ResNetBlock(c, out, None, groups) for c, out in zip(inputs, widths, strict=True)]
        )
        self.upsample = nn.ModuleList([Upsample(c) for c in widths[:-1]])
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.block[0](self.conv_in(z))
        for upsample, block in zip(self.upsample, self.block[1:], strict=True):
            z = block(upsample(z))
        return self.conv_out(F.silu(self.norm_out(z)))


class Autoencoder(nn.Module):
    """A variational autoencoder: images (B, C, H, W), latents (B, latent_channels, h, w).

    The widths are ``channels`` times ``channel_multipliers``; each level but the last halves the
    resolution, so ``factor``, which H and W must be multiples of, is 2 ** (levels - 1). The
    defaults make (B, 4, 8, 8) of 32 x 32 digits.

    Raises ValueError where widths and groups do not fit, and for inputs of other shapes.
    """

    def __init__(
        self,
        in_channels: int = 1,
        latent_channels: int = 4,
        channels: int = 32,
        channel_multipliers: tuple[int, ...] = (1, 2, 2),
        groups: int = 8,
    ):
        super().__init__()
        widths = [channels * m for m in channel_multipliers]
        if any(w % groups for w in (channels, *widths)):
            raise ValueError(
                f"channels={channels} and the levels' widths {widths} must be multiples of "
                f"groups={groups}"
            )
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.factor = 2 ** (len(widths) - 1)
        sizes = (in_channels, latent_channels, channels, channel_multipliers, groups)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), both (B, latent_channels, h, w): K&W Eq. 9.

        The log-variance is kept within -30 and 20, so that neither it nor its exponential is ever
        infinite.
        """
        if (
            images.ndim != 4
            or images.shape[1] != self.in_channels
            or any(size % self.factor for size in images.shape[2:])
        ):
            raise ValueError(
                f"images {list(images.shape)}: this autoencoder takes (B, C, H, W) with "
                f"{self.in_channels} channels, H and W multiples of {self.factor}"
            )
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """The mean of p(x | z), images (B, C, H, W); about [-1, 1], but not bounded."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents {list(latents.shape)}: this autoencoder has (B, C, h, w) with "
                f"{self.latent_channels} channels"
            )
        return self.decoder(latents)


def reparametrise(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """``z = mean + sigma * noise``, all of one shape: K&W section 2.4 and Eq. 10.

    Raises ValueError for noise of another shape, which might broadcast.
    """
    if noise.shape != mean.shape:
        raise ValueError(
            f"latent noise {list(noise.shape)} for latents {list(mean.shape)}: draw one number for "
            "each of theirs"
        )
    return mean + (0.5 * log_variance).exp() * noise


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of q(z | x) from the standard normal, in nats for each image, averaged: K&W appendix B."""
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return kl.flatten(1).sum(dim=1).mean()


def reconstruction_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Half the squared error for each image, averaged: what a normal p(x | z) of variance 1 has."""
    return 0.5 * (reconstruction - images).square().flatten(1).sum(dim=1).mean()


def autoencoder_losses(
    autoencoder: Autoencoder, images: Tensor, latent_noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The reconstruction and the KL part of K&W Eq. 10, with one sample of z for each image.

    Images (B, C, H, W), standard normal noise (B, latent_channels, h, w). Their sum is the negative
    of the variational bound, but for a constant. Raises as :meth:`Autoencoder.encode`.
    """
    mean, log_variance = autoencoder.encode(images)
    reconstruction = autoencoder.decode(reparametrise(mean, log_variance, latent_noise))
    return reconstruction_loss(reconstruction, images), kl_divergence(mean, log_variance)


def make_optimizer(module: nn.Module) -> torch.optim.Adam:
    """Adam, for either stage."""
    return torch.optim.Adam(module.parameters(), lr=2e-4)


def autoencoder_train_step(
    autoencoder: Autoencoder,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    latent_noise: Tensor,
    kl_weight: float = KL_WEIGHT,
) -> tuple[Tensor, Tensor]:
    """The first stage: one step on ``reconstruction + kl_weight * KL``; returns these two.

    Raises as :func:`autoencoder_losses`.
    """
    reconstruction, kl = autoencoder_losses(autoencoder, images, latent_noise)
    optimizer.zero_grad()
    (reconstruction + kl_weight * kl).backward()
    optimizer.step()
    return reconstruction.detach(), kl.detach()


@torch.no_grad()
def measure_latent_scale(autoencoder: Autoencoder, images: Tensor, latent_noise: Tensor) -> float:
    """What makes the latents of these images have standard deviation 1: Rombach et al., app. G.

    Raises as :meth:`Autoencoder.encode`, and ValueError for latents that are all alike.
    """
    deviation = float(reparametrise(*autoencoder.encode(images), latent_noise).std(correction=0))
    if not deviation > 0:
        raise ValueError("these images' latents are all alike: give more of them")
    return 1 / deviation


def drop_labels(labels: Tensor, drop: Tensor, null_label: int) -> Tensor:
    """Labels (B,) with ``null_label`` where ``drop`` (B,), booleans: Ho and Salimans, Algorithm 1.

    The loop draws ``drop``, true for 10 to 20 in 100. Raises ValueError for other shapes.
    """
    if drop.shape != labels.shape:
        raise ValueError(f"drop {list(drop.shape)} for labels {list(labels.shape)}")
    return torch.where(drop.bool(), null_label, labels)


def latent_loss(
    unet: UNet,
    autoencoder: Autoencoder,
    images: Tensor,
    latent_noise: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    labels: Tensor,
    drop: Tensor,
    schedule: Schedule,
    latent_scale: float = 1.0,
) -> Tensor:
    """L_simple on the scaled latents of images (B, C, H, W): Rombach et al. Eq. 2, a scalar.

    ``latent_noise`` draws a latent for each image and ``noise`` is the diffusion's, both standard
    normal (B, latent_channels, h, w); ``timesteps`` and ``labels`` are (B,), and so is ``drop``, as
    in :func:`drop_labels`. The autoencoder gets no gradient, and the images neither. Raises as
    :func:`reference.diffusion.loss`, :meth:`Autoencoder.encode` and the U-Net.
    """
    with torch.no_grad():
        latents = latent_scale * reparametrise(*autoencoder.encode(images), latent_noise)
    kept = drop_labels(labels, drop, unet.null_label)
    return loss(lambda x, t: unet(x, t, kept), schedule, latents, timesteps, noise)


def train_step(
    unet: UNet,
    autoencoder: Autoencoder,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    latent_noise: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    labels: Tensor,
    drop: Tensor,
    schedule: Schedule,
    latent_scale: float = 1.0,
) -> Tensor:
    """The second stage: one step of the U-Net on :func:`latent_loss`, which it returns."""
    value = latent_loss(
        unet,
        autoencoder,
        images,
        latent_noise,
        timesteps,
        noise,
        labels,
        drop,
        schedule,
        latent_scale,
    )
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.detach()


def guided(unet: UNet, labels: Tensor, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The model that a sampler calls, with images of ``labels`` (B,) made more so.

    ``e(z) + scale * (e(z, c) - e(z))``: Ho and Salimans Eq. 6, with 1 + w for ``scale``. 0 leaves
    the labels out, 1 is the U-Net as it was trained, more trades variety for likeness. Both parts
    are one call, of twice the batch. Raises ValueError for a U-Net without classes.
    """
    both = torch.cat([labels, torch.full_like(labels, unet.null_label)])

    def model(x: Tensor, timesteps: Tensor) -> Tensor:
        predicted = unet(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both)
        conditional, unconditional = predicted.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return model


@torch.no_grad()
def sample(
    unet: UNet,
    autoencoder: Autoencoder,
    schedule: Schedule,
    noise: Tensor,
    labels: Tensor,
    guidance_scale: float = 3.0,
    latent_scale: float = 1.0,
    step_noises: Iterable[Tensor] = (),
    eta: float = 0.0,
) -> Tensor:
    """Images (B, C, H, W) of ``labels`` (B,) from standard normal noise (B, latent_channels, h, w).

    DDIM in all steps of ``schedule``, usually a respaced one, then the decoder. ``step_noises`` and
    ``eta`` as in :func:`reference.diffusion.ddim_sample`; raises as that and :func:`guided`.
    """
    model = guided(unet, labels, guidance_scale)
    latents = ddim_sample(model, schedule, noise, step_noises, eta)
    return autoencoder.decode(latents / latent_scale)
