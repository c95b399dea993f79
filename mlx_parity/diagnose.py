"""Why a port differs: static rules over the two module trees, then alternatives tried out.

``lint(reference, port)`` compares what can be read off both trees without computing anything.
``diagnose(guilty)`` explains one module that was found to differ: what lint says about it, and, if
that is not all, the alternative to the reference (:mod:`mlx_parity.counterfactual`) under which the
port's bias returns to 1.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.bench import POINTS, Bench
from mlx_parity.counterfactual import Alternative, alternatives
from mlx_parity.ladder import Rung
from mlx_parity.localise import Called, Capture, Guilty, ModulePair, pairs
from mlx_parity.static import Clue, of_optimizers, of_pair, of_trees
from mlx_parity.structure import complete_port, copy_port
from mlx_parity.traps import find

require_mlx()

import mlx.nn as mnn  # noqa: E402

HARDLY = 3e3
"""An alternative this many of PyTorch's own errors away is not the port's, and need not be judged:
ports were seen to be up to 100 of them rough."""


FACTORS = ("scale-factor", "attention-scale")
"""Numbers that fit a little of everything: not looked for where there is a cause already."""


@dataclass
class Known:
    """What explained a module, for the next of its class: a slip in one block is in all of them."""

    what: set[str] = field(default_factory=set)
    asked: int = 0


@dataclass(frozen=True)
class Diagnosis:
    """A known cause."""

    trap_id: str
    title: str
    where: str
    """The module, or the optimizer."""
    evidence: str
    """What was seen: two values that differ, or the bias under the alternative."""
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.title} ({self.trap_id}): {self.evidence}. Fix: {self.fix}"


def _diagnosis(trap_id: str, where: str, evidence: str) -> Diagnosis:
    trap = find(trap_id)
    return Diagnosis(trap_id, trap.title, where, evidence, trap.fix)


def _of_clues(clues: Iterable[Clue]) -> list[Diagnosis]:
    return [_diagnosis(c.trap_id, c.where, c.evidence) for c in clues]


def lint(
    reference: tnn.Module,
    port: mnn.Module,
    optimizers: Iterable[tuple[torch.optim.Optimizer, Any]] = (),
    mapping: Any = None,
) -> list[Diagnosis]:
    """Everything that the module trees, and pairs of optimizers, show without being run."""
    whole = copy_port(port)
    uninitialised = of_uninitialised(complete_port(whole))
    port = whole if uninitialised else port
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paired = pairs(reference, port, mapping)
    clues = [clue for pair in paired for clue in of_pair(pair)]
    clues += of_trees(reference, port, paired)
    for theirs, ours in optimizers:
        clues += of_optimizers(theirs, ours)
    return [*uninitialised, *_of_clues(dict.fromkeys(clues))]


def diagnose(
    suspects: Guilty | ModulePair | Iterable[Guilty | ModulePair], *, seconds: float = 20.0
) -> list[Diagnosis]:
    """The causes of modules' differences, the surest first; empty where none is known.

    Of a :class:`ModulePair` only the rules that need no numbers are asked. Both sides' modules must
    hold the same weights. ``seconds`` bounds the search for alternatives at each module.
    """
    several = [suspects] if isinstance(suspects, Guilty | ModulePair) else list(suspects)
    found: list[Diagnosis] = []
    known: dict[Any, Known] = {}
    for suspect in several:
        if isinstance(suspect, Guilty):
            kind = type(suspect.pair.reference), suspect.direction
            found += _of_guilty(suspect, seconds, known.setdefault(kind, Known()))
        else:
            found += _of_clues(of_pair(suspect))
            if not suspect.reference_path:  # the models themselves
                found = lint(suspect.reference, suspect.port) + found
    return list(dict.fromkeys(found))


def of_compiled(rung: Rung) -> list[Diagnosis]:
    """What a compiled step froze, by how it went wrong."""
    steps = [f.tensor for f in rung.findings if not f.ok and f.tensor.startswith("trajectory ")]
    first = any(tensor.endswith(" 0") for tensor in steps)
    if "without a primitive" in rung.message:
        said = "MLX raised: an array of the trace is used outside of it"
        return [
            _diagnosis("compile-state", "compiled step", said),
            _diagnosis("compile-eval", "compiled step", f"{said}, or evaluated inside"),
        ]
    if "Attempting to eval" in rung.message:
        found = ("compile-eval", "MLX raised: an array is evaluated inside")
    elif "traced" in rung.message:
        found = ("compile-attribute", f"{rung.message}: a Python value changes at each call")
    elif first:
        found = ("compile-random-state", "the first step differs already: something is drawn in it")
    elif steps:
        found = ("compile-state", "the first step is right and a later one is not")
    else:
        return []
    return [_diagnosis(found[0], "compiled step", found[1])]


def of_uninitialised(classes: Sequence[str]) -> list[Diagnosis]:
    """Classes of the port that never called ``super().__init__()``: no number depends on it."""
    if not classes:
        return []
    evidence = f"trainable_parameters() and training raise in {', '.join(classes)}"
    return [_diagnosis("module-not-initialised", "the port", evidence)]


def of_whole_numbers(names: Iterable[str]) -> list[Diagnosis]:
    """Indices and masks of the port that MLX would differentiate, and raises."""
    return [_diagnosis("buffer-trains", n, "its whole numbers count as trainable") for n in names]


def of_updates(trap_id: str, what: str) -> list[Diagnosis]:
    """What an optimizer computes, found out by its updates of a weight of zero."""
    evidence = f"with {what} in the original's Adam the port's updates are equal to it"
    return [_diagnosis(trap_id, "optimizer", evidence)]


def of_two_optimizers(theirs: torch.optim.Optimizer, ours: Any) -> list[Diagnosis]:
    """What the settings of both show."""
    return _of_clues(of_optimizers(theirs, ours))


def of_rounded_corrections(theirs: torch.optim.Optimizer) -> list[Diagnosis]:
    """Adam's corrections in float32: to be known, and no fault of the port."""
    evidence = (
        "the first updates are off by as much as 1 - b^t is in float32 and no more, which the "
        "verdict does not count"
    )
    return [_diagnosis("adam-correction-precision", "optimizer", evidence)]


def _of_guilty(guilty: Guilty, seconds: float, known: Known) -> list[Diagnosis]:
    pair = guilty.pair
    read = _of_clues(c for p in (pair, *_inside(pair)) for c in of_pair(p))
    backward = guilty.direction == "backward"
    inside = len(pair.reference_path) + 1 if pair.reference_path else 0
    after, before = (path[inside:] for path in guilty.between or ("", ""))
    tried = _tried(pair, guilty.capture, backward, seconds, guilty.called, known, (after, before))
    # What both say comes first, then what was computed, then what was only read.
    both = [d for d in read if d.trap_id in {t.trap_id for t in tried}]
    said = {(d.trap_id, d.where) for d in both}
    computed = [t for t in tried if (t.trap_id, t.where) not in said]
    return [*both, *computed, *(d for d in read if d not in both)]


class _Function(tnn.Module):
    """A plain function of the reference as a module."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class _PortFunction(mnn.Module):
    """A plain function of the port as a module."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def diagnose_functions(
    reference: Callable[..., Any],
    port: Callable[..., Any],
    inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backward: bool = False,
    seconds: float = 20.0,
) -> list[Diagnosis]:
    """As :func:`diagnose`, for a loss or another function that is no module.

    ``inputs`` and ``kwargs`` are NumPy arrays in the reference's layout.
    """
    pair = ModulePair(
        getattr(reference, "__name__", ""), "", _Function(reference), _PortFunction(port)
    )
    capture = Capture(inputs, dict(kwargs or {}), None)
    return _tried(pair, capture, backward, seconds)


def _inside(pair: ModulePair) -> list[ModulePair]:
    """The pairs below one, with full paths."""
    if not list(pair.reference.children()):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        below = pairs(pair.reference, pair.port)

    def joined(a: str, b: str) -> str:
        return ".".join(p for p in (a, b) if p)

    return [
        ModulePair(
            joined(pair.reference_path, p.reference_path),
            joined(pair.port_path, p.port_path),
            p.reference,
            p.port,
        )
        for p in below
        if p.reference_path
    ]


# ---------------------------------------------------------------------------- trying them out


def _tried(
    pair: ModulePair,
    capture: Capture,
    backward: bool,
    seconds: float,
    called: Called | None = None,
    known: Known | None = None,
    between: tuple[str, str] = ("", ""),
) -> list[Diagnosis]:
    """The alternatives under which the port is equal, likely ones first; one of each trap.

    Of a class of which one is ``known`` the same is tried first, and the rest for half as long.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch says of alternatives concerns nobody
        return _search(pair, capture, backward, seconds, called, known or Known(), between)


def _search(
    pair: ModulePair,
    capture: Capture,
    backward: bool,
    seconds: float,
    called: Called | None,
    known: Known,
    between: tuple[str, str],
) -> list[Diagnosis]:
    try:
        bench = Bench(
            pair.reference, pair.port, capture.inputs, capture.kwargs, backward, called=called
        )
    except Exception:  # a module that cannot be called alone cannot be explained this way
        return []
    unchanged = Alternative("", "", lambda module: contextlib.nullcontext())
    before = bench.errors(unchanged, (0, 1))
    near = min(0.97 * before, HARDLY * bench.usual_error((0, 1)))
    with contextlib.suppress(Exception):
        if bench.judge(unchanged) < 1:
            return []  # nothing differs here that could be explained
    found: list[Diagnosis] = []
    seen: set[str] = set()
    names: set[str] = set()
    stop = time.monotonic() + (seconds / 2 if known.asked else seconds)
    known.asked += 1
    options = alternatives(bench.oracle, bench.call, backward, between)
    for alternative in sorted(options, key=lambda a: a.what not in known.what):
        if time.monotonic() > stop or (found and known.what and alternative.what not in known.what):
            break
        if alternative.trap_id in seen:
            continue
        if found and alternative.fit and alternative.trap_id in FACTORS:
            continue
        try:
            best = _fitted(bench, alternative) if alternative.fit else alternative
            if best is None or not bench.errors(best, (0, 1)) < near:
                continue
            share = bench.judge(best)
        except Exception:  # the change does not fit this module
            continue
        if share < 1:
            seen.add(best.trap_id)
            names.add(alternative.what)
            where = pair.reference_path or type(pair.reference).__name__
            evidence = (
                f"with {best.what} in the original the port is equal to it "
                f"(bias {share:.2g} of its bound)"
            )
            found.append(_diagnosis(best.trap_id, where, evidence))
            if len(found) == 3:
                break
    known.what |= names
    return found


def _fitted(bench: Bench, alternative: Alternative) -> Alternative | None:
    """The number that explains most, by Gauss and Newton on the residual; None if none does."""
    assert alternative.fit is not None
    assert alternative.at is not None
    start, logarithmic = alternative.fit
    points = range(0, POINTS, 4)

    def at(t: float) -> Alternative:
        return alternative.at(math.exp(t) if logarithmic else t)  # type: ignore[misc]

    t = math.log(start) if logarithmic else start
    for _ in range(12):
        r = bench.residual(at(t), points)
        h = 1e-4 * max(abs(t), 1e-3) if not logarithmic else 1e-3
        slope = (r - bench.residual(at(t + h), points)) / h
        norm = float(slope @ slope)
        if norm == 0 or not math.isfinite(norm):
            return None
        step = float(slope @ r) / norm
        if logarithmic:
            step = max(-3.0, min(3.0, step))
        t += step
        if abs(step) < 1e-10 * max(abs(t), 1e-3):
            break
    return at(t)
