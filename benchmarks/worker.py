"""A process that times one system's compiled step whenever it is told to.

It is started by :mod:`benchmarks.compare`, by path and not as a module, so that a tree of any
revision can be measured by this file: of that tree it uses only the cases. It reads commands from
standard input and answers on standard output, a JSON object a line each:

    {"enter": "002 GAN", "batch": 64}    -> {"step_seconds": 0.03, "versions": {...}}
    {"time": 4, "slowdown": 0.05}        -> {"seconds": 0.12}

``slowdown`` makes each step take that much longer than it does, for the harness's own test. An
error is answered too, as ``{"error": "..."}``, and ends the process.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_STEPS = 5


def enter(name: str, batch: int) -> Callable[[int, float], float]:
    """``run(steps, slowdown)`` in seconds, traced, warm, and always from the same state."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_map

    from mlx_parity.blas import use_openblas
    from tests.cases import CASES

    use_openblas()
    found = [case for case in CASES if case.name == name]
    if not found:
        raise LookupError(f"this tree has no case called {name!r}")
    (case,) = found
    shape = {**case.full_size, "batch": batch}
    mx.random.seed(0)
    system = case.build(case.port, shape)
    if case.compile_step is None or system.step is None:
        raise LookupError(f"{name!r} is not trained: it has no step to time")
    step = system.step
    stateful = [*system.modules.values(), *system.optimizers.values()]
    for m, optimizer in system.optimizers.items():
        optimizer.init(system.modules[m].trainable_parameters())
    drawn = case.inputs(shape, np.random.default_rng(0))
    arrays = [
        mx.array(a.transpose(0, 2, 3, 1) if n in case.images else a) for n, a in drawn.items()
    ]
    arrays = [a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a for a in arrays]
    state = [s.state for s in stateful]
    traces = 0

    def counted(*args: Any) -> Any:
        nonlocal traces
        traces += 1
        return step(*args)

    compiled = case.compile_step(counted, *stateful)

    def one() -> None:
        mx.eval(compiled(*arrays), state)

    for _ in range(WARM_STEPS):
        one()
    if traces != 1:
        raise RuntimeError(f"MLX traced the step {traces} times: it does not compile here")
    modules, optimizers = system.modules.values(), system.optimizers.values()
    weights = [tree_map(lambda a: a, module.parameters()) for module in modules]
    moments = [tree_map(lambda a: a, optimizer.state) for optimizer in optimizers]

    def put(node: Any, new: Any) -> None:
        for key, value in new.items() if isinstance(new, dict) else enumerate(new):
            if isinstance(value, dict | list):
                put(node[key], value)
            else:
                node[key] = value

    def run(steps: int, slowdown: float) -> float:
        for module, before in zip(modules, weights, strict=True):
            module.update(before)
        for optimizer, before in zip(optimizers, moments, strict=True):
            put(optimizer.state, before)
        one()  # what the other process's turn has left in the caches is not this one's doing
        began = time.perf_counter()
        for _ in range(steps):
            start = time.perf_counter()
            one()
            if slowdown:
                end = start + (time.perf_counter() - start) * (1 + slowdown)
                while time.perf_counter() < end:
                    pass
        return time.perf_counter() - began

    return run


def main() -> None:
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run: Callable[[int, float], float] | None = None

    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    for line in sys.stdin:
        command = json.loads(line)
        try:
            if "enter" in command:
                run = enter(command["enter"], command["batch"])
                run(2, 0)
                packages = ("mlx", "numpy", "torch")
                versions = {p: importlib.metadata.version(p) for p in packages}
                answer(step_seconds=run(4, 0) / 4, versions=versions)
            else:
                if run is None:
                    raise RuntimeError("nothing was entered")
                answer(seconds=run(command["time"], command.get("slowdown", 0.0)))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
            return


if __name__ == "__main__":
    main()
