"""The ladder: structure, forward, loss, gradients, optimizer step, trajectory, compiled, reloaded.

Each rung stands on the one below it: where one fails, those above are not tried. A drawn shape
climbs the rungs that need no compiler; :func:`prove` then compiles once for each shape that was
drawn, outside the examples.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import Phase, Verbosity, given, settings
from hypothesis import strategies as st

from mlx_parity._backend import require_mlx
from mlx_parity.carry import reference_tensors
from mlx_parity.case import Case, Shape
from mlx_parity.equality import Finding, compare, jitter
from mlx_parity.errors import (
    CannotCompile,
    CarryError,
    EmptyBatchError,
    NotFiniteError,
    NotProven,
    TF32Error,
)
from mlx_parity.sides import MLXSide, Results, TorchSide, at_step

require_mlx()

import mlx.core as mx  # noqa: E402

RUNGS = (
    "structure",
    "forward",
    "loss",
    "gradients",
    "optimizer step",
    "trajectory",
    "compiled",
    "reloaded",
)

STEPS = 20
"""Training steps of a trajectory."""

COMPILED_STEPS = 3
"""Training steps of the compiled rung: enough for a frozen input or state to show."""


SHRINK_SECONDS = 60.0
"""How long to look for a smaller shape that fails: each needs all three stages."""


@dataclass(frozen=True)
class Rung:
    """How one rung went at one drawn shape."""

    name: str
    ok: bool
    findings: tuple[Finding, ...] = ()
    message: str = ""
    decidable_steps: int | None = None
    """Trajectory: how many steps a difference of 1 in 1,000 of the losses would have shown in."""

    @property
    def worst(self) -> Finding | None:
        """The finding that decides: the first that failed, or the one with the largest bias."""
        failed = [f for f in self.findings if not f.ok]
        return failed[0] if failed else max(self.findings, key=lambda f: f.bias, default=None)


def randomise(reference: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Float32 weights for a PyTorch module, by name: none of them zero, one, or alike.

    Kernels are scaled by their own fan-in so that signals keep their size. Initial values would
    hide faults: a bias of zero that is never added, a norm's weight of one that is never used.
    """
    made = {}
    for name, tensor in reference_tensors(reference).items():
        shape, last = tuple(tensor.shape), name.rpartition(".")[2]
        if last == "running_var":
            array = rng.uniform(0.5, 2.0, shape)
        elif last == "running_mean":
            array = 0.2 * rng.standard_normal(shape)
        elif len(shape) >= 2:
            fan_in = int(np.prod(shape[1:]))
            array = rng.standard_normal(shape) / np.sqrt(fan_in)
        elif last.startswith("bias"):
            array = 0.2 * rng.standard_normal(shape)
        else:
            array = 1 + 0.2 * rng.standard_normal(shape)
        made[name] = array.astype(np.float32)
    return made


def draw_point(case: Case, shape: Shape, rng: np.random.Generator, steps: int) -> Results:
    """Weights and inputs of one drawn case, with fresh inputs for each training step.

    Raises :class:`EmptyBatchError` and :class:`NotFiniteError` for inputs that prove nothing.
    """
    system = case.build(case.reference, shape)
    point: Results = {}
    for m, module in system.modules.items():
        point |= {f"{m}.{n}": a for n, a in randomise(module, rng).items()}
    point |= check_inputs(case, case.inputs(shape, rng))
    if system.step is not None:
        for i in range(steps):
            inputs = check_inputs(case, case.inputs(shape, rng))
            point |= {at_step(n, i): a for n, a in inputs.items()}
    return point


def check_inputs(case: Case, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs, in float32 where floating; refused where empty, NaN or infinite."""
    checked = {}
    for name, array in inputs.items():
        if array.size == 0:
            raise EmptyBatchError(
                f"{case.name}: input {name!r} has shape {list(array.shape)}, which holds nothing: "
                "draw a batch of at least 1"
            )
        if np.issubdtype(array.dtype, np.floating):
            if not np.isfinite(array).all():
                raise NotFiniteError(
                    f"{case.name}: input {name!r} holds NaN or infinity: clean the data before "
                    "comparing"
                )
            array = array.astype(np.float32)
        checked[name] = array
    return checked


def check_precision() -> None:
    """Refuse a GPU that may multiply with 10-bit mantissas: MLX's default on CUDA and M5."""
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    if on_gpu and os.environ.get("MLX_ENABLE_TF32") != "0":
        raise TF32Error(
            "MLX may multiply in TF32 on this GPU, which is no float32: set MLX_ENABLE_TF32=0 in "
            "the environment before mlx is imported"
        )


class Climb:
    """One case at one drawn shape."""

    def __init__(self, case: Case, shape: Shape, seed: int):
        check_precision()
        self.case, self.shape, self.seed = case, shape, seed
        self.rng = np.random.default_rng(seed)
        self.oracle = TorchSide(case, shape, torch.float64)
        self.usual = TorchSide(case, shape, torch.float32)
        self.point = draw_point(case, shape, self.rng, STEPS)
        self.names = [n for n in self.point if "." not in n and "@" not in n]

    def run(self) -> list[Rung]:
        """Every rung that needs no compiler, up to the first that fails."""
        rungs: list[Rung] = []
        for climb in (self.structure, self.derivatives, self.training, self.reloaded):
            rungs += climb()
            if not all(r.ok for r in rungs):
                return [r for i, r in enumerate(rungs) if all(q.ok for q in rungs[:i])]
        return rungs

    def structure(self) -> list[Rung]:
        try:
            self.port = MLXSide(self.case, self.shape, self.usual.system)
        except CarryError as error:
            return [Rung("structure", False, message=str(error))]
        wrong = [line for plan in self.port.plans.values() for line in plan.misplaced()]
        return [Rung("structure", not wrong, message="\n".join(wrong))]

    def derivatives(self) -> list[Rung]:
        findings = self._compare(
            lambda p: self.oracle.derivatives(p, self.names),
            lambda p: self.usual.derivatives(p, self.names),
            lambda p: self.port.derivatives(p, self.names),
        )
        return self._split(findings, ("forward", "loss", "gradients"))

    def training(self) -> list[Rung]:
        if self.usual.system.step is None:
            return []
        compared = {
            f"{m}.{link.sources[0]}"
            for m, plan in self.port.plans.items()
            for link in plan.links
            if link.invertible
        }

        def paired(results: Results) -> Results:
            """Without the tensors that the port holds only as a sum, such as recurrent biases."""
            lost = set(self.usual.tensors()) - compared
            return {k: a for k, a in results.items() if not lost & set(k.split(" "))}

        def train(steps: int) -> list[Finding]:
            return self._compare(
                lambda p: paired(self.oracle.train(p, self.names, steps)),
                lambda p: paired(self.usual.train(p, self.names, steps)),
                lambda p: self.port.train(p, self.names, steps),
            )

        (update,) = self._split(train(1), ("update",))
        step = replace(update, name="optimizer step")
        if not step.ok:
            return [step]
        (trajectory,) = self._split(train(STEPS), ("trajectory",))
        seen = [
            max(f.visible for f in trajectory.findings if f.tensor.endswith(f" {i}"))
            for i in range(STEPS)
        ]
        steps = next((i for i, v in enumerate(seen) if not v < 1e-3), STEPS)
        return [step, replace(trajectory, decidable_steps=steps)]

    def reloaded(self) -> list[Rung]:
        """Train a step, save, reload into new objects, train another: equal bit for bit."""
        if not self.port.system.modules:
            return []
        port, other = self.port, MLXSide(self.case, self.shape, self.usual.system)
        port.load(self.point)
        has_step = port.system.step is not None
        if has_step:
            port.train(self.point, self.names, 1)
        with tempfile.TemporaryDirectory() as folder:
            port.save(Path(folder))
            other.reload(Path(folder))
        wrong = [f"after reloading, {d}" for d in _unequal(port.tensors(), other.tensors())]
        if has_step and not wrong:
            for side in (port, other):
                arrays = (side._input(n, self.point[at_step(n, 1)]) for n in self.names)
                losses = side.system.step(*side.stateful, *arrays)  # type: ignore[misc]
                mx.eval(losses, [s.state for s in side.stateful])
            wrong = [
                f"one step after reloading, {d}" for d in _unequal(port.tensors(), other.tensors())
            ]
        return [Rung("reloaded", not wrong, message="\n".join(wrong))]

    def compiled(self) -> Rung:
        """Compiled equals uncompiled, and is traced once. Not for use inside an example."""
        if not self.structure()[0].ok:
            return Rung("compiled", False, message="the structure differs")
        traces: dict[str, int] = {}

        def counted(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
            traces[name] = 0

            def traced(*args: Any) -> Any:
                traces[name] += 1
                return f(*args)

            return traced

        if self.port.system.step is not None and self.case.compile_step is not None:
            step = counted("step", self.port.system.step)
            compiled_step = self.case.compile_step(step, *self.port.stateful)
            findings = self._compare(
                lambda p: self.oracle.train(p, self.names, COMPILED_STEPS),
                lambda p: self.port.train(p, self.names, COMPILED_STEPS),
                lambda p: self.port.train(p, self.names, COMPILED_STEPS, compiled_step),
            )
        else:
            made: dict[str, Callable[..., Any]] = {}

            def transform(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
                if name not in made:
                    made[name] = mx.compile(counted(name, f))
                return made[name]

            findings = self._compare(
                lambda p: self.oracle.derivatives(p, self.names),
                lambda p: self.port.derivatives(p, self.names),
                lambda p: self.port.derivatives(p, self.names, transform),
            )
        retraced = [f"{name} was traced {n} times" for name, n in traces.items() if n != 1]
        ok = not retraced and all(f.ok for f in findings)
        return Rung("compiled", ok, tuple(findings), "; ".join(retraced))

    def _compare(self, oracle: Any, usual: Any, port: Any) -> list[Finding]:
        return compare(oracle, usual, port, lambda: jitter(self.point, self.rng))

    def _split(self, findings: Iterable[Finding], prefixes: Iterable[str]) -> list[Rung]:
        findings = list(findings)
        rungs = []
        for prefix in prefixes:
            own = tuple(f for f in findings if f.tensor.startswith(f"{prefix} "))
            if own:
                rungs.append(Rung(prefix, all(f.ok for f in own), own))
        return rungs


def _unequal(a: Results, b: Results) -> list[str]:
    return [f"{k} differs" for k in a if not np.array_equal(a[k], b[k])]


def compiles() -> bool:
    """Whether ``mx.compile`` compiles here. On Linux it silently does not without g++."""
    traces = 0

    def f(x: mx.array) -> mx.array:
        nonlocal traces
        traces += 1
        return mx.exp(x) + 1

    compiled = mx.compile(f)
    for _ in range(2):
        mx.eval(compiled(mx.zeros(3)))
    return traces == 1


@dataclass
class Row:
    """One rung of one case, over all the shapes drawn."""

    model: str
    side: str
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
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows.values())

    def add(self, rungs: Iterable[Rung], shape: Shape, seed: int) -> None:
        for rung in rungs:
            row = self.rows.setdefault(rung.name, Row(self.case.name, self.case.side, rung.name))
            row.add(rung, shape, seed)

    def merge(self, other: Proof) -> None:
        """Take in a proof of the same case over other shapes."""
        for name, row in other.rows.items():
            if name in self.rows:
                self.rows[name].merge(row)
            else:
                self.rows[name] = row

    def failures(self) -> list[str]:
        """What failed, with the shape and the lines that repeat it."""
        return [
            f"{row.model}: {row.rung} fails at {dict(row.shape)}\n  {row.message}\n"
            f"  repeat it with mlx_parity.climb(case, {dict(row.shape)}, seed={row.seed})"
            for row in self.rows.values()
            if not row.ok
        ]

    def assert_ok(self) -> None:
        """Raise :class:`NotProven` unless every rung passed."""
        if not self.ok:
            raise NotProven("\n".join(self.failures()) or f"{self.case.name}: nothing was compared")


def climb(case: Case, shape: Shape, seed: int, *, compiled: bool = True) -> Proof:
    """Climb the whole ladder at one given shape."""
    proof = Proof(case)
    proof.add(Climb(case, shape, seed).run(), shape, seed)
    if proof.ok and compiled:
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
    progress: Callable[[], None] = lambda: None,
) -> Proof:
    """Climb the ladder at drawn shapes, as many as the Hypothesis profile in force says.

    A failure is shrunk by Hypothesis to a small shape. The shapes drawn are then compiled for, each
    once and outside the examples; ``compiled=None`` does so where MLX compiles at all. ``seed``
    fixes the shapes drawn, so that several processes can share the work.
    """
    proof = Proof(case)
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
            rungs = Climb(case, shape, values).run()
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

    if compiles() if compiled is None else compiled:
        for shape, values in sorted(drawn, key=lambda d: _size(d[0])):
            rung = Climb(case, shape, values).compiled()
            proof.add([rung], shape, values)
            progress()
            if not rung.ok:
                break
    return proof


def _size(shape: Shape) -> int:
    """Smaller shapes first, so that the first to fail is the one to look at."""
    return sum(int(np.sum(v)) for v in shape.values() if not isinstance(v, str))
