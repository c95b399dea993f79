"""What models take and give: arrays, alone or in tuples, lists, dicts, dataclasses and objects."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from mlx_parity._backend import require_mlx

require_mlx()

import mlx.core as mx  # noqa: E402

DEPTH = 8
"""How deep arrays are looked for; what lies deeper is somebody's own graph."""


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | torch.Tensor | mx.array)


def is_floating(value: Any) -> bool:
    """Whether an array of any of the three libraries holds real numbers."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    if isinstance(value, mx.array):
        return bool(mx.issubdtype(value.dtype, mx.floating))
    return isinstance(value, np.ndarray) and bool(np.issubdtype(value.dtype, np.floating))


def leaves(value: Any) -> dict[str, Any]:
    """The arrays in a value by their place: ``""`` for an array alone, ``0``, ``logits``, ``1.h``.

    Lists, tuples, mappings, dataclasses and plain objects are looked into; modules are not.
    """
    found: dict[str, Any] = {}

    def walk(item: Any, place: str, depth: int) -> None:
        if is_array(item):
            found[place] = item
        elif depth < DEPTH:
            for key, child in _children(item):
                walk(child, f"{place}.{key}" if place else str(key), depth + 1)

    walk(value, "", 0)
    return found


def _children(item: Any) -> list[tuple[Any, Any]]:
    if isinstance(item, torch.nn.Module) or hasattr(item, "trainable_parameters"):
        return []
    if isinstance(item, Mapping):
        return list(item.items())
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return list(zip(item._fields, item, strict=True))
    if isinstance(item, list | tuple):
        return list(enumerate(item))
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return [(f.name, getattr(item, f.name)) for f in dataclasses.fields(item)]
    if hasattr(item, "__dict__") and not isinstance(item, type) and not callable(item):
        return [(k, v) for k, v in vars(item).items() if not k.startswith("_")]
    return []


def replace(value: Any, change: Callable[[str, Any], Any]) -> Any:
    """A copy of ``value`` with each array ``a`` at ``place`` replaced by ``change(place, a)``."""

    def walk(item: Any, place: str, depth: int) -> Any:
        if is_array(item):
            return change(place, item)
        children = _children(item) if depth < DEPTH else []
        if not children:
            return item
        new = {k: walk(c, f"{place}.{k}" if place else str(k), depth + 1) for k, c in children}
        if all(new[k] is c for k, c in children):
            return item
        return _rebuilt(item, new)

    return walk(value, "", 0)


def in_containers(value: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """As :func:`replace`, in dicts, lists and tuples alone: an object, such as a cache that a layer
    reads and writes, keeps arrays of its own library."""

    def below(key: Any) -> str:
        return f"{name}.{key}" if name else str(key)

    if is_array(value):
        return change(name, value)
    if type(value) is dict:
        return {k: in_containers(v, change, below(k)) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(in_containers(v, change, below(i)) for i, v in enumerate(value)))
    if type(value) in (tuple, list):
        return type(value)(in_containers(v, change, below(i)) for i, v in enumerate(value))
    return value


def fresh(value: Any) -> Any:
    """A copy of a call's arguments that another call will not change: what is neither an array nor
    a module, such as a cache that a layer writes to, is copied; arrays and modules are shared."""
    if is_array(value) or callable(value) or isinstance(value, type):
        return value
    if type(value) in (list, tuple):
        return type(value)(map(fresh, value))
    if type(value) is dict:
        return {k: fresh(v) for k, v in value.items()}
    try:
        return copy.deepcopy(value, {id(a): a for a in leaves(value).values()})
    except Exception:  # somebody's own object, which need not allow it
        return value


def _rebuilt(item: Any, new: dict[Any, Any]) -> Any:
    if type(item) is dict:
        return new
    if type(item) in (list, tuple):
        return type(item)(new.values())
    if isinstance(item, tuple):
        return type(item)(*new.values())
    made = copy.copy(item)
    for key, value in new.items():
        if isinstance(item, Mapping | list):
            made[key] = value
        else:
            object.__setattr__(made, key, value)
    return made


def complete_port(module: Any) -> list[str]:
    """Give a port's modules what ``nn.Module.__init__`` would have, and name the classes of those
    that never called it: they compute, and raise at ``trainable_parameters`` and ``training``."""
    found: list[str] = []
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if id(value) in seen or not isinstance(value, dict | list | tuple):
            return
        seen.add(id(value))
        if hasattr(type(value), "trainable_parameters"):
            own = vars(value)
            if "_no_grad" not in own or "_training" not in own:
                found.append(type(value).__name__)
                object.__setattr__(value, "_no_grad", own.get("_no_grad", set()))
                object.__setattr__(value, "_training", own.get("_training", True))
        for child in value.values() if isinstance(value, dict) else value:
            walk(child)

    walk(module)
    return list(dict.fromkeys(found))


def copy_port(module: Any) -> Any:
    """An MLX module with every module, container and array in it copied.

    ``copy.deepcopy`` stops at what cannot be pickled, such as the function of ``nn.ReLU``; whatever
    is no part of the tree is shared here.
    """
    made: dict[int, Any] = {}

    def walk(value: Any) -> Any:
        if id(value) in made:
            return made[id(value)]
        if isinstance(value, mx.array):
            made[id(value)] = mx.array(value)
        elif isinstance(value, dict) and hasattr(value, "trainable_parameters"):
            new = type(value).__new__(type(value))
            made[id(value)] = new
            dict.update(new, {k: walk(v) for k, v in value.items()})
            vars(new).update({k: walk(v) for k, v in vars(value).items()})
        elif type(value) in (dict, list, set):
            made[id(value)] = new = type(value)()
            if isinstance(value, dict):
                new.update({k: walk(v) for k, v in value.items()})
            elif isinstance(value, list):
                new.extend(map(walk, value))
            else:
                new.update(value)
        elif type(value) is tuple:
            made[id(value)] = tuple(map(walk, value))
        else:
            return value
        return made[id(value)]

    return walk(module)
