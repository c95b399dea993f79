"""Every model, loss and training system, on both sides: what tests, the parity card and the
benchmarks iterate over. A new model is one entry in ``CASES``.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

import mlx_impl.losses
import mlx_impl.mlp_gan
import reference.losses
import reference.mlp_gan
from mlx_impl.training import compile_step
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests import strategies

Rng = np.random.Generator
Arrays = dict[str, np.ndarray]


def seed(case: Case, share: int) -> int:
    """Of one share of a case's shapes: the same in every run, another for each case."""
    return zlib.crc32(f"{case.name} {share}".encode())


def normal(rng: Rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


# ------------------------------------------------------------------- 001 and 002: fully connected


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


def _model(name: str, module: Callable[[Any, Shape], Any]) -> Callable[[Any, Shape], System]:
    """A network alone; its loss is its output against a drawn cotangent, so no gradient hides."""

    def build(lib: Any, shape: Shape) -> System:
        m = module(lib, shape)
        return System(
            modules={name: m},
            forward=lambda x, cotangent: {"output": m(x)},
            losses={"projection": Loss(lambda x, cotangent: (m(x) * cotangent).sum(), (name,))},
        )

    return build


def generator_case(case: Case) -> Case:
    return replace(
        case,
        name=case.name.replace("GAN", "generator"),
        build=_model("generator", _generator),
        inputs=lambda shape, rng: {
            "x": normal(rng, shape["batch"], shape["latent_dim"]),
            "cotangent": normal(rng, *_image(rng, shape).shape),
        },
        images=frozenset({"output", "cotangent"}),
        compile_step=None,
    )


def discriminator_case(case: Case) -> Case:
    return replace(
        case,
        name=case.name.replace("GAN", "discriminator"),
        build=_model("discriminator", _discriminator),
        inputs=lambda shape, rng: {
            "x": _image(rng, shape),
            "cotangent": normal(rng, shape["batch"], 1),
        },
        images=frozenset({"x"}),
        compile_step=None,
    )


# ------------------------------------------------------------------------------------------ losses


def loss_case(name: str, inputs: Callable[[int, Rng], Arrays]) -> Case:
    """A loss of ``losses.py``, called with ``inputs(batch, rng)``."""

    def build(lib: Any, shape: Shape) -> System:
        return System(losses={name: Loss(lambda **arrays: getattr(lib, name)(*arrays.values()))})

    return Case(
        name=name,
        side="canonical",
        shapes=strategies.losses,
        build=build,
        reference=reference.losses,
        port=mlx_impl.losses,
        inputs=lambda shape, rng: inputs(shape["batch"], rng),
    )


def _logits(n: int, rng: Rng) -> np.ndarray:
    return 4 * normal(rng, n, 1)


LOSSES = (
    loss_case(
        "bce_with_logits",
        lambda n, rng: {"logits": _logits(n, rng), "targets": rng.uniform(0.1, 0.9, (n, 1))},
    ),
    loss_case(
        "bce_from_probabilities",
        lambda n, rng: {
            "probabilities": rng.uniform(0.02, 0.98, (n, 1)),
            "targets": rng.uniform(0.1, 0.9, (n, 1)),
        },
    ),
    loss_case(
        "discriminator_loss",
        lambda n, rng: {"real_logits": _logits(n, rng), "fake_logits": _logits(n, rng)},
    ),
    loss_case("generator_loss_nonsaturating", lambda n, rng: {"fake_logits": _logits(n, rng)}),
    loss_case("generator_loss_minimax", lambda n, rng: {"fake_logits": _logits(n, rng)}),
    loss_case(
        "two_logit_loss",
        lambda n, rng: {"logits": 4 * normal(rng, n, 2), "labels": rng.integers(0, 2, n)},
    ),
)

SYSTEMS = (
    mlp_gan_case("001", reference.mlp_gan.DOCUMENT_001),
    mlp_gan_case("002", reference.mlp_gan.DOCUMENT_002),
)
"""The training systems: what the benchmarks time."""

CASES = (
    *SYSTEMS,
    *(make(case) for case in SYSTEMS for make in (generator_case, discriminator_case)),
    *LOSSES,
)
