"""``mlx-parity``: check a port, lint it, explain a trap, convert weights.

Exit codes: 0 equal (or done), 1 different (or something found), 2 could not be judged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read at MLX's first use: numbers are compared

from rich.console import Console
from rich.markdown import Markdown

if TYPE_CHECKING:
    from mlx_parity.casefile import Entry
    from mlx_parity.report import Report

EQUAL, DIFFERENT, UNDECIDED = 0, 1, 2

PATIENCE = 2.0
"""Seconds after which what is being done is said."""


class Progress:
    """Says on the terminal what takes longer than :data:`PATIENCE`."""

    def __init__(self, console: Console):
        self.console = console
        self.stage = ""
        self.since = time.monotonic()
        self.said = ""

    def __call__(self, stage: str) -> None:
        self.stage, self.since = stage, time.monotonic()

    @contextmanager
    def shown(self, name: str) -> Iterator[Progress]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                if time.monotonic() - self.since > PATIENCE and self.said != self.stage:
                    self.said = self.stage
                    self.console.print(f"{name}: {self.stage} …", style="dim", markup=False)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return UNDECIDED
    except BrokenPipeError:
        return UNDECIDED
    except Exception as error:
        from mlx_parity.errors import ParityError

        if not isinstance(error, ParityError | OSError | ImportError):
            error = _own(error)
        if getattr(arguments, "json", False):
            print(json.dumps({"verdict": "undecided", "problem": str(error)}, indent=1))
        else:
            print(f"mlx-parity: {error}", file=sys.stderr)
        return UNDECIDED


def _own(error: Exception) -> Exception:
    return RuntimeError(
        f"{type(error).__name__}: {error}. This is a defect of mlx-parity, not of your port"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-parity",
        description="Does an MLX port compute what its PyTorch original computes?",
        epilog="Exit codes: 0 equal, 1 different, 2 could not be judged.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str, more: str = ""
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}. {more}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print JSON and nothing else")
        return made

    cases = (
        "\n\nFILE is Python. It has the names reference, port and inputs (and any other argument\n"
        "of mlx_parity.check), or functions case_NAME() that return them as a dict, or\n"
        "mlx_parity.Case objects."
    )
    check = command("check", _check, "hold ports against their originals", cases)
    check.add_argument("target", metavar="FILE[::CASE]")
    check.add_argument("--until", metavar="RUNG", help="the last rung, such as forward")
    check.add_argument("--seed", type=int, default=None, help="of the points (default 0)")
    check.add_argument("--html", metavar="PATH", type=Path, help="also write a page, or a folder")
    check.add_argument("--no-compile", action="store_true", help="leave mx.compile out")
    check.add_argument(
        "--variants", action="store_true", help="compile in every way, and say what is frozen"
    )
    check.add_argument("--examples", type=int, default=None, help="shapes drawn of a Case")

    lint = command("lint", _lint, "look for known traps without computing anything", cases)
    lint.add_argument("target", metavar="FILE[::CASE]")

    explain = command("explain", _explain, "tell about a trap: why, and the line to change")
    explain.add_argument("id", metavar="ID")

    command("traps", _traps, "list the known traps")

    convert = command(
        "convert",
        _convert,
        "convert a weight file for a declared pair of modules",
        "\n\nFrom .pth, .pt, .bin or .safetensors to MLX's .safetensors; or, where OUT is .pth,\n"
        ".pt or .bin, from MLX's back to PyTorch's. Nothing is ever unpickled." + cases,
    )
    convert.add_argument("weights", metavar="WEIGHTS", type=Path)
    convert.add_argument("out", metavar="OUT", type=Path)
    convert.add_argument("--case", required=True, metavar="FILE[::CASE]", help="the two modules")
    return parser


# ----------------------------------------------------------------------------------- check


def _check(arguments: argparse.Namespace) -> int:
    from mlx_parity.casefile import load

    console = Console(stderr=True, highlight=False)
    progress = Progress(console)
    with progress.shown("mlx-parity"):
        progress("importing")
        entries = load(arguments.target)
    reports = []
    for entry in entries:
        progress = Progress(console)
        with progress.shown(entry.name):
            report = _one(entry, arguments, progress)
        reports.append(report)
        if not arguments.json:
            Console(highlight=False).print(report)
    if arguments.json:
        print(json.dumps([r.to_dict() for r in reports], indent=1, allow_nan=False))
    if arguments.html:
        _pages(reports, arguments.html)
    codes = {r.exit_code for r in reports}
    return DIFFERENT if DIFFERENT in codes else max(codes)


def _one(entry: Entry, arguments: argparse.Namespace, progress: Progress) -> Report:
    from mlx_parity.case import Case
    from mlx_parity.casefile import CaseFileError
    from mlx_parity.check import check
    from mlx_parity.drawn import check_case
    from mlx_parity.ladder import RUNGS
    from mlx_parity.report import Report

    try:
        made = entry.make()
    except CaseFileError as error:
        report = Report(entry.name)
        report.undecided("case", str(error))
        return report
    if isinstance(made, Case):
        report = check_case(
            made,
            arguments.examples,
            seed=arguments.seed,
            compiled=False if arguments.no_compile else None,
            until=arguments.until or RUNGS[-1],
            progress=progress,
        )
        if arguments.variants:
            report.notes.append(
                "not compiled in other ways: --variants is for a model at one input, and a Case "
                "draws its shapes"
            )
        return report
    options = {"name": entry.name, **made}
    if arguments.until:
        options["until"] = arguments.until
    if arguments.seed is not None:
        options["seed"] = arguments.seed
    if arguments.no_compile:
        options["compiled"] = False
    if arguments.variants:
        options["variants"] = True
    return check(**options, progress=progress)


def _pages(reports: Sequence[Report], path: Path) -> None:
    if len(reports) == 1 and path.suffix == ".html":
        path.parent.mkdir(parents=True, exist_ok=True)
        reports[0].to_html(path)
        return
    path.mkdir(parents=True, exist_ok=True)
    for report in reports:
        name = "".join(c if c.isalnum() else "-" for c in report.name)
        report.to_html(path / f"{name}.html")


# ------------------------------------------------------------------------- lint, explain, traps


def _lint(arguments: argparse.Namespace) -> int:
    import torch

    from mlx_parity.casefile import CaseFileError, load
    from mlx_parity.diagnose import lint

    found = []
    for entry in load(arguments.target):
        made = entry.make()
        if not isinstance(made, dict):
            raise CaseFileError(f"{entry.name} is a Case; lint needs reference and port modules")
        optimizers = []
        if made.get("optimizer") is not None:
            theirs, ours = made["optimizer"]
            if not isinstance(theirs, torch.optim.Optimizer):
                theirs = theirs(list(made["reference"].parameters()))
            optimizers.append((theirs, ours))
        if not hasattr(made["reference"], "named_modules"):
            raise CaseFileError(f"{entry.name}: lint needs modules, not functions")
        for d in lint(made["reference"], made["port"], optimizers, made.get("map")):
            found.append({"case": entry.name, **vars(d)})
    if arguments.json:
        print(json.dumps(found, indent=1))
    for row in [] if arguments.json else found:
        print(f"{row['case']}: {row['where']}: {row['title']} [{row['trap_id']}]")
        print(f"    {row['evidence']}\n    fix: {row['fix']}")
    if not found and not arguments.json:
        print("no known trap shows in the module trees")
    return DIFFERENT if found else EQUAL


def _explain(arguments: argparse.Namespace) -> int:
    from mlx_parity.errors import ParityError
    from mlx_parity.traps import find
    from mlx_parity.traps.pages import page

    try:
        trap = find(arguments.id)
    except KeyError as error:
        raise ParityError(f"{error.args[0]}; `mlx-parity traps` lists them") from error
    if arguments.json:
        print(json.dumps({"id": trap.id, "title": trap.title, "why": trap.why(), "fix": trap.fix}))
    else:
        Console(highlight=False).print(Markdown(page(trap)))
    return EQUAL


def _traps(arguments: argparse.Namespace) -> int:
    from mlx_parity.traps import CATALOGUE, FAMILIES

    if arguments.json:
        rows = [
            {"id": t.id, "family": t.family, "title": t.title, "fix": t.fix, "shows": t.shows}
            for t in CATALOGUE.values()
        ]
        print(json.dumps(rows, indent=1))
        return EQUAL
    width = max(map(len, CATALOGUE))
    for family, title in FAMILIES.items():
        print(f"\n{title}")
        for trap in CATALOGUE.values():
            if trap.family == family:
                print(f"  {trap.id:{width}}  {trap.title}")
    return EQUAL


# --------------------------------------------------------------------------------- convert


def _convert(arguments: argparse.Namespace) -> int:
    from mlx_parity.casefile import CaseFileError, load
    from mlx_parity.convert import TORCH_FILES, to_mlx, to_torch

    entries = load(arguments.case)
    if len(entries) != 1:
        names = ", ".join(e.name for e in entries)
        raise CaseFileError(f"{arguments.case} has several cases: say which, FILE::CASE ({names})")
    made = entries[0].make()
    if not isinstance(made, dict):
        raise CaseFileError("convert needs a case with reference and port modules")
    carry = made.get("carry")
    options = dict(carry) if isinstance(carry, dict) else {}
    options |= {k: made[k] for k in ("map", "sanitize") if made.get(k) is not None}
    back = arguments.out.suffix in TORCH_FILES
    run = to_torch if back else to_mlx
    with Progress(Console(stderr=True)).shown("mlx-parity") as progress:
        progress(f"converting {arguments.weights.name}")
        count = run(arguments.weights, arguments.out, made["reference"], made["port"], **options)
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), "tensors": count}))
    else:
        print(f"{arguments.out}: {count} tensors, {'PyTorch' if back else 'MLX'}'s layout")
    return EQUAL
