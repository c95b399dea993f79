"""Two optimizers held against each other by themselves: the same gradients, weights of zero.

In a training step an update is added to a weight a thousand times larger, and what is left of it
after rounding shows an optimizer's formula to three or four digits. From a weight of zero it shows
whole, and gradients of all sizes, down to eps and below, show where eps stands.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from mlx_parity._backend import require_mlx
from mlx_parity.equality import Finding, Tensors, compare, jitter
from mlx_parity.sides import _in_single_precision

require_mlx()

import mlx.core as mx  # noqa: E402

STEPS = 3
SIZE = 24

Moves = dict[str, np.ndarray]
Formula = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]
"""Gradients (steps, size) and the settings of PyTorch's group to the weights after each step."""


def alone(theirs: torch.optim.Optimizer, ours: Any, seed: int = 0) -> list[Finding]:
    """What differs in the first updates of a weight of zero; ``ours`` is not used up."""
    return _held(theirs, ours, seed, single=False)


def forgiven(theirs: torch.optim.Optimizer, ours: Any, seed: int = 0) -> list[Finding]:
    """As :func:`alone`, where Adam's corrections may have float32's rounding, as MLX's have."""
    return _held(theirs, ours, seed, single=True)


def _held(theirs: torch.optim.Optimizer, ours: Any, seed: int, single: bool) -> list[Finding]:
    rng = np.random.default_rng(seed)
    return compare(
        lambda p: in_torch(theirs, p, torch.float64),
        lambda p: in_torch(theirs, p, torch.float32, single),
        lambda p: in_mlx(ours, p),
        lambda: jitter(_gradients(seed), rng),
    )


def _gradients(seed: int) -> Moves:
    """Of all sizes from 1e-9 to 10, those of an element alike in every step."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-9, 1, SIZE)
    return {"gradients": (sizes * rng.uniform(0.5, 1.5, (STEPS, SIZE))).astype(np.float32)}


def in_torch(
    optimizer: torch.optim.Optimizer, point: Tensors, dtype: torch.dtype, single: bool = False
) -> Moves:
    """The weight after each step of a new optimizer with the same settings."""
    group = optimizer.param_groups[0]
    known = inspect.signature(type(optimizer)).parameters
    weight = torch.zeros(SIZE, dtype=dtype, requires_grad=True)
    settings: dict[str, Any] = {k: v for k, v in group.items() if k in known and k != "params"}
    made = type(optimizer)([weight], **settings)
    found = {}
    for i, gradient in enumerate(point["gradients"]):
        weight.grad = torch.tensor(gradient, dtype=dtype)
        rate = made.param_groups[0]["lr"]
        if single:
            _in_single_precision(made, i + 1)
        made.step()
        made.param_groups[0]["lr"] = rate
        found[f"update {i + 1}"] = weight.detach().to(torch.float64).numpy().copy()
    return found


def in_mlx(optimizer: Any, point: Tensors) -> Moves:
    made = copy.deepcopy(optimizer)
    weights = {"w": mx.zeros(SIZE)}
    found = {}
    for i, gradient in enumerate(point["gradients"]):
        weights = made.apply_gradients({"w": mx.array(gradient)}, weights)
        found[f"update {i + 1}"] = np.array(weights["w"], np.float64)
    return found


# ------------------------------------------------------------------------------- alternatives


def _adam(
    gradients: np.ndarray,
    group: Mapping[str, Any],
    first: bool = True,
    second: bool = True,
    eps: str = "behind the correction",
) -> np.ndarray:
    """Adam from a weight of zero, with its corrections or without, eps here or there."""
    g = gradients.astype(np.float64)
    (b1, b2), lr, tiny = group["betas"], float(group["lr"]), group["eps"]
    m, v, w = (np.zeros(g.shape[1]) for _ in range(3))
    found = []
    for t, gradient in enumerate(g, 1):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        c1, c2 = 1 - b1**t if first else 1.0, 1 - b2**t if second else 1.0
        root = {
            "behind the correction": np.sqrt(v / c2) + tiny,
            "before the correction": (np.sqrt(v) + tiny) / np.sqrt(c2),
            "under the root": np.sqrt(v / c2 + tiny),
            "under the root, before the correction": np.sqrt(v + tiny) / np.sqrt(c2),
        }[eps]
        w = w - lr * m / c1 / root
        found.append(w)
    return np.stack(found)


_ALTERNATIVES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("adam-bias-correction", "no correction of either moment", {"first": False, "second": False}),
    ("adam-bias-correction", "no correction of the first moment", {"first": False}),
    ("adam-bias-correction", "no correction of the second moment", {"second": False}),
    *(
        ("adam-eps-placement", f"eps {place}", {"eps": place})
        for place in (
            "before the correction",
            "under the root",
            "under the root, before the correction",
        )
    ),
)


def explained(theirs: torch.optim.Optimizer, ours: Any, seed: int = 0) -> tuple[str, str] | None:
    """The trap, and what PyTorch's Adam would have to be for MLX's to be equal to it."""
    if not isinstance(theirs, torch.optim.Adam) or theirs.defaults.get("amsgrad"):
        return None
    group = theirs.param_groups[0]
    for trap, what, options in _ALTERNATIVES:
        rng = np.random.default_rng(seed)

        def exact(point: Tensors, options: dict[str, Any] = options) -> Moves:
            moved = _adam(point["gradients"], group, **options)
            return {f"update {i + 1}": w for i, w in enumerate(moved)}

        def usual(point: Tensors, exact: Any = exact) -> Moves:
            """What float32 makes of it, its corrections too."""
            right = in_torch(theirs, point, torch.float64)
            rounded = in_torch(theirs, point, torch.float32, single=True)
            return {k: a * (rounded[k] / right[k]) for k, a in exact(point).items()}

        def draw(rng: np.random.Generator = rng) -> Moves:
            return jitter(_gradients(seed), rng)

        findings = compare(exact, usual, lambda p: in_mlx(ours, p), draw)
        if all(f.ok for f in findings):
            return trap, what
    return None
