"""``nox -s report``: the runs of this machine as one page, and as pictures for a README.

    python -m benchmarks.report [--out FOLDER]

The page holds everything in itself and loads nothing.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks import machine
from benchmarks.history import HISTORY, IDENTITY, Run, change_points, check_comparable, load
from mlx_impl import process
from mlx_parity.blas import use_openblas

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

OUT = Path("reports")
RATIOS = {
    "compiled_over_uncompiled": "compiled over uncompiled MLX",
    "over_torch_eager": "compiled MLX over PyTorch eager",
}
COLOURS = {"compiled_over_uncompiled": "tab:blue", "over_torch_eager": "tab:orange"}
STANDARD_ERRORS = 2.576
"""In half a 99 % interval, if it were a normal distribution's."""


def systems_of(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.rows))


def series(runs: Sequence[Run], system: str, key: str) -> list[tuple[int, float, float, float]]:
    """(run, ratio, low, high) for each run that has this ratio."""
    found = []
    for i, run in enumerate(runs):
        row = run.rows.get(system, {})
        if row.get(key) is not None and row.get(f"{key}_interval"):
            found.append((i, row[key], *row[f"{key}_interval"]))
    return found


def changes(points: Sequence[tuple[int, float, float, float]]) -> list[int]:
    """The runs at which the ratio stepped to another level."""
    logs = [np.log(ratio) for _, ratio, _, _ in points]
    # An interval of few pairs can be of no width; 1 % is less than two runs ever agree by.
    errors = [max(np.log(high / low) / 2 / STANDARD_ERRORS, 0.01) for *_, low, high in points]
    return [points[i][0] for i in change_points(logs, errors)]


def over_time(runs: Sequence[Run], system: str) -> Figure:
    """Both ratios of one system, run by run, with intervals; dashed where the level changed."""
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for key, label in RATIOS.items():
        points = series(runs, system, key)
        if not points:
            continue
        x, ratio, low, high = map(np.array, zip(*points, strict=True))
        axes.errorbar(
            x,
            ratio,
            yerr=[ratio - low, high - ratio],
            fmt="o-",
            markersize=3,
            linewidth=1,
            color=COLOURS[key],
            label=label,
        )
        for at in changes(points):
            axes.axvline(at - 0.5, color=COLOURS[key], linestyle="--", linewidth=1)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xticks(range(len(runs)), [run.commit[:7] or "?" for run in runs], rotation=60)
    axes.tick_params(labelsize=7)
    axes.set_title(system, fontsize=10)
    axes.legend(fontsize=7)
    return figure


def latest(run: Run) -> Figure:
    """Compiled and uncompiled throughput, relative to PyTorch eager, of the newest run."""
    rows = [r for r in run.rows.values() if r.get("ms_compiled") and r.get("ms_torch_eager")]
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.42 * len(rows)), layout="constrained")
    y = np.arange(len(rows))
    for offset, key, label, colour in (
        (-0.2, "ms_uncompiled", "MLX uncompiled", "lightsteelblue"),
        (0.2, "ms_compiled", "MLX compiled", "tab:blue"),
    ):
        speed = [r["ms_torch_eager"] / r[key] if r.get(key) else 0 for r in rows]
        bars = axes.barh(y + offset, speed, 0.38, label=label, color=colour)
        axes.bar_label(bars, [f"{s:.2f}x" for s in speed], fontsize=7, padding=2)
    axes.axvline(1, color="tab:orange", label="PyTorch eager")
    axes.set_yticks(y, [r["system"] for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("speed, PyTorch eager = 1", fontsize=8)
    axes.margins(x=0.12)
    axes.tick_params(axis="x", labelsize=7)
    figure.legend(fontsize=7, loc="outside upper center", ncols=3)
    return figure


def shares(run: Run) -> Figure:
    """How much of the matrix product's speed a compiled call reaches, in the newest run."""
    rows = [r for r in run.rows.values() if r.get("share_of_matmul_peak")]
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.3 * len(rows)), layout="constrained")
    values = [100 * r["share_of_matmul_peak"] for r in rows]
    bars = axes.barh(range(len(rows)), values, 0.6, color="tab:green")
    axes.bar_label(bars, [f"{v:.0f} %" for v in values], fontsize=7, padding=2)
    axes.set_yticks(range(len(rows)), [r["system"] for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("floating-point operations, % of the measured matrix product", fontsize=8)
    axes.margins(x=0.1)
    return figure


def page(runs: Sequence[Run]) -> str:
    """The report of ``runs``, oldest first, all of one machine. Raises ValueError otherwise."""
    if not runs:
        raise ValueError("no run is kept for this machine: nox -s bench makes one")
    check_comparable(runs)
    newest = runs[-1]
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(newest.machine.get(key)))}</td></tr>"
        for key in (*IDENTITY, "mlx_version", "torch_version")
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(newest.time))
    parts = [
        "<h2>The newest run</h2>",
        _inline(latest(newest)),
        _inline(shares(newest)),
        "<h2>Over time</h2>",
        "<p>Above 1x, compiled MLX is faster. Bars are 99 % intervals within a run. A dashed line "
        "stands where the level changed, in the line's colour.</p>",
        *(_inline(over_time(runs, system)) for system in systems_of(runs)),
        f"<h2>The machine</h2><table>{rows}</table>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Benchmarks</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
        "padding:0 1rem}img{max-width:100%;display:block;margin:1rem 0}th{text-align:left;"
        "padding-right:1rem;font-weight:500}</style>"
        f"<h1>Compiled MLX, uncompiled MLX, PyTorch</h1><p>{len(runs)} runs of one machine, the "
        f"newest of {made}, commit {html.escape(newest.commit) or 'unknown'}.</p>"
        + "".join(parts)
        + "</html>\n"
    )


def _inline(figure: Figure) -> str:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg")
    title = figure.axes[0].get_title() or figure.axes[0].get_xlabel()
    plt.close(figure)
    data = base64.b64encode(drawn.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'


def write(runs: Sequence[Run], out: Path = OUT) -> list[Path]:
    """``benchmarks.html`` and the newest run's two pictures as PNG."""
    text = page(runs)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "benchmarks.html"]
    paths[0].write_text(text, encoding="utf-8")
    for name, draw in (("benchmarks.png", latest), ("share-of-peak.png", shares)):
        figure = draw(runs[-1])
        figure.savefig(out / name, dpi=150)
        plt.close(figure)
        paths.append(out / name)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nox -s report --")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the page and pictures")
    parser.add_argument("--history", type=Path, default=HISTORY)
    options = parser.parse_args(argv)
    process.tune()  # as the runs were
    this: Mapping[str, Any] = machine.identity(use_openblas())
    try:
        paths = write(load(this, options.history), options.out)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
