"""Document 000: the convolutional GAN."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

import mlx_impl.conv_gan
import reference.conv_gan
from mlx_impl.training import compile_step
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests.cases.common import Rng, normal, projection
from tests.strategies import batches, latent_dims


@st.composite
def conv_gans(draw: st.DrawFn) -> dict[str, Any]:
    """Height, width and channels all differ, in the image and in its quarter."""
    height, width = draw(st.permutations([1, 2, 3]))[:2]
    return {
        "batch": draw(batches),
        "latent_dim": draw(latent_dims),
        "width": draw(st.integers(1, 3)),
        "image_size": (4 * height, 4 * width),
        "channels": draw(st.integers(1, 3)),
    }


def _generator(lib: Any, shape: Shape) -> Any:
    return lib.Generator(
        shape["latent_dim"], shape["width"], shape["image_size"], shape["channels"]
    )


def _discriminator(lib: Any, shape: Shape) -> Any:
    return lib.Discriminator(shape["width"], shape["image_size"], shape["channels"])


def _image(rng: Rng, shape: Shape) -> np.ndarray:
    return rng.uniform(-1, 1, (shape["batch"], shape["channels"], *shape["image_size"]))


def _carry(shape: Shape) -> dict[str, dict[str, Any]]:
    height, width = shape["image_size"]
    chw = (2 * shape["width"], height // 4, width // 4)
    return {"generator": {"unflatten": {"fc": chw}}, "discriminator": {"flatten": {"fc": chw}}}


def conv_gan(lib: Any, shape: Shape) -> System:
    """The training system: both networks, both losses, the alternating step."""
    g, d = _generator(lib, shape), _discriminator(lib, shape)

    def d_loss(real: Any, noise: Any) -> Any:
        return lib.discriminator_loss(d(real), d(g(noise)))

    def g_loss(real: Any, noise: Any) -> Any:
        return lib.generator_loss_nonsaturating(d(g(noise)))

    return System(
        modules={"generator": g, "discriminator": d},
        forward=lambda real, noise: {"fake": g(noise), "logits": d(real)},
        losses={"d_loss": Loss(d_loss, ("discriminator",)), "g_loss": Loss(g_loss, ("generator",))},
        optimizers={"generator": lib.make_optimizer(g), "discriminator": lib.make_optimizer(d)},
        step=lib.train_step,
    )


GAN = Case(
    name="000 GAN",
    side="documented",
    shapes=conv_gans(),
    build=conv_gan,
    reference=reference.conv_gan,
    port=mlx_impl.conv_gan,
    inputs=lambda shape, rng: {
        "real": _image(rng, shape),
        "noise": normal(rng, shape["batch"], shape["latent_dim"]),
    },
    images=frozenset({"real", "fake"}),
    carry=_carry,
    compile_step=compile_step,
    cost=12,
    full_size={"latent_dim": 100, "width": 128, "image_size": (64, 64), "channels": 3},
)

GENERATOR = replace(
    GAN,
    name="000 generator",
    build=projection("generator", _generator),
    inputs=lambda shape, rng: {
        "x": normal(rng, shape["batch"], shape["latent_dim"]),
        "cotangent": normal(rng, *_image(rng, shape).shape),
    },
    images=frozenset({"output", "cotangent"}),
    compile_step=None,
    cost=5,
    samples=True,
)

DISCRIMINATOR = replace(
    GAN,
    name="000 discriminator",
    build=projection("discriminator", _discriminator),
    inputs=lambda shape, rng: {
        "x": _image(rng, shape),
        "cotangent": normal(rng, shape["batch"], 1),
    },
    images=frozenset({"x"}),
    compile_step=None,
    cost=5,
)

CASES = (GAN, GENERATOR, DISCRIMINATOR)
