"""What goes into every module, what comes out, and the gradient of the loss at what comes out.

PyTorch has hooks. MLX has none, and looks ``__call__`` up on the class, so an instance's own is
never called; what works is to give the instance another class for a while, a subclass of its own.
On both sides a zero is added to each output (a *tap*), and the loss is differentiated by that zero:
the gradient at the output, without a word about how the module computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.structure import fresh, is_floating, leaves, replace

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402

Key = tuple[str, int]
"""A module's path, and which of its calls."""


@dataclass
class Call:
    """One call of one module."""

    path: str
    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    order: int

    @property
    def key(self) -> Key:
        return self.path, self.index

    @property
    def inputs(self) -> dict[str, Any]:
        """The arrays that went in, by place."""
        return leaves({"args": self.args, "kwargs": self.kwargs})


Tap = Callable[[Call, str, Any], Any]
"""Given a call, the place of an array in its output and the array: what goes out in its stead."""


class Calls(dict[Key, Call]):
    """The calls in the order in which they ended; ``open`` holds those under way, outermost first,
    and after an error those that it came through."""

    def __init__(self, tap: Tap | None = None, keep: Callable[[Any], Any] = lambda value: value):
        super().__init__()
        self.tap = tap
        self.keep = keep
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def enter(self, path: str) -> None:
        self.open.append(path)

    def leave(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.open.pop()
        index = self.counts.get(path, 0)
        self.counts[path] = index + 1
        call = Call(path, index, args, dict(kwargs), self.keep(output), len(self))
        self[call.key] = call
        if self.tap is not None:
            tap = self.tap
            output = replace(output, lambda p, a: tap(call, p, a) if is_floating(a) else a)
            call.output = self.keep(output)
        return output


CLASS = vars(object)["__class__"]
"""Sets an instance's class, also where its class has a ``__class__`` of its own."""


@contextmanager
def port_calls(modules: Mapping[str, mnn.Module], tap: Tap | None = None) -> Iterator[Calls]:
    """Within, every call of the port's ``modules`` (by path) is recorded, and tapped.

    Each instance's class is a subclass of its own class, and its own again afterwards, whatever is
    raised in between. ``__class__`` says its own all the while: ``super(self.__class__, self)``
    would find itself again and again.
    """
    calls = Calls(tap, _kept)
    paths = {id(module): path for path, module in modules.items()}
    classes: dict[type, type] = {}

    def recording(cls: type) -> type:
        @wraps(cls.__call__)  # so that its signature can still be read
        def call(self: mnn.Module, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None:  # a copy that was made meanwhile
                return cls.__call__(self, *args, **kwargs)
            calls.enter(path)
            places, names = _kept(fresh((args, kwargs)))
            return calls.leave(path, places, names, cls.__call__(self, *args, **kwargs))

        own = property(lambda self: cls)
        names = {"__call__": call, "__module__": cls.__module__, "__class__": own}
        return type(cls.__name__, (cls,), names)

    changed: list[tuple[mnn.Module, type]] = []
    try:
        for module in modules.values():
            cls = type(module)
            if cls not in classes:
                classes[cls] = recording(cls)
            CLASS.__set__(module, classes[cls])
            changed.append((module, cls))
        yield calls
    finally:
        for module, cls in changed:
            CLASS.__set__(module, cls)


@contextmanager
def reference_calls(modules: Mapping[str, tnn.Module], tap: Tap | None = None) -> Iterator[Calls]:
    """Within, every call of the reference's ``modules`` (by path) is recorded, and tapped."""
    calls = Calls(tap, _kept)
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # to the calls under way
    handles = []

    def before(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            calls.enter(path)
            given.append(_kept(fresh((args, kwargs))))

        return hook

    def after(path: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            return calls.leave(path, *given.pop(), output)

        return hook

    try:
        for path, module in modules.items():
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path), with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _kept(value: Any) -> Any:
    """A value as it is now: an operation in place, ``y += x``, may change it later."""

    def copied(place: str, array: Any) -> Any:
        if isinstance(array, torch.Tensor):
            return array.detach().clone()
        return mx.array(array) if isinstance(array, mx.array) else array

    return replace(value, copied)


@dataclass
class Captured:
    """Every call of one evaluation and the gradients of its loss at the outputs."""

    calls: dict[Key, Call]
    gradients: dict[tuple[str, int, str], Any]
    """By path, call and place in the output; absent where the loss does not depend on it."""


def capture_reference(
    modules: Mapping[str, tnn.Module], loss: Callable[[], torch.Tensor]
) -> Captured:
    """Evaluate ``loss`` and its gradients at every output of ``modules``."""
    taps: dict[tuple[str, int, str], torch.Tensor] = {}

    def tap(call: Call, place: str, array: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(array, requires_grad=True)
        taps[call.path, call.index, place] = zero
        return array + zero

    with reference_calls(modules, tap) as calls, torch.enable_grad():
        value = loss()
    found: dict[tuple[str, int, str], Any] = {}
    if taps and value.requires_grad:
        grads = torch.autograd.grad(value, list(taps.values()), allow_unused=True)
        found = {k: g for k, g in zip(taps, grads, strict=True) if g is not None}
    return Captured(dict(calls), found)


def capture_port(
    modules: Mapping[str, mnn.Module],
    loss: Callable[[], mx.array],
    restore: Callable[[], None] = lambda: None,
    gradients: bool = True,
) -> Captured:
    """As :func:`capture_reference`, for the port. ``restore`` puts back what tracing left behind.

    ``gradients=False`` for a port that cannot be differentiated.
    """
    shapes: dict[tuple[str, int, str], tuple[tuple[int, ...], mx.Dtype]] = {}

    def shape(call: Call, place: str, array: mx.array) -> mx.array:
        shapes[call.path, call.index, place] = tuple(array.shape), array.dtype
        return array

    with port_calls(modules, shape) as calls:
        mx.eval(loss())
    if not gradients or not shapes:
        return Captured(dict(calls), {})
    order = list(shapes)
    zeros = [mx.zeros(*shapes[k]) for k in order]
    recorded: list[Call] = []

    def tapped(zeros: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        by_key = dict(zip(order, zeros, strict=True))

        def tap(call: Call, place: str, array: mx.array) -> mx.array:
            zero = by_key.get((call.path, call.index, place))
            return array if zero is None else array + zero

        with port_calls(modules, tap) as calls:
            value = loss()
        recorded[:] = calls.values()
        kept = [a for c in recorded for a in (*c.inputs.values(), *leaves(c.output).values())]
        return value, [a for a in kept if isinstance(a, mx.array)]

    try:
        (_, kept), grads = mx.value_and_grad(tapped)(zeros)
    finally:
        restore()
    mx.eval(kept, grads)
    values = iter(kept)

    def value(place: str, array: Any) -> Any:
        return next(values) if isinstance(array, mx.array) else array

    for call in recorded:  # tracers out, their values in, in the same order
        both = replace({"args": call.args, "kwargs": call.kwargs}, value)
        call.args, call.kwargs = both["args"], both["kwargs"]
        call.output = replace(call.output, value)
    return Captured({c.key: c for c in recorded}, dict(zip(order, grads, strict=True)))


def numpy_of(value: Any) -> np.ndarray:
    """An array of either library in float64, or as it is where it holds no real numbers."""
    if isinstance(value, mx.array):
        value = np.array(value.astype(mx.float32) if is_floating(value) else value)
    elif isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    return value.astype(np.float64) if is_floating(value) else np.asarray(value)


def paths(modules: Iterable[str]) -> list[str]:
    """Paths, outermost first."""
    return sorted(modules, key=lambda p: (p.count(".") + bool(p), p))
