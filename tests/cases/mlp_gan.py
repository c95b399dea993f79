"""Documents 001 and 002: the fully connected GAN."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

import mlx_impl.mlp_gan
import reference.mlp_gan
from mlx_impl.training import compile_step
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests import strategies
from tests.cases.common import Rng, normal, projection


def _generator(lib: Any, shape: Shape) -> Any:
    return lib.Generator(
        shape["latent_dim"], shape["widths"], shape["image_size"], shape["channels"]
    )


def _discriminator(lib: Any, shape: Shape) -> Any:
    return lib.Discriminator(shape["widths"], shape["image_size"], shape["channels"])


def _image(rng: Rng, shape: Shape) -> np.ndarray:
    return rng.uniform(-1, 1, (shape["batch"], shape["channels"], *shape["image_size"]))


def _mlp_gan_carry(shape: Shape) -> dict[str, dict[str, Any]]:
    chw = (shape["channels"], *shape["image_size"])
    return {
        "generator": {"unflatten": {"fc4": chw}},
        "discriminator": {"flatten": {"fc1": chw}},
    }


def mlp_gan(lib: Any, shape: Shape) -> System:
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


def mlp_gan_case(document: str, widths: tuple[int, int, int]) -> Case:
    """``document``'s system; one drawn shape in eight has its own proportions, 1 : 2 : 4."""
    scaled = st.integers(1, 4).map(lambda w: tuple(w * a // widths[0] for a in widths))
    shapes = st.builds(
        lambda shape, own, take: {**shape, "widths": own if take else shape["widths"]},
        strategies.mlp_gans(),
        scaled,
        st.integers(0, 7).map(lambda i: i == 7),
    )
    return Case(
        name=f"{document} GAN",
        side="documented",
        shapes=shapes,
        build=mlp_gan,
        reference=reference.mlp_gan,
        port=mlx_impl.mlp_gan,
        inputs=lambda shape, rng: {
            "real": _image(rng, shape),
            "noise": normal(rng, shape["batch"], shape["latent_dim"]),
        },
        images=frozenset({"real", "fake"}),
        carry=_mlp_gan_carry,
        compile_step=compile_step,
        full_size={"latent_dim": 100, "widths": widths, "image_size": (28, 28), "channels": 1},
    )


def generator_case(case: Case) -> Case:
    return replace(
        case,
        name=case.name.replace("GAN", "generator"),
        build=projection("generator", _generator),
        inputs=lambda shape, rng: {
            "x": normal(rng, shape["batch"], shape["latent_dim"]),
            "cotangent": normal(rng, *_image(rng, shape).shape),
        },
        images=frozenset({"output", "cotangent"}),
        compile_step=None,
        samples=True,
    )


def discriminator_case(case: Case) -> Case:
    return replace(
        case,
        name=case.name.replace("GAN", "discriminator"),
        build=projection("discriminator", _discriminator),
        inputs=lambda shape, rng: {
            "x": _image(rng, shape),
            "cotangent": normal(rng, shape["batch"], 1),
        },
        images=frozenset({"x"}),
        compile_step=None,
    )


SYSTEMS = (
    mlp_gan_case("001", reference.mlp_gan.DOCUMENT_001),
    mlp_gan_case("002", reference.mlp_gan.DOCUMENT_002),
)

CASES = (
    *SYSTEMS,
    *(make(case) for case in SYSTEMS for make in (generator_case, discriminator_case)),
)
