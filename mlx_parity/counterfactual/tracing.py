"""The torch calls of a module: recorded with what might be changed, and done otherwise."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn as tnn
from torch.overrides import TorchFunctionMode

from mlx_parity.counterfactual import (
    activations,
    arithmetic,
    arrangement,
    attention,
    losses,
    norms,
    sampling,
    weighted,
)
from mlx_parity.counterfactual.activations import ACTIVATIONS, inserted
from mlx_parity.counterfactual.alternative import Alternative
from mlx_parity.counterfactual.calls import Call, Change, Proposer, T
from mlx_parity.counterfactual.gradients import STOPS, backward

_FAMILIES = (
    activations,
    norms,
    attention,
    weighted,
    sampling,
    arrangement,
    arithmetic,
    losses,
)

PROPOSALS: dict[str, Proposer] = {
    name: proposer for family in _FAMILIES for name, proposer in family.PROPOSALS.items()
}
"""What might be changed about a call, by the function's name."""

_INSERTED_AFTER = ("add", "linear", "conv1d", "conv2d", "matmul", *norms.NAMES)
"""Calls behind which an activation may stand."""

TRACED = frozenset((*PROPOSALS, *STOPS, *_INSERTED_AFTER, "detach", "sub", "sin", "cos"))
"""The functions whose calls are numbered."""


class Trace(TorchFunctionMode):
    """Records the numbered calls, and what might be changed about each."""

    def __init__(self, backward: bool):
        super().__init__()
        self.backward = backward
        self.calls: list[tuple[str, list[Change]]] = []
        self.inserted: list[tuple[str, list[Change]]] = []
        self.recorded: list[Call] = []
        self.results: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {})
        if call.name in TRACED:
            changes: list[Change] = []
            with contextlib.suppress(RuntimeError, IndexError, TypeError, ValueError):
                if call.name in PROPOSALS:
                    changes += PROPOSALS[call.name](call)
                if self.backward:
                    changes += backward(call)
            self.calls.append((call.name, changes))
            more = inserted(call) if call.name in _INSERTED_AFTER and not self.backward else ()
            self.inserted.append((call.name, list(more)))
            self.recorded.append(call)
            self.results.append(func(*args, **(kwargs or {})))
            return self.results[-1]
        return func(*args, **(kwargs or {}))

    @property
    def shapes(self) -> list[str]:
        """Of each call's arguments, in words that are equal where they are."""

        def said(value: Any) -> Any:
            if isinstance(value, T):
                return tuple(value.shape)
            return [said(v) for v in value] if isinstance(value, tuple | list) else value

        return [str([said(a) for a in call.args]) for call in self.recorded]


class Changed(TorchFunctionMode):
    """Does some of the calls otherwise: ``changes`` by the call's number among those traced."""

    def __init__(self, changes: Mapping[int, Callable[[Call], Any]]):
        super().__init__()
        self.changes, self.at = changes, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {})
        if call.name not in TRACED:
            return func(*args, **(kwargs or {}))
        change = self.changes.get(self.at)
        self.at += 1
        return func(*args, **(kwargs or {})) if change is None else change(call)


def of_calls(
    calls: Sequence[tuple[str, list[Change]]], shapes: Sequence[str]
) -> Iterator[Alternative]:
    """Each change at each call, at all calls of a function at once, and at those of equal shapes.

    ``shapes`` says of each call what shapes its arguments have.
    """

    def made(change: Change, at: tuple[int, ...], where: str) -> Alternative:
        def alternative(number: float | None) -> Alternative:
            run = change.run if number is None else (lambda c: change.run(c, number))
            what = change.what if number is None else change.what.format(number)
            return Alternative(
                change.trap_id,
                f"{what}{where}",
                lambda module: Changed(dict.fromkeys(at, run)),
                calls=at,
            )

        if change.fit is None:
            return alternative(None)
        return Alternative(
            change.trap_id, change.what, alternative(1.0).within, change.fit, alternative, at
        )

    groups: dict[tuple[str, str, str], list[tuple[int, Change]]] = {}
    for i, (name, changes) in enumerate(calls):
        for change in changes:
            groups.setdefault((name, change.trap_id, change.what), []).append((i, change))
    several = {name: sum(n == name for n, _ in calls) for name, _ in calls}
    for (name, _, _), members in groups.items():
        if len(members) > 1:
            change = members[0][1]
            yield made(change, tuple(i for i, _ in members), f", in every {name}")
    for (name, _, _), members in groups.items():
        alike: dict[str, list[tuple[int, Change]]] = {}
        for i, change in members:
            alike.setdefault(shapes[i], []).append((i, change))
        for some in alike.values():
            if 1 < len(some) < len(members):
                yield made(
                    some[0][1], tuple(i for i, _ in some), f", in every {name} of its shapes"
                )
    for (name, _, _), members in groups.items():
        for n, (i, change) in enumerate(members):
            where = f", in the {_ordinal(n + 1)} {name}" if several[name] > 1 else ""
            yield made(change, (i,), where)


def _ordinal(n: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(n, f"{n}th")


def of_neighbours(trace: Trace) -> Iterator[Alternative]:
    """A normalisation and its activation, a sum and what stands before or behind it, exchanged."""
    for i, ((first, _), (second, _)) in enumerate(itertools.pairwise(trace.calls)):
        one, two = trace.recorded[i], trace.recorded[i + 1]
        said = f"{second} before {first}"
        if first in norms.NAMES and second in ACTIVATIONS:
            yield Alternative("layer-order", said, functools.partial(_exchanged, i, two))
        unary = (*norms.NAMES, *ACTIVATIONS)
        if first == "add" and second in unary and len(one.args) == 2:
            for place in (1, 0):
                what = f"{second} of one summand, not of the sum"
                yield Alternative("layer-order", what, functools.partial(_within_sum, i, place))
        if first in unary and second == "add" and len(two.args) == 2:
            what = f"{first} of the sum, not of one summand"
            yield Alternative("layer-order", what, functools.partial(_around_sum, i))


def like(call: Call, x: Any) -> Any:
    """A call of one tensor with another in its place."""
    return call.func(x, *call.args[1:], **call.kwargs)


def _exchanged(i: int, activation: Call, module: tnn.Module) -> Changed:
    seen: list[Call] = []

    def early(c: Call) -> Any:
        seen[:] = [c]
        return like(activation, c.x)

    return Changed({i: early, i + 1: lambda c: like(seen[0], c.x)})


def _within_sum(i: int, place: int, module: tnn.Module) -> Changed:
    seen: list[Call] = []

    def early(c: Call) -> Any:
        seen[:] = [c]
        return c.run()

    def late(c: Call) -> Any:
        summands = seen[0].args
        return summands[1 - place] + like(c, summands[place])

    return Changed({i: early, i + 1: late})


def _around_sum(i: int, module: tnn.Module) -> Changed:
    seen: list[Call] = []

    def early(c: Call) -> Any:
        seen[:] = [c]
        return c.x * 1

    return Changed({i: early, i + 1: lambda c: like(seen[0], c.run())})


class _Rewired(TorchFunctionMode):
    """Gives one call an earlier tensor in the place of one of its arguments."""

    def __init__(self, at: int, place: int, source: tuple[int, int | None]):
        super().__init__()
        self.wanted, self.place, self.source = at, place, source
        self.at = 0
        self.kept: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {})
        if call.name not in TRACED:
            return func(*args, **(kwargs or {}))
        number, self.at = self.at, self.at + 1
        if number == self.wanted:
            args = (*args[: self.place], self.kept, *args[self.place + 1 :])
        result = func(*args, **(kwargs or {}))
        if number == self.source[0]:
            self.kept = result if self.source[1] is None else args[self.source[1]]
        return result


_REWIRED = ("add", "mul", "div", "matmul", "linear", "conv1d", "conv2d", *norms.NAMES)
_REWIRED_TOO = ("scaled_dot_product_attention", "multi_head_attention_forward")
REACH = 40
"""How many calls back a tensor is looked for."""


def of_other_tensors(trace: Trace) -> Iterator[Alternative]:
    """A call that reads another tensor of the same shape, one that was there before."""
    for i, call in enumerate(trace.recorded):
        if call.name not in (*_REWIRED, *_REWIRED_TOO):
            continue
        places = 3 if call.name in _REWIRED_TOO else 2 if call.name in ("add", "mul") else 1
        for place in range(min(places, len(call.args))):
            wanted = call.args[place]
            if not isinstance(wanted, T) or wanted.ndim < 2 or isinstance(wanted, tnn.Parameter):
                continue
            known = [wanted]
            for j in range(i - 1, max(-1, i - REACH), -1):
                earlier = trace.recorded[j]
                options: list[tuple[int | None, Any]] = [(None, trace.results[j])]
                options += list(enumerate(earlier.args))
                for n, a in options:
                    if not isinstance(a, T) or a.shape != wanted.shape or a.dtype != wanted.dtype:
                        continue
                    if any(a is k or torch.equal(a, k) for k in known):
                        continue
                    known.append(a)
                    said = "the result" if n is None else f"argument {n + 1}"
                    yield Alternative(
                        "another-tensor",
                        f"{said} of the {numbered(trace, j)} for argument {place + 1} of the "
                        f"{numbered(trace, i)}",
                        functools.partial(_rewired, i, place, (j, n)),
                        calls=(i,),
                    )


def _rewired(at: int, place: int, source: tuple[int, int | None], module: tnn.Module) -> _Rewired:
    return _Rewired(at, place, source)


def _changed(changes: Mapping[int, Callable[[Call], Any]], module: tnn.Module) -> Changed:
    return Changed(changes)


def numbered(trace: Trace, i: int) -> str:
    name = trace.recorded[i].name
    nth = sum(c.name == name for c in trace.recorded[: i + 1])
    return f"{_ordinal(nth)} {name}"


def of_rotations(trace: Trace) -> Iterator[Alternative]:
    """Rotary positions, by their cosines and sines: none, turned back, of neighbours."""
    names = [name for name, _ in trace.calls]
    turns = [
        (i, j)
        for i, j in itertools.pairwise(k for k, n in enumerate(names) if n in ("sin", "cos"))
        if names[i] != names[j]
    ]
    turns = turns[::2] if len(turns) > 1 else turns

    def unturned(c: Call) -> Any:
        return c.run() * 0 + (c.name == "cos")

    def backwards(c: Call) -> Any:
        return -c.run() if c.name == "sin" else c.run()

    for said, change in (("no rotation", unturned), ("the rotation turned back", backwards)):
        every = {k: change for pair in turns for k in pair}
        if turns:
            yield Alternative("position-offset", said, functools.partial(_changed, every))
        for n, pair in enumerate(turns if len(turns) > 1 else ()):
            some = dict.fromkeys(pair, change)
            yield Alternative(
                "position-offset",
                f"{said}, in the {_ordinal(n + 1)} place",
                functools.partial(_changed, some),
            )
    paired: dict[int, Callable[[Call], Any]] = {}
    for i, call in enumerate(trace.recorded):
        if call.name == "chunk" and _halves_last(trace.results[i]):
            paired[i] = lambda c: (_every_other(0, c), _every_other(1, c))
        elif call.name in ("cat", "concat"):
            parts = call.get("tensors", call.x)
            if _halves_last(parts) and call.get("dim", 0) in (-1, parts[0].ndim - 1):
                paired[i] = _interleaved
        elif call.name == "__getitem__" and (half := _half(call)) is not None:
            paired[i] = functools.partial(_every_other, half)
    if any(names[i] in ("cat", "concat") for i in paired):
        yield Alternative(
            "rotary-layout", "pairs of neighbours for halves", functools.partial(_changed, paired)
        )


def of_given_rotations(trace: Trace) -> Iterator[Alternative]:
    """Rotary positions whose cosines and sines were given: ``x * cos + half(x) * sin``, where
    ``half`` gives the second half of the last axis, negated, before the first."""
    found = list(_rotations(trace))
    if not found:
        return
    names = ("q", "k") if len(found) == 2 else tuple(map(_ordinal, range(1, len(found) + 1)))
    subsets = [("", found)] if len(found) == 1 else []
    if len(found) > 1:
        subsets = [
            ("", found),
            *((f", in {n} alone", [f]) for n, f in zip(names, found, strict=True)),
        ]

    def of(some: Sequence[_Rotation], change: Callable[[_Rotation], Changes]) -> Callable[..., Any]:
        return functools.partial(_changed, {i: f for r in some for i, f in change(r).items()})

    for where, some in subsets:
        for said, trap, change in (
            ("pairs of neighbours for halves", "rotary-layout", _of_neighbours),
            ("no rotation", "position-offset", _unrotated),
            ("the rotation turned back", "position-offset", _turned_back),
        ):
            yield Alternative(trap, f"{said}{where}", of(some, change))
    cos, sin = (trace.recorded[n].args[1] for n in (found[0].by_cos, found[0].by_sin))
    yield from _of_values(trace, found, cos, sin)
    for where, some in subsets:
        for trap, start, spoken, angles in _ANGLES:

            def at(
                number: float,
                where: str = where,
                some: Sequence[_Rotation] = some,
                trap: str = trap,
                spoken: Any = spoken,
                angles: Any = angles,
            ) -> Alternative:
                what = f"{spoken(number, _base(cos, sin))}{where}"
                return Alternative(trap, what, of(some, lambda r: _turned(angles, number, r)))

            yield Alternative(trap, f"{trap}{where}", at(start).within, (start, False), at)


def _of_values(trace: Trace, found: Sequence[_Rotation], cos: T, sin: T) -> Iterator[Alternative]:
    """The values rotated as queries and keys are: behind the last of these a product takes them."""

    def rotated(x: T) -> T:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    for i, call in enumerate(trace.recorded):
        place = {"matmul": 1, "scaled_dot_product_attention": 2}.get(call.name)
        if place is None or i < max(r.sum for r in found) or len(call.args) <= place:
            continue
        if isinstance(call.args[place], T) and call.args[place].shape[-2:] == cos.shape[-2:]:

            def change(c: Call, place: int = place) -> Any:
                args = (*c.args[:place], rotated(c.args[place]), *c.args[place + 1 :])
                return c.func(*args, **c.kwargs)

            yield Alternative(
                "position-offset",
                "the values rotated too",
                functools.partial(_changed, {i: change}),
            )


Changes = dict[int, Callable[[Call], Any]]


class _Rotation(NamedTuple):
    """The calls of one rotation by their numbers."""

    by_cos: int
    halves: tuple[int, ...]
    by_sin: int
    sum: int


def _rotations(trace: Trace) -> Iterator[_Rotation]:
    calls, results = trace.recorded, trace.results
    for i, call in enumerate(calls):
        if call.name not in ("cat", "concat"):
            continue
        by_sin = next((n for n in _times(trace) if calls[n].x is results[i]), None)
        last = by_sin is not None and next(
            (
                n
                for n, c in enumerate(calls)
                if c.name == "add" and len(c.args) > 1 and c.args[1] is results[by_sin]
            ),
            None,
        )
        if by_sin is None or not last:
            continue
        by_cos = next((n for n in _times(trace) if calls[last].x is results[n]), None)
        if by_cos is None or calls[by_cos].args[1].shape != calls[by_sin].args[1].shape:
            continue
        x = calls[by_cos].x
        halves = tuple(n for n in range(i) if calls[n].x is x and _is_half(calls[n]))
        if halves:
            yield _Rotation(by_cos, halves, by_sin, last)


def _times(trace: Trace) -> Iterator[int]:
    for n, call in enumerate(trace.recorded):
        if call.name == "mul" and len(call.args) > 1 and isinstance(call.args[1], T):
            yield n


def _is_half(call: Call) -> bool:
    return call.name == "chunk" or (call.name == "__getitem__" and _half(call) is not None)


def _of_neighbours(r: _Rotation) -> Changes:
    """The channels put into halves first, and back into pairs of neighbours behind the sum."""

    def first(c: Call) -> Any:
        return c.func(torch.cat([c.x[..., ::2], c.x[..., 1::2]], -1), *c.args[1:], **c.kwargs)

    def back(c: Call) -> Any:
        return torch.stack(c.run().chunk(2, -1), -1).flatten(-2)

    return dict.fromkeys((r.by_cos, *r.halves), first) | {r.sum: back}


def _unrotated(r: _Rotation) -> Changes:
    return {r.by_cos: lambda c: c.x * 1, r.by_sin: lambda c: c.run() * 0}


def _turned_back(r: _Rotation) -> Changes:
    return {r.by_sin: lambda c: -c.run()}


def _turned(angles: Callable[[T, T, float], T], number: float, r: _Rotation) -> Changes:
    """Other angles, computed from the cosines and sines that were given."""
    kept: list[Call] = []

    def first(c: Call) -> Any:
        kept[:] = [c]
        return c.x * 0

    def both(c: Call) -> Any:
        cos, sin = kept[0].args[1], c.args[1]
        turned = angles(*_frequencies(cos, sin), number)
        strength = torch.sqrt(cos**2 + sin**2)  # some scale both
        return strength * (kept[0].x * torch.cos(turned) + c.x * torch.sin(turned))

    return {r.by_cos: first, r.by_sin: both}


def _frequencies(cos: T, sin: T) -> tuple[T, T]:
    """Positions from the first, and the angle of each channel from one position to the next."""
    turn = torch.atan2(sin, cos)
    step = turn[..., 1:2, :] - turn[..., :1, :] if cos.shape[-2] > 1 else turn
    step = torch.remainder(step + math.pi, 2 * math.pi) - math.pi
    positions = torch.arange(cos.shape[-2], dtype=cos.dtype)[:, None]
    return positions + turn[..., :1, :1] / step[..., :1], step


def _base(cos: T, sin: T) -> float:
    """The base of which the channels' frequencies are powers, about."""
    _, step = _frequencies(cos, sin)
    half = step.shape[-1] // 2
    return float(step.flatten()[1].abs() ** -half) if half > 1 else math.nan


_ANGLES: tuple[tuple[str, float, Callable[[float, float], str], Callable[..., T]], ...] = (
    (
        "rotary-base",
        1.0,
        lambda t, base: f"a rotary base of about {base**t:.2g} for {base:.2g}",
        lambda positions, step, t: positions * step.abs() ** t * step.sign(),
    ),
    (
        "position-offset",
        0.0,
        lambda s, base: f"positions {s:+.6g}",
        lambda positions, step, s: (positions + s) * step,
    ),
    (
        "position-offset",
        1.0,
        lambda s, base: f"positions times {s:.6g}",
        lambda positions, step, s: positions * s * step,
    ),
)
"""Trap, the original's number, how it is said, and the angles that a number makes."""


def _halves_last(parts: Any) -> bool:
    return isinstance(parts, tuple | list) and len(parts) == 2 and parts[0].shape == parts[1].shape


def _half(call: Call) -> int | None:
    """Which half of the last axis an index takes."""
    index, size = call.args[1], call.x.shape[-1]
    if not (isinstance(index, tuple) and index and isinstance(index[-1], slice)) or size % 2:
        return None
    if any(k is not Ellipsis and k != slice(None) for k in index[:-1]):
        return None
    ends = index[-1].indices(size)
    return {(0, size // 2, 1): 0, (size // 2, size, 1): 1}.get(ends)


def _every_other(first: int, call: Call) -> Any:
    return call.x[..., first::2]


def _interleaved(call: Call) -> Any:
    return torch.stack(tuple(call.get("tensors", call.x)), -1).flatten(-2)
