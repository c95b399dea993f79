"""What is timed: the systems that the tests prove, at their documents' sizes."""

import functools
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlx_impl.data import load_images
from mlx_parity import Case
from mlx_parity.blas import use_openblas
from mlx_parity.case import System
from tests.cases import CASES, SYSTEMS

Side = Literal["mlx", "torch"]
Arrays = dict[str, np.ndarray]

REAL = frozenset({"real", "images"})
"""The inputs that are photographs or digits where a case draws noise in their shape."""

CPU_FLOPS = 20e9
"""A CPU gets batches that take no more than this in a step, a fraction of a second."""

LARGEST_BATCH = 64

MOST_CLIMBERS = 8
"""Parity gates at a time: each holds PyTorch and MLX, and on a GPU a share of its memory."""

_COST = {case.name: case.cost for case in CASES}


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

    def in_bfloat16(self) -> "Subject | None":
        """The same, of the case that is proven in bfloat16; None where there is none."""
        name = f"{self.case.name} in bfloat16"
        return next((Subject(case, self.kind) for case in CASES if case.name == name), None)

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
    *(Subject(case, "step") for case in SYSTEMS),
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
def count_flops(subject: Subject, batch_size: int) -> int:
    """Floating-point operations of the products and convolutions, counted on PyTorch's side."""
    system = subject.build("torch", batch_size)
    inputs = to_torch(subject.case, subject.draw(batch_size, 0), "cpu")
    with FlopCounterMode(display=False) as counter:
        run_torch(subject, system)(*inputs)
    return int(counter.get_total_flops())


def flops(subject: Subject, batch_size: int) -> int:
    """:func:`count_flops` from one image: each product has the batch as a factor."""
    return batch_size * count_flops(subject, 1)


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


def batch_size(
    subject: Subject, asked: int | None, on_cpu: bool, cpu_flops: float = CPU_FLOPS
) -> int:
    """``asked``, or 64, halved on a CPU until a step is no more than ``cpu_flops`` operations."""
    if asked is not None or not on_cpu:
        return asked or LARGEST_BATCH
    fits = cpu_flops / max(1, flops(subject, 1))
    return max(1, min(LARGEST_BATCH, 2 ** int(math.log2(max(1, fits)))))


def parity_gates(names: Iterable[str], examples: int) -> dict[str, str]:
    """By case why it must not be timed, or "" where its port is proven. Before anything is timed.

    Climbs the ladder at ``examples`` drawn shapes (fewer of a dear case) in processes beside each
    other. In them TF32 is off and the BLAS has one thread, which MLX and OpenBLAS read only once.
    """
    unique = sorted(dict.fromkeys(names), key=lambda n: _COST.get(n, 0), reverse=True)
    environment = {
        "MLX_ENABLE_TF32": "0",
        "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ |= environment
    try:
        with ProcessPoolExecutor(
            max(1, min(len(unique), processors(), MOST_CLIMBERS)), get_context("spawn")
        ) as pool:
            found = {name: pool.submit(parity_gate, name, examples) for name in unique}
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return {name: _outcome(future) for name, future in found.items()}


def processors() -> int:
    """Those that this process may run on; not every system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _outcome(gate: Future[str]) -> str:
    """A climb that raised, or whose process died, has proven nothing."""
    try:
        return gate.result()
    except Exception as error:
        return f"its climb ended with {type(error).__name__}: {error}"


def parity_gate(name: str, examples: int) -> str:
    """Why the case of this name must not be timed, or "" where its port is proven."""
    from mlx_parity import NotProven, prove

    use_openblas()
    (case,) = (case for case in CASES if case.name == name)
    try:
        prove(case, max(1, examples // case.cost)).assert_ok()
    except NotProven as error:
        return str(error)
    return ""
