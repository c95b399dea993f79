"""The two convolution layers over drawn geometries: every route, first and second derivatives."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import torch
from hypothesis import strategies as st

import mlx_impl.convolution
import mlx_impl.layers
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests.cases.common import Arrays, Rng, normal


class Library(NamedTuple):
    """One side: its layers, ``gradient(f, x)`` of a scalar, and how a route is forced."""

    layers: Any
    gradient: Callable[[Callable[[Any], Any], Any], Any]
    route: Callable[[str], AbstractContextManager[None]]


def _torch_gradient(f: Callable[[Any], Any], x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(f(x), x, create_graph=True)[0]


TORCH = Library(torch.nn, _torch_gradient, lambda name: nullcontext())
MLX = Library(mlx_impl.layers, lambda f, x: mx.grad(f)(x), mlx_impl.convolution.route)

ROUTES = tuple(r for r in mlx_impl.convolution.ROUTES if r != "native")
"""All but MLX's own, which is wrong for some of these geometries: see test_convolution.py."""

Pair = tuple[int, int]


@st.composite
def geometries(draw: st.DrawFn, transposed: bool) -> dict[str, Any]:
    """A layer's arguments and the sizes of a convolution, ``image`` to ``result``.

    Rows or columns of the image that no result depends on (a stride that does not divide, or
    output padding) and padding beyond the kernel's reach are drawn as well.
    """

    def pair(low: int, high: int) -> Pair:
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel, stride, dilation = pair(1, 4), pair(1, 3), pair(1, 3)
    groups = 1 if transposed else draw(st.integers(1, 3))
    image, result, padding, left_over = [], [], [], []
    for i in (0, 1):
        n = draw(st.integers(1, 4).filter(lambda n: n not in result))  # h != w
        most = max(stride[i], dilation[i]) if transposed else stride[i]
        rest = draw(st.integers(0, most - 1))
        padded = stride[i] * (n - 1) + dilation[i] * (kernel[i] - 1) + 1 + rest
        padding.append(draw(st.integers(0, min(3, (padded - 1) // 2))))
        image.append(padded - 2 * padding[i])
        result.append(n)
        left_over.append(rest)
    return {
        "batch": draw(st.integers(1, 3)),
        "channels": groups * draw(st.integers(1, 3)),
        "filters": groups * draw(st.integers(1, 3)),
        "image": tuple(image),
        "result": tuple(result),
        "kernel": kernel,
        "stride": stride,
        "padding": tuple(padding),
        "dilation": dilation,
        **({"output_padding": tuple(left_over)} if transposed else {"groups": groups}),
        "bias": draw(st.booleans()),
        "route": draw(st.sampled_from(ROUTES)),
    }


def _layer(library: Library, shape: Shape) -> Any:
    sides = shape["channels"], shape["filters"]
    arguments = [shape[n] for n in ("kernel", "stride", "padding")]
    named = {"dilation": shape["dilation"], "bias": shape["bias"]}
    if "groups" in shape:
        named["groups"] = shape["groups"]
        return library.layers.Conv2d(*sides, *arguments, **named)
    named["output_padding"] = shape["output_padding"]
    return library.layers.ConvTranspose2d(*reversed(sides), *arguments, **named)


def _build(library: Library, shape: Shape) -> System:
    layer = _layer(library, shape)

    def call(x: Any) -> Any:
        with library.route(shape["route"]):
            return layer(x)

    return System(
        modules={"layer": layer},
        forward=lambda x, cotangent: {"output": call(x)},
        losses={"projection": Loss(lambda x, cotangent: (call(x) * cotangent).sum(), ("layer",))},
    )


def _build_second(library: Library, shape: Shape) -> System:
    """The squared norm of an input gradient, as a gradient penalty has it.

    Of the squared output, so that the gradient depends on everything, the input included.
    """
    layer = _layer(library, shape)

    def penalty(x: Any, cotangent: Any) -> Any:
        def loss(x: Any) -> Any:
            with library.route(shape["route"]):
                return (layer(x) ** 2 * cotangent).sum()

        return (library.gradient(loss, x) ** 2).mean()

    return System(modules={"layer": layer}, losses={"penalty": Loss(penalty, ("layer",))})


def _inputs(shape: Shape, rng: Rng) -> Arrays:
    image = normal(rng, shape["batch"], shape["channels"], *shape["image"])
    result = normal(rng, shape["batch"], shape["filters"], *shape["result"])
    if "groups" in shape:
        return {"x": image, "cotangent": result}
    return {"x": result, "cotangent": image}


def convolution_case(
    name: str, transposed: bool, build: Callable[..., System], cost: int = 1
) -> Case:
    return Case(
        name=name,
        side="canonical",
        shapes=geometries(transposed),
        build=build,
        reference=TORCH,
        port=MLX,
        inputs=_inputs,
        images=frozenset({"x", "cotangent", "output"}),
        cost=cost,
    )


CASES = (
    convolution_case("Conv2d", False, _build),
    convolution_case("ConvTranspose2d", True, _build),
    convolution_case("Conv2d second derivatives", False, _build_second, cost=2),
    convolution_case("ConvTranspose2d second derivatives", True, _build_second, cost=2),
)
