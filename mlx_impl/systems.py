"""What can be trained here: one entry of ``SYSTEMS`` for each system.

An entry says how its networks, optimizers and step are built from the settings of a run, what a
step draws besides images, and how images are drawn from what was trained. ``train.py`` and the
command line know systems only through this file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_impl import mlp_gan

Settings = dict[str, Any]
"""A run's settings: the common ones, and its system's options, by name."""


@dataclass(frozen=True)
class Option:
    """A setting of one system or of its sampling: ``--name VALUE``."""

    name: str
    default: Any
    help: str
    type: Callable[[str], Any] = int
    choices: tuple[Any, ...] | None = None


@dataclass
class Training:
    """A system's state and what is done with it.

    modules, optimizers, others
        By name, in the order in which ``step`` takes them; ``others`` have a ``state`` too.
    step
        The pure step: ``step(*modules, *optimizers, *others, *arrays)`` gives the losses.
    losses
        Their names.
    draw
        ``draw(key, images, labels)`` gives a step's ``arrays``: the images (B, H, W, C), and
        whatever is random. ``labels`` (B,) is None where the data has none.
    sample
        ``sample(key, n, **options)`` gives images (n, H, W, C) in [-1, 1].
    """

    modules: dict[str, Any]
    optimizers: dict[str, Any]
    step: Callable[..., Any]
    losses: tuple[str, ...]
    draw: Callable[..., tuple[mx.array, ...]]
    sample: Callable[..., mx.array]

    @property
    def parts(self) -> dict[str, Any]:
        """All that has a state, in the step's order."""
        return {**self.modules, **self.optimizers}


@dataclass(frozen=True)
class System:
    """A system's entry.

    build
        Gives the :class:`Training`. Raises ValueError for settings that cannot be.
    options, sampling
        The system's own settings, and those of its ``sample``.
    """

    about: str
    build: Callable[[Settings], Training]
    options: tuple[Option, ...] = ()
    sampling: tuple[Option, ...] = ()
    image_size: tuple[int, int] = (28, 28)
    epochs: int = 100
    batch_size: int = 64
    preview_every: int = 1


LATENT_DIM = Option("latent_dim", 100, "length of the generator's noise")


def adversarial(
    lib: ModuleType, settings: Settings, sizes: dict[str, Any], generator_sizes: dict[str, Any]
) -> Training:
    """A GAN whose module has Generator, Discriminator, make_optimizer and train_step."""
    sizes = sizes | {k: settings[k] for k in ("image_size", "channels")}
    latent_dim = settings["latent_dim"]
    generator = lib.Generator(latent_dim=latent_dim, **generator_sizes, **sizes)
    discriminator = lib.Discriminator(**sizes)

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
    return adversarial(mlp_gan, settings, {"widths": widths}, {})


SYSTEMS: dict[str, System] = {
    "mlp-gan": System(
        about="fully connected GAN of documents 001 and 002",
        build=_mlp_gan,
        options=(
            Option("document", "002", "whose widths", type=str, choices=("001", "002")),
            LATENT_DIM,
        ),
    ),
}
