"""One training step or one sampling of one system, in MLX or PyTorch, to be called again and again.

Compiled and not are two ways to call the same code; the same compiled step is timed twice more, as
a control (what differs between equal arms is noise) and without waiting for each step. On a GPU
PyTorch's is timed so as well; on a CPU it works while it is called, and has nothing to wait for.
"""

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import torch
from mlx.utils import tree_flatten, tree_map

from benchmarks.machine import torch_device
from benchmarks.systems import Arrays, Subject, run_torch, to_mlx, to_torch
from mlx_impl.training import compile_step
from mlx_parity.carry import flat
from mlx_parity.sides import restore_tree

ARMS = (
    "mlx-compiled",
    "mlx-uncompiled",
    "mlx-control",
    "mlx-async",
    "torch-eager",
    "torch-async",
    "torch-compile",
    "mlx-bfloat16",
    "torch-bfloat16",
)
BFLOAT16 = ("mlx-bfloat16", "torch-bfloat16")
"""Compiled, and eager under ``torch.autocast``; both keep their weights in float32."""
SAME_AS = {
    "mlx-control": "mlx-compiled",
    "mlx-async": "mlx-compiled",
    "torch-async": "torch-eager",
}
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
    where its numbers are denormal and slow. ``start(i)`` and ``finish()``, where the framework has
    them, do the same without waiting in between.
    """

    step: Callable[[int], Any]
    restore: Callable[[], None]
    info: dict[str, Any] = field(default_factory=dict)
    start: Callable[[int], Any] | None = None
    finish: Callable[[], None] = lambda: None

    def run(self, steps: int) -> None:
        for i in range(steps):
            self.step(i)

    def without_waiting(self) -> "Contender":
        """The same work, its steps handed over one after the other and waited for at the end."""
        assert self.start is not None
        return _Asynchronous(**vars(replace(self, info={})))


class _Asynchronous(Contender):
    def run(self, steps: int) -> None:
        for i in range(steps):
            self.start(i)  # type: ignore[misc]
        self.finish()


def harness_seconds(steps: int, repeats: int = 200) -> float:
    """What the harness adds to a step in a round of ``steps``: a round of empty ones, the best."""
    empty = Contender(lambda i: None, lambda: None)

    def once() -> float:
        start = time.perf_counter()
        empty.run(steps)
        return time.perf_counter() - start

    return min(once() for _ in range(repeats)) / steps


def unevaluated(tree: Any) -> list[str]:
    """Names of the arrays in ``tree`` that are still promises. Evaluates none of them.

    MLX has no question for this; an evaluated array is drawn as a graph without operations.
    """
    names = []
    for name, array in dict(tree_flatten(tree)).items():
        if not isinstance(array, mx.array):
            continue
        graph = io.StringIO()
        mx.export_to_dot(graph, array)
        if "->" in graph.getvalue():
            names.append(name)
    return names


def enter(subject: Subject, arm: str, batches: list[Arrays]) -> Contender:
    """Build an arm on batches of inputs, make its first calls, and leave it warm.

    ``info`` tells ``first_call_ms`` (trace and code generation are in it), ``warm_ms``, and of MLX
    ``trace_ms``, ``peak_memory_mb`` and ``traces``. Raises :class:`NotCompiled`,
    :class:`NotEvaluated`.
    """
    if arm == "mlx-bfloat16":
        half = subject.in_bfloat16()
        assert half is not None
        return _enter_mlx(half, batches, compiled=True)
    if arm.startswith("mlx"):
        return _enter_mlx(subject, batches, compiled=arm == "mlx-compiled")
    how = {"compiled": arm == "torch-compile", "half": arm == "torch-bfloat16"}
    return _enter_torch(subject, batches, **how)


def _enter_mlx(subject: Subject, batches: list[Arrays], *, compiled: bool) -> Contender:
    mx.random.seed(0)
    system = subject.build("mlx", _batch_size(batches))
    modules, optimizers = list(system.modules.values()), list(system.optimizers.values())
    arrays = [to_mlx(subject.case, batch) for batch in batches]
    names = list(batches[0])
    stateful = [*modules, *optimizers] if subject.kind == "step" else modules
    state = [s.state for s in stateful]
    mx.eval(state, arrays)  # or their making would be timed with the first step
    traces = 0

    def counted(*args: Any) -> Any:
        nonlocal traces
        traces += 1
        if subject.kind == "step":
            return system.step(*args)  # type: ignore[misc]
        inputs = args[len(stateful) :]
        return system.forward(**dict(zip(names, inputs, strict=True)))  # type: ignore[misc]

    call = compile_step(counted, *stateful) if compiled else partial(counted, *stateful)
    last: list[Any] = [None]

    def start(i: int) -> Any:
        last[0] = call(*arrays[i % len(arrays)])
        mx.async_eval(last[0], state)
        return last[0]

    def one(i: int) -> Any:
        results = call(*arrays[i % len(arrays)])
        mx.eval(results, state)
        return results

    began = time.perf_counter()
    results = call(*arrays[0])
    traced = time.perf_counter()
    mx.eval(results, state)
    info = {
        "trace_ms": (traced - began) * 1e3,
        "first_call_ms": (time.perf_counter() - began) * 1e3,
    }
    mx.clear_cache()
    mx.reset_peak_memory()
    for i in range(WARM_STEPS):
        check_evaluated(one(i), state)
    info["peak_memory_mb"] = mx.get_peak_memory() / 1e6
    info["warm_ms"] = _milliseconds(one)
    if compiled:
        check_traces(traces, calls=2 + WARM_STEPS)
        info["traces"] = traces

    saved = [tree_map(lambda a: a, m.parameters()) for m in modules]
    saved_optimizers = [flat(o.state) for o in optimizers]

    def restore() -> None:
        for module, parameters in zip(modules, saved, strict=True):
            module.update(parameters)
        for optimizer, before in zip(optimizers, saved_optimizers, strict=True):
            restore_tree(optimizer.state, before)

    return Contender(one, restore, info, start, lambda: mx.eval(last[0], state))


def _enter_torch(
    subject: Subject, batches: list[Arrays], *, compiled: bool, half: bool
) -> Contender:
    device = torch_device()
    assert device is not None
    torch.manual_seed(0)
    system = subject.build("torch", _batch_size(batches))
    modules, optimizers = list(system.modules.values()), list(system.optimizers.values())
    for module in modules:
        module.to(device)
        if compiled:
            module.compile()
    tensors = [to_torch(subject.case, batch, device) for batch in batches]
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    call = run_torch(subject, system)
    # A cache of rounded weights would outlive their update within the step.
    autocast = torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False)

    def start(i: int) -> Any:
        with autocast:
            return call(*tensors[i % len(tensors)])

    def one(i: int) -> Any:
        results = start(i)
        wait()
        return results

    info = {"first_call_ms": _milliseconds(one)}
    for i in range(WARM_STEPS):
        one(i)
    info["warm_ms"] = _milliseconds(one)
    stateful = [*modules, *optimizers]
    saved = [_clone(s.state_dict()) for s in stateful]

    def restore() -> None:
        for s, before in zip(stateful, saved, strict=True):
            s.load_state_dict(_clone(before))

    return Contender(one, restore, info, start, wait)


def check_evaluated(*trees: Any) -> None:
    """Raise :class:`NotEvaluated` if a timed step left work undone."""
    if names := unevaluated(list(trees)):
        raise NotEvaluated(
            f"the timed step returned before {len(names)} of its results were computed, among them "
            f"{names[0]}: call mx.eval(loss, state) in it"
        )


def check_traces(traces: int, calls: int) -> None:
    """Raise :class:`NotCompiled` if a step called more than once was traced more than once."""
    if traces != 1:
        raise NotCompiled(
            f"MLX ran the step's Python {traces} times in {calls} calls, so it did not "
            "compile it and does not say so. On Linux it needs g++ on the PATH; "
            "MLX_DISABLE_COMPILE must not be set"
        )


def matmul_peak(size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of MLX's matrix product in float32, the best of a few.

    What a step's share is a share of. With TF32 on, a GPU's peak is TF32's.
    """
    a = mx.random.normal((size, size))
    b = mx.random.normal((size, size))
    mx.eval(a, b, a @ b)

    def once() -> float:
        start = time.perf_counter()
        mx.eval(a @ b)
        return time.perf_counter() - start

    return 2 * size**3 / min(once() for _ in range(repeats))


def break_even(compiled: dict[str, Any], uncompiled_ms: float, compiled_ms: float) -> int | None:
    """After how many steps compiling has paid for its first call; None where it never does."""
    gained = uncompiled_ms - compiled_ms
    if gained <= 0 or "first_call_ms" not in compiled:
        return None
    return math.ceil(max(0.0, compiled["first_call_ms"] - uncompiled_ms) / gained)


def _milliseconds(one: Callable[[int], Any]) -> float:
    start = time.perf_counter()
    one(0)
    return (time.perf_counter() - start) * 1e3


def _batch_size(batches: list[Arrays]) -> int:
    return len(next(iter(batches[0].values())))


def _clone(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {k: _clone(v) for k, v in tree.items()}
    return [_clone(v) for v in tree] if isinstance(tree, list) else tree
