"""Carry the weights of a port that nobody here wrote: through its own ``sanitize``, by equal names,
or by the pairing of its layers.

Whatever the way, the result is a :class:`~mlx_parity.carry.Plan`: linear maps from the reference's
tensors to the port's, whose adjoints take the port's gradients back. ``sanitize`` is a function
that is only known by what it does, so it is asked: it is given arrays that hold their own indices.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.carry import (
    Array,
    Link,
    Plan,
    _linear,
    _permuted,
    _transposed_conv,
    flat,
    match,
    reference_tensors,
)
from mlx_parity.errors import CarryError
from mlx_parity.layers import (
    Layer,
    Source,
    port_layers,
    port_modules,
    reference_layers,
    squeezed,
)
from mlx_parity.pairing import Map, Match, Pairs, match_layers, pair_modules

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402

Sanitize = Callable[[dict[str, Any]], Any]
Convert = Callable[[Array], Array]


@dataclass(frozen=True)
class FoundPlan(Plan):
    """A plan that was found rather than declared."""

    how: str = ""
    """In words, for the report."""
    lacking: tuple[str, ...] = ()
    """Differences of structure: what a layer of the port lacks, or has over."""
    notes: tuple[str, ...] = ()
    pairs: Pairs = field(default_factory=Pairs)

    def misplaced(self) -> list[str]:
        return [*self.lacking, *super().misplaced()]


def find_plan(
    reference: tnn.Module,
    port: mnn.Module,
    *,
    map: Map | None = None,
    sanitize: Sanitize | None = None,
    **options: Any,
) -> FoundPlan:
    """How the reference's weights go into the port. Options as for :func:`mlx_parity.match`.

    Raises :class:`CarryError` where a weight of the reference has nowhere to go.
    """
    own = getattr(port, "sanitize", None)
    given = sanitize or (own if callable(own) else None)
    tensors = reference_tensors(reference)
    arrays = flat(port.parameters())
    theirs, ours = reference_layers(reference, tensors), port_layers(port, arrays)
    matches = match_layers(theirs, ours, port, map)
    pairs = pair_modules(reference, port, matches, map)
    notes: list[str] = []
    if given is not None:
        try:
            return _through(reference, port, given, pairs)
        except CarryError as error:
            if sanitize is not None:
                raise
            notes.append(f"the port's own sanitize was not used: {error}")
    names = {k: v for k, v in (map or {}).items() if isinstance(v, str)}
    renamed = {**names, **options.get("rename", {})}
    rest = {k: v for k, v in options.items() if k != "rename"}
    try:
        plan = match(reference, port, rename=renamed, **rest)
    except CarryError as error:
        if _about_options(error):
            raise
    else:
        how = "carried by equal names and layer types"
        return FoundPlan(reference, port, plan.links, how, (), tuple(notes), pairs)
    links, lacking = _links(matches.found, rest)
    held = _leftover(reference, port, links, names, notes)
    links += held
    owners = tuple(f"{link.port.rpartition('.')[0]} [" for link in held)
    lacking = [line for line in lacking if not line.startswith(owners)] if held else lacking
    return _complete(reference, port, links, lacking, theirs, notes, pairs)


def _leftover(
    reference: tnn.Module,
    port: mnn.Module,
    links: Sequence[Link],
    names: Mapping[str, str],
    notes: list[str],
) -> list[Link]:
    """Tensors that another layer holds in the port, a bias beside a product that has none: as the
    map says, or where one on each side is left of a shape that can be read in one way only."""
    tensors, have = reference_tensors(reference), flat(port.parameters())
    reached = {s for link in links for s in link.sources}
    lost = [n for n in tensors if n not in reached]
    left = [n for n in have if n not in {link.port for link in links}]
    found = []
    for n in lost:
        shape = tuple(tensors[n].shape)
        rivals = [m for m in lost if tuple(tensors[m].shape) == shape]
        same = [m for m in left if tuple(have[m].shape) == shape]
        owner = n.rpartition(".")[0]
        alone = not any(m != n and m.rpartition(".")[0] == owner for m in lost)
        if names.get(n) in same:
            to = names[n]
        elif alone and len(rivals) == len(same) == 1 and len(set(shape)) == len(shape):
            to = same[0]
            notes.append(f"{n} is taken for {to}, the only one left of its shape")
        else:
            continue
        found.append(Link(to, (n,), lambda a: a, lambda g: (g,)))
    return found


def _about_options(error: CarryError) -> bool:
    """Whether the error is about what the user asked for, and not about names."""
    return str(error).startswith(("flatten", "unflatten", "one Linear"))


# ------------------------------------------------------------------------- from matched layers


def _links(matches: Sequence[Match], options: Mapping[str, Any]) -> tuple[list[Link], list[str]]:
    links: list[Link] = []
    lacking: list[str] = []
    for m in matches:
        if len(m.reference) == len(m.port) == 1:
            (layer,), (other,) = m.reference, m.port
            if layer.kind in ("lstm", "gru", "rnn"):
                links += _recurrent(layer, other)
                continue
            for role, there in _roles(layer, other, lacking):
                links.append(
                    _one_to_one(layer, layer.tensors[role], other, other.tensors[there], options)
                )
        elif len(m.reference) == 1:
            links += _split(m.reference[0], m.port)
        else:
            links += _fused(m.reference, m.port[0])
    return links, lacking


_ROLES = {
    "weight": ("weight", "gamma", "scale", "g", "w", "kernel"),
    "bias": ("bias", "beta", "b", "shift"),
}


def _roles(layer: Layer, other: Layer, lacking: list[str]) -> list[tuple[str, str]]:
    """The tensors of two layers in pairs: by role, by what a role is called too, by shape."""
    left, free = list(layer.tensors), list(other.tensors)
    found = []
    for alike in (
        lambda a, b: a == b,
        lambda a, b: any(a in names and b in names for names in _ROLES.values()),
        lambda a, b: squeezed(layer.tensors[a].shape) == squeezed(other.tensors[b].shape),
    ):
        for a in list(left):
            b = next((b for b in free if alike(a, b)), None)
            if b is not None:
                found.append((a, b))
                left.remove(a)
                free.remove(b)
    type_a, type_b = type(layer.module).__name__, type(other.module).__name__
    there, here = other.path or type_b, layer.name or type_a
    lacking += [
        f"{there} [{type_b}] has no {a}, which {here} [{type_a}] of the reference has" for a in left
    ]
    lacking += [
        f"{there} [{type_b}] has a {b}, which {here} [{type_a}] of the reference has not"
        for b in free
    ]
    return found


def _link(port: str, source: Source, full: int | None, forward: Convert, adjoint: Convert) -> Link:
    """A link from a tensor or from some of its rows."""
    if source.rows is None:
        return Link(port, (source.name,), forward, lambda g: (adjoint(g),))
    start, stop = source.rows

    def scatter(g: Array) -> tuple[Array]:
        rows = adjoint(g)
        whole = np.zeros((full or stop, *rows.shape[1:]), rows.dtype)
        whole[start:stop] = rows
        return (whole,)

    return Link(port, (source.name,), lambda a: forward(a[start:stop]), scatter, partial=True)


def _rows(layer: Layer, source: Source) -> int | None:
    """How many rows the whole tensor has that a source is a part of."""
    if source.rows is None:
        return None
    size: int = layer.module.embed_dim  # the only rows of a tensor that are a layer: q, k, v
    return 3 * size


def _one_to_one(
    layer: Layer, source: Source, other: Layer, target: Source, options: Mapping[str, Any]
) -> Link:
    axes = dict(options.get("axes") or {})
    if source.name in axes:
        return _permutation(layer, source, target, tuple(axes[source.name]))
    if isinstance(layer.module, tnn.Linear):
        flatten, unflatten = (
            (options.get(k) or {}).get(layer.path) for k in ("flatten", "unflatten")
        )
        if flatten or unflatten:
            role = source.name.rpartition(".")[2]
            return _linear(layer.module, flatten, unflatten)[role][1](target.name, source.name)
    shape, wanted = source.shape, target.shape
    if layer.kind == "conv_transpose" and len(shape) > 2:
        link = _transposed_conv(target.name, source.name, layer.module.groups)
        return _checked(link, shape, wanted)
    if layer.kind == "conv" and len(shape) > 2:
        order = (0, *range(2, len(shape)), 1)
        made = tuple(shape[i] for i in order)
        back = tuple(int(i) for i in np.argsort(order))
        if squeezed(made) != squeezed(wanted):
            _refuse(source, target)
        return _link(
            target.name,
            source,
            None,
            lambda a: a.transpose(order).reshape(wanted),
            lambda g: g.reshape(made).transpose(back),
        )
    if shape == wanted and _multiplied_from_the_right(layer, source, other, target):
        return _permutation(layer, source, target, (1, 0))
    if shape == wanted:
        return _link(target.name, source, _rows(layer, source), lambda a: a, lambda g: g)
    if tuple(n for n in shape if n > 1) == tuple(n for n in wanted if n > 1):
        return _link(
            target.name,
            source,
            _rows(layer, source),
            lambda a: a.reshape(wanted),
            lambda g: g.reshape(shape),
        )
    orders = [
        p
        for p in itertools.permutations(range(len(shape)))
        if len(shape) == len(wanted) and tuple(shape[i] for i in p) == wanted
    ]
    last = (0, *range(2, len(shape)), 1)  # channels last, where several fit
    if len(orders) == 1 or last in orders:
        return _permutation(layer, source, target, last if last in orders else orders[0])
    return _refuse(source, target)


def _multiplied_from_the_right(layer: Layer, source: Source, other: Layer, target: Source) -> bool:
    """Whether a square matrix stands for a linear layer's weight and is none: ``x @ projection``.

    Of one that is not square the shape tells.
    """
    kinds = (layer.kind, other.kind)
    if kinds == ("", "linear") and len(source.shape) == 2:
        return _multiplies_from_the_right(layer.module, source.name.rpartition(".")[2])
    lone = source.name if layer.kind == "parameter" else target.name
    return (
        len(source.shape) == 2
        and set(kinds) == {"parameter", "linear"}
        and "weight" not in lone.rpartition(".")[2]
    )


def _multiplies_from_the_right(module: tnn.Module, weight: str) -> bool:
    """Whether a layer of the user's own computes ``x @ weight``: it is called, and tells."""
    try:
        alone = copy.deepcopy(module).double()
        square = torch.nn.init.normal_(getattr(alone, weight))
        for name, tensor in alone.named_parameters():
            if name != weight:
                torch.nn.init.zeros_(tensor)
        x = torch.randn(1, 3, len(square), dtype=torch.float64)
        with torch.no_grad():
            return bool(torch.allclose(alone(x), x @ square))
    except Exception:  # it takes something else than one array
        return False


def _permutation(layer: Layer, source: Source, target: Source, axes: tuple[int, ...]) -> Link:
    back = tuple(int(i) for i in np.argsort(axes))
    return _link(
        target.name,
        source,
        _rows(layer, source),
        lambda a: a.transpose(axes),
        lambda g: g.transpose(back),
    )


def _refuse(source: Source, target: Source) -> Link:
    raise CarryError(
        f"{source.name} {list(source.shape)} of the reference seems to be {target.name} "
        f"{list(target.shape)} of the port, and does not fit it in any layout"
    )


def _checked(link: Link, shape: tuple[int, ...], wanted: tuple[int, ...]) -> Link:
    made = link.forward(np.zeros(shape, np.float32)).shape
    if made != wanted:
        raise CarryError(
            f"{link.name} {list(shape)} becomes {list(made)} in MLX's layout, but {link.port} of "
            f"the port is {list(wanted)}"
        )
    return link


def _recurrent(layer: Layer, other: Layer) -> list[Link]:
    """One layer and direction of PyTorch's recurrent modules into one of MLX's."""
    ih, hh = layer.tensors["weight_ih"], layer.tensors["weight_hh"]
    x, h = ("Wxh", "Whh") if layer.kind == "rnn" else ("Wx", "Wh")
    to = {name.rpartition(".")[2]: s.name for name, s in other.tensors.items()}
    links = [
        Link(to[x], (ih.name,), lambda a: a, lambda g: (g,)),
        Link(to[h], (hh.name,), lambda a: a, lambda g: (g,)),
    ]
    if "bias_ih" not in layer.tensors:
        return links
    biases = (layer.tensors["bias_ih"].name, layer.tensors["bias_hh"].name)
    if layer.kind != "gru":
        add = Link(to["bias"], biases, lambda a, b: a + b, lambda g: (g, g), False)
        return [*links, add]
    n = 2 * layer.module.hidden_size
    return [
        *links,
        Link(
            to["b"],
            biases,
            lambda a, b: np.concatenate([(a + b)[:n], a[n:]]),
            lambda g: (g, np.concatenate([g[:n], np.zeros_like(g[n:])])),
            False,
        ),
        Link(
            to["bhn"],
            biases[1:],
            lambda b: b[n:],
            lambda g: (np.concatenate([np.zeros(n, g.dtype), g]),),
            False,
        ),
    ]


def _split(layer: Layer, others: Sequence[Layer]) -> list[Link]:
    """Rows of one matrix, or of each expert's, in turn to several of the port's."""
    links = []
    for role, source in layer.tensors.items():
        axis, start = _rows_axis(layer), 0
        for other in others:
            target = _counterpart(other, role)
            rows = (start, start + target.shape[axis])
            links.append(_cut(target.name, source, axis, rows))
            start = rows[1]
    return links


def _rows_axis(layer: Layer) -> int:
    """The dimension of the rows in all of a layer's tensors: biases have one dimension less."""
    return max(len(s.shape) for s in layer.tensors.values()) - 2


def _counterpart(layer: Layer, role: str) -> Source:
    """The tensor of a role; a parameter alone has a name of its own."""
    return layer.tensors[role] if role in layer.tensors else next(iter(layer.tensors.values()))


def _cut(port: str, source: Source, axis: int, rows: tuple[int, int]) -> Link:
    place = (*(slice(None),) * axis, slice(*rows))

    def scatter(g: Array) -> tuple[Array]:
        whole = np.zeros(source.shape, g.dtype)
        whole[place] = g
        return (whole,)

    return Link(port, (source.name,), lambda a: a[place], scatter, partial=True)


def _fused(layers: Sequence[Layer], other: Layer) -> list[Link]:
    """Several matrices of the reference, one below the other, to one of the port's."""
    links = []
    for role, target in other.tensors.items():
        parts = [_counterpart(layer, role) for layer in layers]
        names = tuple(dict.fromkeys(p.name for p in parts))
        if len(names) == 1:  # rows of one tensor, in its own order
            links.append(Link(target.name, names, lambda a: a, lambda g: (g,)))
            continue
        axis = _rows_axis(other)
        at = [int(n) for n in np.cumsum([p.shape[axis] for p in parts])[:-1]]
        links.append(
            Link(
                target.name,
                names,
                lambda *a, axis=axis: np.concatenate(a, axis),
                lambda g, at=at, axis=axis: tuple(np.split(g, at, axis)),  # type: ignore[misc]
            )
        )
    return links


def _complete(
    reference: tnn.Module,
    port: mnn.Module,
    links: list[Link],
    lacking: list[str],
    layers: Sequence[Layer],
    notes: list[str],
    pairs: Pairs,
) -> FoundPlan:
    """The plan, if no weight is lost; buffers that nothing in the port stands for stay put."""
    tensors = reference_tensors(reference)
    have = flat(port.parameters())
    reached = {s for link in links for s in link.sources}
    excused = {s.name for layer in layers for s in layer.tensors.values() if _lacked(layer, links)}
    lost = [n for n in tensors if n not in reached]
    parameters = dict(reference.named_parameters())
    left = [n for n in have if n not in {link.port for link in links}]
    homeless = [n for n in lost if n in parameters and n not in excused]
    hidden = _hidden(port)
    fixed = [
        n
        for n in homeless
        if not parameters[n].requires_grad and tuple(tensors[n].shape) in hidden.values()
    ]
    homeless = [n for n in homeless if n not in fixed]
    if homeless:
        raise CarryError(_unmapped(homeless, left, tensors, have, hidden))
    trained = set(flat(port.trainable_parameters()))
    named = {line.split(" ")[0] for line in lacking}
    whole = [n for n in left if not mx.issubdtype(have[n].dtype, mx.floating)]
    over = [
        n for n in left if n in trained and n not in whole and n.rpartition(".")[0] not in named
    ]
    lacking += [
        f"{n} {list(have[n].shape)} trains in the port and is nothing in the reference: start its "
        "name with an underscore if it is a constant"
        for n in over
    ]
    if whole:
        notes.append(f"whole numbers, which the port alone has: {', '.join(whole[:6])}")
    if fixed:
        notes.append(f"frozen, and constants of the port's own there: {', '.join(fixed[:6])}")
    constants = [n for n in lost if n not in parameters]
    if constants:
        notes.append(f"left as they are, the port holding none such: {', '.join(constants[:6])}")
    how = "carried by the shapes, the names and the order of the layers"
    return FoundPlan(
        reference,
        port,
        tuple(links),
        how,
        tuple(lacking),
        tuple(notes),
        pairs,
        ignored=frozenset(lost),
    )


def _lacked(layer: Layer, links: Sequence[Link]) -> bool:
    """Whether some of the layer's tensors found their place: what did not is lacking there."""
    reached = {s for link in links for s in link.sources}
    return any(s.name in reached for s in layer.tensors.values())


def _hidden(port: mnn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that are no parameters, since their names start with an underscore."""
    return {
        f"{path}.{name}" if path else name: tuple(value.shape)
        for path, module in port_modules(port).items()
        for name, value in module.items()
        if name.startswith("_") and isinstance(value, mx.array)
    }


def _unmapped(
    lost: Sequence[str],
    left: Sequence[str],
    tensors: Mapping[str, Any],
    have: Mapping[str, Any],
    hidden: Mapping[str, tuple[int, ...]],
) -> str:
    def some(names: Sequence[str], of: Mapping[str, Any]) -> str:
        shown = [f"  {n} {list(of[n].shape)}" for n in names[:8]]
        return "\n".join(shown + ([f"  and {len(names) - 8} more"] if len(names) > 8 else []))

    text = f"of the reference's weights these have no place in the port:\n{some(lost, tensors)}\n"
    if left:
        text += f"and of the port's these are left over:\n{some(left, have)}\n"
    shapes = {tuple(tensors[n].shape) for n in lost}
    unseen = [n for n, shape in hidden.items() if shape in shapes]
    if unseen:
        text += f"Of the same shape, and no parameters by their names: {', '.join(unseen[:4])}.\n"
    return text + (
        "Say which is which with map={reference name: port name}, a list of names where the port "
        "has split one; or give sanitize=, the port's own function from a state dict to its "
        "weights; or load both sides yourself and give carry=False. In MLX, attributes that start "
        "with an underscore and modules held in a tuple are no parameters."
    )


# ------------------------------------------------------------------------- through sanitize


def _through(
    reference: tnn.Module, port: mnn.Module, sanitize: Sanitize, pairs: Pairs
) -> FoundPlan:
    """The plan that ``sanitize`` makes of the state dict, or of one in which a branch's name is
    left out: published files often hold the weights of a model without its head.

    Refused where weights of both sides are left over, since it was made for other names then.
    """
    first: CarryError | None = None
    branches = [n for n, m in reference.named_children() if next(m.children(), None) is not None]
    for branch in ("", *branches):

        def renamed(weights: dict[str, Any], prefix: str = f"{branch}.") -> Any:
            return sanitize({n.removeprefix(prefix): a for n, a in weights.items()})

        try:
            plan = _sanitized(reference, port, renamed if branch else sanitize, pairs)
            filled = {link.port for link in plan.links}
            empty = [n for n in flat(port.trainable_parameters()) if n not in filled]
            lost = [n for n, _ in reference.named_parameters() if n in plan.ignored]
            if not (empty and lost):
                return plan
            error = CarryError(f"sanitize leaves out {lost[0]}, and gives nothing for {empty[0]}")
        except CarryError as raised:
            error = raised
        first = first or error
    assert first is not None
    raise first


def _sanitized(
    reference: tnn.Module, port: mnn.Module, sanitize: Sanitize, pairs: Pairs
) -> FoundPlan:
    """The links that ``sanitize`` makes, found by giving it arrays of indices."""
    state = {
        n: t for n, t in reference.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)
    }
    carried = reference_tensors(reference)
    canonical = {id(t): n for n, t in reversed(list(carried.items()))}
    source_of = {n: canonical.get(id(t)) for n, t in state.items()}
    shapes = {n: tuple(t.shape) for n, t in state.items()}
    have = flat(port.parameters())
    names = list(state)
    base = 1 << 20

    def ask(values: Mapping[str, Array]) -> dict[str, Array]:
        return _call(sanitize, values, have)

    def filled(f: Callable[[int, Array], Array]) -> dict[str, Array]:
        made = {}
        for i, n in enumerate(names):
            flat_index = np.arange(math.prod(shapes[n]), dtype=np.int64).reshape(shapes[n])
            made[n] = f(i, flat_index).astype(np.float32)
        return made

    low = ask(filled(lambda i, k: k % base))
    high = ask(filled(lambda i, k: k // base))
    which = ask(filled(lambda i, k: np.full(k.shape, i + 1)))
    links: list[Link] = []
    for name, target in have.items():
        if name not in low:
            continue
        if low[name].shape != tuple(target.shape):
            raise CarryError(
                f"sanitize gives {name} {list(low[name].shape)}, where the port holds "
                f"{list(target.shape)}"
            )
        tensor = np.rint(which[name]).astype(np.int64)
        index = np.rint(high[name]).astype(np.int64) * base + np.rint(low[name]).astype(np.int64)
        link = _gathered(name, tensor, index, names, source_of, shapes)
        links.append(link or _summed(name, names, source_of, shapes, ask, base))
    _check_linear(links, ask, shapes, source_of)
    missing = [n for n in have if n not in {link.port for link in links}]
    trained = set(flat(port.trainable_parameters()))
    lost = [n for n in missing if n in trained]
    if lost and len(lost) == len(trained):
        raise CarryError("sanitize gives none of the port's weights")
    reached = {s for link in links for s in link.sources}
    lacking = tuple(
        f"{n} {list(have[n].shape)} trains in the port, and sanitize gives nothing for it"
        for n in lost
    )
    left = frozenset(n for n in carried if n not in reached)
    parameters = {n for n, _ in reference.named_parameters()}
    holders = {s.rpartition(".")[0] for s in reached}
    halved = sorted(n for n in left & parameters if n.rpartition(".")[0] in holders)
    lacking += tuple(  # of a layer that the port has; a head that it has not is its own affair
        f"{n} {list(carried[n].shape)} of the reference is nothing in the port" for n in halved
    )
    notes: tuple[str, ...] = ()
    if left - set(halved):
        notes = (f"sanitize leaves out {', '.join(sorted(left - set(halved))[:6])}",)
    how = "carried through the port's sanitize"
    return FoundPlan(reference, port, tuple(links), how, lacking, notes, pairs, ignored=left)


def _call(
    sanitize: Sanitize, values: Mapping[str, Array], have: Mapping[str, Any]
) -> dict[str, Array]:
    """What ``sanitize`` makes of MLX arrays, or else of PyTorch tensors, or else of NumPy's."""
    errors = []
    for make in (mx.array, torch.from_numpy, np.asarray):
        try:
            made = sanitize({n: make(np.array(a)) for n, a in values.items()})
            items = made.items() if hasattr(made, "items") else made
            found = {str(n): _numpy(a) for n, a in items}
            break
        except Exception as error:  # the user's own code: anything
            errors.append(f"{type(error).__name__}: {error}")
    else:
        raise CarryError(f"sanitize raises {errors[0]}")
    if not set(found) & set(have):
        raise CarryError(
            f"sanitize gives names that the port does not have, such as "
            f"{next(iter(found), None)!r}; the port has {next(iter(have), None)!r}"
        )
    return found


def _numpy(a: Any) -> Array:
    if isinstance(a, mx.array):
        return np.array(a.astype(mx.float32))
    return a.detach().float().numpy() if isinstance(a, torch.Tensor) else np.asarray(a, np.float32)


def _gathered(
    name: str,
    tensor: Array,
    index: Array,
    names: Sequence[str],
    source_of: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
) -> Link | None:
    """A link that picks elements, or None where the result is no choice of elements."""
    used = [int(i) for i in np.unique(tensor)]
    if not used or used[0] < 1 or used[-1] > len(names):
        return None
    for i in used:
        chosen = index[tensor == i]
        if chosen.min() < 0 or chosen.max() >= math.prod(shapes[names[i - 1]]):
            return None
    sources = [source_of[names[i - 1]] for i in used]
    if any(s is None for s in sources):
        return None
    if len(used) == 1 and (axes := _axes(index, shapes[names[used[0] - 1]])):
        return _permuted(name, str(sources[0]), axes)
    places = [np.flatnonzero(tensor.ravel() == i) for i in used]
    picks = [index.ravel()[p] for p in places]
    full = [shapes[names[i - 1]] for i in used]

    def forward(*arrays: Array) -> Array:
        out = np.empty(tensor.size, arrays[0].dtype)
        for array, place, pick in zip(arrays, places, picks, strict=True):
            out[place] = array.ravel()[pick]
        return out.reshape(tensor.shape)

    def adjoint(g: Array) -> tuple[Array, ...]:
        back = []
        for shape, place, pick in zip(full, places, picks, strict=True):
            whole = np.zeros(math.prod(shape), g.dtype)
            np.add.at(whole, pick, g.ravel()[place])
            back.append(whole.reshape(shape))
        return tuple(back)

    every = all(
        p.size == math.prod(s) == np.unique(p).size for p, s in zip(picks, full, strict=True)
    )
    once = all(p.size == np.unique(p).size for p in picks)
    found = tuple(str(s) for s in sources)
    return Link(name, found, forward, adjoint, invertible=once, partial=not every)


def _axes(index: Array, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order of the axes that makes ``index`` of a tensor of ``shape``, if one does."""
    if index.ndim != len(shape) or index.size != math.prod(shape):
        return None
    whole = np.arange(index.size).reshape(shape)
    orders = itertools.permutations(range(len(shape)))
    return next((p for p in orders if np.array_equal(whole.transpose(p), index)), None)


def _summed(
    name: str,
    names: Sequence[str],
    source_of: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    ask: Callable[[Mapping[str, Array]], dict[str, Array]],
    base: int,
) -> Link:
    """A sum of choices of elements, one from each of several tensors: two biases added."""
    zeros = {n: np.zeros(shapes[n], np.float32) for n in names}
    nothing = ask(zeros)[name]
    if nothing.any():
        raise CarryError(f"sanitize adds a constant to {name}")
    ones = ask({n: np.ones(shapes[n], np.float32) for n in names})
    parts: list[tuple[str, Array, Array]] = []
    for n in names:
        if source_of[n] is None or not ask(zeros | {n: np.ones(shapes[n], np.float32)})[name].any():
            continue
        size = math.prod(shapes[n])
        ids = np.arange(1, size + 1)
        low = ask(zeros | {n: (ids % base).reshape(shapes[n]).astype(np.float32)})[name]
        high = ask(zeros | {n: (ids // base).reshape(shapes[n]).astype(np.float32)})[name]
        index = np.rint(high).astype(np.int64) * base + np.rint(low).astype(np.int64) - 1
        parts.append((n, np.flatnonzero(index.ravel() >= 0), index.ravel()))
    if not parts or name not in ones:
        raise CarryError(f"sanitize makes {name} of nothing that the reference holds")
    target = ones[name].shape
    size = math.prod(target)

    def forward(*arrays: Array) -> Array:
        out = np.zeros(size, arrays[0].dtype)
        for array, (_, place, index) in zip(arrays, parts, strict=True):
            out[place] += array.ravel()[index[place]]
        return out.reshape(target)

    def adjoint(g: Array) -> tuple[Array, ...]:
        back = []
        for n, place, index in parts:
            whole = np.zeros(math.prod(shapes[n]), g.dtype)
            np.add.at(whole, index[place], g.ravel()[place])
            back.append(whole.reshape(shapes[n]))
        return tuple(back)

    sources = tuple(str(source_of[n]) for n, _, _ in parts)
    return Link(name, sources, forward, adjoint, invertible=False)


def _check_linear(
    links: Sequence[Link],
    ask: Callable[[Mapping[str, Array]], dict[str, Array]],
    shapes: Mapping[str, tuple[int, ...]],
    source_of: Mapping[str, str | None],
) -> None:
    """The links do to ordinary numbers what ``sanitize`` does."""
    rng = np.random.default_rng(0)
    values: dict[str, Array] = {}
    by_source: dict[str, Array] = {}
    for n, shape in shapes.items():
        source = source_of[n]
        if source in by_source:
            values[n] = by_source[source]
            continue
        values[n] = rng.standard_normal(shape).astype(np.float32)
        if source is not None:
            by_source[source] = values[n]
    made = ask(values)
    for link in links:
        expected = link.forward(*(by_source[s] for s in link.sources))
        if not np.allclose(made[link.port], expected, rtol=1e-2, atol=1e-2):
            raise CarryError(
                f"sanitize does more to {link.port} than to move, join and add: give map= or load "
                "both sides yourself and give carry=False"
            )
