"""What the original would have to be for the port to be right: known alternatives, tried out.

A port that differs computes something else, and what people write by mistake is a short list. Each
alternative changes one thing about the *reference*: an argument of one call (found by tracing the
module's calls of torch), a child that is skipped, an attribute, a factor. It is computed in float64
at nearby points, and the port's outputs are held against it by the test of equality. The
alternative under which the bias returns to 1 is what the port computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn as tnn

from mlx_parity.counterfactual.alternative import Alternative
from mlx_parity.counterfactual.blocks import of_norm_places, of_rows, watched
from mlx_parity.counterfactual.gradients import of_parameters
from mlx_parity.counterfactual.modules import (
    of_children,
    of_functions,
    of_mode,
    of_settings,
    of_whole,
)
from mlx_parity.counterfactual.tracing import (
    Trace,
    of_calls,
    of_given_rotations,
    of_neighbours,
    of_other_tensors,
    of_rotations,
)

MANY = 1000
"""Of more alternatives than can be tried in time those come first that are about the calls between
what agrees and what does not. Of fewer the likely ones do: a summand may be made earlier."""

FEW = 12
"""Of as few calls all is tried, numbers too, before what is about something else."""


def alternatives(
    module: tnn.Module,
    call: Callable[[tnn.Module], Any],
    backward: bool = False,
    between: tuple[str, str] = ("", ""),
) -> list[Alternative]:
    """Every alternative for ``module``, likely ones first; ``call(module)`` calls it once.

    ``between`` are paths within it: of what still agrees and of what no longer does. What is called
    after the one and before the other comes first.
    """
    probe = copy.deepcopy(module)
    with Trace(backward) as trace:
        visits = watched(probe, trace)
        call(probe)
    after, before = (visits.get(path) for path in between)
    first = after.end if after else 0
    last = before.start if before else len(trace.calls)
    found = list(of_calls(trace.calls, trace.shapes))
    if backward:
        found += of_parameters(module)
    found += of_rotations(trace)
    found += of_given_rotations(trace)
    found += of_neighbours(trace)
    found += of_norm_places(trace, visits)
    found += of_functions(module)
    found += of_children(module, visits)
    settings = list(of_settings(module))
    found += settings
    found += of_mode(module)
    found += [replace(a, calls=(last - 1,)) for a in of_whole(module)]
    found += of_calls(trace.inserted, trace.shapes)
    found += of_rows(trace, visits)
    found += of_other_tensors(trace)
    # A number found explains the least, one that has a name more than others, a factor less.
    named = {id(a) for a in settings}

    crowded, few = len(found) > MANY, last - first <= FEW

    def rank(a: Alternative) -> tuple[bool, ...]:
        outside = any(not first <= i < last for i in a.calls) or (few and not a.calls)
        elsewhere = crowded and outside
        fitted = a.fit is not None
        factor = fitted and a.trap_id == "scale-factor"
        return elsewhere, fitted, fitted and id(a) not in named, factor

    return sorted(found, key=rank)


__all__ = ["Alternative", "alternatives"]
