"""How a block's norms, branches and sums stand to each other: before or behind, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn as tnn

from mlx_parity.counterfactual.alternative import Alternative
from mlx_parity.counterfactual.calls import Call, T
from mlx_parity.counterfactual.tracing import REACH, Changed, Changes, Trace, like, numbered


class Visit(NamedTuple):
    """A child's first call: which of the traced calls are its own, what it was given and gave."""

    start: int
    end: int
    x: Any
    y: Any
    norm: bool


def watched(module: tnn.Module, trace: Trace) -> dict[str, Visit]:
    """The first call of each child by its path; known once the module has been called."""
    found: dict[str, Visit] = {}
    starts: dict[str, int] = {}

    def before(path: str) -> Callable[..., None]:
        return lambda *_: starts.update({path: len(trace.calls)})

    def after(path: str) -> Callable[..., None]:
        def hook(child: tnn.Module, args: Any, y: Any) -> None:
            x = args[0] if args else None
            norm = "norm" in type(child).__name__.lower()
            found.setdefault(path, Visit(starts[path], len(trace.calls), x, y, norm))

        return hook

    for path, child in module.named_modules():
        if path:
            child.register_forward_pre_hook(before(path))
            child.register_forward_hook(after(path))
    return found


@contextlib.contextmanager
def forwarding(module: tnn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, the module computes something else."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def of_norm_places(trace: Trace, visits: Mapping[str, Visit]) -> Iterator[Alternative]:
    """A norm of a branch's input, of its result, or of the sum: one for another."""
    for path, v in visits.items():
        if not v.norm or not isinstance(v.x, T) or not isinstance(v.y, T):
            continue
        for said, tensor in (("a branch's input", v.x), ("its result", v.y)):
            at = _sum_of(trace, tensor, v.end)
            if at is not None:
                what = f"{path} of the {numbered(trace, at)}, not of {said}"
                within = _behind(path, at - (v.end - v.start))  # without the child's own calls
                yield Alternative("norm-first", what, within, calls=(v.start, at))
        at = next((j for j in range(v.start) if trace.results[j] is v.x), None)
        if at is None or trace.recorded[at].name != "add":
            continue
        for x in trace.recorded[at].args[:2]:
            into = [k for k in range(at) if isinstance(x, T) and _reads(trace.recorded[k], x)]
            if into:
                what = f"{path} of one summand's branch, not of the {numbered(trace, at)}"
                yield Alternative("norm-first", what, _before(path, into), calls=(at, v.start))


def _reads(call: Call, x: T) -> bool:
    return bool(call.args) and call.args[0] is x


def _sum_of(trace: Trace, x: T, start: int) -> int | None:
    """The first sum from the call ``start`` on of which ``x`` is a part."""
    for j in range(start, len(trace.recorded)):
        call = trace.recorded[j]
        if call.name == "add" and any(a is x for a in call.args[:2]):
            return j
    return None


Norm = Callable[[Any], Any]


def _behind(path: str, at: int) -> Callable[[tnn.Module], Any]:
    return _moved(path, lambda norm: {at: lambda c: norm(c.run())})


def _before(path: str, into: Sequence[int]) -> Callable[[tnn.Module], Any]:
    return _moved(path, lambda norm: dict.fromkeys(into, lambda c: like(c, norm(c.x))))


def _moved(path: str, to: Callable[[Norm], Changes]) -> Callable[[tnn.Module], Any]:
    """A child that computes nothing in its own place, and calls that compute it instead."""

    @contextlib.contextmanager
    def within(module: tnn.Module) -> Iterator[None]:
        child = module.get_submodule(path)
        changed = Changed(to(child.forward))
        with forwarding(child, lambda x, *_, **__: x), changed:
            yield

    return within


_STARTS = ("linear", "conv1d", "conv2d")
"""Calls that a branch begins and ends with."""


def of_rows(trace: Trace, visits: Mapping[str, Visit]) -> Iterator[Alternative]:
    """Branches in a row that are side by side in the original: one reads the other's result too."""
    starts = [i for i, c in enumerate(trace.recorded) if c.name in _STARTS]
    for i in starts:
        x = trace.recorded[i].x
        norm = next((path for path, v in visits.items() if v.norm and v.y is x), None)
        for j in range(i - 1, max(-1, i - REACH), -1):
            other = trace.results[j]
            alike = isinstance(other, T) and other.shape == x.shape and other.dtype == x.dtype
            if not alike or other is x or trace.recorded[j].name not in _STARTS:
                continue
            same = tuple(k for k in starts if k > j and trace.recorded[k].x is x)
            source, target = numbered(trace, j), numbered(trace, i)
            yield Alternative(
                "another-tensor",
                f"the result of the {source} added to the input of the {target}",
                _in_a_row(j, same, None),
                calls=same,
            )
            if norm is not None:
                yield Alternative(
                    "another-tensor",
                    f"the result of the {source} added to what {norm} takes for the {target}",
                    _in_a_row(j, same, norm),
                    calls=same,
                )


def _in_a_row(source: int, at: Sequence[int], norm: str | None) -> Callable[[tnn.Module], Any]:
    @contextlib.contextmanager
    def within(module: tnn.Module) -> Iterator[None]:
        result: list[T] = []
        before: list[T] = []
        child = module.get_submodule(norm) if norm else tnn.Identity()
        once = child.forward

        def noted(x: T, *args: Any, **kwargs: Any) -> Any:
            before[:] = [x]
            return once(x, *args, **kwargs)

        def first(c: Call) -> Any:
            result[:] = [c.run()]
            return result[0]

        def then(c: Call) -> Any:
            return like(c, once(before[0] + result[0]) if norm else c.x + result[0])

        with forwarding(child, noted), Changed({source: first} | dict.fromkeys(at, then)):
            yield

    return within
