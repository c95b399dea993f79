"""Latent diffusion: the autoencoder, the U-Net that learns its latents, and guidance by classes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

import mlx_impl.latent_diffusion
import reference.latent_diffusion
from mlx_impl.training import compile_step
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests.cases.common import Arrays, Rng, normal

SMALLEST = ((1, 2), (2, 1), (1, 3), (3, 2), (2, 3))
"""Heights and widths of latents: never one pixel, of which group normalisation leaves nothing."""


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """An autoencoder, and a U-Net of one level that takes its latents.

    As in the U-Net's own case, a group has two channels or more.
    """
    multipliers = draw(st.sampled_from([(1,), (2,), (1, 2), (2, 1)]))
    height, width = draw(st.sampled_from(SMALLEST))
    factor = 2 ** (len(multipliers) - 1)
    image_size = (height * factor, width * factor)
    return {
        "batch": draw(st.integers(1, 3)),
        "image_size": image_size,
        "image_channels": draw(st.integers(1, 3).filter(lambda c: c not in image_size)),
        "latent_channels": draw(st.integers(1, 3).filter(lambda c: c not in (height, width))),
        "autoencoder_channels": 2 * draw(st.integers(2, 3)),
        "autoencoder_multipliers": multipliers,
        "autoencoder_groups": draw(st.integers(1, 2)),
        "kl_weight": draw(st.sampled_from([1e-6, 0.1, 1.0])),
        "channels": 2 * draw(st.integers(2, 3)),
        "channel_multipliers": (draw(st.integers(1, 2)),),
        "num_res_blocks": 1,
        "attention_resolutions": (height,) if draw(st.booleans()) else (),
        "groups": draw(st.integers(1, 2)),
        "num_classes": draw(st.integers(1, 4)),
        "timesteps": draw(st.integers(1, 1000)),
        "latent_scale": draw(st.sampled_from([0.2, 1.5])),
        "guidance_scale": draw(st.sampled_from([0.0, 1.0, 3.0])),
    }


def autoencoder(lib: Any, shape: Shape) -> Any:
    return lib.Autoencoder(
        shape["image_channels"],
        shape["latent_channels"],
        shape["autoencoder_channels"],
        shape["autoencoder_multipliers"],
        shape["autoencoder_groups"],
    )


def _latent_shape(shape: Shape) -> tuple[int, int, int, int]:
    factor = 2 ** (len(shape["autoencoder_multipliers"]) - 1)
    height, width = (size // factor for size in shape["image_size"])
    return shape["batch"], shape["latent_channels"], height, width


def unet(lib: Any, shape: Shape) -> Any:
    return lib.UNet(
        shape["latent_channels"],
        shape["channels"],
        shape["channel_multipliers"],
        shape["num_res_blocks"],
        shape["attention_resolutions"],
        _latent_shape(shape)[2],
        shape["groups"],
        shape["num_classes"],
    )


def _autoencoder(lib: Any, shape: Shape) -> System:
    """The first stage: what it is made of, and its training step."""
    m = autoencoder(lib, shape)

    def forward(images: Any, latent_noise: Any) -> Any:
        mean, log_variance = m.encode(images)
        latents = lib.reparametrise(mean, log_variance, latent_noise)
        return {
            "mean": mean,
            "log_variance": log_variance,
            "latents": latents,
            "reconstruction": m.decode(latents),
        }

    def part(i: int) -> Loss:
        return Loss(lambda **inputs: lib.autoencoder_losses(m, **inputs)[i], ("autoencoder",))

    return System(
        modules={"autoencoder": m},
        forward=forward,
        losses={"reconstruction loss": part(0), "KL": part(1)},
        optimizers={"autoencoder": lib.make_optimizer(m)},
        step=lambda *state_and_inputs: lib.autoencoder_train_step(
            *state_and_inputs, shape["kl_weight"]
        ),
    )


def _latent_diffusion(lib: Any, shape: Shape) -> System:
    """The second stage: the U-Net's training step on the latents of a trained autoencoder."""
    u, a = unet(lib, shape), autoencoder(lib, shape)
    settings = {
        "schedule": lib.Schedule(np.linspace(1e-4, 0.02, shape["timesteps"])),
        "latent_scale": shape["latent_scale"],
    }

    def predict(noise: Any, timesteps: Any, labels: Any, **_: Any) -> Any:
        return {"output": u(noise, timesteps, labels)}

    def loss(**inputs: Any) -> Any:
        return lib.latent_loss(u, a, *inputs.values(), **settings)

    return System(
        modules={"unet": u, "autoencoder": a},
        forward=predict,
        losses={"loss": Loss(loss, ("unet",))},
        optimizers={"unet": lib.make_optimizer(u)},
        step=lambda *state_and_inputs: (lib.train_step(*state_and_inputs, **settings),),
    )


def _guidance(lib: Any, shape: Shape) -> System:
    """The guided prediction, against a drawn cotangent."""
    u = unet(lib, shape)

    def predict(latents: Any, timesteps: Any, labels: Any) -> Any:
        return lib.guided(u, labels, shape["guidance_scale"])(latents, timesteps)

    return System(
        modules={"unet": u},
        forward=lambda cotangent, **inputs: {"output": predict(**inputs)},
        losses={
            "projection": Loss(
                lambda cotangent, **inputs: (predict(**inputs) * cotangent).sum(), ("unet",)
            )
        },
    )


def _images(shape: Shape, rng: Rng) -> Arrays:
    size = (shape["batch"], shape["image_channels"], *shape["image_size"])
    return {
        "images": rng.uniform(-1, 1, size),
        "latent_noise": normal(rng, *_latent_shape(shape)),
    }


def _labelled(shape: Shape, rng: Rng) -> Arrays:
    return {
        **_images(shape, rng),
        "timesteps": rng.integers(0, shape["timesteps"], shape["batch"]),
        "noise": normal(rng, *_latent_shape(shape)),
        "labels": rng.integers(0, shape["num_classes"], shape["batch"]),
        "drop": rng.random(shape["batch"]) < 0.3,
    }


def _latents(shape: Shape, rng: Rng) -> Arrays:
    return {
        "latents": normal(rng, *_latent_shape(shape)),
        "timesteps": rng.integers(0, shape["timesteps"], shape["batch"]),
        "labels": rng.integers(0, shape["num_classes"], shape["batch"]),
        "cotangent": normal(rng, *_latent_shape(shape)),
    }


def case(
    name: str,
    build: Callable[[Any, Shape], System],
    inputs: Callable[[Shape, Rng], Arrays],
    cost: int,
) -> Case:
    return Case(
        name=name,
        side="canonical",
        shapes=shapes(),
        build=build,
        reference=reference.latent_diffusion,
        port=mlx_impl.latent_diffusion,
        inputs=inputs,
        images=frozenset(
            {"images", "latent_noise", "noise", "latents", "cotangent", "output"}
            | {"mean", "log_variance", "reconstruction"}
        ),
        cost=cost,
    )


DIGITS = {
    "image_size": (32, 32),
    "image_channels": 1,
    "latent_channels": 4,
    "autoencoder_channels": 32,
    "autoencoder_multipliers": (1, 2, 2),
    "autoencoder_groups": 8,
    "kl_weight": reference.latent_diffusion.KL_WEIGHT,
    "channels": 64,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "groups": 16,
    "num_classes": 10,
    "timesteps": 1000,
    "latent_scale": 1.0,
    "guidance_scale": 3.0,
}

SYSTEMS = tuple(
    replace(case, compile_step=compile_step, full_size=DIGITS)
    for case in (
        case("latent diffusion, autoencoder", _autoencoder, _images, cost=50),
        case("latent diffusion", _latent_diffusion, _labelled, cost=100),
    )
)

GUIDANCE = replace(
    case("latent diffusion, guidance", _guidance, _latents, cost=100),
    samples=True,  # what a step of DDIM on the latents costs
    full_size=DIGITS,
)

CASES = (*SYSTEMS, GUIDANCE)
