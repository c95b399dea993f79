"""What is timed: the training systems that the tests prove, at their documents' sizes."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import torch

from mlx_parity import Case
from mlx_parity.blas import use_openblas
from tests import cases

Side = Literal["mlx", "torch"]

SYSTEMS: tuple[Case, ...] = cases.SYSTEMS


def build(case: Case, side: Side, batch_size: int) -> tuple[list[Any], list[Any], Callable]:
    """One side's modules, its optimizers, and ``step(*modules, *optimizers, *inputs)``."""
    library = case.port if side == "mlx" else case.reference
    system = case.build(library, {**case.full_size, "batch": batch_size})
    assert system.step is not None
    return list(system.modules.values()), list(system.optimizers.values()), system.step


def inputs(case: Case, images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The step's inputs in MLX's layout, float32: images (N, H, W, C), and what it draws."""
    shape = {**case.full_size, "batch": len(images)}
    drawn = case.inputs(shape, np.random.default_rng(seed))
    return {
        name: images if name in case.images else array.astype(np.float32)
        for name, array in drawn.items()
    }


def to_mlx(case: Case, arrays: dict[str, np.ndarray]) -> list[mx.array]:
    return [mx.array(a) for a in arrays.values()]


def to_torch(case: Case, arrays: dict[str, np.ndarray], device: str) -> list[torch.Tensor]:
    return [
        torch.from_numpy(
            np.ascontiguousarray(a.transpose(0, 3, 1, 2)) if name in case.images else a
        ).to(device)
        for name, a in arrays.items()
    ]


@functools.cache
def parity_gate(name: str, examples: int) -> str:
    """Why the system of this name must not be timed, or "" where its port is proven.

    Climbs the ladder at ``examples`` drawn shapes, once for a run, in a process of its own: there
    TF32 is off and the BLAS has one thread, which MLX and OpenBLAS read only once.
    """
    environment = {
        "MLX_ENABLE_TF32": "0",
        "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
        "OPENBLAS_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", __name__, name, str(examples)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    return "" if result.returncode == 0 else (result.stdout + result.stderr).strip()


def _climb(name: str, examples: int) -> None:
    """The gate's process. Raises :class:`mlx_parity.NotProven`."""
    from mlx_parity import prove

    use_openblas()
    (case,) = (case for case in SYSTEMS if case.name == name)
    prove(case, examples).assert_ok()


if __name__ == "__main__":
    _climb(sys.argv[1], int(sys.argv[2]))
