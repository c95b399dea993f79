"""Probes of the places that drawn points never reach: kinks, ties, saturation, constant data.

Two frameworks may differ at a single point of measure zero and still be used there all the time: a
blank image, a zero bias, a flat region, a confident discriminator. A difference there is a verdict
of its own, since a port that agrees everywhere else is not wrong in the same sense: subgradients at
a kink are a choice. NaN where the original has a number is never one.

Nothing can be averaged over at a single point. Equal means within a few units in the last place of
the largest number, and of what PyTorch's own float32 is off.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.bench import Bench
from mlx_parity.equality import ELEMENT_FLOOR, FLOOR
from mlx_parity.localise import pairs

require_mlx()

import mlx.nn as mnn  # noqa: E402

Place = Literal["kink", "ties", "saturation", "constant"]

TRAPS: dict[Place, str] = {
    "kink": "leaky-relu-kink",
    "ties": "maximum-ties",
    "saturation": "bce-saturation",
    "constant": "std-gradient-at-zero",
}
"""The trap that a difference at each kind of place is an instance of."""

_ULPS = FLOOR * ELEMENT_FLOOR
"""How many units in the last place, the same allowance that a single element has elsewhere."""


@dataclass(frozen=True)
class Probe:
    """What one module does at one special place."""

    where: str
    place: Place
    ok: bool
    detail: str = ""

    @property
    def trap_id(self) -> str:
        return TRAPS[self.place]

    def __str__(self) -> str:
        return f"{self.where}, {self.place}: {'equal' if self.ok else self.detail}"


def probe(reference: tnn.Module, port: mnn.Module, mapping: Any = None) -> list[Probe]:
    """Probe every pair of activations, pools and normalisations of two models.

    Both models must hold the same weights. Neither is changed. Functions called inside a module of
    one's own are out of sight: use :func:`probe_at` with that module and inputs of your own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paired = pairs(reference, port, mapping)
    found = []
    for pair in paired:
        for place, x in _places(pair.reference):
            where = pair.reference_path or type(pair.reference).__name__
            try:
                found.append(probe_at(pair.reference, pair.port, (x,), place, where))
            except RuntimeError:  # it takes other inputs than its kind does
                continue
    return found


def probe_at(
    reference: tnn.Module,
    port: mnn.Module,
    inputs: tuple[np.ndarray, ...],
    place: Place,
    where: str = "",
) -> Probe:
    """Compare outputs and gradients at exactly ``inputs``, in the reference's layout.

    Raises RuntimeError where the port does not take them.
    """
    ones = place != "constant"  # a normalisation's gradient of a constant cotangent is zero
    bench = Bench(reference, port, inputs, {}, gradients=True, exact=True, ones=ones)
    right = bench.run(bench.oracle, bench.points[0])
    for name, wanted in right.items():
        got = bench.ported[0].get(name)
        if got is None or name.startswith("w/"):
            continue
        what = f"the gradient of input {name[7:]}" if name.startswith("d/") else name
        if not np.isfinite(got).all():
            if np.isfinite(wanted).all():
                return Probe(where, place, False, f"{what} is {got[~np.isfinite(got)][0]}")
            continue
        off = np.abs(got - wanted)
        largest = np.abs(wanted).max(initial=1.0 if name.startswith("d/") else 1e-30)
        unit = float(np.spacing(np.float32(largest)))
        allowed = _ULPS * (np.abs(bench.rounding[0][name]) + unit)
        if (off > allowed).any():
            at = np.unravel_index(int(np.argmax(off - allowed)), off.shape)
            index = [int(i) for i in at]
            said = f"{what} is {got[at]:.4g} at {index}, the original's {wanted[at]:.4g}"
            return Probe(where, place, False, said)
    return Probe(where, place, True)


_ACTIVATIONS = (
    *(tnn.ReLU, tnn.LeakyReLU, tnn.PReLU, tnn.ELU, tnn.CELU, tnn.SELU, tnn.GELU, tnn.SiLU),
    *(tnn.Mish, tnn.Sigmoid, tnn.Tanh, tnn.Softplus, tnn.ReLU6, tnn.Hardswish, tnn.LogSigmoid),
)


def _places(module: tnn.Module) -> Iterator[tuple[Place, np.ndarray]]:
    """The special inputs of a layer by its type."""
    if isinstance(module, _ACTIVATIONS):
        yield "kink", np.array([[0.0, -1.0, 0.0, 2.0]])
        yield "saturation", np.array([[20.0, -20.0, 90.0, -90.0]])
    elif isinstance(module, tnn.MaxPool2d | tnn.AvgPool2d):
        yield "ties", np.ones((1, 2, 8, 8))
    elif isinstance(module, tnn.Softmax | tnn.LogSoftmax):
        yield "saturation", np.array([[0.0, 90.0, -90.0]])
    elif isinstance(module, tnn.LayerNorm):
        yield "constant", np.ones((2, *module.normalized_shape))
    elif isinstance(module, tnn.RMSNorm):
        yield "constant", np.zeros((2, *module.normalized_shape))
    elif isinstance(module, tnn.GroupNorm):
        yield "constant", np.ones((2, module.num_channels, 3, 4))
    elif isinstance(module, tnn.BatchNorm1d):
        yield "constant", np.ones((4, module.num_features))
    elif isinstance(module, tnn.BatchNorm2d | tnn.InstanceNorm2d):
        yield "constant", np.ones((2, module.num_features, 3, 4))
