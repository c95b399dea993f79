"""The oracle computes in float64 to the last, whatever precision its model asks for by name.

Published models cast in passing: a norm takes its mean square in float32, an attention its softmax,
a timestep is made a float, a table of frequencies is an ``arange`` of that type. Left so in a model
of doubles, the oracle would round where it must not, or raise at the first product of both types.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MADE = frozenset(
    {
        torch.arange,
        torch.empty,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.tensor,
        torch.zeros,
    }
)
"""Functions that make a tensor of PyTorch's default type where none is said. Random ones are left:
another type draws other numbers."""


class InDouble(TorchFunctionMode):
    """A context in which a model that asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if any(a is torch.float32 for a in (*args, *kwargs.values())):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in kwargs.items()}
        made = func(*args, **kwargs)
        if func in MADE and made.dtype == torch.float32 and kwargs.get("dtype") is None:
            return func(*args, **kwargs | {"dtype": torch.float64})
        return made
