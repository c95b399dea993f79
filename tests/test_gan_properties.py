"""What holds of the GANs at every size: shapes, statistics, modes, first weights."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from scipy import stats

import mlx_impl.dcgan
from mlx_impl.losses import discriminator_loss, generator_loss_nonsaturating
from mlx_parity import climb
from mlx_parity.ladder import Climb
from tests.cases import CASES
from tests.cases.conv_gan import conv_gans
from tests.cases.dcgan import dcgans
from tests.frameworks import EPS, MLX, TORCH, Side, each_side
from tests.gans import (
    SHAPE,
    drawn,
    networks,
    normal_weights,
    set_tensors,
    statistics,
    tensors,
    to_numpy,
)
from tests.strategies import mlp_gans

SYSTEMS = {"mlp_gan": mlp_gans(), "conv_gan": conv_gans(), "dcgan": dcgans()}
each_system = pytest.mark.parametrize("system", SYSTEMS)

GANS = [case for case in CASES if case.name in ("000 GAN", "DCGAN")]
DCGAN = GANS[1]

few = settings(max_examples=max(5, settings().max_examples // 5))
"""For examples that train or initialise networks."""


# Shapes


@each_side
@each_system
@given(data=st.data())
def test_the_discriminator_takes_what_the_generator_makes(side, system, data):
    shape = data.draw(SYSTEMS[system])
    generator, discriminator = networks(side, system, shape)
    fake = generator(drawn(side, shape)[1])
    n, size, channels = shape["batch"], shape["image_size"], shape["channels"]
    assert tuple(fake.shape) == ((n, *size, channels) if side is MLX else (n, channels, *size))
    assert np.abs(to_numpy(fake)).max() <= 1
    assert tuple(discriminator(fake).shape) == (n, 1)


@each_side
@each_system
def test_images_reach_the_ends_of_their_range_and_logits_know_none(side, system):
    """A tanh ends the generator and no sigmoid the discriminator."""
    shape = {k: v for k, v in SHAPE.items() if k != "stages" or system == "dcgan"}
    if system == "mlp_gan":
        shape["widths"] = (8, 8, 8)
        del shape["width"]
    generator, discriminator = networks(side, system, shape)
    for network in (generator, discriminator):
        normal_weights(network)
        network.eval()
    real, noise = drawn(side, shape)
    fake = np.abs(to_numpy(generator(1e3 * noise)))
    assert 0.99 < fake.max() <= 1
    logits = np.concatenate([to_numpy(discriminator(s * 1e3 * real)) for s in (-1, 1)])
    assert np.abs(logits).max() > 1


@each_side
@given(height=st.integers(0, 40), width=st.integers(0, 40))
def test_an_image_that_two_stages_cannot_halve_is_refused(side, height, width):
    lib, arguments = side.conv_gan, {"width": 1, "image_size": (height, width)}
    if height % 4 == width % 4 == 0 and height and width:
        lib.Generator(2, **arguments)
        lib.Discriminator(**arguments)
        return
    message = f"image_size is {height} x {width}: both must be multiples of 4"
    for make in (lib.Generator, lib.Discriminator):
        with pytest.raises(ValueError, match=message):
            make(**arguments)


@each_side
@given(height=st.integers(0, 40), width=st.integers(0, 40), stages=st.integers(1, 4))
def test_an_image_that_the_stages_cannot_halve_is_refused(side, height, width, stages):
    lib = side.dcgan
    arguments = {"width": 1, "image_size": (height, width), "stages": stages}
    if height % 2**stages == width % 2**stages == 0 and height and width:
        lib.Generator(2, **arguments)
        lib.Discriminator(**arguments)
        return
    message = f"image_size is {height} x {width}: both must be multiples of {2**stages}, since"
    for make in (lib.Generator, lib.Discriminator):
        with pytest.raises(ValueError, match=message):
            make(**arguments)


@each_side
@pytest.mark.parametrize("stages", [0, -1])
def test_dcgan_without_a_stage_is_refused(side, stages):
    for make in (side.dcgan.Generator, side.dcgan.Discriminator):
        with pytest.raises(ValueError, match=f"stages is {stages}: it must be at least 1"):
            make(stages=stages)


@each_side
def test_dcgan_of_mnists_size_as_its_error_says(side):
    with pytest.raises(ValueError, match="28 x 28 takes stages=2"):
        side.dcgan.Generator(image_size=(28, 28))
    shape = SHAPE | {"image_size": (28, 28), "channels": 1}
    generator, discriminator = networks(side, "dcgan", shape)
    assert tuple(discriminator(generator(drawn(side, shape)[1])).shape) == (3, 1)


@each_side
def test_one_value_for_each_channel_is_nothing_to_normalise(side):
    """A map of 1 x 1 and a batch of one, while training; the running statistics serve it."""
    shape = SHAPE | {"batch": 1, "image_size": (4, 4)}
    generator, discriminator = networks(side, "dcgan", shape)
    real, noise = drawn(side, shape)
    for network, x in ((generator, noise), (discriminator, real)):
        with pytest.raises(ValueError, match=r"more than (one|1) value per channel"):
            network(x)
        network.eval()
        assert np.isfinite(to_numpy(network(x))).all()


@each_side
@pytest.mark.parametrize(
    ("system", "generator", "discriminator"),
    [("conv_gan", 7_149_699, 596_353), ("dcgan", 3_576_704, 2_765_568)],
)
def test_number_of_parameters(side, system, generator, discriminator):
    lib = getattr(side, system)
    for network, expected in ((lib.Generator(), generator), (lib.Discriminator(), discriminator)):
        if side is MLX:
            counts = [a.size for _, a in tree_flatten(network.trainable_parameters())]
        else:
            counts = [p.numel() for p in network.parameters()]
        assert sum(counts) == expected


@each_side
def test_no_convolution_beside_a_norm_has_a_bias(side):
    """Its true gradient is zero, and Adam makes a full step of the rounding that is left."""
    for network in networks(side, "dcgan", SHAPE):
        assert all(n.startswith("norms.") for n in tensors(network) if n.endswith("bias"))


@pytest.mark.parametrize("case", GANS, ids=lambda case: case.name)
def test_gradients_agree_at_64_by_64(case):
    """As real use has it, and as the layers take other routes than at drawn sizes."""
    climbing = Climb(case, {**case.full_size, "batch": 1}, seed=0)
    rungs = climbing.structure() + climbing.derivatives()
    assert [rung.name for rung in rungs] == ["structure", "forward", "loss", "gradients"]
    assert all(rung.ok for rung in rungs), [str(rung.worst) for rung in rungs if not rung.ok]


# Running statistics


def one_step(side: Side, shape: dict[str, Any]) -> SimpleNamespace:
    """The networks before and after one step."""
    before, after = networks(side, "dcgan", shape), networks(side, "dcgan", shape)
    optimizers = [side.dcgan.make_optimizer(network) for network in after]
    side.dcgan.train_step(*after, *optimizers, *drawn(side, shape))
    return SimpleNamespace(before=before, after=after)


def assert_same_statistics(one: Any, other: Any) -> None:
    ours, theirs = statistics(one), statistics(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@each_side
@few
@given(shape=dcgans())
def test_a_step_calls_the_generator_once_and_the_discriminator_thrice(side, shape):
    """Its running statistics are, to the last bit, those of these calls made by hand."""
    step = one_step(side, shape)
    (generator, discriminator), (new_generator, new_discriminator) = step.before, step.after
    real, noise = drawn(side, shape)
    fake = generator(noise)
    assert_same_statistics(new_generator, generator)

    discriminator(real)
    discriminator(fake)
    updated = {k: a for k, a in tensors(new_discriminator).items() if "running" not in k}
    set_tensors(discriminator, updated)
    discriminator(fake)
    assert_same_statistics(new_discriminator, discriminator)


def second_generator_call(g: Any, d: Any, opt_g: Any, opt_d: Any, real: Any, noise: Any) -> Any:
    """The usual port: the fakes of each half are made in that half."""
    d_loss, grads = nn.value_and_grad(d, lambda d: discriminator_loss(d(real), d(g(noise))))(d)
    opt_d.update(d, grads)
    g_loss, grads = nn.value_and_grad(g, lambda g: generator_loss_nonsaturating(d(g(noise))))(g)
    opt_g.update(g, grads)
    return d_loss, g_loss


def test_a_second_generator_call_is_seen_in_the_running_statistics():
    """Losses, gradients and weights are all the same; after one step 0.1 of a mean is 0.19."""
    port = SimpleNamespace(**{**vars(mlx_impl.dcgan), "train_step": second_generator_call})
    proof = climb(replace(DCGAN, port=port), SHAPE, 0, compiled=False)
    (failed,) = (row for row in proof.rows.values() if not row.ok)
    assert failed.rung == "optimizer step"
    assert "update generator.norms.0.running_mean" in failed.message

    (generator, _), (_, discriminator) = (
        networks(MLX, "dcgan", SHAPE),
        networks(MLX, "dcgan", SHAPE),
    )
    optimizers = [mlx_impl.dcgan.make_optimizer(m) for m in (generator, discriminator)]
    once, _ = networks(MLX, "dcgan", SHAPE)
    second_generator_call(generator, discriminator, *optimizers, *drawn(MLX, SHAPE))
    once(drawn(MLX, SHAPE)[1])
    first = "norms.0.running_mean"
    np.testing.assert_allclose(
        statistics(generator)[first], 1.9 * statistics(once)[first], rtol=16 * EPS
    )


# Modes


@each_side
@few
@given(shape=dcgans().filter(lambda shape: shape["batch"] > 1), data=st.data())
def test_in_evaluation_mode_no_image_sees_its_batch(side, shape, data):
    """The first of a batch is the same, to the last bit, whatever the others are."""
    generator, discriminator = networks(side, "dcgan", shape)
    (real, noise), (other_real, other_noise) = drawn(side, shape), drawn(side, shape, seed=1)
    for network, x, other in (
        (generator, noise, other_noise),
        (discriminator, real, other_real),
    ):
        mixed = (
            torch.cat([x[:1], other[1:]]) if side is TORCH else mx.concatenate([x[:1], other[1:]])
        )
        network.eval()
        np.testing.assert_array_equal(to_numpy(network(x))[0], to_numpy(network(mixed))[0])


# First weights


def assert_normal(x: np.ndarray, mean: float) -> None:
    """Kolmogorov and Smirnov's test against N(mean, 0.02)."""
    assert stats.kstest((x.ravel() - mean) / 0.02, "norm").pvalue > 1e-9


@each_side
@few
@given(seed=st.integers(0, 2**32 - 1))
def test_first_weights_have_radfords_distribution(side, seed):
    for network in networks(side, "dcgan", SHAPE | {"width": 32, "stages": 2}):
        side.dcgan.init_weights(network, seed)
        kernels, norms = [], []
        for name, array in tensors(network).items():
            if name.endswith(("bias", "running_mean")):
                assert not array.any()
            elif name.endswith("running_var"):
                assert (array == 1).all()
            else:
                (norms if name.startswith("norms") else kernels).append(array.ravel())
        assert_normal(np.concatenate(kernels), 0)
        assert_normal(np.concatenate(norms), 1)
        assert len(np.unique(np.concatenate(kernels))) > 0.9 * sum(map(len, kernels))


@each_side
def test_the_seed_alone_decides_the_first_weights(side):
    network, _ = networks(side, "dcgan", SHAPE)

    def init(seed: int) -> dict[str, np.ndarray]:
        side.dcgan.init_weights(network, seed)
        return tensors(network)

    first = init(1)
    for name, array in init(1).items():
        np.testing.assert_array_equal(array, first[name])
    assert (init(2)["project.weight"] != first["project.weight"]).all()


@each_side
def test_first_weights_leave_the_global_stream_alone(side):
    network, _ = networks(side, "dcgan", SHAPE)

    def next_number(between: Any) -> float:
        if side is TORCH:
            torch.manual_seed(0)
            between()
            return torch.rand(()).item()
        mx.random.seed(0)
        between()
        return mx.random.uniform().item()

    untouched = next_number(lambda: None)
    assert next_number(lambda: side.dcgan.init_weights(network, 3)) == untouched
