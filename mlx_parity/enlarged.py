"""The forward pass once more, of a model whose weights are too small to show its activations."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from mlx_parity.errors import ParityError
from mlx_parity.ladder import Climb, Rung
from mlx_parity.subject import MODEL, Subject

SMALL = 0.4
"""Matrices that shrink what goes through them to less than this are tried larger as well."""

FEW = 64
"""Numbers below which a matrix counts as large enough: as few are small by chance."""

RUNG = "forward in larger weights"

READ = (
    "where and why was asked with larger weights: with these, which are small, one cause looks "
    "like another"
)
"""The note of a difference that the model's own weights show too."""

CALM = 1e-4
"""PyTorch's own float32 error, relative to an output, above which larger weights show nothing: a
thousand roundings. A model in half precision is always above."""


def of(subject: Subject, climb: Climb) -> Climb | None:
    """The climb with matrices as large as their fan-in asks for, if most are far smaller.

    Models are often made with weights of 0.02. In a small one all activations, and the scores of
    attention, then lie where every function is a straight line: another activation, a missing cap
    or another scale hides below rounding. None also where PyTorch itself overflows or turns chaotic
    with such weights: they would show nothing of the port.
    """
    if subject.plan is None:
        return None
    carried = {source for link in subject.plan.links for source in link.sources}
    factors = {}
    for path, module in subject.prototype.named_modules():
        for own, _ in module.named_parameters(path, recurse=False):
            array = climb.point.get(f"{MODEL}.{own}")
            if own in carried and array is not None and array.ndim > 1:
                factor = _size(array) * math.sqrt(fan_in(module, array.shape))
                factors[f"{MODEL}.{own}"] = factor if array.size >= FEW else math.inf
    small = {n: f for n, f in factors.items() if 0 < f < SMALL}
    if 2 * len(small) <= len(factors):
        return None
    larger = copy.copy(climb)
    larger.point = climb.point | {
        n: (climb.point[n] / f).astype(np.float32) for n, f in small.items()
    }
    return larger if _calm(larger) else None


def _size(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def fan_in(module: torch.nn.Module, shape: tuple[int, ...]) -> int:
    """How many numbers each output of a matrix sums; beside convolutions, a tensor of more than two
    dimensions holds a matrix for each expert or head."""
    kernel = isinstance(module, torch.nn.modules.conv._ConvNd)
    return math.prod(shape[1:]) if kernel else shape[-1]


def _calm(climb: Climb) -> bool:
    """Whether PyTorch in float32 is about what it is in float64 at the climb's point."""
    try:
        exact, usual = (
            side.derivatives(climb.point, climb.names, gradients=False)
            for side in (climb.oracle, climb.usual)
        )
    except ParityError:
        return False
    return all(
        bool(np.isfinite(usual[n]).all()) and _size(usual[n] - a) <= CALM * _size(a)
        for n, a in exact.items()
        if n.startswith("forward ")
    )


def judged(climb: Climb) -> list[Rung]:
    """The rung, or nothing where the port overflows alone: only a bias is a difference here."""
    with suppress(ParityError, ValueError):
        rungs = climb.derivatives(gradients=False)
        return [
            replace(r, name=RUNG)
            for r in rungs
            if r.name == "forward" and all(f.verdict in ("equal", "different") for f in r.findings)
        ]
    return []
