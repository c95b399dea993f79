"""Convolutions by every route: PyTorch's numbers, MLX's own interface, and MLX's own defects.

The layers climb the ladder as cases (tests/cases/convolution.py); here are the maps beneath them.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlx_impl import convolution, layers
from mlx_impl.convolution import Geometry, Maps, cheapest, choose, conv2d, conv_transpose2d, route
from tests.cases.convolution import geometries
from tests.frameworks import assert_equal_but_for_rounding, assert_layers_alike, run

LOWERED = ("patches", "taps")
DOUBLE = 2.0**-53


def geometry(shape) -> Geometry:
    names = ("image", "result", "kernel", "stride", "padding", "dilation")
    return Geometry(*(shape[n] for n in names), shape.get("groups", 1), shape.get("turned", False))


@st.composite
def of_either_layer(draw):
    """A geometry, and whether the kernel is laid out as a transposed convolution's."""
    transposed = draw(st.booleans())
    return {**draw(geometries(transposed)), "turned": transposed}


def turn(kernel):
    """From a convolution's layout to a transposed convolution's, and back."""
    return kernel.transpose(3, 1, 2, 0)


def arrays(shape, seed=0, dtype=np.float64):
    """An image, a kernel and a result in MLX's layouts."""
    rng = np.random.default_rng(seed)
    c, f, g = shape["channels"], shape["filters"], shape.get("groups", 1)
    image, result = ((shape["batch"], *shape[n]) for n in ("image", "result"))
    sizes = (*image, c), (f, *shape["kernel"], c // g), (*result, f)
    drawn = [rng.standard_normal(size).astype(dtype) for size in sizes]
    if shape.get("turned"):
        drawn[1] = turn(drawn[1]).copy()
    return tuple(drawn)


def torch_maps(g: Geometry, image, kernel, result):
    """PyTorch's convolution and both gradients, of arrays in MLX's layouts."""
    kernel = turn(kernel) if g.turned else kernel
    x, w, y = (torch.tensor(a.transpose(0, 3, 1, 2)) for a in (image, kernel, result))
    x.requires_grad_()
    w.requires_grad_()
    out = torch.nn.functional.conv2d(x, w, None, g.stride, g.padding, g.dilation, g.groups)
    out = out[:, :, : g.result[0], : g.result[1]]
    grads = torch.autograd.grad(out, (x, w), y)
    found = [t.detach().numpy().transpose(0, 2, 3, 1) for t in (out, *grads)]
    return [*found[:2], turn(found[2]) if g.turned else found[2]]


@given(of_either_layer(), st.integers(0, 99))
def test_the_lowered_maps_are_pytorchs_in_double_precision(shape, seed):
    hold_in_double_precision(shape, seed)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("stride", [(2, 2), (3, 1), (2, 3)])
def test_so_are_those_of_kernels_of_whole_strides(stride, turned):
    """They are folded, which few of the drawn ones are."""
    kernel = (2 * stride[0], stride[1])
    image = (stride[0] + kernel[0] - 2 + 1, 2 * stride[1] + kernel[1])
    shape = {"batch": 2, "channels": 3, "filters": 5, "image": image, "result": (2, 3)}
    shape |= {"kernel": kernel, "stride": stride, "padding": (1, 0), "dilation": (1, 1)}
    assert geometry(shape).folds == stride[0] * stride[1]
    hold_in_double_precision({**shape, "turned": turned}, 0)


def hold_in_double_precision(shape, seed):
    """Within the bound of a product of n terms in any order, ``n u |A| |B|`` (Higham, Eq. 3.13)."""
    g, drawn = geometry(shape), arrays(shape, seed)
    expected = torch_maps(g, *drawn)
    sizes = torch_maps(g, *(np.abs(a) for a in drawn))
    terms = max(a.size for a in drawn)
    with mx.stream(mx.cpu):
        image, kernel, result = (mx.array(a, dtype=mx.float64) for a in drawn)
        for name in LOWERED:
            maps = convolution._BUILD[name](g)
            found = maps.conv(image, kernel), maps.by_image(result, kernel)
            for ours, theirs, size in zip(
                (*found, maps.by_kernel(image, result)), expected, sizes, strict=True
            ):
                assert ours.shape == theirs.shape
                assert (np.abs(np.array(ours) - theirs) <= 2 * terms * DOUBLE * size).all(), name


@given(of_either_layer(), st.integers(0, 99), st.sampled_from(LOWERED))
def test_the_gradients_of_each_map_are_the_other_two(shape, seed, name):
    """The kernel's gradient has gradients as well, which only a penalty on it would ask for."""
    maps = convolution._differentiable(geometry(shape), name)
    with mx.stream(mx.cpu):
        x, w, y = (mx.array(a, dtype=mx.float64) for a in arrays(shape, seed))
        by_x, by_w, by_y = maps.by_image(y, w), maps.by_kernel(x, y), maps.conv(x, w)
        for function, primals, cotangent, expected in (
            (maps.conv, [x, w], y, (by_x, by_w)),
            (maps.by_image, [y, w], x, (by_y, by_w)),
            (maps.by_kernel, [x, y], w, (by_x, by_y)),
        ):
            for found, other in zip(
                mx.vjp(function, primals, [cotangent])[1], expected, strict=True
            ):
                assert mx.array_equal(found, other)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("name", LOWERED)
def test_the_gradient_of_a_turned_kernel_lies_in_memory_as_the_kernel_does(name, stride):
    """What reads it next, Adam, would otherwise skip through memory."""
    x, w = mx.ones((2, 3, 5, 6)), mx.ones((4, 4, 4, 6))
    with route(name):
        gradient = mx.grad(lambda w: conv_transpose2d(x, w, stride, 1).sum())(w)
    mx.eval(gradient)
    assert memoryview(gradient).c_contiguous


@pytest.mark.parametrize("name", convolution.ROUTES)
@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_is_mlxs(name, groups):
    layer = layers.Conv2d(4, 6, 3, 2, (1, 0), 2, groups)
    plain = nn.Conv2d(4, 6, 3, 2, (1, 0), 2, groups)
    held_alike(plain, layer, normal(2, 9, 8, 4), name)


@pytest.mark.parametrize("name", convolution.ROUTES)
@pytest.mark.parametrize("bias", [True, False])
def test_conv_transpose2d_is_mlxs(name, bias):
    layer = layers.ConvTranspose2d(4, 6, (3, 4), 2, 1, 1, (1, 0), bias)
    plain = nn.ConvTranspose2d(4, 6, (3, 4), 2, 1, 1, (1, 0), bias)
    held_alike(plain, layer, normal(2, 3, 5, 4), name)


@pytest.mark.parametrize("name", [r for r in convolution.ROUTES if r != "native"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 2)])
def test_convolutions_whose_image_is_gathered_are_mlxs(name, kernel, stride):
    """Without a stride, or with a kernel of whole strides; kernels that are not symmetric."""
    settings = 4, 6, kernel, stride, 1
    held_alike(nn.Conv2d(*settings), layers.Conv2d(*settings), normal(2, 8, 6, 4), name)
    transposed = layers.ConvTranspose2d(*settings)
    held_alike(nn.ConvTranspose2d(*settings), transposed, normal(2, 4, 3, 4), name)


def held_alike(plain, layer, x, name):
    """MLX has no convolution in float64; ours stands in, by a route held to be PyTorch's."""
    assert repr(layer).partition("(")[2] == repr(plain).partition("(")[2]
    assert_layers_alike(plain, layer, x, lambda: route(name), (layer, lambda: route("patches")))


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("function", [conv2d, conv_transpose2d])
def test_halves_keep_their_type_and_are_added_up_in_single(dtype, function):
    x, w = mx.random.normal((2, 5, 6, 3)).astype(dtype), mx.random.normal((4, 3, 3, 3))
    with route("taps"):
        y = function(x, w.astype(dtype), 2, 1)
        wide = function(x.astype(mx.float32), w.astype(dtype).astype(mx.float32), 2, 1)
        dw = mx.grad(lambda w: function(x, w, 2, 1).sum())(w.astype(dtype))
    assert y.dtype == dw.dtype == dtype
    if mx.default_device().type == mx.DeviceType.cpu:
        assert mx.array_equal(y, wide.astype(dtype))


def taken(function, *arrays):
    """Which maps ran by which route, in the order in which MLX called for them."""
    calls = []

    def spied(name, build):
        def make(g):
            def spy(field, of):
                return lambda a, b: (calls.append((name, field)), of(a, b))[1]

            return Maps(*(spy(f, getattr(build(g), f)) for f in Maps._fields))

        return make

    with pytest.MonkeyPatch.context() as patch:
        for name, build in convolution._BUILD.items():
            patch.setitem(convolution._BUILD, name, spied(name, build))
        convolution._differentiable.cache_clear()
        function(*arrays)
    convolution._differentiable.cache_clear()
    return calls


X, W = mx.zeros((1, 4, 4, 2)), mx.zeros((3, 4, 4, 2))


@pytest.mark.parametrize("name", ["adjoint", "patches", "taps"])
def test_a_forced_route_is_taken_by_the_gradients_too(name):
    def loss(x):
        with route(name):
            return conv_transpose2d(x, W, 2, 1).sum()

    assert taken(mx.grad(loss), X) == [(name, field) for field in ("by_image", "conv", "by_kernel")]


def test_native_is_mlxs_own():
    with route("native"):
        assert taken(mx.grad(lambda x: conv_transpose2d(x, W, 2, 1).sum()), X) == []
        assert taken(mx.grad(lambda x: conv2d(x, W, 2, 1).sum()), X) == []


def test_a_route_is_left_again_after_an_error_too():
    def fail():
        with route("taps"):
            assert convolution._forced == "taps"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert convolution._forced == "auto"


def test_an_unknown_route_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="route 'fast' is none of auto, native, cheapest"),
        route("fast"),
    ):
        pass
    result = run("import mlx_impl.convolution", tmp_path, CONVOLUTION_ROUTE="fast")
    assert "CONVOLUTION_ROUTE='fast' is none of auto, native, cheapest" in result.stderr
    code = "from mlx_impl import convolution; print(convolution._forced)"
    assert run(code, tmp_path, CONVOLUTION_ROUTE="taps").stdout == "taps\n"


def test_the_choice_by_backend():
    assert choose("metal") == "native"
    assert choose("metal", native_is_right=False) == "adjoint"
    assert choose("cuda") == "cheapest"
    assert choose("cpu") == "cheapest"


SIZES = st.sampled_from([1, 3, 32, 64, 256])


@given(st.booleans().flatmap(geometries), st.integers(1, 64), SIZES, SIZES)
def test_the_cheapest_is_never_the_scalar_loop(shape, batch, channels, filters):
    g = geometry(shape)
    sides = channels * g.groups, filters * g.groups
    for field in Maps._fields:
        if cheapest(field, g, batch, sides) == "adjoint":
            assert g.groups == 1
            assert g.dilation == (1, 1)
            assert field != "by_image" or g.stride == (1, 1)


@pytest.mark.parametrize(
    ("field", "size", "channels", "expected"),
    [
        ("conv", (256, 256), (3, 64), "adjoint"),  # VGG's first layer: patches of 3 channels
        ("by_image", (256, 256), (3, 64), "patches"),
        ("conv", (256, 256), (64, 64), "taps"),  # its second: many channels, large images
        ("by_kernel", (256, 256), (64, 64), "taps"),
        ("conv", (32, 32), (512, 512), "adjoint"),  # its last: few pixels, the kernel is most
    ],
)
def test_the_cheapest_was_measured(field, size, channels, expected):
    g = Geometry(size, size, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert cheapest(field, g, 1, channels) == expected


@pytest.mark.parametrize(
    ("field", "stride", "tensor_cores", "expected"),
    [
        ("conv", 1, False, "gathered"),
        ("conv", 1, True, "adjoint"),
        ("by_image", 2, False, "gathered"),
        ("by_image", 3, False, "adjoint"),  # a kernel of 4 is no whole strides of 3
        ("by_kernel", 1, False, "cudnn"),
        ("by_kernel", 2, False, "patches"),
        ("by_kernel", 2, True, "cudnn"),
    ],
)
def test_the_choice_on_cuda_was_measured(field, stride, tensor_cores, expected):
    g = Geometry((32, 32), (32 // stride,) * 2, (4, 4), (stride,) * 2, (1, 1), (1, 1), 1)
    assert convolution.cheapest_on_cuda(field, g, tensor_cores) == expected


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_on_cuda_an_image_with_gaps_between_results_is_not_left_to_cudnn(tensor_cores):
    g = Geometry((4, 7), (4, 3), (1, 1), (1, 3), (0, 0), (1, 3), 1, turned=True)
    assert convolution.cheapest_on_cuda("by_image", g, tensor_cores) == "gathered"


def test_on_cuda_a_result_no_wider_than_the_kernel_is_not_recognised_as_its_cotangent():
    g = Geometry((4, 4), (4, 4), (4, 4), (1, 1), (2, 2), (1, 1), 1)
    assert convolution.cheapest_on_cuda("by_kernel", g, True) == "patches"
    wide = g._replace(image=(5, 5), result=(5, 5))
    assert convolution.cheapest_on_cuda("by_kernel", wide, True) == "cudnn"
    assert convolution.cheapest_on_cuda("by_kernel", wide._replace(groups=2), True) == "adjoint"


def test_a_turned_kernel_is_not_handed_to_mlx_which_would_turn_it_back():
    g = Geometry((8, 8), (4, 4), (4, 4), (2, 2), (1, 1), (1, 1), 1)
    routes = {cheapest(field, g, 8, (256, 512)) for field in Maps._fields}
    turned = {cheapest(field, g._replace(turned=True), 8, (256, 512)) for field in Maps._fields}
    assert "adjoint" in routes
    assert "adjoint" not in turned


@pytest.mark.parametrize("name", convolution.ROUTES)
def test_bad_input_gets_mlxs_own_error(name):
    with route(name):
        with pytest.raises(ValueError, match="input channels"):
            conv2d(mx.zeros((1, 4, 4, 3)), W)
        with pytest.raises(ValueError, match="input channels"):
            conv_transpose2d(mx.zeros((1, 4, 4, 3)), W)
        with pytest.raises(ValueError, match="Invalid weight array with 4 dimensions"):
            conv2d(mx.zeros((4, 4, 2)), W)
        with pytest.raises(ValueError, match="cannot be smaller than weight"):
            conv2d(mx.zeros((1, 2, 4, 2)), W)


def transposed_gradient(kernel, padding, output_padding):
    """The shape of ``mx.conv_transpose2d``'s gradient by an input of 3 x 3, stride 2."""
    w = mx.ones((1, kernel, kernel, 1))
    arguments = 2, padding, 1, output_padding
    x = mx.ones((1, 3, 3, 1))
    return mx.grad(lambda x: mx.conv_transpose2d(x, w, *arguments).sum())(x).shape


@pytest.mark.xfail(reason="MLX 0.32.4: it cuts off what it has already left out")
def test_mlxs_input_gradient_with_more_output_padding_than_padding():
    assert transposed_gradient(3, 0, 1) == (1, 3, 3, 1)


@pytest.mark.xfail(reason="MLX 0.32.4: a negative padding is dropped")
def test_mlxs_transposed_convolution_with_padding_beyond_the_kernels_reach():
    y = mx.conv_transpose2d(mx.ones((1, 3, 3, 1)), mx.ones((1, 1, 1, 1)), 2, 1)
    assert y.shape == (1, 3, 3, 1)


@pytest.mark.xfail(reason="MLX 0.32.4: it flattens a slice without copying it, then refuses it")
def test_mlxs_as_strided_of_a_column():
    column = mx.arange(4.0).reshape(1, 2, 2, 1)[:, :, :1]
    assert mx.as_strided(column, [2], [1]).tolist() == [0, 2]


def test_a_kernel_that_sees_one_column_of_the_image():
    """A slice one pixel wide flattens without a copy, and must not reach as_strided so."""
    image, kernel = mx.arange(4.0).reshape(1, 2, 2, 1), mx.ones((1, 1, 1, 1))
    for name in ("patches", "taps", "cheapest"):
        with convolution.route(name):
            y = convolution.conv2d(image, kernel, stride=(1, 2))
        assert y.flatten().tolist() == [0, 2]


@pytest.mark.parametrize(("kernel", "padding", "output_padding"), [(3, 0, 1), (1, 1, 0)])
def test_where_mlx_is_wrong_the_adjoint_runs(monkeypatch, kernel, padding, output_padding):
    monkeypatch.setattr(convolution, "backend", lambda: "metal")
    image, weight = normal(1, 3, 3, 2), normal(2, kernel, kernel, 2)

    def theirs(point, dtype):
        y = torch.tensor(point["x"].transpose(0, 3, 1, 2), dtype=dtype, requires_grad=True)
        w = torch.tensor(weight.transpose(3, 0, 1, 2), dtype=dtype)
        out = torch.nn.functional.conv_transpose2d(y, w, None, 2, padding, output_padding)
        (out**2).sum().backward()
        return {"dx": y.grad.double().numpy().transpose(0, 2, 3, 1)}

    def loss(x):
        return (conv_transpose2d(x, mx.array(weight), 2, padding, 1, output_padding) ** 2).sum()

    def ours(point):
        calls = []
        routes = taken(lambda x: calls.append(mx.grad(loss)(x)), mx.array(point["x"]))
        assert {name for name, _ in routes} == {"adjoint"}
        return {"dx": np.array(calls[0]).astype(np.float64)}

    assert_equal_but_for_rounding(
        lambda p: theirs(p, torch.float64), lambda p: theirs(p, torch.float32), ours, {"x": image}
    )


STRIDES = (1, 2, 3)
ON_CUDA = convolution.backend() == "cuda"


@pytest.mark.skipif(not ON_CUDA, reason="a defect of MLX's CUDA backend")
@pytest.mark.xfail(reason="MLX 0.32.4: cuDNN plans are kept without the dilation of the input")
def test_mlxs_transposed_convolutions_of_one_shape_and_several_strides():
    y, w = mx.array(normal(1, 4, 4, 2)), mx.array(normal(3, 3, 3, 2))
    for stride in STRIDES:
        expected = mx.conv_transpose2d(y, w, stride, stream=mx.cpu)
        assert mx.allclose(mx.conv_transpose2d(y, w, stride), expected, atol=1e-4)


def test_transposed_convolutions_of_one_shape_and_several_strides(monkeypatch):
    monkeypatch.setattr(convolution, "backend", lambda: "cuda")
    monkeypatch.setattr(convolution, "_on_tensor_cores", lambda dtype: True)
    monkeypatch.setattr(convolution, "_stride_of_plan", {})
    y, w = mx.array(normal(1, 4, 4, 2)), mx.array(normal(3, 3, 3, 2))

    def routes(stride):
        return [name for name, _ in taken(lambda y: conv_transpose2d(y, w, stride), y)]

    assert [routes(stride) for stride in (1, 2, 3, 1)] == [
        ["adjoint"],
        ["gathered"],
        ["gathered"],
        ["adjoint"],
    ]
    for stride in STRIDES:
        ours, native = (
            conv_transpose2d(y, w, stride),
            mx.conv_transpose2d(y, w, stride, stream=mx.cpu),
        )
        # sums of 8 products at most, in another order
        assert float(mx.abs(ours - native).max()) <= 16 * 2.0**-24 * float(mx.abs(native).max())


def test_what_else_a_plan_is_kept_by_does_not_collide(monkeypatch):
    monkeypatch.setattr(convolution, "_stride_of_plan", {})
    one = Geometry((6, 6), (4, 4), (3, 3), (1, 1), (0, 0), (1, 1), 1)
    two = one._replace(image=(9, 9), stride=(2, 2))

    def collides(g, batch=2, channels=(3, 5), dtype=mx.float32):
        return convolution.gets_anothers_plan(g, batch, channels, dtype)

    assert not collides(one)
    assert collides(two)
    assert collides(two._replace(result=(3, 4)))  # a result left out is computed all the same
    assert not collides(two._replace(image=(10, 10)))  # one more row at the end: another padding
    assert not collides(two, batch=3)
    assert not collides(two, channels=(4, 5))
    assert not collides(two, dtype=mx.float16)
    pixel = one._replace(image=(3, 3), result=(1, 1))
    assert not collides(pixel)
    assert not collides(pixel._replace(stride=(2, 2)))  # nothing to put a stride between
