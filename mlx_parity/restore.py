"""Leave both models and both random states exactly as they were found, whatever happens between.

The kit works on copies. But a model may change itself when it is called, a user's ``call_port`` may
call the original, and MLX's tracing leaves tracers behind: so what was there is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402


@contextmanager
def restored(reference: Any, port: Any) -> Iterator[None]:
    """Whatever happens within, both trees and both random states are as before afterwards."""
    torch_state, mlx_state = torch.get_rng_state(), _mlx_seed()
    undo = [
        *([_snapshot_reference(reference)] if isinstance(reference, tnn.Module) else []),
        *([_snapshot_port(port)] if isinstance(port, mnn.Module) else []),
    ]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()
        torch.set_rng_state(torch_state)
        mx.random.seed(mlx_state)


def _mlx_seed() -> int:
    """The seed that puts MLX's random state where it is now: its two words are the key."""
    state: Any = mx.random.state
    high, low = (int(word) for word in np.array(state[0]))
    return high << 32 | low


def _snapshot_reference(reference: tnn.Module) -> Callable[[], None]:
    """The kit works on copies; hooks and modes are all that it could touch."""
    modes = [(m, m.training) for m in reference.modules()]

    def put_back() -> None:
        for module, mode in modes:
            module.training = mode

    return put_back


def _snapshot_port(port: mnn.Module) -> Callable[[], None]:
    """Every dict, list and attribute of every module, and the values of the arrays in them."""
    items: list[tuple[Any, Any, dict[str, Any] | None, type]] = []
    arrays: dict[int, tuple[mx.array, mx.array]] = {}
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if isinstance(value, mx.array):
            arrays.setdefault(id(value), (value, mx.array(value)))
            return
        if not isinstance(value, dict | list | tuple) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, dict):
            own = dict(vars(value)) if isinstance(value, mnn.Module) else None
            if own is not None and "_no_grad" in own:
                own["_no_grad"] = set(own["_no_grad"])
            items.append((value, dict(value), own, type(value)))
            children = [*value.values(), *(own or {}).values()]
        else:
            if isinstance(value, list):
                items.append((value, list(value), None, list))
            children = list(value)
        for child in children:
            walk(child)

    walk(port)

    def put_back() -> None:
        for value, content, own, cls in items:
            if isinstance(value, list):
                value[:] = content
                continue
            if isinstance(value, mnn.Module) and type(value) is not cls:
                object.__setattr__(value, "__class__", cls)
            dict.clear(value)
            dict.update(value, content)
            if own is not None:
                vars(value).clear()
                vars(value).update(own)
        for array, before in arrays.values():
            if array.shape != before.shape or not mx.array_equal(array, before, equal_nan=True):
                array[...] = before  # changed in place

    return put_back
