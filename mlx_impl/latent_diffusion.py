"""A small latent diffusion model with classes, in MLX.

Sources
    Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv
    2112.10752), sections 3.1 and 3.2 and appendix G: a diffusion model of the latents of an
    autoencoder that was trained before. Kingma and Welling 2014 (arXiv 1312.6114), called K&W here:
    that autoencoder's loss. Ho and Salimans 2022 (arXiv 2207.12598): guidance without a classifier.
    Document 004 calls its network a small Stable Diffusion (004-E1); this is what would be one,
    with digits for images and their class for a text.

Left out of Rombach et al.'s autoencoder: the perceptual and the adversarial part of its loss, and
attention. Images are (B, H, W, C) in [-1, 1], latents (B, h, w, latent_channels), H / h and W / w
being the autoencoder's ``factor``. The diffusion model sees latents times ``latent_scale``, which
makes their standard deviation 1 (:func:`measure_latent_scale`).
"""

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_impl.diffusion import Schedule, ddim_sample, loss
from mlx_impl.layers import Conv2d, silu
from mlx_impl.optimizers import Adam
from mlx_impl.precision import raised
from mlx_impl.unet import Downsample, ResNetBlock, UNet, Upsample, group_norm

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
    """Images (B, H, W, C) to (B, h, w, 2 * latent_channels): means, then log-variances."""

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
        self.conv_in = Conv2d(in_channels, channels, 3, padding=1)
        self.block = [
            ResNetBlock(c, out, None, groups) for c, out in zip(inputs, widths, strict=True)
        ]
        self.downsample = [Downsample(c) for c in widths[:-1]]
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.block[0](self.conv_in(x))
        for downsample, block in zip(self.downsample, self.block[1:], strict=True):
            x = block(downsample(x))
        return self.conv_out(silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, h, w, latent_channels) to images (B, H, W, C)."""

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
        self.conv_in = Conv2d(latent_channels, widths[0], 3, padding=1)
        self.block = [
            ResNetBlock(c, out, None, groups) for c, out in zip(inputs, widths, strict=True)
        ]
        self.upsample = [Upsample(c) for c in widths[:-1]]
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = Conv2d(widths[-1], in_channels, 3, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        z = self.block[0](self.conv_in(z))
        for upsample, block in zip(self.upsample, self.block[1:], strict=True):
            z = block(upsample(z))
        return self.conv_out(silu(self.norm_out(z)))


class Autoencoder(nn.Module):
    """A variational autoencoder: images (B, H, W, C), latents (B, h, w, latent_channels).

    The widths are ``channels`` times ``channel_multipliers``; each level but the last halves the
    resolution, so ``factor``, which H and W must be multiples of, is 2 ** (levels - 1). The
    defaults make (B, 8, 8, 4) of 32 x 32 digits.

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

    def encode(self, images: mx.array) -> tuple[mx.array, mx.array]:
        """Mean and log-variance of q(z | x), both (B, h, w, latent_channels): K&W Eq. 9.

        The log-variance is kept within -30 and 20, so that neither it nor its exponential is ever
        infinite.
        """
        if (
            images.ndim != 4
            or images.shape[-1] != self.in_channels
            or any(size % self.factor for size in images.shape[1:3])
        ):
            raise ValueError(
                f"images {list(images.shape)}: this autoencoder takes (B, H, W, C) with "
                f"{self.in_channels} channels, H and W multiples of {self.factor}"
            )
        mean, log_variance = raised(self.encoder(images)).split(2, axis=-1)
        return mean, mx.clip(log_variance, -30, 20)

    def decode(self, latents: mx.array) -> mx.array:
        """The mean of p(x | z), images (B, H, W, C); about [-1, 1], but not bounded."""
        if latents.ndim != 4 or latents.shape[-1] != self.latent_channels:
            raise ValueError(
                f"latents {list(latents.shape)}: this autoencoder has (B, h, w, C) with "
                f"{self.latent_channels} channels"
            )
        return self.decoder(latents)


def reparametrise(mean: mx.array, log_variance: mx.array, noise: mx.array) -> mx.array:
    """``z = mean + sigma * noise``, all of one shape: K&W section 2.4 and Eq. 10.

    Raises ValueError for noise of another shape, which might broadcast.
    """
    if noise.shape != mean.shape:
        raise ValueError(
            f"latent noise {list(noise.shape)} for latents {list(mean.shape)}: draw one number for "
            "each of theirs"
        )
    return mean + mx.exp(0.5 * log_variance) * noise


def kl_divergence(mean: mx.array, log_variance: mx.array) -> mx.array:
    """Of q(z | x) from the standard normal, in nats for each image, averaged: K&W appendix B."""
    kl = 0.5 * (mean.square() + mx.exp(log_variance) - 1 - log_variance)
    return kl.flatten(1).sum(axis=1).mean()


def reconstruction_loss(reconstruction: mx.array, images: mx.array) -> mx.array:
    """Half the squared error for each image, averaged: what a normal p(x | z) of variance 1 has."""
    return 0.5 * (raised(reconstruction) - images).square().flatten(1).sum(axis=1).mean()


def autoencoder_losses(
    autoencoder: Autoencoder, images: mx.array, latent_noise: mx.array
) -> tuple[mx.array, mx.array]:
    """The reconstruction and the KL part of K&W Eq. 10, with one sample of z for each image.

    Images (B, H, W, C), standard normal noise (B, h, w, latent_channels). Their sum is the negative
    of the variational bound, but for a constant. Raises as :meth:`Autoencoder.encode`.
    """
    mean, log_variance = autoencoder.encode(images)
    reconstruction = autoencoder.decode(reparametrise(mean, log_variance, latent_noise))
    return reconstruction_loss(reconstruction, images), kl_divergence(mean, log_variance)


def make_optimizer(module: nn.Module) -> Adam:
    """Adam, for either stage."""
    optimizer = Adam(learning_rate=2e-4)
    optimizer.init(module.trainable_parameters())  # before a compiled step captures its state
    return optimizer


def autoencoder_train_step(
    autoencoder: Autoencoder,
    optimizer: optim.Optimizer,
    images: mx.array,
    latent_noise: mx.array,
    kl_weight: float = KL_WEIGHT,
) -> tuple[mx.array, mx.array]:
    """The first stage: one step on ``reconstruction + kl_weight * KL``; returns these two.

    Raises as :func:`autoencoder_losses`.
    """

    def loss_fn(autoencoder: Autoencoder) -> tuple[mx.array, mx.array, mx.array]:
        reconstruction, kl = autoencoder_losses(autoencoder, images, latent_noise)
        return reconstruction + kl_weight * kl, reconstruction, kl

    (_, reconstruction, kl), grads = nn.value_and_grad(autoencoder, loss_fn)(autoencoder)
    optimizer.update(autoencoder, grads)
    return reconstruction, kl


def measure_latent_scale(
    autoencoder: Autoencoder, images: mx.array, latent_noise: mx.array
) -> float:
    """What makes the latents of these images have standard deviation 1: Rombach et al., app. G.

    Raises as :meth:`Autoencoder.encode`, and ValueError for latents that are all alike.
    """
    latents = reparametrise(*autoencoder.encode(images), latent_noise)
    deviation = float(latents.std())
    if not deviation > 0:
        raise ValueError("these images' latents are all alike: give more of them")
    return 1 / deviation


def drop_labels(labels: mx.array, drop: mx.array, null_label: int) -> mx.array:
    """Labels (B,) with ``null_label`` where ``drop`` (B,), booleans: Ho and Salimans, Algorithm 1.

    The loop draws ``drop``, true for 10 to 20 in 100. Raises ValueError for other shapes.
    """
    if drop.shape != labels.shape:
        raise ValueError(f"drop {list(drop.shape)} for labels {list(labels.shape)}")
    return mx.where(drop, null_label, labels)


def latent_loss(
    unet: UNet,
    autoencoder: Autoencoder,
    images: mx.array,
    latent_noise: mx.array,
    timesteps: mx.array,
    noise: mx.array,
    labels: mx.array,
    drop: mx.array,
    schedule: Schedule,
    latent_scale: float = 1.0,
) -> mx.array:
    """L_simple on the scaled latents of images (B, H, W, C): Rombach et al. Eq. 2, a scalar.

    ``latent_noise`` draws a latent for each image and ``noise`` is the diffusion's, both standard
    normal (B, h, w, latent_channels); ``timesteps`` and ``labels`` are (B,), and so is ``drop``, as
    in :func:`drop_labels`. The autoencoder gets no gradient, and the images neither. Raises as
    :func:`mlx_impl.diffusion.loss`, :meth:`Autoencoder.encode` and the U-Net.
    """
    latents = latent_scale * reparametrise(*autoencoder.encode(images), latent_noise)
    latents = mx.stop_gradient(latents)
    kept = drop_labels(labels, drop, unet.null_label)
    return loss(lambda x, t: unet(x, t, kept), schedule, latents, timesteps, noise)


def train_step(
    unet: UNet,
    autoencoder: Autoencoder,
    optimizer: optim.Optimizer,
    images: mx.array,
    latent_noise: mx.array,
    timesteps: mx.array,
    noise: mx.array,
    labels: mx.array,
    drop: mx.array,
    schedule: Schedule,
    latent_scale: float = 1.0,
) -> mx.array:
    """The second stage: one step of the U-Net on :func:`latent_loss`, which it returns."""

    def loss_fn(unet: UNet) -> mx.array:
        return latent_loss(
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

    value, grads = nn.value_and_grad(unet, loss_fn)(unet)
    optimizer.update(unet, grads)
    return value


def guided(unet: UNet, labels: mx.array, scale: float) -> Callable[[mx.array, mx.array], mx.array]:
    """The model that a sampler calls, with images of ``labels`` (B,) made more so.

    ``e(z) + scale * (e(z, c) - e(z))``: Ho and Salimans Eq. 6, with 1 + w for ``scale``. 0 leaves
    the labels out, 1 is the U-Net as it was trained, more trades variety for likeness. Both parts
    are one call, of twice the batch. Raises ValueError for a U-Net without classes.
    """
    both = mx.concatenate([labels, mx.full(labels.shape, unet.null_label, labels.dtype)])

    def model(x: mx.array, timesteps: mx.array) -> mx.array:
        predicted = unet(mx.concatenate([x, x]), mx.concatenate([timesteps, timesteps]), both)
        conditional, unconditional = predicted.split(2)
        return unconditional + scale * (conditional - unconditional)

    return model


def sample(
    unet: UNet,
    autoencoder: Autoencoder,
    schedule: Schedule,
    noise: mx.array,
    labels: mx.array,
    guidance_scale: float = 3.0,
    latent_scale: float = 1.0,
    step_noises: Iterable[mx.array] = (),
    eta: float = 0.0,
) -> mx.array:
    """Images (B, H, W, C) of ``labels`` (B,) from standard normal noise (B, h, w, latent_channels).

    DDIM in all steps of ``schedule``, usually a respaced one, then the decoder. ``step_noises`` and
    ``eta`` as in :func:`mlx_impl.diffusion.ddim_sample`; raises as that and :func:`guided`.
    """
    model = guided(unet, labels, guidance_scale)
    latents = ddim_sample(model, schedule, noise, step_noises, eta)
    return autoencoder.decode(latents / latent_scale)
