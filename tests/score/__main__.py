"""``nox -s score``: seeded faults found, located, explained; false alarms over correct ports.

Run as ``python -m tests.score [--examples N] [--workers N] [--first SEED] [NAME ...]``; a NAME
selects the families that contain it. Writes reports/score.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.score import FAMILIES
from tests.score.run import Row, alarm, find, plain, prepare

REPORT = Path(__file__).parents[2] / "reports" / "score.json"

EXAMPLES = 150
"""Correct ports of a short run."""


def score(rows: Sequence[Row], examples: int, alarms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What reports/score.json holds."""
    return {
        "faults": len(rows),
        "families": len({r.family for r in rows}),
        "detected": sum(r.detected for r in rows),
        "located": sum(r.located for r in rows),
        "explained": sum(r.explained for r in rows),
        "false_alarms": len(alarms),
        "examples": examples,
        "rows": [plain(r) for r in rows],
        "alarms": list(alarms),
    }


def table(rows: Sequence[Row]) -> Table:
    """A row per family, and one for all."""
    made = Table(title="Seeded faults")
    made.add_column("family", no_wrap=True)
    for name in ("faults", "detected", "located", "explained"):
        made.add_column(name, justify="right")
    made.add_column("missed", overflow="fold")
    for family in [f.name for f in FAMILIES] + [""]:
        own = [r for r in rows if not family or r.family == family]
        if not own:
            continue
        missed = [
            f"{r.fault} ({'not seen' if not r.detected else f'in {r.guilty or r.rung}'})"
            for r in own
            if not r.located and family
        ]
        counts = [sum(getattr(r, n) for r in own) for n in ("detected", "located", "explained")]
        style = "" if family else "bold"
        made.add_row(
            family or "all", *map(str, (len(own), *counts)), "; ".join(missed), style=style
        )
    return made


def write(found: dict[str, Any], path: Path = REPORT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a family's name")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="correct ports, in all")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--first", type=int, default=1000, help="seed of the first correct port")
    options = parser.parse_args(argv)
    families = [f for f in FAMILIES if not options.names or any(n in f.name for n in options.names)]
    if not families:
        parser.error(f"there are only: {', '.join(f.name for f in FAMILIES)}")

    console = Console(width=None if sys.stdout.isatty() else 160)
    bars = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    context = multiprocessing.get_context("spawn")
    rows: dict[tuple[str, str], Row] = {}
    alarms: list[dict[str, Any]] = []
    with (
        ProcessPoolExecutor(options.workers, mp_context=context, initializer=prepare) as pool,
        Progress(*bars, console=Console(stderr=True)) as progress,
    ):
        looking: dict[Future[Any], tuple[str, Any]] = {}
        for f in families:
            for fault in f.faults:
                looking[pool.submit(find, f.name, fault.name)] = (f.name, fault.name)
        wrong = progress.add_task("faults", total=len(looking))
        right = progress.add_task("correct ports", total=options.examples)
        for i in range(options.examples):
            name, seed = families[i % len(families)].name, options.first + i // len(families)
            looking[pool.submit(alarm, name, seed)] = (name, seed)
        for future in as_completed(looking):
            name, what = looking[future]
            if isinstance(what, str):
                rows[name, what] = future.result()
                progress.advance(wrong)
            else:
                if said := future.result():
                    alarms.append({"family": name, "seed": what, "message": said})
                progress.advance(right)

    ordered = [rows[f.name, fault.name] for f in families for fault in f.faults]
    found = score(ordered, options.examples, alarms)
    write(found)
    console.print(table(ordered))
    for row in ordered:
        if not (row.detected and row.located and row.explained):
            console.print(
                f"{row.family}: {row.fault}: {row.rung or 'not seen'}, guilty {row.guilty or '-'} "
                f"(is {row.where!r}), diagnoses {list(row.diagnoses)} (is {list(row.why)}) "
                f"{row.message[:200]}",
                style="yellow",
                markup=False,
            )
    for a in alarms:
        console.print(
            f"FALSE ALARM {a['family']} {a['seed']}: {a['message']}", style="red", markup=False
        )
    n = max(len(ordered), 1)
    console.print(
        f"{len(ordered)} faults: detected {found['detected'] / n:.1%}, located "
        f"{found['located'] / n:.1%}, explained {found['explained'] / n:.1%}; "
        f"{len(alarms)} false alarms in {options.examples} correct ports; {REPORT}"
    )
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
