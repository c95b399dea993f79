"""``nox -s compare -- REV``: is this tree slower than a revision, or than another MLX?

    python -m benchmarks.compare REV [SYSTEM ...]
    python -m benchmarks.compare --mlx VERSION [SYSTEM ...]

Where a process lands in memory, and on which cores, moves its speed by more than most changes do,
for as long as it lives. So the unit of evidence is a pair of fresh processes, one of each tree,
that take turns; within a pair all that counts is the median of its ratios. Several pairs give an
interval (Student's t on the logarithms). It is looked at after a quarter of the pairs, after half
and after all of them, and the first look that decides is the last: what is plain costs little, and
the chance of a wrong verdict is shared out among the looks (Bonferroni).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.stats import t as student

from mlx_impl.process import LARGEST_KEPT

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("worker.py")
REPORT = Path("reports/compare.json")

PROCESSES = 20
LOOKS = (0.25, 0.5, 1.0)
"""The shares of the pairs after which a verdict is sought."""

TURNS = 12
TURN_SECONDS = 0.1
CONFIDENCE = 0.99
THRESHOLD = 0.02
"""The smallest change worth a verdict; ``[tool.benchmarks.thresholds]`` has it for each system."""

ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MLX_USE_CUDA_GRAPHS": "0",
    "MALLOC_MMAP_THRESHOLD_": str(LARGEST_KEPT),
    "MALLOC_TRIM_THRESHOLD_": str(LARGEST_KEPT),
}
"""Of both sides, unless the caller has set something else.

One thread of the BLAS: several wait for each other spinning. The other worker's still do when a
turn begins, and one busy process elsewhere makes a step several times as long; what one thread does
longer, several do too. The rest is what ``mlx_impl.process.tune`` does, which a revision may lack.
"""

EXIT = {"no change": 0, "faster": 0, "inconclusive": 0, "slower": 1}

Verdict = Literal["slower", "faster", "no change", "inconclusive"]


class WorkerFailed(RuntimeError):
    """A worker could not do what it was told, for a reason of its own."""


@dataclass(frozen=True)
class Side:
    """What is measured: the Python that runs it and the folders that come first on its path."""

    name: str
    python: str
    path: tuple[Path, ...]


class Worker:
    """A fresh process of one side, with one system entered. Use it in a ``with``."""

    def __init__(self, side: Side, system: str, batch: int):
        self.side = side
        env = ENVIRONMENT | os.environ | {"PYTHONPATH": os.pathsep.join(map(str, side.path))}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in __exit__
        self._process = subprocess.Popen(
            [side.python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
            cwd=side.path[-1],
        )
        self._system, self._batch = system, batch

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def start_entering(self) -> None:
        """Begin to import and compile, so that both sides of a pair do so at the same time."""
        self._send(enter=self._system, batch=self._batch)

    def entered(self) -> dict[str, Any]:
        return self._receive()

    def time(self, steps: int, slowdown: float = 0.0) -> float:
        """Seconds that ``steps`` steps take."""
        self._send(time=steps, slowdown=slowdown)
        return float(self._receive()["seconds"])

    def _send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._failed("it ended") from error

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed("it ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _failed(self, why: str) -> WorkerFailed:
        self._errors.seek(0)
        tail = "".join(self._errors.readlines()[-5:])
        return WorkerFailed(f"{self.side.name}, {self._system}: {why}\n{tail}".rstrip())


@dataclass(frozen=True)
class Pair:
    """What two processes that took turns have shown, for each slowdown that was put on head."""

    logs: tuple[float, ...]
    """The median of head's times over base's, as logarithms."""
    base_ms: float
    head_ms: tuple[float, ...]
    """Medians of a step's milliseconds."""


def pair_of_processes(
    base: Side,
    head: Side,
    system: str,
    batch: int,
    slowdowns: Sequence[float] = (0.0,),
    turns: int = TURNS,
) -> Pair:
    """Two fresh processes that take turns. Raises :class:`WorkerFailed`."""
    with Worker(base, system, batch) as a, Worker(head, system, batch) as b:
        a.start_entering()
        b.start_entering()
        seconds = max(a.entered()["step_seconds"], b.entered()["step_seconds"])
        steps = max(1, math.ceil(TURN_SECONDS / seconds))
        before = np.empty((turns, len(slowdowns)))
        after = np.empty_like(before)
        for turn in range(turns):
            for i, slowdown in enumerate(slowdowns):
                if turn % 2 == 0:
                    before[turn, i] = a.time(steps)
                    after[turn, i] = b.time(steps, slowdown)
                else:
                    after[turn, i] = b.time(steps, slowdown)
                    before[turn, i] = a.time(steps)
    return Pair(
        tuple(np.median(np.log(after / before), axis=0).tolist()),
        1e3 * float(np.median(before)) / steps,
        tuple((1e3 * np.median(after, axis=0) / steps).tolist()),
    )


@dataclass
class Comparison:
    """What is known of one system: a logarithm for each pair of processes."""

    system: str
    threshold: float = THRESHOLD
    confidence: float = CONFIDENCE
    processes: int = PROCESSES
    logs: list[float] = field(default_factory=list)

    @property
    def looks(self) -> list[int]:
        """How many pairs there are at each look."""
        return sorted({max(2, round(share * self.processes)) for share in LOOKS})

    @property
    def ratio(self) -> float:
        """Head's time over base's: above 1 is slower."""
        return math.exp(float(np.mean(self.logs)))

    @property
    def interval(self) -> tuple[float, float]:
        """Of the ratio. It holds at every look at once."""
        return interval(self.logs, 1 - (1 - self.confidence) / len(self.looks))

    @property
    def detectable(self) -> float:
        """The smallest change that this comparison would have called one, as a share."""
        low, high = self.interval
        return (1 + self.threshold) * math.sqrt(high / low) - 1

    @property
    def verdict(self) -> Verdict:
        """Of the pairs so far; "inconclusive" between the looks."""
        if len(self.logs) not in self.looks:
            return "inconclusive"
        return decide(self.interval, self.threshold)

    @property
    def ended(self) -> bool:
        return self.verdict != "inconclusive" or len(self.logs) >= self.processes

    def row(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "ratio": self.ratio,
            "interval": self.interval,
            "detectable": self.detectable,
            "verdict": self.verdict,
        }


def interval(logs: Sequence[float], confidence: float) -> tuple[float, float]:
    """Of the ratio. Raises ValueError with fewer than two pairs of processes."""
    n = len(logs)
    if n < 2:
        raise ValueError(f"{n} pair of processes: their spread needs 2 or more")
    half = student.ppf((1 + confidence) / 2, n - 1) * np.std(logs, ddof=1) / math.sqrt(n)
    middle = float(np.mean(logs))
    return math.exp(middle - half), math.exp(middle + half)


def decide(interval: tuple[float, float], threshold: float) -> Verdict:
    """From the whole interval: beyond the threshold, within it, or across it."""
    low, high = interval
    if low > 1 + threshold:
        return "slower"
    if high < 1 / (1 + threshold):
        return "faster"
    if low > 1 / (1 + threshold) and high < 1 + threshold:
        return "no change"
    return "inconclusive"


def compare(
    base: Side,
    head: Side,
    systems: Mapping[str, int],
    processes: int = PROCESSES,
    thresholds: Mapping[str, float] | None = None,
    progress: Callable[[Comparison], None] = lambda comparison: None,
) -> list[Comparison]:
    """Each system, by name with its batch size, in at most ``processes`` fresh pairs.

    The confidence is shared out among the systems (Bonferroni), so that it holds for all at once.
    The pairs of all systems are mixed: what the machine does for minutes meets every system.
    """
    thresholds = thresholds or {}
    confidence = 1 - (1 - CONFIDENCE) / len(systems)
    found = [
        Comparison(
            s, thresholds.get(s, thresholds.get("default", THRESHOLD)), confidence, processes
        )
        for s in systems
    ]
    while undecided := [c for c in found if not c.ended]:
        for c in undecided:
            c.logs.extend(pair_of_processes(base, head, c.system, systems[c.system]).logs)
            progress(c)
    return found


@contextlib.contextmanager
def checkout(revision: str, root: Path = ROOT) -> Iterator[Path]:
    """A folder with the tree of ``revision``, gone afterwards, also after Control-C.

    Raises ValueError where git knows no such revision.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()

    commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    git("worktree", "prune")
    parent = Path(tempfile.mkdtemp(prefix="compare-"))
    tree = parent / commit[:12]
    try:
        git("worktree", "add", "--detach", str(tree), commit)
        yield tree
    finally:
        shutil.rmtree(parent, ignore_errors=True)
        with contextlib.suppress(ValueError):
            git("worktree", "prune")


@contextlib.contextmanager
def other_mlx(wanted: str) -> Iterator[Path]:
    """A folder that holds MLX ``wanted`` and its back end, to come first on a worker's path."""
    backends = [p for p in ("mlx-metal", "mlx-cpu", "mlx-cuda-13", "mlx-cuda-12") if _installed(p)]
    with tempfile.TemporaryDirectory(prefix="compare-mlx-") as folder:
        packages = [f"{name}=={wanted}" for name in ("mlx", *backends)]
        command = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *packages]
        if subprocess.run([sys.executable, *command], check=False).returncode:
            raise ValueError(f"MLX {wanted} cannot be installed here: see pip's message above")
        yield Path(folder)


def _installed(package: str) -> bool:
    try:
        version(package)
    except ImportError:
        return False
    return True


def thresholds_of(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, float]:
    """``[tool.benchmarks.thresholds]``: a share for each system's name, and ``default``.

    Raises ValueError where one is not a positive number.
    """
    table = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    found = table.get("tool", {}).get("benchmarks", {}).get("thresholds", {})
    for name, share in found.items():
        if not isinstance(share, int | float) or isinstance(share, bool) or not share > 0:
            raise ValueError(
                f"{pyproject.name}: threshold {name} = {share!r} is no positive number"
            )
    return dict(found)


def table(comparisons: Sequence[Comparison], base: str, head: str) -> Table:
    made = Table(title=f"{head} against {base}: above 1x, slower", title_justify="left")
    for column in ("system", "time", "interval", "verdict", "would have seen", "pairs"):
        made.add_column(column, justify="left" if column in ("system", "verdict") else "right")
    for c in comparisons:
        low, high = c.interval
        made.add_row(
            c.system,
            f"{c.ratio:.3f}x",
            f"{low:.3f}-{high:.3f}",
            c.verdict,
            f"{c.detectable:.1%}",
            str(len(c.logs)),
        )
    return made


def write(comparisons: Sequence[Comparison], base: str, head: str, path: Path = REPORT) -> None:
    """The whole report or none: an interrupted run leaves the file of the run before."""
    path.parent.mkdir(exist_ok=True)
    report = {
        "base": base,
        "head": head,
        "time": time.time(),
        "rows": [c.row() for c in comparisons],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(path)


def systems_named(names: Sequence[str], asked_batch: int | None) -> dict[str, int]:
    """The training systems whose names contain one of ``names`` (all without), and their batches.

    Raises ValueError where none is called so.
    """
    from benchmarks import machine, systems

    subjects = [s for s in systems.SUBJECTS if s.kind == "step"]
    if names:
        chosen = [s for s in subjects if any(n in s.name for n in names)]
        if not chosen:
            raise ValueError(f"no system is called so; there are: {[s.name for s in subjects]}")
        subjects = chosen
    on_cpu = machine.torch_device() == "cpu"
    return {s.name: systems.batch_size(s, asked_batch, on_cpu) for s in subjects}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nox -s compare --", description=__doc__.split("\n")[0])
    parser.add_argument("revision", nargs="?", help="what git calls it; not with --mlx")
    parser.add_argument("systems", nargs="*", help="only those whose name contains one of these")
    parser.add_argument("--mlx", metavar="VERSION", help="this tree on another MLX instead")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="pairs at most")
    parser.add_argument("--batch-size", type=int)
    options = parser.parse_args(argv)
    if bool(options.revision) == bool(options.mlx) and not options.mlx:
        parser.error("give a revision, or --mlx VERSION")
    names = options.systems + ([options.revision] if options.mlx and options.revision else [])
    if options.processes < 2:
        parser.error("--processes: one pair has no spread, take 2 or more")

    head = Side("this tree", sys.executable, (ROOT,))
    try:
        systems, thresholds = systems_named(names, options.batch_size), thresholds_of()
        with contextlib.ExitStack() as stack:
            if options.mlx:
                overlay = stack.enter_context(other_mlx(options.mlx))
                base = Side(f"MLX {options.mlx}", sys.executable, (overlay, ROOT))
            else:
                tree = stack.enter_context(checkout(options.revision))
                base = Side(options.revision, sys.executable, (tree,))
                if _dependencies(tree) != _dependencies(ROOT):
                    print(
                        f"note: {options.revision} declares other dependencies; both sides run on "
                        "those that are installed here",
                        file=sys.stderr,
                    )
            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            with bar:
                bars = {s: bar.add_task(s, total=options.processes) for s in systems}

                def progress(c: Comparison) -> None:
                    total = len(c.logs) if c.ended else options.processes
                    bar.update(bars[c.system], completed=len(c.logs), total=total)

                found = compare(base, head, systems, options.processes, thresholds, progress)
    except (ValueError, WorkerFailed) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    Console(width=None if sys.stdout.isatty() else 120).print(table(found, base.name, head.name))
    write(found, base.name, head.name)
    print(REPORT)
    return max(EXIT[c.verdict] for c in found)


def _dependencies(tree: Path) -> Any:
    project = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))
    return project["project"]["dependencies"], project.get("dependency-groups")


if __name__ == "__main__":
    sys.exit(main())
