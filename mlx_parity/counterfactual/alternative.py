"""A changed reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn as tnn


@dataclass(frozen=True)
class Alternative:
    """A changed reference: ``within()`` is entered around its call."""

    trap_id: str
    what: str
    within: Callable[[tnn.Module], contextlib.AbstractContextManager[Any]]
    fit: tuple[float, bool] | None = None
    at: Callable[[float], Alternative] | None = None
    """Where ``fit`` is given: the alternative with a number put in."""
    calls: tuple[int, ...] = ()
    """The calls that it changes, by their numbers; none where it is about something else."""
