"""Pair the modules of two trees that nobody named alike: by the user's map, by name, by structure.

Layers (``layers.py``) are paired first, since their tensors' shapes tell them apart: equal names,
then equal shapes and alike names (``names.py``) in alike order, then one against several (a fused
projection and its parts). What contains them is paired by what it contains.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.errors import CarryError
from mlx_parity.layers import Layer, Source, plain_path, port_modules
from mlx_parity.names import Name, alike, letters, overlap, words

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402

Map = Mapping[str, "str | Sequence[str] | None"]
"""Names of the reference (modules, whole branches, or tensors) to the port's; several where the
port has split one, none where it has no such module."""


@dataclass(frozen=True)
class ModulePair:
    """A module of the reference and the one that stands for it in the port.

    One reference module may stand in several pairs (split in the port), and so may one of the port
    (fused there): ``part`` then says which of how many this is.
    """

    reference_path: str
    port_path: str
    reference: tnn.Module
    port: mnn.Module
    how: str = "name"
    """``map``, ``name`` or ``structure``."""
    part: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """What reports call it: the reference's path, and the port's where it is another."""
        here = self.reference_path or type(self.reference).__name__
        there = self.port_path or type(self.port).__name__
        return here if here == there or not self.reference_path else f"{here} ({there})"


@dataclass(frozen=True)
class Unpaired:
    """A module that has no counterpart, and why."""

    side: str
    path: str
    type: str
    reason: str


class Pairs(list[ModulePair]):
    """The pairs in the reference's order; ``unpaired`` lists the modules left over."""

    def __init__(self, pairs: Iterable[ModulePair] = (), unpaired: Iterable[Unpaired] = ()):
        super().__init__(pairs)
        self.unpaired = tuple(unpaired)


@dataclass(frozen=True)
class Match:
    """Layers of the reference and of the port that hold the same tensors: one to one, or one to
    several on either side."""

    reference: tuple[Layer, ...]
    port: tuple[Layer, ...]
    how: str


@dataclass
class Matches:
    """All matches, and the layers left over on either side."""

    found: list[Match] = field(default_factory=list)
    reference_left: list[Layer] = field(default_factory=list)
    port_left: list[Layer] = field(default_factory=list)


# ---------------------------------------------------------------------------------- matching


def match_layers(
    theirs: Sequence[Layer], ours: Sequence[Layer], port: mnn.Module, mapping: Map | None = None
) -> Matches:
    """Match layers by the map, by name, by structure; then one to several; then what is lacking."""
    modules = port_modules(port)
    plain = {layer: plain_path(layer.name, port, modules) for layer in ours}
    left, free = list(theirs), list(ours)
    found: list[Match] = []

    def take(reference: Sequence[Layer], port: Sequence[Layer], how: str) -> None:
        found.append(Match(tuple(reference), tuple(port), how))
        for layer in reference:
            left.remove(layer)
        for layer in port:
            free.remove(layer)

    mapped, dropped = _mapped(theirs, ours, mapping or {})
    for reference, targets in mapped:
        take([reference], targets, "map")
    for layer in dropped:
        if layer in left:
            left.remove(layer)

    renamed = {layer: _renamed(layer.name, mapping or {}) for layer in left}
    by_name = {plain[layer]: layer for layer in free} | {layer.name: layer for layer in free}
    for layer in list(left):
        other = by_name.get(renamed[layer])
        if other is not None and other in free and _fits(layer, other):
            take([layer], [other], "name")

    for layer, other in _by_structure(left, free, key=lambda x: x.signature, even=True):
        take([layer], [other], "structure")
    for many_left in (False, True):
        for one, several in _by_parts(*((free, left) if many_left else (left, free))):
            take(*((several, [one]) if many_left else ([one], several)), "structure")
    for key in (lambda x: x.signature, _largest):
        for layer, other in _by_structure(left, free, key=key):
            take([layer], [other], "structure")
    found.sort(key=lambda m: m.reference[0].order)
    return Matches(found, left, free)


def _mapped(
    theirs: Sequence[Layer], ours: Sequence[Layer], mapping: Map
) -> tuple[list[tuple[Layer, list[Layer]]], list[Layer]]:
    """The pairs that the map names outright, and the layers that it says have no counterpart."""
    by_name = {layer.name: layer for layer in ours}
    pairs, dropped = [], []
    for layer in theirs:
        for key in (layer.name, layer.path):
            if key not in mapping:
                continue
            target = mapping[key]
            if target is None:
                dropped.append(layer)
                break
            names = [target] if isinstance(target, str) else list(target)
            if all(n in by_name for n in names):
                pairs.append((layer, [by_name[n] for n in names]))
                break
            if not isinstance(target, str):
                missing = next(n for n in names if n not in by_name)
                raise CarryError(
                    f"map: {key!r} goes to {missing!r}, which holds no parameters in the port"
                )
    taken: set[int] = set()
    for layer, targets in pairs:
        for other in targets:
            if id(other) in taken:
                raise CarryError(
                    f"map: two layers go to {other.name!r} of the port; {layer.name!r} is one"
                )
            taken.add(id(other))
    return pairs, dropped


def _renamed(name: str, mapping: Map) -> str:
    """The name under the longest mapped branch that holds it."""
    prefix = name
    while prefix:
        target = mapping.get(prefix)
        if isinstance(target, str):
            return ".".join(p for p in (target, name[len(prefix) + 1 :]) if p)
        prefix = prefix.rpartition(".")[0]
    return name


def _fits(layer: Layer, other: Layer) -> bool:
    return _largest(layer) == _largest(other)


def _largest(layer: Layer) -> tuple[Any, ...]:
    """The weight's sizes: enough to see that a layer is meant, when another tensor is lacking."""
    signature = layer.signature
    return (signature[0], max(signature[1:], key=lambda s: (math.prod(s), len(s))))


def _by_structure(
    left: list[Layer], free: list[Layer], key: Callable[[Layer], Any], even: bool = False
) -> list[tuple[Layer, Layer]]:
    """Within each group of equal shapes, the pairing of most alike names in most alike order.

    ``even`` leaves alone the groups of which one side has more.
    """
    groups: dict[Any, tuple[list[Layer], list[Layer]]] = defaultdict(lambda: ([], []))
    for layer in left:
        groups[key(layer)][0].append(layer)
    for layer in free:
        groups[key(layer)][1].append(layer)
    pairs = []
    for theirs, ours in groups.values():
        if not theirs or not ours or (even and len(theirs) != len(ours)):
            continue
        names = [Name(x.name) for x in theirs], [Name(x.name) for x in ours]
        cost = np.empty((len(theirs), len(ours)))
        longest = max(len(theirs), len(ours))
        for i, a in enumerate(names[0]):
            for j, b in enumerate(names[1]):
                kinds = {theirs[i].kind, ours[j].kind}
                other_kind = len(kinds) == 2 and not kinds & {"", "parameter"}
                cost[i, j] = abs(i - j) / longest * 2 - alike(a, b) + 3 * other_kind
        for i, j in zip(*linear_sum_assignment(cost), strict=True):
            pairs.append((theirs[i], ours[j]))
    return pairs


_PARTS = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}
"""The order in which parts are fused, where names tell; else the order of definition."""


def _by_parts(fused: list[Layer], parts: list[Layer]) -> list[tuple[Layer, list[Layer]]]:
    """A matrix of one side and the neighbours on the other that it is made of, row after row.

    Of all the ways the one whose names agree best comes first: ``wq`` of a port has as many rows as
    the key's and the value's projections together, and is neither.
    """
    options: list[tuple[Any, Layer, list[Layer]]] = []
    for one in fused:
        weight = _matrix(one)
        if weight is None:
            continue
        siblings: dict[str, list[Layer]] = defaultdict(list)
        for p in parts:
            part = _matrix(p)
            if (
                part is not None
                and (*part.shape[:-2], part.shape[-1]) == (*weight.shape[:-2], weight.shape[-1])
                and (set(p.tensors) == set(one.tensors) or len(p.tensors) == len(one.tensors) == 1)
            ):
                siblings[p.path if p.part else p.path.rpartition(".")[0]].append(p)
        name, spoken = Name(one.name), letters(one.name)
        for group in siblings.values():
            for several in _windows(group, weight.shape[-2]):
                same = name.numbers == Name(several[0].name).numbers
                theirs = frozenset().union(*(letters(p.name) for p in several))
                agree = overlap(spoken, theirs) if spoken or theirs else 0.5
                score = overlap(name.words, Name(several[0].name).words)
                rank = (same, agree, score, -abs(one.order - several[0].order))
                options.append((rank, one, several))
    found = []
    used: set[int] = set()
    for _, one, several in sorted(options, key=lambda o: o[0], reverse=True):
        if not used & {id(p) for p in (one, *several)}:
            found.append((one, several))
            used |= {id(p) for p in (one, *several)}
    return found


def _matrix(layer: Layer) -> Source | None:
    """The weight of a layer that several may be fused into: a matrix, or one for each expert, which
    a parameter alone may be too. A convolution's three dimensions are no experts."""
    if layer.kind == "parameter":
        (source,) = layer.tensors.values()
        return source if len(source.shape) == 3 else None
    weight = layer.tensors.get("weight")
    if weight is None:
        return None
    return weight if len(weight.shape) == 2 or (len(weight.shape) == 3 and not layer.kind) else None


def _windows(group: list[Layer], rows: int) -> Iterator[list[Layer]]:
    """Runs of two or more siblings whose rows add up, in the order of query, key, value."""

    def place(layer: Layer) -> int:
        return next((_PARTS[w] for w in words(layer.name.rpartition(".")[2]) if w in _PARTS), 9)

    named = sorted((p for p in group if place(p) < 9), key=lambda p: (place(p), p.order))
    for ordered in (named, sorted(group, key=lambda p: p.order)):
        for start in range(len(ordered)):
            total = 0
            for stop in range(start, len(ordered)):
                matrix = _matrix(ordered[stop])
                total += 0 if matrix is None else matrix.shape[-2]
                window = ordered[start : stop + 1]
                told = [place(p) for p in window]  # names beat the order of definition
                if total == rows and stop > start and (max(told) == 9 or told == sorted(told)):
                    yield window
                if total >= rows:
                    break


# ------------------------------------------------------------------------------------- pairs


def pair_modules(
    reference: tnn.Module, port: mnn.Module, matches: Matches, mapping: Map | None = None
) -> Pairs:
    """Pairs of modules from matched layers: the layers' own, then whatever contains them."""
    mapping = mapping or {}
    theirs = dict(reference.named_modules())
    ours = port_modules(port)
    plain = {plain_path(path, port, ours): path for path in ours}
    pairs: dict[tuple[str, str], ModulePair] = {}

    def add(a: str, b: str, how: str, part: tuple[int, int] | None = None) -> None:
        pairs.setdefault((a, b), ModulePair(a, b, theirs[a], ours[b], how, part))

    add("", "", "name")
    every = [x for m in matches.found for x in (*m.reference, *m.port)]
    parts = Counter((id(x.module), x.path) for x in every)
    whole = {x for x in every if x.kind != "parameter" and parts[id(x.module), x.path] == 1}
    reached: dict[int, set[int]] = {}  # a match's layers, numbered
    for k, match in enumerate(matches.found):
        for one in (*match.reference, *match.port):
            reached.setdefault(id(one), set()).add(k)
        several = max(len(match.reference), len(match.port))
        at = 0
        for layer in match.reference:
            for other in match.port:
                if {layer, other} <= whole and other.path in ours:
                    part = (at, several) if several > 1 else None
                    add(layer.path, other.path, match.how, part)
                at += 1
    for a, target in mapping.items():
        if isinstance(target, str) and a in theirs and target in ours:
            add(a, target, "map")

    inside = _contents([x for m in matches.found for x in m.reference], theirs, reached)
    within = _contents([x for m in matches.found for x in m.port], ours, reached)
    groups: dict[frozenset[int], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    done_a, done_b = {a for a, _ in pairs}, {b for _, b in pairs}
    for path, content in inside.items():
        if path not in done_a:
            groups[content][0].append(path)
    for path, content in within.items():
        if path not in done_b:
            groups[content][1].append(path)
    for a_paths, b_paths in groups.values():
        for a, b in _nested(a_paths, b_paths):
            add(a, b, "structure")

    def contain_alike(a: str, b: str) -> bool:
        return inside.get(a, frozenset()) == within.get(b, frozenset())

    _add_unparametrised(theirs, ours, plain, pairs, add, mapping, contain_alike)
    order = {path: i for i, path in enumerate(theirs)}
    ordered = sorted(pairs.values(), key=lambda p: (order[p.reference_path], p.part or (0, 0)))
    return Pairs(ordered, _unpaired(theirs, ours, ordered, matches, mapping))


def _contents(
    layers: Iterable[Layer], modules: Mapping[str, Any], reached: Mapping[int, set[int]]
) -> dict[str, frozenset[int]]:
    """The matches that lie inside each module."""
    found: dict[str, set[int]] = defaultdict(set)
    for layer in layers:
        path = layer.path
        while True:
            if path in modules:
                found[path] |= reached[id(layer)]
            if not path:
                break
            path = path.rpartition(".")[0]
    return {path: frozenset(content) for path, content in found.items()}


def _nested(a_paths: list[str], b_paths: list[str]) -> list[tuple[str, str]]:
    """Modules of equal content lie inside one another; pair them from the outside in, by name
    where one side has more."""
    a_paths = sorted(a_paths, key=lambda p: p.count("."))
    b_paths = sorted(b_paths, key=lambda p: p.count("."))
    if len(a_paths) == len(b_paths):
        return list(zip(a_paths, b_paths, strict=True))
    few, many = (a_paths, b_paths) if len(a_paths) < len(b_paths) else (b_paths, a_paths)
    chosen: list[tuple[str, str]] = []
    start = 0
    for i, path in enumerate(few):
        last = len(many) - (len(few) - i)
        own = frozenset(words(path.rpartition(".")[2]))
        best = max(
            range(start, last + 1),
            key=lambda j: overlap(own, frozenset(words(many[j].rpartition(".")[2]))),
        )
        chosen.append((path, many[best]))
        start = best + 1
    return chosen if few is a_paths else [(a, b) for b, a in chosen]


def _add_unparametrised(
    theirs: Mapping[str, tnn.Module],
    ours: Mapping[str, mnn.Module],
    plain: Mapping[str, str],
    pairs: Mapping[tuple[str, str], ModulePair],
    add: Any,
    mapping: Map,
    contain_alike: Callable[[str, str], bool],
) -> None:
    """Activations, pools and the like: by the name they have inside a pair of containers."""
    partner: dict[str, str] = dict(pairs.keys())
    taken = {b for _, b in pairs}
    for path, module in theirs.items():
        if path in partner or mapping.get(path, "") is None:
            continue
        parent, _, last = path.rpartition(".")
        options = [_renamed(path, mapping)]
        if parent in partner:
            above = partner[parent]
            options += [
                f"{above}.{last}" if above else last,
                f"{above}.layers.{last}" if above else f"layers.{last}",
            ]
        for option in options:
            there = option if option in ours else plain.get(option)
            if there is None or there in taken:
                continue
            same = there == path and contain_alike(path, there)
            if same or _alike_types(module, ours[there]):
                add(path, there, "name")
                partner[path] = there
                taken.add(there)
                break


def _alike_types(a: Any, b: Any) -> bool:
    """Two modules without parameters may stand for one another; one with them may not."""
    has = any(True for _ in a.parameters()) or bool(list(a.buffers()))
    return not has and not any(isinstance(v, mx.array) for v in b.values())


def _unpaired(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    pairs: Sequence[ModulePair],
    matches: Matches,
    mapping: Map,
) -> list[Unpaired]:
    done_a, done_b = {p.reference_path for p in pairs}, {p.port_path for p in pairs}
    partly = {
        b.path: ", ".join(a.name for a in m.reference)
        for m in matches.found
        for b in m.port
        if b.path not in done_b
    }
    found = []
    for path, module in theirs.items():
        if path not in done_a:
            if mapping.get(path, "") is None:
                reason = "the map says so"
            elif any(True for _ in module.parameters()):
                reason = "no single module of the port holds just these parameters"
            else:
                reason = "no module of the port stands for it; a function there, probably"
            found.append(Unpaired("reference", path, type(module).__name__, reason))
    for path, module in ours.items():
        if path not in done_b:
            reason = "no module of the reference stands for it"
            if path in partly:
                reason = f"its parameters are those of {partly[path]}, which is no module there"
            found.append(Unpaired("port", path, type(module).__name__, reason))
    return found
