"""What an entry of the catalogue is, and how its small example is held against its original."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from mlx_parity._backend import require_mlx
from mlx_parity.carry import channels_first, channels_last
from mlx_parity.equality import Finding, Tensors, compare, jitter

require_mlx()

import mlx.core as mx  # noqa: E402

Rng = np.random.Generator
T = torch.Tensor
A = mx.array

NOISY = 100.0
"""From which noise on it is a finding of its own: the port's arithmetic is rougher by so much."""

Shows = Literal["equal", "different", "noise", "not finite", "raises"]

CATALOGUE: dict[str, type[Trap]] = {}
"""Every trap by its id, in the order of the pages."""


def arrays(**shapes: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
    """Shapes of an example's arrays, by name."""
    return shapes


class Trap:
    """One way in which a port goes wrong, with an example that does.

    A subclass is an entry. Its docstring is the explanation; figures in it were measured with
    ``measured``'s versions. ``reference`` is PyTorch, in whatever precision its arguments have;
    ``naive`` and ``fixed`` are MLX. All three take the arrays that ``draw`` made, by name, and
    return an array or arrays by name.
    """

    id: ClassVar[str]
    """Stable: reports, pages and suppressions name it."""
    family: ClassVar[str] = ""
    title: ClassVar[str]
    rows: ClassVar[tuple[str, ...]] = ()
    """Numbers in the survey that the catalogue was made from; see docs/traps/index.md."""
    fix: ClassVar[str]
    """The line to change, as a report prints it."""
    error: ClassVar[float | None]
    """Relative error of ``naive`` in the worst tensor, measured; None where it raises or is NaN."""
    shows: ClassVar[Shows] = "different"
    """How the test of equality sees ``naive``; ``fixed`` is equal."""

    images: ClassVar[frozenset[str]] = frozenset()
    """Inputs and outputs that are (N, C, *spatial) in PyTorch and (N, *spatial, C) in MLX."""
    gradients: ClassVar[bool] = False
    """Whether gradients to the floating inputs are compared as well."""
    exact: ClassVar[bool] = False
    """Whether the point itself matters (a tie, a kink), so that no nearby ones are drawn."""

    shapes: ClassVar[Mapping[str, tuple[int, ...]]] = {"x": (3, 4)}
    """Of the arrays that ``draw`` makes."""

    reference: ClassVar[Callable[..., Any]]
    naive: ClassVar[Callable[..., Any]]
    fixed: ClassVar[Callable[..., Any]]

    @classmethod
    def draw(cls, rng: Rng) -> dict[str, np.ndarray]:
        """The example's arrays, in PyTorch's layout: normal numbers, unless overridden."""
        return {name: rng.standard_normal(shape) for name, shape in cls.shapes.items()}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.family = cls.__module__.rpartition(".")[2]
        if cls.id in CATALOGUE:
            raise ValueError(f"two traps are called {cls.id!r}")
        CATALOGUE[cls.id] = cls

    @classmethod
    def why(cls) -> str:
        """The explanation as paragraphs of Markdown."""
        return inspect.cleandoc(cls.__doc__ or "")

    @classmethod
    def source(cls, which: str) -> str:
        """The code of ``naive``, ``fixed`` or ``reference``, as the page shows it."""
        lines = textwrap.dedent(inspect.getsource(getattr(cls, which))).splitlines()
        return "\n".join(line for line in lines if line != "@staticmethod")


@dataclass(frozen=True)
class Outcome:
    """How an example went: equal or not, and what showed it."""

    findings: tuple[Finding, ...] = ()
    raised: str = ""
    """The port's exception, where it raised one."""

    @property
    def ok(self) -> bool:
        return not self.raised and all(f.ok for f in self.findings)

    @property
    def shows(self) -> Shows:
        if self.raised:
            return "raises"
        if any(f.verdict == "not finite" for f in self.findings):
            return "not finite"
        if not self.ok:
            return "different"
        return "noise" if any(f.noise > NOISY for f in self.findings) else "equal"

    @property
    def error(self) -> float | None:
        """The largest relative error, None where there is no number."""
        errors = [f.relative_error for f in self.findings]
        return None if self.raised or not np.isfinite(errors).all() else max(errors)

    def __str__(self) -> str:
        if self.raised:
            return self.raised
        return str(next((f for f in self.findings if not f.ok), self.findings[0]))


def held(trap: type[Trap], which: str, seed: int = 0) -> Outcome:
    """Hold a trap's ``naive`` or ``fixed`` against its reference, by the test of equality."""
    rng = np.random.default_rng(seed)
    point = {
        name: array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array
        for name, array in trap.draw(rng).items()
    }
    cotangents: dict[str, np.ndarray] = {}

    def oracle(p: Tensors) -> Tensors:
        found = _in_torch(trap, p, torch.float64, cotangents)
        for name, array in found.items():
            if name not in cotangents and not name.startswith("d/"):
                cotangents[name] = rng.standard_normal(array.shape)
        if trap.gradients and not any(name.startswith("d/") for name in found):
            found = _in_torch(trap, p, torch.float64, cotangents)  # now that the shapes are known
        return found

    try:
        findings = compare(
            oracle,
            lambda p: _in_torch(trap, p, torch.float32, cotangents),
            lambda p: _in_mlx(trap, which, p, cotangents),
            lambda: dict(point) if trap.exact else jitter(point, rng),
        )
    except _Raised as error:
        return Outcome(raised=str(error))
    return Outcome(tuple(findings))


class _Raised(Exception):
    """The port raised; what the original exception said."""


def _named(result: Any) -> dict[str, Any]:
    return result if isinstance(result, dict) else {"output": result}


def _in_torch(
    trap: type[Trap], point: Tensors, dtype: torch.dtype, cotangents: Tensors
) -> dict[str, np.ndarray]:
    inputs: dict[str, Any] = {}
    for name, array in point.items():
        floating = np.issubdtype(array.dtype, np.floating)
        inputs[name] = torch.from_numpy(np.array(array)).to(dtype if floating else torch.int64)
        if floating and trap.gradients:
            inputs[name].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's advice to whoever wrote the original
        outputs = _named(trap.reference(**inputs))
    found = {k: v.detach().to(torch.float64).numpy().copy() for k, v in outputs.items()}
    if trap.gradients and cotangents:
        wrt = [x for x in inputs.values() if x.requires_grad]
        total = sum(
            (y * torch.from_numpy(np.array(cotangents[k])).to(y.dtype)).sum()
            for k, y in outputs.items()
        )
        grads = torch.autograd.grad(total, wrt, allow_unused=True)
        names = [k for k, x in inputs.items() if x.requires_grad]
        for name, x, g in zip(names, wrt, grads, strict=True):
            found[f"d/{name}"] = np.zeros(x.shape) if g is None else g.to(torch.float64).numpy()
    return found


def _in_mlx(
    trap: type[Trap], which: str, point: Tensors, cotangents: Tensors
) -> dict[str, np.ndarray]:
    port = getattr(trap, which)

    def laid_out(name: str, array: np.ndarray) -> A:
        return mx.array(channels_last(array) if name in trap.images else array)

    def numpy(name: str, array: A) -> np.ndarray:
        found = np.array(array.astype(mx.float32), dtype=np.float64)
        return channels_first(found) if name in trap.images else found

    inputs = {name: laid_out(name, array) for name, array in point.items()}
    floating = {k: x for k, x in inputs.items() if mx.issubdtype(x.dtype, mx.floating)}
    others = {k: x for k, x in inputs.items() if k not in floating}
    weights = {k: laid_out(k, c.astype(np.float32)) for k, c in cotangents.items()}

    def total(floating: dict[str, A]) -> A:
        return sum(
            ((y * weights[k]).sum() for k, y in _named(port(**floating, **others)).items()),
            mx.array(0.0),
        )

    try:
        found = {k: numpy(k, y) for k, y in _named(port(**inputs)).items()}
        if trap.gradients:
            grads = mx.grad(total)(floating)
            found |= {f"d/{k}": numpy(k, g) for k, g in grads.items()}
    except Exception as error:
        raise _Raised(f"{type(error).__name__}: {error}") from error
    return found
