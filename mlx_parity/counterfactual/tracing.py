"""The torch calls of a module: recorded with what might be changed, and done otherwise."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
from mlx_parity.counterfactual.activations import ACTIVATIONS
from mlx_parity.counterfactual.alternative import Alternative
from mlx_parity.counterfactual.calls import Call, Change, Proposer
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

TRACED = frozenset((*PROPOSALS, *STOPS, "detach", "matmul", "sub"))
"""The functions whose calls are numbered."""


class Trace(TorchFunctionMode):
    """Records the numbered calls, and what might be changed about each."""

    def __init__(self, backward: bool):
        super().__init__()
        self.backward = backward
        self.calls: list[tuple[str, list[Change]]] = []
        self.recorded: list[Call] = []

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
            self.recorded.append(call)
        return func(*args, **(kwargs or {}))


class Changed(TorchFunctionMode):
    """Does some of the calls otherwise: ``changes`` by the call's number among those traced."""

    def __init__(self, changes: dict[int, Callable[[Call], Any]]):
        super().__init__()
        self.changes, self.at = changes, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {})
        if call.name not in TRACED:
            return func(*args, **(kwargs or {}))
        change = self.changes.get(self.at)
        self.at += 1
        return func(*args, **(kwargs or {})) if change is None else change(call)


def of_calls(calls: Sequence[tuple[str, list[Change]]]) -> Iterator[Alternative]:
    """Each change at each call, and each at all calls of a function at once."""

    def made(change: Change, at: tuple[int, ...], where: str) -> Alternative:
        def alternative(number: float | None) -> Alternative:
            run = change.run if number is None else (lambda c: change.run(c, number))
            what = change.what if number is None else change.what.format(number)
            return Alternative(
                change.trap_id,
                f"{what}{where}",
                lambda module: Changed(dict.fromkeys(at, run)),
            )

        if change.fit is None:
            return alternative(None)
        return Alternative(
            change.trap_id, change.what, alternative(1.0).within, change.fit, alternative
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
        for n, (i, change) in enumerate(members):
            where = f", in the {_ordinal(n + 1)} {name}" if several[name] > 1 else ""
            yield made(change, (i,), where)


def _ordinal(n: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(n, f"{n}th")


def of_neighbours(trace: Trace) -> Iterator[Alternative]:
    """A normalisation and the activation after it, exchanged."""
    for i, ((first, _), (second, _)) in enumerate(itertools.pairwise(trace.calls)):
        if first not in norms.NAMES or second not in ACTIVATIONS:
            continue

        def within(
            module: tnn.Module, i: int = i, activation: Call = trace.recorded[i + 1]
        ) -> Changed:
            seen: list[Call] = []

            def early(c: Call) -> Any:
                seen[:] = [c]
                return activation.func(c.x, *activation.args[1:], **activation.kwargs)

            def late(c: Call) -> Any:
                norm = seen[0]
                return norm.func(c.x, *norm.args[1:], **norm.kwargs)

            return Changed({i: early, i + 1: late})

        yield Alternative("layer-order", f"{second} before {first}", within)
