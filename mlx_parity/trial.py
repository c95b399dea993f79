"""Both sides called once: which outputs there are and how they are paired, which inputs and outputs
are images, and whether a second call gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.arguments import plain
from mlx_parity.capture import port_calls, reference_calls
from mlx_parity.carry import channels_first, channels_last
from mlx_parity.errors import ParityError, SideError
from mlx_parity.layers import port_modules
from mlx_parity.layout import distance
from mlx_parity.structure import is_floating, leaves
from mlx_parity.subject import Subject

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402

ALIKE = 1e-2
"""Outputs nearer than this, relatively, show that the inputs were read as they are meant."""

CHANNELS_FIRST = (tnn.modules.conv._ConvNd, tnn.modules.batchnorm._NormBase, tnn.GroupNorm)
"""Layers that have their channels second in PyTorch and last in MLX."""

Shapes = Mapping[int, set[tuple[int, ...]]]
"""What convolutions were given in the reference, by the number of axes."""


@dataclass
class Agreement:
    """What is compared with what."""

    outputs: dict[str, str]
    """The port's name of an output to the reference's."""
    images: frozenset[str]
    """Inputs, targets and outputs (by :func:`say`) with channels first there and last here."""
    cotangents: dict[str, np.ndarray] = field(default_factory=dict)
    """By the reference's name of a floating output: what it is projected on where no loss is."""
    discrete: list[str] = field(default_factory=list)
    """Outputs that are no real numbers."""
    unlike: list[str] = field(default_factory=list)
    """Floating outputs that have another shape in the port: no loss can be made of both."""
    drawn: str | None = None
    """An output of the port that differs between two calls, if there is one."""

    @property
    def loss(self) -> str | None:
        """The name of the scalar that is differentiated; there is none of discrete outputs, nor of
        outputs of which one has another shape."""
        return "loss" if self.cotangents and not self.unlike else None


def say(name: str) -> str:
    """An output's name for people: that of a model's only output is empty."""
    return name or "output"


def agree(subject: Subject) -> Agreement:
    """Call both sides and find out what their outputs have in common.

    Carries the weights. Raises :class:`SideError` where a model raises, :class:`ParityError` where
    the reference is no reference: not finite, or not the same at a second call.
    """
    tensors = {n: _tensor(a) for n, a in subject.arguments.arrays.items()}
    theirs, convolved = _reference_call(subject, tensors)
    _check_reference(theirs, _reference_call(subject, tensors)[0])
    subject.carry()
    images, ours = _best_reading(subject, theirs, convolved)
    outputs = _paired(theirs, ours)
    _note_outputs(subject, theirs, ours, outputs)
    found = set(images)
    for b, a in outputs.items():
        if _is_image(subject, theirs[a], ours[b], a, images):
            found.add(say(a))
    for n in subject.arguments.targets:
        shapes = {theirs[a].shape for a in outputs.values() if say(a) in found}
        if n in subject.arguments.arrays and subject.arguments.arrays[n].shape in shapes:
            found.add(n)
    for n in sorted(found):
        subject.report.layouts[n] = "channels first there, last here"
    _note_exchanged(subject, theirs, ours, outputs, images)
    agreement = Agreement(outputs, frozenset(found))
    rng = np.random.default_rng(subject.asked.seed + 1)
    for a in outputs.values():
        if is_floating(theirs[a]):
            agreement.cotangents[a] = rng.standard_normal(theirs[a].shape).astype(np.float32)
        else:
            agreement.discrete.append(a)
    laid_out = {
        a: channels_first(ours[b]) if say(a) in found else ours[b] for b, a in outputs.items()
    }
    agreement.unlike = [a for a in agreement.cotangents if laid_out[a].shape != theirs[a].shape]
    once, again = (_port_call(subject, agreement.images) for _ in range(2))
    drawn = [n for n in once if not np.array_equal(once[n], again[n], equal_nan=True)]
    agreement.drawn = drawn[0] if drawn else None
    return agreement


# --------------------------------------------------------------------------------- the reference


def _tensor(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor if is_floating(tensor) or tensor.dtype == torch.bool else tensor.long()


def _reference_call(
    subject: Subject, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, np.ndarray], Shapes]:
    """Outputs by place, and what went into convolutions and their norms."""
    module = subject.instance()
    watched = dict(module.named_modules()) if isinstance(module, tnn.Module) else {}
    with torch.no_grad(), reference_calls(watched) as calls:
        try:
            output = subject.run_reference(module, tensors)
        except Exception as error:
            raise SideError("reference", _in(calls.open), error) from error
    found = {n: plain(a) for n, a in leaves(output).items()}
    if not found:
        raise ParityError(
            f"the reference gives {type(output).__name__}, in which there is no array: return "
            "its tensors, with call_reference= if need be"
        )
    convolved: dict[int, set[tuple[int, ...]]] = {}
    for call in calls.values():
        at = watched[call.path]
        if isinstance(at, CHANNELS_FIRST):
            for a in call.inputs.values():
                convolved.setdefault(a.ndim, set()).add(tuple(a.shape))
    return found, convolved


def _check_reference(once: Mapping[str, np.ndarray], again: Mapping[str, np.ndarray]) -> None:
    for n, a in once.items():
        if not np.array_equal(a, again.get(n, a), equal_nan=True):
            raise ParityError(
                f"the reference itself is not deterministic: {say(n)} differs between two "
                "calls with the same inputs. Put it into evaluation mode, or pass what it "
                "draws in as an argument"
            )
        if not np.isfinite(a).all():
            raise ParityError(
                f"the reference itself gives NaN or infinity in {say(n)}: look at its weights "
                "and at the inputs before comparing"
            )


def _in(open_calls: Sequence[str]) -> str:
    inner = [path for path in open_calls if path]
    return f"in {inner[-1]}" if inner else "in its forward pass"


# -------------------------------------------------------------------------------------- the port


def _best_reading(
    subject: Subject, theirs: Mapping[str, np.ndarray], convolved: Shapes
) -> tuple[frozenset[str], dict[str, np.ndarray]]:
    """Call the port under each possible reading of the inputs; keep what agrees best."""
    best: tuple[float, frozenset[str], dict[str, np.ndarray]] | None = None
    first: SideError | None = None
    for images in _readings(subject, theirs, convolved):
        try:
            ours = _port_call(subject, images)
        except SideError as error:
            first = first or error
            continue
        paired = _paired(theirs, ours)
        off = max(
            (_off(theirs[a], ours[b], images)[0] for b, a in paired.items()),
            default=np.inf,
        )
        if best is None or off < best[0]:
            best = (off, images, ours)
        if off < ALIKE:
            break
    if best is None:
        assert first is not None
        raise first
    return best[1:]


def _readings(
    subject: Subject, theirs: Mapping[str, np.ndarray], convolved: Shapes
) -> list[frozenset[str]]:
    """Which inputs may be images: as declared, or what goes into convolutions, none, or all."""
    arrays = subject.arguments.model(subject.arguments.arrays)
    declared = subject.asked.images
    if declared is not None:
        known = {*subject.arguments.arrays, *subject.arguments.constants, *theirs, "output"}
        unknown = sorted(set(declared) - known)
        if unknown:
            raise ParityError(
                f"images names {', '.join(unknown)}, which is neither an input nor an output; "
                f"there are {', '.join(sorted(say(n) for n in known))}"
            )
        return [frozenset(declared) & frozenset(arrays)]
    floats = {n: a for n, a in arrays.items() if is_floating(a)}
    likely = frozenset(n for n, a in floats.items() if a.ndim > 2 and a.ndim in convolved)
    every = frozenset(n for n, a in floats.items() if a.ndim > 3)
    return list(dict.fromkeys([likely, frozenset(), every]))


def _port_call(subject: Subject, images: frozenset[str]) -> dict[str, np.ndarray]:
    """Outputs by place."""
    given = subject.arguments.arrays
    arrays = {n: mx.array(channels_last(a) if n in images else a) for n, a in given.items()}
    watched = port_modules(subject.port) if isinstance(subject.port, mnn.Module) else {}
    with port_calls(watched) as calls:
        try:
            output = subject.run_port(subject.port, arrays)
            mx.eval(list(leaves(output).values()))
        except Exception as error:
            raise SideError("port", _in(calls.open), error) from error
    if watched and not calls and subject.port is not subject.asked.port:
        subject.check_original()
        return _port_call(subject, images)
    found = {n: plain(a) for n, a in leaves(output).items()}
    if not found:
        said = (
            f"the port gives {type(output).__name__}, in which there is no array: return its arrays"
        )
        raise SideError.about("port", said)
    return found


# ----------------------------------------------------------------------------------- the outputs


def _paired(theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The port's outputs to the reference's: by name, else in order, by equal sizes first."""
    pairs = {n: n for n in ours if n in theirs}
    left = [n for n in theirs if n not in pairs.values()]
    free = [n for n in ours if n not in pairs]
    if left and free and (len(theirs) == 1 or len(ours) == 1 or len(left) == len(free)):
        for b in free:
            same = [a for a in left if theirs[a].size == ours[b].size]
            if same or (left and len(left) == len(free) == 1):
                a = (same or left)[0]
                pairs[b] = a
                left.remove(a)
    for b in free:  # more on one side: of a size that no other has
        same = [a for a in left if theirs[a].size == ours[b].size]
        rivals = [n for n in free if ours[n].size == ours[b].size]
        if b not in pairs and len(same) == len(rivals) == 1:
            pairs[b] = same[0]
            left.remove(same[0])
    return pairs


def _note_outputs(
    subject: Subject,
    theirs: Mapping[str, np.ndarray],
    ours: Mapping[str, np.ndarray],
    outputs: Mapping[str, str],
) -> None:
    """What is left out stands in the report; refused where nothing is left."""
    if not outputs:
        raise ParityError(
            f"no output of the port can be paired with one of the reference: it gives "
            f"{_shapes(ours)}, the reference {_shapes(theirs)}. Return the same with "
            "call_reference= and call_port="
        )
    for side, given, used in (
        ("reference", theirs, set(outputs.values())),
        ("port", ours, set(outputs)),
    ):
        left = [say(n) for n in given if n not in used]
        if side == "reference":
            subject.report.uncompared = left
        if left:
            subject.report.notes.append(
                f"outputs of the {side} that were not compared: {', '.join(left)}"
            )


def _note_exchanged(
    subject: Subject,
    theirs: Mapping[str, np.ndarray],
    ours: Mapping[str, np.ndarray],
    outputs: Mapping[str, str],
    images: frozenset[str],
) -> None:
    """Outputs that the port returns in another order."""
    for b, a in outputs.items():
        if not is_floating(theirs[a]) or _off(theirs[a], ours[b], images)[0] < ALIKE:
            continue
        for other in outputs.values():
            if other != a and _off(theirs[other], ours[b], images)[0] < ALIKE:
                subject.report.notes.append(
                    f"output {say(b)} of the port is output {say(other)} of the reference"
                )


def _shapes(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{say(n)} {list(a.shape)}" for n, a in arrays.items())


def _is_image(
    subject: Subject, a: np.ndarray, b: np.ndarray, name: str, images: frozenset[str]
) -> bool:
    declared = subject.asked.images
    if declared is not None and (name in declared or say(name) in declared):
        return True
    if declared is not None and not set(declared) <= set(subject.arguments.arrays):
        return False  # outputs are named too, and this is none of them
    return _off(a, b, images)[1]


def _off(a: np.ndarray, b: np.ndarray, images: frozenset[str]) -> tuple[float, bool]:
    """How far an output is from the reference's, and whether it is so with channels last."""
    options: list[tuple[float, bool]] = []
    if a.shape == b.shape:
        options.append((distance(a, b), False))
    if a.ndim > 2 and b.ndim == a.ndim and channels_first(b).shape == a.shape:
        options.append((distance(a, channels_first(b)), True))
    if not options:
        return np.inf, False
    near = min(options)
    if near[0] > 0.5 and images and options[-1][1]:
        return options[-1]  # nothing agrees: by convention
    return near
