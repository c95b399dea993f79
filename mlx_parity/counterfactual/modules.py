"""Changes to a module, not to its calls: children, settings, mode, factors of the whole."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn as tnn

from mlx_parity.counterfactual.activations import ACTIVATIONS
from mlx_parity.counterfactual.alternative import Alternative
from mlx_parity.counterfactual.blocks import Visit, forwarding
from mlx_parity.counterfactual.calls import T

_MANY_CHILDREN = 24
"""From how many modules on only the upper levels are changed: pairs grow as the square."""


def of_children(module: tnn.Module, visits: Mapping[str, Visit]) -> Iterator[Alternative]:
    """Layers skipped, doubled, and swapped with their like."""

    def about(trap: str, what: str, within: Callable[..., Any], *paths: str) -> Alternative:
        calls = tuple(visits[path].start for path in paths if path in visits)
        return Alternative(trap, what, within, calls=calls)

    names = [n for n, m in module.named_modules() if n and not isinstance(m, tnn.ModuleList)]
    if len(names) > _MANY_CHILDREN:
        names = [n for n in names if n.count(".") < 2][:_MANY_CHILDREN]

    def skipped(name: str) -> Alternative:
        def within(m: tnn.Module) -> Any:
            return forwarding(m.get_submodule(name), lambda x, *_, **__: x)

        return about("layer-order", f"{name} is skipped", within, name)

    def doubled(name: str) -> Alternative:
        def within(m: tnn.Module) -> Any:
            child = m.get_submodule(name)
            once = child.forward
            return forwarding(child, lambda x, *a, **k: once(once(x, *a, **k), *a, **k))

        return about("layer-order", f"{name} is called twice", within, name)

    def swapped(a: str, b: str) -> Alternative:
        @contextlib.contextmanager
        def within(m: tnn.Module) -> Iterator[None]:
            one, two = m.get_submodule(a), m.get_submodule(b)
            with forwarding(one, two.forward), forwarding(two, one.__class__.forward.__get__(one)):
                yield

        return about("layer-order", f"{a} and {b} are swapped", within, a, b)

    def replaced(a: str, b: str) -> Alternative:
        def within(m: tnn.Module) -> Any:
            return forwarding(m.get_submodule(b), m.get_submodule(a).forward)

        return about("layer-order", f"{a} is called in the place of {b}", within, b)

    def alike(a: str, b: str) -> bool:
        one, two = module.get_submodule(a), module.get_submodule(b)
        shapes = [[p.shape for p in m.parameters()] for m in (one, two)]
        return type(one) is type(two) and bool(shapes[0]) and shapes[0] == shapes[1]

    for name in names:
        yield skipped(name)
    for a, b in itertools.combinations(names, 2):
        if not b.startswith(f"{a}.") and alike(a, b):
            yield swapped(a, b)
    for name in names:
        yield doubled(name)
    for a, b in itertools.permutations(names, 2):
        if not a.startswith(f"{b}.") and not b.startswith(f"{a}.") and alike(a, b):
            yield replaced(a, b)


_HEADS = ("head", "group")
_NAMED = {"scal": "attention-scale", "eps": "norm-eps", "slope": "activation-slope"}
"""What a setting is about, by a word in its name."""
_LARGE = 100.0
"""From here on a setting is looked for by its logarithm: the base of rotary positions."""


def of_settings(module: tnn.Module) -> Iterator[Alternative]:
    """Numbers and flags that the module and its children keep as attributes."""

    def set_to(path: str, key: str, value: Any) -> Callable[[tnn.Module], Any]:
        @contextlib.contextmanager
        def within(m: tnn.Module) -> Iterator[None]:
            owner = m.get_submodule(path)
            before = getattr(owner, key)
            setattr(owner, key, value)
            try:
                yield
            finally:
                setattr(owner, key, before)

        return within

    for path, owner in module.named_modules():
        if type(owner).__module__.startswith("torch.") or path.count(".") > 1:
            continue
        for key, value in vars(owner).items():
            if key.startswith("_") or key in ("training", "call_super_init"):
                continue
            name = ".".join(p for p in (path, key) if p)
            if isinstance(value, bool):
                yield Alternative(
                    "module-setting", f"{name} {not value}", set_to(path, key, not value)
                )
            elif isinstance(value, int):
                near = {value - 1, value + 1, 2 * value, value // 2}
                trap = "head-count" if any(h in key for h in _HEADS) else "module-setting"
                for other in sorted(n for n in near if n > 0 and n != value):
                    yield Alternative(trap, f"{name} {other} for {value}", set_to(path, key, other))
            elif isinstance(value, float):

                def at(
                    number: float, path: str = path, key: str = key, value: float = value
                ) -> Alternative:
                    trap = next((t for word, t in _NAMED.items() if word in key), "module-setting")
                    return Alternative(
                        trap,
                        f"{'.'.join(p for p in (path, key) if p)} {number:.6g} for {value:.6g}",
                        set_to(path, key, number),
                    )

                yield Alternative(
                    "module-setting", name, set_to(path, key, value), (value, value >= _LARGE), at
                )


def of_functions(module: tnn.Module) -> Iterator[Alternative]:
    """Activations that modules of their own write out: another in their place."""

    def replaced(path: str, function: Callable[[T], T]) -> Callable[[tnn.Module], Any]:
        return lambda m: forwarding(m.get_submodule(path), lambda x: function(x))

    for path, part in module.named_modules():
        known = _written_out(part)
        for kind, function in ACTIVATIONS.items():
            if known not in (None, kind):
                both = all("gelu" in k or "1.702" in k for k in (known, kind))
                trap = "gelu-approximation" if both else "activation-kind"
                yield Alternative(trap, f"{kind} for {known}", replaced(path, function))


def _written_out(module: tnn.Module) -> str | None:
    """Which known activation a module without weights computes for each element."""
    holds = any(True for _ in (*module.children(), *module.parameters(), *module.buffers()))
    if holds or type(module).__module__.startswith("torch."):
        return None
    x = torch.linspace(-5, 5, 60).reshape(3, 4, 5)
    try:
        with torch.no_grad():
            y = module(x)
    except Exception:  # it is called otherwise, or with something else
        return None
    if not isinstance(y, T) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    return next((k for k, f in ACTIVATIONS.items() if torch.allclose(y, f(x), 0, 1e-6)), None)


def of_mode(module: tnn.Module) -> Iterator[Alternative]:
    @contextlib.contextmanager
    def within(m: tnn.Module) -> Iterator[None]:
        before = {s: s.training for s in m.modules()}
        m.train(not m.training)
        try:
            yield
        finally:
            for s, training in before.items():
                s.training = training

    yield Alternative(
        "training-mode", f"{'evaluation' if module.training else 'training'} mode", within
    )


def _halves(x: T) -> T:
    """(x0, x2, ..., x1, x3, ...): neighbours become halves."""
    return torch.cat([x[..., ::2], x[..., 1::2]], -1)


def _neighbours(x: T) -> T:
    a, b = x.chunk(2, -1)
    return torch.stack([a, b], -1).flatten(-2)


def of_whole(module: tnn.Module) -> Iterator[Alternative]:
    """The module as a whole: a factor, rotary pairs, swapped image axes."""

    def wrapped(change: Callable[..., Any]) -> Callable[[tnn.Module], Any]:
        def within(m: tnn.Module) -> Any:
            once = m.forward
            return forwarding(m, lambda x, *a, **k: change(lambda y: once(y, *a, **k), x))

        return within

    for what, into, back in (
        ("pairs half the width apart", _neighbours, _halves),
        ("pairs of neighbours", _halves, _neighbours),
    ):
        yield Alternative(
            "rotary-layout",
            what,
            wrapped(lambda f, x, i=into, b=back: b(f(i(x)))),
        )

    yield Alternative("layer-order", "the whole of it skipped", wrapped(lambda f, x: x))
    for kind in ("sigmoid", "tanh", "relu"):
        yield Alternative(
            "activation-kind",
            f"a {kind} of the output",
            wrapped(lambda f, x, k=kind: _through(f(x), ACTIVATIONS[k])),
        )
    yield Alternative(
        "activation-kind",
        "a softmax of the output",
        wrapped(lambda f, x: _through(f(x), lambda y: y.softmax(-1))),
    )

    def factor(number: float) -> Alternative:
        return Alternative(
            "scale-factor",
            f"the output times {number:.6g}",
            wrapped(lambda f, x: _scaled(f(x), number)),
        )

    yield Alternative("scale-factor", "", factor(1.0).within, (1.0, False), factor)

    def of_input(number: float) -> Alternative:
        return Alternative(
            "scale-factor",
            f"the input times {number:.6g}",
            wrapped(lambda f, x: f(_floating_times(x, number))),
        )

    yield Alternative("scale-factor", "", of_input(1.0).within, (1.0, False), of_input)


def _floating_times(x: Any, number: float) -> Any:
    return x * number if isinstance(x, T) and x.is_floating_point() else x


def _scaled(value: Any, number: float) -> Any:
    return _through(value, lambda y: y * number)


def _through(value: Any, function: Callable[[T], T]) -> Any:
    if isinstance(value, T):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_through(v, function) for v in value)
    if isinstance(value, dict):
        return {k: _through(v, function) for k, v in value.items()}
    return value
