"""What is timed: the systems that the tests prove, at their documents' sizes."""

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlx_impl.data import load_images
from mlx_parity import Case
from mlx_parity.blas import use_openblas
from mlx_parity.case import System
from tests.cases import CASES

Side = Literal["mlx", "torch"]
Arrays = dict[str, np.ndarray]

REAL = frozenset({"real", "images"})
"""The inputs that are photographs or digits where a case draws noise in their shape."""

CPU_FLOPS = 20e9
"""A CPU gets batches that take no more than this in a step, a fraction of a second."""

LARGEST_BATCH = 64


@dataclass(frozen=True, eq=False)
class Subject:
    """A training step or a sampler: what one row of the table is about."""

    case: Case
    kind: Literal["step", "sampling"]

    @property
    def name(self) -> str:
        return self.case.name if self.kind == "step" else f"{self.case.name}, sampling"

    def build(self, side: Side, batch_size: int) -> System:
        library = self.case.port if side == "mlx" else self.case.reference
        return self.case.build(library, {**self.case.full_size, "batch": batch_size})

    def draw(self, batch_size: int, seed: int, data: str = "digits") -> Arrays:
        """The inputs in MLX's layout, float32: images (N, H, W, C), and what a step draws."""
        case = self.case
        shape = {**case.full_size, "batch": batch_size}
        drawn = case.inputs(shape, np.random.default_rng(seed))
        arrays = {}
        for name, array in drawn.items():
            if np.issubdtype(array.dtype, np.floating):
                array = array.astype(np.float32)
            if name in case.images:
                array = array.transpose(0, 2, 3, 1)
            arrays[name] = real(array.shape, seed, data) if name in REAL else array
        return arrays


SUBJECTS: tuple[Subject, ...] = (
    *(Subject(case, "step") for case in CASES if case.compile_step is not None),
    *(Subject(case, "sampling") for case in CASES if case.samples),
)


def real(shape: tuple[int, ...], seed: int, data: str) -> np.ndarray:
    """Real images of ``shape`` (N, H, W, C) in [-1, 1], drawn again where there are too few."""
    n, height, width, channels = shape
    images = _load(data if channels == 1 else "photos", (height, width))
    if images.shape[1:] != shape[1:]:
        raise ValueError(f"the images of {data!r} are {images.shape[1:]}, a step wants {shape[1:]}")
    rng = np.random.default_rng(seed)
    return images[rng.choice(len(images), n, replace=len(images) < n)]


@functools.cache
def _load(data: str, image_size: tuple[int, int]) -> np.ndarray:
    return load_images(data, image_size)


def to_mlx(case: Case, arrays: Arrays) -> list[mx.array]:
    return [mx.array(a) for a in arrays.values()]


def to_torch(case: Case, arrays: Arrays, device: str) -> list[torch.Tensor]:
    return [
        torch.from_numpy(
            np.ascontiguousarray(a.transpose(0, 3, 1, 2)) if name in case.images else a
        ).to(device)
        for name, a in arrays.items()
    ]


@functools.cache
def flops(subject: Subject, batch_size: int) -> int:
    """Floating-point operations of the products and convolutions, counted on PyTorch's side."""
    system = subject.build("torch", batch_size)
    inputs = to_torch(subject.case, subject.draw(batch_size, 0), "cpu")
    with FlopCounterMode(display=False) as counter:
        run_torch(subject, system)(*inputs)
    return int(counter.get_total_flops())


def run_torch(subject: Subject, system: System) -> Callable[..., Any]:
    """PyTorch's step, or its sampler without gradients, as a function of the inputs alone."""
    if subject.kind == "step":
        assert system.step is not None
        return functools.partial(system.step, *system.modules.values(), *system.optimizers.values())
    names = list(subject.draw(1, 0))

    @torch.inference_mode()
    def sample(*inputs: torch.Tensor) -> Any:
        assert system.forward is not None
        return system.forward(**dict(zip(names, inputs, strict=True)))

    return sample


def batch_size(subject: Subject, asked: int | None, on_cpu: bool) -> int:
    """``asked``, or 64, halved on a CPU until a step is no more work than :data:`CPU_FLOPS`."""
    if asked is not None or not on_cpu:
        return asked or LARGEST_BATCH
    fits = CPU_FLOPS / max(1, flops(subject, 1))
    return max(1, min(LARGEST_BATCH, 2 ** int(math.log2(max(1, fits)))))


def parity_gates(names: Iterable[str], examples: int) -> dict[str, str]:
    """By case why it must not be timed, or "" where its port is proven. Before anything is timed,
    and as many at a time as leave each two processors."""
    unique = list(dict.fromkeys(names))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        return dict(zip(unique, pool.map(lambda n: parity_gate(n, examples), unique), strict=True))


def parity_gate(name: str, examples: int) -> str:
    """Why the case of this name must not be timed, or "" where its port is proven.

    Climbs the ladder at ``examples`` drawn shapes in a process of its own: there TF32 is off and
    the BLAS has one thread, which MLX and OpenBLAS read only once.
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
    (case,) = (case for case in CASES if case.name == name)
    prove(case, max(1, examples // case.cost)).assert_ok()


if __name__ == "__main__":
    _climb(sys.argv[1], int(sys.argv[2]))
