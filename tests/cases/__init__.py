"""Every model, loss and training system, on both sides: what tests, the parity card and the
benchmarks iterate over.

A file of this folder is one system: its tuple ``CASES``, found by itself, and ``SYSTEMS``, those of
them that train. A new model is such a file beside its two implementations, and nothing else.
"""

import pkgutil
import zlib
from importlib import import_module

from mlx_parity import Case

_FILES = [import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]

CASES: tuple[Case, ...] = tuple(
    sorted(
        (case for file in _FILES for case in getattr(file, "CASES", ())),
        key=lambda case: case.name if case.name[0].isdigit() else "~",  # documents, then the rest
    )
)

SYSTEMS: tuple[Case, ...] = tuple(
    case for case in CASES if case.compile_step is not None and case.dtype == "float32"
)
"""The training systems: what the benchmarks time, in bfloat16 too if asked."""


def seed(case: Case, share: int) -> int:
    """Of one share of a case's shapes: the same in every run, another for each case."""
    return zlib.crc32(f"{case.name} {share}".encode())
