"""A :class:`mlx_parity.Case` as a report: proven over drawn shapes, and where it fails, the
smallest failing shape read module by module and explained as :func:`mlx_parity.check` does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from mlx_parity._backend import require_mlx
from mlx_parity.blas import borrowed
from mlx_parity.case import Case
from mlx_parity.equality import Finding
from mlx_parity.errors import CarryError, ParityError, SideError
from mlx_parity.explain import LOCATED, explain_case, locate
from mlx_parity.ladder import RUNGS, Climb, Rung, compiles
from mlx_parity.localise import pairs
from mlx_parity.pairing import Pairs
from mlx_parity.proof import Proof, Row, prove
from mlx_parity.report import Report

require_mlx()

from mlx import nn as mnn  # noqa: E402

Progress = Callable[[str], None]


def check_case(
    case: Case,
    examples: int | None = None,
    *,
    seed: int | None = None,
    compiled: bool | None = None,
    until: str = RUNGS[-1],
    localised: bool = True,
    explain: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Prove a case over drawn shapes and report; never raises for a model.

    examples: how many shapes; by default as the Hypothesis profile in force says.
    seed: of the shapes drawn.
    compiled: whether to compile for each shape too; by default wherever MLX compiles.
    until: the last rung to climb: "forward" for a port that only infers.
    localised, explain: whether a failure is read module by module, and a cause looked for.
    progress: called with a line at each stage.
    """
    say = progress or (lambda line: None)
    report = Report(case.name)
    started = time.monotonic()
    with borrowed():
        try:
            say("drawing shapes and climbing the ladder at each")
            compiled = compiles() if compiled is None else compiled
            proof = prove(case, examples, compiled=compiled, until=until, seed=seed)
            _enter(proof, report)
            failed = next((row for row in proof.rows.values() if not row.ok), None)
            if failed is not None:
                _look_closer(proof, failed, report, localised, explain, say)
        except SideError as error:
            report.undecided(error.side, str(error))
        except (ParityError, ValueError) as error:
            report.undecided("inputs", str(error))
        except Exception as error:  # the user's own build, inputs or carry
            report.undecided("case", f"{type(error).__name__}: {error}")
    report.seconds = time.monotonic() - started
    return report


def _enter(proof: Proof, report: Report) -> None:
    """Each rung's worst over all shapes."""
    rows = list(proof.rows.values())
    report.rungs = [
        Rung(row.rung, row.ok, _summed(row), "" if row.ok else row.message) for row in rows
    ]
    report.notes += [line for row in rows if row.ok for line in row.message.splitlines()]
    report.verdict = "equal" if proof.ok else "different"
    shapes = min((row.examples for row in rows), default=0)
    worst = max(rows, key=lambda row: row.share, default=None)
    at = "" if worst is None else f", the largest bias at {dict(worst.shape)}"
    report.notes.append(f"{shapes} shapes drawn{at}")


def _summed(row: Row) -> tuple[Finding, ...]:
    if not row.bound or not row.ok:
        return ()
    return (
        Finding(
            tensor=f"{row.rung}, all shapes",
            verdict="equal",
            bias=row.bias,
            bound=row.bound,
            noise=row.noise,
            relative_error=math.nan,
            visible=row.visible,
            points=0,
            size=0,
        ),
    )


def _look_closer(
    proof: Proof, row: Row, report: Report, localised: bool, explain: bool, say: Progress
) -> None:
    """Climb once more at the shape that failed, for the tensors, the modules and the cause."""
    case = proof.case
    report.notes = [
        f"found at {dict(row.shape)}, to which the shapes that failed were shrunk",
        proof.repeat(row),
    ]
    climb = Climb(case, row.shape, row.seed)
    rungs = climb.run(proof.until)
    if row.rung == "compiled":
        climb = Climb(case, row.shape, row.seed)
        rungs.append(climb.compiled())
    if all(r.ok for r in rungs):
        report.notes.append("it did not fail again there: something is drawn outside of the case")
        return
    report.rungs = rungs
    failed = next(r for r in rungs if not r.ok)
    if localised and failed.name in LOCATED and hasattr(climb, "port"):
        say("module by module")
        locate(climb, _pairs(climb, report), _loss(climb, failed), report, failed.name)
    if explain:
        say("looking for a known cause")
        explain_case(climb, failed, report)


def _pairs(climb: Climb, report: Report) -> dict[str, Pairs]:
    """The pairs of every module of the system, by what the case says of names."""
    options = climb.case.carry(climb.shape)
    found: dict[str, Pairs] = {}
    for m, theirs in climb.usual.system.modules.items():
        ours = climb.port.system.modules[m]
        if not isinstance(ours, mnn.Module):
            continue
        try:
            found[m] = pairs(theirs, ours, options.get(m, {}).get("rename"))
        except CarryError as error:
            report.notes.append(f"{m}: its modules were not paired: {error}")
    report.unpaired = tuple(u for p in found.values() for u in p.unpaired)
    return found


def _loss(climb: Climb, failed: Rung) -> str | None:
    """The loss that shows the failure; None: the sum of the outputs."""
    losses = climb.usual.system.losses
    bad = next((f.tensor for f in failed.findings if not f.ok), "")
    if failed.name == "loss":
        return bad.partition(" ")[2]
    if failed.name == "gradients":
        return next((n for n in losses if bad.startswith(f"gradients {n}/")), next(iter(losses)))
    if climb.usual.system.forward is not None:
        return None
    return next(iter(losses), None)
