"""Where a climb went wrong, module by module, and the known cause if there is one.

The verdict stands without either: what goes wrong here is a note in the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mlx_parity.case import System
from mlx_parity.diagnose import (
    Diagnosis,
    diagnose,
    diagnose_functions,
    lint,
    of_compiled,
)
from mlx_parity.equality import Finding
from mlx_parity.ladder import Climb, Rung
from mlx_parity.layers import port_modules
from mlx_parity.localise import ANOTHER_SHAPE, localise
from mlx_parity.pairing import Map, Pairs
from mlx_parity.report import Report
from mlx_parity.subject import Subject

LOCATED = ("structure", "forward", "loss", "gradients")
"""Rungs whose failure shows in a module's inputs, outputs and gradients."""


def locate(
    climb: Climb, paired: Mapping[str, Pairs], loss: str | None, report: Report, failed: str
) -> None:
    """Read every pair of modules, by the name of the module in the climb's system."""
    buffers = tuple(f"forward {m}." for m in climb.port.system.modules)
    also: list[Finding] = [
        f
        for rung in report.rungs
        for f in rung.findings
        if not f.ok and f.tensor.startswith(buffers)
    ]
    unlike = any(f.verdict == "shape" for rung in report.rungs for f in rung.findings)
    try:
        located = localise(climb, paired, loss, bool(failed), also, unlike)
    except Exception as error:  # the verdict stands without the picture
        report.notes.append(f"the modules could not be read: {type(error).__name__}: {error}")
        return
    report.readings = located.readings
    report.guilty = located.guilty
    report.notes += located.notes


def of_climb(climb: Climb, m: str, found: Pairs) -> Pairs:
    """Pairs of the user's modules as pairs of the climb's own copies of them."""
    theirs = climb.usual.system.modules[m]
    ours = port_modules(climb.port.system.modules[m])
    return Pairs(
        (
            replace(p, reference=theirs.get_submodule(p.reference_path), port=ours[p.port_path])
            for p in found
        ),
        found.unpaired,
    )


def explain(climb: Climb, map: Map | None, report: Report, failed: str) -> None:
    """Known causes, by the catalogue of traps; both sides hold the point where they were read."""
    try:
        climb.usual.load(climb.point)
        climb.port.load(climb.point)
        optimizers = climb.usual.system.optimizers
        if failed in ("optimizer step", "trajectory") and optimizers:
            found = [
                d
                for m, theirs in optimizers.items()
                for d in lint(
                    climb.usual.system.modules[m],
                    climb.port.system.modules[m],
                    [(theirs, climb.port.system.optimizers[m])],
                    map,
                )
            ]
            report.diagnoses = [d for d in found if "ptimizer" in str(d)] or found
            return
        suspects: list[Any] = [*report.guilty] or [r.pair for r in report.readings]
        report.diagnoses = [d for d in diagnose(suspects) if not _beside(d, report, failed)]
    except Exception as error:  # an explanation is welcome; the verdict stands without it
        report.notes.append(f"no diagnosis: {type(error).__name__}: {error}")


GEOMETRY = ("conv-geometry", "pool-window")


def _beside(diagnosis: Diagnosis, report: Report, failed: str) -> bool:
    """Whether a setting that differs is nothing to the port: of a module that is padded by its
    caller, say, or that was found equal as a whole; or of gradients, where outputs differ."""
    trap = diagnosis.trap_id
    if trap == "embedding-padding" and failed.startswith("forward"):
        return True
    if diagnosis.where in {g.pair.reference_path for g in report.guilty}:
        return False
    for r in report.readings:
        if r.pair.reference_path != diagnosis.where:
            continue
        if trap in GEOMETRY and report.guilty:
            return r.note == ANOTHER_SHAPE or r.forward is None or r.forward.ok
        known = r.forward is not None and r.isolated is not None
        return trap == "module-setting" and known and r.ok
    return False


def explain_case(climb: Climb, failed: Rung, report: Report) -> None:
    """As :func:`explain`, for a case of several modules or of none."""
    with suppress(Exception):
        if failed.name == "compiled":
            report.diagnoses = of_compiled(failed)
        elif climb.usual.system.modules and hasattr(climb, "port"):
            explain(climb, None, report, failed.name)
        else:
            theirs, ours = (_function(s.system, failed) for s in (climb.usual, climb.port))
            inputs = {n: climb.point[n] for n in climb.names}
            backward = failed.name == "gradients"
            report.diagnoses = diagnose_functions(theirs, ours, kwargs=inputs, backward=backward)


def _function(system: System, failed: Rung) -> Any:
    """The loss, or the forward pass, in which a system without modules fails."""
    bad = next((f.tensor for f in failed.findings if not f.ok), "").partition(" ")[2]
    loss = next((n for n in system.losses if bad.partition("/")[0] == n), None)
    return system.forward if loss is None else system.losses[loss].function


def explain_what_is_no_module(subject: Subject, report: Report) -> None:
    """Known causes where no module is to blame: functions, and compiled steps."""
    failed = report.failed
    if failed is None:
        return
    with suppress(Exception):
        if failed.name == "compiled":
            report.diagnoses = of_compiled(failed)
        elif not subject.modular and not subject.arguments.constants:
            report.diagnoses = diagnose_functions(
                lambda **inputs: subject.run_reference(subject.prototype, inputs),
                lambda **inputs: subject.run_port(subject.port, inputs),
                kwargs=subject.arguments.arrays,
                backward=failed.name == "gradients",
            )
