"""``nox -s parity``: climb the ladder with every case and print the card.

Run as ``python -m tests.parity_card [--examples N] [--workers N] [NAME ...]``; a NAME selects the
cases that contain it. The number of shapes comes from the Hypothesis profile (HYPOTHESIS_PROFILE);
a case that is dear to climb with gets as many fewer as its ``cost`` says.
"""

import argparse
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from queue import Empty
from typing import Any

import tests.conftest  # noqa: F401  before mlx: TF32 and the profiles

import mlx.core as mx  # isort: skip
from hypothesis import settings  # isort: skip
from rich.console import Console  # isort: skip
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # isort: skip

from mlx_parity import Proof, card, prove  # isort: skip
from mlx_parity.blas import use_openblas  # isort: skip
from tests.cases import CASES, seed  # isort: skip

REPORT = Path("reports/parity.json")


SHARD, SMALLEST_SHARD = 50, 2
"""Shapes of a case of cost 1 that one process takes at a time, and of the dearest."""


def climb(name: str, examples: int, share: int, device: str, ticks: Any) -> tuple[Proof, float]:
    """A share of one case's shapes, in a process of its own, and the CPU seconds that it took."""
    start = sum(os.times()[:4])  # the compiler's too
    if device:
        mx.set_default_device(getattr(mx, device))
    use_openblas()
    case = next(c for c in CASES if c.name == name)
    fixed = seed(case, share) if settings().derandomize else None
    proof = prove(case, examples, seed=fixed, progress=lambda: ticks.put(name))
    taken = sum(os.times()[:4]) - start
    named: Any = _Named(case.name, case.side)
    return replace(proof, case=named), taken


class _Named:
    """What the card needs of a case: strategies and builders do not travel between processes."""

    def __init__(self, name: str, side: str):
        self.name, self.side = name, side


def shares(total: int, cost: int) -> list[int]:
    """``total`` shapes as shards of about equal work."""
    size = max(SMALLEST_SHARD, SHARD // cost)
    return [min(size, total - i) for i in range(0, total, size)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nox -s parity --", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only the cases whose name contains one of these")
    parser.add_argument("--examples", type=int, default=settings().max_examples)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "gpu"), default="", help="not MLX's default")
    options = parser.parse_args(argv)
    names = [c.name for c in CASES]
    if options.names:
        names = [n for n in names if any(part in n for part in options.names)]
        if not names:
            parser.error(f"no case is called so; there are: {', '.join(c.name for c in CASES)}")

    console = Console(width=None if sys.stdout.isatty() else 180)
    context = multiprocessing.get_context("spawn")
    proofs: dict[str, Proof] = {}
    seconds = dict.fromkeys(names, 0.0)
    of_case = {c.name: max(1, options.examples // c.cost) for c in CASES if c.name in names}
    shards = {c.name: shares(of_case[c.name], c.cost) for c in CASES if c.name in names}
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
        helpers = set(multiprocessing.active_children())  # the queue's; the climbers start below
        bars = {n: progress.add_task(n, total=2 * of_case[n]) for n in names}
        cost = {c.name: c.cost for c in CASES}
        futures = {
            pool.submit(climb, n, size, i, options.device, ticks): n
            for n in sorted(names, key=lambda n: cost[n], reverse=True)  # no long tail at the end
            for i, size in enumerate(shards[n])
        }
        waiting = set(futures)
        ended = ""
        try:
            while waiting and not ended:
                try:
                    progress.advance(bars[ticks.get(timeout=0.2)])
                except Empty:
                    for future in [f for f in waiting if f.done()]:
                        if isinstance(
                            future.exception(), BrokenProcessPool
                        ):  # as are all behind it
                            ended = "A climb's process died"
                            continue
                        waiting.remove(future)
                        (proof, taken), name = future.result(), futures[future]
                        seconds[name] += taken
                        if name in proofs:
                            proofs[name].merge(proof)
                        else:
                            proofs[name] = proof
        except KeyboardInterrupt:
            ended = "Interrupted"
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is done gets shown
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - helpers:
                process.terminate()
    unfinished = {futures[f] for f in waiting}
    ordered = [proofs[n] for n in names if n not in unfinished]
    if options.device:
        mx.set_default_device(getattr(mx, options.device))
    card.show(ordered, console)
    blas = str(use_openblas())
    card.write(ordered, REPORT, profile=os.environ.get("HYPOTHESIS_PROFILE", "dev"), mlx_blas=blas)
    console.print(f"MLX {version('mlx')} ({blas}), PyTorch {version('torch')}; {REPORT}")
    if unfinished:
        console.print(f"{ended}, without {len(unfinished)} cases: {', '.join(sorted(unfinished))}")
    dearest = sorted(names, key=lambda n: seconds[n], reverse=True)[:5]
    each = (f"{n} {seconds[n]:.0f} s ({seconds[n] / of_case[n]:.1f} s a shape)" for n in dearest)
    console.print(f"CPU time {sum(seconds.values()):.0f} s, most of it {', '.join(each)}")
    return 0 if all(p.ok for p in ordered) and not unfinished else 1


if __name__ == "__main__":
    sys.exit(main())
