"""What the cases are made with."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_parity import Loss, System
from mlx_parity.case import Shape

Rng = np.random.Generator
Arrays = dict[str, np.ndarray]


def normal(rng: Rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


def projection(name: str, module: Callable[[Any, Shape], Any]) -> Callable[[Any, Shape], System]:
    """A network alone; its loss is its output against a drawn cotangent, so no gradient hides."""

    def build(lib: Any, shape: Shape) -> System:
        m = module(lib, shape)
        return System(
            modules={name: m},
            forward=lambda x, cotangent: {"output": m(x)},
            losses={"projection": Loss(lambda x, cotangent: (m(x) * cotangent).sum(), (name,))},
        )

    return build
