"""Which module differs first, forward or backward: the smallest whose inputs agree and whose
outputs, or whose gradients, do not.

Two readings of every pair of modules, both judged by bias against noise over nearby points:

accumulated  what each module gets and gives within one evaluation of the whole. Behind the first
    fault everything differs, and says nothing.
isolated     each module of the port is fed the reference's own inputs, and the gradients at the
    reference's own outputs. So errors do not add up, and a second fault shows beside the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.capture import (
    Call,
    Captured,
    Key,
    capture_port,
    capture_reference,
    numpy_of,
)
from mlx_parity.carry import flat, reference_tensors
from mlx_parity.double import InDouble
from mlx_parity.elementary import OfMLX
from mlx_parity.equality import Finding, compare
from mlx_parity.ladder import Climb
from mlx_parity.layers import port_layers, reference_layers
from mlx_parity.layout import Layout, pair_leaves
from mlx_parity.pairing import Map, ModulePair, Pairs, Unpaired, match_layers, pair_modules
from mlx_parity.sides import MLXSide, TorchSide
from mlx_parity.structure import fresh, in_containers, is_floating, leaves, replace

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402

__all__ = [
    "Capture",
    "Guilty",
    "Located",
    "ModulePair",
    "Pairs",
    "Reading",
    "Unpaired",
    "localise",
    "pairs",
]

STAGES = (8, 48)
ALPHA = 1e-6
"""Where is asked after the ladder has told whether: fewer points and a larger rate will do."""

ANOTHER_SHAPE = "takes another shape in the port"

Direction = Literal["forward", "backward"]
Results = dict[str, np.ndarray]


@dataclass(frozen=True)
class Capture:
    """One call of a module: NumPy arrays in the reference's layout where arrays were, and whatever
    else was passed as it was."""

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    gradient: Any = None
    """Of the loss, by the output's place: ``{"": array}`` for an output that is one array."""


@dataclass(frozen=True)
class Called:
    """How the port called a module, whose arguments need not be the reference's."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: dict[str, tuple[str, Layout]]
    """Place of an argument to the reference's place of the same, and how the one becomes the
    other. What is not among them, such as a mask or an index, stays as it was."""
    outputs: tuple[tuple[str, str, Layout], ...]
    """The reference's place of an output, the port's, and how they relate."""
    gradients: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    """Gradients of the module's own parameters under the reference's names."""


@dataclass(frozen=True)
class Guilty:
    """A module whose inputs agree and whose output, or whose gradient, does not."""

    pair: ModulePair
    direction: Direction
    finding: Finding
    capture: Capture
    """Of the reference in float64, at the point where the check was made."""
    between: tuple[str, str] | None = None
    """For a module that holds others which all agree: the last call in it that still agrees and the
    first whose inputs do not. What differs is written between them."""
    judge: Callable[[Callable[..., Any] | None], list[Finding]] | None = field(
        default=None, compare=False, repr=False
    )
    """``judge(port)`` feeds the reference's own inputs to ``port`` (called as the port's module is;
    None: the module itself) and holds its outputs, and for ``backward`` its gradients, against the
    reference's. So an alternative can be tried: the right one brings the bias back to 1."""
    called: Called | None = field(default=None, compare=False, repr=False)

    @property
    def where(self) -> str:
        """For people: the module's path on both sides, its type, and where in it."""
        text = f"{self.pair.name} [{type(self.pair.reference).__name__}]"
        return text if self.between is None else f"{text}, {_between(self.between)}"


def _between(ends: tuple[str, str]) -> str:
    first, last = ends
    if first and last:
        return f"after {first} and before {last}"
    return f"after {first}" if first else f"before {last}"


@dataclass
class Reading:
    """Both readings of one pair; None where a reading could not be taken, and ``note`` says why."""

    pair: ModulePair
    order: int
    """Of the first call's end, in the reference."""
    inputs: Finding | None = None
    """Accumulated: the worst of the inputs."""
    forward: Finding | None = None
    """Accumulated: the worst of the outputs."""
    backward: Finding | None = None
    """Accumulated: the worst of the gradients at the outputs."""
    isolated: Finding | None = None
    isolated_backward: Finding | None = None
    """Isolated: the worst of the gradients by the inputs and by the module's own parameters."""
    note: str = ""

    @property
    def ok(self) -> bool:
        read = (self.forward, self.backward, self.isolated, self.isolated_backward)
        return all(f is None or f.ok for f in read)


@dataclass
class Located:
    """All readings in the order of execution, and the modules that are to blame."""

    readings: list[Reading] = field(default_factory=list)
    guilty: list[Guilty] = field(default_factory=list)
    unpaired: tuple[Unpaired, ...] = ()
    notes: list[str] = field(default_factory=list)


def pairs(reference: tnn.Module, port: mnn.Module, mapping: Map | None = None) -> Pairs:
    """Pair the modules of both trees, by the user's map, by name, then by structure.

    ``mapping`` takes a name of the reference (a module, a branch or a tensor) to the port's, to a
    list of names where the port has split it, or to None where it has no counterpart. The modules
    left over are in the result's ``unpaired``, each with a reason.
    """
    theirs = reference_layers(reference, reference_tensors(reference))
    ours = port_layers(port, flat(port.parameters()))
    return pair_modules(reference, port, match_layers(theirs, ours, port, mapping), mapping)


# ------------------------------------------------------------------------- one evaluation


@dataclass(frozen=True)
class _Tensor:
    """One tensor of one call that both sides have."""

    key: str
    kind: str
    """``in``, ``out`` or ``grad``."""
    pair: int
    reference: tuple[Key, str]
    port: tuple[Key, str]
    layout: Layout


class _Session:
    """One climb's sides, evaluated with every pair's calls recorded."""

    def __init__(self, climb: Climb, pairs: Mapping[str, Pairs], loss: str | None):
        self.climb = climb
        self.loss = loss
        self.pairs: list[ModulePair] = []
        self.of: list[str] = []
        for m, found in pairs.items():
            for pair in found:
                self.pairs.append(pair)
                self.of.append(m)
        self.differentiable = True

    def name(self, side: str, k: int) -> str:
        pair = self.pairs[k]
        return f"{self.of[k]}/{pair.reference_path if side == 'reference' else pair.port_path}"

    def reference_modules(self, side: TorchSide) -> dict[str, tnn.Module]:
        """By name; each side has a copy of its own."""
        found = {}
        for k, pair in enumerate(self.pairs):
            root = side.system.modules[self.of[k]]
            found[self.name("reference", k)] = root.get_submodule(pair.reference_path)
        return found

    def port_modules(self) -> dict[str, mnn.Module]:
        return {self.name("port", k): pair.port for k, pair in enumerate(self.pairs)}

    def reference(self, side: TorchSide, point: Mapping[str, np.ndarray]) -> Captured:
        side.load(point)
        inputs = {n: side._input(point[n]) for n in self.climb.names}
        return capture_reference(self.reference_modules(side), lambda: self._scalar(side, inputs))

    def port(self, point: Mapping[str, np.ndarray]) -> Captured:
        side = self.climb.port
        side.load(point)
        inputs = {n: side._input(n, point[n]) for n in self.climb.names}
        trees = {m: module.parameters() for m, module in side.system.modules.items()}

        def restore() -> None:
            for m, module in side.system.modules.items():
                module.update(trees[m])

        return capture_port(
            self.port_modules(),
            lambda: self._scalar(side, inputs),
            restore,
            gradients=self.differentiable,
        )

    def _scalar(self, side: TorchSide | MLXSide, inputs: Mapping[str, Any]) -> Any:
        if self.loss is not None:
            return side.system.losses[self.loss].function(**inputs)
        assert side.system.forward is not None
        outputs = side.system.forward(**inputs)
        return sum((v.sum() for v in outputs.values() if is_floating(v)), start=0.0)


def _floats(found: Mapping[str, Any]) -> Results:
    return {p: numpy_of(a) for p, a in found.items() if is_floating(a)}


def _schema(
    session: _Session, theirs: Captured, ours: Captured, unlike: bool = False
) -> tuple[list[_Tensor], dict[int, str]]:
    """The tensors that can be compared, and why a pair has none.

    With ``unlike`` a module's only output counts in whatever shape: it is what differs.
    """
    tensors: list[_Tensor] = []
    notes: dict[int, str] = {}
    for k, pair in enumerate(session.pairs):
        a_name, b_name = session.name("reference", k), session.name("port", k)
        a_calls = [c for c in theirs.calls.values() if c.path == a_name]
        b_calls = [c for c in ours.calls.values() if c.path == b_name]
        if not a_calls or not b_calls:
            where = "reference" if not a_calls else "port"
            notes[k] = f"not called in the {where}"
            continue
        if pair.part is not None:
            notes[k] = f"part {pair.part[0] + 1} of {pair.part[1]}"
            continue
        if len(a_calls) != len(b_calls):
            notes[k] = f"called {len(a_calls)} times in the reference, {len(b_calls)} in the port"
        last = _channels_last(pair)
        for a, b in zip(a_calls, b_calls, strict=False):
            for kind, x, y in (
                ("in", _floats(a.inputs), _floats(b.inputs)),
                ("out", _floats(leaves(a.output)), _floats(leaves(b.output))),
            ):
                x = {p: v for p, v in x.items() if v.size and np.isfinite(v).all()}
                paired = pair_leaves(x, y, last)
                if unlike and len(x) == len(y) == 1 and not paired:
                    (p, v), (q, w) = *x.items(), *y.items()
                    same = tuple(range(v.ndim))
                    paired = [(p, q, Layout(same, v.shape, v.shape, v.shape == w.shape))]
                for p, q, layout in paired:
                    key = f"{kind} {k} {a.index} {p}"
                    tensors.append(_Tensor(key, kind, k, (a.key, p), (b.key, q), layout))
                    grads = (*a.key, p) in theirs.gradients and (*b.key, q) in ours.gradients
                    if kind == "out" and grads:
                        key = f"grad {k} {a.index} {p}"
                        tensors.append(_Tensor(key, "grad", k, (a.key, p), (b.key, q), layout))
    return tensors, notes


def _channels_last(pair: ModulePair) -> bool:
    """Whether a module of this kind has its channels last in MLX by convention."""
    conv = (tnn.modules.conv._ConvNd, tnn.modules.batchnorm._NormBase, tnn.GroupNorm)
    return any(isinstance(m, conv) for m in pair.reference.modules())


def _reference_results(captured: Captured, tensors: Sequence[_Tensor]) -> Results:
    return {t.key: numpy_of(_get(captured, t.reference, t.kind)) for t in tensors}


def _port_results(captured: Captured, tensors: Sequence[_Tensor]) -> Results:
    found = {}
    for t in tensors:
        array = numpy_of(_get(captured, t.port, t.kind))
        found[t.key] = t.layout.to_reference(array) if array.shape == t.layout.port else array
    return found


def _get(captured: Captured, at: tuple[Key, str], kind: str) -> Any:
    key, place = at
    if kind == "grad":
        return captured.gradients[(*key, place)]
    call = captured.calls[key]
    return (call.inputs if kind == "in" else leaves(call.output))[place]


# --------------------------------------------------------------------------- in isolation


class _Isolated:
    """One pair outside its model: a function of inputs, cotangents and parameters."""

    def __init__(
        self,
        session: _Session,
        k: int,
        tensors: Sequence[_Tensor],
        theirs: Captured,
        ours: Captured,
    ):
        self.session, self.k = session, k
        self.pair, self.m = session.pairs[k], session.of[k]
        own = [t for t in tensors if t.pair == k and t.reference[0][1] == 0]
        self.inputs = [t for t in own if t.kind == "in"]
        self.outputs = [t for t in own if t.kind == "out"]
        self.gradients = [t for t in own if t.kind == "grad"]
        self.port_call = ours.calls[session.name("port", k), 0]
        mine = theirs.calls[session.name("reference", k), 0]
        self.reference_place = _same_arrays(mine, {t.reference[1]: t.key for t in self.inputs})
        self.port_place = _same_arrays(self.port_call, {t.port[1]: t.key for t in self.inputs})

    def called(self) -> Called:
        by_key = {t.key: t for t in self.inputs}
        inside, here = self.pair.reference_path, self.pair.port_path
        plan = self.session.climb.port.plans[self.m]

        def gradients(own: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = plan.to_reference(
                {".".join(p for p in (here, n) if p): a for n, a in own.items()}
            )
            prefix = f"{inside}." if inside else ""
            return {n.removeprefix(prefix): g for n, g in found.items() if n.startswith(prefix)}

        return Called(
            self.port_call.args,
            self.port_call.kwargs,
            {
                place: (by_key[key].reference[1], by_key[key].layout)
                for place, key in self.port_place.items()
            },
            tuple((t.reference[1], t.port[1], t.layout) for t in self.outputs),
            gradients,
        )

    def point(self, captured: Captured) -> Results:
        """The reference's own inputs and gradients, rounded to float32 for all sides alike."""
        found = {}
        for t in (*self.inputs, *self.gradients):
            found[t.key] = numpy_of(_get(captured, t.reference, t.kind)).astype(np.float32)
        return found

    def reference(self, side: TorchSide, call: Call, point: Mapping[str, np.ndarray]) -> Results:
        root = side.system.modules[self.m]
        module = root.get_submodule(self.pair.reference_path)
        wrt: dict[str, torch.Tensor] = {}
        for t in self.inputs:
            wrt[t.key] = torch.tensor(point[t.key], dtype=side.dtype, requires_grad=True)

        def own(place: str, array: Any) -> Any:
            if place in self.reference_place:
                return wrt[self.reference_place[place]] + 0  # may be changed in place
            return array.to(side.dtype) if is_floating(array) else array

        args = fresh(replace({"args": call.args, "kwargs": call.kwargs}, own))
        with torch.enable_grad():
            output = leaves(module(*args["args"], **args["kwargs"]))
        prefix = self.pair.reference_path
        for name, p in module.named_parameters():
            if p.requires_grad:
                wrt[f"own {self.k} {prefix + '.' if prefix else ''}{name}"] = p
        found = {t.key: numpy_of(output[t.reference[1]]) for t in self.outputs}
        terms = [
            (output[t.reference[1]] * torch.tensor(point[t.key], dtype=side.dtype)).sum()
            for t in self.gradients
            if output[t.reference[1]].requires_grad
        ]
        if terms:
            total = torch.stack(terms).sum()
            grads = torch.autograd.grad(total, list(wrt.values()), allow_unused=True)
            for key, g in zip(wrt, grads, strict=True):
                found[f"by {key}"] = numpy_of(torch.zeros_like(wrt[key]) if g is None else g)
        return found

    def port(
        self, point: Mapping[str, np.ndarray], replaced: Callable[..., Any] | None = None
    ) -> Results:
        module = self.pair.port
        run = replaced or module
        arrays = {t.key: mx.array(t.layout.to_port(point[t.key])) for t in self.inputs}
        cotangents = {t.key: mx.array(t.layout.to_port(point[t.key])) for t in self.gradients}

        def call(arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
            def own(place: str, array: Any) -> Any:
                key = self.port_place.get(place)
                return array if key is None else arrays[key].astype(array.dtype)

            given = {"args": self.port_call.args, "kwargs": self.port_call.kwargs}
            args = fresh(replace(given, own))
            output = leaves(run(*args["args"], **args["kwargs"]))
            return {t.key: output[t.port[1]] for t in self.outputs}

        if not self.session.differentiable or not self.gradients:
            return self._back(call(arrays), {}, {})
        own_tree = module.trainable_parameters()

        def value(tree: Any, arrays: dict[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
            module.update(tree)
            outputs = call(arrays)
            terms = [
                (outputs[f"out {t.key.partition(' ')[2]}"] * cotangents[t.key]).sum()
                for t in self.gradients
            ]
            return sum(terms[1:], start=terms[0]), outputs

        argnums = [i for i, tree in enumerate((flat(own_tree), arrays)) if tree]
        try:
            if not argnums:
                return self._back(call(arrays), {}, {})
            (_, outputs), grads = mx.value_and_grad(value, argnums=argnums)(own_tree, arrays)
        finally:
            module.update(own_tree)
        grads = dict(zip(argnums, grads if len(argnums) > 1 else [grads], strict=True))
        mx.eval(outputs, grads)
        return self._back(outputs, flat(grads.get(0, {})), grads.get(1, {}))

    def _back(
        self,
        outputs: Mapping[str, mx.array],
        own: Mapping[str, mx.array],
        by: Mapping[str, mx.array],
    ) -> Results:
        found = {}
        for t in self.outputs:
            array = numpy_of(outputs[t.key])
            found[t.key] = t.layout.to_reference(array) if array.shape == t.layout.port else array
        for t in self.inputs:
            if t.key in by:
                found[f"by {t.key}"] = t.layout.to_reference(numpy_of(by[t.key]))
        prefix = self.pair.port_path
        arrays = {f"{prefix}.{n}" if prefix else n: numpy_of(a) for n, a in own.items()}
        plan = self.session.climb.port.plans[self.m]
        for name, g in plan.to_reference(arrays).items():
            found[f"by own {self.k} {name}"] = g
        return found


def _same_arrays(call: Call, keys: Mapping[str, str]) -> dict[str, str]:
    """The places of a call's inputs by key: also those that hold the same array once more, as
    query, key and value do."""
    found = dict(keys)
    arrays = _floats(call.inputs)
    for place, array in arrays.items():
        for known, key in keys.items():
            if place not in found and np.array_equal(array, arrays[known]):
                found[place] = key
    return found


def _judge_isolated(
    session: _Session, units: Sequence[_Isolated], replaced: Callable[..., Any] | None = None
) -> tuple[dict[int, list[Finding]], dict[int, str]]:
    """Findings of each pair alone, and why a pair could not be called alone."""
    climb = session.climb
    calls: dict[str, dict[Key, Call]] = {}
    failed: dict[int, str] = {}
    common: dict[int, set[str]] = {}
    wanted = {unit.k for unit in units}

    def narrow(pending: set[str]) -> None:
        wanted.intersection_update({_pair_of(n) for n in pending})

    def draw() -> dict[str, np.ndarray]:
        near = climb.near()
        captured = session.reference(climb.oracle, near)
        calls["now"] = captured.calls
        point = dict(near)
        for unit in units:
            if unit.k in wanted:
                point |= unit.point(captured)
        return point

    def each(evaluate: Callable[[_Isolated], Results]) -> Results:
        found: Results = {}
        for unit in units:
            if unit.k in failed or unit.k not in wanted:
                continue
            try:
                results = evaluate(unit)
            except Exception as error:  # the user's own code, called out of its place
                failed[unit.k] = f"cannot be called alone: {type(error).__name__}: {error}"
                continue
            if unit.k in common:
                results = {n: a for n, a in results.items() if n in common[unit.k]}
            found |= results
        return found

    def reference(side: TorchSide) -> Callable[[Mapping[str, np.ndarray]], Results]:
        def evaluate(point: Mapping[str, np.ndarray]) -> Results:
            side.load(point)
            with OfMLX() if side is climb.usual else InDouble():
                return each(
                    lambda u: u.reference(
                        side, calls["now"][session.name("reference", u.k), 0], point
                    )
                )

        return evaluate

    def port(point: Mapping[str, np.ndarray]) -> Results:
        climb.port.load(point)
        return each(lambda u: u.port(point, replaced))

    trial = draw()
    theirs, ours = reference(climb.oracle)(trial), port(trial)
    for unit in units:  # gradients that only one side can give are no finding here
        mine = {f"{t.key}" for t in unit.outputs}
        tail = {n for n in theirs if n in ours and _pair_of(n) == unit.k}
        common[unit.k] = mine | tail
    judged = [u for u in units if u.k not in failed]
    if not judged:
        return {}, failed
    found: dict[int, list[Finding]] = {}
    sides = reference(climb.oracle), reference(climb.usual), port
    for f in _compare(*sides, draw, failed, narrow):
        found.setdefault(_pair_of(f.tensor), []).append(f)
    return found, failed


def _compare(
    oracle: Any, usual: Any, port: Any, draw: Any, failed: Mapping[int, str], narrow: Any
) -> list[Finding]:
    """``compare``, without the tensors of units that failed meanwhile on one side."""

    def without(f: Any) -> Any:
        return lambda p: {n: a for n, a in f(p).items() if _pair_of(n) not in failed}

    sides = without(oracle), without(usual), without(port)
    return compare(*sides, draw, stages=STAGES, alpha=ALPHA, narrow=narrow)


def _pair_of(name: str) -> int:
    """The pair's number in a key such as ``by own 3 fc.weight`` or ``out 3 0 ``."""
    return int(next(part for part in name.split(" ") if part.isdigit()))


# ------------------------------------------------------------------------------ the verdict


def localise(
    climb: Climb,
    pairs: Mapping[str, Pairs],
    loss: str | None = None,
    isolated: bool = True,
    also: Sequence[Finding] = (),
    unlike: bool = False,
) -> Located:
    """Read every pair of modules at nearby points of a climb and name the guilty ones.

    ``pairs`` is by the name of the system's module. ``loss`` is differentiated; None takes the sum
    of the outputs. ``isolated=False`` leaves out the second reading, which calls all of them again.
    ``also`` are findings of the ladder's own: the module that holds a buffer that differs while all
    outputs agree is guilty too. ``unlike`` where an output has another shape: the first module with
    such an output is looked for.
    """
    session = _Session(climb, pairs, loss)
    theirs = session.reference(climb.oracle, climb.point)
    try:
        ours = session.port(climb.point)
    except Exception:  # MLX has many errors for what has no gradient
        session.differentiable = False
        ours = session.port(climb.point)
    tensors, notes = _schema(session, theirs, ours, unlike)
    located = Located(unpaired=tuple(u for found in pairs.values() for u in found.unpaired))
    if not session.differentiable:
        located.notes.append("the port has no gradient: only the forward pass was read")

    findings = compare(
        lambda p: _reference_results(session.reference(climb.oracle, p), tensors),
        lambda p: _reference_results(session.reference(climb.usual, p), tensors),
        lambda p: _port_results(session.port(p), tensors),
        climb.near,
        stages=STAGES,
        alpha=ALPHA,
    )
    by_key = {f.tensor: f for f in findings}
    readings: dict[int, Reading] = {}
    for k, pair in enumerate(session.pairs):
        calls = [c for c in theirs.calls.values() if c.path == session.name("reference", k)]
        order = calls[0].order if calls else len(theirs.calls) + k
        reading = Reading(pair, order, note=notes.get(k, ""))
        own = [t for t in tensors if t.pair == k]
        reading.inputs = _worst([by_key.get(t.key) for t in own if t.kind == "in"])
        reading.forward = _worst([by_key.get(t.key) for t in own if t.kind == "out"])
        reading.backward = _worst([by_key.get(t.key) for t in own if t.kind == "grad"])
        readings[k] = reading
    broken = [f for f in findings if f.verdict in ("not finite", "shape")]

    wrong = any(r.forward is not None and not r.forward.ok for r in readings.values())
    others = {k for k in readings if _takes_another_shape(session, k, tensors, theirs, ours)}
    for k in others:
        readings[k].note = readings[k].note or ANOTHER_SHAPE
    if isolated and not broken:
        units = [
            _Isolated(session, k, tensors, theirs, ours)
            for k, r in readings.items()
            if r.forward is not None
            and (not wrong or not r.forward.ok)
            and _known(tensors, k)
            and not (wrong and k in others)
        ]
        alone, failed = _judge_isolated(session, units)
        for k, found in alone.items():
            readings[k].isolated = _worst([f for f in found if f.tensor.startswith("out ")])
            readings[k].isolated_backward = _worst([f for f in found if f.tensor.startswith("by ")])
        for k, why in failed.items():
            readings[k].note = readings[k].note or why
    located.readings = sorted(readings.values(), key=lambda r: r.order)
    judged = {k: r for k, r in readings.items() if not (wrong and k in others)}
    located.guilty = _guilty(session, judged, tensors, theirs, ours, by_key)
    for finding in also:
        for guilty in _guilty_buffer(session, readings, tensors, theirs, ours, finding):
            if not any(g.pair is guilty.pair for g in located.guilty):
                located.guilty.append(guilty)
    return located


def _takes_another_shape(
    session: _Session, k: int, tensors: Sequence[_Tensor], theirs: Captured, ours: Captured
) -> bool:
    """Whether the port gives a module an array of a size that the reference's never sees: padded by
    its caller, say. It cannot be fed the reference's own, and is innocent of what comes in."""
    calls = (
        theirs.calls.get((session.name("reference", k), 0)),
        ours.calls.get((session.name("port", k), 0)),
    )
    if calls[0] is None or calls[1] is None:
        return False
    paired = [t for t in tensors if t.pair == k and t.kind == "in" and t.reference[0][1] == 0]
    left = (
        {p: a.size for p, a in _floats(calls[0].inputs).items()},
        {p: a.size for p, a in _floats(calls[1].inputs).items()},
    )
    for t in paired:
        left[0].pop(t.reference[1], None)
        left[1].pop(t.port[1], None)
    return bool(left[0]) and bool(left[1]) and not set(left[0].values()) & set(left[1].values())


def _known(tensors: Sequence[_Tensor], k: int) -> bool:
    """Whether the layout of every input is known: a guess would accuse the innocent."""
    inputs = [t for t in tensors if t.pair == k and t.kind == "in"]
    return all(t.layout.sure or not _ambiguous(t.layout) for t in inputs)


def _ambiguous(layout: Layout) -> bool:
    from mlx_parity.layout import layouts

    return len(list(layouts(layout.reference, layout.port))) > 1


def _worst(found: Sequence[Finding | None]) -> Finding | None:
    known = [f for f in found if f is not None]
    bad = [f for f in known if not f.ok]
    return max(bad or known, key=lambda f: f.bias if f.bias == f.bias else np.inf, default=None)


def _guilty(
    session: _Session,
    readings: Mapping[int, Reading],
    tensors: Sequence[_Tensor],
    theirs: Captured,
    ours: Captured,
    by_key: Mapping[str, Finding],
) -> list[Guilty]:
    forward: dict[int, Finding] = {}
    backward: dict[int, Finding] = {}
    for k, r in readings.items():
        if r.isolated is not None:
            if not r.isolated.ok:
                forward[k] = r.isolated
            elif r.isolated_backward is not None and not r.isolated_backward.ok:
                backward[k] = r.isolated_backward
        elif r.forward is not None and not r.forward.ok and (r.inputs is None or r.inputs.ok):
            forward[k] = r.forward
        if k in forward and _other_indices(session, k, theirs, ours):
            del forward[k]  # it was asked for something else: whoever calls it is to blame
        if k in forward and _unheeded(session, k, readings, tensors, theirs, by_key):
            del forward[k]  # what it lacks is done by its caller, or nobody asks for it
    found: list[Guilty] = []
    for direction, suspects in (("forward", forward), ("backward", backward)):
        if direction == "backward" and found:
            break  # the gradients of what is already wrong are wrong
        for k, finding in suspects.items():
            if any(_inside(session, j, k) for j in suspects if j != k):
                continue
            if direction == "backward" and _harmless(readings, k, finding):
                continue
            found.append(
                Guilty(
                    readings[k].pair,
                    direction,  # type: ignore[arg-type]
                    finding,
                    _captured(session, k, theirs),
                    _ends(session, k, readings) if direction == "forward" else None,
                    _judging(session, k, tensors, theirs, ours),
                    _Isolated(session, k, tensors, theirs, ours).called(),
                )
            )
    found.sort(key=lambda g: next(r.order for r in readings.values() if r.pair is g.pair))
    return found


def _other_indices(session: _Session, k: int, theirs: Captured, ours: Captured) -> bool:
    """Whether a module's first call got other whole numbers than the reference's: shifted tokens,
    positions from 1."""
    calls = (
        theirs.calls.get((session.name("reference", k), 0)),
        ours.calls.get((session.name("port", k), 0)),
    )
    if calls[0] is None or calls[1] is None:
        return False
    found = [
        [numpy_of(a) for a in call.inputs.values() if not is_floating(a)] for call in calls if call
    ]
    if [a.shape for a in found[0]] != [a.shape for a in found[1]]:
        return False
    return any(not np.array_equal(a, b) for a, b in zip(*found, strict=True))


def _unheeded(
    session: _Session,
    k: int,
    readings: Mapping[int, Reading],
    tensors: Sequence[_Tensor],
    theirs: Captured,
    by_key: Mapping[str, Finding],
) -> bool:
    """Whether nobody minds that a module's outputs differ: a port may scale its embedding one line
    later, outside of it, or give the scores for the weights where its caller drops both.

    Who reads an output holds the very same numbers in the reference; where no module does, what
    contains the module tells.
    """
    around = [j for j in readings if j != k and _inside(session, k, j)]
    within = {j for j in readings if j == k or _inside(session, j, k)}
    nearest = max(around, key=lambda j: len(session.name("reference", j)), default=None)
    bad = [t for t in tensors if t.pair == k and t.kind == "out" and not by_key[t.key].ok]
    for t in bad:
        given = numpy_of(_get(theirs, t.reference, "out"))
        read = [
            by_key[s.key].ok
            for s in tensors
            if s.pair not in within
            and (s.kind == "in" or (s.kind == "out" and s.pair in around))
            and np.array_equal(numpy_of(_get(theirs, s.reference, s.kind)), given)
        ]
        if not read and nearest is not None:
            whole = readings[nearest].forward
            read = [whole is not None and whole.ok]
        if not read or not all(read):
            return False
    return bool(bad)


def _harmless(readings: Mapping[int, Reading], k: int, finding: Finding) -> bool:
    """Whether a module's gradient by its input differs alone and nothing before it minds.

    A pool whose windows hold equal zeros splits its gradient otherwise than PyTorch's; the ReLU
    before it, which gave the zeros, stops both.
    """
    before = [
        r.backward
        for r in readings.values()
        if r.order < readings[k].order and r.backward is not None
    ]
    by_input = finding.tensor.startswith("by in ")
    return by_input and bool(before) and all(f.ok for f in before)


def _guilty_buffer(
    session: _Session,
    readings: Mapping[int, Reading],
    tensors: Sequence[_Tensor],
    theirs: Captured,
    ours: Captured,
    finding: Finding,
) -> list[Guilty]:
    """The pair that holds the buffer of a finding such as ``forward net.bn.running_var``."""
    name = finding.tensor.partition(" ")[2]
    for k, reading in readings.items():
        inside = ".".join(p for p in (session.of[k], reading.pair.reference_path) if p)
        agree = reading.inputs is None or reading.inputs.ok
        if name.rpartition(".")[0] == inside and agree:
            judge = _judging(session, k, tensors, theirs, ours)
            capture = _captured(session, k, theirs)
            called = _Isolated(session, k, tensors, theirs, ours).called()
            return [Guilty(reading.pair, "forward", finding, capture, None, judge, called)]
    return []


def _inside(session: _Session, j: int, k: int) -> bool:
    """Whether pair ``j`` lies within pair ``k``, on either side."""
    for side in ("reference", "port"):
        inner, outer = session.name(side, j), session.name(side, k)
        if inner != outer and (outer.endswith("/") and inner.startswith(outer)):
            return True
        if inner.startswith(f"{outer}."):
            return True
    return False


def _captured(session: _Session, k: int, theirs: Captured) -> Capture:
    call = theirs.calls.get((session.name("reference", k), 0))
    if call is None:
        return Capture((), {}, None)

    def plain(value: Any) -> Any:
        return in_containers(value, lambda place, a: numpy_of(a))

    gradient = {
        place: numpy_of(g)
        for (path, index, place), g in theirs.gradients.items()
        if (path, index) == call.key
    }
    output = replace(call.output, lambda place, a: numpy_of(a))
    return Capture(plain(call.args), plain(call.kwargs), output, gradient or None)


def _ends(session: _Session, k: int, readings: Mapping[int, Reading]) -> tuple[str, str] | None:
    """The last call within ``k`` whose output agrees, and the first whose inputs do not."""
    inner = sorted(
        (r for j, r in readings.items() if j != k and _inside(session, j, k)),
        key=lambda r: r.order,
    )
    inner = [r for r in inner if r.forward is not None]
    first_bad = next(
        (i for i, r in enumerate(inner) if r.inputs is not None and not r.inputs.ok), None
    )
    if not inner:
        return None
    if first_bad is None:
        last = inner[-1]
        return (_path(last), "") if last.forward is not None and last.forward.ok else None
    before = [r for r in inner[:first_bad] if r.forward is not None and r.forward.ok]
    return (_path(before[-1]) if before else "", _path(inner[first_bad]))


def _path(reading: Reading) -> str:
    return reading.pair.reference_path


def _judging(
    session: _Session, k: int, tensors: Sequence[_Tensor], theirs: Captured, ours: Captured
) -> Callable[[Callable[..., Any] | None], list[Finding]] | None:
    if not any(t.pair == k and t.kind == "out" for t in tensors):
        return None

    def judge(port: Callable[..., Any] | None = None) -> list[Finding]:
        unit = _Isolated(session, k, tensors, theirs, ours)
        found, failed = _judge_isolated(session, [unit], port)
        if failed:
            raise ValueError(failed[k])
        return found[k]

    return judge
