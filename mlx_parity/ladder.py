"""The ladder: structure, forward, loss, gradients, optimizer step, trajectory, compiled, reloaded.

Each rung stands on the one below it: where one fails, those above are not tried. A drawn shape
climbs the rungs that need no compiler; :func:`prove` then compiles once for each shape that was
drawn, outside the examples.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_parity._backend import require_mlx
from mlx_parity.carry import reference_tensors
from mlx_parity.case import Case, Shape, System
from mlx_parity.equality import EPS, ROUGH, STAGES, Finding, compare, jitter, spacing
from mlx_parity.errors import (
    CarryError,
    EmptyBatchError,
    NoGradient,
    NotFiniteError,
    ParityError,
    SideError,
    TF32Error,
)
from mlx_parity.sides import (
    FIRST,
    LAST,
    TRAINED,
    MLXSide,
    Results,
    Told,
    TorchSide,
    at_step,
    in_precision,
)

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


def up_to(until: str) -> tuple[str, ...]:
    """The rungs that are climbed where ``until`` is the last."""
    if until not in RUNGS:
        raise ParityError(f"until={until!r}: the rungs are {', '.join(RUNGS)}")
    return RUNGS[: RUNGS.index(until) + 1]


STEPS = 20
"""Training steps of a trajectory."""

LARGE = 1 << 22
"""Parameters beyond which a step and a trajectory are compared one after the other: what both leave
is four models on each side."""

COMPILED_STAGES = (4, *STAGES[1:])
"""Points of the compiled rung: what is computed is known by then to be right, and what a compiled
function froze at its first point is far off at every other."""

COMPILED_STEPS = 2
"""Training steps of the compiled rung: what is frozen at the first shows in the second."""


@dataclass(frozen=True)
class Rung:
    """How one rung went at one drawn shape."""

    name: str
    ok: bool
    findings: tuple[Finding, ...] = ()
    message: str = ""
    decidable_steps: int | None = None
    """Trajectory: how many steps a difference of 1 in 1,000 of the losses, in half precision of 8
    units in the last place, would have shown in."""

    @property
    def worst(self) -> Finding | None:
        """The finding that decides: the first that failed, or the one with the largest bias."""
        failed = [f for f in self.findings if not f.ok]
        return failed[0] if failed else max(self.findings, key=lambda f: f.bias, default=None)


def randomise(
    reference: Any, rng: np.random.Generator, given: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Float32 weights for a PyTorch module, by name: none of them zero, one, or alike.

    Kernels are scaled by their own fan-in so that signals keep their size. Initial values would
    hide faults: a bias of zero that is never added, a norm's weight of one that is never used.
    Those ``given`` are left out.
    """
    made = {}
    for name, tensor in reference_tensors(reference).items():
        if name in given:
            continue
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
        made[name] = np.asarray(array, np.float32)  # an array also where it is one number
    return made


def draw_point(
    case: Case, shape: Shape, rng: np.random.Generator, steps: int, system: System
) -> Results:
    """Weights and inputs of one drawn case, with fresh inputs for each training step.

    ``system`` is the reference's.
    Raises :class:`EmptyBatchError` and :class:`NotFiniteError` for inputs that prove nothing.
    """
    own = _own_weights(case, shape, rng, system)
    point: Results = {}
    for m, module in system.modules.items():
        given = {n.removeprefix(f"{m}.") for n in own if n.startswith(f"{m}.")}
        point |= {f"{m}.{n}": a for n, a in randomise(module, rng, given).items()}
    point |= own
    point |= check_inputs(case, case.inputs(shape, rng))
    if system.step is not None:
        for i in range(steps):
            inputs = check_inputs(case, case.inputs(shape, rng))
            point |= {at_step(n, i): a for n, a in inputs.items()}
    return point


def _own_weights(case: Case, shape: Shape, rng: np.random.Generator, system: System) -> Results:
    """The case's own tensors, which need not be drawn."""
    own = {n: np.asarray(a, np.float32) for n, a in case.weights(shape, rng).items()}
    known = {
        f"{m}.{n}": tensor
        for m, module in system.modules.items()
        for n, tensor in reference_tensors(module).items()
    }
    for name, array in own.items():
        if name not in known or array.shape != tuple(known[name].shape):
            there = f"has shape {list(known[name].shape)}" if name in known else "is none"
            raise CarryError(
                f"{case.name}: weights gives {name} {list(array.shape)}, which {there} in the "
                f"reference; it holds {', '.join(known)}"
            )
        if not np.isfinite(array).all():
            raise NotFiniteError(f"{case.name}: weights gives a NaN or infinity in {name}")
    return own


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
        self.oracle = TorchSide.oracle(case, shape)
        self.usual = TorchSide.usual(case, shape)
        self.point = draw_point(case, shape, self.rng, STEPS, self.usual.system)
        self.names = [n for n in self.point if "." not in n and "@" not in n]
        self.ignored: frozenset[str] = frozenset()
        self.unlike: frozenset[str] = frozenset()
        """Tensors that train on one side only."""
        self.whole: tuple[str, ...] = ()
        """Whole numbers of the port that MLX would differentiate, set aside."""
        self.drawn = 0
        """Nearby points so far."""

    def run(self, until: str = RUNGS[-1]) -> list[Rung]:
        """Every rung that needs no compiler, up to the first that fails or to ``until``."""
        wanted = up_to(until)
        gradients = "gradients" in wanted
        climbs: dict[str, Callable[[], list[Rung]]] = {
            "structure": lambda: self.structure(gradients),
            "forward": lambda: self.derivatives(gradients),
            "optimizer step": lambda: self.training(STEPS if "trajectory" in wanted else 1),
            "reloaded": self.reloaded,
        }
        rungs: list[Rung] = []
        for first, climb in climbs.items():
            if first in wanted:
                rungs += [r for r in climb() if r.name in wanted]
            if not all(r.ok for r in rungs):
                return [r for i, r in enumerate(rungs) if all(q.ok for q in rungs[:i])]
        return rungs

    def structure(self, trains: bool = True) -> list[Rung]:
        """Whether every tensor has its place; also, what ``trains``: else that is but a remark."""
        try:
            self.port = MLXSide(self.case, self.shape, self.usual.system)
        except CarryError as error:
            return [Rung("structure", False, message=str(error))]
        plans = self.port.plans.items()
        self.ignored = frozenset(f"{m}.{n}" for m, plan in plans for n in plan.ignored)
        self.unlike = frozenset(f"{m}.{n}" for m, plan in plans for n in plan.unlike())
        wrong = [line for plan in self.port.plans.values() for line in plan.misplaced()]
        return [Rung("structure", not (wrong and trains), message="\n".join(wrong))]

    def derivatives(self, gradients: bool = True) -> list[Rung]:
        """Forward, loss and gradients; of a port that has none, forward and loss, and why."""
        try:
            return self._derivatives(gradients)
        except NoGradient as error:
            if error.side == "reference":
                raise
            said = str(error)
        self.whole = tuple(self.port.set_whole_numbers_aside())
        if self.whole:
            with suppress(NoGradient):  # the rest of the port, as it is once that has been mended
                rungs = self._derivatives(gradients)
                said += (
                    f". {', '.join(self.whole[:4])}{', …' if len(self.whole) > 4 else ''}: whole "
                    "numbers count as trainable; start their names with an underscore, or freeze "
                    "them. Compared without them"
                )
                return [
                    replace(r, ok=False, message=said) if r.name == "gradients" else r
                    for r in rungs
                ]
        return [*self._derivatives(gradients=False), Rung("gradients", False, message=said)]

    def _derivatives(self, gradients: bool) -> list[Rung]:
        def both(results: Results) -> Results:
            """Without gradients that one side has alone: the structure's own finding."""
            alone = self.unlike
            return {
                k: a
                for k, a in results.items()
                if not alone or not k.startswith("gradients ") or not alone & _names_in(k)
            }

        findings = self._compare(
            lambda p: both(self.oracle.derivatives(p, self.names, gradients)),
            lambda p: both(self.usual.derivatives(p, self.names, gradients)),
            lambda p: both(self.port.derivatives(p, self.names, gradients=gradients)),
            enough=lambda finding: finding.tensor.startswith("forward "),
        )
        return self._split(findings, ("forward", "loss", "gradients"))

    def training(self, steps: int = STEPS) -> list[Rung]:
        """The first step's update, and the trajectory of ``steps``."""
        if self.usual.system.step is None:
            return []
        compared = {
            f"{m}.{source}"
            for m, plan in self.port.plans.items()
            for link in plan.links
            if link.invertible
            for source in link.sources
        }

        def paired(results: Results) -> Results:
            """Without the tensors that the port holds only as a sum, such as recurrent biases."""
            lost = set(self.usual.tensors()) - compared
            return {k: a for k, a in results.items() if not lost & set(k.split(" "))}

        def train(steps: int, tell: Sequence[Told]) -> list[Finding]:
            return self._compare(
                lambda p: paired(self.oracle.train(p, self.names, steps, tell=tell)),
                lambda p: paired(self.usual.train(p, self.names, steps, tell=tell)),
                lambda p: self.port.train(p, self.names, steps, tell=tell),
            )

        numbers = sum(tensor.numel() for tensor in self.usual.tensors().values())
        findings: list[Finding] = []
        for tell in [TRAINED] if numbers <= LARGE else [FIRST, LAST]:
            findings += train(steps if "trajectory" in tell else 1, tell)
            if not all(finding.ok for finding in findings):
                break
        rungs = {r.name: r for r in self._split(findings, ("update", "trajectory"))}
        if "update" not in rungs:  # a later step gave NaN, and the first stands for itself
            rungs["update"] = self._split(train(1, FIRST), ("update",))[0]
        step = replace(rungs["update"], name="optimizer step")
        if not step.ok:  # there may be no trajectory to tell of
            return [step]
        trajectory = rungs["trajectory"]
        seen = [
            max((f.visible for f in trajectory.findings if f.tensor.endswith(f" {i}")), default=1.0)
            for i in range(steps)
        ]
        half = self.case.dtype != "float32"
        small = 8 * EPS[self.case.dtype] if half else 1e-3
        decidable = next((i for i, v in enumerate(seen) if not v < small), steps)
        return [step, replace(trajectory, decidable_steps=decidable)]

    def reloaded(self) -> list[Rung]:
        """Train a step, save, reload into new objects, train another: equal bit for bit."""
        if not self.port.system.modules:
            return []
        port, other = self.port, MLXSide(self.case, self.shape, self.usual.system)
        has_step = port.system.step is not None
        port.begin(self.point)
        if has_step:
            port.take(self.point, self.names, 0)
        with tempfile.TemporaryDirectory() as folder:
            port.save(Path(folder))
            other.reload(Path(folder))
        wrong = [f"after reloading, {d}" for d in _unequal(port.tensors(), other.tensors())]
        if has_step and not wrong:
            for side in (port, other):
                side.take(self.point, self.names, 1)
            wrong = [
                f"one step after reloading, {d}" for d in _unequal(port.tensors(), other.tensors())
            ]
        return [Rung("reloaded", not wrong, message="\n".join(wrong))]

    def compiled(self) -> Rung:
        """Compiled equals uncompiled, and is traced once. Not for use inside an example."""
        if not hasattr(self, "port") and not self.structure()[0].ok:
            return Rung("compiled", False, message="the structure differs")
        traces: dict[str, int] = {}

        def counted(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
            traces[name] = 0

            def traced(*args: Any) -> Any:
                traces[name] += 1
                return f(*args)

            return traced

        try:
            findings = self._compiled(counted)
        except (
            RuntimeError,
            SideError,
        ) as error:  # MLX, of state that is not among inputs and outputs
            return Rung("compiled", False, message=f"MLX cannot run it: {error}")
        retraced = [f"{name} was traced {n} times" for name, n in traces.items() if n != 1]
        ok = not retraced and all(f.ok for f in findings)
        return Rung("compiled", ok, tuple(findings), "; ".join(retraced))

    def _compiled(
        self, counted: Callable[[str, Callable[..., Any]], Callable[..., Any]]
    ) -> list[Finding]:
        """The compiled step, or the compiled derivatives where there is no step."""
        if self.port.system.step is not None and self.case.compile_step is not None:
            step = counted("step", self.port.system.step)
            compiled_step = self.case.compile_step(step, *self.port.stateful)
            return self._compare(
                lambda p: self.oracle.train(p, self.names, COMPILED_STEPS),
                lambda p: self.port.train(p, self.names, COMPILED_STEPS),
                lambda p: self.port.train(p, self.names, COMPILED_STEPS, compiled_step),
                stages=COMPILED_STAGES,
            )
        made: dict[str, Callable[..., Any]] = {}

        def transform(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
            if name not in made:
                made[name] = mx.compile(counted(name, f))
            return made[name]

        return self._compare(
            lambda p: self.oracle.derivatives(p, self.names),
            lambda p: self.port.derivatives(p, self.names),
            lambda p: self.port.derivatives(p, self.names, transform),
            stages=COMPILED_STAGES,
        )

    def _compare(self, oracle: Any, usual: Any, port: Any, **options: Any) -> list[Finding]:
        def known(results: Results) -> Results:
            """Without what nothing in the port stands for."""
            if not self.ignored:
                return results
            return {k: a for k, a in results.items() if not self.ignored & _names_in(k)}

        if self.case.dtype != "float32":
            options = {"rough": ROUGH, "place": _place, **options}
        return compare(
            lambda p: known(oracle(p)), lambda p: known(usual(p)), port, self.near, **options
        )

    def near(self) -> Results:
        """A nearby point; what the port does not hold stays where it is."""
        self.drawn += 1
        moving = {n: a for n, a in self.point.items() if n not in self.ignored}
        near = self.point | jitter(moving, self.rng, spacing(self.case.dtype))
        held = self.case.held
        if held == "float32":
            return near
        floats = {n: a for n, a in near.items() if a.dtype == np.float32}
        return near | {n: in_precision(a, held) for n, a in floats.items()}

    def _split(self, findings: Iterable[Finding], prefixes: Iterable[str]) -> list[Rung]:
        findings = list(findings)
        rungs = []
        for prefix in prefixes:
            own = tuple(f for f in findings if f.tensor.startswith(f"{prefix} "))
            if own:
                rungs.append(Rung(prefix, all(f.ok for f in own), own))
        return rungs


def _names_in(key: str) -> set[str]:
    """The tensors that a result's name may mean: ``gradients loss/net.weight`` has one."""
    return {part.rpartition("/")[2] for part in key.split(" ")}


def _place(key: str) -> tuple[str, ...]:
    """Kind, modules and name: ``gradients loss/net.k.bias``, ``update net.k.bias exp_avg``."""
    kind, _, rest = key.partition(" ")
    loss, _, rest = rest.rpartition("/")
    tensor, _, moment = rest.partition(" ")
    return (f"{kind} {loss} {moment}", *tensor.split("."))


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
