"""A check as a :class:`mlx_parity.Case`: both sides' systems, made from the user's two models."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn as tnn

from mlx_parity._backend import require_mlx
from mlx_parity.carry import reference_tensors
from mlx_parity.case import Case, Loss, System
from mlx_parity.errors import ParityError
from mlx_parity.sides import blame
from mlx_parity.structure import copy_port, leaves
from mlx_parity.subject import MODEL, Subject
from mlx_parity.trial import Agreement, say
from mlx_parity.weights import FoundPlan

require_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as mnn  # noqa: E402
from mlx.optimizers import Optimizer  # noqa: E402


def case_of(subject: Subject, agreed: Agreement) -> Case:
    """The case whose one shape is the user's inputs. Built in the subject's mode at that time.

    Made once for a subject: its first system of the port holds the subject's own copy.
    """
    builders = _Builders(subject, agreed)
    directions = builders.directions
    arrays = subject.arguments.arrays | {n: agreed.cotangents[a] for a, n in directions.items()}
    images = {n for a, n in directions.items() if say(a) in agreed.images}
    return Case(
        name=subject.asked.title,
        shapes=st.just({}),
        build=lambda library, shape: getattr(builders, library)(),
        reference="reference",
        port="port",
        inputs=lambda shape, rng: dict(arrays),
        images=agreed.images | images,
        weights=lambda shape, rng: _weights(subject),
        plan=lambda theirs, ours, **_: _plan(subject, theirs, ours),
        compile_step=_compile_step if subject.asked.optimizer is not None else None,
        dtype=subject.held,
        held=subject.held,
    )


def _plan(subject: Subject, reference: tnn.Module, port: mnn.Module) -> FoundPlan:
    assert subject.plan is not None
    return replace(subject.plan, reference=reference, port=port)


def _weights(subject: Subject) -> dict[str, np.ndarray]:
    """The reference's own, but for what is alike throughout: it would hide its being unused.

    The ladder draws the others.
    """
    if not subject.modular:
        return {}
    buffers = dict(subject.prototype.named_buffers())
    own: dict[str, np.ndarray] = {}
    for name, tensor in reference_tensors(subject.prototype).items():
        array = tensor.detach().float().cpu().numpy()
        ignored = subject.plan is not None and name in subject.plan.ignored
        statistic = name.rpartition(".")[2] in ("running_mean", "running_var")
        alike = array.size and (array == array.flat[0]).all()
        redrawn = subject.asked.weights == "random" or alike
        if ignored or not redrawn or (name in buffers and not statistic):
            own[f"{MODEL}.{name}"] = array
    return own


class _Builders:
    """A system for each side, of copies of the subject's models."""

    def __init__(self, subject: Subject, agreed: Agreement):
        self.subject, self.agreed = subject, agreed
        self.losses = _two(subject.asked.loss)
        _refuse_what_is_no_optimizer(subject.asked.optimizer)
        self.of = (MODEL,) if subject.modular else ()
        self.port_in_use = False
        # What the outputs are projected on varies with the inputs: a last bias's gradient is a sum
        # of it alone, and rounds at every point alike if it is the same at every point.
        self.directions = {
            a: f"direction{i}"
            for i, a in enumerate(agreed.cotangents if self.losses[0] is None else ())
            if agreed.loss is not None
        }

    def _names(self) -> list[str]:
        """Of a step's arrays."""
        return [*self.subject.arguments.arrays, *self.directions.values()]

    def _own(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without the directions, which no model takes."""
        return {n: x for n, x in inputs.items() if n not in self.directions.values()}

    def _system(self, module: Any, forward: Any, loss: Any) -> System:
        losses = {} if self.agreed.loss is None else {self.agreed.loss: Loss(loss, self.of)}
        modules = {MODEL: module} if self.subject.modular else {}
        return System(modules=modules, forward=forward, losses=losses)

    def reference(self) -> System:
        subject, agreed, compute = self.subject, self.agreed, self.losses[0]
        module = subject.prototype
        if isinstance(module, tnn.Module):
            module = copy.deepcopy(module)
        last: list[tuple[list[Any], Any]] = []

        def run(inputs: dict[str, Any]) -> Any:
            """Once for the outputs and for the loss of the same inputs: a forward pass is dear."""
            given = list(subject.arguments.model(inputs).values())
            if last and given and all(a is b for a, b in zip(last[0][0], given, strict=True)):
                return last.pop()[1]
            last[:] = [(given, subject.run_reference(module, inputs))]
            return last[0][1]

        def forward(**inputs: Any) -> dict[str, Any]:
            output = leaves(run(self._own(inputs)))
            return {say(a): output[a] for a in agreed.cotangents}

        def loss(**inputs: Any) -> Any:
            output = run(self._own(inputs))
            if compute is not None:
                return _scalar(compute(output, *subject.arguments.loss(inputs)))
            found = leaves(output)
            return sum((found[a] * inputs[n]).sum() for a, n in self.directions.items())

        system = self._system(module, forward, loss)
        if subject.asked.optimizer is None or not subject.modular:
            return system

        def step(module: Any, optimizer: Any, *arrays: Any) -> list[Any]:
            optimizer.zero_grad()
            value = loss(**dict(zip(self._names(), arrays, strict=True)))
            value.backward()
            optimizer.step()
            return [value.detach()]

        with blame("reference", "in making its optimizer"):
            made = _torch_optimizer(subject.asked.optimizer[0], module)
        return replace(system, optimizers={MODEL: made}, step=step)

    def port(self) -> System:
        subject, agreed, compute = self.subject, self.agreed, self.losses[1]
        module = subject.port
        if self.port_in_use and isinstance(module, mnn.Module):
            module = copy_port(module)  # weights are reloaded into another object
        self.port_in_use = True

        def forward(**inputs: Any) -> dict[str, Any]:
            output = leaves(subject.run_port(module, self._own(inputs)))
            return {
                say(a): output[b]
                for b, a in agreed.outputs.items()
                if a in agreed.cotangents and b in output
            }

        def loss(**inputs: Any) -> Any:
            output = subject.run_port(module, self._own(inputs))
            if compute is not None:
                return _scalar(compute(output, *subject.arguments.loss(inputs)))
            found = leaves(output)
            total = mx.array(0.0)
            for b, a in agreed.outputs.items():
                if a in self.directions:
                    total = total + (found[b] * inputs[self.directions[a]]).sum()
            return total

        system = self._system(module, forward, loss)
        if subject.asked.optimizer is None or not subject.modular:
            return system

        def step(module: Any, optimizer: Any, *arrays: Any) -> list[Any]:
            inputs = dict(zip(self._names(), arrays, strict=True))
            value, grads = mnn.value_and_grad(module, lambda: loss(**inputs))()
            optimizer.update(module, grads)
            return [value]

        given = subject.asked.optimizer[1]
        with blame("port", "in making its optimizer"):
            made = copy.deepcopy(given) if isinstance(given, Optimizer) else given()
        return replace(system, optimizers={MODEL: made}, step=step)


def _two(loss: Any) -> tuple[Any, Any]:
    if isinstance(loss, tuple | list):
        if len(loss) != 2:
            raise ParityError("loss is one function for both sides, or a pair of them")
        return loss[0], loss[1]
    return loss, loss


def _scalar(value: Any) -> Any:
    if getattr(value, "shape", ()) not in ((), (1,)):
        raise ParityError(
            f"loss gives an array of shape {list(value.shape)}: it has to give a scalar, by a mean "
            "or a sum"
        )
    return value


def _refuse_what_is_no_optimizer(given: Any) -> None:
    if given is None:
        return
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ParityError(
            "optimizer is a pair, PyTorch's and MLX's: (lambda p: torch.optim.SGD(p, 0.1), "
            "mlx.optimizers.SGD(0.1))"
        )
    if isinstance(given[1], type) or not (isinstance(given[1], Optimizer) or callable(given[1])):
        name = getattr(given[1], "__name__", repr(given[1]))
        raise ParityError(
            f"optimizer: MLX's is {name}, which is no instance: give {name}(learning_rate)"
        )


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
