"""What can be trained here: one entry of ``SYSTEMS`` for each system.

An entry says how its networks, optimizers and step are built from the settings of a run, what a
step draws besides images, and how images are drawn from what was trained. ``train.py`` and the
command line know systems only through this file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_impl import conv_gan, dcgan, diffusion, mlp_gan
from mlx_impl.data import Dataset

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
    """

    modules: dict[str, Any]
    optimizers: dict[str, Any]
    step: Callable[..., Any]
    losses: tuple[str, ...]
    draw: Callable[..., tuple[mx.array, ...]]
    sample: Callable[..., mx.array] | None = None
    reconstruct: Callable[[mx.array], mx.array] | None = None
    start: Callable[[], None] = lambda: None

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


LATENT_DIM = Option("latent_dim", 100, "length of the generator's noise")


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
    Option("timesteps", 1000, "steps of noise"),
    Option("schedule", "linear", "how the noise grows", str, ("linear", "cosine")),
    Option("target", "epsilon", "what is predicted", str, diffusion.TARGETS),
    Option("ema_decay", 0.999, "of the running average that is sampled from", float),
)
SAMPLER = (
    Option("sampler", "ddim", "Song et al.'s or Ho et al.'s", str, ("ddim", "ddpm")),
    Option("steps", None, "from noise to image (default: 50 of ddim, all of ddpm)"),
    Option("eta", 0.0, "ddim's noise: from 0, none, to 1", float),
)


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
    eta: float = 0.0,
) -> mx.array:
    """Samples of ``shape`` (B, H, W, C) by either sampler, in ``steps`` of the run's timesteps."""
    schedule = schedule_of(settings)
    if sampler == "ddpm" and eta:
        raise ValueError(f"eta is ddim's: leave it out with ddpm, got {eta}")
    if steps is None:
        steps = len(schedule) if sampler == "ddpm" else min(50, len(schedule))
    schedule = schedule.respaced(steps)
    keys = iter(mx.random.split(key, len(schedule)))
    noise = mx.random.normal(shape, key=next(keys))
    noises = (mx.random.normal(shape, key=k) for k in keys)
    kind = {"target": settings["target"], "clip_x0": True}
    if sampler == "ddpm":
        return diffusion.ddpm_sample(model, schedule, noise, noises, **kind)
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

    def sample(key: mx.array, n: int, **options: Any) -> mx.array:
        return draw_samples(ema, settings, key, (n, *image), **options)

    return Training(
        modules={"model": model, "ema": ema},
        optimizers={"optimizer": diffusion.make_optimizer(model)},
        step=partial(diffusion.ema_train_step, schedule=schedule, target=settings["target"]),
        losses=("loss",),
        draw=draw,
        sample=sample,
    )


def _denoiser(settings: Settings) -> Training:
    model = diffusion.Denoiser(settings["channels"], settings["width"])
    return denoising(model, settings)


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
        options=(Option("width", 128, "channels before the image"), LATENT_DIM),
    ),
    "dcgan": System(
        about="DCGAN (Radford et al. 2016), document 000's canonical form",
        build=_dcgan,
        options=(
            Option("width", 64, "channels before the image"),
            Option("stages", 2, "how often the size is halved; 4 for 64x64"),
            LATENT_DIM,
        ),
    ),
    "diffusion": System(
        about="diffusion with document 004's two convolutions",
        build=_denoiser,
        options=(Option("width", 128, "channels between the convolutions"), *PROCESS),
        sampling=SAMPLER,
    ),
}
