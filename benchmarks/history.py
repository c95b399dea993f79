"""Every run of the benchmark, kept for the machine that it was made on.

Figures of two machines, two BLAS or two precisions are not comparable, not even their ratios: so a
run is filed under the identity of its machine, and runs of two identities are never put side by
side. The versions of MLX and PyTorch are not part of it: to see them change is the purpose.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HISTORY = Path("reports/history")

IDENTITY = (
    "chip",
    "cpus",
    "power",
    "mlx_backend",
    "mlx_device",
    "mlx_blas",
    "mlx_blas_threads",
    "mlx_tf32",
    "torch_device",
    "torch_threads",
    "torch_tf32",
    "cuda_graphs",
    "memory_kept",
)
"""The keys of ``machine_info`` that have to be equal for two runs to be comparable."""


@dataclass(frozen=True)
class Run:
    """One run: when, of which commit, on what, and its rows by system."""

    time: float
    commit: str
    machine: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def key(self) -> str:
        return identity_key(self.machine)


def identity_key(machine: Mapping[str, Any]) -> str:
    """Twelve letters for everything in :data:`IDENTITY`."""
    text = json.dumps([[k, machine.get(k)] for k in IDENTITY])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def store(
    rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], folder: Path = HISTORY
) -> Path:
    """File a run under its machine's identity; the file is whole or not there."""
    now = time.time()
    home = folder / identity_key(machine)
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"{time.time_ns()}.json"
    run = {"time": now, "commit": _commit(), "machine": dict(machine), "rows": list(rows)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def load(machine: Mapping[str, Any], folder: Path = HISTORY) -> list[Run]:
    """The runs of this machine, oldest first."""
    return sorted(
        (read(path) for path in (folder / identity_key(machine)).glob("*.json")),
        key=lambda run: run.time,
    )


def read(path: Path) -> Run:
    """Raises ValueError where the file is no run."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["system"]: row for row in run["rows"]}
        return Run(float(run["time"]), run["commit"], run["machine"], rows)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no run of this benchmark: {error!r}") from error


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise ValueError, naming what differs, unless all runs are of one machine's identity."""
    for run in runs[1:]:
        differ = [k for k in IDENTITY if run.machine.get(k) != runs[0].machine.get(k)]
        if differ:
            named = "; ".join(
                f"{k} is {runs[0].machine.get(k)!r} and {run.machine.get(k)!r}" for k in differ
            )
            raise ValueError(f"these runs cannot be compared: {named}")


def _commit() -> str:
    """The commit and a plus sign where the tree has changes; "" outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit + ("+" if commit and git("status", "--porcelain") else "")


def change_points(
    logs: Sequence[float], errors: Sequence[float], penalty: float | None = None
) -> list[int]:
    """Where a series steps from one level to another: the index of the first run of each new level.

    ``errors`` are the standard errors of ``logs``. The partition into constant levels that costs
    least, by dynamic programming: the sum of squared deviations in units of the errors, and
    ``penalty`` for each level. The default, 3 log n + 6, is dearer than the usual 2 log n of BIC,
    since the errors know nothing of what moves a machine from one day to the next.
    """
    x, s = np.asarray(logs, float), np.asarray(errors, float)
    if x.shape != s.shape:
        raise ValueError(f"{x.shape} values and {s.shape} errors")
    n = len(x)
    if n < 2:
        return []
    if not (s > 0).all():
        raise ValueError("an error that is not positive")
    penalty = 3 * np.log(n) + 6 if penalty is None else penalty
    weight = np.concatenate([[0], np.cumsum(s**-2)])
    first = np.concatenate([[0], np.cumsum(x * s**-2)])
    second = np.concatenate([[0], np.cumsum(x**2 * s**-2)])
    best = np.zeros(n + 1)
    came = np.zeros(n + 1, int)
    for end in range(1, n + 1):
        start = np.arange(end)
        w, a, b = (sums[end] - sums[start] for sums in (weight, first, second))
        cost = best[start] + (b - a**2 / w) + penalty
        came[end] = int(np.argmin(cost))
        best[end] = cost[came[end]]
    points, at = [], n
    while at:
        at = int(came[at])
        points.append(at)
    return sorted(p for p in points if p)
