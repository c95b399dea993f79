"""Which module differs first, forward or backward: the smallest whose inputs agree and whose
outputs, or whose gradients, do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import nn as tnn

from mlx_parity.carry import flat, reference_tensors
from mlx_parity.equality import Finding
from mlx_parity.pairing import (
    Map,
    ModulePair,
    Pairs,
    Unpaired,
    match_layers,
    pair_modules,
    port_layers,
    reference_layers,
)

import mlx.nn as mnn  # isort: skip

__all__ = ["Capture", "Guilty", "ModulePair", "Pairs", "Unpaired", "pairs"]

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Capture:
    """One call of a module: NumPy arrays in the reference's layout where arrays were, and whatever
    else was passed as it was."""

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    gradient: Any = None
    """Of the loss, by the output; in the output's structure."""


@dataclass(frozen=True)
class Guilty:
    """A module whose inputs agree and whose output, or whose gradient, does not."""

    pair: ModulePair
    direction: Direction
    finding: Finding
    capture: Capture
    """Of the reference in float64, at the point where the check was made."""
    judge: Callable[[Callable[..., Any] | None], list[Finding]] | None = field(
        default=None, compare=False, repr=False
    )
    """``judge(port)`` feeds the reference's own inputs to ``port`` (called as the port's module is;
    the module itself by default) and holds its outputs, and for ``backward`` its gradients, against
    the reference's. So an alternative can be tried: the right one brings the bias back to 1."""

    @property
    def where(self) -> str:
        """For people: the module's path on both sides, and its type."""
        return f"{self.pair.name} [{type(self.pair.reference).__name__}]"


def pairs(reference: tnn.Module, port: mnn.Module, mapping: Map | None = None) -> Pairs:
    """Pair the modules of both trees, by the user's map, by name, then by structure.

    ``mapping`` takes a name of the reference (a module, a branch or a tensor) to the port's, to a
    list of names where the port has split it, or to None where it has no counterpart. The modules
    left over are in the result's ``unpaired``, each with a reason.
    """
    theirs = reference_layers(reference, reference_tensors(reference))
    ours = port_layers(port, flat(port.parameters()))
    return pair_modules(reference, port, match_layers(theirs, ours, port, mapping), mapping)


def array_of(value: Any) -> np.ndarray | None:
    """``value`` if it is an array that has been captured."""
    return value if isinstance(value, np.ndarray) else None
