"""A call of a torch function, and what may be changed about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

T = torch.Tensor

PARAMETERS: dict[str, tuple[str, ...]] = {
    "gelu": ("input", "approximate"),
    "linear": ("input", "weight", "bias"),
    "avg_pool2d": (
        *("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
        "divisor_override",
    ),
    "softplus": ("input", "beta", "threshold"),
    "scaled_dot_product_attention": (
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"),
    ),
    "cat": ("tensors", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "roll": ("input", "shifts", "dims"),
    "split": ("tensor", "split_size_or_sections", "dim"),
    "max_pool2d": (
        *("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
        "return_indices",
    ),
    **{
        f"conv{n}d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        for n in (1, 2, 3)
    },
    **{
        f"conv_transpose{n}d": (
            *("input", "weight", "bias", "stride", "padding", "output_padding", "groups"),
            "dilation",
        )
        for n in (1, 2, 3)
    },
    **dict.fromkeys(("softmax", "log_softmax"), ("input", "dim", "dtype")),
}
"""Names of the arguments of functions that are built in and have no signature."""


@dataclass(frozen=True)
class Call:
    """One call of a torch function."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return getattr(self.func, "__name__", "")

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def _names(self) -> tuple[str, ...]:
        if self.name in PARAMETERS and not inspect.isfunction(self.func):
            return PARAMETERS[self.name]
        try:
            return tuple(inspect.signature(self.func).parameters)
        except (TypeError, ValueError):
            return PARAMETERS.get(self.name, ())

    def get(self, name: str, default: Any = None) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        names = self._names()
        if name in names and names.index(name) < len(self.args):
            return self.args[names.index(name)]
        return default

    def run(self, **changed: Any) -> Any:
        """Call the function with some arguments changed."""
        args, kwargs = list(self.args), dict(self.kwargs)
        names = self._names()
        for name, value in changed.items():
            if name in names and names.index(name) < len(args):
                args[names.index(name)] = value
            else:
                kwargs[name] = value
        return self.func(*args, **kwargs)


@dataclass(frozen=True)
class Change:
    """One call done otherwise."""

    trap_id: str
    what: str
    run: Callable[..., Any]
    fit: tuple[float, bool] | None = None
    """Where ``run`` takes a number as well: its value in the reference, and whether to search in
    its logarithm."""


Proposals = Iterator[Change]

Proposer = Callable[[Call], Proposals]
"""What might be changed about a call of one function."""


def ints(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)
