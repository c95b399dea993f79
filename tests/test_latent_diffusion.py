"""The autoencoder, the latents, and guidance: identities that hold whatever the weights."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import mlx_impl.latent_diffusion
import reference.latent_diffusion
from mlx_parity import carry
from tests.frameworks import (
    EPS,
    MLX,
    TORCH,
    ULPS,
    Side,
    assert_equal_but_for_rounding,
    assert_within,
    each_side,
)
from tests.test_unet import images, numpy, randomise, size

SMALL = {"in_channels": 2, "latent_channels": 3, "channels": 4, "channel_multipliers": (1, 2)}
UNET = {
    "in_channels": 3,
    "channels": 4,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "image_size": 4,
    "groups": 2,
    "num_classes": 3,
}


IMAGES = np.random.default_rng(0).standard_normal((2, 4, 4, 3), np.float32)


def autoencoder(side: Side):
    return randomise(side, side.latent_diffusion.Autoencoder(**SMALL, groups=2))


def classes(side: Side):
    return randomise(side, side.unet.UNet(**UNET))


def schedule(side: Side, steps: int = 5):
    return side.diffusion.linear_schedule(steps)


def nhwc(side: Side, array) -> np.ndarray:
    return numpy(array) if side is MLX else numpy(array).transpose(0, 2, 3, 1)


@each_side
def test_the_latents_are_smaller_by_the_factor_and_decode_to_images(side: Side):
    model = autoencoder(side)
    x = images(side, 3, 4, 6, 2)
    mean, log_variance = model.encode(x)
    assert nhwc(side, mean).shape == nhwc(side, log_variance).shape == (3, 2, 3, 3)
    assert model.decode(mean).shape == x.shape


@each_side
def test_the_default_autoencoder_and_its_u_net_fit_digits(side: Side):
    file = side.latent_diffusion
    mean, _ = file.Autoencoder().encode(images(side, 1, 32, 32, 1))
    assert nhwc(side, mean).shape == (1, 8, 8, 4)
    model = file.UNet(**file.DIGITS)
    labels = side.array([9])
    assert model(mean, side.array([0]), labels).shape == mean.shape
    assert (size(side, file.Autoencoder()), size(side, model)) == (456_489, 2_799_556)


@each_side
def test_kl_is_zero_at_the_standard_normal_and_known_elsewhere(side: Side):
    """In nats for an image: of N(1, 1) in d dimensions d / 2, of N(0, e) d (e - 2) / 2."""
    zero, one = (side.array(np.full((2, 3, 4, 1), v, np.float32)) for v in (0, 1))
    kl = side.latent_diffusion.kl_divergence
    assert float(kl(zero, zero)) == 0
    assert float(kl(one, zero)) == pytest.approx(12 / 2, rel=ULPS)
    assert float(kl(zero, one)) == pytest.approx(12 * (math.e - 2) / 2, rel=4 * ULPS)


@each_side
def test_reparametrised_noise_has_the_mean_and_the_deviation(side: Side):
    mean, log_variance, noise = (
        side.array(np.array(v, np.float32)) for v in ([2.0, 3.0], [0.0, math.log(4)], [0.5, -1.5])
    )
    z = side.latent_diffusion.reparametrise(mean, log_variance, noise)
    np.testing.assert_allclose(numpy(z), [2.5, 0.0], rtol=ULPS, atol=ULPS)
    with pytest.raises(ValueError, match=r"latent noise \[1\] for latents \[2\]"):
        side.latent_diffusion.reparametrise(mean, log_variance, noise[:1])


@each_side
def test_the_log_variance_cannot_make_infinity(side: Side):
    model = autoencoder(side)
    mean, log_variance = model.encode(1e6 * images(side, 1, 4, 6, 2))
    bias = numpy(model.encoder.conv_out.bias).copy()
    bias[3:] = [1e6, -1e6, 0]
    if side is MLX:
        model.encoder.conv_out.bias = mx.array(bias)
    else:
        model.encoder.conv_out.bias.data = torch.from_numpy(bias)
    mean, log_variance = model.encode(images(side, 1, 4, 6, 2))
    extremes = nhwc(side, log_variance)[..., :2]
    assert (extremes == [20, -30]).all()
    assert np.isfinite(numpy(side.latent_diffusion.kl_divergence(mean, log_variance)))


@each_side
def test_the_measured_scale_makes_the_latents_deviate_by_one(side: Side):
    file, model = side.latent_diffusion, autoencoder(side)
    x, noise = images(side, 5, 4, 6, 2), images(side, 5, 2, 3, 3)
    scale = file.measure_latent_scale(model, x, noise)
    latents = scale * numpy(file.reparametrise(*model.encode(x), noise))
    # A sum of n numbers is off by n roundings of half a unit at most, its square root by half that.
    assert latents.std() == pytest.approx(1, rel=(latents.size + 4) * EPS)


@each_side
def test_dropped_labels_are_no_class(side: Side):
    labels, drop = side.array([2, 0, 1]), side.array([True, False, True])
    drop_labels = side.latent_diffusion.drop_labels
    assert numpy(drop_labels(labels, drop, 7)).tolist() == [7, 0, 7]
    with pytest.raises(ValueError, match=r"drop \[2\] for labels \[3\]"):
        drop_labels(labels, drop[:2], 7)


@each_side
def test_all_labels_dropped_is_training_without_them(side: Side):
    file, model, encoder = side.latent_diffusion, classes(side), autoencoder(side)
    drawn = [images(side, 2, 8, 8, 2), images(side, 2, 4, 4, 3), side.array([0, 4])]
    drawn.append(images(side, 2, 4, 4, 3))

    def value(labels: list[int], drop: list[bool]) -> float:
        arrays = (*drawn, side.array(labels), side.array(drop))
        return numpy(file.latent_loss(model, encoder, *arrays, schedule(side))).item()

    assert value([0, 1], [True, True]) == value([3, 3], [False, False]) == value([2, 2], [True] * 2)
    assert value([0, 1], [False, False]) != value([0, 1], [True, True])


@each_side
def test_guidance_of_1_is_the_label_of_0_none_and_beyond_is_linear(side: Side):
    """Of one call for both, as no rounding depends on who is in a batch but on its size."""
    model = classes(side)
    x, t, labels = side.images(IMAGES), side.array([1, 4]), side.array([0, 2])
    made = {
        scale: numpy(side.latent_diffusion.guided(model, labels, scale)(x, t))
        for scale in (0.0, 1.0, 3.0)
    }
    both = model(
        side.images(np.tile(IMAGES, (2, 1, 1, 1))),
        side.array([1, 4, 1, 4]),
        side.array([0, 2, 3, 3]),
    )
    conditional, unconditional = np.split(numpy(both).astype(np.float64), 2)
    assert np.array_equal(made[0.0], unconditional)
    size = np.abs(conditional) + np.abs(unconditional)
    assert_within(made[1.0], conditional, 2 * EPS * size)
    assert_within(made[3.0], 3 * conditional - 2 * unconditional, 2 * 3 * EPS * size)
    assert np.abs(conditional - unconditional).max() > 1e-2


@each_side
def test_guidance_needs_classes(side: Side):
    model = side.unet.UNet(**{**UNET, "num_classes": None})
    with pytest.raises(ValueError, match="has no classes: make it with num_classes"):
        side.latent_diffusion.guided(model, side.array([0]), 2.0)


@each_side
def test_samples_are_decoded_latents_of_the_guided_model(side: Side):
    file, model, decoder = side.latent_diffusion, classes(side), autoencoder(side)
    noise, labels = images(side, 2, 4, 4, 3), side.array([0, 2])
    made = file.sample(model, decoder, schedule(side), noise, labels, 2.0, 0.5)
    guided = file.guided(model, labels, 2.0)
    latents = side.diffusion.ddim_sample(guided, schedule(side), noise)
    assert nhwc(side, made).shape == (2, 8, 8, 2)
    np.testing.assert_array_equal(numpy(made), numpy(decoder.decode(latents / 0.5)))


@each_side
def test_the_second_stage_leaves_the_autoencoder_alone(side: Side):
    file, model, encoder = side.latent_diffusion, classes(side), autoencoder(side)
    optimizer = file.make_optimizer(model)

    def weights(module) -> list[np.ndarray]:
        named = tree_flatten(module.parameters()) if side is MLX else module.named_parameters()
        return [numpy(p).copy() for _, p in named]

    before = weights(encoder), weights(model)
    batch = (images(side, 2, 8, 8, 2), images(side, 2, 4, 4, 3), side.array([0, 4]))
    batch = (*batch, images(side, 2, 4, 4, 3), side.array([0, 1]), side.array([True, False]))
    file.train_step(model, encoder, optimizer, *batch, schedule(side))
    assert all(map(np.array_equal, before[0], weights(encoder)))
    assert not any(map(np.array_equal, before[1], weights(model)))


@each_side
def test_adam_starts_with_one_learning_rate_of_2e_4(side: Side):
    """Either stage's: a gradient of 1 moves a weight of 0 by it, but for eps and the correction."""
    model, make = (
        (nn if side is MLX else torch.nn).Linear(1, 1),
        side.latent_diffusion.make_optimizer,
    )
    for name in ("weight", "bias"):
        array = getattr(model, name)
        if side is MLX:
            setattr(model, name, mx.zeros_like(array))
        else:
            array.data.zero_()
            array.grad = torch.ones_like(array)
    if side is MLX:
        make(model).update(model, {"weight": mx.ones((1, 1)), "bias": mx.ones(1)})
    else:
        make(model).step()
    for name in ("weight", "bias"):
        assert -getattr(model, name).item() / 2e-4 == pytest.approx(1, abs=EPS / (1 - 0.999))


@each_side
def test_the_first_stage_learns_to_reconstruct(side: Side):
    """Forty steps on two images halve the error: everything is joined to everything."""
    file = side.latent_diffusion
    model = file.Autoencoder(**SMALL, groups=2)
    optimizer = file.make_optimizer(model)
    if side is MLX:
        optimizer.learning_rate = 1e-2
    else:
        optimizer.param_groups[0]["lr"] = 1e-2
    x, noise = images(side, 2, 4, 6, 2), images(side, 2, 2, 3, 3)
    errors = [float(file.autoencoder_train_step(model, optimizer, x, noise)[0]) for _ in range(40)]
    assert errors[-1] < errors[0] / 2


@each_side
def test_inputs_that_do_not_fit_are_refused(side: Side):
    file, model = side.latent_diffusion, autoencoder(side)
    for shape in ((1, 5, 6, 2), (1, 4, 7, 2), (1, 4, 6, 1)):
        with pytest.raises(ValueError, match="with 2 channels, H and W multiples of 2"):
            model.encode(images(side, *shape))
    with pytest.raises(ValueError, match="with 3 channels"):
        model.decode(images(side, 1, 2, 3, 2))
    with pytest.raises(ValueError, match=r"levels' widths \[4, 8\] must be multiples of groups=3"):
        file.Autoencoder(**SMALL, groups=3)
    constant = side.latent_diffusion.Autoencoder(**SMALL, groups=2)
    for weight in ("weight", "bias"):
        array = getattr(constant.encoder.conv_out, weight)
        if side is MLX:
            setattr(constant.encoder.conv_out, weight, mx.zeros_like(array))
        else:
            array.data.zero_()
    with pytest.raises(ValueError, match="latents are all alike: give more of them"):
        file.measure_latent_scale(constant, images(side, 1, 4, 6, 2), 0 * images(side, 1, 2, 3, 3))


def test_weights_of_another_configuration_are_refused(tmp_path):
    path = str(tmp_path / "autoencoder.safetensors")
    mlx_impl.latent_diffusion.Autoencoder(**SMALL, groups=2).save_weights(path)
    other = {**SMALL, "latent_channels": 2, "groups": 2}
    with pytest.raises(ValueError, match=r"Expected shape .* but received shape"):
        mlx_impl.latent_diffusion.Autoencoder(**other).load_weights(path)
    theirs = reference.latent_diffusion.Autoencoder(**SMALL, groups=2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        reference.latent_diffusion.Autoencoder(**other).load_state_dict(theirs.state_dict())


def test_both_sides_measure_the_same_scale():
    """The one number that goes from the first stage to the second."""
    ours, theirs, exact = autoencoder(MLX), autoencoder(TORCH), autoencoder(TORCH).double()
    carry(theirs, ours)  # the reference's own weights, in MLX's layout

    def scale(side: Side, model, point, dtype: type) -> dict[str, np.ndarray]:
        arrays = (side.images(point[name].astype(dtype)) for name in ("images", "noise"))
        return {"scale": np.array([side.latent_diffusion.measure_latent_scale(model, *arrays)])}

    rng = np.random.default_rng(0)
    assert_equal_but_for_rounding(
        lambda p: scale(TORCH, exact, p, np.float64),
        lambda p: scale(TORCH, theirs, p, np.float32),
        lambda p: scale(MLX, ours, p, np.float32),
        {
            "images": rng.standard_normal((5, 4, 6, 2), np.float32),
            "noise": rng.standard_normal((5, 2, 3, 3), np.float32),
        },
    )
