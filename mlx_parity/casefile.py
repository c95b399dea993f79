"""A case file: a Python file of the user's that says what is to be held against what.

Either the names of :func:`mlx_parity.check`'s arguments at the top level,

    reference, port, inputs = Model(), Port(), torch.randn(2, 3, 8, 8)

or functions ``case_NAME()`` that return them as a dict, for several cases in one file; or
:class:`mlx_parity.Case` objects, whose shapes are drawn.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_parity.case import Case
from mlx_parity.errors import ParityError

PREFIX = "case_"
REQUIRED = ("reference", "port", "inputs")


class CaseFileError(ParityError):
    """The case file cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Entry:
    """One case of a file: its arguments are made when they are asked for."""

    name: str
    make: Callable[[], Any]


def options() -> tuple[str, ...]:
    """The arguments of ``check`` that a case may give."""
    from mlx_parity.check import check

    return tuple(n for n in inspect.signature(check).parameters if n != "progress")


def load(target: str) -> list[Entry]:
    """The cases of ``FILE`` or the one of ``FILE::CASE``, in the file's order.

    Raises :class:`CaseFileError` where the file does not import or holds no such case.
    """
    path_text, _, wanted = target.partition("::")
    module = _imported(Path(path_text))
    found: dict[str, Entry] = {}
    for name, value in vars(module).items():
        if name.startswith(PREFIX) and callable(value):
            short = name.removeprefix(PREFIX)
            found[short] = Entry(short, _called(value, path_text, name))
        elif isinstance(value, Case):
            found[value.name] = Entry(value.name, lambda value=value: value)  # type: ignore[misc]
        elif name == "CASES" and isinstance(value, list | tuple):
            for case in value:
                if isinstance(case, Case):
                    found.setdefault(
                        case.name,
                        Entry(case.name, lambda case=case: case),  # type: ignore[misc]
                    )
    top = {n: vars(module)[n] for n in options() if n in vars(module)}
    if all(n in top for n in REQUIRED):
        found.setdefault(Path(path_text).stem, Entry(Path(path_text).stem, lambda: top))
    if not found:
        raise CaseFileError(
            f"{path_text} holds no case: it needs the names {', '.join(REQUIRED)}, or functions "
            f"{PREFIX}NAME() that return them as a dict, or mlx_parity.Case objects"
        )
    if wanted:
        if wanted not in found:
            raise CaseFileError(f"{path_text} has no case {wanted!r}; it has {', '.join(found)}")
        return [found[wanted]]
    return list(found.values())


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        raise CaseFileError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"mlx_parity_case_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise CaseFileError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # its neighbours, as for ``python FILE``
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise CaseFileError(f"{path} does not import: {_last(error, path)}") from error
    return module


def _called(function: Callable[[], Any], path: str, name: str) -> Callable[[], Any]:
    def make() -> Any:
        try:
            made = function()
        except Exception as error:
            raise CaseFileError(f"{name}() in {path} raises {_last(error, Path(path))}") from error
        if isinstance(made, Case):
            return made
        if not isinstance(made, dict) or not all(n in made for n in REQUIRED):
            raise CaseFileError(
                f"{name}() in {path} gives {type(made).__name__}; it has to give a dict with "
                f"{', '.join(REQUIRED)}, or a mlx_parity.Case"
            )
        unknown = sorted(set(made) - set(options()))
        if unknown:
            raise CaseFileError(
                f"{name}() in {path} gives {', '.join(unknown)}, which check() does not take; it "
                f"takes {', '.join(options())}"
            )
        return made

    return make


def _last(error: BaseException, path: Path) -> str:
    """The error, and the line of the user's file that led to it."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"SyntaxError: {error.msg} (line {error.lineno})"
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path or Path(frame.filename) == path.resolve()
    ]
    return f"{text} (line {lines[-1]})" if lines else text
