"""One module on both sides, called at the same nearby points, to hold against alternatives.

A :class:`Bench` calls the port's module once at each point, as the reference is called or as it was
seen to be, and keeps what came out, under the reference's names and in its layout. Any change to
the reference is then judged by the test of equality without another call of the port.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.carry import Plan, channels_first, channels_last, flat, match
from mlx_parity.counterfactual import Alternative
from mlx_parity.double import InDouble
from mlx_parity.elementary import OfMLX
from mlx_parity.equality import FLOOR, Tensors, compare, jitter
from mlx_parity.errors import CarryError
from mlx_parity.localise import Called
from mlx_parity.structure import fresh, in_containers, leaves, replace

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402

POINTS = 48
"""Nearby points at which alternatives are tried: the port is called there once for all of them."""

ALPHA = 1e-4
"""Rate at which the right alternative is rejected by chance: bound 5.8 at 48 points."""


def named_arrays(value: Any) -> dict[str, Any]:
    """The arrays and tensors of a result, by place."""
    return {f"output.{p}" if p else "output": a for p, a in leaves(value).items()}


def _floats(array: np.ndarray) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating))


def _discrete(array: np.ndarray) -> torch.Tensor:
    """Indices as PyTorch takes them; masks stay masks."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.long() if np.issubdtype(array.dtype, np.integer) else tensor


@dataclass
class Bench:
    """One module on both sides with its inputs at nearby points; what the port computes there.

    ``gradients``: gradients to the floating inputs, under a drawn cotangent, are compared as well.
    """

    reference: tnn.Module
    port: mnn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradients: bool
    exact: bool = False
    """Whether the inputs themselves are the one point: a tie does not survive a nearby one."""
    ones: bool = False
    """Whether the cotangent is 1 everywhere, so that gradients are derivatives."""
    called: Called | None = None
    """How the port is called, where that is known; else as the reference is."""
    plan: Plan | None = None
    count: int = POINTS
    """How many nearby points."""

    def __post_init__(self) -> None:
        self.buffers = {k for k, b in self.reference.named_buffers() if b.is_floating_point()}
        try:
            self.plan = match(self.reference, self.port)
        except CarryError:
            self.plan = None
        self.oracle = copy.deepcopy(self.reference).to(torch.float64)
        self.usual = copy.deepcopy(self.reference).to(torch.float32)
        rng = np.random.default_rng(0)
        flat = self._flat(self.inputs, self.kwargs)
        # What the port is not given, a mask or the sines of positions, it makes itself, exactly.
        own = set(flat)
        if self.called is not None:
            own &= {_in_name(source) for source, _ in self.called.inputs.values()}
        near = {k: a for k, a in flat.items() if k in own}
        self.points = [flat]
        self.varied = not self.exact and any(map(_floats, near.values()))
        if not self.exact:
            self.points = [flat | jitter(near, rng) for _ in range(self.count)]
        first = self.run(self.oracle, self.points[0])
        self.cotangents = {
            k: np.ones(a.shape) if self.ones else rng.standard_normal(a.shape)
            for k, a in first.items()
            if not k.startswith("buffer/")
        }
        self.layout = self._find_layout() if self.called is None else (False, False)
        self.ported = [self.run_port(p) for p in self.points]
        self.rounding = []
        for p in self.points[::2]:
            right = self.run(self.oracle, p)
            with OfMLX():
                usual = self.run(self.usual, p)
            self.rounding.append({k: usual[k] - right[k] for k in right})

    def _flat(self, inputs: Any, kwargs: Any) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}

        def named(name: str, array: Any) -> Any:
            found[name] = array
            return array

        in_containers((inputs, kwargs), named, "in")
        return {k: a.astype(np.float32) if _floats(a) else a for k, a in found.items()}

    def run(self, module: tnn.Module, point: Tensors) -> dict[str, np.ndarray]:
        """The reference, or a changed one, in its own precision."""
        dtype = next(
            (p.dtype for p in [*module.parameters(), *module.buffers()] if p.is_floating_point()),
            torch.float64 if module is self.oracle else torch.float32,
        )
        tensors: dict[str, torch.Tensor] = {}
        for name, array in point.items():
            if _floats(array):
                tensors[name] = torch.tensor(array, dtype=dtype, requires_grad=self.gradients)
            else:
                tensors[name] = _discrete(array)
        state = {name: buffer.clone() for name, buffer in module.named_buffers()}
        try:
            return self._run(module, tensors)
        finally:  # after the backward pass, which notices when a buffer is written to
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    buffer.copy_(state[name])

    def _run(
        self, module: tnn.Module, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        inputs, kwargs = _filled(self.inputs, self.kwargs, tensors)
        exactly = InDouble() if module is self.oracle else contextlib.nullcontext()
        with exactly, contextlib.nullcontext() if self.gradients else torch.no_grad():
            outputs = named_arrays(module(*inputs, **kwargs))
        found = {
            k: v.detach().to(torch.float64).numpy().copy()
            for k, v in outputs.items()
            if v.is_floating_point()
        }
        if not self.gradients:
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    found[f"buffer/{name}"] = buffer.to(torch.float64).numpy().copy()
            return found
        if not hasattr(self, "cotangents"):
            return found  # the first call, which only asks for the outputs' shapes
        wrt = {f"d/{k}": x for k, x in tensors.items() if x.requires_grad}
        wrt |= {f"w/{k}": p for k, p in module.named_parameters()}
        found |= {k: np.zeros(tuple(x.shape)) for k, x in wrt.items()}
        reached = {k: x for k, x in wrt.items() if x.requires_grad}
        terms = [
            (v * torch.from_numpy(self.cotangents[k]).to(v.dtype)).sum()
            for k, v in outputs.items()
            if k in self.cotangents and v.requires_grad
        ]
        if terms and reached:
            total = torch.stack(terms).sum()
            grads = torch.autograd.grad(total, list(reached.values()), allow_unused=True)
            for k, g in zip(reached, grads, strict=True):
                if g is not None:
                    found[k] = g.to(torch.float64).numpy()
        return found

    def call(self, module: tnn.Module) -> Any:
        """What the reference, or a changed one, returns at the first point, in float64."""
        tensors = {
            k: torch.tensor(a, dtype=torch.float64, requires_grad=self.gradients)
            if _floats(a)
            else _discrete(a)
            for k, a in self.points[0].items()
        }
        inputs, kwargs = _filled(self.inputs, self.kwargs, tensors)
        with InDouble():
            return module.to(torch.float64)(*inputs, **kwargs)

    def _find_layout(self) -> tuple[bool, bool]:
        """Whether inputs, and outputs, are channels-last in the port: what runs and fits best."""
        right = self.run(self.oracle, self.points[0])
        best: tuple[tuple[int, float], tuple[bool, bool]] | None = None
        for layout in ((True, True), (False, False), (True, False), (False, True)):
            try:
                got = self._call_port(self.points[0], layout)
            except Exception:
                continue
            same = [k for k in got if k in right and got[k].shape == right[k].shape]
            error = sum(float(np.linalg.norm(got[k] - right[k])) for k in same)
            rank = (-len(same), error)
            if got and (best is None or rank < best[0]):
                best = (rank, layout)
        if best is None:
            raise RuntimeError("the port's module does not take the reference's inputs")
        return best[1]

    def _outputs(self, found: Mapping[str, Any]) -> dict[str, mx.array]:
        """The port's floating outputs under the reference's names: by name, else by size.

        Recurrent layers and caches return other tuples than PyTorch's.
        """
        arrays = {k: v for k, v in found.items() if mx.issubdtype(v.dtype, mx.floating)}
        if set(arrays) == set(self.cotangents):
            return arrays
        paired = {}
        left = list(arrays.items())
        for name, cotangent in self.cotangents.items():
            for k, v in left:
                if sorted(v.shape) == sorted(cotangent.shape):
                    paired[name] = v
                    left = [(j, w) for j, w in left if j != k]
                    break
        return paired or dict(zip(self.cotangents, arrays.values(), strict=False))

    def _call_port(self, point: Tensors, layout: tuple[bool, bool]) -> dict[str, np.ndarray]:
        caller = _Usual(self, layout) if self.called is None else _Recorded(self, self.called)
        floating = caller.inputs(point)
        state = self.port.parameters()
        trained = self.port.trainable_parameters()
        try:
            outputs = caller.call(point, floating)
            found = {k: caller.output(k, v) for k, v in outputs.items()}
            if not self.gradients:
                for name, value in self._to_reference(self.port.parameters(), True).items():
                    if name in self.buffers:
                        found[f"buffer/{name}"] = value
                return found

            def total(trained: Any, floating: dict[str, mx.array]) -> mx.array:
                self.port.update(trained)
                terms = mx.array(0.0)
                for k, v in caller.call(point, floating).items():
                    terms = terms + (v * caller.cotangent(k)).sum()
                return terms

            argnums = [i for i, tree in enumerate((trained, floating)) if tree]
            grads = mx.grad(total, argnums=argnums)(trained, floating)
            by = dict(zip(argnums, grads if len(argnums) > 1 else [grads], strict=True))
            found |= {f"d/{k}": caller.input(k, g) for k, g in by.get(1, {}).items()}
            if self.called is None:
                back = self._to_reference(by.get(0, {}), False)
            else:
                back = self.called.gradients({k: _numpy(g) for k, g in flat(by.get(0, {})).items()})
            return found | {f"w/{k}": g for k, g in back.items()}
        finally:
            self.port.update(state)

    def _to_reference(self, tree: Any, values: bool) -> dict[str, np.ndarray]:
        if self.plan is None:
            return {}
        arrays = {k: np.array(a.astype(mx.float32), np.float64) for k, a in flat(tree).items()}
        return self.plan.values(arrays) if values else self.plan.to_reference(arrays)

    def run_port(self, point: Tensors) -> dict[str, np.ndarray]:
        return self._call_port(point, self.layout)

    def errors(self, alternative: Alternative, points: Sequence[int]) -> float:
        """Root mean square of the port's distance from an alternative, over some points."""
        total = 0.0
        for k in points:
            right = self._alternative(alternative, self.points[k])
            for name, array in self.ported[k].items():
                if name not in right:
                    continue
                if right[name].shape != array.shape:
                    return math.inf
                scale = max(float(np.linalg.norm(right[name])), 1e-30)
                total += (float(np.linalg.norm(array - right[name])) / scale) ** 2
        return math.sqrt(total / len(points))

    def usual_error(self, points: Sequence[int]) -> float:
        """The same distance of PyTorch's own float32, at least a unit in the last place."""
        total = 0.0
        for k in points:
            for name, array in self.run(self.oracle, self.points[k]).items():
                scale = max(float(np.linalg.norm(array)), 1e-30)
                rounding = float(np.linalg.norm(self.rounding[k // 2][name])) / scale
                total += max(rounding, 2.0**-24) ** 2
        return math.sqrt(total / len(points))

    def residual(self, alternative: Alternative, points: Sequence[int]) -> np.ndarray:
        """The port's outputs less an alternative's, each tensor in units of its size, in a row."""
        parts = []
        for k in points:
            right = self._alternative(alternative, self.points[k])
            for name, array in self.ported[k].items():
                if name not in right:
                    continue
                scale = max(float(np.linalg.norm(array)), 1e-30)
                parts.append((array - right[name]).ravel() / scale)
        return np.concatenate(parts)

    def _alternative(self, alternative: Alternative, point: Tensors) -> dict[str, np.ndarray]:
        with alternative.within(self.oracle):
            return self.run(self.oracle, point)

    def _distance(self, alternative: Alternative) -> float:
        """The port's error in units of what is allowed, PyTorch's own three times over, where all
        inputs are whole numbers: rounding is the same at each point and has no mean to be told."""
        right = self._alternative(alternative, self.points[0])
        worst = 0.0 if right.keys() & self.ported[0].keys() else math.inf
        for name, array in self.ported[0].items():
            if name in right:
                least = float(np.linalg.norm(np.spacing(np.abs(right[name]).astype(np.float32))))
                usual = max(float(np.linalg.norm(self.rounding[0][name])), least)
                error = float(np.linalg.norm(array - right[name]))
                worst = max(worst, error / (FLOOR * usual) if usual else math.inf * error)
        return worst

    def judge(self, alternative: Alternative) -> float:
        """The largest bias over its bound under an alternative: below 1 it is what was computed."""
        if not self.varied:
            return self._distance(alternative)
        at = {id(p): k for k, p in enumerate(self.points)}
        drawn = iter(self.points)
        right: dict[str, np.ndarray] = {}

        def oracle(p: Tensors) -> Tensors:
            nonlocal right
            right = self._alternative(alternative, p)
            right = {k: a for k, a in right.items() if k in self.ported[at[id(p)]]}
            return right

        def usual(p: Tensors) -> Tensors:
            """The alternative in float32; where it cannot be, what that makes of the reference."""
            with contextlib.suppress(Exception), OfMLX(), alternative.within(self.usual):
                return {k: a for k, a in self.run(self.usual, p).items() if k in right}
            return {k: right[k] + e for k, e in self.rounding[at[id(p)] // 2].items() if k in right}

        findings = compare(
            oracle,
            usual,
            lambda p: {k: a for k, a in self.ported[at[id(p)]].items() if k in right},
            lambda: next(drawn),
            stages=(POINTS,),
            alpha=ALPHA,
        )
        return max(f.bias / f.bound if f.ok else max(f.bias / f.bound, 1.0) for f in findings)


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), dtype=np.float64)


class _Usual:
    """The port called as the reference is, with channels last on one side or both."""

    def __init__(self, bench: Bench, layout: tuple[bool, bool]):
        self.bench = bench
        self.last_in, self.last_out = layout

    def _laid_out(self, array: np.ndarray) -> mx.array:
        image = self.last_in and _floats(array) and array.ndim >= 3
        return mx.array(channels_last(array) if image else array)

    def inputs(self, point: Tensors) -> dict[str, mx.array]:
        """The arguments that can be differentiated by."""
        return {k: self._laid_out(a) for k, a in point.items() if _floats(a)}

    def call(self, point: Tensors, floating: Mapping[str, mx.array]) -> dict[str, mx.array]:
        arrays = {k: floating[k] if k in floating else mx.array(a) for k, a in point.items()}
        inputs, kwargs = _filled(self.bench.inputs, self.bench.kwargs, arrays)
        return self.bench._outputs(named_arrays(self.bench.port(*inputs, **kwargs)))

    def input(self, name: str, array: mx.array) -> np.ndarray:
        found = _numpy(array)
        return channels_first(found) if self.last_in and found.ndim >= 3 else found

    def output(self, name: str, array: mx.array) -> np.ndarray:
        found = _numpy(array)
        return channels_first(found) if self.last_out and found.ndim >= 3 else found

    def cotangent(self, name: str) -> mx.array:
        array = self.bench.cotangents[name].astype(np.float32)
        return mx.array(channels_last(array) if self.last_out and array.ndim >= 3 else array)


class _Recorded:
    """The port called as it was when it was read: arguments of its own, the reference's numbers."""

    def __init__(self, bench: Bench, called: Called):
        self.bench, self.called = bench, called
        self.places = {
            p: (_in_name(source), layout) for p, (source, layout) in called.inputs.items()
        }
        self.layouts = dict(self.places.values())
        self.outputs = {_out_name(theirs): (ours, at) for theirs, ours, at in called.outputs}

    def inputs(self, point: Tensors) -> dict[str, mx.array]:
        return {
            name: mx.array(layout.to_port(point[name]))
            for name, layout in self.layouts.items()
            if name in point
        }

    def call(self, point: Tensors, floating: Mapping[str, mx.array]) -> dict[str, mx.array]:
        def own(place: str, array: Any) -> Any:
            name = self.places[place][0] if place in self.places else ""
            return floating[name].astype(array.dtype) if name in floating else array

        args = fresh(replace({"args": self.called.args, "kwargs": self.called.kwargs}, own))
        given = leaves(self.bench.port(*args["args"], **args["kwargs"]))
        return {name: given[place] for name, (place, _) in self.outputs.items()}

    def input(self, name: str, array: mx.array) -> np.ndarray:
        return self.layouts[name].to_reference(_numpy(array))

    def output(self, name: str, array: mx.array) -> np.ndarray:
        found, layout = _numpy(array), self.outputs[name][1]
        return layout.to_reference(found) if found.shape == layout.port else found

    def cotangent(self, name: str) -> mx.array:
        array = self.bench.cotangents[name].astype(np.float32)
        return mx.array(self.outputs[name][1].to_port(array))


def _in_name(place: str) -> str:
    """``args.0`` and ``kwargs.mask`` of a recorded call as a bench names them."""
    kind, _, rest = place.partition(".")
    return f"in.{int(kind == 'kwargs')}.{rest}"


def _out_name(place: str) -> str:
    return f"output.{place}" if place else "output"


def _filled(inputs: Any, kwargs: Any, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
    """Inputs and keyword arguments with the arrays put in their places."""

    return fresh(in_containers((inputs, kwargs), lambda name, array: arrays[name], "in"))
