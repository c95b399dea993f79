"""What every training loop shares: one way to compile a step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx


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
