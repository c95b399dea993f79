"""The catalogue of traps: known ways in which an MLX port comes to differ from its original.

Each entry has a stable id, an explanation with what was measured, the line to change, and a small
example on both sides whose naive port fails and whose fixed port passes. ``docs/traps`` is
generated from it: ``python -m mlx_parity.traps.pages docs/traps``.
"""

import difflib

# In the order of the pages, which is the order in which traps register themselves.
from mlx_parity.traps import optimizers as _optimizers  # isort: skip
from mlx_parity.traps import norms as _norms  # isort: skip
from mlx_parity.traps import losses as _losses  # isort: skip
from mlx_parity.traps import layout_state as _layout_state  # isort: skip
from mlx_parity.traps import layers as _layers  # isort: skip
from mlx_parity.traps import operations as _operations  # isort: skip
from mlx_parity.traps import arrangement as _arrangement  # isort: skip
from mlx_parity.traps import compile as _compile  # isort: skip
from mlx_parity.traps.trap import CATALOGUE, NOISY, Outcome, Trap, held

FAMILIES = {
    _optimizers.__name__.rpartition(".")[2]: "Optimizers and schedules",
    _norms.__name__.rpartition(".")[2]: "Normalisation",
    _losses.__name__.rpartition(".")[2]: "Losses",
    _layout_state.__name__.rpartition(".")[2]: "Layout, weights, state",
    _layers.__name__.rpartition(".")[2]: "Layers",
    _operations.__name__.rpartition(".")[2]: "Operations, gradients, number types",
    _arrangement.__name__.rpartition(".")[2]: "Positions, orders, and which tensor is read",
    _compile.__name__.rpartition(".")[2]: "mx.compile",
}
"""Title of each family, in the order of the pages."""


def find(id: str) -> type[Trap]:
    """The trap called ``id``. KeyError, with the ids that are near, where there is none."""
    if id in CATALOGUE:
        return CATALOGUE[id]
    near = difflib.get_close_matches(id, CATALOGUE, n=3, cutoff=0.4)
    meant = f"; did you mean {', '.join(near)}?" if near else ""
    raise KeyError(f"there is no trap {id!r}{meant}")


__all__ = ["CATALOGUE", "FAMILIES", "NOISY", "Outcome", "Trap", "find", "held"]
