"""DCGAN, the canonical form of document 000's GAN."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

import mlx_impl.dcgan
import reference.dcgan
from mlx_impl.training import compile_step
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests.cases.common import Rng, normal, projection
from tests.strategies import latent_dims


@st.composite
def dcgans(draw: st.DrawFn) -> dict[str, Any]:
    """One to three stages from a map of 1 x 2 to 3 x 2: height, width and channels all differ.

    BatchNorm needs four values a channel on the smallest map. It refuses one, and what it makes of
    two is +1 and -1 whatever they are: the gradient is rounding, and Adam would follow it.
    """
    height, width = draw(st.permutations([1, 2, 3]))[:2]
    stages = draw(st.integers(1, 3))
    factor = 2**stages
    size = (factor * height, factor * width)
    return {
        "batch": draw(st.integers(-(-4 // (height * width)), 4)),
        "latent_dim": draw(latent_dims),
        "width": draw(st.integers(1, 3)),
        "image_size": size,
        "channels": draw(st.integers(1, 3).filter(lambda c: c not in size)),
        "stages": stages,
    }


def _generator(lib: Any, shape: Shape) -> Any:
    return lib.Generator(
        shape["latent_dim"],
        shape["width"],
        shape["image_size"],
        shape["channels"],
        shape["stages"],
    )


def _discriminator(lib: Any, shape: Shape) -> Any:
    return lib.Discriminator(
        shape["width"], shape["image_size"], shape["channels"], shape["stages"]
    )


def _image(rng: Rng, shape: Shape) -> np.ndarray:
    return rng.uniform(-1, 1, (shape["batch"], shape["channels"], *shape["image_size"]))


def dcgan(lib: Any, shape: Shape) -> System:
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
    name="DCGAN",
    side="canonical",
    shapes=dcgans(),
    build=dcgan,
    reference=reference.dcgan,
    port=mlx_impl.dcgan,
    inputs=lambda shape, rng: {
        "real": _image(rng, shape),
        "noise": normal(rng, shape["batch"], shape["latent_dim"]),
    },
    images=frozenset({"real", "fake"}),
    compile_step=compile_step,
    cost=12,
    full_size={
        "latent_dim": 100,
        "width": 64,
        "image_size": (64, 64),
        "channels": 3,
        "stages": 4,
    },
)

GENERATOR = replace(
    GAN,
    name="DCGAN generator",
    build=projection("generator", _generator),
    inputs=lambda shape, rng: {
        "x": normal(rng, shape["batch"], shape["latent_dim"]),
        "cotangent": normal(rng, *_image(rng, shape).shape),
    },
    images=frozenset({"output", "cotangent"}),
    compile_step=None,
    cost=5,
)

DISCRIMINATOR = replace(
    GAN,
    name="DCGAN discriminator",
    build=projection("discriminator", _discriminator),
    inputs=lambda shape, rng: {
        "x": _image(rng, shape),
        "cotangent": normal(rng, shape["batch"], 1),
    },
    images=frozenset({"x"}),
    compile_step=None,
    cost=5,
)


def evaluated(case: Case, name: str, module: Any) -> Case:
    """``case`` in evaluation mode, where BatchNorm uses its running statistics."""
    return replace(
        case,
        name=f"{case.name} (eval)",
        samples=case is GENERATOR,
        build=projection(name, lambda lib, shape: module(lib, shape).eval()),
    )


CASES = (
    GAN,
    GENERATOR,
    DISCRIMINATOR,
    evaluated(GENERATOR, "generator", _generator),
    evaluated(DISCRIMINATOR, "discriminator", _discriminator),
)
