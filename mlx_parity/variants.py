"""A port compiled in every way that MLX offers, and what compiling it silently froze.

``mx.compile`` runs the Python once and keeps what it saw: whatever was no array handed in is a
constant from then on, and nothing says so. :func:`of_port` compiles a port's forward pass as MLX's
documentation does; :func:`probe` looks at a function that the user has compiled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_parity._backend import require_mlx
from mlx_parity.capture import numpy_of, port_calls
from mlx_parity.carry import flat
from mlx_parity.layout import distance
from mlx_parity.structure import leaves

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402

SAME = 1e-3
"""Nearer than this, relatively, is the same result: the ladder decides what rounding is."""

SECONDS = 60.0
"""How long the process that runs a shapeless function may take."""

Run = Callable[..., Any]
"""The port's forward pass: a function of arrays, in a fixed order."""


@dataclass(frozen=True)
class Variant:
    """One way to run the port, and what came of it."""

    name: str
    ok: bool
    said: str
    traces: int | None = None
    """How often Python ran."""

    def __str__(self) -> str:
        counted = "" if self.traces is None else f" (traced {self.traces} times)"
        return f"{self.name}: {self.said}{counted}"


def _results(run: Run, arrays: Sequence[mx.array]) -> list[np.ndarray]:
    found = list(leaves(run(*arrays)).values())
    mx.eval(found)
    return [numpy_of(a) for a in found]


def _same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and distance(x, y) < SAME for x, y in zip(a, b, strict=True)
    )


def of_port(port: mnn.Module, run: Run, arrays: Sequence[mx.array]) -> list[Variant]:
    """Compiled, compiled and switched between training and evaluation, and shapeless."""
    return [*_compiled(port, run, arrays), *_shapeless(run, arrays)]


def _compiled(port: mnn.Module, run: Run, arrays: Sequence[mx.array]) -> list[Variant]:
    traces = 0

    def counted(*xs: mx.array) -> list[Any]:
        nonlocal traces
        traces += 1
        return list(leaves(run(*xs)).values())

    state = [port.state, mx.random.state]
    compiled = mx.compile(counted, inputs=state, outputs=state)
    mode = port.training
    before = _results(run, arrays)
    try:
        once, again = _results(compiled, arrays), _results(compiled, arrays)
        seen = traces
        port.train(not mode)
        there, switched = _results(run, arrays), _results(compiled, arrays)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        return [Variant("compiled", False, f"MLX cannot compile it: {first}", traces)]
    finally:
        port.train(mode)
    ok = _same(before, once) and _same(once, again) and seen == 1
    said = "as uncompiled" if ok else "differs from uncompiled, or is traced at every call"
    found = [Variant("compiled", ok, said, seen)]
    modes = ("training", "evaluation") if mode else ("evaluation", "training")
    name = f"compiled in {modes[0]}, run in {modes[1]}"
    if _same(before, there):
        found.append(Variant(name, True, "its result does not depend on the mode"))
    elif _same(switched, there):
        found.append(Variant(name, True, f"as uncompiled in {modes[1]}"))
    else:
        found.append(
            Variant(
                name,
                False,
                f"still in {modes[0]} mode: the training flag is frozen, as in every function that "
                "MLX compiles; compile one for each mode",
            )
        )
    return found


# ----------------------------------------------------------------------------------- shapeless

_CHILD = """
import json, sys
import mlx.core as mx
folder = sys.argv[1]
f = mx.import_function(f"{folder}/port.mlxfn")
compiled = mx.compile(lambda *xs: f(*xs), shapeless=True)
said = []
for size in ("same", "larger"):
    xs = mx.load(f"{folder}/{size}.safetensors")
    xs = [xs[k] for k in sorted(xs)]
    try:
        out = list(compiled(*xs))
        mx.eval(out)
        mx.save_safetensors(f"{folder}/{size}-out.safetensors",
                            {f"{i:03}": a for i, a in enumerate(out)})
        said.append("")
    except Exception as error:
        said.append(str(error).strip().splitlines()[0])
print(json.dumps(said))
"""


def _shapeless(run: Run, arrays: Sequence[mx.array]) -> list[Variant]:
    """``shapeless=True``, traced at one batch and run at another, in a process that may die."""
    batch = arrays[0].shape[0] if arrays and arrays[0].ndim else 0
    if not batch:
        return []
    larger = [mx.concatenate([a, a[:1]]) if a.ndim and a.shape[0] == batch else a for a in arrays]
    try:
        wanted = [_results(run, arrays), _results(run, larger)]
    except Exception:
        return [Variant("shapeless", True, "not tried: the port takes one batch size only")]

    def listed(*xs: mx.array) -> list[Any]:
        return list(leaves(run(*xs)).values())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            mx.export_function(str(folder / "port.mlxfn"), listed, *arrays, shapeless=True)
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            return [Variant("shapeless", False, f"cannot be traced without shapes: {first}")]
        for size, xs in (("same", arrays), ("larger", larger)):
            named = {f"{i:03}": a for i, a in enumerate(xs)}
            mx.save_safetensors(str(folder / f"{size}.safetensors"), named)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CHILD, name],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [Variant("shapeless", False, f"takes more than {SECONDS:.0f} s")]
        if done.returncode:
            why = (
                f"signal {-done.returncode}" if done.returncode < 0 else done.stderr[-200:].strip()
            )
            return [Variant("shapeless", False, f"kills the interpreter ({why})")]
        errors = json.loads(done.stdout.strip().splitlines()[-1])
        for size, raised, right in zip(("same", "larger"), errors, wanted, strict=True):
            at = "the batch it was traced with" if size == "same" else "another batch"
            if raised:
                return [Variant("shapeless", False, f"raises at {at}: {raised}")]
            out: Any = mx.load(str(folder / f"{size}-out.safetensors"))
            got = [numpy_of(out[k]) for k in sorted(out)]
            if not _same(got, right):
                shapes = [list(a.shape) for a in got], [list(a.shape) for a in right]
                said = f"wrong at {at}"
                if shapes[0] != shapes[1]:
                    said += f": shapes {shapes[0]} for {shapes[1]}"
                return [Variant("shapeless", False, f"{said}, and MLX says nothing")]
    return [Variant("shapeless", True, "as uncompiled, at another batch too")]


# ------------------------------------------------------------------------- the user's compiled


def probe(
    compiled: Run,
    plain: Run,
    arrays: Sequence[mx.array],
    *,
    module: mnn.Module | None = None,
    optimizer: Any = None,
) -> list[Variant]:
    """What a compiled function or training step has frozen, one line for each thing that is.

    ``compiled`` and ``plain`` are called with ``arrays``; ``plain`` is the same uncompiled. Give
    the ``module`` and, for a step, the ``optimizer`` that both use: they are left as they were.
    """
    kept = _kept(module, optimizer)
    found: list[Variant] = []
    try:
        _probe(compiled, plain, arrays, module, optimizer, kept, found)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        found.append(
            Variant(
                "state",
                False,
                "something that it changes is not among inputs= and outputs= of mx.compile, and "
                f"cannot be used afterwards: {first}",
            )
        )
    finally:
        kept()
    return found


def _kept(module: mnn.Module | None, optimizer: Any) -> Callable[[], None]:
    from mlx_parity.sides import restore_tree

    weights = {} if module is None else module.parameters()
    mode = module is not None and module.training
    state = {} if optimizer is None else flat(optimizer.state)

    def put_back() -> None:
        if module is not None:
            module.update(weights)
            module.train(mode)
        if optimizer is not None:
            restore_tree(optimizer.state, state)

    return put_back


def _probe(
    compiled: Run,
    plain: Run,
    arrays: Sequence[mx.array],
    module: mnn.Module | None,
    optimizer: Any,
    put_back: Callable[[], None],
    found: list[Variant],
) -> None:
    def twice(run: Run) -> tuple[list[np.ndarray], list[np.ndarray]]:
        first = _results(run, arrays)
        put_back()
        second = _results(run, arrays)
        put_back()
        return first, second

    with port_calls({"": module} if module is not None else {}) as calls:
        ours = twice(compiled)
        traces = calls.counts.get("") if module is not None else None
    theirs = twice(plain)
    draws = not all(np.array_equal(a, b) for a, b in zip(*theirs, strict=True))
    frozen = all(np.array_equal(a, b) for a, b in zip(*ours, strict=True))
    if draws:
        said = (
            "every call repeats the first one's numbers: add mx.random.state to inputs and outputs"
        )
        ok = not frozen
        found.append(Variant("random state", ok, "drawn afresh" if ok else said, traces))
    elif not _same(ours[0], theirs[0]):
        found.append(Variant("result", False, "differs from the uncompiled function's", traces))
    else:
        found.append(Variant("result", True, "as uncompiled", traces))
    if module is not None and optimizer is None and not draws:
        found += _frozen_module(compiled, plain, arrays, module, put_back)
    if module is not None and optimizer is not None:
        found += _frozen_optimizer(compiled, plain, arrays, module, optimizer, put_back)


def _frozen_module(
    compiled: Run,
    plain: Run,
    arrays: Sequence[mx.array],
    module: mnn.Module,
    put_back: Callable[[], None],
) -> list[Variant]:
    found = []
    module.train(not module.training)
    right, got = _results(plain, arrays), _results(compiled, arrays)
    put_back()
    ok = _same(right, got)
    said = "follows train() and eval()" if ok else "frozen at the first call: compile one per mode"
    found.append(Variant("training flag", ok, said))
    doubled = {n: 2 * a for n, a in flat(module.trainable_parameters()).items()}
    module.load_weights(list(doubled.items()), strict=False)
    right, got = _results(plain, arrays), _results(compiled, arrays)
    put_back()
    ok = _same(right, got)
    said = "follow the module" if ok else "frozen at the first call: add module.state to inputs"
    found.append(Variant("weights", ok, said))
    return found


def _frozen_optimizer(
    compiled: Run,
    plain: Run,
    arrays: Sequence[mx.array],
    module: mnn.Module,
    optimizer: Any,
    put_back: Callable[[], None],
) -> list[Variant]:
    found = []
    steps = []
    for run in (plain, compiled):
        for _ in range(3):
            mx.eval(leaves(run(*arrays)), module.state)
        steps.append(int(optimizer.state["step"]))
        put_back()
    ok = steps[0] == steps[1]
    said = (
        "counts"
        if ok
        else f"stands at {steps[1]} after 3 steps: add optimizer.state to inputs and outputs"
    )
    found.append(Variant("optimizer step", ok, said))
    moved = []
    rate = optimizer.learning_rate
    for run in (plain, compiled):
        before = {n: np.array(a) for n, a in flat(module.trainable_parameters()).items()}
        optimizer.learning_rate = 0.0 * rate
        mx.eval(leaves(run(*arrays)), module.state)
        after = flat(module.trainable_parameters())
        moved.append(any(not np.array_equal(np.array(after[n]), a) for n, a in before.items()))
        optimizer.learning_rate = rate
        put_back()
    ok = moved[0] == moved[1]
    said = "can be changed" if ok else "frozen: a change of it is ignored; add optimizer.state"
    found.append(Variant("learning rate", ok, said))
    return found


def named(arrays: Mapping[str, mx.array], run: Callable[[Mapping[str, Any]], Any]) -> Run:
    """A function of arrays by name as one of arrays in order."""
    names = list(arrays)
    return lambda *xs: run(dict(zip(names, xs, strict=True)))
