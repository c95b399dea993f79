"""The two models of one check, made comparable: copies in one mode, without dropout, the weights
carried over, and each called as the user's arguments say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, cast

import numpy as np
import torch
from torch import nn as tnn
from torch.nn.utils import parametrize

from mlx_parity import arguments, structure
from mlx_parity._backend import require_mlx
from mlx_parity.carry import flat, reference_tensors
from mlx_parity.case import Precision
from mlx_parity.errors import CarryError, ParityError, SideError
from mlx_parity.layers import plain_path, port_modules
from mlx_parity.localise import pairs
from mlx_parity.pairing import Map, Pairs
from mlx_parity.report import Report
from mlx_parity.sides import MLX_DTYPES
from mlx_parity.structure import copy_port
from mlx_parity.weights import FoundPlan, Sanitize, find_plan

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

MODEL = "model"
"""The name of the checked module in its system."""


@dataclass(frozen=True)
class Asked:
    """What the user said: the arguments of :func:`mlx_parity.check` that say what is compared."""

    reference: Any
    port: Any
    inputs: Any
    kwargs: Mapping[str, Any]
    loss: Any
    targets: Any
    optimizer: tuple[Any, Any] | None
    map: Map | None
    carry: bool | Mapping[str, Any]
    sanitize: Sanitize | None
    call_reference: Callable[..., Any] | None
    call_port: Callable[..., Any] | None
    images: Sequence[str] | None
    training: bool | None
    weights: str
    seed: int
    title: str


class Subject:
    """Both sides of a check. What had to be assumed is noted in the report."""

    def __init__(self, asked: Asked, report: Report):
        _refuse_what_is_no_pair(asked)
        self.asked, self.report = asked, report
        self.names = arguments.positional(asked.reference)
        """Of what the reference takes by position."""
        if asked.call_reference is not None:
            self.names = arguments.positional(asked.call_reference)[1:]
        rng = np.random.default_rng(asked.seed)
        given = asked.inputs, asked.kwargs, asked.targets
        self.arguments = arguments.read(*given, self.names, rng)
        self.modular = isinstance(asked.reference, tnn.Module) and isinstance(
            asked.port, mnn.Module
        )
        self.training: bool = (
            getattr(asked.reference, "training", False)
            if asked.training is None
            else asked.training
        )
        self.prototype = self._prototype()
        self.port = asked.port
        if isinstance(asked.port, mnn.Module):
            self.original_mode = asked.port.training
            modules = port_modules(asked.port)
            self.apart = [p for p, m in modules.items() if m.training != self.original_mode]
            self.port = copy_port(asked.port)
            if asked.port.training != self.training:
                mode = "training" if self.training else "evaluation"
                report.notes.append(f"the port was put into {mode} mode, as the reference is")
        self._set_mode()
        self.held: Precision = "float32"
        """What the port holds throughout; float32 where it holds several types."""
        self.plan = self._plan() if self.modular else None

    # ------------------------------------------------------------------------- the reference

    def _prototype(self) -> Any:
        """The reference to make copies of, with everything trainable if nothing is."""
        reference = self.asked.reference
        if not isinstance(reference, tnn.Module):
            return reference
        try:
            made = _sharing(reference)
        except Exception as error:
            raise SideError("reference", "when it is copied", error) from error
        self._train(made)
        for name, tensor in reference_tensors(made).items():
            if torch.isnan(tensor).any():
                raise ParityError(
                    f"the reference itself holds NaN in {name}: check how its weights were made "
                    "or loaded"
                )
        parameters = list(made.parameters())
        if parameters and not any(p.requires_grad for p in parameters) and self._port_trains():
            for p in parameters:
                p.requires_grad_(p.is_floating_point())
            self.report.notes.append(
                "every parameter of the reference is frozen; gradients are compared all the same"
            )
        for p in parameters:
            p.grad = None
        return made

    def _port_trains(self) -> bool:
        """Whether anything in the port does. Frozen on both sides, a model is compared frozen."""
        port = self.asked.port
        return not isinstance(port, mnn.Module) or bool(tree_flatten(port.trainable_parameters()))

    def instance(self) -> Any:
        """A copy of the reference in float32: a call may change what the next one gives."""
        if not isinstance(self.prototype, tnn.Module):
            return self.prototype
        return copy.deepcopy(self.prototype).float()

    # ------------------------------------------------------------------------------ the mode

    def switch(self, training: bool) -> None:
        """Put both sides into training or evaluation."""
        self.training = training
        self._train(self.prototype)
        self._set_mode()

    def depends_on_mode(self) -> bool:
        """Whether training and evaluation differ by more than dropout."""
        norms = tnn.modules.batchnorm._NormBase
        modules = self.prototype.modules()
        return any(isinstance(m, norms) and m.track_running_stats for m in modules)

    def _train(self, prototype: Any) -> None:
        """The mode of the whole; parts that were given in another than the whole keep it."""
        prototype.train(self.training)
        within = dict(prototype.named_modules())
        for path, module in self.asked.reference.named_modules():
            if module.training != self.asked.reference.training and path in within:
                within[path].training = module.training

    def _set_mode(self) -> None:
        if isinstance(self.port, mnn.Module):
            self.port.train(self.training)
            modules = port_modules(self.port)
            for path in self.apart:
                modules[path].train(not self.original_mode)
        if self.training:
            self._silence()

    def _silence(self) -> None:
        """Dropout off on both sides: no two libraries draw the same masks."""
        touched = False
        if isinstance(self.prototype, tnn.Module):
            for module in self.prototype.modules():
                for key, value in vars(module).items():
                    rate = "drop" in key or (key == "p" and "Dropout" in type(module).__name__)
                    if rate and isinstance(value, float) and value > 0:
                        setattr(module, key, 0.0)
                        touched = True
        if isinstance(self.port, mnn.Module):
            for port_module in port_modules(self.port).values():
                if "Dropout" in type(port_module).__name__ and hasattr(port_module, "_p_1"):
                    touched = touched or port_module._p_1 != 1
                    object.__setattr__(port_module, "_p_1", 1)
                for key, value in list(vars(port_module).items()):
                    if "drop" in key and isinstance(value, float) and value > 0:
                        object.__setattr__(port_module, key, 0.0)
                        touched = True
        if touched:
            self.report.notes.append(
                "dropout is off on both sides, since no two libraries draw the same masks; to "
                "compare it, pass the masks in"
            )

    # --------------------------------------------------------------------------- the weights

    def _plan(self) -> FoundPlan:
        """How the weights go over, or that they do not."""
        asked = self.asked
        if asked.carry is False:
            paired = _pairs_or_none(self.prototype, self.port, asked.map)
            every = frozenset(reference_tensors(self.prototype))
            how = "not carried: each side keeps its own"
            plan = FoundPlan(self.prototype, self.port, (), how, pairs=paired, ignored=every)
        else:
            options = dict(asked.carry) if isinstance(asked.carry, Mapping) else {}
            _check_map(asked.map or {}, self.prototype, self.port)
            try:
                plan = self._find_plan(options)
            except CarryError as error:
                modules = port_modules(self.port).items()
                quantized = [p for p, m in modules if type(m).__name__.startswith("Quantized")]
                if not quantized:
                    raise
                raise CarryError(
                    f"{', '.join(quantized[:3])} of the port is quantized, which rounds weights to "
                    "a few bits and is equal to nothing: check the port before nn.quantize"
                ) from error
        found = {a.dtype for a in flat(self.port.parameters()).values()}
        names = {n: t for n, t in MLX_DTYPES.items() if t in found}
        halves = sorted(names.keys() - {"float32"})
        if halves and plan.links:
            if len(names) == 1 and asked.optimizer is None:
                self.held = cast(Precision, halves[0])
                self.report.notes.append(
                    f"the port holds {halves[0]} throughout, and is judged by PyTorch's noise in "
                    "it; a finer difference of formulas shows after port.set_dtype(mx.float32)"
                )
            else:
                self.report.notes.append(
                    f"the port holds {', '.join(halves)} in part; it was compared in float32, in "
                    "which its formulas show"
                )
        self.report.carried = plan.how
        self.report.notes += plan.notes
        self.report.unpaired = plan.pairs.unpaired
        return plan

    def _find_plan(self, options: Mapping[str, Any]) -> FoundPlan:
        """The plan; of a reference whose parametrized weights are folded, where the port holds
        them so: weight normalisation is usually multiplied out when weights are published."""
        asked = self.asked

        def found(reference: tnn.Module) -> FoundPlan:
            return find_plan(
                reference, self.port, map=asked.map, sanitize=asked.sanitize, **options
            )

        folded, names = _folded(self.prototype)
        try:
            plan = found(self.prototype)
            if not names or not plan.lacking:
                return plan
        except CarryError:
            if not names:
                raise
        plan = found(folded)
        self.prototype = folded
        self._note(f"{', '.join(names[:3])} of the reference was multiplied out, as in the port")
        return plan

    def carry(self) -> None:
        """The prototype's weights into the port."""
        if self.plan is not None and self.plan.links:
            self.plan.carry()

    # -------------------------------------------------------------------- calling both sides

    def run_reference(self, module: Any, inputs: Mapping[str, Any]) -> Any:
        """The reference's output; ``inputs`` are tensors by name."""
        floats = [a.dtype for a in inputs.values() if a.is_floating_point()]
        floats += [p.dtype for p in getattr(module, "parameters", tuple)() if p.is_floating_point()]
        dtype = floats[0] if floats else torch.float32
        arrays = self.arguments.model(inputs)
        arrays |= {n: torch.tensor(a, dtype=dtype) for n, a in self.arguments.constants.items()}
        args, kwargs = self.arguments.filled(arrays)
        if self.asked.call_reference is not None:
            return self.asked.call_reference(module, *args, **kwargs)
        return module(*args, **kwargs)

    def run_port(self, module: Any, inputs: Mapping[str, Any]) -> Any:
        """The port's output; ``inputs`` are arrays by name, in the port's layout."""
        arrays = self.arguments.model(inputs)
        arrays |= {n: mx.array(a) for n, a in self.arguments.constants.items()}
        args, kwargs = self.arguments.filled(arrays)
        if self.asked.call_port is not None:
            output = self.asked.call_port(module, *args, **kwargs)
        else:
            some, named = arguments.suited(module, args, kwargs, self.names)
            if len(some) != len(args):
                self._note(
                    f"the port takes {len(some)} of its arguments by position and "
                    f"{', '.join(named) or 'none'} by name, otherwise than the reference"
                )
            output = module(*some, **named)
        return structure.replace(output, lambda place, a: _in_mlx(a))

    def _note(self, line: str) -> None:
        if line not in self.report.notes:
            self.report.notes.append(line)

    def check_original(self) -> None:
        """From now on the user's own port instead of a copy: ``call_port`` calls it by a name of
        its own, whatever it is given. It is restored afterwards."""
        self.port = self.asked.port
        self._set_mode()
        if self.plan is not None:
            self.plan = replace(self.plan, port=self.port)
        self.carry()


def _refuse_what_is_no_pair(asked: Asked) -> None:
    reference, port = asked.reference, asked.port
    for side, model, call in (
        ("reference", reference, asked.call_reference),
        ("port", port, asked.call_port),
    ):
        if call is None and not callable(model):
            raise ParityError(
                f"{side} is no model: it cannot be called; say how with call_{side}=lambda model, "
                "x: model.encode(x)"
            )
        if isinstance(model, type):
            raise ParityError(f"{side} is the class {model.__name__}: give an instance of it")
    if isinstance(reference, mnn.Module) or isinstance(port, tnn.Module):
        raise ParityError("check(reference, port): PyTorch's model comes first, MLX's second")
    if isinstance(reference, tnn.Module) and not isinstance(port, mnn.Module):
        raise ParityError(
            "reference is a module and port a function, which holds no weights that could be "
            "carried: give both as modules, or both as functions that take the weights too"
        )
    if isinstance(port, mnn.Module) and not isinstance(reference, tnn.Module):
        raise ParityError(
            "port is a module and reference a function, which holds no weights to carry: give both "
            "as modules, or both as functions that take the weights too"
        )


def _check_map(map: Map, reference: tnn.Module, port: mnn.Module) -> None:
    """Names that nothing has are mistyped."""
    theirs = {*dict(reference.named_modules()), *reference.state_dict()}
    ours = {*port_modules(port)}
    for name in flat(port.parameters()):
        parts = name.split(".")
        ours |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    ours |= {plain_path(path, port, port_modules(port)) for path in ours}
    for name, target in map.items():
        if name not in theirs:
            raise CarryError(f"map: the reference has nothing called {name!r}{_near(name, theirs)}")
        for there in [target] if isinstance(target, str) else target or ():
            if there not in ours:
                raise CarryError(f"map: the port has nothing called {there!r}{_near(there, ours)}")


def _near(name: str, known: set[str]) -> str:
    close = get_close_matches(name, sorted(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _in_mlx(array: Any) -> mx.array:
    """What a port gives of other libraries' arrays can be read, and has no gradient."""
    return array if isinstance(array, mx.array) else mx.array(arguments.plain(array))


def _folded(module: tnn.Module) -> tuple[tnn.Module, list[str]]:
    """A copy without parametrizations, each weight as it is computed, and those weights' names."""
    names = [
        f"{path}.{name}"
        for path, m in module.named_modules()
        if parametrize.is_parametrized(m)
        for name in cast(Any, m.parametrizations)
    ]
    if not names:
        return module, []
    made = copy.deepcopy(module)
    for m in list(made.modules()):
        if not parametrize.is_parametrized(m):
            continue
        held: Any = m.parametrizations
        folded = {
            n: tnn.Parameter(getattr(m, n).detach().clone(), _trains(parametrized))
            for n, parametrized in held.items()
        }
        # remove_parametrizations takes the attribute from the class, which the original shares.
        object.__setattr__(m, "__class__", type(m).__bases__[0])
        del m.parametrizations
        for n, weight in folded.items():
            m.register_parameter(n, weight)
    return made, names


def _trains(module: tnn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _sharing(module: tnn.Module) -> tnn.Module:
    """A copy with parameters of its own that share the original's memory: none writes to them."""
    memo: dict[int, Any] = {
        id(p): tnn.Parameter(p.detach(), p.requires_grad) for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def _pairs_or_none(reference: tnn.Module, port: mnn.Module, map: Map | None) -> Pairs:
    try:
        return pairs(reference, port, map)
    except CarryError:
        return Pairs()
