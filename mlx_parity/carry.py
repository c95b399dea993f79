"""Carry weights from a PyTorch module to its MLX port, by layer type, without guessing.

Both trees are walked. Each PyTorch layer's type decides which of its tensors goes where and in
which layout; MLX keeps channels last, so

    Conv                 (O, I/g, *k)   ->  (O, *k, I/g)
    ConvTranspose        (I, O/g, *k)   ->  (O, *k, I/g), the groups' blocks re-cut
    Linear after flatten columns (C, H, W)  ->  (H, W, C)
    LSTM, GRU, RNN       two biases     ->  one (and GRU's ``bhn``)

A link is a linear map from reference tensors to one port tensor. Its adjoint takes the port's
gradients back, so that gradients are compared under the reference's names and in its layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.errors import CarryError, NotFiniteError

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

Array = np.ndarray
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """One tensor of the port and the reference tensors it is made from."""

    port: str
    sources: tuple[str, ...]
    forward: Callable[..., Array]
    """Reference tensors, in the order of ``sources``, to the port's tensor."""
    adjoint: Callable[[Array], tuple[Array, ...]]
    """The port's gradient to the reference tensors' gradients."""
    invertible: bool = True
    """Whether the adjoint is also the inverse, so that values can be carried back."""
    partial: bool = False
    """Whether the inverse gives back some elements of its sources only, and zeros elsewhere."""

    @property
    def name(self) -> str:
        """What reports call it: the reference's own name."""
        return " + ".join(self.sources)


def _same(port: str, source: str) -> Link:
    return Link(port, (source,), lambda a: a, lambda g: (g,))


def _permuted(port: str, source: str, axes: tuple[int, ...]) -> Link:
    back = tuple(int(i) for i in np.argsort(axes))
    return Link(port, (source,), lambda a: a.transpose(axes), lambda g: (g.transpose(back),))


def _transposed_conv(port: str, source: str, groups: int) -> Link:
    """(I, O/g, *k) to (O, *k, I/g), where each group keeps its own block of inputs and outputs."""

    def forward(a: Array) -> Array:
        inputs, outputs, *kernel = a.shape
        blocks = a.reshape(groups, inputs // groups, outputs, *kernel)
        last = blocks.ndim - 1
        blocks = blocks.transpose(0, 2, *range(3, last + 1), 1)  # (g, O/g, *k, I/g)
        return blocks.reshape(groups * outputs, *kernel, inputs // groups)

    def adjoint(g: Array) -> tuple[Array]:
        outputs, *kernel, inputs = g.shape
        blocks = g.reshape(groups, outputs // groups, *kernel, inputs)
        blocks = blocks.transpose(0, blocks.ndim - 1, 1, *range(2, blocks.ndim - 1))
        return (blocks.reshape(groups * inputs, outputs // groups, *kernel),)

    return Link(port, (source,), forward, adjoint)


def _reordered(port: str, source: str, axis: int, chw: Shape) -> Link:
    """One axis of a Linear's tensors, flattened (C, H, W) there and (H, W, C) here."""
    order = np.arange(math.prod(chw)).reshape(chw).transpose(1, 2, 0).ravel()
    back = np.argsort(order)
    return Link(
        port,
        (source,),
        lambda a: np.take(a, order, axis),
        lambda g: (np.take(g, back, axis),),
    )


def _linear(layer: Any, flatten: Shape | None, unflatten: Shape | None) -> dict[str, _Rule]:
    """Rules for a Linear whose input was, or whose output will be, an image of shape (C, H, W)."""
    for shape, size, what in (
        (flatten, layer.in_features, "flatten"),
        (unflatten, layer.out_features, "unflatten"),
    ):
        if shape is not None and math.prod(shape) != size:
            raise CarryError(
                f"{what}={shape} has {math.prod(shape)} elements where the Linear has {size}"
            )
    rules: dict[str, _Rule] = {"weight": ("weight", _same), "bias": ("bias", _same)}
    if flatten is not None and unflatten is not None:
        raise CarryError("one Linear cannot take both flatten and unflatten: compose two layers")
    if flatten is not None:
        rules["weight"] = ("weight", lambda p, s: _reordered(p, s, 1, flatten))
    if unflatten is not None:
        rules["weight"] = ("weight", lambda p, s: _reordered(p, s, 0, unflatten))
        rules["bias"] = ("bias", lambda p, s: _reordered(p, s, 0, unflatten))
    return rules


_Rule = tuple[str, Callable[[str, str], Link]]
"""The port's name of a tensor and how to make its link from both full names."""

_CONV = (tnn.Conv1d, tnn.Conv2d, tnn.Conv3d)
_CONV_TRANSPOSE = (tnn.ConvTranspose1d, tnn.ConvTranspose2d, tnn.ConvTranspose3d)
_NORM = (
    tnn.LayerNorm,
    tnn.GroupNorm,
    tnn.RMSNorm,
    tnn.BatchNorm1d,
    tnn.BatchNorm2d,
    tnn.BatchNorm3d,
    tnn.InstanceNorm1d,
    tnn.InstanceNorm2d,
    tnn.InstanceNorm3d,
)

PORT_TYPES: dict[type, tuple[type, ...]] = {
    tnn.Linear: (mnn.Linear,),
    tnn.Embedding: (mnn.Embedding,),
    **{c: (m,) for c, m in zip(_CONV, (mnn.Conv1d, mnn.Conv2d, mnn.Conv3d), strict=True)},
    **{
        c: (m,)
        for c, m in zip(
            _CONV_TRANSPOSE,
            (mnn.ConvTranspose1d, mnn.ConvTranspose2d, mnn.ConvTranspose3d),
            strict=True,
        )
    },
}
"""The MLX layers whose layout is known, so that equal shapes are not ambiguous."""


def _rules(layer: tnn.Module, flatten: Shape | None, unflatten: Shape | None) -> dict[str, _Rule]:
    """How the tensors that ``layer`` itself holds are carried, for the known layer types."""
    if isinstance(layer, tnn.Linear):
        return _linear(layer, flatten, unflatten)
    if isinstance(layer, _CONV):
        n = layer.weight.ndim
        axes = (0, *range(2, n), 1)
        return {"weight": ("weight", lambda p, s: _permuted(p, s, axes)), "bias": ("bias", _same)}
    if isinstance(layer, _CONV_TRANSPOSE):
        groups = layer.groups
        return {
            "weight": ("weight", lambda p, s: _transposed_conv(p, s, groups)),
            "bias": ("bias", _same),
        }
    if isinstance(layer, _NORM):
        return {k: (k, _same) for k in ("weight", "bias", "running_mean", "running_var")}
    if isinstance(layer, tnn.Embedding):
        return {"weight": ("weight", _same)}
    return {}


def _recurrent(layer: tnn.Module, source: str, port: str) -> list[Link]:
    """LSTM, GRU and RNN of one layer and one direction: MLX adds the two biases of PyTorch."""
    assert isinstance(layer, tnn.RNNBase)
    if layer.num_layers != 1 or layer.bidirectional:
        raise CarryError(
            f"{source or type(layer).__name__}: MLX's recurrent layers have one layer and one "
            "direction; hold each layer of the PyTorch module against a port of its own"
        )
    x, h = ("Wxh", "Whh") if isinstance(layer, tnn.RNN) else ("Wx", "Wh")
    links = [
        _same(_join(port, x), _join(source, "weight_ih_l0")),
        _same(_join(port, h), _join(source, "weight_hh_l0")),
    ]
    if not layer.bias:
        return links
    biases = (_join(source, "bias_ih_l0"), _join(source, "bias_hh_l0"))
    if not isinstance(layer, tnn.GRU):
        bias = Link(_join(port, "bias"), biases, lambda a, b: a + b, lambda g: (g, g), False)
        return [*links, bias]
    size = layer.hidden_size

    def forward(a: Array, b: Array) -> Array:  # the candidate's hidden bias stays inside the reset
        return np.concatenate([(a + b)[: 2 * size], a[2 * size :]])

    def adjoint(g: Array) -> tuple[Array, Array]:
        return g, np.concatenate([g[: 2 * size], np.zeros_like(g[2 * size :])])

    def adjoint_n(g: Array) -> tuple[Array]:
        return (np.concatenate([np.zeros(2 * size, g.dtype), g]),)

    return [
        *links,
        Link(_join(port, "b"), biases, forward, adjoint, False),
        Link(_join(port, "bhn"), biases[1:], lambda b: b[2 * size :], adjoint_n, False),
    ]


def _join(*parts: str) -> str:
    return ".".join(p for p in parts if p)


@dataclass(frozen=True)
class Plan:
    """Where every tensor of ``reference`` goes in ``port``. Made by :func:`match`."""

    reference: tnn.Module
    port: mnn.Module
    links: tuple[Link, ...]
    ignored: frozenset[str] = field(default_factory=frozenset, kw_only=True)
    """The reference's tensors that nothing of the port stands for: they keep their values."""

    def to_port(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Reference tensors by name to the port's tensors by name."""
        return {
            link.port: np.ascontiguousarray(link.forward(*(tensors[s] for s in link.sources)))
            for link in self.links
        }

    def to_reference(self, gradients: Mapping[str, Array]) -> dict[str, Array]:
        """The port's gradients by name to the reference's, summed where tensors share one."""
        back: dict[str, Array] = {}
        for link in self.links:
            if link.port not in gradients:
                continue
            for source, g in zip(link.sources, link.adjoint(gradients[link.port]), strict=True):
                back[source] = _sum(back[source], g) if source in back else g
        return back

    def values(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The port's tensors by name to the reference's, leaving out what has no inverse."""
        found: dict[str, Array] = {}
        for link in self.links:
            if not link.invertible or link.port not in tensors:
                continue
            for source, a in zip(link.sources, link.adjoint(tensors[link.port]), strict=True):
                found[source] = _sum(found[source], a) if link.partial and source in found else a
        return found

    def load(self, tensors: Mapping[str, Array]) -> None:
        """Put reference tensors, by name, into the port."""
        arrays = []
        for link in self.links:  # one at a time: two copies of all would be much of the memory
            array = link.forward(*(tensors[s] for s in link.sources))
            arrays.append((link.port, mx.array(np.ascontiguousarray(array))))
        self.port.update(tree_unflatten(arrays))

    def carry(self) -> None:
        """Put the reference's present weights into the port.

        Raises :class:`NotFiniteError` where one is NaN or infinite.
        """
        tensors = {}
        for name, tensor in reference_tensors(self.reference).items():
            # NumPy has no bfloat16
            half = tensor.dtype in (torch.bfloat16, torch.float16)
            array = (tensor.float() if half else tensor).detach().cpu().numpy()
            if not np.isfinite(array).all():
                raise NotFiniteError(
                    f"{name} of the reference holds NaN or infinity: nothing can be compared "
                    "with it; check how the weights were made or loaded"
                )
            tensors[name] = array
        self.load(tensors)

    def misplaced(self) -> list[str]:
        """Parameters that became constants in the port, and buffers that it would train."""
        return [line for line, _ in self._misplaced()]

    def unlike(self) -> set[str]:
        """The reference's names of tensors that train on one side only, and have no gradient on the
        other."""
        return {s for _, sources in self._misplaced() for s in sources}

    def _misplaced(self) -> list[tuple[str, tuple[str, ...]]]:
        trained = set(flat(self.port.trainable_parameters()))
        parameters = {k: p.requires_grad for k, p in self.reference.named_parameters()}
        found = []
        for link in self.links:
            right = any(parameters.get(s, False) for s in link.sources)
            if right and link.port not in trained:
                said = f"{link.port} is frozen in the port and trains in the reference"
                found.append((said, link.sources))
            elif not right and link.port in trained:
                kind = "frozen" if link.sources[0] in parameters else "a buffer"
                said = (
                    f"{link.port} trains in the port and is {kind} in the reference: freeze it, "
                    "or start its name with an underscore"
                )
                found.append((said, link.sources))
        return found


def _sum(a: Array, b: Array) -> Array:
    """In float64: a sum of the kit's own making is no rounding of the port's."""
    return np.add(a, b, dtype=np.float64)


def reference_tensors(module: tnn.Module) -> dict[str, torch.Tensor]:
    """Parameters and floating-point buffers by name: what has to be carried."""
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
    kept = module.state_dict()
    for name, buffer in module.named_buffers():
        if name in kept and buffer.is_floating_point():  # not num_batches_tracked, not caches
            tensors[name] = buffer
    return tensors


def match(
    reference: tnn.Module,
    port: mnn.Module,
    *,
    rename: Mapping[str, str] | None = None,
    flatten: Mapping[str, Shape] | None = None,
    unflatten: Mapping[str, Shape] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
) -> Plan:
    """Pair every tensor of ``reference`` with one of ``port``, or say why it cannot be done.

    ``rename`` maps a module or tensor name of the reference to the port's, where they differ.
    ``flatten`` maps a Linear's name to the (C, H, W) of the image that was flattened into it,
    ``unflatten`` to the (C, H, W) that its output is reshaped to. ``axes`` gives the permutation
    of a tensor held outside the known layers: ``{"proj": (1, 0)}``, or ``(0, 1)`` for none.

    Raises :class:`CarryError` on a tensor left over on either side, on a shape that does not fit,
    and on a tensor whose shape cannot tell two layouts apart where no rule decides.
    """
    rename, flatten = dict(rename or {}), dict(flatten or {})
    unflatten, axes = dict(unflatten or {}), dict(axes or {})
    modules = dict(reference.named_modules())
    for option, names in (("flatten", flatten), ("unflatten", unflatten)):
        for name in names:
            if not isinstance(modules.get(name), tnn.Linear):
                raise CarryError(f"{option}: the reference has no Linear called {name!r}")

    wanted = reference_tensors(reference)
    have = flat(port.parameters())
    links: list[Link] = []
    for path, layer in modules.items():
        here = _port_path(path, modules, port, rename)
        own = [_join(path, n) for n, _ in layer.named_parameters(recurse=False)]
        own += [_join(path, n) for n, _ in layer.named_buffers(recurse=False)]
        own = [n for n in own if n in wanted]
        if isinstance(layer, tnn.RNNBase):
            links += _recurrent(layer, path, here)
            continue
        rules = _rules(layer, flatten.get(path), unflatten.get(path))
        for source in own:
            tensor = source.rpartition(".")[2]
            if source in axes:
                link = _permuted(rename.get(source, _join(here, tensor)), source, axes[source])
            elif tensor in rules:
                name, make = rules[tensor]
                link = make(rename.get(source, _join(here, name)), source)
                _check_layout(link, layer, tensor, wanted, have, port, here)
            else:
                link = _same(rename.get(source, _join(here, tensor)), source)
                _check_ambiguous(link, wanted[source].shape, have)
            links.append(link)
    _check_complete(links, wanted, have)
    _check_shapes(links, wanted, have)
    return Plan(reference, port, tuple(links))


def _port_path(
    path: str, modules: Mapping[str, tnn.Module], port: mnn.Module, rename: Mapping[str, str]
) -> str:
    """The port's name for the module ``path``: the same, through Sequential's ``layers``."""
    parts: list[str] = []
    prefix = ""
    for part in path.split(".") if path else []:
        inside = _find(port, parts)
        if isinstance(modules.get(prefix), tnn.Sequential) and isinstance(inside, mnn.Sequential):
            parts.append("layers")
        parts.append(part)
        prefix = _join(prefix, part)
        if prefix in rename:
            parts = rename[prefix].split(".")
    return ".".join(parts)


def _find(port: Any, parts: list[str]) -> Any:
    for part in parts:
        if isinstance(port, list | tuple):
            if not part.isdigit() or int(part) >= len(port):
                return None
            port = port[int(part)]
        else:
            port = getattr(port, part, None)
    return port


def _check_layout(
    link: Link,
    layer: tnn.Module,
    tensor: str,
    wanted: Mapping[str, torch.Tensor],
    have: Mapping[str, mx.array],
    port: mnn.Module,
    here: str,
) -> None:
    """A kernel held by a layer of unknown layout must not fit both with and without the rule."""
    known = next((p for t, p in PORT_TYPES.items() if isinstance(layer, t)), None)
    source = wanted[link.sources[0]]
    if known is None or source.ndim < 2 or link.port not in have:
        return
    if isinstance(_find(port, here.split(".") if here else []), known):
        return
    _check_ambiguous(link, source.shape, have)


def _check_ambiguous(link: Link, shape: torch.Size, have: Mapping[str, mx.array]) -> None:
    """Refuse where another order of the axes would have the same shape."""
    if link.port in have and len(shape) > 1 and len(set(shape)) < len(shape):
        raise CarryError(
            f"{link.name} {list(shape)} -> {link.port}: the shape cannot tell two layouts apart "
            "and no rule decides, since the port's layer is not one of MLX's own; say which with "
            f"axes={{{link.name!r}: ...}}"
        )


def _check_complete(
    links: list[Link], wanted: Mapping[str, torch.Tensor], have: Mapping[str, mx.array]
) -> None:
    lost = sorted(set(wanted) - {s for link in links for s in link.sources})
    missing = [link for link in links if link.port not in have]
    extra = sorted(set(have) - {link.port for link in links})
    lines = [f"  {name} of the reference has no rule" for name in lost]
    lines += [f"  {link.name} of the reference has no {link.port} in the port" for link in missing]
    lines += [f"  {name} of the port is left over" for name in extra]
    if lines:
        raise CarryError(
            "the weights cannot all be carried:\n" + "\n".join(lines) + "\nNames that differ are "
            "paired with rename={reference name: port name}. In MLX, attributes that start with "
            "an underscore and modules held in a tuple are no parameters."
        )


def _check_shapes(
    links: list[Link], wanted: Mapping[str, torch.Tensor], have: Mapping[str, mx.array]
) -> None:
    for link in links:
        sources = [np.zeros(tuple(wanted[s].shape), np.float32) for s in link.sources]
        made, there = link.forward(*sources).shape, tuple(have[link.port].shape)
        if made != there:
            before = " + ".join(str(list(s.shape)) for s in sources)
            raise CarryError(
                f"{link.name} {before} becomes {list(made)} in MLX's layout, but {link.port} of "
                f"the port is {list(there)}"
            )


def carry(reference: tnn.Module, port: mnn.Module, **options: Any) -> Plan:
    """Carry the reference's weights into the port and return the plan. Options: :func:`match`."""
    plan = match(reference, port, **options)
    plan.carry()
    return plan


def channels_last(array: Array) -> Array:
    """(N, C, *spatial) to (N, *spatial, C)."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def channels_first(array: Array) -> Array:
    """(N, *spatial, C) to (N, C, *spatial)."""
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))


def flat(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by dotted name."""
    return dict(tree_flatten(tree))
