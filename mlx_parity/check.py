"""One call: is this port equal to that original, and if not, where and why.

    report = mlx_parity.check(reference, port, inputs)
    report.assert_ok()

What is not said is found out: how the weights are carried, which inputs are images, how the outputs
are paired. What was found out stands in the report.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.capture import port_calls, reference_calls
from mlx_parity.carry import channels_first, channels_last, flat, reference_tensors
from mlx_parity.case import Case, Loss, System
from mlx_parity.errors import CarryError, NoGradient, ParityError, SideError
from mlx_parity.ladder import Climb, Rung, compiles
from mlx_parity.layout import distance
from mlx_parity.localise import Located, localise
from mlx_parity.pairing import Map, Pairs, port_modules
from mlx_parity.report import Report
from mlx_parity.structure import copy_port, is_array, is_floating, leaves
from mlx_parity.structure import replace as replaced
from mlx_parity.variants import named, of_port
from mlx_parity.weights import FoundPlan, Sanitize, find_plan

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402

MODEL = "model"
"""The name of the checked module in its system."""

LOCALISE_SECONDS = 8.0
"""A port that is equal is read module by module, for the picture, where that is quick enough."""

Progress = Callable[[str], None]


def check(
    reference: Any,
    port: Any,
    inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    loss: Any = None,
    targets: Any = (),
    optimizer: tuple[Any, Any] | None = None,
    map: Map | None = None,
    carry: bool | Mapping[str, Any] = True,
    sanitize: Sanitize | None = None,
    call_reference: Callable[..., Any] | None = None,
    call_port: Callable[..., Any] | None = None,
    images: Sequence[str] | None = None,
    training: bool | None = None,
    until: str = "reloaded",
    weights: str = "own",
    compiled: bool | None = None,
    variants: bool = False,
    localised: bool | None = None,
    explain: bool = True,
    seed: int = 0,
    name: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold ``port`` (MLX) against ``reference`` (PyTorch) and report; never raises for a model.

    reference, port: modules, or plain functions. Both are left exactly as they were found.
    inputs: what both are called with: an array, a tuple of arguments, or a dict of arguments by
        name; arrays of NumPy, PyTorch or MLX, in the reference's layout, also nested. What is no
        array is passed on as it is. Or a function of a NumPy generator that makes them.
    kwargs: further arguments by name.
    loss: of a model's output (and of ``targets``), to a scalar; one function for both sides or a
        pair of them. By default the output's projection on fixed random numbers.
    optimizer: a pair: PyTorch's, as an instance or a function of parameters; MLX's, an instance.
        Without it nothing is trained.
    map: names of the reference to the port's, where neither names nor shapes tell. A list where
        the port has split one; None where it has no counterpart.
    carry: options of :func:`mlx_parity.match` (``flatten``, ``axes``, …); False where both sides
        already hold their weights: then only the inputs vary, and parameters are not compared.
    sanitize: the port's own function from a state dict to its weights; its method of that name is
        found without being given.
    call_reference, call_port: ``f(model, *inputs)`` where the models are called differently.
    images: names of the inputs, outputs and targets that are channels first in the reference and
        last in the port. By default found from the first convolution and by trying.
    training: the mode of both; by default the reference's own.
    until: the last rung to climb: "forward" for a port that only infers.
    weights: "own", or "random" for weights drawn by the kit.
    compiled: whether to try ``mx.compile``; by default wherever it compiles.
    variants: whether to compile the forward pass in every way, shapeless too, and to say what is
        frozen by it; the report lists them, the verdict does not depend on them.
    localised: whether to read every module; by default if something differs, or if it is quick.
    explain: whether to look for a known cause where something differs; it tries alternatives out,
        which may take longer than all else.
    progress: called with a line at each stage.
    """
    started = time.monotonic()
    title = name or f"{_name_of(reference)} → {_name_of(port)}"
    report = Report(title)
    say = progress or (lambda line: None)
    with _restored(reference, port):
        try:
            subject = _Subject(
                reference=reference,
                port=port,
                given=inputs,
                kwargs=kwargs or {},
                loss=loss,
                targets=targets,
                optimizer=optimizer,
                map=map,
                carry=carry,
                sanitize=sanitize,
                call_reference=call_reference,
                call_port=call_port,
                images=images,
                training=training,
                weights=weights,
                seed=seed,
                title=title,
                report=report,
            )
            if report.rungs:  # the port cannot even be repeated
                report.settle()
            else:
                _climb(subject, report, until, compiled, variants, localised, explain, say)
                if explain:
                    _explain_what_is_no_module(subject, report)
        except SideError as error:
            report.undecided(error.side, str(error))
        except CarryError as error:
            report.undecided("weights", str(error))
            if isinstance(reference, tnn.Module) and isinstance(port, mnn.Module):
                with suppress(Exception):  # what the trees show may say why
                    report.diagnoses = import_module("mlx_parity.diagnose").lint(reference, port)
        except (ParityError, ValueError) as error:
            report.undecided(_whose(error), str(error))
        except Exception as error:  # a defect of the kit is no verdict on the port
            report.undecided("kit", f"{type(error).__name__}: {error}", error)
    report.seconds = time.monotonic() - started
    return report


def _whose(error: Exception) -> str:
    text = str(error)
    if text.startswith("the reference") or "of the reference" in text:
        return "reference"
    return "inputs"


def _name_of(model: Any) -> str:
    if isinstance(model, tnn.Module | mnn.Module):
        return type(model).__name__
    return getattr(model, "__name__", type(model).__name__)


# ---------------------------------------------------------------------- leaving things as they were


@contextmanager
def _restored(reference: Any, port: Any) -> Iterator[None]:
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


# ------------------------------------------------------------------------------------- the subject


@dataclass
class _Template:
    """Arguments with their arrays taken out, by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: dict[str, str]
    """Place to name."""

    def filled(self, arrays: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        both = replaced(
            {"args": self.args, "kwargs": self.kwargs},
            lambda place, a: arrays[self.names[place]],
        )
        return both["args"], both["kwargs"]


def _template(given: Any, kwargs: Mapping[str, Any], names: Sequence[str]) -> _Template:
    """Positional and named arguments; names by the reference's signature where it tells."""
    if isinstance(given, Mapping):
        args: tuple[Any, ...] = ()
        kwargs = {**given, **kwargs}
    else:
        args = tuple(given) if isinstance(given, tuple | list) else (given,)
    found: dict[str, str] = {}
    for place in leaves({"args": args, "kwargs": dict(kwargs)}):
        kind, _, rest = place.partition(".")
        if kind == "args":
            at, _, deeper = rest.partition(".")
            first = names[int(at)] if int(at) < len(names) else f"input{at}"
            found[place] = "_".join(p for p in (first, deeper.replace(".", "_")) if p)
        else:
            found[place] = rest.replace(".", "_")
    return _Template(args, dict(kwargs), found)


def _signature(model: Any) -> list[str]:
    function = model.forward if isinstance(model, tnn.Module) else model
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in plain]


def _plain(array: Any) -> np.ndarray:
    """NumPy's array; real numbers in float32."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    elif isinstance(array, mx.array):
        array = np.array(array.astype(mx.float32) if is_floating(array) else array)
    return array.astype(np.float32) if is_floating(array) else np.asarray(array)


@dataclass
class _Subject:
    """Everything about one check that is not the ladder."""

    reference: Any
    port: Any
    given: Any
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
    report: Report
    plan: FoundPlan | None = None
    outputs: dict[str, str] = field(default_factory=dict)
    """The port's name of an output to the reference's."""
    discrete: list[str] = field(default_factory=list)
    cotangents: dict[str, np.ndarray] = field(default_factory=dict)
    built: bool = False

    def __post_init__(self) -> None:
        if not callable(self.reference) or not callable(self.port):
            side = "reference" if not callable(self.reference) else "port"
            raise ParityError(f"{side} is no model: it cannot be called")
        if isinstance(self.reference, mnn.Module) or isinstance(self.port, tnn.Module):
            raise ParityError("check(reference, port): PyTorch's model comes first, MLX's second")
        rng = np.random.default_rng(self.seed)
        given = self.given(rng) if callable(self.given) and not is_array(self.given) else self.given
        names = _signature(self.reference)
        if self.call_reference is not None:
            names = _signature(self.call_reference)[1:]
        self.template = _template(given, self.kwargs, names)
        both = {"args": self.template.args, "kwargs": self.template.kwargs}
        arrays = {self.template.names[p]: _plain(a) for p, a in leaves(both).items()}
        targets = self.targets if isinstance(self.targets, tuple | list) else (self.targets,)
        self.target_names = [
            f"target{i}" if len(targets) > 1 else "target" for i in range(len(targets))
        ]
        arrays |= {n: _plain(a) for n, a in zip(self.target_names, targets, strict=True)}
        self.arrays = arrays
        self._look_at_inputs()
        self.modular = isinstance(self.reference, tnn.Module) and isinstance(self.port, mnn.Module)
        if self.training is None:
            self.training = getattr(self.reference, "training", False)
        if isinstance(self.port, mnn.Module):  # a norm kept in evaluation mode, for instance
            self.original_mode = self.port.training
            self.apart = [
                path
                for path, m in port_modules(self.port).items()
                if m.training != self.port.training
            ]
        self.prototype = self._copied()
        self.original = self.port
        if isinstance(self.port, mnn.Module):
            self.port = copy_port(self.port)
            if self.port.training != self.training:
                mode = "training" if self.training else "evaluation"
                self.report.notes.append(f"the port was put into {mode} mode, as the reference is")
        self._set_mode()
        self._carry()
        self._try()

    def _train(self, prototype: Any, training: bool) -> None:
        """The mode of the whole; parts that were given in another than the whole keep it."""
        prototype.train(training)
        for path, module in self.reference.named_modules():
            if module.training != self.reference.training:
                prototype.get_submodule(path).training = module.training

    def _set_mode(self) -> None:
        if isinstance(self.port, mnn.Module):
            self.port.train(bool(self.training))
            modules = port_modules(self.port)
            for path in self.apart:
                modules[path].train(not self.original_mode)
        self._silence()

    def _look_at_inputs(self) -> None:
        """Constants (masks with infinities) are not varied; NaN and emptiness are refused."""
        self.constants: dict[str, np.ndarray] = {}
        for name, array in self.arrays.items():
            if array.size == 0:
                raise ParityError(
                    f"input {name!r} has shape {list(array.shape)}, which holds nothing: give a "
                    "batch of at least 1"
                )
            if not is_floating(array):
                continue
            if np.isnan(array).any():
                raise ParityError(f"input {name!r} holds NaN: clean the data before comparing")
            if np.isinf(array).any():
                self.constants[name] = array
        for name in self.constants:
            del self.arrays[name]

    def _copied(self) -> Any:
        """The reference to make copies of, with everything trainable if nothing is."""
        if not isinstance(self.reference, tnn.Module):
            return self.reference
        try:
            made = copy.deepcopy(self.reference)
        except Exception as error:
            raise SideError("reference", "when it is copied", error) from error
        self._train(made, bool(self.training))
        for name, tensor in reference_tensors(made).items():
            if torch.isnan(tensor).any():
                raise ParityError(
                    f"the reference itself holds NaN in {name}: check how its weights were made "
                    "or loaded"
                )
        parameters = list(made.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            for p in parameters:
                p.requires_grad_(p.is_floating_point())
            self.report.notes.append(
                "every parameter of the reference is frozen; gradients are compared all the same"
            )
        for p in parameters:
            p.grad = None
        return made

    def _silence(self) -> None:
        """Dropout off on both sides in training mode: no two libraries draw the same masks."""
        if not self.training:
            return
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

    def _carry(self) -> None:
        if not self.modular:
            return
        options = dict(self.carry) if isinstance(self.carry, Mapping) else {}
        if self.carry is False:
            pairs = _pairs_or_none(self.prototype, self.port, self.map)
            every = frozenset(reference_tensors(self.prototype))
            how = "not carried: each side keeps its own"
            self.plan = FoundPlan(self.prototype, self.port, (), how, pairs=pairs, ignored=every)
        else:
            self.plan = find_plan(
                self.prototype, self.port, map=self.map, sanitize=self.sanitize, **options
            )
        halves = {
            str(a.dtype).rpartition(".")[2]
            for a in flat(self.port.parameters()).values()
            if a.dtype in (mx.float16, mx.bfloat16)
        }
        if halves and self.plan.links:
            self.report.notes.append(
                f"the port holds {', '.join(sorted(halves))}; it was compared in float32, in which "
                "its formulas show"
            )
        self.report.carried = self.plan.how
        self.report.notes += self.plan.notes
        self.report.unpaired = self.plan.pairs.unpaired

    # -------------------------------------------------------------------- calling both sides

    def run_reference(self, module: Any, inputs: Mapping[str, Any]) -> Any:
        floats = [a.dtype for a in inputs.values() if a.is_floating_point()]
        floats += [p.dtype for p in getattr(module, "parameters", tuple)() if p.is_floating_point()]
        dtype = floats[0] if floats else torch.float32
        arrays = dict(inputs)
        arrays |= {n: torch.tensor(a, dtype=dtype) for n, a in self.constants.items()}
        args, kwargs = self.template.filled(arrays)
        if self.call_reference is not None:
            return self.call_reference(module, *args, **kwargs)
        return module(*args, **kwargs)

    def run_port(self, module: Any, inputs: Mapping[str, Any]) -> Any:
        arrays = dict(inputs)
        arrays |= {n: mx.array(a) for n, a in self.constants.items()}
        args, kwargs = self.template.filled(arrays)
        if self.call_port is not None:
            return self.call_port(module, *args, **kwargs)
        return module(*args, **kwargs)

    def _try(self) -> None:
        """Call both sides once: which outputs there are, which inputs and outputs are images."""
        own = {n: torch.from_numpy(a) for n, a in self.arrays.items()}
        own = {
            n: a if a.is_floating_point() or a.dtype == torch.bool else a.long()
            for n, a in own.items()
        }
        module = self._instance()
        watched = dict(module.named_modules()) if isinstance(module, tnn.Module) else {}
        theirs, convolved = self._reference_trial(module, own, watched)
        again, _ = self._reference_trial(self._instance(), own, {})
        for n, a in theirs.items():
            if not np.array_equal(a, again.get(n, a), equal_nan=True):
                raise ParityError(
                    f"the reference itself is not deterministic: {_say(n)} differs between two "
                    "calls with the same inputs. Put it into evaluation mode, or pass what it "
                    "draws in as an argument"
                )
            if not np.isfinite(a).all():
                raise ParityError(
                    f"the reference itself gives NaN or infinity in {_say(n)}: look at its weights "
                    "and at the inputs before comparing"
                )
        if self.plan is not None and self.plan.links:
            self.plan.carry()
        self._port_trial(theirs, convolved)
        images = self.found_images & set(self.arrays)
        once, again = (self._port_call(images) for _ in range(2))
        drawn = [n for n in once if not np.array_equal(once[n], again[n], equal_nan=True)]
        if drawn:
            self.report.rungs.append(
                Rung(
                    "forward",
                    False,
                    message=f"the port is not deterministic, as the reference is: {_say(drawn[0])} "
                    "differs between two calls with the same inputs. It draws random numbers, or "
                    "keeps something from one call to the next",
                )
            )

    def _instance(self) -> Any:
        """A copy of the reference in float32: a call may change what the next one gives."""
        if not isinstance(self.prototype, tnn.Module):
            return self.prototype
        return copy.deepcopy(self.prototype).float()

    def _reference_trial(
        self, module: Any, own: Mapping[str, Any], watched: Mapping[str, tnn.Module]
    ) -> tuple[dict[str, np.ndarray], dict[int, set[tuple[int, ...]]]]:
        with torch.no_grad(), reference_calls(watched) as calls:
            try:
                output = self.run_reference(module, own)
            except Exception as error:
                raise SideError(
                    "reference", _in(calls.open, "in its forward pass"), error
                ) from error
        found = {n: _plain(a) for n, a in leaves(output).items()}
        if not found:
            raise ParityError(
                f"the reference gives {type(output).__name__}, in which there is no array: return "
                "its tensors, with call_reference= if need be"
            )
        convolved: dict[int, set[tuple[int, ...]]] = {}
        for call in calls.values():
            at = watched[call.path]
            if isinstance(at, tnn.modules.conv._ConvNd | tnn.modules.batchnorm._BatchNorm):
                for a in call.inputs.values():
                    convolved.setdefault(a.ndim, set()).add(tuple(a.shape))
        return found, convolved

    def _port_trial(
        self, theirs: Mapping[str, np.ndarray], convolved: Mapping[int, set[tuple[int, ...]]]
    ) -> None:
        """Call the port under each possible reading of the inputs; keep what agrees best."""
        names = [n for n, a in self.arrays.items() if n not in self.target_names]
        likely = frozenset(
            n
            for n in names
            if self.arrays[n].ndim > 2
            and self.arrays[n].ndim in convolved
            and is_floating(self.arrays[n])
        )
        every = frozenset(
            n for n in names if self.arrays[n].ndim > 3 and is_floating(self.arrays[n])
        )
        if self.images is not None:
            known = {*self.arrays, *self.constants, *theirs, "output"}
            unknown = sorted(set(self.images) - known)
            if unknown:
                raise ParityError(
                    f"images names {', '.join(unknown)}, which is neither an input nor an output; "
                    f"there are {', '.join(sorted(_say(n) for n in known))}"
                )
            options = [frozenset(self.images) & frozenset(names)]
        else:
            options = list(dict.fromkeys([likely, frozenset(), every]))
        best: tuple[float, frozenset[str], dict[str, np.ndarray]] | None = None
        first: SideError | None = None
        for images in options:
            try:
                ours = self._port_call(images)
            except SideError as error:
                first = first or error
                continue
            paired = self._paired(theirs, ours)
            off = max(
                (self._off(theirs[a], ours[b], images)[0] for b, a in paired.items()),
                default=np.inf,
            )
            if best is None or off < best[0]:
                best = (off, images, ours)
            if off < 1e-2:
                break
        if best is None:
            assert first is not None
            raise first
        _, images, ours = best
        self.outputs = self._paired(theirs, ours)
        self._note_outputs(theirs, ours)
        found = set(images)
        for b, a in self.outputs.items():
            declared = self.images is not None
            image = (
                _say(a) in self.images
                if self.images is not None
                else self._off(theirs[a], ours[b], images)[1]
            )
            if image or (declared and a in (self.images or ())):
                found.add(_say(a))
        for n in self.target_names:
            if n in self.arrays and any(
                self.arrays[n].shape == theirs[a].shape and _say(a) in found
                for a in self.outputs.values()
            ):
                found.add(n)
        self.found_images = frozenset(found)
        for n in sorted(found):
            self.report.layouts[n] = "channels first there, last here"
        rng = np.random.default_rng(self.seed + 1)
        for a in self.outputs.values():
            if is_floating(theirs[a]):
                self.cotangents[a] = rng.standard_normal(theirs[a].shape).astype(np.float32)
            else:
                self.discrete.append(a)

    def _port_call(self, images: frozenset[str]) -> dict[str, np.ndarray]:
        arrays = {
            n: mx.array(channels_last(a) if n in images else a) for n, a in self.arrays.items()
        }
        watched = port_modules(self.port) if isinstance(self.port, mnn.Module) else {}
        with port_calls(watched) as calls:
            try:
                output = self.run_port(self.port, arrays)
                mx.eval(list(leaves(output).values()))
            except Exception as error:
                raise SideError("port", _in(calls.open, "in its forward pass"), error) from error
        if watched and not calls and self.port is not self.original:
            self.port = self.original  # call_port calls it by another name than its argument's
            self._set_mode()
            if self.plan is not None:
                self.plan = replace(self.plan, port=self.port)
                if self.plan.links:
                    self.plan.carry()
            return self._port_call(images)
        found = {n: _plain(a) for n, a in leaves(output).items()}
        if not found:
            raise SideError(
                "port",
                "in its forward pass",
                TypeError(f"it gives {type(output).__name__}, in which there is no array"),
            )
        return found

    def _paired(
        self, theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]
    ) -> dict[str, str]:
        """The port's outputs to the reference's: by name, else in order, of equal sizes first."""
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
        return pairs

    def _note_outputs(
        self, theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]
    ) -> None:
        if not self.outputs:
            raise ParityError(
                f"no output of the port can be paired with one of the reference: it gives "
                f"{_shapes(ours)}, the reference {_shapes(theirs)}. Return the same with "
                "call_reference= and call_port="
            )
        for side, given, used in (
            ("reference", theirs, set(self.outputs.values())),
            ("port", ours, set(self.outputs)),
        ):
            left = [n for n in given if n not in used]
            if left:
                self.report.notes.append(
                    f"outputs of the {side} that were not compared: {', '.join(map(_say, left))}"
                )

    def _off(self, a: np.ndarray, b: np.ndarray, images: frozenset[str]) -> tuple[float, bool]:
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

    # ------------------------------------------------------------------------- as a case

    def case(self) -> Case:
        modules = {MODEL} if self.modular else set()
        return Case(
            name=self.title,
            shapes=st.just({}),
            build=self._build,
            reference="reference",
            port="port",
            inputs=lambda shape, rng: dict(self.arrays),
            images=self.found_images,
            weights=self._weights if modules else (lambda *_: {}),
            plan=self._plan,
            compile_step=_compile_step if self.optimizer is not None else None,
        )

    def _plan(self, reference: tnn.Module, port: mnn.Module, **options: Any) -> FoundPlan:
        assert self.plan is not None
        return replace(self.plan, reference=reference, port=port)

    def _weights(self, shape: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The reference's own, but for what is alike throughout: it would hide its being unused.

        The ladder draws the others.
        """
        buffers = dict(self.prototype.named_buffers())
        own: dict[str, np.ndarray] = {}
        for name, tensor in reference_tensors(self.prototype).items():
            array = tensor.detach().float().cpu().numpy()
            ignored = self.plan is not None and name in self.plan.ignored
            statistic = name.rpartition(".")[2] in ("running_mean", "running_var")
            redrawn = self.weights == "random" or (array.size and (array == array.flat[0]).all())
            if ignored or not redrawn or (name in buffers and not statistic):
                own[f"{MODEL}.{name}"] = array
        return own

    def _build(self, library: Any, shape: Any) -> System:
        return self._build_reference() if library == "reference" else self._build_port()

    def _build_reference(self) -> System:
        module = (
            copy.deepcopy(self.prototype)
            if isinstance(self.prototype, tnn.Module)
            else self.prototype
        )
        compute = _pair(self.loss)[0]

        last: list[tuple[list[Any], Any]] = []

        def run(inputs: dict[str, Any]) -> Any:
            """Once for the outputs and for the loss of the same inputs: a forward pass is dear."""
            if (
                last
                and inputs
                and all(a is b for a, b in zip(last[0][0], inputs.values(), strict=True))
            ):
                return last.pop()[1]
            last[:] = [(list(inputs.values()), self.run_reference(module, inputs))]
            return last[0][1]

        def forward(**inputs: Any) -> dict[str, Any]:
            output = leaves(run(self._without_targets(inputs)))
            return {_say(a): output[a] for a in self.cotangents}

        def loss(**inputs: Any) -> Any:
            output = run(self._without_targets(inputs))
            if compute is not None:
                return compute(output, *(inputs[n] for n in self.target_names))
            found = leaves(output)
            return sum(
                (found[a] * torch.from_numpy(c).to(found[a].dtype)).sum()
                for a, c in self.cotangents.items()
            )

        system = System(
            modules={MODEL: module} if self.modular else {},
            forward=forward,
            losses={"loss": Loss(loss, (MODEL,) if self.modular else ())}
            if self.cotangents
            else {},
        )
        if self.optimizer is None or not self.modular:
            return system

        def step(module: Any, optimizer: Any, *arrays: Any) -> list[Any]:
            optimizer.zero_grad()
            value = loss(**dict(zip(self.arrays, arrays, strict=True)))
            value.backward()
            optimizer.step()
            return [value.detach()]

        made = _torch_optimizer(self.optimizer[0], module)
        return replace(system, optimizers={MODEL: made}, step=step)

    def _build_port(self) -> System:
        module = self.port
        if self.built and isinstance(module, mnn.Module):
            module = copy_port(module)  # weights are reloaded into another object
        self.built = True
        compute = _pair(self.loss)[1]

        def forward(**inputs: Any) -> dict[str, Any]:
            output = leaves(self.run_port(module, self._without_targets(inputs)))
            return {
                _say(a): output[b]
                for b, a in self.outputs.items()
                if a in self.cotangents and b in output
            }

        def loss(**inputs: Any) -> Any:
            output = self.run_port(module, self._without_targets(inputs))
            if compute is not None:
                return compute(output, *(inputs[n] for n in self.target_names))
            found = leaves(output)
            total = mx.array(0.0)
            for b, a in self.outputs.items():
                if a in self.cotangents:
                    c = self.cotangents[a]
                    c = channels_last(c) if _say(a) in self.found_images else c
                    total = total + (found[b] * mx.array(c)).sum()
            return total

        system = System(
            modules={MODEL: module} if self.modular else {},
            forward=forward,
            losses={"loss": Loss(loss, (MODEL,) if self.modular else ())}
            if self.cotangents
            else {},
        )
        if self.optimizer is None or not self.modular:
            return system

        def step(module: Any, optimizer: Any, *arrays: Any) -> list[Any]:
            inputs = dict(zip(self.arrays, arrays, strict=True))
            value, grads = mnn.value_and_grad(module, lambda: loss(**inputs))()
            optimizer.update(module, grads)
            return [value]

        given = self.optimizer[1]
        made = copy.deepcopy(given) if hasattr(given, "apply_single") else given()
        return replace(system, optimizers={MODEL: made}, step=step)

    def depends_on_mode(self) -> bool:
        """Whether training and evaluation differ by more than dropout."""
        norms = tnn.modules.batchnorm._NormBase
        modules = self.prototype.modules()
        return any(isinstance(m, norms) and m.track_running_stats for m in modules)

    def switch(self, training: bool) -> None:
        self.training = training
        self._train(self.prototype, training)
        self._set_mode()

    def judge_discrete(self, climb: Climb) -> Rung:
        """Outputs that are counts, indices or truths: equal wherever PyTorch is sure of them.

        An element counts where PyTorch's float64 and float32 agree at a point, which near ties
        they do not; the port has to agree there at more than half of the points.
        """
        points = [climb.point, *(climb.near() for _ in range(7))]
        sure: dict[str, Any] = {}
        off: dict[str, Any] = {}
        for point in points:
            exact, usual = (self._discrete_reference(s, point) for s in (climb.oracle, climb.usual))
            ours = self._discrete_port(climb.port, point)
            for b, a in self.outputs.items():
                if a not in self.discrete:
                    continue
                if ours[b].shape != exact[a].shape:
                    said = f"{_say(a)} has shape {list(ours[b].shape)}, not {list(exact[a].shape)}"
                    return Rung("forward", False, message=said)
                known = exact[a] == usual[a]
                sure[a] = sure.get(a, 0) + known
                off[a] = off.get(a, 0) + (known & (ours[b] != exact[a]))
        wrong = {a: int(np.sum(2 * off[a] > np.maximum(sure[a], 1))) for a in sure}
        message = "; ".join(
            f"{_say(a)}: {n} of {np.size(off[a])} elements differ" for a, n in wrong.items() if n
        )
        return Rung("forward", not message, message=message)

    def _discrete_reference(self, side: Any, point: Mapping[str, Any]) -> dict[str, np.ndarray]:
        side.load(point)
        inputs = {n: side._input(point[n]) for n in self.arrays}
        module = side.system.modules.get(MODEL, self.prototype)
        with torch.no_grad():
            output = self.run_reference(module, self._without_targets(inputs))
        return {n: _plain(a) for n, a in leaves(output).items()}

    def _discrete_port(self, side: Any, point: Mapping[str, Any]) -> dict[str, np.ndarray]:
        side.load(point)
        inputs = {n: side._input(n, point[n]) for n in self.arrays}
        module = side.system.modules.get(MODEL, self.port)
        output = self.run_port(module, self._without_targets(inputs))
        return {n: _plain(a) for n, a in leaves(output).items()}

    def variants(self, climb: Climb) -> list[Any]:
        """The port compiled in every way, at the point where the climb began."""
        side = climb.port
        side.load(climb.point)
        module = side.system.modules[MODEL]
        arrays = {
            n: mx.array(channels_last(a) if n in self.found_images else a)
            for n, a in self.arrays.items()
            if n not in self.target_names
        }
        found = of_port(
            module, named(arrays, lambda xs: self.run_port(module, xs)), list(arrays.values())
        )
        side.load(climb.point)
        return found

    def _without_targets(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {n: a for n, a in inputs.items() if n not in self.target_names}


def _pairs_or_none(reference: tnn.Module, port: mnn.Module, map: Map | None) -> Pairs:
    from mlx_parity.localise import pairs

    try:
        return pairs(reference, port, map)
    except CarryError:
        return Pairs()


def _in(open_calls: Sequence[str], otherwise: str) -> str:
    inner = [path for path in open_calls if path]
    return f"in {inner[-1]}" if inner else otherwise


def _say(name: str) -> str:
    return name or "output"


def _shapes(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{_say(n)} {list(a.shape)}" for n, a in arrays.items())


def _pair(loss: Any) -> tuple[Any, Any]:
    if isinstance(loss, tuple | list):
        if len(loss) != 2:
            raise ParityError("loss is one function for both sides, or a pair of them")
        return loss[0], loss[1]
    return loss, loss


def _torch_optimizer(given: Any, module: tnn.Module) -> torch.optim.Optimizer:
    """An optimizer over the copy's parameters: made by the user's function, or like the user's."""
    if not isinstance(given, torch.optim.Optimizer):
        return given(list(module.parameters()))
    settings = {
        k: v for k, v in given.defaults.items() if k in inspect.signature(type(given)).parameters
    }
    settings |= {k: v for k, v in given.param_groups[0].items() if k in settings}
    return type(given)(list(module.parameters()), **settings)


def _compile_step(step: Callable[..., Any], *stateful: Any) -> Callable[..., Any]:
    """The usual way to compile a training step in MLX, with all its state."""
    state = [*(s.state for s in stateful), mx.random.state]

    def take(*arrays: mx.array) -> Any:
        return step(*stateful, *arrays)

    return mx.compile(take, inputs=state, outputs=state)


# ------------------------------------------------------------------------------------ the climb


def _climb(
    subject: _Subject,
    report: Report,
    until: str,
    compiled: bool | None,
    variants: bool,
    localised: bool | None,
    explain: bool,
    say: Progress,
) -> None:
    case = subject.case()
    climb = Climb(case, {}, subject.seed)
    last = RANKS.get(until)
    if last is None:
        raise ParityError(f"until={until!r}: the rungs are {', '.join(RANKS)}")

    say("structure")
    structure = climb.structure()[0]
    if not structure.ok and last < RANKS["gradients"]:
        report.notes += structure.message.splitlines()
        structure = replace(structure, ok=True, message="")
    report.rungs.append(structure)

    say("forward, loss and gradients at nearby points")
    started = time.process_time()
    gradients = last >= RANKS["gradients"]
    try:
        rungs = climb.derivatives(gradients)
    except NoGradient as error:
        report.notes.append(f"{error}: gradients were not compared")
        gradients = False
        rungs = climb.derivatives(gradients)
    took = time.process_time() - started
    report.rungs += [r for r in rungs if RANKS[r.name] <= last]
    if subject.discrete:
        report.rungs.append(subject.judge_discrete(climb))
    if subject.modular and all(r.ok for r in report.rungs) and subject.depends_on_mode():
        say("the forward pass in the other mode")
        flipped = _flipped(subject, report)
        if flipped is not None:
            report.rungs.append(flipped[1])
            if not flipped[1].ok:
                climb, gradients = flipped[0], False

    ok = all(r.ok for r in report.rungs)
    if ok and gradients and last >= RANKS["optimizer step"]:
        if climb.usual.system.step is not None:
            say("optimizer step and trajectory")
            report.rungs += [r for r in climb.training() if RANKS[r.name] <= last]
        else:
            report.notes.append("nothing was trained: give optimizer= to compare training")
    if all(r.ok for r in report.rungs) and last >= RANKS["compiled"]:
        if compiled if compiled is not None else compiles():
            say("compiled")
            report.rungs.append(climb.compiled())
            if variants and subject.modular:
                say("compiled in other ways")
                report.variants = subject.variants(climb)
        else:
            report.notes.append("not compiled: mx.compile needs g++ at run time on Linux")
    if all(r.ok for r in report.rungs) and last >= RANKS["reloaded"] and subject.modular:
        say("reloaded")
        report.rungs += climb.reloaded()
    report.settle()

    failed = next((r.name for r in report.rungs if not r.ok), "")
    wanted = failed.partition(" in ")[0] in ("structure", "forward", "loss", "gradients") or (
        not failed and took < LOCALISE_SECONDS
    )
    if (
        subject.modular
        and subject.plan is not None
        and (wanted if localised is None else localised)
    ):
        say("module by module")
        _locate(subject, climb, report, failed)
    if explain and failed and subject.modular and hasattr(climb, "port"):
        say("looking for a known cause")
        _explain(subject, climb, report, failed)


def _flipped(subject: _Subject, report: Report) -> tuple[Climb, Rung] | None:
    """The forward pass in evaluation mode of a model in training, and the other way round."""
    other = "evaluation" if subject.training else "training"
    subject.switch(not subject.training)
    try:
        climb = Climb(subject.case(), {}, subject.seed)
        climb.structure()
        found = [r for r in climb.derivatives(gradients=False) if r.name == "forward"]
    except (ParityError, ValueError) as error:
        if isinstance(error, SideError) and error.side == "port":
            return climb, Rung(f"forward in {other}", False, message=str(error))
        report.notes.append(f"not compared in {other} mode: {error}")
        return None
    finally:  # the climb's models are copies, and stay in its mode
        subject.switch(not subject.training)
    return (climb, replace(found[0], name=f"forward in {other}")) if found else None


RANKS = {
    name: i
    for i, name in enumerate(
        (
            "structure",
            "forward",
            "loss",
            "gradients",
            "optimizer step",
            "trajectory",
            "compiled",
            "reloaded",
        )
    )
}


def _locate(subject: _Subject, climb: Climb, report: Report, failed: str) -> None:
    assert subject.plan is not None
    theirs = climb.usual.system.modules[MODEL]
    ours = port_modules(climb.port.system.modules[MODEL])
    pairs = Pairs(
        (
            replace(p, reference=theirs.get_submodule(p.reference_path), port=ours[p.port_path])
            for p in subject.plan.pairs
        ),
        subject.plan.pairs.unpaired,
    )
    loss = "loss" if climb.usual.system.losses else None
    try:
        also = [f for r in report.rungs for f in r.findings if not f.ok and _buffer(f.tensor)]
        located: Located = localise(climb, {MODEL: pairs}, loss, bool(failed), also)
    except Exception as error:  # the verdict stands without the picture
        report.notes.append(f"the modules could not be read: {type(error).__name__}: {error}")
        return
    report.readings = located.readings
    report.guilty = located.guilty
    report.notes += located.notes


def _explain_what_is_no_module(subject: _Subject, report: Report) -> None:
    """Known causes where no module is to blame: functions, and compiled steps."""
    failed = report.failed
    if failed is None:
        return
    kit = import_module("mlx_parity.diagnose")
    with suppress(Exception):  # an explanation is welcome; the verdict stands without it
        if failed.name == "compiled":
            report.diagnoses = kit.of_compiled(failed)
        elif not subject.modular and not subject.constants:
            report.diagnoses = kit.diagnose_functions(
                lambda **inputs: subject.run_reference(subject.prototype, inputs),
                lambda **inputs: subject.run_port(subject.port, inputs),
                kwargs=subject.arrays,
                backward=failed.name == "gradients",
            )


def _buffer(tensor: str) -> bool:
    return tensor.startswith(f"forward {MODEL}.")


def _explain(subject: _Subject, climb: Climb, report: Report, failed: str) -> None:
    """Known causes, by the catalogue of traps; both sides hold the point where they were read."""
    try:
        kit = import_module("mlx_parity.diagnose")
    except ImportError:
        return
    try:
        climb.usual.load(climb.point)
        climb.port.load(climb.point)
        if failed in ("optimizer step", "trajectory") and subject.optimizer is not None:
            theirs = climb.usual.system.optimizers[MODEL]
            found = kit.lint(
                climb.usual.system.modules[MODEL],
                climb.port.system.modules[MODEL],
                [(theirs, climb.port.system.optimizers[MODEL])],
                subject.map,
            )
            report.diagnoses = [d for d in found if "ptimizer" in str(d)] or list(found)
            return
        suspects: list[Any] = [*report.guilty] or [r.pair for r in report.readings]
        report.diagnoses = list(kit.diagnose(suspects))
    except Exception as error:  # an explanation is welcome; the verdict stands without it
        report.notes.append(f"no diagnosis: {type(error).__name__}: {error}")
