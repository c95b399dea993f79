"""What a check found: the verdict, the rungs, the guilty modules, as text, JSON and a page."""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mlx_parity import card
from mlx_parity.equality import Finding
from mlx_parity.errors import NotProven
from mlx_parity.ladder import Rung
from mlx_parity.localise import Guilty, Reading
from mlx_parity.pairing import Unpaired

Verdict = Literal["equal", "different", "undecided"]

EXIT_CODES: dict[Verdict, int] = {"equal": 0, "different": 1, "undecided": 2}

FAULTS = {
    "reference": "The reference is at fault, or what it was called with, and not the port.",
    "port": "The port is at fault, or is called otherwise than the reference: call_port= says how.",
    "weights": "Nothing was compared, because the weights could not be carried.",
    "inputs": "The inputs, or how the check was asked for, are at fault, not the port.",
    "case": "The case file is at fault.",
    "kit": "This is a defect of mlx-parity itself, and says nothing about the port.",
}
"""Whose fault it is that nothing could be judged."""


@dataclass
class Report:
    """The outcome of one check.

    ``verdict`` is "equal", "different" or "undecided"; the last means that nothing could be judged,
    ``problem`` says why and ``fault`` whose it is.
    """

    name: str
    verdict: Verdict = "undecided"
    rungs: list[Rung] = field(default_factory=list)
    problem: str = ""
    fault: str = ""
    carried: str = ""
    """How the weights went over, in words."""
    layouts: dict[str, str] = field(default_factory=dict)
    """Inputs and outputs that are images."""
    notes: list[str] = field(default_factory=list)
    uncompared: list[str] = field(default_factory=list)
    """Outputs of the reference that nothing of the port could be held against."""
    readings: list[Reading] = field(default_factory=list)
    """Every pair of modules, in the order of execution."""
    guilty: list[Guilty] = field(default_factory=list)
    """The modules to blame, first things first."""
    diagnoses: list[Any] = field(default_factory=list)
    """Known traps that explain it: ``trap_id``, ``title``, ``where``, ``evidence``, ``fix``."""
    unpaired: tuple[Unpaired, ...] = ()
    variants: list[Any] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the port was found equal to the reference."""
        return self.verdict == "equal"

    @property
    def exit_code(self) -> int:
        """0 equal, 1 different, 2 could not be judged."""
        return EXIT_CODES[self.verdict]

    @property
    def failed(self) -> Rung | None:
        """The first rung that failed."""
        return next((r for r in self.rungs if not r.ok), None)

    def assert_ok(self) -> None:
        """Raise :class:`NotProven`, an AssertionError, with the whole report as its message."""
        if not self.ok:
            raise NotProven(str(self))

    # --------------------------------------------------------------------- for who fills it in

    def undecided(self, fault: str, problem: str, error: BaseException | None = None) -> None:
        self.verdict, self.fault, self.problem = "undecided", fault, problem
        if error is not None:  # of the kit itself: where, for a report to its authors
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.problem += f" ({Path(last.filename).name}, line {last.lineno})"

    def settle(self) -> None:
        """The verdict from the rungs."""
        if any(not r.ok for r in self.rungs):
            self.verdict = "different"
        elif any(r.findings or r.name == "forward" for r in self.rungs):
            self.verdict = "equal"
        else:
            self.undecided("inputs", "there is nothing to compare")

    # -------------------------------------------------------------------------------- as text

    def summary(self) -> str:
        """One line."""
        if self.verdict == "undecided":
            return f"{self.name}: could not be judged: {self.problem}"
        if self.verdict == "equal":
            climbed = ", ".join(r.name for r in self.rungs)
            without = f" but for {', '.join(self.uncompared)}" if self.uncompared else ""
            return f"{self.name}: equal{without} ({climbed}; {self.seconds:.1f} s)"
        rung = self.failed
        assert rung is not None
        where = f", in {self.guilty[0].where}" if self.guilty else ""
        return f"{self.name}: different in {rung.name}{where}"

    def __str__(self) -> str:
        console = Console(width=100, color_system=None, force_terminal=False, soft_wrap=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colours = {"equal": "bold green", "different": "bold red", "undecided": "bold yellow"}
        yield Text.assemble((self.summary(), colours[self.verdict]))
        if self.verdict == "undecided":
            yield Text(FAULTS.get(self.fault, ""))
        if self.rungs:
            yield self._table()
        rung = self.failed
        if rung is not None:
            yield Text(_failure(rung), style="red")
        for other in self.rungs:
            if other is not rung and not other.ok and other.message:
                yield Text(f"{other.name}: {other.message}", style="red")
        numbers = any(not f.ok for r in self.rungs for f in r.findings)
        if numbers and self.readings and not self.guilty:
            yield Text(
                "No module differs by itself: look at what is written around the models, in "
                "call_port, in the loss, or in how the outputs are returned.",
                style="red",
            )
        for guilty, *others in alike(self.guilty):
            names = several([other.pair.reference_path for other in others])
            yield Text.assemble(
                (f"\nGuilty, {guilty.direction}: ", "bold"),
                guilty.where,
                f"\n  {describe(guilty.finding)}; its inputs agree.",
                f"\n  Likewise {names}." if others else "",
            )
        for d, places in causes(self.diagnoses):
            yield Text.assemble(
                (f"\n{d.trap_id}  {d.title}", "bold"),
                f"\n  where  {several(places)}\n  seen   {d.evidence}\n  fix    {d.fix}",
            )
        if self.variants:
            yield Text("")
            for variant in self.variants:
                yield Text(str(variant), style="" if variant.ok else "red")
        for line in self._asides():
            yield Text(f"· {line}", style="dim")

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("rung", "", "bias / bound", "noise", "seen from"):
            table.add_column(name, justify="left" if name in ("rung", "") else "right")
        for rung in self.rungs:
            worst = rung.worst
            table.add_row(
                rung.name,
                Text("equal", "green") if rung.ok else Text("DIFFERENT", "bold red"),
                "" if worst is None else _share(worst),
                "" if worst is None else f"{worst.noise:.2g}",
                "" if not rung.findings or not rung.ok else _visible(rung.findings),
            )
        return table

    def _asides(self) -> list[str]:
        lines = []
        if self.carried:
            unexplained = self.verdict == "different" and not self.diagnoses
            guessed = unexplained and "shapes" in self.carried
            hint = "; map= says which is which where that went wrong" if guessed else ""
            lines.append(f"weights: {self.carried}{hint}")
        lines += [f"{name}: {how}" for name, how in self.layouts.items()]
        zero = [f.tensor.rpartition("/")[2] for r in self.rungs for f in r.findings if null(f)]
        if zero:
            names = ", ".join(n.removeprefix("model.") for n in dict.fromkeys(zero))
            lines.append(f"gradients below float32's own rounding, on both sides: {names}")
        forward = [f for r in self.rungs for f in r.findings if r.name == "forward"]
        rough = [f for f in forward if f.noise > ROUGH and f.bias < 3 * f.bound]
        if rough:
            worst = max(rough, key=lambda f: f.noise)
            lines.append(
                f"{worst.tensor} is {worst.noise:.2g} times as rough as PyTorch's: a part of it is "
                "computed in half precision, or loses digits otherwise"
            )
        return lines + self.notes

    # --------------------------------------------------------------------------- as plain data

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data; NaN and infinity become None."""
        return _plain(
            {
                "name": self.name,
                "verdict": self.verdict,
                "ok": self.ok,
                "fault": self.fault,
                "problem": self.problem,
                "seconds": round(self.seconds, 3),
                "device": card.device(),
                "versions": versions(),
                "rungs": [
                    {
                        "rung": r.name,
                        "ok": r.ok,
                        "message": r.message,
                        "decidable_steps": r.decidable_steps,
                        "findings": [_finding(f) for f in r.findings],
                    }
                    for r in self.rungs
                ],
                "guilty": [
                    {
                        "reference": g.pair.reference_path,
                        "port": g.pair.port_path,
                        "type": type(g.pair.reference).__name__,
                        "direction": g.direction,
                        "between": g.between,
                        "finding": _finding(g.finding),
                    }
                    for g in self.guilty
                ],
                "diagnoses": [
                    {k: getattr(d, k) for k in ("trap_id", "title", "where", "evidence", "fix")}
                    for d in self.diagnoses
                ],
                "modules": [
                    {
                        "reference": r.pair.reference_path,
                        "port": r.pair.port_path,
                        "paired_by": r.pair.how,
                        "type": type(r.pair.reference).__name__,
                        "note": r.note,
                        **{
                            kind: _finding(f) if (f := getattr(r, kind)) is not None else None
                            for kind in (
                                "inputs",
                                "forward",
                                "backward",
                                "isolated",
                                "isolated_backward",
                            )
                        },
                    }
                    for r in self.readings
                ],
                "unpaired": [vars(u) for u in self.unpaired],
                "uncompared": self.uncompared,
                "carried": self.carried,
                "layouts": self.layouts,
                "variants": [vars(v) for v in self.variants],
                "notes": self.notes,
            }
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON; also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one page that needs no network; also written to ``path``."""
        from mlx_parity.html import page

        text = page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def versions() -> dict[str, str]:
    """What the figures were made with."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "mlx": metadata.version("mlx"),
    }


ROUGH = 300.0
"""Noise of a forward pass that needs a word: half precision in part is thousands."""

NAMED = 4
"""Of modules that differ alike so many are named; JSON names all."""


def several(names: Sequence[str]) -> str:
    """The first few of many names."""
    text = ", ".join(names[:NAMED])
    return text if len(names) <= NAMED else f"{text} and {len(names) - NAMED} more"


def alike(found: Iterable[Guilty]) -> list[list[Guilty]]:
    """Guilty modules of one type and direction together, the first of each kind first.

    A model's norms are usually made in one place: what is wrong in one is wrong in all.
    """
    kinds: dict[Any, list[Guilty]] = {}
    for g in found:
        between = g.between and tuple(re.sub(r"\d+", "#", path) for path in g.between)
        kinds.setdefault((g.direction, type(g.pair.reference), between), []).append(g)
    return list(kinds.values())


def causes(diagnoses: Iterable[Any]) -> list[tuple[Any, list[str]]]:
    """Each cause once, with the modules where the same was seen, but for its size."""
    places: dict[Any, tuple[Any, list[str]]] = {}
    for d in diagnoses:
        seen = d.evidence.partition(" (bias ")[0]
        places.setdefault((d.trap_id, seen, d.fix), (d, []))[1].append(d.where)
    return list(places.values())


def describe(finding: Finding) -> str:
    """A finding's figures without the kit's own key."""
    if finding.detail:
        return f"{finding.verdict}: {finding.detail}"
    text = (
        f"bias {finding.bias:.3g} (bound {finding.bound:.3g} at {finding.points} points), "
        f"noise {finding.noise:.2g}, relative error {finding.relative_error:.2g}"
    )
    return text if finding.worst is None else f"{text}, worst at {list(finding.worst)}"


def share(finding: Finding) -> float:
    """The bias as a share of its bound: above 1 is a difference. Infinite where nothing fits."""
    if math.isnan(finding.bias):
        return math.inf
    if finding.verdict == "different":
        return max(finding.bias / finding.bound if finding.bound else math.inf, 1.01)
    return finding.bias / finding.bound if finding.bound else 0.0


def _share(finding: Finding) -> str:
    return "" if math.isnan(finding.bias) else f"{share(finding):.3g}"


def _visible(findings: Iterable[Finding]) -> str:
    """The smallest relative difference that would have shown in every tensor but the null ones."""
    seen = [f.visible for f in findings if not null(f)]
    return f"{max(seen):.1g}" if seen else ""


def null(finding: Finding) -> bool:
    """Whether a tensor is all rounding, its true value being zero: a bias before a norm, say."""
    return finding.ok and finding.visible > 1


def _failure(rung: Rung) -> str:
    parts = [rung.message] if rung.message else []
    bad = [f for f in rung.findings if not f.ok]
    parts += [str(f) for f in bad[:3]]
    if len(bad) > 3:
        parts.append(f"and {len(bad) - 3} more")
    return "\n".join(parts)


def _finding(f: Finding) -> dict[str, Any]:
    return {
        "tensor": f.tensor,
        "verdict": f.verdict,
        "bias": f.bias,
        "bound": f.bound,
        "noise": f.noise,
        "relative_error": f.relative_error,
        "visible": f.visible,
        "points": f.points,
        "size": f.size,
        "worst": f.worst,
        "detail": f.detail,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
