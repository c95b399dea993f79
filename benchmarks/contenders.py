"""One training step of one system, in MLX or PyTorch, ready to be called again and again."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten, tree_map

from benchmarks import systems
from benchmarks.machine import torch_device
from mlx_impl.training import compile_step
from mlx_parity import Case
from mlx_parity.carry import flat
from mlx_parity.sides import restore_tree

ARMS = ("mlx-uncompiled", "mlx-compiled", "torch-eager", "torch-compile")
WARM_STEPS = 2


class NotCompiled(RuntimeError):
    """An arm that is to be reported as compiled was not."""


class NotEvaluated(RuntimeError):
    """A function to be timed returned before its work was done."""


@dataclass
class Contender:
    """A step, and the means to repeat it from the same state.

    ``step(i)`` trains on batch ``i`` and returns when that is done, ``restore()`` brings back the
    state that the warm-up left: a GAN fed the same few batches for hundreds of steps drifts to
    where its numbers are denormal and slow.
    """

    step: Callable[[int], Any]
    restore: Callable[[], None]
    info: dict[str, Any] = field(default_factory=dict)


def unevaluated(tree: Any) -> list[str]:
    """Names of the arrays in ``tree`` that are still promises. Evaluates none of them.

    MLX has no question for this; an evaluated array is drawn as a graph without operations.
    """
    names = []
    flat: list[tuple[str, Any]] = tree_flatten(tree)
    for name, array in flat:
        if not isinstance(array, mx.array):
            continue
        graph = io.StringIO()
        mx.export_to_dot(graph, array)
        if "->" in graph.getvalue():
            names.append(name)
    return names


def enter(case: Case, arm: str, images: list[np.ndarray]) -> Contender:
    """Build an arm on batches (B, H, W, C), make its first calls, and leave it warm.

    ``info`` tells ``first_call_ms`` (trace and code generation are in it) and, of MLX,
    ``peak_memory_mb`` and ``traces``. Raises :class:`NotCompiled`, :class:`NotEvaluated`.
    """
    batches = [systems.inputs(case, batch, seed) for seed, batch in enumerate(images)]
    if arm.startswith("mlx"):
        return _enter_mlx(case, batches, compiled=arm == "mlx-compiled")
    return _enter_torch(case, batches, compiled=arm == "torch-compile")


def _enter_mlx(case: Case, batches: list[dict[str, np.ndarray]], *, compiled: bool) -> Contender:
    mx.random.seed(0)
    modules, optimizers, step = systems.build(case, "mlx", _batch_size(batches))
    arrays = [systems.to_mlx(case, batch) for batch in batches]
    stateful = [*modules, *optimizers]
    state = [s.state for s in stateful]
    mx.eval(state, arrays)  # or their making would be timed with the first step
    traces = 0

    def counted(*args: Any) -> Any:
        nonlocal traces
        traces += 1
        return step(*args)

    run = compile_step(counted, *stateful) if compiled else partial(counted, *stateful)

    def one(i: int) -> Any:
        losses = run(*arrays[i % len(arrays)])
        mx.eval(losses, state)
        return losses

    first_call_ms = _first_call(one)
    mx.clear_cache()
    mx.reset_peak_memory()
    for i in range(WARM_STEPS):
        check_evaluated(one(i), state)
    info = {"first_call_ms": first_call_ms, "peak_memory_mb": mx.get_peak_memory() / 1e6}
    if compiled:
        check_traces(traces)
        info["traces"] = traces

    saved = [tree_map(lambda a: a, m.parameters()) for m in modules]
    saved_optimizers = [flat(o.state) for o in optimizers]

    def restore() -> None:
        for module, parameters in zip(modules, saved, strict=True):
            module.update(parameters)
        for optimizer, before in zip(optimizers, saved_optimizers, strict=True):
            restore_tree(optimizer.state, before)

    return Contender(one, restore, info)


def _enter_torch(case: Case, batches: list[dict[str, np.ndarray]], *, compiled: bool) -> Contender:
    device = torch_device()
    assert device is not None
    torch.manual_seed(0)
    modules, optimizers, step = systems.build(case, "torch", _batch_size(batches))
    for module in modules:
        module.to(device)
        if compiled:
            module.compile()
    tensors = [systems.to_torch(case, batch, device) for batch in batches]
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)

    def one(i: int) -> Any:
        losses = step(*modules, *optimizers, *tensors[i % len(tensors)])
        wait()
        return losses

    info = {"first_call_ms": _first_call(one)}
    for i in range(WARM_STEPS):
        one(i)
    stateful = [*modules, *optimizers]
    saved = [_clone(s.state_dict()) for s in stateful]

    def restore() -> None:
        for s, before in zip(stateful, saved, strict=True):
            s.load_state_dict(_clone(before))

    return Contender(one, restore, info)


def check_evaluated(*trees: Any) -> None:
    """Raise :class:`NotEvaluated` if a timed step left work undone."""
    if names := unevaluated(list(trees)):
        raise NotEvaluated(
            f"the timed step returned before {len(names)} of its results were computed, among them "
            f"{names[0]}: call mx.eval(loss, state) in it"
        )


def check_traces(traces: int) -> None:
    """Raise :class:`NotCompiled` if a step called more than once was traced more than once."""
    if traces != 1:
        raise NotCompiled(
            f"MLX ran the step's Python {traces} times in {1 + WARM_STEPS} calls, so it did not "
            "compile it and does not say so. On Linux it needs g++ on the PATH; "
            "MLX_DISABLE_COMPILE must not be set"
        )


def _first_call(one: Callable[[int], Any]) -> float:
    start = time.perf_counter()
    one(0)
    return (time.perf_counter() - start) * 1e3


def _batch_size(batches: list[dict[str, np.ndarray]]) -> int:
    return len(next(iter(batches[0].values())))


def _clone(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {k: _clone(v) for k, v in tree.items()}
    return [_clone(v) for v in tree] if isinstance(tree, list) else tree
