"""What a family and a fault are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import numpy as np

Rng = np.random.Generator


@dataclass(frozen=True)
class Example:
    """A correct port beside its original: the arguments of ``mlx_parity.check``."""

    reference: Any
    port: Any
    inputs: Any
    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[str], Any] | None = None
    """The port with a mistake in it, by the mistake's name; ``""`` is the correct one."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a port.

    ``change`` takes a correct example to a wrong one. ``where`` is the reference's module that has
    to be named, or the rung that has to fail where no module is to blame; several with ``|`` where
    the two sides cut the code differently. ``why`` holds the ids of the traps that say rightly what
    is wrong.
    """

    name: str
    where: str
    why: tuple[str, ...]
    change: Callable[[Example], Example]
    subtle: bool = False
    noted: bool = False
    """No wrong formula but something to be known: detected where the report names it, though the
    verdict is equal."""

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(self.where.split("|"))


@dataclass(frozen=True)
class Family:
    """A small model whose sizes are drawn, and what can be wrong with its port."""

    name: str
    build: Callable[[Rng], Example]
    faults: tuple[Fault, ...]


def fault(
    name: str,
    where: str,
    why: str,
    edit: Callable[[Any], Any],
    subtle: bool = False,
) -> Fault:
    """A fault made by editing the port in place; ``edit`` may return another port."""

    def change(example: Example) -> Example:
        port = edit(example.port)
        return example if port is None else replace(example, port=port)

    return Fault(name, where, tuple(why.split()), change, subtle)


def called(
    name: str, where: str, why: str, forward: Callable[..., Any], subtle: bool = False
) -> Fault:
    """A fault in how the module ``where`` of the port computes: ``forward`` is its ``__call__``."""

    def edit(port: Any) -> None:
        module = at(port, where)
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"__call__": forward})

    return fault(name, where, why, edit, subtle)


def ported(reference: Any, make: Callable[[str], Any], inputs: Any, **options: Any) -> Example:
    """A port whose own source holds its mistakes, each under a name."""
    return Example(reference, make(""), inputs, options, make)


def mistake(name: str, where: str, why: str, subtle: bool = False) -> Fault:
    """A mistake that the port's source knows by ``name``."""

    def change(example: Example) -> Example:
        assert example.make is not None
        return replace(example, port=example.make(name))

    return Fault(name, where, tuple(why.split()), change, subtle)


def option(name: str, where: str, why: str, subtle: bool = False, **options: Any) -> Fault:
    """A fault in an argument of the check: an optimizer, a loss. Functions are called first."""

    def change(example: Example) -> Example:
        return replace(example, options={**example.options, **copy.copy(options)})

    return Fault(name, where, tuple(why.split()), change, subtle)


def at(port: Any, path: str) -> Any:
    """The port's module at a dotted path, through lists and Sequentials."""
    for part in path.split(".") if path else []:
        if part.isdigit():
            port = port.layers[int(part)] if isinstance(port, mnn.Sequential) else port[int(part)]
        else:
            port = port[part] if isinstance(port, dict) and part in port else getattr(port, part)
    return port


def setting(path: str, **values: Any) -> Callable[[Any], None]:
    """Set attributes of the port's module at ``path``."""

    def edit(port: Any) -> None:
        for key, value in values.items():
            setattr(at(port, path), key, value)

    return edit


def swapped(path: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Put ``make(module)`` in the place of the port's module at ``path``."""

    def edit(port: Any) -> None:
        parent, _, last = path.rpartition(".")
        owner, module = at(port, parent), at(port, path)
        if last.isdigit():
            (owner.layers if isinstance(owner, mnn.Sequential) else owner)[int(last)] = make(module)
        else:
            setattr(owner, last, make(module))

    return edit


def normal(rng: Rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def size(rng: Rng, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def image(rng: Rng, channels: int, low: int = 6, high: int = 9) -> np.ndarray:
    """A batch of images, their height and width unequal."""
    height = size(rng, low, high)
    return normal(rng, size(rng, 2, 4), channels, height, height + 1)


def nearest(x: mx.array) -> mx.array:
    return mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
