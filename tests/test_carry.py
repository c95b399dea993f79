"""Carrying weights: each layer type, and everything that must be refused."""

import itertools

import mlx.core as mx
import mlx.nn as mnn
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from torch import nn as tnn

from mlx_parity import CarryError, NotFiniteError, carry, channels_first, channels_last, match
from mlx_parity.carry import reference_tensors

small = st.integers(1, 4)


class Holder(tnn.Module):
    """A PyTorch module with one layer, ``layer``."""

    def __init__(self, layer: tnn.Module):
        super().__init__()
        self.layer = layer


class Port(mnn.Module):
    """An MLX module with one layer, ``layer``."""

    def __init__(self, layer: object):
        super().__init__()
        self.layer = layer


def randomise(module: tnn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in reference_tensors(module).values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def assert_agree(theirs: torch.Tensor, ours: mx.array, terms: int) -> None:
    """Equal up to the rounding of sums of ``terms`` products of numbers of size 1."""
    right, found = theirs.detach().numpy(), np.array(ours)
    assert right.shape == found.shape
    np.testing.assert_array_less(
        np.abs(right - found), 4 * (terms + 1) * np.finfo(np.float32).eps * (np.abs(right) + terms)
    )


@given(small, small, small, st.integers(0, 9))
def test_linear(batch: int, inputs: int, outputs: int, seed: int):
    theirs, ours = Holder(tnn.Linear(inputs, outputs)), Port(mnn.Linear(inputs, outputs))
    randomise(theirs, seed)
    carry(theirs, ours)
    x = np.random.default_rng(seed).random((batch, inputs), dtype=np.float32)
    assert_agree(theirs.layer(torch.from_numpy(x)), ours.layer(mx.array(x)), inputs + 1)


@given(
    groups=st.integers(1, 3),
    sizes=st.tuples(small, small),
    kernel=st.tuples(small, small),
    stride=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_conv2d(groups: int, sizes: tuple, kernel: tuple, stride: int, seed: int):
    inputs, outputs = (n * groups for n in sizes)
    theirs = Holder(tnn.Conv2d(inputs, outputs, kernel, stride, groups=groups))
    ours = Port(mnn.Conv2d(inputs, outputs, kernel, stride, groups=groups))
    randomise(theirs, seed)
    carry(theirs, ours)
    x = np.random.default_rng(seed).random((2, inputs, 5, 7), dtype=np.float32)
    y = np.array(ours.layer(mx.array(channels_last(x))))
    assert_agree(theirs.layer(torch.from_numpy(x)), mx.array(channels_first(y)), inputs * 16 + 1)


class Grouped(mnn.ConvTranspose2d):
    """A transposed convolution with groups, (O, *kernel, I / groups) as MLX's function takes it."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple, groups: int):
        super().__init__(inputs // groups, outputs, kernel, stride=2)
        self.groups = groups

    def __call__(self, x: mx.array) -> mx.array:
        return mx.conv_transpose2d(x, self.weight, stride=2, groups=self.groups) + self.bias


@given(
    groups=st.integers(1, 3),
    sizes=st.tuples(small, small),
    kernel=st.tuples(small, small),
    seed=st.integers(0, 9),
)
def test_grouped_conv_transpose2d(groups: int, sizes: tuple, kernel: tuple, seed: int):
    """``nn.ConvTranspose2d`` has no groups; a port that calls ``mx.conv_transpose2d`` has."""
    inputs, outputs = (n * groups for n in sizes)
    theirs = Holder(tnn.ConvTranspose2d(inputs, outputs, kernel, 2, groups=groups))
    ours = Port(Grouped(inputs, outputs, kernel, groups))
    randomise(theirs, seed)
    carry(theirs, ours)
    x = np.random.default_rng(seed).random((2, inputs, 3, 4), dtype=np.float32)
    y = np.array(ours.layer(mx.array(channels_last(x))))
    assert_agree(theirs.layer(torch.from_numpy(x)), mx.array(channels_first(y)), inputs * 16 + 1)


@pytest.mark.parametrize(
    ("theirs", "ours", "shape"),
    [
        (tnn.Conv1d(2, 3, 4), mnn.Conv1d(2, 3, 4), (2, 2, 9)),
        (tnn.Conv3d(2, 3, 2), mnn.Conv3d(2, 3, 2), (2, 2, 3, 4, 5)),
        (tnn.ConvTranspose1d(2, 3, 4), mnn.ConvTranspose1d(2, 3, 4), (2, 2, 9)),
        (tnn.ConvTranspose2d(3, 3, 2), mnn.ConvTranspose2d(3, 3, 2), (2, 3, 4, 5)),
        (tnn.ConvTranspose3d(2, 3, 2), mnn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 4, 5)),
        (tnn.BatchNorm2d(3).eval(), mnn.BatchNorm(3).eval(), (2, 3, 4, 5)),
        (
            tnn.GroupNorm(2, 4),
            mnn.GroupNorm(2, 4, pytorch_compatible=True),
            (2, 4, 3, 5),
        ),
        (tnn.InstanceNorm2d(3, affine=True), mnn.InstanceNorm(3, affine=True), (2, 3, 4, 5)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_images(theirs: tnn.Module, ours: mnn.Module, shape: tuple):
    randomise(theirs, 0)
    carry(theirs, ours)
    x = np.random.default_rng(0).random(shape, dtype=np.float32)
    y = channels_first(np.array(ours(mx.array(channels_last(x)))))
    assert_agree(theirs(torch.from_numpy(x)), mx.array(y), 40)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (tnn.LayerNorm(5), mnn.LayerNorm(5)),
        (tnn.RMSNorm(5, eps=1e-5), mnn.RMSNorm(5)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_vectors(theirs: tnn.Module, ours: mnn.Module):
    randomise(theirs, 0)
    carry(theirs, ours)
    x = np.random.default_rng(0).random((3, 5), dtype=np.float32)
    assert_agree(theirs(torch.from_numpy(x)), ours(mx.array(x)), 8)


def test_embedding():
    theirs, ours = tnn.Embedding(7, 3), mnn.Embedding(7, 3)
    carry(theirs, ours)
    index = np.array([0, 6, 2])
    assert np.array_equal(theirs(torch.from_numpy(index)).detach(), ours(mx.array(index)))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (tnn.LSTM(3, 4, batch_first=True), mnn.LSTM(3, 4)),
        (tnn.GRU(3, 4, batch_first=True), mnn.GRU(3, 4)),
        (tnn.RNN(3, 4, batch_first=True), mnn.RNN(3, 4)),
        (tnn.LSTM(3, 4, batch_first=True, bias=False), mnn.LSTM(3, 4, bias=False)),
    ],
    ids=["LSTM", "GRU", "RNN", "LSTM without bias"],
)
def test_recurrent_layers_add_two_biases(theirs: tnn.RNNBase, ours: mnn.Module):
    randomise(theirs, 0)
    plan = carry(theirs, ours)
    x = np.random.default_rng(0).random((2, 5, 3), dtype=np.float32)
    y = ours(mx.array(x))
    assert_agree(theirs(torch.from_numpy(x))[0], y[0] if isinstance(y, tuple) else y, 40)

    theirs(torch.from_numpy(x))[0].sum().backward()

    def total(parameters: dict) -> mx.array:
        ours.update(parameters)
        y = ours(mx.array(x))
        return (y[0] if isinstance(y, tuple) else y).sum()

    flat = dict(tree_flatten(mx.grad(total)(ours.trainable_parameters())))
    gradients = plan.to_reference({k: np.array(v) for k, v in flat.items()})
    for name, parameter in theirs.named_parameters():
        assert_agree(parameter.grad, mx.array(gradients[name]), 100)


@given(small, small, small, st.integers(0, 9))
def test_linear_after_a_flatten_and_before_an_unflatten(c: int, h: int, w: int, seed: int):
    n = c * h * w
    theirs, ours = tnn.Linear(n, 2), mnn.Linear(n, 2)
    randomise(theirs, seed)
    carry(Holder(theirs), Port(ours), flatten={"layer": (c, h, w)})
    x = np.random.default_rng(seed).random((3, c, h, w), dtype=np.float32)
    assert_agree(
        theirs(torch.from_numpy(x).flatten(1)), ours(mx.array(channels_last(x)).flatten(1)), n + 1
    )

    theirs, ours = tnn.Linear(2, n), mnn.Linear(2, n)
    randomise(theirs, seed)
    carry(Holder(theirs), Port(ours), unflatten={"layer": (c, h, w)})
    z = np.random.default_rng(seed).random((3, 2), dtype=np.float32)
    y = channels_first(np.array(ours(mx.array(z)).reshape(3, h, w, c)))
    assert_agree(theirs(torch.from_numpy(z)).reshape(3, c, h, w), mx.array(y), 3)


@given(st.integers(1, 3), st.tuples(small, small, small, small), st.integers(0, 9))
def test_the_adjoint_is_the_inverse_of_a_permutation(groups: int, sizes: tuple, seed: int):
    inputs, outputs, *kernel = sizes
    theirs = tnn.ConvTranspose2d(inputs * groups, outputs * groups, kernel, groups=groups)
    ours = Grouped(inputs * groups, outputs * groups, kernel, groups)
    randomise(theirs, seed)
    plan = match(theirs, ours)
    tensors = {k: v.detach().numpy() for k, v in reference_tensors(theirs).items()}
    back = plan.values(plan.to_port(tensors))
    assert all(np.array_equal(tensors[k], back[k]) for k in tensors)


def test_sequential_through_its_layers():
    theirs = tnn.Sequential(tnn.Linear(2, 3), tnn.ReLU(), tnn.Sequential(tnn.Linear(3, 1)))
    ours = mnn.Sequential(mnn.Linear(2, 3), mnn.ReLU(), mnn.Sequential(mnn.Linear(3, 1)))
    carry(theirs, ours)
    x = np.ones((1, 2), np.float32)
    assert_agree(theirs(torch.from_numpy(x)), ours(mx.array(x)), 6)


def test_num_batches_tracked_has_no_counterpart_and_needs_none():
    plan = carry(tnn.BatchNorm1d(3), mnn.BatchNorm(3))
    assert {link.name for link in plan.links} == {"weight", "bias", "running_mean", "running_var"}


def test_names_that_differ_are_renamed():
    theirs, ours = Holder(tnn.Linear(2, 3)), mnn.Module()
    ours.projection = mnn.Linear(2, 3)
    plan = carry(theirs, ours, rename={"layer": "projection"})
    assert {link.port for link in plan.links} == {"projection.weight", "projection.bias"}


# ---------------------------------------------------------------------------------------- refused


def assert_refused(theirs: tnn.Module, ours: mnn.Module, message: str, **options: object) -> None:
    with pytest.raises(CarryError, match=message):
        match(theirs, ours, **options)


def test_a_leaf_left_over_on_either_side():
    assert_refused(
        Holder(tnn.Linear(2, 3)),
        Port(mnn.Linear(2, 3, bias=False)),
        "layer.bias of the reference has no layer.bias in the port",
    )
    assert_refused(
        Holder(tnn.Linear(2, 3, bias=False)),
        Port(mnn.Linear(2, 3)),
        "layer.bias of the port is left over",
    )


def test_a_module_in_a_tuple_is_no_parameter_and_the_message_says_so():
    assert_refused(
        Holder(tnn.Linear(2, 3)),
        Port((mnn.Linear(2, 3),)),
        "modules held in a tuple are no parameters",
    )


def test_a_shape_that_does_not_fit():
    assert_refused(
        Holder(tnn.Linear(2, 3)),
        Port(mnn.Linear(2, 4)),
        r"layer.weight \[3, 2\] becomes \[3, 2\] .* layer.weight of the port is \[4, 2\]",
    )


class Kernel(mnn.Module):
    """A class of the port's own, of whose layout nothing is known."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = mx.zeros(shape)


def test_shapes_are_compared_without_adding_what_memory_happens_to_hold(
    monkeypatch: pytest.MonkeyPatch,
):
    values = itertools.cycle([np.inf, -np.inf])
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, next(values), dtype))
    plan = carry(tnn.LSTM(3, 4), mnn.LSTM(3, 4))  # a warning would be an error
    assert {link.port for link in plan.links} == {"Wx", "Wh", "bias"}


def test_a_kernel_whose_shape_cannot_tell_two_layouts_apart():
    """(6, 3, 3, 3) is OIHW and OHWI alike: MLX's own layer decides, another class does not."""
    theirs = Holder(tnn.Conv2d(3, 6, 3, bias=False))
    assert_refused(theirs, Port(Kernel(6, 3, 3, 3)), "cannot tell two layouts apart.*axes=")
    match(theirs, Port(mnn.Conv2d(3, 6, 3, bias=False)))
    plan = match(theirs, Port(Kernel(6, 3, 3, 3)), axes={"layer.weight": (0, 2, 3, 1)})
    weight = theirs.layer.weight.detach().numpy()
    made = plan.to_port({"layer.weight": weight})["layer.weight"]
    assert np.array_equal(made, weight.transpose(0, 2, 3, 1))


def test_a_square_parameter_of_no_known_layer():
    theirs = tnn.Module()
    theirs.table = tnn.Parameter(torch.ones(4, 4))
    ours = mnn.Module()
    ours.table = mx.ones((4, 4))
    assert_refused(theirs, ours, "table .* cannot tell two layouts apart")
    match(theirs, ours, axes={"table": (1, 0)})
    theirs.table, ours.table = tnn.Parameter(torch.ones(4, 5)), mx.ones((4, 5))
    match(theirs, ours)


def test_a_flatten_that_does_not_fit_or_names_no_linear():
    theirs, ours = Holder(tnn.Linear(6, 1)), Port(mnn.Linear(6, 1))
    assert_refused(
        theirs,
        ours,
        "flatten=.* has 8 elements where the Linear has 6",
        flatten={"layer": (2, 2, 2)},
    )
    assert_refused(theirs, ours, "no Linear called 'fc'", flatten={"fc": (1, 2, 3)})


def test_stacked_recurrent_layers():
    assert_refused(tnn.LSTM(2, 2, num_layers=2), mnn.LSTM(2, 2), "one layer and one direction")


def test_nan_in_the_weights():
    theirs = Holder(tnn.Linear(2, 2))
    with torch.no_grad():
        theirs.layer.weight[0, 1] = torch.nan
    with pytest.raises(NotFiniteError, match=r"layer\.weight of the reference holds NaN"):
        carry(theirs, Port(mnn.Linear(2, 2)))


def test_nothing_is_half_carried():
    """A refusal leaves the port as it was."""
    ours = Port(mnn.Linear(2, 3))
    before = np.array(ours.layer.weight)
    with pytest.raises(CarryError):
        carry(Holder(tnn.Linear(2, 3, bias=False)), ours)
    assert np.array_equal(before, np.array(ours.layer.weight))


def test_what_trains_and_what_does_not():
    theirs, ours = tnn.BatchNorm1d(3), mnn.BatchNorm(3)
    assert match(theirs, ours).misplaced() == []
    parent = Port(ours)
    parent.freeze()
    parent.unfreeze()  # BatchNorm's own protection of its statistics is lost through the parent
    assert any(
        "layer.running_mean trains in the port and is a buffer in the reference" in line
        for line in match(Holder(theirs), parent).misplaced()
    )
    ours.freeze()
    assert any("weight is frozen in the port" in line for line in match(theirs, ours).misplaced())
