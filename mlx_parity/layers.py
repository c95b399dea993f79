"""The layers of both module trees: what holds tensors of its own, by path and by role.

Most layers are modules. PyTorch's recurrent and attention modules hold several layers in one and
are taken apart, because MLX has a module for each; a parameter that a container holds is one too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.layout import Shape

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor, or the rows ``start`` to ``stop`` of one."""

    name: str
    shape: Shape
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """What holds tensors of its own: a module, a part of one, or a lone parameter."""

    path: str
    kind: str
    tensors: Mapping[str, Source]
    """By role: ``weight``, ``bias``, ``running_mean``, or the tensor's own name."""
    module: Any
    order: int
    part: str = ""
    """Within a recurrent or an attention module: ``l0_reverse``, ``q``."""

    @property
    def name(self) -> str:
        return ".".join(p for p in (self.path, self.part) if p)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for layers whose tensors may stand for one another in some layout."""
        family = self.kind if self.kind in ("lstm", "gru", "rnn") else ""
        if family:
            return (family, *sorted(s.shape for s in self.tensors.values() if len(s.shape) == 2))
        return (family, *sorted(squeezed(s.shape) for s in self.tensors.values()))


def squeezed(shape: Shape) -> Shape:
    """The sizes above 1 in order of size: what every layout of a tensor has in common."""
    return tuple(sorted(n for n in shape if n != 1))


_KINDS: tuple[tuple[str, tuple[type, ...], tuple[type, ...]], ...] = (
    ("linear", (tnn.Linear,), (mnn.Linear,)),
    ("conv", (tnn.Conv1d, tnn.Conv2d, tnn.Conv3d), (mnn.Conv1d, mnn.Conv2d, mnn.Conv3d)),
    (
        "conv_transpose",
        (tnn.ConvTranspose1d, tnn.ConvTranspose2d, tnn.ConvTranspose3d),
        (mnn.ConvTranspose1d, mnn.ConvTranspose2d, mnn.ConvTranspose3d),
    ),
    ("embedding", (tnn.Embedding,), (mnn.Embedding,)),
    (
        "norm",
        (
            tnn.LayerNorm,
            tnn.RMSNorm,
            tnn.GroupNorm,
            tnn.modules.batchnorm._NormBase,  # batch and instance norms of every rank
        ),
        (mnn.LayerNorm, mnn.RMSNorm, mnn.GroupNorm, mnn.BatchNorm, mnn.InstanceNorm),
    ),
    ("lstm", (tnn.LSTM,), (mnn.LSTM,)),
    ("gru", (tnn.GRU,), (mnn.GRU,)),
    ("rnn", (tnn.RNN,), (mnn.RNN,)),
)


def kind(module: Any) -> str:
    """The family of a layer by its type, or "" for one of the user's own."""
    for name, theirs, ours in _KINDS:
        if isinstance(module, theirs + ours):
            return name
    if isinstance(module, mnn.Module) and {"Wx", "Wh"} <= module.keys():  # written out in a port
        rows, size = module["Wh"].shape
        return {4: "lstm", 3: "gru" if "bhn" in module else ""}.get(rows // size, "")
    return ""


def port_modules(port: mnn.Module) -> dict[str, mnn.Module]:
    """Every module of the port by path, once, in order of definition.

    Also those that MLX itself does not see, being held in a tuple.
    """
    found: dict[str, mnn.Module] = {}
    seen: set[int] = set()

    def walk(value: Any, path: str) -> None:
        if isinstance(value, mnn.Module):
            if id(value) in seen:
                return
            seen.add(id(value))
            found[path] = value
        if isinstance(value, dict):
            items: Iterator[tuple[Any, Any]] = iter(value.items())
        elif isinstance(value, list | tuple):
            items = iter(enumerate(value))
        else:
            return
        if not isinstance(value, mnn.Module):
            if id(value) in seen:
                return
            seen.add(id(value))
        for key, child in items:
            walk(child, f"{path}.{key}" if path else str(key))

    walk(port, "")
    return found


def reference_layers(reference: tnn.Module, tensors: Mapping[str, Any]) -> list[Layer]:
    """The reference's layers in order of definition. ``tensors`` are those to be carried."""
    names = {id(t): n for n, t in reversed(list(tensors.items()))}  # a tied tensor's first name
    layers: list[Layer] = []

    def source(tensor: Any, rows: tuple[int, int] | None = None) -> Source:
        shape = tuple(tensor.shape)
        return Source(
            names[id(tensor)], shape if rows is None else (rows[1] - rows[0], *shape[1:]), rows
        )

    def add(path: str, kind: str, roles: dict[str, Source], module: Any, part: str = "") -> None:
        if roles:
            layers.append(Layer(path, kind, roles, module, len(layers), part))

    for path, module in reference.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        own |= dict(module.named_buffers(recurse=False, remove_duplicate=False))
        own = {n: t for n, t in own.items() if id(t) in names}
        if isinstance(module, tnn.RNNBase):
            for k in range(module.num_layers):
                for way in ("", "_reverse") if module.bidirectional else ("",):
                    part = f"l{k}{way}"
                    roles = {
                        n.removesuffix(f"_{part}"): source(t)
                        for n, t in own.items()
                        if n.endswith(f"_{part}")
                    }
                    add(path, _rnn_kind(module), roles, module, part)
            continue
        if isinstance(module, tnn.MultiheadAttention):
            _attention(path, module, own, source, add)
            continue
        known = kind(module)
        if known or (own and not list(module.children()) and "weight" in own):
            add(path, known, {n: source(t) for n, t in own.items()}, module)
        else:
            for name, tensor in own.items():
                add(path, "parameter", {name: source(tensor)}, module, name)
    return layers


def _rnn_kind(module: tnn.RNNBase) -> str:
    return {"LSTM": "lstm", "GRU": "gru"}.get(module.mode, "rnn")


def _attention(path: str, module: Any, own: dict[str, Any], source: Any, add: Any) -> None:
    """Query, key and value of PyTorch's attention, fused or not, as three linear layers."""
    size = module.embed_dim
    for i, part in enumerate("qkv"):
        rows = (i * size, (i + 1) * size)
        roles = {}
        if "in_proj_weight" in own:
            roles["weight"] = source(own["in_proj_weight"], rows)
        elif f"{part}_proj_weight" in own:
            roles["weight"] = source(own[f"{part}_proj_weight"])
        if "in_proj_bias" in own:
            roles["bias"] = source(own["in_proj_bias"], rows)
        add(path, "linear", roles, module, f"{part}_proj")
    for name in ("bias_k", "bias_v"):
        if name in own:
            add(path, "parameter", {name: source(own[name])}, module, name)


def port_layers(port: mnn.Module, arrays: Mapping[str, mx.array]) -> list[Layer]:
    """The port's layers in order of definition. ``arrays`` are its parameters by name."""
    modules = port_modules(port)
    own: dict[str, dict[str, mx.array]] = defaultdict(dict)
    for name, array in arrays.items():
        owner = _owner(name, modules)
        own[owner][name] = array
    layers: list[Layer] = []
    for path, module in modules.items():
        held = own.get(path, {})
        if not held:
            continue
        sources = {n: Source(n, tuple(a.shape)) for n, a in held.items()}
        local = {n: n[len(path) + 1 :] if path else n for n in held}
        known = kind(module)
        if known or (not _has_children(module) and any(local[n] == "weight" for n in held)):
            roles = {local[n]: s for n, s in sources.items()}
            layers.append(Layer(path, known, roles, module, len(layers)))
        else:
            for n, s in sources.items():
                layers.append(
                    Layer(path, "parameter", {local[n]: s}, module, len(layers), local[n])
                )
    for name in set(own) - set(modules):  # shared modules under their second name
        for n, a in own[name].items():
            layers.append(
                Layer(name, "parameter", {n: Source(n, tuple(a.shape))}, port, len(layers), n)
            )
    return layers


def _has_children(module: mnn.Module) -> bool:
    return len(port_modules(module)) > 1


def _owner(name: str, modules: Mapping[str, Any]) -> str:
    path = name
    while path and path not in modules:
        path = path.rpartition(".")[0]
    return path


def plain_path(path: str, port: mnn.Module, modules: Mapping[str, mnn.Module]) -> str:
    """A port's path without the ``layers`` that MLX's Sequential puts in."""
    parts: list[str] = []
    walked = ""
    for part in path.split(".") if path else []:
        inside_sequential = isinstance(modules.get(walked), mnn.Sequential) and part == "layers"
        walked = f"{walked}.{part}" if walked else part
        if not inside_sequential:
            parts.append(part)
    return ".".join(parts)
