"""Proof over many shapes: Hypothesis draws them, the ladder is climbed at each, rows add it up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import numpy as np
from hypothesis import Phase, Verbosity, given, settings
from hypothesis import strategies as st

from mlx_parity.case import Case, Shape
from mlx_parity.errors import CannotCompile, NotProven
from mlx_parity.ladder import RUNGS, Climb, Rung, compiles, up_to

SHRINK_SECONDS = 60.0
"""How long to look for a smaller shape that fails: each needs all three stages."""


@dataclass
class Row:
    """One rung of one case, over all the shapes drawn."""

    model: str
    side: str | None
    rung: str
    ok: bool = True
    bias: float = 0.0
    noises: list[float] = field(default_factory=list)
    """For each shape the noise of the tensor that was noisiest."""
    bound: float = 0.0
    visible: float = 0.0
    examples: int = 0
    shape: Shape = field(default_factory=dict)
    """The shape that showed the worst bias, or the smallest that failed."""
    seed: int = 0
    """Of the values drawn at that shape."""
    message: str = ""
    decidable_steps: int | None = None

    @property
    def noise(self) -> float:
        """The median over the shapes of the noisiest tensor's noise; 0 where nothing is rounded."""
        return float(np.median(self.noises)) if self.noises else 0.0

    def merge(self, other: Row) -> None:
        """Take in the same rung's row over other shapes."""
        self.examples += other.examples
        self.noises += other.noises
        self.visible = max(self.visible, other.visible)
        steps = [s for s in (self.decidable_steps, other.decidable_steps) if s is not None]
        self.decidable_steps = min(steps, default=None)
        if (not other.ok, other.share) > (not self.ok, self.share):
            self.ok, self.message = other.ok, other.message
            self.shape, self.seed = other.shape, other.seed
            self.bias, self.bound = other.bias, other.bound

    @property
    def share(self) -> float:
        """The bias as a share of its bound."""
        return self.bias / self.bound if self.bound else 0.0

    def add(self, rung: Rung, shape: Shape, seed: int) -> None:
        worst = rung.worst
        self.examples += 1
        if self.ok:
            self.message = rung.message  # a remark, where the rung is passed
        if not rung.ok:
            self.ok, self.shape, self.seed = False, shape, seed
            self.message = "; ".join(str(part) for part in (rung.message, worst) if part)
        if worst is None:
            return
        share = worst.bias / worst.bound if worst.bound else 0.0
        if not rung.ok or (self.ok and share >= self.share):
            self.bias, self.bound = worst.bias, worst.bound
            self.shape, self.seed = shape, seed
        self.noises.append(max(f.noise for f in rung.findings))
        self.visible = max([self.visible, *(f.visible for f in rung.findings)])
        if rung.decidable_steps is not None:
            fewest = self.decidable_steps
            steps = rung.decidable_steps
            self.decidable_steps = steps if fewest is None else min(fewest, steps)


@dataclass
class Proof:
    """All rungs of one case."""

    case: Case
    until: str = RUNGS[-1]
    """The last rung that was climbed."""
    rows: dict[str, Row] = field(default_factory=dict)
    drawn: dict[str, set[Any]] = field(default_factory=dict)
    """Every value that each part of the shape had."""

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows.values())

    def add(self, rungs: Iterable[Rung], shape: Shape, seed: int) -> None:
        for rung in rungs:
            row = self.rows.setdefault(rung.name, Row(self.case.name, self.case.side, rung.name))
            row.add(rung, shape, seed)
        for name, value in shape.items():
            self.drawn.setdefault(name, set()).add(_hashable(value))

    def merge(self, other: Proof) -> None:
        """Take in a proof of the same case over other shapes."""
        for name, row in other.rows.items():
            if name in self.rows:
                self.rows[name].merge(row)
            else:
                self.rows[name] = row
        for name, values in other.drawn.items():
            self.drawn.setdefault(name, set()).update(values)

    def ranges(self) -> dict[str, str]:
        """What was drawn of each part of the shape: ``{"batch": "1-5", "image_size": "1-7 2-6"}``.

        A number's least and greatest, of a list that of each place (or of all, where its length
        varies), and every word.
        """
        return {name: _range(values) for name, values in self.drawn.items()}

    def failures(self) -> list[str]:
        """What failed, with the shape and the lines that repeat it."""
        return [
            f"{row.model}: {row.rung} fails at {dict(row.shape)}\n  {row.message}\n"
            f"  {self.repeat(row)}"
            for row in self.rows.values()
            if not row.ok
        ]

    def repeat(self, row: Row) -> str:
        """How to climb again at a row's shape."""
        until = "" if self.until == RUNGS[-1] else f", until={self.until!r}"
        shape = dict(row.shape)
        return f"repeat it with mlx_parity.climb(case, {shape}, seed={row.seed}{until})"

    def assert_ok(self) -> None:
        """Raise :class:`NotProven` unless every rung passed."""
        if not self.ok:
            raise NotProven("\n".join(self.failures()) or f"{self.case.name}: nothing was compared")


def climb(
    case: Case, shape: Shape, seed: int, *, compiled: bool = True, until: str = RUNGS[-1]
) -> Proof:
    """Climb the ladder at one given shape, to the end or ``until`` a rung."""
    proof = Proof(case, until)
    proof.add(Climb(case, shape, seed).run(until), shape, seed)
    if proof.ok and compiled and "compiled" in up_to(until):
        if not compiles():
            raise CannotCompile("MLX does not compile here: install g++, which it runs")
        proof.add([Climb(case, shape, seed).compiled()], shape, seed)
    return proof


def prove(
    case: Case,
    examples: int | None = None,
    *,
    seed: int | None = None,
    shrink: bool = True,
    compiled: bool | None = None,
    until: str = RUNGS[-1],
    progress: Callable[[], None] = lambda: None,
) -> Proof:
    """Climb the ladder at drawn shapes, as many as the Hypothesis profile in force says.

    A failure is shrunk by Hypothesis to a small shape. The shapes drawn are then compiled for, each
    once and outside the examples; ``compiled=None`` does so where MLX compiles at all. ``until`` is
    the last rung. ``seed`` fixes the shapes drawn, so that several processes can share the work.
    """
    proof = Proof(case, until)
    wanted = up_to(until)
    drawn: list[tuple[Shape, int]] = []
    phases = [p for p in settings().phases if p is not Phase.explain]
    if not shrink:
        phases = [p for p in phases if p is not Phase.shrink]
    options: dict[str, Any] = {
        "database": None,  # it would be shared by all cases, this function being one
        "deadline": None,
        "phases": phases,
        "verbosity": Verbosity.quiet,
    }
    if examples is not None:
        options["max_examples"] = examples

    failed: dict[tuple[str, int], tuple[list[Rung], Shape, int]] = {}
    stop = math.inf

    @settings(**options)
    @given(case.shapes, st.integers(0, 2**32 - 1))
    def example(shape: Shape, values: int) -> None:
        nonlocal stop
        key = (repr(shape), values)
        if key not in failed:
            if time.monotonic() > stop:
                return  # what was found so far is small enough
            rungs = Climb(case, shape, values).run(until)
            if not all(r.ok for r in rungs):
                failed[key] = rungs, shape, values
                stop = min(stop, time.monotonic() + SHRINK_SECONDS)
        if key in failed:
            failed[key] = failed.pop(key)  # Hypothesis ends on the smallest: keep it last
            raise NotProven(failed[key][0][-1].name)
        if not failed:
            proof.add(rungs, shape, values)
            drawn.append((shape, values))
            progress()

    try:
        (example if seed is None else hypothesis.seed(seed)(example))()
    except NotProven:
        rungs, shape, values = list(failed.values())[-1]
        proof.add(rungs, shape, values)
        return proof

    if "compiled" in wanted and (compiles() if compiled is None else compiled):
        for shape, values in sorted(drawn, key=lambda d: _size(d[0])):
            rung = Climb(case, shape, values).compiled()
            proof.add([rung], shape, values)
            progress()
            if not rung.ok:
                break
    return proof


def _hashable(value: Any) -> Any:
    """A part of a shape, with lists and arrays as tuples."""
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(_hashable(v) for v in value)
    return value


MANY_WORDS = 8
"""More words than these are counted and not listed."""


def _range(values: Iterable[Any]) -> str:
    values = list(values)
    if all(isinstance(v, tuple) for v in values):
        if not any(values):
            return "none"
        lengths = {len(v) for v in values}
        if len(lengths) == 1:
            return " ".join(_range(column) for column in zip(*values, strict=True))
        pooled = _range({item for v in values for item in v})
        return f"{pooled} ({_range(lengths)} of them)"
    if all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in values):
        least, greatest = f"{min(values):.4g}", f"{max(values):.4g}"
        return least if least == greatest else f"{least}-{greatest}"
    if len(values) > MANY_WORDS:
        return f"{len(values)} different"
    return "|".join(sorted(str(v) for v in values))


def _size(shape: Any) -> float:
    """Smaller shapes first, so that the first to fail is the one to look at: all numbers' sum."""
    if isinstance(shape, Mapping):
        return sum(map(_size, shape.values()))
    if isinstance(shape, list | tuple | np.ndarray):
        return sum(map(_size, shape))
    return float(shape) if isinstance(shape, int | float | np.number) else 0.0
