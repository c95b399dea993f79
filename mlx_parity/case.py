"""What is held against what: a case draws shapes, builds both sides, and draws the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from hypothesis.strategies import SearchStrategy

Shape = Mapping[str, Any]
"""A drawn shape by name, for instance ``{"batch": 3, "image_size": (5, 7)}``."""

Side = Literal["documented", "canonical"]
Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Loss:
    """A scalar of the inputs, and the names of the modules that minimise it."""

    function: Callable[..., Any]
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class System:
    """One side of a case: the same Python builds it from PyTorch's modules or from MLX's.

    ``forward`` maps the inputs, by keyword, to named outputs; ``losses`` are functions of the same
    inputs. ``step(*modules, *optimizers, *inputs)`` is one training step; it returns its losses in
    the order of ``losses`` and leaves modules and optimizers updated.
    """

    modules: Mapping[str, Any] = field(default_factory=dict)
    forward: Callable[..., Mapping[str, Any]] | None = None
    losses: Mapping[str, Loss] = field(default_factory=dict)
    optimizers: Mapping[str, Any] = field(default_factory=dict)
    """By the name of the module that they update, in the order in which ``step`` takes them."""
    step: Callable[..., Sequence[Any]] | None = None


@dataclass(frozen=True)
class Case:
    """A model, a loss or a whole training system, on both sides.

    ``build(library, shape)`` makes a :class:`System` from ``reference`` or from ``port``, whatever
    these are (modules with equal names, usually). ``inputs(shape, rng)`` draws named arrays in the
    reference's layout; those named in ``images``, inputs or outputs, are (N, C, *spatial) there and
    (N, *spatial, C) in MLX. ``carry`` gives each module's options for :func:`mlx_parity.match`.
    """

    name: str
    shapes: SearchStrategy[Shape]
    build: Callable[[Any, Shape], System]
    reference: Any
    port: Any
    inputs: Callable[[Shape, np.random.Generator], dict[str, np.ndarray]]
    side: Side | None = None
    """As a document writes it, repaired, or as the field does it; for the card only."""
    images: frozenset[str] = frozenset()
    carry: Callable[[Shape], Mapping[str, Mapping[str, Any]]] = lambda shape: {}
    plan: Callable[..., Any] | None = None
    """``plan(reference, port, **carry)`` makes a module's :class:`mlx_parity.Plan`, where names and
    layer types do not tell and :func:`mlx_parity.match` would refuse."""
    weights: Callable[[Shape, np.random.Generator], Mapping[str, np.ndarray]] = lambda *_: {}
    """Tensors by ``module.tensor``, in the reference's layout, instead of the ladder's own draw:
    trained weights, or a parameter with a range of its own."""
    dtype: Precision = "float32"
    """What the port computes in. In half precision the oracle is still the reference in float64,
    and the yardstick the reference in the same half precision: its noise, and its bias."""
    held: Precision = "float32"
    """What the port's modules hold. Half as ``dtype``: both sides are half throughout, weights and
    optimizer too. Float32 beside a half ``dtype``: mixed precision with master weights, which
    ``build`` sees to in the port; the reference runs as it is under ``torch.autocast``."""
    compile_step: Callable[..., Callable[..., Any]] | None = None
    """The port's own ``compile_step(step, *stateful)``, held in the compiled rung."""
    cost: int = 1
    """How long one shape takes to climb, in units of a small network's. Who shares a budget of
    shapes among cases divides by it."""
    samples: bool = False
    """Whether ``forward`` is what a user generates with, so that a benchmark times it."""
    full_size: Shape = field(default_factory=dict)
    """The shape of real use, but for its batch: what a benchmark times."""

    def __post_init__(self) -> None:
        if self.held not in ("float32", self.dtype):
            raise ValueError(
                f"{self.name}: modules that hold {self.held} cannot compute in {self.dtype}: held "
                "is float32 or what dtype is"
            )
