"""The parity card: one row per model and loss, one column per rung, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_parity.ladder import RUNGS
from mlx_parity.proof import Proof, Row


def device() -> str:
    """MLX's default device: Metal, CUDA or CPU."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def rows(proofs: Iterable[Proof], **also: Any) -> list[dict[str, Any]]:
    """The card as plain data, ``also`` in each row. Structure and reloaded are exact: bias 0."""
    where = device()
    return [
        {
            "model": row.model,
            "side": row.side,
            "rung": row.rung,
            "ok": row.ok,
            "bias": row.bias,
            "noise": row.noise,
            "bound": row.bound,
            "examples": row.examples,
            "device": where,
            "visible": row.visible,
            "shape": dict(row.shape),
            "drawn": proof.ranges(),
            "seed": row.seed,
            "decidable_steps": row.decidable_steps,
            "message": row.message,
            **also,
        }
        for proof in proofs
        for row in proof.rows.values()
    ]


def write(proofs: Iterable[Proof], path: Path, **also: Any) -> None:
    """Write the rows as JSON; an interrupted run leaves the file of the run before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows(proofs, **also), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def table(proofs: Iterable[Proof]) -> Table:
    """A row per case; in each rung's column the worst bias as a share of its bound."""
    made = Table(
        title=f"Parity card: MLX on {device()} against PyTorch float64 on CPU",
        caption=(
            "Each cell: the worst bias over all shapes, as a share of the bound (1 is the limit; "
            "= is equal bit for bit). Noise: the port's rounding over PyTorch's, median. Empty: "
            "there is nothing of the kind. A loss has no output beside itself and no weights, a "
            "network alone trains in its system's row, and samplers do not train."
        ),
    )
    made.add_column("model or loss", no_wrap=True)
    made.add_column("shapes", justify="right")
    for rung in RUNGS:
        made.add_column(rung, justify="right")
    made.add_column("noise", justify="right")
    made.add_column("worst at", overflow="fold")
    for proof in proofs:
        made.add_row(*_cells(proof))
    return made


def _cells(proof: Proof) -> list[str | Text]:
    cells: list[str | Text] = [proof.case.name]
    cells.append(_shapes(proof))
    for rung in RUNGS:
        row = proof.rows.get(rung)
        cells.append("" if row is None else _cell(row))
    worst = _worst(proof)
    cells.append(f"{worst.noise:.1f}" if worst else "")
    cells.append(describe(worst) if worst else "")
    return cells


def _shapes(proof: Proof) -> str:
    return str(min((row.examples for row in proof.rows.values()), default=0))


def _cell(row: Row) -> Text:
    if not row.ok:
        return Text("FAILS", style="bold red")
    if row.bound == 0:
        return Text("=", style="green")
    return Text(f"{row.share:.2f}", style="green")


def _worst(proof: Proof) -> Row | None:
    failed = [row for row in proof.rows.values() if not row.ok]
    judged = [row for row in proof.rows.values() if row.bound]
    if failed:
        return failed[0]
    return max(judged, key=lambda row: row.share, default=None)


def describe(row: Row) -> str:
    """The shape that showed a row's worst, in short: ``loss: batch 3, widths 1 4 5``."""
    parts = [
        f"{name} {' '.join(map(str, v)) if isinstance(v, tuple | list) else v}"
        for name, v in row.shape.items()
    ]
    return f"{row.rung}: {', '.join(parts)}"


def drawn(proofs: Iterable[Proof]) -> Table:
    """A row per case: over which ranges its shapes were drawn."""
    made = Table(title="What was drawn: least and greatest of each number")
    made.add_column("model or loss", no_wrap=True)
    made.add_column("shapes", justify="right")
    made.add_column("ranges", overflow="fold")
    for proof in proofs:
        text = ", ".join(f"{name} {values}" for name, values in proof.ranges().items())
        made.add_row(proof.case.name, _shapes(proof), text)
    return made


def show(proofs: Iterable[Proof], console: Console) -> None:
    """Print the card, what was drawn, and every failure with the lines that repeat it."""
    proofs = list(proofs)
    console.print(table(proofs))
    console.print(drawn(proofs))
    for proof in proofs:
        for failure in proof.failures():
            console.print(failure, style="red", markup=False)
