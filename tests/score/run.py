"""One fault, or one correct port, through the check that users call."""

from __future__ import annotations

import warnings
import zlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

import mlx_parity
from mlx_parity.case import Case
from mlx_parity.diagnose import of_compiled
from mlx_parity.ladder import Climb
from tests.score import FAMILIES
from tests.score.family import Example, Family, Fault

TRIES = 8
"""Shapes at which a fault is looked for: a port meets more than one."""


@dataclass(frozen=True)
class Row:
    """How one fault fared."""

    family: str
    fault: str
    subtle: bool
    detected: bool
    located: bool
    explained: bool
    rung: str
    guilty: str
    where: str
    """Where it is: the reference's module, or the rung."""
    diagnoses: tuple[str, ...]
    why: tuple[str, ...]
    """The traps that would be right."""
    seconds: float
    seed: int
    message: str = ""


def prepare() -> None:
    """In each worker: the processes share the cores."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def rng(family: Family, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(family.name.encode()), seed])


def check(example: Example, seed: int, correct: bool) -> Any:
    """The report. Of a correct port nothing is compiled, and no module read on its own."""
    torch.manual_seed(seed)
    return mlx_parity.check(
        example.reference,
        example.port,
        example.inputs,
        **{"weights": "random", "compiled": False, "seed": seed, **example.options},
        **({"localised": False} if correct else {}),
    )


def family(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


def find(name: str, fault_name: str) -> Row:
    """Look for a fault at up to three shapes; the first that shows it is scored."""
    members = family(name)
    fault = next(f for f in members.faults if f.name == fault_name)
    row = None
    for seed in range(TRIES):
        example = fault.change(members.build(rng(members, seed)))
        row = _judged(members, fault, example, seed)
        if row.detected:
            break
    assert row is not None
    return row


def _judged(members: Family, fault: Fault, example: Example, seed: int) -> Row:
    if isinstance(example.reference, Case):
        return _compiled(members, fault, example, seed)
    report = check(example, seed, correct=False)
    rung = report.failed.name if report.failed else report.fault
    guilty = [g.pair.reference_path for g in report.guilty]
    ids = tuple(d.trap_id for d in report.diagnoses)
    located = bool(guilty) and guilty[0] in fault.places
    if fault.where in (*mlx_parity.RUNGS, "weights"):
        located = rung == fault.where
    explained = bool(ids) and ids[0] in fault.why
    detected = not report.ok or (fault.noted and explained)
    return Row(
        family=members.name,
        fault=fault.name,
        subtle=fault.subtle,
        detected=detected,
        located=detected and (located or (fault.noted and report.ok)),
        explained=detected and explained,
        rung=rung,
        guilty=", ".join(guilty),
        where=fault.where,
        diagnoses=ids,
        why=fault.why,
        seconds=report.seconds,
        seed=seed,
        message=report.problem,
    )


def _compiled(members: Family, fault: Fault, example: Example, seed: int) -> Row:
    climb = Climb(example.reference, example.inputs, seed)
    climb.structure()
    rung = climb.compiled()
    ids = tuple(d.trap_id for d in of_compiled(rung))
    return Row(
        family=members.name,
        fault=fault.name,
        subtle=fault.subtle,
        detected=not rung.ok,
        located=not rung.ok,
        explained=bool(ids) and ids[0] in fault.why,
        rung="" if rung.ok else "compiled",
        guilty="",
        where=fault.where,
        diagnoses=ids,
        why=fault.why,
        seconds=0.0,
        seed=seed,
        message=f"{rung.message} {rung.worst}",
    )


def alarm(name: str, seed: int) -> str:
    """What is wrongly reported about a correct port; empty where nothing is."""
    members = family(name)
    example = members.build(rng(members, seed))
    if isinstance(example.reference, Case):
        rungs = Climb(example.reference, example.inputs, seed).run()
        return "; ".join(f"{r.name} {r.message} {r.worst}" for r in rungs if not r.ok)
    report = check(example, seed, correct=True)
    if report.ok:
        return ""
    return f"{report.summary()} {report.failed.worst if report.failed else ''}"


def plain(row: Row) -> dict[str, Any]:
    return asdict(replace(row, seconds=round(row.seconds, 2)))
