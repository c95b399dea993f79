"""The ladder climbed for one subject: which rungs, in which modes, and how they went."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mlx_parity import enlarged
from mlx_parity._backend import require_mlx
from mlx_parity.arguments import plain
from mlx_parity.carry import channels_last
from mlx_parity.case import Case
from mlx_parity.equality import STAGES
from mlx_parity.errors import NoGradient, ParityError, SideError
from mlx_parity.ladder import COMPILED_STEPS, RUNGS, STEPS, Climb, Rung, compiles, up_to
from mlx_parity.report import Report
from mlx_parity.structure import leaves
from mlx_parity.subject import MODEL, Subject
from mlx_parity.trial import Agreement, say
from mlx_parity.variants import Variant, named, of_port

require_mlx()

import mlx.core as mx  # noqa: E402

Progress = Callable[[str], None]

TRAINING_SECONDS = 30.0
"""CPU time that a trajectory may take unless told otherwise."""

RANKS = {name: i for i, name in enumerate(RUNGS)}


@dataclass(frozen=True)
class Course:
    """How far to climb."""

    until: str = RUNGS[-1]
    steps: int | None = None
    """Training steps; None: :data:`~mlx_parity.ladder.STEPS`, fewer where that takes too long."""
    compiled: bool | None = None
    """None: wherever MLX compiles."""
    variants: bool = False

    def __post_init__(self) -> None:
        up_to(self.until)
        if self.steps is not None and not 1 <= self.steps <= STEPS:
            raise ParityError(f"steps={self.steps}: a trajectory has 1 to {STEPS}")

    def reaches(self, rung: str) -> bool:
        return rung in up_to(self.until)


@dataclass
class Climbed:
    """What is left of a climb for those who ask where and why."""

    climb: Climb
    """At the rung that failed, or at the last."""
    failed: str
    """The first rung that failed, or nothing."""
    seconds: float
    """CPU time of the rungs with derivatives: what one more reading would cost."""


def judge(
    subject: Subject,
    agreed: Agreement,
    case: Case,
    course: Course,
    report: Report,
    progress: Progress,
) -> Climbed:
    """Climb rung by rung into the report; above the first that fails nothing is tried."""
    climb = Climb(case, {}, subject.asked.seed)

    def ok() -> bool:
        return all(r.ok for r in report.rungs)

    progress("structure")
    structure = climb.structure(course.reaches("gradients"))[0]
    if structure.ok:
        report.notes += structure.message.splitlines()
        structure = replace(structure, message="")
    report.rungs.append(structure)

    progress("forward, loss and gradients at nearby points")
    started = time.process_time()
    gradients = course.reaches("gradients")
    try:
        rungs = climb.derivatives(gradients)
    except NoGradient as error:
        report.notes.append(f"{error}: gradients were not compared")
        gradients = False
        rungs = climb.derivatives(gradients)
    took = time.process_time() - started
    report.rungs += [r for r in rungs if course.reaches(r.name)]
    if agreed.discrete:
        report.rungs.append(_discrete(subject, agreed, climb))
    if subject.modular and ok() and subject.depends_on_mode():
        progress("the forward pass in the other mode")
        flipped = _flipped(subject, case, report)
        if flipped is not None:
            report.rungs.append(flipped[1])
            if not flipped[1].ok:
                climb = flipped[0]
        del flipped  # three more models

    failed = {r.name for r in report.rungs if not r.ok}
    if subject.modular and failed <= {"forward", "loss", "gradients"} and course.reaches("forward"):
        larger = enlarged.of(subject, climb)
        if larger is not None:
            progress("the forward pass with larger weights")
            found = enlarged.judged(larger)
            report.rungs += [] if failed else found
            if not all(r.ok for r in found):
                climb = larger
                report.notes += [enlarged.READ] if failed else []

    if ok() and gradients and course.reaches("optimizer step"):
        if climb.usual.system.step is not None:
            progress("optimizer step and trajectory")
            steps = 1
            if course.reaches("trajectory"):
                steps = course.steps or _affordable(took / max(climb.drawn, 1), report)
            report.rungs += [r for r in climb.training(steps) if course.reaches(r.name)]
        else:
            report.notes.append("nothing was trained: give optimizer= to compare training")
    if ok() and course.reaches("compiled"):
        if course.compiled if course.compiled is not None else compiles():
            progress("compiled")
            report.rungs.append(climb.compiled())
            if course.variants and subject.modular:
                progress("compiled in other ways")
                report.variants = _variants(subject, agreed, climb)
        elif course.compiled is None:
            report.notes.append("not compiled: mx.compile needs g++ at run time on Linux")
    if ok() and course.reaches("reloaded") and subject.modular:
        progress("reloaded")
        report.rungs += climb.reloaded()
    report.settle()
    return Climbed(climb, next((r.name for r in report.rungs if not r.ok), ""), took)


def _affordable(seconds: float, report: Report) -> int:
    """How many training steps to compare, if one on all sides takes so much CPU time."""
    steps = min(STEPS, max(COMPILED_STEPS, int(TRAINING_SECONDS / STAGES[0] / max(seconds, 1e-9))))
    if steps < STEPS:
        report.notes.append(
            f"{steps} training steps were compared, not {STEPS}, since each takes {seconds:.1f} s "
            f"at each point: steps={STEPS} compares all"
        )
    return steps


def _flipped(subject: Subject, case: Case, report: Report) -> tuple[Climb, Rung] | None:
    """The forward pass in evaluation mode of a model in training, and the other way round."""
    other = "evaluation" if subject.training else "training"
    subject.switch(not subject.training)
    try:
        climb = Climb(case, {}, subject.asked.seed)
        climb.structure()
        found = [r for r in climb.derivatives(gradients=False) if r.name == "forward"]
    except (ParityError, ValueError) as error:
        if isinstance(error, SideError) and error.side == "port":
            return climb, Rung(f"forward in {other}", False, message=str(error))
        report.notes.append(f"not compared in {other} mode: {error}")
        return None
    finally:  # the climb's models are copies, and stay in its mode
        subject.switch(not subject.training)
    return (climb, replace(found[0], name=f"forward in {other}")) if found else None


# -------------------------------------------------------------------------------- discrete outputs


def _discrete(subject: Subject, agreed: Agreement, climb: Climb) -> Rung:
    """Outputs that are counts, indices or truths: equal wherever PyTorch is sure of them.

    An element counts where PyTorch's float64 and float32 agree at a point, which near ties
    they do not; the port has to agree there at more than half of the points.
    """
    points = [climb.point, *(climb.near() for _ in range(7))]
    sure: dict[str, Any] = {}
    off: dict[str, Any] = {}
    for point in points:
        exact, usual = (_of_reference(subject, s, point) for s in (climb.oracle, climb.usual))
        ours = _of_port(subject, climb.port, point)
        for b, a in agreed.outputs.items():
            if a not in agreed.discrete:
                continue
            if ours[b].shape != exact[a].shape:
                said = f"{say(a)} has shape {list(ours[b].shape)}, not {list(exact[a].shape)}"
                return Rung("forward", False, message=said)
            known = exact[a] == usual[a]
            sure[a] = sure.get(a, 0) + known
            off[a] = off.get(a, 0) + (known & (ours[b] != exact[a]))
    wrong = {a: int(np.sum(2 * off[a] > np.maximum(sure[a], 1))) for a in sure}
    message = "; ".join(
        f"{say(a)}: {n} of {np.size(off[a])} elements differ" for a, n in wrong.items() if n
    )
    return Rung("forward", not message, message=message)


def _of_reference(subject: Subject, side: Any, point: Mapping[str, Any]) -> dict[str, np.ndarray]:
    side.load(point)
    inputs = {n: side._input(point[n]) for n in subject.arguments.arrays}
    module = side.system.modules.get(MODEL, subject.prototype)
    with torch.no_grad():
        output = subject.run_reference(module, inputs)
    return {n: plain(a) for n, a in leaves(output).items()}


def _of_port(subject: Subject, side: Any, point: Mapping[str, Any]) -> dict[str, np.ndarray]:
    side.load(point)
    inputs = {n: side._input(n, point[n]) for n in subject.arguments.arrays}
    output = subject.run_port(side.system.modules.get(MODEL, subject.port), inputs)
    return {n: plain(a) for n, a in leaves(output).items()}


def _variants(subject: Subject, agreed: Agreement, climb: Climb) -> list[Variant]:
    """The port compiled in every way, at the point where the climb began."""
    side = climb.port
    side.load(climb.point)
    module = side.system.modules[MODEL]
    arrays = {
        n: mx.array(channels_last(a) if n in agreed.images else a)
        for n, a in subject.arguments.model(subject.arguments.arrays).items()
    }
    run = named(arrays, lambda inputs: subject.run_port(module, inputs))
    found = of_port(module, run, list(arrays.values()))
    side.load(climb.point)
    return found
