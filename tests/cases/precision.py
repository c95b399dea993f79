"""Training and sampling in bfloat16 with float32 master weights: the other cases' own, cast."""

from dataclasses import replace
from typing import Any

from mlx_impl.precision import mixed
from mlx_parity import Case, System
from mlx_parity.case import Shape
from tests.cases import conv_gan, dcgan, diffusion, mlp_gan, unet


def in_bfloat16(case: Case) -> Case:
    """``case`` with its port under :func:`mlx_impl.precision.mixed`.

    Held against PyTorch under ``torch.autocast``.
    """

    def build(lib: Any, shape: Shape) -> System:
        system = case.build(lib, shape)
        if lib is not case.port:
            return system
        return replace(
            system,
            forward=system.forward and mixed(system.forward),
            losses={
                name: replace(loss, function=mixed(loss.function))
                for name, loss in system.losses.items()
            },
            step=system.step and mixed(system.step),
        )

    return replace(
        case,
        name=f"{case.name} in bfloat16",
        build=build,
        dtype="bfloat16",
        samples=False,
        cost=max(25, case.cost),
    )


def _named(cases: tuple[Case, ...], name: str) -> Case:
    return next(case for case in cases if case.name == name)


CASES = tuple(
    map(
        in_bfloat16,
        (
            _named(mlp_gan.CASES, "002 GAN"),
            conv_gan.GAN,
            dcgan.GAN,
            _named(diffusion.CASES, "004 diffusion"),
            unet.SYSTEM,
            _named(diffusion.CASES, "DDPM chain"),
            _named(diffusion.CASES, "DDIM chain"),
            unet.SAMPLING,
        ),
    )
)
