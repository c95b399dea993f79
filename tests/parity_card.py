"""``nox -s parity``: climb the ladder with every case and print the card.

Run as ``python -m tests.parity_card [--examples N] [--workers N] [NAME ...]``; a NAME selects the
cases that contain it. The number of shapes comes from the Hypothesis profile (HYPOTHESIS_PROFILE).
"""

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from queue import Empty
from typing import Any

import tests.conftest  # noqa: F401  before mlx: TF32 and the profiles

from hypothesis import settings  # isort: skip
from rich.console import Console  # isort: skip
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # isort: skip

from mlx_parity import Proof, card, prove  # isort: skip
from tests.cases import CASES  # isort: skip

REPORT = Path("reports/parity.json")


def climb(name: str, examples: int, ticks: Any) -> Proof:
    """One case in a process of its own."""
    case = next(c for c in CASES if c.name == name)
    proof = prove(case, examples, progress=lambda: ticks.put(name))
    return Proof(case=_Named(case.name, case.side), rows=proof.rows, seed=proof.seed)  # type: ignore[arg-type]


class _Named:
    """What the card needs of a case: strategies and builders do not travel between processes."""

    def __init__(self, name: str, side: str):
        self.name, self.side = name, side


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nox -s parity --", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only the cases whose name contains one of these")
    parser.add_argument("--examples", type=int, default=settings().max_examples)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    names = [c.name for c in CASES]
    if options.names:
        names = [n for n in names if any(part in n for part in options.names)]
        if not names:
            parser.error(f"no case is called so; there are: {', '.join(c.name for c in CASES)}")

    console = Console(width=None if sys.stdout.isatty() else 180)
    context = multiprocessing.get_context("spawn")
    proofs: dict[str, Proof] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(options.workers, mp_context=context) as pool,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        ticks = manager.Queue()
        bars = {n: progress.add_task(n, total=2 * options.examples) for n in names}
        futures = {pool.submit(climb, n, options.examples, ticks): n for n in names}
        waiting = set(futures)
        while waiting:
            try:
                progress.advance(bars[ticks.get(timeout=0.2)])
            except Empty:
                for future in [f for f in waiting if f.done()]:
                    waiting.remove(future)
        for future in as_completed(futures):
            proofs[futures[future]] = future.result()
    ordered = [proofs[n] for n in names]
    card.show(ordered, console)
    card.write(ordered, REPORT)
    console.print(f"written to {REPORT}")
    return 0 if all(p.ok for p in ordered) else 1


if __name__ == "__main__":
    sys.exit(main())
