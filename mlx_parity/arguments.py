"""What both sides are called with: the user's inputs, keyword arguments and targets, as named
arrays that can be varied and put back into their places.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.errors import ParityError
from mlx_parity.structure import is_array, is_floating, leaves, replace

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402


@dataclass
class Arguments:
    """The arrays of one call by name, and the places in the call that they came from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: dict[str, str]
    """Place to name."""
    arrays: dict[str, np.ndarray]
    """What is varied, in the reference's layout; the targets of the loss are among them."""
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    """What is not: masks that hold infinities."""
    targets: tuple[str, ...] = ()

    def filled(self, arrays: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with ``arrays`` in their places."""
        both = replace(
            {"args": self.args, "kwargs": self.kwargs},
            lambda place, a: arrays[self.names[place]],
        )
        return both["args"], both["kwargs"]

    def model(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``arrays`` that the model takes, without the loss's targets."""
        return {n: a for n, a in arrays.items() if n not in self.targets}

    def loss(self, arrays: Mapping[str, Any]) -> list[Any]:
        """Those of ``arrays`` that the loss takes after the output."""
        return [arrays[n] for n in self.targets]


def read(
    inputs: Any,
    kwargs: Mapping[str, Any],
    targets: Any,
    names: Sequence[str],
    rng: np.random.Generator,
) -> Arguments:
    """The user's arguments; ``names`` are those of the reference's positional parameters.

    Raises :class:`ParityError` for an array that is empty or holds NaN.
    """
    given = inputs(rng) if callable(inputs) and not is_array(inputs) else inputs
    if isinstance(given, Mapping):
        args: tuple[Any, ...] = ()
        kwargs = {**given, **kwargs}
    else:
        args = tuple(given) if isinstance(given, tuple | list) else (given,)
    kwargs = dict(kwargs)
    both = {"args": args, "kwargs": kwargs}
    places = _named(both, names)
    arrays = {places[p]: plain(a) for p, a in leaves(both).items()}
    several = targets if isinstance(targets, tuple | list) else (targets,)
    target_names = tuple(
        f"target{i}" if len(several) > 1 else "target" for i in range(len(several))
    )
    arrays |= {n: plain(a) for n, a in zip(target_names, several, strict=True)}
    if not arrays:
        raise ParityError(
            "inputs holds no array: give what both models are called with, as arrays of NumPy, "
            "PyTorch or MLX, alone, in a tuple of arguments or in a dict by name"
        )
    constants = {n: a for n, a in arrays.items() if _is_constant(n, a)}
    varied = {n: a for n, a in arrays.items() if n not in constants}
    return Arguments(args, kwargs, places, varied, constants, target_names)


def _named(both: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Place to name: by the reference's signature where it tells."""
    found: dict[str, str] = {}
    for place in leaves(both):
        kind, _, rest = place.partition(".")
        if kind == "args":
            at, _, deeper = rest.partition(".")
            first = names[int(at)] if int(at) < len(names) else f"input{at}"
            found[place] = "_".join(p for p in (first, deeper.replace(".", "_")) if p)
        else:
            found[place] = rest.replace(".", "_")
    return found


def _is_constant(name: str, array: np.ndarray) -> bool:
    """Whether an input is not varied, having infinities; refused where empty or NaN."""
    if array.size == 0:
        raise ParityError(
            f"input {name!r} has shape {list(array.shape)}, which holds nothing: give a "
            "batch of at least 1"
        )
    if np.iscomplexobj(array):
        raise ParityError(
            f"input {name!r} is complex: pass its real and imaginary part, and join them in "
            "call_reference= and call_port="
        )
    if not is_floating(array):
        return False
    if np.isnan(array).any():
        raise ParityError(f"input {name!r} holds NaN: clean the data before comparing")
    return bool(np.isinf(array).any())


def suited(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as ``model`` takes them, where it takes them otherwise than the reference:
    by ``names`` what that takes by position, or by position what it takes by name."""
    kwargs = dict(kwargs)
    function = type(model).__call__ if isinstance(model, mnn.Module) else model
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return args, kwargs
    own = (model,) if function is not model else ()
    by_name = dict(zip(names, args, strict=False))
    order = [n for n in signature.parameters if n in by_name]
    if len(order) == len(args) and order != list(by_name):
        return (), by_name | kwargs  # the same names in another order
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [(args, kwargs)]
    ways += [
        (args[:n], {**dict(list(by_name.items())[n:]), **kwargs})
        for n in range(len(args) - 1, -1, -1)
    ]
    in_order = [n for n in names if n in kwargs]
    for k in range(1, len(in_order) + 1):
        first = in_order[:k]
        ways.append((args + tuple(kwargs[n] for n in first), _less(kwargs, first)))
    for some, named in ways:
        try:
            signature.bind(*own, *some, **named)
        except TypeError:
            continue
        return some, named
    return args, kwargs


def _less(kwargs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {n: a for n, a in kwargs.items() if n not in names}


def positional(model: Any) -> list[str]:
    """The names of what a module or a function takes by position; none where it does not say."""
    function = model.forward if isinstance(model, tnn.Module) else model
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in plain]


def plain(array: Any) -> np.ndarray:
    """NumPy's array; real numbers in float32."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    elif isinstance(array, mx.array):
        array = np.array(array.astype(mx.float32) if is_floating(array) else array)
    return array.astype(np.float32) if is_floating(array) else np.asarray(array)
