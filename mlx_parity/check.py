"""One call: is this port equal to that original, and if not, where and why.

    report = mlx_parity.check(reference, port, inputs)
    report.assert_ok()

What is not said is found out: how the weights are carried, which inputs are images, how the outputs
are paired. What was found out stands in the report.

How it goes: :mod:`~mlx_parity.arguments` and :mod:`~mlx_parity.subject` make both models
comparable, :mod:`~mlx_parity.trial` calls each once, :mod:`~mlx_parity.systems` makes a case of
them, :mod:`~mlx_parity.verdict` climbs its ladder, :mod:`~mlx_parity.explain` says where and why,
and :mod:`~mlx_parity.restore` leaves everything as it was found.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn as tnn

from mlx_parity import updates
from mlx_parity._backend import require_mlx
from mlx_parity.blas import borrowed
from mlx_parity.diagnose import (
    lint,
    of_rounded_corrections,
    of_two_optimizers,
    of_uninitialised,
    of_updates,
    of_whole_numbers,
)
from mlx_parity.errors import CarryError, ParityError, SideError
from mlx_parity.explain import LOCATED, explain_what_is_no_module, locate, of_climb
from mlx_parity.explain import explain as explained
from mlx_parity.faint import RUNG, guilty_norms
from mlx_parity.ladder import Rung
from mlx_parity.localise import Guilty
from mlx_parity.pairing import Map
from mlx_parity.report import Report, describe
from mlx_parity.restore import restored
from mlx_parity.structure import complete_port
from mlx_parity.subject import MODEL, Asked, Subject
from mlx_parity.systems import case_of
from mlx_parity.trial import agree, say
from mlx_parity.verdict import RANKS, Climbed, Course, Progress, judge
from mlx_parity.weights import Sanitize

require_mlx()

import mlx.nn as mnn  # noqa: E402

PATIENCE = 10.0
"""Seconds after which it is worth saying why a check takes so long."""

LOCALISE_SECONDS = 2.0
"""A port that is equal is read module by module, for the picture, where that is quick enough."""


def check(
    reference: Any,
    port: Any,
    inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    loss: Any = None,
    targets: Any = (),
    optimizer: tuple[Any, Any] | None = None,
    map: Map | None = None,
    carry: bool | Mapping[str, Any] = True,
    sanitize: Sanitize | None = None,
    call_reference: Callable[..., Any] | None = None,
    call_port: Callable[..., Any] | None = None,
    images: Sequence[str] | None = None,
    training: bool | None = None,
    until: str = "reloaded",
    steps: int | None = None,
    weights: str = "own",
    compiled: bool | None = None,
    variants: bool = False,
    localised: bool | None = None,
    explain: bool = True,
    seed: int = 0,
    name: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold ``port`` (MLX) against ``reference`` (PyTorch) and report; never raises for a model.

    reference, port: modules, or plain functions. Both are left exactly as they were found.
    inputs: what both are called with: an array, a tuple of arguments, or a dict of arguments by
        name; arrays of NumPy, PyTorch or MLX, in the reference's layout, also nested. What is no
        array is passed on as it is. Or a function of a NumPy generator that makes them.
    kwargs: further arguments by name.
    loss: of a model's output (and of ``targets``), to a scalar; one function for both sides or a
        pair of them. By default the output's projection on fixed random numbers.
    optimizer: a pair: PyTorch's, as an instance or a function of parameters; MLX's, an instance.
        Without it nothing is trained.
    map: names of the reference to the port's, where neither names nor shapes tell. A list where
        the port has split one; None where it has no counterpart.
    carry: options of :func:`mlx_parity.match` (``flatten``, ``axes``, …); False where both sides
        already hold their weights: then only the inputs vary, and parameters are not compared.
    sanitize: the port's own function from a state dict to its weights; its method of that name is
        found without being given.
    call_reference, call_port: ``f(model, *inputs)`` where the models are called differently.
    images: names of the inputs, outputs and targets that are channels first in the reference and
        last in the port. By default found from the first convolution and by trying.
    training: the mode of both; by default the reference's own.
    until: the last rung to climb: "forward" for a port that only infers.
    steps: how many training steps to compare; by default 20, fewer where they take long.
    weights: "own", or "random" for weights drawn by the kit.
    compiled: whether to try ``mx.compile``; by default wherever it compiles.
    variants: whether to compile the forward pass in every way, shapeless too, and to say what is
        frozen by it; the report lists them, the verdict does not depend on them.
    localised: whether to read every module; by default if something differs, or if it is quick.
    explain: whether to look for a known cause where something differs; it tries alternatives out,
        which may take longer than all else.
    progress: called with a line at each stage.
    """
    started = time.monotonic()
    title = name or f"{_name_of(reference)} → {_name_of(port)}"
    report = Report(title)
    with restored(reference, port), borrowed() as blas:
        uninitialised = complete_port(port)
        try:
            asked = Asked(
                reference=reference,
                port=port,
                inputs=inputs,
                kwargs=kwargs or {},
                loss=loss,
                targets=targets,
                optimizer=optimizer,
                map=map,
                carry=carry,
                sanitize=sanitize,
                call_reference=call_reference,
                call_port=call_port,
                images=images,
                training=training,
                weights=weights,
                seed=seed,
                title=title,
            )
            course = Course(until, steps, compiled, variants)
            _check(asked, course, report, localised, explain, progress or (lambda line: None))
        except SideError as error:
            report.undecided(error.side, str(error))
        except CarryError as error:
            report.undecided("weights", str(error))
            if isinstance(reference, tnn.Module) and isinstance(port, mnn.Module):
                with suppress(Exception):  # what the trees show may say why
                    report.diagnoses = lint(reference, port)
        except (ParityError, ValueError) as error:
            report.undecided(_whose(error), str(error))
        except Exception as error:  # a defect of the kit is no verdict on the port
            report.undecided("kit", f"{type(error).__name__}: {error}", error)
    report.diagnoses = [*report.diagnoses, *of_uninitialised(uninitialised)]
    report.seconds = time.monotonic() - started
    if not blas.fast and report.seconds > PATIENCE:
        report.notes.append(
            f"most of the time went into MLX's products, which run on {blas.name}: "
            "pip install scipy-openblas32, and checks use it"
        )
    return report


def _check(
    asked: Asked,
    course: Course,
    report: Report,
    localised: bool | None,
    explain: bool,
    progress: Progress,
) -> None:
    subject = Subject(asked, report)
    agreed = agree(subject)
    if agreed.drawn is not None:
        report.rungs.append(_draws(agreed.drawn))
        report.settle()
        return
    climbed = judge(subject, agreed, case_of(subject, agreed), course, report, progress)
    faint = _faint(subject, climbed, course, report, progress)
    wanted = _worth_reading(climbed) if localised is None else localised
    if subject.plan is not None and wanted and hasattr(climbed.climb, "port"):
        progress("module by module")
        paired = {MODEL: of_climb(climbed.climb, MODEL, subject.plan.pairs)}
        locate(climbed.climb, paired, agreed.loss, report, climbed.failed)
    if not climbed.failed:
        for guilty in report.guilty:
            report.notes.append(
                f"{guilty.where} by itself gives something else ({describe(guilty.finding)}); what "
                "was compared does not depend on it"
            )
        report.guilty = []
    if climbed.failed in LOCATED and subject.plan is not None and not report.guilty:
        faint = _faint_norms(subject, climbed)  # what differs by little in the whole
    if faint:
        report.guilty = faint
    if explain and climbed.failed:
        if subject.modular and hasattr(climbed.climb, "port"):
            progress("looking for a known cause")
            explained(climbed.climb, asked.map, report, climbed.failed)
        explain_what_is_no_module(subject, report)
        report.diagnoses += of_whole_numbers(climbed.climb.whole)
    _optimizers(asked, climbed, report)


def _faint(
    subject: Subject, climbed: Climbed, course: Course, report: Report, progress: Progress
) -> list[Guilty]:
    """Normalisations whose eps differs, which usual inputs do not show."""
    if subject.plan is None or climbed.failed or not course.reaches("forward"):
        return []
    progress(RUNG)
    found = _faint_norms(subject, climbed)
    if found:
        report.rungs.append(Rung(RUNG, False, tuple(g.finding for g in found)))
        report.settle()
        climbed.failed = RUNG
    return found


def _faint_norms(subject: Subject, climbed: Climbed) -> list[Guilty]:
    climb = climbed.climb
    if subject.plan is None or not hasattr(climb, "port"):
        return []
    climb.usual.load(climb.point)
    climb.port.load(climb.point)
    return guilty_norms(of_climb(climb, MODEL, subject.plan.pairs), subject.asked.seed)


def _optimizers(asked: Asked, climbed: Climbed, report: Report) -> None:
    """The two optimizers by themselves, where all else is equal or they are what differs."""
    ladder = climbed.failed in ("", "optimizer step", "trajectory")
    made = climbed.climb.usual.system.optimizers.get(MODEL)
    if asked.optimizer is None or made is None or not ladder or len(made.param_groups) > 1:
        return
    given = asked.optimizer[1]
    with suppress(Exception):  # an optimizer that needs more than gradients was judged in its step
        ours = copy.deepcopy(given) if hasattr(given, "apply_single") else given()
        wrong = tuple(f for f in updates.forgiven(made, ours) if not f.ok)
        if not wrong:
            if not all(f.ok for f in updates.alone(made, ours)):
                report.diagnoses += of_rounded_corrections(made)
            return
        if not climbed.failed:
            kept = [r for r in report.rungs if RANKS.get(r.name, 0) < RANKS["optimizer step"]]
            report.rungs[:] = [*kept, Rung("optimizer step", False, wrong)]
            report.settle()
        cause = updates.explained(made, ours)
        known = {d.trap_id for d in report.diagnoses}
        if cause is not None and cause[0] not in known:
            report.diagnoses = [*of_updates(*cause), *report.diagnoses]
        elif not report.diagnoses:
            report.diagnoses = of_two_optimizers(made, ours)


def _draws(output: str) -> Rung:
    said = (
        f"the port is not deterministic, as the reference is: {say(output)} differs between two "
        "calls with the same inputs. It draws random numbers, or keeps something from one call to "
        "the next"
    )
    return Rung("forward", False, message=said)


def _worth_reading(climbed: Climbed) -> bool:
    """Where a module may be to blame; and for the picture, if that is quick."""
    if climbed.failed:
        return climbed.failed.partition(" in ")[0] in LOCATED
    return climbed.seconds < LOCALISE_SECONDS


def _whose(error: Exception) -> str:
    text = str(error)
    if text.startswith("the reference") or "of the reference" in text:
        return "reference"
    return "inputs"


def _name_of(model: Any) -> str:
    if isinstance(model, tnn.Module | mnn.Module):
        return type(model).__name__
    return getattr(model, "__name__", type(model).__name__)
