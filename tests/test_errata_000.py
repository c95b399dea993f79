"""Document 000: each defect shown as the document has it, and its repair as we have it.

ERRATA.md tells the story of each entry and names the test here. What 000 shares with documents 001
and 002 is shown in their file.
"""

import inspect
import math
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlx.utils import tree_flatten

import mlx_impl.conv_gan
from mlx_impl.data import batches
from mlx_impl.images import to_pixels
from mlx_impl.losses import discriminator_loss, generator_loss_nonsaturating
from tests.frameworks import EPS, MLX, TORCH, ULPS, Side, each_side
from tests.gans import SHAPE, drawn, networks, normal_weights, set_tensors, tensors, to_numpy

each_system = pytest.mark.parametrize("system", ["conv_gan", "dcgan"])


def shape_of(system: str) -> dict[str, Any]:
    return {k: v for k, v in SHAPE.items() if system == "dcgan" or k != "stages"}


# 000-E5 to E9: sizes, and what is called and never made


class TorchGenerator(torch.nn.Module):
    """The document's generator, without its batch's worth of names that MLX lacks."""

    def __init__(self, z_dim: int = 100, channels: int = 3):
        super().__init__()
        self.fc = torch.nn.Linear(z_dim, 256)
        self.deconv1 = torch.nn.ConvTranspose2d(256, 128, kernel_size=4, stride=2, padding=1)
        self.deconv2 = torch.nn.ConvTranspose2d(128, channels, kernel_size=4, stride=2, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.fc(z)).reshape(-1, 256, 1, 1)
        return torch.tanh(self.deconv2(F.relu(self.deconv1(x))))


class MLXGenerator(nn.Module):
    """The same with its channels last."""

    def __init__(self, z_dim: int = 100, channels: int = 3):
        super().__init__()
        self.fc = nn.Linear(z_dim, 256)
        self.deconv1 = nn.ConvTranspose2d(256, 128, kernel_size=4, stride=2, padding=1)
        self.deconv2 = nn.ConvTranspose2d(128, channels, kernel_size=4, stride=2, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        x = nn.relu(self.fc(z)).reshape(-1, 1, 1, 256)
        return mx.tanh(self.deconv2(nn.relu(self.deconv1(x))))


class TorchDiscriminator(torch.nn.Module):
    """The document's discriminator; ``features`` is 8 * 8 there."""

    def __init__(self, channels: int = 3, features: int = 8 * 8):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, 128, kernel_size=4, stride=2, padding=1)
        self.conv2 = torch.nn.Conv2d(128, 256, kernel_size=4, stride=2, padding=1)
        self.fc = torch.nn.Linear(256 * features, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return torch.sigmoid(self.fc(x.flatten(1)))


class MLXDiscriminator(nn.Module):
    """The same with its channels last."""

    def __init__(self, channels: int = 3, features: int = 8 * 8):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 128, kernel_size=4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(128, 256, kernel_size=4, stride=2, padding=1)
        self.fc = nn.Linear(256 * features, 1)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.conv2(nn.relu(self.conv1(x))))
        return mx.sigmoid(self.fc(x.flatten(1)))


DOCUMENTED = {
    TORCH: SimpleNamespace(Generator=TorchGenerator, Discriminator=TorchDiscriminator),
    MLX: SimpleNamespace(Generator=MLXGenerator, Discriminator=MLXDiscriminator),
}


def image_batch(side: Side, n: int, size: int) -> Any:
    return side.images(np.zeros((n, size, size, 3), np.float32))


def noise_batch(side: Side, n: int) -> Any:
    return side.array(np.random.default_rng(0).standard_normal((n, 100)).astype(np.float32))


def test_a_transposed_convolution_of_channels_first_is_refused_by_mlx():
    layer = nn.ConvTranspose2d(256, 128, kernel_size=4, stride=2, padding=1)
    with pytest.raises(ValueError, match="input channels"):
        layer(mx.zeros((2, 256, 1, 1)))
    assert layer(mx.zeros((2, 1, 1, 256))).shape == (2, 2, 2, 128)


@each_side
def test_two_stages_from_one_pixel_make_four_by_four(side):
    fake = DOCUMENTED[side].Generator()(noise_batch(side, 2))
    assert tuple(fake.shape) == ((2, 4, 4, 3) if side is MLX else (2, 3, 4, 4))
    fake = side.conv_gan.Generator()(noise_batch(side, 2))
    assert tuple(fake.shape) == ((2, 64, 64, 3) if side is MLX else (2, 3, 64, 64))


@each_side
def test_the_documents_last_layer_fits_images_of_32_only(side):
    discriminator = DOCUMENTED[side].Discriminator()
    assert tuple(discriminator(image_batch(side, 2, 32)).shape) == (2, 1)
    with pytest.raises((RuntimeError, ValueError), match=r"cannot be multiplied|must match"):
        discriminator(image_batch(side, 2, 64))
    assert tuple(side.conv_gan.Discriminator()(image_batch(side, 2, 64)).shape) == (2, 1)


@each_side
def test_the_discriminators_relu_is_called_and_never_made(side):
    class AsDocumented(DOCUMENTED[side].Discriminator):
        def forward(self, x: Any) -> Any:
            return self.relu(self.conv1(x))

        if side is MLX:
            __call__ = forward

    with pytest.raises(AttributeError, match="relu"):
        AsDocumented()(image_batch(side, 1, 32))


@each_side
def test_the_repaired_discriminator_has_relus_where_the_document_calls_them(side):
    """Where a layer's biases make all its answers negative, the last bias is all that is left."""
    discriminator = side.conv_gan.Discriminator(width=2, image_size=(4, 4))
    weights = {name: np.zeros_like(array) for name, array in tensors(discriminator).items()}
    weights["conv1.bias"] -= 1
    weights["conv2.weight"] += 1
    weights["fc.weight"] += 1
    weights["fc.bias"] += 3
    set_tensors(discriminator, weights)
    assert discriminator(image_batch(side, 1, 4)).item() == 3  # leaky: less
    weights["conv1.bias"] += 1
    weights["conv2.bias"] -= 1
    set_tensors(discriminator, weights)
    assert discriminator(image_batch(side, 1, 4)).item() == 3


@each_side
@pytest.mark.parametrize(("features", "size"), [(8 * 8, 32), (16 * 16, 64)])
def test_the_documents_networks_do_not_compose(side, features, size):
    """Neither as written nor with E7 alone repaired: its images are 4 x 4."""
    generator = DOCUMENTED[side].Generator()
    discriminator = DOCUMENTED[side].Discriminator(features=features)
    discriminator(image_batch(side, 2, size))
    with pytest.raises((RuntimeError, ValueError), match=r"cannot be multiplied|must match"):
        discriminator(generator(noise_batch(side, 2)))


# 000-E10: a sigmoid before a cross-entropy


def test_a_second_sigmoid_changes_the_loss_of_a_sure_answer():
    """At logit 6 and target 1: 0.314 for 0.0025."""
    logit, one = mx.array([[6.0]]), mx.ones((1, 1))
    as_documented = nn.losses.binary_cross_entropy(mx.sigmoid(logit), one).item()
    assert as_documented == pytest.approx(math.log1p(math.exp(-1 / (1 + math.exp(-6)))), abs=ULPS)
    for side in (TORCH, MLX):
        loss = side.losses.bce_with_logits(side.array([[6.0]]), side.array([[1.0]]))
        assert loss.item() == pytest.approx(math.log1p(math.exp(-6)), abs=ULPS)


@each_side
@each_system
def test_convolutional_discriminators_return_logits(side, system):
    _, discriminator = networks(side, system, shape_of(system))
    normal_weights(discriminator)
    last = "fc.weight" if system == "conv_gan" else "score.weight"
    weights = tensors(discriminator)
    real, _ = drawn(side, shape_of(system))
    answers = []
    for sign in (1, -1):
        set_tensors(discriminator, weights | {last: sign * 100 * weights[last]})
        answers.append(to_numpy(discriminator(real)))
    assert min(a.min() for a in answers) < 0  # no probability is
    assert max(a.max() for a in answers) > 1


# 000-E11: the optimizer


@each_side
@each_system
def test_optimizers_have_the_documents_settings(side, system):
    generator, _ = networks(side, system, shape_of(system))
    optimizer = getattr(side, system).make_optimizer(generator)
    if side is TORCH:
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.5, 0.999), 1e-8)
        assert (group["weight_decay"], group["amsgrad"]) == (0, False)
    else:
        assert optimizer.learning_rate.item() == np.float32(2e-4)
        assert (optimizer.betas, optimizer.eps) == ([0.5, 0.999], 1e-8)
        assert optimizer.bias_correction


# 000-E15, E16: the two halves of a step


def no_stop(g: Any, d: Any, opt_g: Any, opt_d: Any, real: mx.array, noise: mx.array) -> Any:
    """The discriminator's half inside the generator's loss, on fakes that carry a gradient."""

    def d_loss_fn(d: Any, fake: mx.array) -> mx.array:
        return discriminator_loss(d(real), d(fake))

    def g_loss_fn(g: Any) -> mx.array:
        fake = g(noise)
        opt_d.update(d, nn.value_and_grad(d, d_loss_fn)(d, fake)[1])
        return generator_loss_nonsaturating(d(fake))

    g_loss, grads = nn.value_and_grad(g, g_loss_fn)(g)
    opt_g.update(g, grads)
    return g_loss


def test_fakes_that_are_not_detached_differentiate_the_discriminators_update():
    """A unit that no picture wakes has gradient 0, and the root of Adam's moment slope infinity."""
    shape = shape_of("conv_gan")
    after = {}
    for name, step in (("as documented", no_stop), ("ours", mlx_impl.conv_gan.train_step)):
        generator, discriminator = networks(MLX, "conv_gan", shape)
        for network in (generator, discriminator):
            normal_weights(network)
        sleeping = tensors(discriminator)["conv2.bias"]
        sleeping[0] = -100
        set_tensors(discriminator, {"conv2.bias": sleeping})
        optimizers = [mlx_impl.conv_gan.make_optimizer(m) for m in (generator, discriminator)]
        step(generator, discriminator, *optimizers, *drawn(MLX, shape))
        after[name] = np.concatenate([a.ravel() for a in tensors(generator).values()])
    assert np.isnan(after["as documented"]).all()
    assert np.isfinite(after["ours"]).all()


@each_side
@each_system
def test_both_halves_see_the_same_fakes_and_the_second_the_updated_discriminator(side, system):
    shape, lib = shape_of(system), getattr(side, system)
    old, new = networks(side, system, shape), networks(side, system, shape)
    for one, other in zip(old, new, strict=True):
        normal_weights(one)
        set_tensors(other, tensors(one))
    real, noise = drawn(side, shape)
    losses = lib.train_step(*new, *map(lib.make_optimizer, new), real, noise)
    (generator, discriminator), (_, updated) = old, new

    def g_loss(d: Any, z: Any) -> float:
        return side.losses.generator_loss_nonsaturating(d(generator(z))).item()

    d_loss = side.losses.discriminator_loss(discriminator(real), discriminator(generator(noise)))
    scale = ULPS * max(1, *(abs(loss.item()) for loss in losses))
    assert losses[0].item() == pytest.approx(d_loss.item(), abs=scale)
    assert losses[1].item() == pytest.approx(g_loss(updated, noise), abs=scale)
    assert abs(g_loss(discriminator, noise) - losses[1].item()) > 10 * scale
    assert abs(g_loss(updated, drawn(side, shape, seed=1)[1]) - losses[1].item()) > 10 * scale


def test_one_forward_updates_once_and_two_update_twice():
    """From 0, a running mean is 0.1 of the batch's after one call and 0.19 after two."""
    norm, x = nn.BatchNorm(3), mx.random.normal((4, 3), key=mx.random.key(0))
    mean = np.array(x.mean(axis=0))
    for part in (0.1, 0.19):
        norm(x)
        np.testing.assert_allclose(np.array(norm.running_mean), part * mean, rtol=16 * EPS)


# 000-E17 to E20: the loop around the step


@each_side
@each_system
def test_the_step_takes_its_noise_from_its_caller(side, system):
    """The document's loop draws noise of the length that a global variable happens to have."""
    lib, shape = getattr(side, system), shape_of(system) | {"latent_dim": 7}
    z_dim = 100
    both = networks(side, system, shape)
    as_documented = side.array(np.zeros((shape["batch"], z_dim), np.float32))
    with pytest.raises((RuntimeError, ValueError)):
        both[0](as_documented)
    arguments = inspect.signature(lib.train_step).parameters
    assert list(arguments)[-2:] == ["real", "noise"]
    losses = lib.train_step(*both, *map(lib.make_optimizer, both), *drawn(side, shape))
    assert all(math.isfinite(loss.item()) for loss in losses)


def test_an_empty_loader_leaves_no_loss_to_print():
    def as_documented(loader: Any) -> str:
        for _ in range(1):
            for _ in loader:
                d_loss = 0.0
        return f"D Loss: {d_loss:.4f}"

    with pytest.raises(UnboundLocalError, match="d_loss"):
        as_documented([])
    with pytest.raises(ValueError, match="batch_size 4 is larger than the data set of 3 images"):
        batches(np.zeros((3, 4, 4, 1), np.float32), 4, np.random.default_rng(0))


@each_side
@each_system
def test_a_convolutional_step_returns_two_scalars_to_average(side, system):
    lib, shape = getattr(side, system), shape_of(system)
    both = networks(side, system, shape)
    for network in both:
        normal_weights(network)
    optimizers = [lib.make_optimizer(network) for network in both]
    epoch = []
    for seed in range(3):
        losses = lib.train_step(*both, *optimizers, *drawn(side, shape, seed))
        assert [tuple(loss.shape) for loss in losses] == [(), ()]
        epoch.append([loss.item() for loss in losses])
    assert (np.abs(epoch[-1] - np.mean(epoch, axis=0)) > ULPS).all()


def test_shown_as_the_document_does_an_image_lies_on_its_side_and_half_of_it_is_black():
    """``imshow`` takes (H, W, C) and cuts floats off at 0 and 1."""
    generator = mlx_impl.conv_gan.Generator(width=4, image_size=(8, 12))
    normal_weights(generator)
    image = np.array(generator(noise_batch(MLX, 1)))[0]
    assert image.transpose(1, 2, 0).shape == (12, 3, 8)  # (H, W, C) to (W, C, H)
    black = (np.clip(image, 0, 1) == 0).mean()
    assert black == (image <= 0).mean() > 0.3
    assert image.shape == to_pixels(image).shape == (8, 12, 3)
    assert (to_pixels(image) == 0).mean() < black / 2


# 000-E22, E23: modes and first weights


@each_side
def test_one_image_in_training_mode_is_normalised_by_itself(side):
    """Asked for alone and in a batch, the same noise gives two images; not so after ``eval()``."""
    generator, _ = networks(side, "dcgan", SHAPE)
    noise = drawn(side, SHAPE)[1]
    alone, among = (to_numpy(generator(z))[0] for z in (noise[:1], noise))
    assert np.abs(alone - among).max() > 1000 * EPS
    generator.eval()
    alone, among = (to_numpy(generator(z))[0] for z in (noise[:1], noise))
    np.testing.assert_allclose(alone, among, rtol=0, atol=ULPS)


def test_the_frameworks_first_weights_differ():
    """Convolutions' biases are 0 in MLX alone; a transposed kernel's size follows the other end."""
    torch.manual_seed(0)
    theirs, ours = torch.nn.Conv2d(3, 8, 4), nn.Conv2d(3, 8, 4)
    assert theirs.bias.abs().min() > 0
    assert not np.array(ours.bias).any()

    mx.random.seed(0)
    theirs, ours = torch.nn.ConvTranspose2d(512, 64, 4), nn.ConvTranspose2d(512, 64, 4)
    # Uniform in ±1/sqrt(fan-in), a standard deviation of that over the root of 3.
    n = ours.weight.size
    for kernel, inputs in ((to_numpy(theirs.weight), 64), (np.array(ours.weight), 512)):
        expected = 1 / math.sqrt(3 * inputs * 16)  # 0.0180 and 0.0064
        assert kernel.std() == pytest.approx(expected, rel=5 / math.sqrt(n))


@each_side
def test_dcgan_has_what_document_000_lacks(side):
    """Norms in both networks, no biases beside them, and a leaky slope in the discriminator."""
    generator, discriminator = networks(side, "dcgan", SHAPE)
    for network in (generator, discriminator):
        names = set(tensors(network))
        assert any(name.startswith("norms.") for name in names)
        assert not any(name.endswith("bias") for name in names if "norms" not in name)
    for network in networks(side, "conv_gan", shape_of("conv_gan")):
        assert not any(name.startswith("norms.") for name in tensors(network))

    discriminator.eval()
    weights = {k: np.abs(a) for k, a in tensors(discriminator).items()}
    set_tensors(discriminator, weights)
    real = to_numpy(drawn(side, SHAPE)[0])
    positive, negative = (
        to_numpy(discriminator(side.array(sign * np.abs(real)))) for sign in (1, -1)
    )
    # Positive weights, norms without an offset: each layer scales by 1, or by 0.2 below zero.
    np.testing.assert_allclose(negative, -(0.2**2) * positive, rtol=64 * EPS)


def test_batch_norms_running_variance_is_unbiased_in_both():
    """MLX's was biased before 0.32.1: pyproject.toml asks for what agrees."""
    x = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    ours, theirs = nn.BatchNorm(2), torch.nn.BatchNorm1d(2)
    ours(mx.array(x))
    theirs(torch.tensor(x))
    expected = 0.9 + 0.1 * x.astype(np.float64).var(axis=0, ddof=1)
    np.testing.assert_allclose(np.array(ours.running_var), expected, rtol=8 * EPS)
    np.testing.assert_allclose(theirs.running_var.numpy(), expected, rtol=8 * EPS)
    assert {k for k, _ in tree_flatten(ours.trainable_parameters())} == {"weight", "bias"}
