"""The two sides behind one interface: a point goes in, named arrays come out, the oracle's in
float64.

A point maps ``module.tensor`` and input names to float32 arrays in the reference's layout and under
its names. So do the results, whichever side computed them: the ladder sees no framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mlx_parity._backend import require_mlx
from mlx_parity.carry import (
    Plan,
    channels_first,
    channels_last,
    flat,
    match,
    reference_tensors,
)
from mlx_parity.case import Case, Loss, Precision, Shape, System
from mlx_parity.double import InDouble
from mlx_parity.elementary import OfMLX
from mlx_parity.equality import Tensors
from mlx_parity.errors import NoGradient, ParityError, SideError
from mlx_parity.layers import port_modules
from mlx_parity.structure import is_floating

require_mlx()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_unflatten  # noqa: E402

Results = dict[str, np.ndarray]

Told = Literal["update", "moments", "trajectory"]
TRAINED: tuple[Told, ...] = ("update", "moments", "trajectory")
"""What training tells of: the first step's update of the weights; the optimizer's state after it;
each step's losses, and the last weights."""
FIRST: tuple[Told, ...] = TRAINED[:2]
LAST: tuple[Told, ...] = TRAINED[2:]

OPTIMIZER_STATE = {"exp_avg": "m", "exp_avg_sq": "v", "momentum_buffer": "v", "square_avg": "v"}
"""PyTorch's names of an optimizer's moments and MLX's."""


def at_step(name: str, step: int) -> str:
    """The point's name of an input of training step ``step``."""
    return f"{name}@{step}"


TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
MLX_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def in_precision(array: np.ndarray, precision: Precision) -> np.ndarray:
    """A float32 array's nearest numbers of ``precision``, in float32."""
    if precision == "float32":
        return array
    return torch.from_numpy(array).to(TORCH_DTYPES[precision]).float().numpy()


class TorchSide:
    """The reference: in float64 the oracle, in the port's precision the measure of usual rounding.

    ``autocast`` is what ``torch.autocast`` computes in, all calls of the system being within. It
    keeps no rounded weights: an optimizer's update would not reach those that are kept.
    """

    def __init__(
        self, case: Case, shape: Shape, dtype: torch.dtype, autocast: torch.dtype | None = None
    ):
        self.dtype = dtype
        self.system = case.build(case.reference, shape)
        for module in self.system.modules.values():
            module.to(dtype)
        if autocast is not None:
            cast = torch.autocast("cpu", dtype=autocast, cache_enabled=False)
            self.system = _within(self.system, cast)

    @property
    def _in_double(self) -> str:
        """What a model that only runs in float32 raises about."""
        return " in float64, in which it is the oracle" if self.dtype == torch.float64 else ""

    @classmethod
    def oracle(cls, case: Case, shape: Shape) -> TorchSide:
        """What both sides are held against: PyTorch in float64, also where it casts to float32."""
        side = cls(case, shape, torch.float64)
        side.system = _within(side.system, InDouble())
        return side

    @classmethod
    def usual(cls, case: Case, shape: Shape) -> TorchSide:
        """The yardstick: PyTorch in the precision of the port, with MLX's ``erf``."""
        autocast = TORCH_DTYPES[case.dtype] if case.dtype != case.held else None
        side = cls(case, shape, TORCH_DTYPES[case.held], autocast)
        side.system = _within(side.system, OfMLX())
        return side

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer as ``module.tensor``."""
        return {
            f"{m}.{name}": tensor
            for m, module in self.system.modules.items()
            for name, tensor in reference_tensors(module).items()
        }

    def load(self, point: Tensors) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(torch.from_numpy(point[name]))

    def _input(self, array: np.ndarray, grad: bool = False) -> torch.Tensor:
        if array.dtype == np.bool_:
            return torch.from_numpy(array)
        if not np.issubdtype(array.dtype, np.floating):
            return torch.from_numpy(array).long()
        return torch.tensor(array, dtype=self.dtype, requires_grad=grad)

    def derivatives(self, point: Tensors, names: Iterable[str], gradients: bool = True) -> Results:
        """Outputs, buffers, losses, and each loss's gradients to its parameters and the inputs.

        Raises :class:`SideError` where the model itself raises.
        """
        self.load(point)
        inputs = {n: self._input(point[n], grad=True) for n in names}
        found: Results = {}
        if self.system.forward is not None:
            with blame("reference", f"in its forward pass{self._in_double}"):
                outputs = self.system.forward(**inputs)
            for name, value in outputs.items():
                found[f"forward {name}"] = _array(value)
            for m, module in self.system.modules.items():
                for name, buffer in reference_tensors(module).items():
                    if not isinstance(buffer, torch.nn.Parameter):
                        found[f"forward {m}.{name}"] = _array(buffer)
        for name, loss in self.system.losses.items():
            with blame("reference", f"in computing {name}"):
                value = loss.function(**inputs)
            found[f"loss {name}"] = _array(value)
            if not gradients:
                continue
            wrt = {n: x for n, x in inputs.items() if x.requires_grad}
            for m in loss.of:
                parameters = self.system.modules[m].named_parameters()
                wrt |= {f"{m}.{k}": p for k, p in parameters if p.requires_grad}
            if not wrt:
                continue
            with blame("reference", f"in differentiating {name}", NoGradient):
                grads = torch.autograd.grad(value, list(wrt.values()), allow_unused=True)
            for (n, x), g in zip(wrt.items(), grads, strict=True):
                found[f"gradients {name}/{n}"] = _view(torch.zeros_like(x) if g is None else g)
        return found

    def train(
        self, point: Tensors, names: Sequence[str], steps: int, *, tell: Sequence[Told] = LAST
    ) -> Results:
        """``steps`` training steps; which of :data:`TRAINED` to tell of."""
        assert self.system.step is not None
        self.load(point)
        modules, optimizers = self.system.modules, self.system.optimizers
        for optimizer in optimizers.values():
            optimizer.state.clear()
        found: Results = {}
        for i in range(steps):
            inputs = [self._input(point[at_step(n, i)]) for n in names]
            rates = [[g["lr"] for g in o.param_groups] for o in optimizers.values()]
            if self.dtype is torch.float32:
                for optimizer in optimizers.values():
                    _in_single_precision(optimizer, i + 1)
            with blame("reference", "in its training step"):
                losses = self.system.step(*modules.values(), *optimizers.values(), *inputs)
            if self.dtype is torch.float32:
                for optimizer, kept in zip(optimizers.values(), rates, strict=True):
                    for group, rate in zip(optimizer.param_groups, kept, strict=True):
                        group["lr"] = rate
            last = i == steps - 1
            if "trajectory" in tell:
                for name, loss in zip(self.system.losses, losses, strict=True):
                    found[f"trajectory {name} {i}"] = _array(loss)
            moments = self._moments(last) if i == 0 and "moments" in tell else {}
            if last:  # three copies of the model, which would stand beside those that are told of
                for optimizer in optimizers.values():
                    optimizer.state.clear()
                    optimizer.zero_grad()
            if i == 0 and "update" in tell:
                found |= self._update(point)
            found |= moments
        if "trajectory" in tell:
            for name, tensor in self.tensors().items():
                found[f"trajectory {name}"] = _array(tensor)
        return found

    def _update(self, point: Tensors) -> Results:
        return {
            f"update {name}": np.subtract(_view(tensor), point[name], dtype=np.float64)
            for name, tensor in self.tensors().items()
        }

    def _moments(self, last: bool) -> Results:
        """The optimizer's moments; no copies if it takes no further step."""
        found: Results = {}
        for m, optimizer in self.system.optimizers.items():
            for name, parameter in self.system.modules[m].named_parameters():
                for key, state in optimizer.state.get(parameter, {}).items():
                    if key in OPTIMIZER_STATE and state is not None:
                        found[f"update {m}.{name} {key}"] = (_view if last else _array)(state)
        return found


class MLXSide:
    """The port."""

    def __init__(self, case: Case, shape: Shape, reference: System):
        self.images = case.images
        self.held: Precision = case.held
        self.half = case.dtype != "float32"
        self.system = case.build(case.port, shape)
        self._dtypes = {
            m: {k: a.dtype for k, a in flat(module.parameters()).items()}
            for m, module in self.system.modules.items()
        }
        options = case.carry(shape)
        self.plans: dict[str, Plan] = {
            m: (case.plan or match)(reference.modules[m], module, **options.get(m, {}))
            for m, module in self.system.modules.items()
        }
        for m, optimizer in self.system.optimizers.items():
            optimizer.init(self.system.modules[m].trainable_parameters())
        self.stateful = [*self.system.modules.values(), *self.system.optimizers.values()]
        self._fresh = {
            m: {k: _packed(value) for k, value in flat(o.state).items()}
            for m, o in self.system.optimizers.items()
        }
        self._reset()
        self._moment_names = {
            m: _moment_names(reference.optimizers[m]) for m in self.system.optimizers
        }

    def load(self, point: Tensors) -> None:
        for m, plan in self.plans.items():
            plan.load({n.removeprefix(f"{m}."): a for n, a in point.items() if _of(m, n)})
            if self.half:  # what it holds in half precision it goes on holding so
                loaded = flat(plan.port.parameters()).items()
                restored = [(k, a.astype(self._kept(m, k, a))) for k, a in loaded]
                plan.port.update(tree_unflatten(restored))

    def set_whole_numbers_aside(self) -> list[str]:
        """Freeze arrays without real numbers, which MLX counts as trainable too; their names."""
        found = []
        for root in self.system.modules.values():
            for path, module in port_modules(root).items():
                for key, array in list(module.items()):
                    whole = isinstance(array, mx.array) and not is_floating(array)
                    if whole and key in module.trainable_parameters():
                        module.freeze(recurse=False, keys=key)
                        found.append(f"{path}.{key}" if path else key)
        return found

    def _kept(self, module: str, name: str, array: mx.array) -> mx.Dtype:
        """The type that a tensor of the port goes on having, whatever is loaded into it."""
        if self.held == "float32" or not mx.issubdtype(array.dtype, mx.floating):
            return self._dtypes[module][name]
        return MLX_DTYPES[self.held]

    def _input(self, name: str, array: np.ndarray) -> mx.array:
        made = mx.array(channels_last(array) if name in self.images else array)
        return made.astype(MLX_DTYPES[self.held]) if made.dtype == mx.float32 else made

    def _output(self, name: str, array: mx.array) -> np.ndarray:
        found = _array(array)
        return channels_first(found) if name in self.images else found

    def _floating(self, inputs: Mapping[str, mx.array]) -> dict[str, mx.array]:
        return {n: x for n, x in inputs.items() if mx.issubdtype(x.dtype, mx.floating)}

    def derivatives(
        self,
        point: Tensors,
        names: Iterable[str],
        transform: Callable[[str, Callable[..., Any]], Callable[..., Any]] = lambda name, f: f,
        gradients: bool = True,
    ) -> Results:
        """As :meth:`TorchSide.derivatives`; ``transform(name, f)`` may compile the evaluation."""
        self.load(point)
        inputs = {n: self._input(n, point[n]) for n in names}
        found: Results = {}
        if self.system.forward is not None:
            with blame("port", "in its forward pass"):
                outputs = self.system.forward(**inputs)
                mx.eval(outputs)
            for name, value in outputs.items():
                found[f"forward {name}"] = self._output(name, value)
            for m, module in self.system.modules.items():
                plan = self.plans[m]
                parameters = dict(plan.reference.named_parameters())
                buffers = {k.port for k in plan.links if not parameters.keys() >= {*k.sources}}
                arrays = {k: _view(v) for k, v in flat(module.parameters()).items() if k in buffers}
                for name, value in plan.values(arrays).items():
                    if name not in parameters:
                        found[f"forward {m}.{name}"] = value
        for name, loss in self.system.losses.items():
            evaluate = transform(name, self._differentiated(loss, inputs))
            parameters = {m: self.system.modules[m].trainable_parameters() for m in loss.of}
            if not gradients:
                with blame("port", f"in computing {name}"):
                    found[f"loss {name}"] = _array(loss.function(**inputs))
                continue
            held = {m: module.parameters() for m, module in self.system.modules.items()}
            try:
                with blame("port", f"in differentiating {name}", NoGradient):
                    value, (of_parameters, of_inputs) = evaluate(parameters, inputs, held)
                    mx.eval(value, of_parameters, of_inputs)
            finally:  # the differentiated function left tracers behind
                for m, tree in held.items():
                    self.system.modules[m].update(tree)
            found[f"loss {name}"] = _array(value)
            for n, g in of_inputs.items():
                found[f"gradients {name}/{n}"] = self._output(n, g)
            for m in loss.of:
                arrays = {k: _view(g) for k, g in flat(of_parameters[m]).items()}
                for n, g in self.plans[m].to_reference(arrays).items():
                    found[f"gradients {name}/{m}.{n}"] = g
        self._rest()
        return found

    def _differentiated(self, loss: Loss, inputs: Mapping[str, mx.array]) -> Callable[..., Any]:
        """(parameters, inputs, all that the modules hold) to the loss and its gradients.

        No other state: what is not handed in, a compiled function takes for a constant.
        """
        floating = self._floating(inputs)

        def value(parameters: Any, floats: Any, others: Any, held: Any) -> mx.array:
            for m, tree in [*held.items(), *parameters.items()]:
                self.system.modules[m].update(tree)
            return loss.function(**{n: (floats | others)[n] for n in inputs})

        def evaluate(parameters: Any, inputs: Any, held: Any) -> Any:
            floats = {n: inputs[n] for n in floating}
            others = {n: x for n, x in inputs.items() if n not in floating}
            argnums = [i for i, tree in enumerate((parameters, floats)) if tree]
            if not argnums:
                return value(parameters, floats, others, held), ({}, {})
            out, grads = mx.value_and_grad(value, argnums)(parameters, floats, others, held)
            grads = list(grads) if len(argnums) > 1 else [grads]
            return out, tuple(grads.pop(0) if i in argnums else {} for i in range(2))

        return evaluate

    def train(
        self,
        point: Tensors,
        names: Sequence[str],
        steps: int,
        step: Callable[..., Sequence[mx.array]] | None = None,
        *,
        tell: Sequence[Told] = LAST,
    ) -> Results:
        """As :meth:`TorchSide.train`; ``step(*inputs)`` may be the compiled one.

        MLX's random state is seeded, so that steps that draw draw alike compiled and not.
        """
        self.begin(point)
        found: Results = {}
        for i in range(steps):
            losses = self.take(point, names, i, step)
            if "trajectory" in tell:
                for name, loss in zip(self.system.losses, losses, strict=True):
                    found[f"trajectory {name} {i}"] = _array(loss)
            if i == 0 and "update" in tell:
                found |= self._update(point)
            if i == 0 and "moments" in tell:
                found |= self._moments()
        if "trajectory" in tell:
            for name, tensor in self.tensors().items():
                found[f"trajectory {name}"] = tensor
        self._rest()
        return found

    def begin(self, point: Tensors) -> None:
        """As before the first step."""
        self._reset()
        self.load(point)
        mx.random.seed(0)

    def take(
        self,
        point: Tensors,
        names: Sequence[str],
        i: int,
        step: Callable[..., Sequence[mx.array]] | None = None,
    ) -> Sequence[mx.array]:
        """Training step ``i``; its losses."""
        assert self.system.step is not None
        take = step or partial(self.system.step, *self.stateful)
        arrays = [self._input(n, point[at_step(n, i)]) for n in names]
        with blame("port", "in its training step"):
            losses = take(*arrays)
            mx.eval(losses, [s.state for s in self.stateful])
        return losses

    def _reset(self) -> None:
        """The optimizers as they were made."""
        for m, optimizer in self.system.optimizers.items():
            restore_tree(optimizer.state, {k: make() for k, make in self._fresh[m].items()})

    def _rest(self) -> None:
        """Hold no moments and no weights until a point is loaded; weights read meanwhile are NaN.

        Of a model trained with Adam they are three copies, while the other side trains.
        """
        self._reset()
        for plan in self.plans.values():
            loaded = {link.port for link in plan.links}
            held = [(k, a) for k, a in flat(plan.port.parameters()).items() if k in loaded]
            nothing = [(k, mx.full(a.shape, math.nan, a.dtype)) for k, a in held]
            plan.port.update(tree_unflatten(nothing))

    def tensors(self) -> Results:
        """Every parameter and buffer as ``module.tensor``, under the reference's names."""
        found: Results = {}
        for m, plan in self.plans.items():
            arrays = {k: _view(v) for k, v in flat(plan.port.parameters()).items()}
            found |= {f"{m}.{n}": a for n, a in plan.values(arrays).items()}
        return found

    def _update(self, point: Tensors) -> Results:
        return {
            f"update {n}": np.subtract(a, point[n], dtype=np.float64)
            for n, a in self.tensors().items()
        }

    def _moments(self) -> Results:
        found: Results = {}
        for m, optimizer in self.system.optimizers.items():
            state = flat(optimizer.state)
            for key in self._moment_names[m]:
                ours = OPTIMIZER_STATE[key]
                arrays = {
                    k.removesuffix(f".{ours}"): _view(v)
                    for k, v in state.items()
                    if k.endswith(f".{ours}")
                }
                for n, a in self.plans[m].values(arrays).items():
                    found[f"update {m}.{n} {key}"] = a
        return found

    def save(self, folder: Path) -> None:
        """Modules' weights and optimizers' state as safetensors files in ``folder``."""
        for m, module in self.system.modules.items():
            module.save_weights(str(folder / f"{m}.safetensors"))
        for m, optimizer in self.system.optimizers.items():
            mx.save_safetensors(str(folder / f"{m}.optimizer.safetensors"), flat(optimizer.state))

    def reload(self, folder: Path) -> None:
        """What :meth:`save` wrote, into this side's own modules and optimizers."""
        for m, module in self.system.modules.items():
            module.load_weights(str(folder / f"{m}.safetensors"), strict=True)
        for m, optimizer in self.system.optimizers.items():
            saved = mx.load(str(folder / f"{m}.optimizer.safetensors"))
            assert isinstance(saved, dict)
            restore_tree(optimizer.state, saved)


def _within(system: System, context: AbstractContextManager[Any]) -> System:
    """The same system, each of whose functions runs within ``context``."""

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with context:
                return function(*args, **kwargs)

        return run

    return replace(
        system,
        forward=system.forward and inside(system.forward),
        losses={
            n: replace(loss, function=inside(loss.function)) for n, loss in system.losses.items()
        },
        step=system.step and inside(system.step),
    )


@contextmanager
def blame(side: str, doing: str, kind: type[SideError] = SideError) -> Iterator[None]:
    """Whatever the model raises here is its own: say whose it is, and doing what."""
    try:
        yield
    except ParityError:
        raise
    except Exception as error:
        raise kind(side, doing, error) from error


def _array(value: Any) -> np.ndarray:
    """A copy, in the side's own precision or, where that is none of NumPy's, in float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        whole = value if value.dtype == torch.float64 else value.float()
        return whole.numpy().copy()
    return np.array(value.astype(mx.float32))


def _view(value: Any) -> np.ndarray:
    """As :func:`_array`, without a copy: of what nobody changes in place, as any array of MLX's."""
    if isinstance(value, torch.Tensor):
        whole = value.dtype in (torch.float32, torch.float64)
        return value.detach().cpu().numpy() if whole else _array(value)
    return np.asarray(value.astype(mx.float32))


def _of(module: str, name: str) -> bool:
    return name.startswith(f"{module}.")


def _packed(value: Any) -> Callable[[], Any]:
    """What makes ``value`` again: moments begin as zeros, not worth the memory of two models."""
    if isinstance(value, mx.array) and value.size > 1:
        first = mx.array(value.reshape(-1)[0].item(), value.dtype)  # no view, which holds them all
        if mx.all(value == first):
            return partial(mx.full, value.shape, first)
    return lambda: value


def restore_tree(tree: Any, flat: Mapping[str, mx.array]) -> None:
    """Put arrays back into a tree in place: a compiled step holds on to the tree's own dicts."""

    def put(node: Any, new: Any) -> None:
        for key, value in new.items() if isinstance(new, dict) else enumerate(new):
            if isinstance(value, dict | list):
                put(node[key], value)
            else:
                node[key] = value

    put(tree, tree_unflatten(list(flat.items())))


def _in_single_precision(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give the step the rounding that Adam's corrections have in float32: 1 - 0.999 is off by 1e-5.

    MLX computes them so, PyTorch in Python's double precision. It is the usual rounding of the
    precision in which the port computes, and so belongs to the float32 side, not to the oracle.
    """
    for group in optimizer.param_groups:
        betas, rate = group.get("betas"), group["lr"]
        if not isinstance(betas, tuple | list) or not all(isinstance(b, float) for b in betas):
            continue
        if not isinstance(rate, float):
            continue
        exact, single = (
            math.sqrt(float(1 - number(betas[1]) ** step)) / float(1 - number(betas[0]) ** step)
            for number in (float, np.float32)
        )
        group["lr"] = rate * single / exact


def _moment_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """The moments that this optimizer will hold, by PyTorch's names."""
    if isinstance(optimizer, torch.optim.Adam):
        return ["exp_avg", "exp_avg_sq"]
    if isinstance(optimizer, torch.optim.RMSprop):
        return ["square_avg"]
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults.get("momentum"):
        return ["momentum_buffer"]
    return []
