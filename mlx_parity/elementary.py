"""MLX's error function in the yardstick.

What PyTorch's rounding comes to in the port's precision is the measure of what may differ. That
is right where both libraries' functions are good to a few units in the last place. MLX's ``erf`` on
a CPU is not: it is formula 7.1.26 of Abramowitz and Stegun (1964), good to 1.5e-7 of 1 and not of
its value, and near zero the difference of two numbers of about 1. Measured on MLX 0.32.4 against
float64: off by up to 6e-7, which is 1.5 units in the last place (root mean square) from 1 to 3, 50
from 0.01 to 0.1, and up to 40,000 at 1e-4. Of that, 1.5e-7 is the formula's own and alike at all
nearby points: a bias, and no port's fault. Of 150 arrays of drawn shapes, 3 had an ``mx.erf`` that
was called different from ``torch.erf``.

So where the reference computes an ``erf``, its own or an exact GELU's, the yardstick takes MLX's
values for it: the error that the function makes is measured at the very numbers in play, and the
oracle stays exact. A GPU's ``erf`` is another, and is then the yardstick's too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from mlx_parity._backend import require_mlx

require_mlx()

import mlx.core as mx  # noqa: E402


class OfMLX(TorchFunctionMode):
    """A context in which PyTorch's ``erf`` and exact GELU, but for float64, have MLX's values.

    Their derivatives stay PyTorch's, which are MLX's formulas too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _erf(x: Any, **kwargs: Any) -> Any:
    return torch.erf(x, **kwargs) if kwargs or not _rounded(x) else _of_mlx(x.float()).to(x.dtype)


def _gelu(x: Any, approximate: str = "none", **kwargs: Any) -> Any:
    if approximate != "none" or kwargs or not _rounded(x):
        return torch.nn.functional.gelu(x, approximate=approximate, **kwargs)
    whole = x.float()
    return (whole * 0.5 * (1 + _of_mlx(whole / math.sqrt(2)))).to(x.dtype)


def _rounded(x: Any) -> bool:
    """Whether it is in one of the precisions that MLX computes in."""
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _of_mlx(x: torch.Tensor) -> torch.Tensor:
    """``erf`` of a float32 tensor with MLX's values and PyTorch's derivatives."""
    y = torch.erf(x)
    try:
        ours = np.array(mx.erf(mx.array(x.detach().cpu().numpy())))
    except (RuntimeError, TypeError):  # within torch.func tensors have no values of their own
        return y
    return y + (torch.from_numpy(ours).to(x.device) - y.detach())


_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.erf: _erf,
    torch.Tensor.erf: _erf,
    torch.special.erf: _erf,
    torch.nn.functional.gelu: _gelu,
}
