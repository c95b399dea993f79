"""What can be trained here: one entry of ``SYSTEMS`` for each system.

An entry says how its networks, optimizers and step are built from the settings of a run, what a
step draws besides images, and how images are drawn from what was trained. ``train.py`` and the
command line know systems only through this file.
"""

import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_impl import conv_gan, dcgan, diffusion, latent_diffusion, mlp_gan, unet
from mlx_impl.data import Dataset
from mlx_impl.training import CompiledModel

Settings = dict[str, Any]
"""A run's settings: the common ones, and its system's options, by name."""


@dataclass(frozen=True)
class Option:
    """A setting of one system or of its sampling: ``--name VALUE``, required if it is "needed"."""

    name: str
    default: Any
    help: str
    type: Callable[[str], Any] = int
    choices: tuple[Any, ...] | None = None


def natural(text: str) -> int:
    """A whole number from 0 on. The types of options raise ArgumentTypeError, and say why."""
    number = int(text)
    if number < 0:
        raise ArgumentTypeError(f"{text} is negative")
    return number


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"{text} is not at least 1")
    return number


def positives(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on: "1,2,2" as (1, 2, 2)."""
    return tuple(positive(part) for part in text.split(","))


def rate(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text} is not above 0")
    return number


def weight(text: str) -> float:
    """A number from 0 on."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise ArgumentTypeError(f"{text} is not a number from 0 on")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"{text} is not from 0 to 1")
    return number


natural.__name__ = positive.__name__ = "whole number"  # in argparse's "invalid ... value"
positives.__name__ = "list of whole numbers"
rate.__name__ = weight.__name__ = share.__name__ = "number"


NEEDED = "needed"
"""The default of an option that has none and must be given."""


@dataclass
class Training:
    """A system's state and what is done with it.

    modules, optimizers
        By name, in the order in which ``step`` takes them.
    step
        The pure step: ``step(*modules, *optimizers, *arrays)`` gives the losses.
    losses
        Their names.
    draw
        ``draw(key, images, labels)`` gives a step's ``arrays``: the images (B, H, W, C), and
        whatever is random. ``labels`` (B,) is None where the data has none.
    sample
        ``sample(key, n, **options)`` gives images (n, H, W, C) in [-1, 1].
    reconstruct
        In place of ``sample``, for what makes images of images (B, H, W, C).
    start
        What a new run does before its first step, for instance to load weights.
    compiled
        Whether ``sample`` compiles what it calls many times.
    """

    modules: dict[str, Any]
    optimizers: dict[str, Any]
    step: Callable[..., Any]
    losses: tuple[str, ...]
    draw: Callable[..., tuple[mx.array, ...]]
    sample: Callable[..., mx.array] | None = None
    reconstruct: Callable[[mx.array], mx.array] | None = None
    start: Callable[[], None] = lambda: None
    compiled: bool = True

    @property
    def parts(self) -> dict[str, Any]:
        """All that has a state, in the step's order."""
        return {**self.modules, **self.optimizers}


@dataclass(frozen=True)
class System:
    """A system's entry.

    build
        Gives the :class:`Training`. Raises ValueError for settings that cannot be.
    prepare
        Settings that follow from the others and from the data: ``prepare(settings, dataset)``.
        Raises ValueError.
    options, sampling
        The system's own settings, and those of its ``sample``.
    """

    about: str
    build: Callable[[Settings], Training]
    prepare: Callable[[Settings, Dataset], Settings] = lambda settings, dataset: {}
    options: tuple[Option, ...] = ()
    sampling: tuple[Option, ...] = ()
    image_size: tuple[int, int] = (28, 28)
    steps: int = 20_000
    batch_size: int = 64


LATENT_DIM = Option("latent_dim", 100, "length of the generator's noise", positive)


def adversarial(lib: ModuleType, settings: Settings, sizes: dict[str, Any]) -> Training:
    """A GAN whose module has Generator, Discriminator, make_optimizer and train_step."""
    sizes = sizes | {k: settings[k] for k in ("image_size", "channels")}
    latent_dim = settings["latent_dim"]
    generator = lib.Generator(latent_dim=latent_dim, **sizes)
    discriminator = lib.Discriminator(**sizes)

    generator.eval()
    discriminator.eval()
    discriminator(generator(mx.zeros((1, latent_dim))))  # ValueError where the sizes do not fit

    def draw(key: mx.array, images: mx.array, labels: mx.array | None) -> tuple[mx.array, ...]:
        return images, mx.random.normal((len(images), latent_dim), key=key)

    def sample(key: mx.array, n: int) -> mx.array:
        return generator(mx.random.normal((n, latent_dim), key=key))

    return Training(
        modules={"generator": generator, "discriminator": discriminator},
        optimizers={
            "optimizer_g": lib.make_optimizer(generator),
            "optimizer_d": lib.make_optimizer(discriminator),
        },
        step=lib.train_step,
        losses=("d_loss", "g_loss"),
        draw=draw,
        sample=sample,
    )


def _mlp_gan(settings: Settings) -> Training:
    widths = {"001": mlp_gan.DOCUMENT_001, "002": mlp_gan.DOCUMENT_002}[settings["document"]]
    return adversarial(mlp_gan, settings, {"widths": widths})


def _conv_gan(settings: Settings) -> Training:
    return adversarial(conv_gan, settings, {"width": settings["width"]})


def _dcgan(settings: Settings) -> Training:
    training = adversarial(dcgan, settings, {k: settings[k] for k in ("width", "stages")})
    for i, module in enumerate(training.modules.values()):
        dcgan.init_weights(module, settings["seed"] + i)
    return training


PROCESS = (
    Option("timesteps", 1000, "steps of noise", positive),
    Option("schedule", "linear", "how the noise grows", str, ("linear", "cosine")),
    Option("target", "epsilon", "what is predicted", str, diffusion.TARGETS),
    Option("ema_decay", None, "of the average that is sampled from (default: by length)", float),
)
SAMPLER = (
    Option("sampler", "ddim", "Song et al.'s or Ho et al.'s", str, ("ddim", "ddpm")),
    Option("steps", None, "from noise to image (default: 50 of ddim, all of ddpm)"),
    Option("spacing", "leading", "which of the timesteps", str, diffusion.SPACINGS),
    Option("eta", 0.0, "ddim's noise: from 0, none, to 1", float),
    Option("variance", None, "of ddpm's noise (default: beta_tilde)", str, diffusion.VARIANCES),
)


def averaging(settings: Settings, dataset: Dataset) -> Settings:
    """An average of about the last twentieth of the run, unless its decay is given.

    Ho et al.'s 0.9999 would still be half of untrained weights after 7,000 steps.
    """
    if settings["ema_decay"] is not None:
        return {}
    batches = max(len(dataset.images) // settings["batch_size"], 1)
    steps = settings["steps"] or settings["epochs"] * batches
    return {"ema_decay": max(0.0, 1 - 20 / steps)}


def schedule_of(settings: Settings) -> diffusion.Schedule:
    make = {"linear": diffusion.linear_schedule, "cosine": diffusion.cosine_schedule}
    return make[settings["schedule"]](settings["timesteps"])


def draw_samples(
    model: diffusion.Model,
    settings: Settings,
    key: mx.array,
    shape: tuple[int, ...],
    sampler: str = "ddim",
    steps: int | None = None,
    spacing: diffusion.Spacing = "leading",
    eta: float = 0.0,
    variance: diffusion.Variance | None = None,
) -> mx.array:
    """Samples of ``shape`` (B, H, W, C) by either sampler, in ``steps`` of the run's timesteps."""
    schedule = schedule_of(settings)
    if sampler == "ddpm" and eta:
        raise ValueError(f"eta is ddim's: leave it out with ddpm, got {eta}")
    if sampler == "ddim" and variance is not None:
        raise ValueError(f"variance is ddpm's: leave it out with ddim, got {variance}")
    if steps is None:
        steps = len(schedule) if sampler == "ddpm" else min(50, len(schedule))
    schedule = schedule.respaced(steps, spacing)
    keys = iter(mx.random.split(key, len(schedule)))
    noise = mx.random.normal(shape, key=next(keys))
    noises = (mx.random.normal(shape, key=k) for k in keys)
    kind = {"target": settings["target"], "clip_x0": True}
    if sampler == "ddpm":
        variance = variance or "beta_tilde"
        return diffusion.ddpm_sample(model, schedule, noise, noises, variance, **kind)
    return diffusion.ddim_sample(model, schedule, noise, noises, eta, **kind)


def denoising(model: nn.Module, settings: Settings) -> Training:
    """A denoiser of images, and the average of its weights that is sampled from."""
    schedule, ema = schedule_of(settings), diffusion.EMA(model, settings["ema_decay"])
    image = (*settings["image_size"], settings["channels"])
    model(mx.zeros((1, *image)), mx.zeros(1, mx.int32))  # ValueError where the sizes do not fit

    def draw(key: mx.array, images: mx.array, labels: mx.array | None) -> tuple[mx.array, ...]:
        for_noise, for_timesteps = mx.random.split(key)
        timesteps = mx.random.randint(0, len(schedule), (len(images),), key=for_timesteps)
        return images, timesteps, mx.random.normal(images.shape, key=for_noise)

    compiled = CompiledModel(ema.average)

    def sample(key: mx.array, n: int, **options: Any) -> mx.array:
        average = compiled if training.compiled else ema.average
        return draw_samples(average, settings, key, (n, *image), **options)

    training = Training(
        modules={"model": model, "ema": ema},
        optimizers={"optimizer": diffusion.make_optimizer(model)},
        step=partial(diffusion.ema_train_step, schedule=schedule, target=settings["target"]),
        losses=("loss",),
        draw=draw,
        sample=sample,
    )
    return training


def _denoiser(settings: Settings) -> Training:
    model = diffusion.Denoiser(settings["channels"], settings["width"])
    return denoising(model, settings)


def _unet(settings: Settings) -> Training:
    return denoising(unet_of(settings, settings["image_size"], settings["channels"]), settings)


def unet_of(
    settings: Settings, size: tuple[int, int], channels: int, num_classes: int | None = None
) -> unet.UNet:
    """A U-Net for (B, *size, channels), with attention where the image is halved once."""
    return unet.UNet(
        channels,
        settings["width"],
        settings["multipliers"],
        settings["blocks"],
        attention_resolutions=(min(size) // 2,) if len(settings["multipliers"]) > 1 else (),
        image_size=min(size),
        groups=settings["groups"],
        num_classes=num_classes,
    )


UNET = (
    Option("width", 64, "channels at the image's own size", positive),
    Option("multipliers", (1, 2, 2), "of the width, for each size; each halves", positives),
    Option("blocks", 2, "residual blocks at each size", positive),
    Option("groups", 32, "of channels that are normalised together", positive),
)


def _autoencoder(settings: Settings) -> Training:
    model = latent_diffusion.Autoencoder(
        settings["channels"],
        settings["latent_channels"],
        settings["width"],
        settings["multipliers"],
        settings["groups"],
    )
    mean, _ = model.encode(mx.zeros((1, *settings["image_size"], settings["channels"])))

    def draw(key: mx.array, images: mx.array, labels: mx.array | None) -> tuple[mx.array, ...]:
        return images, mx.random.normal((len(images), *mean.shape[1:]), key=key)

    return Training(
        modules={"autoencoder": model},
        optimizers={"optimizer": latent_diffusion.make_optimizer(model)},
        step=partial(latent_diffusion.autoencoder_train_step, kl_weight=settings["kl_weight"]),
        losses=("reconstruction", "kl"),
        draw=draw,
        reconstruct=lambda images: model.decode(model.encode(images)[0]),
    )


def _of_autoencoder(settings: Settings, dataset: Dataset) -> Settings:
    """The settings of the autoencoder's run, and the scale of its latents of the data."""
    theirs, autoencoder = _trained_autoencoder(settings["autoencoder"])
    for name in ("image_size", "channels"):
        if theirs[name] != settings[name]:
            raise ValueError(
                f"{settings['autoencoder']} was trained with {name} {theirs[name]}, but here it is "
                f"{settings[name]}"
            )
    if dataset.labels is None:
        raise ValueError("latent diffusion is told a class of each image, and these have no labels")
    images = mx.array(dataset.images[:512])
    mean, _ = autoencoder.encode(images)
    noise = mx.random.normal(mean.shape, key=mx.random.key(settings["seed"]))
    return averaging(settings, dataset) | {
        "autoencoder": os.path.abspath(settings["autoencoder"]),
        "autoencoder_settings": theirs,
        "latent_scale": latent_diffusion.measure_latent_scale(autoencoder, images, noise),
    }


def _trained_autoencoder(run: str) -> tuple[Settings, latent_diffusion.Autoencoder]:
    from mlx_impl.train import Refused, Run, restore

    try:
        settings, training = restore(Run(run))
    except Refused as error:
        raise ValueError(f"--autoencoder: {error}") from error
    if settings["system"] != "autoencoder":
        raise ValueError(f"--autoencoder: {run} is a run of {settings['system']}")
    return settings, training.modules["autoencoder"]


def _latent_diffusion(settings: Settings) -> Training:
    classes, scale, schedule = settings["classes"], settings["latent_scale"], schedule_of(settings)
    autoencoder = _autoencoder(settings["autoencoder_settings"]).modules["autoencoder"]
    image = (*settings["image_size"], settings["channels"])
    latent = autoencoder.encode(mx.zeros((1, *image)))[0].shape[1:]
    model = unet_of(settings, latent[:2], latent[2], classes)
    ema = diffusion.EMA(model, settings["ema_decay"])
    model(mx.zeros((1, *latent)), mx.zeros(1, mx.int32), mx.zeros(1, mx.int32))  # do sizes fit?

    def start() -> None:
        _, trained = _trained_autoencoder(settings["autoencoder"])
        autoencoder.update(trained.parameters())

    def draw(key: mx.array, images: mx.array, labels: mx.array) -> tuple[mx.array, ...]:
        b, keys = len(images), mx.random.split(key, 4)
        return (
            images,
            mx.random.normal((b, *latent), key=keys[0]),
            mx.random.randint(0, len(schedule), (b,), key=keys[1]),
            mx.random.normal((b, *latent), key=keys[2]),
            labels,
            mx.random.uniform(shape=(b,), key=keys[3]) < settings["drop"],
        )

    train_step = partial(latent_diffusion.train_step, schedule=schedule, latent_scale=scale)
    compiled = CompiledModel(ema.average)

    def step(model: Any, autoencoder: Any, ema: Any, optimizer: Any, *arrays: mx.array) -> mx.array:
        loss = train_step(model, autoencoder, optimizer, *arrays)
        ema.update_parameters(model)
        return loss

    def sample(
        key: mx.array,
        n: int,
        class_: int | None = None,
        guidance: float = 3.0,
        steps: int | None = None,
        spacing: diffusion.Spacing = "leading",
        eta: float = 0.0,
    ) -> mx.array:
        if class_ is not None and not 0 <= class_ < classes:
            raise ValueError(f"class must be from 0 to {classes - 1}, got {class_}")
        labels = mx.arange(n) % classes if class_ is None else mx.full((n,), class_)
        spaced = schedule.respaced(min(50, len(schedule)) if steps is None else steps, spacing)
        keys = iter(mx.random.split(key, len(spaced)))
        noise = mx.random.normal((n, *latent), key=next(keys))
        noises = (mx.random.normal(noise.shape, key=k) for k in keys)
        average: Any = compiled if training.compiled else ema.average
        return latent_diffusion.sample(
            average, autoencoder, spaced, noise, labels, guidance, scale, noises, eta
        )

    training = Training(
        modules={"model": model, "autoencoder": autoencoder, "ema": ema},
        optimizers={"optimizer": latent_diffusion.make_optimizer(model)},
        step=step,
        losses=("loss",),
        draw=draw,
        sample=sample,
        start=start,
    )
    return training


SYSTEMS: dict[str, System] = {
    "mlp-gan": System(
        about="fully connected GAN of documents 001 and 002",
        build=_mlp_gan,
        options=(
            Option("document", "002", "whose widths", type=str, choices=("001", "002")),
            LATENT_DIM,
        ),
    ),
    "conv-gan": System(
        about="convolutional GAN of document 000",
        build=_conv_gan,
        options=(Option("width", 128, "channels before the image", positive), LATENT_DIM),
    ),
    "dcgan": System(
        about="DCGAN (Radford et al. 2016), document 000's canonical form",
        build=_dcgan,
        options=(
            Option("width", 64, "channels before the image", positive),
            Option("stages", 2, "how often the size is halved; 4 for 64x64", positive),
            LATENT_DIM,
        ),
    ),
    "diffusion": System(
        about="diffusion with document 004's two convolutions",
        build=_denoiser,
        prepare=averaging,
        options=(Option("width", 128, "channels between the convolutions", positive), *PROCESS),
        sampling=SAMPLER,
    ),
    "unet": System(
        about="diffusion with the U-Net of Ho et al. 2020, document 004's canonical form",
        build=_unet,
        prepare=averaging,
        options=(*UNET, *PROCESS),
        sampling=SAMPLER,
    ),
    "autoencoder": System(
        about="first stage of latent diffusion: images to latents and back",
        build=_autoencoder,
        options=(
            Option("latent_channels", 4, "of a latent", positive),
            Option("width", 32, "channels at the image's own size", positive),
            Option("multipliers", (1, 2, 2), "of the width, for each size; each halves", positives),
            Option("groups", 8, "of channels that are normalised together", positive),
            Option("kl_weight", latent_diffusion.KL_WEIGHT, "of the latents' divergence", weight),
        ),
        image_size=(32, 32),
    ),
    "latent-diffusion": System(
        about="latent diffusion with classes (Rombach et al. 2022), small",
        build=_latent_diffusion,
        prepare=_of_autoencoder,
        options=(
            Option("autoencoder", NEEDED, "folder of the autoencoder's run", str),
            Option("width", 64, "channels at the latents' own size", positive),
            Option("multipliers", (1, 2), "of the width, for each size; each halves", positives),
            Option("blocks", 1, "residual blocks at each size", positive),
            Option("groups", 16, "of channels that are normalised together", positive),
            Option("drop", 0.1, "share of images whose class is kept back", share),
            *(option for option in PROCESS if option.name != "target"),
        ),
        sampling=(
            Option("class_", None, "which (default: each in turn)"),
            Option("guidance", 3.0, "how much more like its class; 1: as trained", weight),
            *(option for option in SAMPLER if option.name in ("steps", "spacing", "eta")),
        ),
        image_size=(32, 32),
    ),
}
