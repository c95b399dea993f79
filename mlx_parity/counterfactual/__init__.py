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
from typing import Any

from torch import nn as tnn

from mlx_parity.counterfactual.alternative import Alternative
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
    of_norm_places,
    of_other_tensors,
    of_rotations,
    of_sums,
)


def alternatives(
    module: tnn.Module, call: Callable[[tnn.Module], Any], backward: bool = False
) -> list[Alternative]:
    """Every alternative for ``module``, likely ones first; ``call(module)`` calls it once."""
    with Trace(backward) as trace:
        call(copy.deepcopy(module))
    found = list(of_calls(trace.calls, trace.shapes))
    if backward:
        found += of_parameters(module)
    found += of_rotations(trace)
    found += of_given_rotations(trace)
    found += of_neighbours(trace)
    found += of_norm_places(trace)
    found += of_functions(module)
    found += of_children(module)
    settings = list(of_settings(module))
    found += settings
    found += of_mode(module)
    found += of_whole(module)
    found += of_calls(trace.inserted, trace.shapes)
    found += of_sums(trace)
    found += of_other_tensors(trace)
    # A number found explains the least, one that has a name more than others, a factor less.
    named = {id(a) for a in settings}

    def rank(a: Alternative) -> tuple[bool, bool, bool]:
        fitted = a.fit is not None
        return fitted, fitted and id(a) not in named, fitted and a.trap_id == "scale-factor"

    return sorted(found, key=rank)


__all__ = ["Alternative", "alternatives"]
