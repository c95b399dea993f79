"""Training steps and samplers in bfloat16 with float32 master weights: the other cases' own, cast.

All but two that are dear and whose parts are here: VGG's style transfer (document 003's has its
losses) and latent diffusion (the U-Net's and the autoencoder's training).
"""

from dataclasses import replace
from typing import Any

from mlx_impl.precision import mixed
from mlx_parity import Case, System
from mlx_parity.case import Shape
from tests.cases import conv_gan, dcgan, diffusion, latent_diffusion, mlp_gan, style_transfer, unet


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


DEAR = ("VGG style transfer", "latent diffusion")

_OTHERS = (conv_gan, dcgan, diffusion, latent_diffusion, mlp_gan, style_transfer, unet)

CASES = tuple(
    in_bfloat16(case)
    for file in _OTHERS
    for case in file.CASES
    if case.name not in DEAR
    if case.compile_step is not None or case.samples or case.name.endswith("chain")
)
