"""The same tensor in two layouts: which order of the axes makes one of the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]

SURE = 0.02
"""Two tensors this near, relatively, are the same one: wrong orders differ by about 1."""


@dataclass(frozen=True)
class Layout:
    """``port = reference.transpose(axes).reshape(port)``."""

    axes: tuple[int, ...]
    reference: Shape
    port: Shape
    sure: bool
    """Whether the values showed it; else the shapes allow it and convention suggests it."""

    def to_port(self, a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a.transpose(self.axes).reshape(self.port))

    def to_reference(self, b: np.ndarray) -> np.ndarray:
        moved = tuple(self.reference[i] for i in self.axes)
        return b.reshape(moved).transpose(np.argsort(self.axes))

    def __str__(self) -> str:
        if self.axes == tuple(range(len(self.axes))):
            return "as it is"
        letters = "NCDHW" if len(self.axes) == 5 else "NCHW" if len(self.axes) == 4 else "NCL"
        if self.axes == (0, *range(2, len(self.axes)), 1) and len(self.axes) > 2:
            return f"{letters[: len(self.axes)]} there, channels last here"
        return f"axes {self.axes} of the reference"


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far ``b`` is from ``a``, relative to ``a``."""
    size = float(np.linalg.norm(a))
    off = float(np.linalg.norm(a - b))
    return off / size if size > 0 else (0.0 if off == 0 else np.inf)


def layouts(a: Shape, b: Shape) -> Iterator[tuple[int, ...]]:
    """The orders of ``a``'s axes that could make a tensor of shape ``b``, the usual ones first."""
    if int(np.prod(a)) != int(np.prod(b)):
        return
    n = len(a)
    usual = [tuple(range(n))]
    if n > 2:
        usual += [(0, *range(2, n), 1), (1, 0, *range(2, n)), (0, n - 1, *range(1, n - 1))]
    others = itertools.permutations(range(n)) if n <= 4 else iter(())
    for axes in dict.fromkeys([*usual, *others]):
        if _reshapes(tuple(a[i] for i in axes), b):
            yield axes


def _reshapes(a: Shape, b: Shape) -> bool:
    """Whether one shape is the other with neighbouring axes merged."""

    def marks(shape: Shape) -> set[int]:
        return {int(n) for n in np.cumprod([n for n in shape if n > 1])}

    one, other = marks(a), marks(b)
    return one <= other or other <= one


def resolve(a: np.ndarray, b: np.ndarray, channels_last: bool = False) -> Layout | None:
    """The layout of ``b`` given the reference's ``a``: by their values, or else by convention.

    None where no order of the axes fits. ``channels_last`` says which convention, where the values
    differ so much that they tell nothing.
    """
    options = list(layouts(a.shape, b.shape))
    best: tuple[float, tuple[int, ...]] | None = None
    for axes in options:
        moved = a.transpose(axes).reshape(b.shape)
        off = distance(moved, b)
        if best is None or off < best[0]:
            best = (off, axes)
        if off < SURE / 20:
            break
    if best is None:
        return None
    if best[0] < SURE:
        return Layout(best[1], a.shape, b.shape, True)
    last = (0, *range(2, a.ndim), 1)
    axes = last if channels_last and a.ndim > 2 and last in options else options[0]
    return Layout(axes, a.shape, b.shape, False)


def pair_leaves(
    theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], channels_last: bool = False
) -> list[tuple[str, str, Layout]]:
    """Arrays of one call in pairs, those of equal values first, then of equal place and fit."""
    found: list[tuple[str, str, Layout]] = []
    left, free = list(theirs), list(ours)

    def take(only_sure: bool, only_place: bool) -> None:
        for a in list(left):
            for b in sorted(free, key=lambda b: b != a):
                if only_place and a != b:
                    continue
                layout = resolve(theirs[a], ours[b], channels_last)
                if layout is not None and (layout.sure or not only_sure):
                    found.append((a, b, layout))
                    left.remove(a)
                    free.remove(b)
                    break

    for only_sure, only_place in ((True, True), (True, False), (False, True), (False, False)):
        take(only_sure, only_place)
    return found
