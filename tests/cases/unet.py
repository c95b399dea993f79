"""The U-Net of denoising diffusion, alone and in training."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st

import mlx_impl.diffusion
import mlx_impl.unet
import reference.diffusion
import reference.unet
from mlx_impl.training import compile_step
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests.cases.common import Arrays, Rng, normal

MULTIPLIERS = ((1,), (2,), (1, 2), (2, 1))


@st.composite
def unets(
    draw: st.DrawFn, levels: int = 2, num_res_blocks: int = 2, classes: bool = True
) -> dict[str, Any]:
    """Tiny networks of up to so many levels and blocks, attention at the first level or nowhere
    but in the middle, classes or none.

    A group has two channels or more: with one, group normalisation would undo the bias of the
    convolution before it, whose gradient would then be nothing but rounding. For the same reason
    the smallest feature map has more than one pixel.
    """
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(2, 3)) if groups > 1 else draw(st.integers(4, 6))
    multipliers = draw(st.sampled_from([m for m in MULTIPLIERS if len(m) <= levels]))
    scale = 2 ** (len(multipliers) - 1)
    height, width = draw(st.sampled_from([(1, 2), (2, 1), (1, 3), (3, 2), (2, 3)]))
    return {
        "batch": draw(st.integers(1, 3)),
        "in_channels": draw(st.integers(1, 3).filter(lambda c: c not in (height, width))),
        "channels": channels,
        "channel_multipliers": multipliers,
        "num_res_blocks": draw(st.integers(1, num_res_blocks)),
        "attention_resolutions": (height * scale,) if draw(st.booleans()) else (),
        "groups": groups,
        "image_size": (height * scale, width * scale),
        "num_classes": draw(st.integers(0, 4)) if classes else 0,
    }


def unet(lib: Any, shape: Shape) -> Any:
    return lib.UNet(
        shape["in_channels"],
        shape["channels"],
        shape["channel_multipliers"],
        shape["num_res_blocks"],
        shape["attention_resolutions"],
        shape["image_size"][0],
        shape["groups"],
        shape["num_classes"] or None,
    )


def _projection(lib: Any, shape: Shape) -> System:
    """The network alone, against a drawn cotangent; labels only where it has classes."""
    m = unet(lib, shape)

    def project(cotangent: Any, **inputs: Any) -> Any:
        return (m(**inputs) * cotangent).sum()

    return System(
        modules={"unet": m},
        forward=lambda cotangent, **inputs: {"output": m(**inputs)},
        losses={"projection": Loss(project, ("unet",))},
    )


def _inputs(shape: Shape, rng: Rng) -> Arrays:
    batch = shape["batch"]
    image = (batch, shape["in_channels"], *shape["image_size"])
    inputs = {
        "x": normal(rng, *image),
        "timesteps": rng.integers(0, 1000, batch),
        "cotangent": normal(rng, *image),
    }
    if shape["num_classes"]:
        inputs["labels"] = rng.integers(0, shape["num_classes"] + 1, batch)
    return inputs


def _diffusion(lib: Any, shape: Shape) -> System:
    """The training system: L_simple, on a process of the length that was drawn."""
    m = unet(lib.unet, shape)
    schedule = lib.diffusion.linear_schedule(shape["timesteps"])

    def train_step(model: Any, optimizer: Any, *inputs: Any) -> tuple[Any]:
        return (lib.diffusion.train_step(model, optimizer, *inputs, schedule),)

    def loss(images: Any, timesteps: Any, noise: Any) -> Any:
        return lib.diffusion.loss(m, schedule, images, timesteps, noise)

    return System(
        modules={"unet": m},
        forward=lambda images, timesteps, noise: {"prediction": m(noise, timesteps)},
        losses={"loss": Loss(loss, ("unet",))},
        optimizers={"unet": lib.diffusion.make_optimizer(m)},
        step=train_step,
    )


def _diffusion_inputs(shape: Shape, rng: Rng) -> Arrays:
    image = (shape["batch"], shape["in_channels"], *shape["image_size"])
    return {
        "images": rng.uniform(-1, 1, image),
        "timesteps": rng.integers(0, shape["timesteps"], shape["batch"]),
        "noise": normal(rng, *image),
    }


def _ddim_step(lib: Any, shape: Shape) -> System:
    """A step of sampling without noise of its own, on a process of the length that was drawn."""
    m = unet(lib.unet, shape)
    schedule = lib.diffusion.linear_schedule(shape["timesteps"])

    def step(x_t: Any, timesteps: Any) -> Any:
        return lib.diffusion.ddim_step(m, schedule, x_t, timesteps)

    return System(
        modules={"unet": m}, forward=lambda x_t, timesteps: {"sample": step(x_t, timesteps)}
    )


def _ddim_inputs(shape: Shape, rng: Rng) -> Arrays:
    inputs = _diffusion_inputs(shape, rng)
    return {"x_t": inputs["noise"], "timesteps": inputs["timesteps"]}


UNET = Case(
    name="U-Net",
    side="canonical",
    shapes=unets(),
    build=_projection,
    reference=reference.unet,
    port=mlx_impl.unet,
    inputs=_inputs,
    images=frozenset({"x", "cotangent", "output"}),
    cost=50,
)

CIFAR_10 = {
    "in_channels": 3,
    "channels": 128,
    "channel_multipliers": (1, 2, 2, 2),
    "num_res_blocks": 2,
    "attention_resolutions": (16,),
    "image_size": (32, 32),
    "groups": 32,
    "num_classes": 0,
    "timesteps": 1000,
}

SYSTEM = Case(
    name="U-Net diffusion",
    side="canonical",
    shapes=st.builds(
        lambda shape, t: {**shape, "timesteps": t},
        unets(levels=1, num_res_blocks=1, classes=False),
        st.integers(1, 1000),
    ),
    build=_diffusion,
    reference=SimpleNamespace(unet=reference.unet, diffusion=reference.diffusion),
    port=SimpleNamespace(unet=mlx_impl.unet, diffusion=mlx_impl.diffusion),
    inputs=_diffusion_inputs,
    images=frozenset({"images", "noise", "prediction"}),
    compile_step=compile_step,
    cost=100,
    full_size=CIFAR_10,
)

SAMPLING = replace(
    SYSTEM,
    name="U-Net DDIM step",
    build=_ddim_step,
    inputs=_ddim_inputs,
    images=frozenset({"x_t", "sample"}),
    compile_step=None,
    samples=True,
    cost=10,
)

CASES = (UNET, SYSTEM, SAMPLING)
