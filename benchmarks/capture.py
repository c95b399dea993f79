"""What a GPU does in one step, for Xcode: ``nox -s bench -- --metal-capture FOLDER``."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx


def check(folder: str | os.PathLike[str]) -> None:
    """Raise RuntimeError where a trace cannot be made, with what to do about it."""
    if not mx.metal.is_available():
        raise RuntimeError("MLX has no Metal here; a GPU trace needs a Mac with Apple silicon")
    if os.environ.get("MTL_CAPTURE_ENABLED") != "1":
        raise RuntimeError("Metal captures nothing unless MTL_CAPTURE_ENABLED=1 is set beforehand")
    Path(folder).mkdir(parents=True, exist_ok=True)


def trace(name: str, folder: str | os.PathLike[str], step: Callable[[int], Any]) -> Path:
    """Record one call of ``step`` into ``FOLDER/NAME.gputrace``. Never over an older trace.

    Raises FileExistsError.
    """
    path = Path(folder) / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.gputrace"
    if path.exists():
        raise FileExistsError(f"{path} exists: move it, or name another folder")
    mx.synchronize()
    mx.metal.start_capture(str(path))
    try:
        step(0)
        mx.synchronize()
    finally:
        mx.metal.stop_capture()
    return path
