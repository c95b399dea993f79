"""The losses of the adversarial systems, each alone."""

from collections.abc import Callable
from typing import Any

import numpy as np

import mlx_impl.losses
import reference.losses
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests import strategies
from tests.cases.common import Arrays, Rng, normal


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


CASES = (
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
