"""What every training loop shares: how a step and a model are compiled."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def compile_step(step: Callable[..., Any], *stateful: Any) -> Callable[..., Any]:
    """Compile ``step(*stateful, *arrays)`` into ``compiled(*arrays)``.

    ``stateful`` are the step's modules and optimizers, the latter initialised. Their state goes in
    and comes out of the compiled graph; whatever is left out would be frozen at its first value.
    MLX traces ``step`` once for each set of array shapes. On Linux it needs g++ at run time and,
    without it, runs uncompiled and says nothing.
    """
    state = [s.state for s in stateful]

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled(*arrays: mx.array) -> Any:
        return step(*stateful, *arrays)

    return compiled


class CompiledModel:
    """``model``, whose calls are compiled, for sampling; everything else is the model's own.

    Put it into evaluation mode before the first call: nothing that a call would change in the
    model, as BatchNorm does in training mode, comes out. The weights go in, so that what it is
    trained to later is sampled from without another trace; MLX traces once for each set of array
    shapes.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._compiled = mx.compile(model, inputs=[model.state])

    def __call__(self, *arrays: mx.array) -> Any:
        return self._compiled(*arrays)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
