"""The U-Net: the paper's size, what attention and the embedding are, and what it refuses."""

import math
import zlib

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from mlx.utils import tree_flatten

import mlx_impl.unet
import reference.unet
from mlx_parity import CarryError, carry
from tests.cases.unet import unet, unets
from tests.frameworks import EPS, MLX, TORCH, Side, assert_equal_but_for_rounding, each_side

SMALL = {
    "channels": 4,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "image_size": 8,
    "groups": 2,
}


def parameters(side: Side, model) -> dict[str, tuple[int, ...]]:
    named = tree_flatten(model.parameters()) if side is MLX else model.named_parameters()
    return {name: tuple(p.shape) for name, p in named}


def size(side: Side, model) -> int:
    return sum(int(np.prod(shape)) for shape in parameters(side, model).values())


def images(side: Side, *shape: int):
    """Normal images from a shape (B, H, W, C), in the side's layout."""
    return side.images(np.random.default_rng(0).standard_normal(shape, np.float32))


def numpy(array) -> np.ndarray:
    return array.detach().numpy() if isinstance(array, torch.Tensor) else np.array(array)


def randomise(side: Side, model):
    """Weights that are not zero anywhere, as the last layer of a new U-Net is."""
    rng = np.random.default_rng(1)
    if side is MLX:
        made = [
            (name, mx.array(0.3 * rng.standard_normal(p.shape, np.float32)))
            for name, p in tree_flatten(model.parameters())
        ]
        model.load_weights(made)
    else:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.from_numpy(0.3 * rng.standard_normal(tuple(p.shape), np.float32)))
    return model


@each_side
def test_the_cifar_10_network_has_the_papers_size(side: Side):
    """35.7 million in Ho et al., appendix B; counted to the last in their published weights."""
    assert size(side, side.unet.UNet()) == 35_746_307


def sines(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that follow from a name and are the same everywhere."""
    angles = zlib.crc32(name.encode()) % 1000 + np.arange(math.prod(shape), dtype=np.float64)
    if len(shape) > 1:
        return np.sin(angles).reshape(shape) * math.sqrt(2 / math.prod(shape[1:]))
    return ("norm" in name and name.endswith("weight")) + 0.3 * np.sin(angles)


def test_the_network_computes_what_a_public_one_does():
    """UNet2DModel of huggingface/diffusers 0.42.1, in float64, with these weights (measured once).

    ``UNet2DModel(sample_size=8, layers_per_block=2, block_out_channels=(8, 16), norm_num_groups=4,
    norm_eps=1e-6, attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1,
    downsample_padding=0)`` with attention in the blocks of 16 channels. Its timesteps' angles are
    in float32, which moves nothing here by more than 1.7e-8. That ours in MLX computes the same as
    the reference, the ladder shows.
    """
    sizes = {**SMALL, "channels": 8, "num_res_blocks": 2, "groups": 4}
    model = reference.unet.UNet(**sizes).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(sines(name, tuple(parameter.shape))))
        x = torch.from_numpy(sines("x", (2, 3, 8, 8)) * math.sqrt(3 * 8 * 8 / 2))
        y = model(x, torch.tensor([10, 900])).numpy()
    half_a_unit = {"rtol": 0, "atol": 5e-7}
    np.testing.assert_allclose(y[0, :, 3, 4], [-1.172347, 1.271014, -1.103607], **half_a_unit)
    np.testing.assert_allclose(y[1, :, 0, 7], [0.482537, -0.210712, 0.107911], **half_a_unit)
    squares = np.square(y).mean((1, 2, 3))
    np.testing.assert_allclose(squares, [0.904778, 0.763276], **half_a_unit)


def test_both_sides_name_the_same_parameters():
    ours, theirs = (side.unet.UNet(**SMALL, num_classes=3) for side in (MLX, TORCH))
    assert sorted(parameters(MLX, ours)) == sorted(parameters(TORCH, theirs))


@each_side
def test_classes_cost_their_embeddings_alone(side: Side):
    """One row of the embedding for each class, and one for none."""
    with_classes = side.unet.UNet(**SMALL, num_classes=5)
    assert with_classes.null_label == 5
    assert size(side, with_classes) - size(side, side.unet.UNet(**SMALL)) == 6 * 16


@each_side
def test_a_new_network_predicts_nothing(side: Side):
    """Its last convolution starts at zero, as that of every residual branch."""
    out = side.unet.UNet(**SMALL)(images(side, 2, 8, 4, 3), side.array([0, 999]))
    assert not numpy(out).any()


@settings(max_examples=10)
@given(unets())
def test_the_prediction_has_the_images_shape(shape):
    height, width = shape["image_size"]
    for side in (MLX, TORCH):
        x = images(side, shape["batch"], height, width, shape["in_channels"])
        t = side.array(np.zeros(shape["batch"], np.int64))
        labels = (t,) if shape["num_classes"] else ()
        assert unet(side.unet, shape)(x, t, *labels).shape == x.shape


@each_side
def test_images_of_another_size_run_with_attention_at_the_same_levels(side: Side):
    model = randomise(side, side.unet.UNet(**SMALL))
    x = images(side, 1, 6, 10, 3)
    assert model(x, side.array([3])).shape == x.shape


@each_side
def test_the_timestep_matters_and_each_image_has_its_own(side: Side):
    """What document 004's network left out (004-E9). To the last bit: no image sees another's."""
    model = randomise(side, side.unet.UNet(**SMALL))
    x = np.repeat(np.random.default_rng(0).standard_normal((1, 8, 8, 3), np.float32), 2, axis=0)
    a, b = numpy(model(side.images(x), side.array([1, 900])))
    assert np.abs(a - b).max() > 1e-2
    c, d = numpy(model(side.images(x), side.array([1, 30])))
    assert np.array_equal(a, c)
    assert np.abs(b - d).max() > 1e-2


@each_side
def test_labels_matter(side: Side):
    model = randomise(side, side.unet.UNet(**SMALL, num_classes=2))
    x, t = images(side, 1, 8, 8, 3), side.array([5])
    made = [numpy(model(x, t, side.array([label]))) for label in range(3)]
    assert min(np.abs(made[i] - made[i - 1]).max() for i in range(3)) > 1e-2


def own_weights(block) -> dict[str, np.ndarray]:
    """A block's weights by name. Those of linear layers and norms are the same on both sides."""
    mlx = not isinstance(block, torch.nn.Module)
    named = tree_flatten(block.parameters()) if mlx else block.named_parameters()
    return {name: numpy(p) for name, p in named}


def attention(x: np.ndarray, weights: dict[str, np.ndarray], dtype: type) -> np.ndarray:
    """Two groups normalised, ``softmax(q k^T / sqrt(c)) v`` (Vaswani et al. 2017, Eq. 1), added."""
    w = {name: a.astype(dtype) for name, a in weights.items()}
    b, height, width, c = x.shape
    pixels = x.astype(dtype).reshape(b, height * width, c)
    groups = pixels.reshape(b, -1, 2, c // 2)
    centred = groups - groups.mean((1, 3), keepdims=True)
    h = centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + dtype(1e-6))
    h = h.reshape(pixels.shape) * w["norm.weight"] + w["norm.bias"]
    q, k, v = (h @ w[f"{n}.weight"].T + w[f"{n}.bias"] for n in "qkv")
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(dtype(c))
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    out = pixels + (shares @ v) @ w["proj_out.weight"].T + w["proj_out.bias"]
    return out.reshape(x.shape).astype(np.float64)


@each_side
def test_attention_does_not_see_where_a_pixel_is(side: Side):
    """Pixels in another order come out in that order: without its place, a pixel is its value."""
    block = randomise(side, side.unet.AttentionBlock(6, 2))
    x = np.random.default_rng(2).standard_normal((2, 3, 4, 6), np.float32)
    order = np.random.default_rng(3).permutation(12)

    def shuffled(nhwc: np.ndarray) -> np.ndarray:
        return nhwc.reshape(2, 12, 6)[:, order].reshape(x.shape)

    def attend(nhwc: np.ndarray) -> np.ndarray:
        out = numpy(block(side.images(nhwc)))
        return out if side is MLX else out.transpose(0, 2, 3, 1)

    assert np.abs(attend(x) - x).max() > 1e-2
    weights = own_weights(block)
    assert_equal_but_for_rounding(
        lambda p: {"out": shuffled(attention(p["x"], weights, np.float64))},
        lambda p: {"out": shuffled(attention(p["x"], weights, np.float32))},
        lambda p: {"out": attend(shuffled(p["x"])).astype(np.float64)},
        {"x": x},
    )


@each_side
def test_downsampling_pads_at_the_bottom_and_the_right(side: Side):
    """A kernel of which only the first element is 1 so takes every second pixel, from the first."""
    layer = side.unet.Downsample(1)
    kernel = np.zeros((1, 3, 3, 1) if side is MLX else (1, 1, 3, 3), np.float32)
    kernel[0, 0, 0, 0] = 1
    x = np.arange(24, dtype=np.float32).reshape(1, 4, 6, 1)
    if side is MLX:
        layer.conv.weight, layer.conv.bias = mx.array(kernel), mx.zeros(1)
    else:
        layer.conv.weight.data, layer.conv.bias.data = torch.from_numpy(kernel), torch.zeros(1)
    np.testing.assert_array_equal(numpy(layer(side.images(x))).ravel(), [0, 2, 4, 12, 14, 16])


@each_side
def test_normalisation_has_the_papers_eps(side: Side):
    """1e-6, not the 1e-5 of either framework: in a channel of variance 1e-6 it halves the square.

    A variance of v becomes v / (v + eps), within a few roundings.
    """
    x = 1e-3 * np.array([1, -1, 1, -1], np.float32).reshape(1, 2, 1, 2).repeat(1, 0)
    out = numpy(side.unet.group_norm(1, 2)(side.images(x)))
    np.testing.assert_allclose(np.square(out), 0.5, rtol=8 * EPS)


@each_side
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"groups": 3},
            r"channels=4 and the levels' widths \[4, 8\] must be multiples of groups=3",
        ),
        ({"channels": 2}, "channels at least 4, which the time embedding needs"),
        ({"image_size": 9}, "image_size=9 cannot be halved 1 times"),
        ({"attention_resolutions": (16,)}, r"\(16,\) are not all among the levels' sizes \[8, 4\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(side: Side, wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        side.unet.UNet(**{**SMALL, **wrong})


@each_side
def test_inputs_that_do_not_fit_are_refused(side: Side):
    plain, classed = side.unet.UNet(**SMALL), side.unet.UNet(**SMALL, num_classes=3)
    x, t = images(side, 2, 8, 4, 3), side.array([0, 1])
    for shape in ((2, 7, 4, 3), (2, 8, 5, 3), (2, 8, 4, 1)):
        with pytest.raises(ValueError, match="with 3 channels, H and W multiples of 2"):
            plain(images(side, *shape), t)
    with pytest.raises(ValueError, match=r"timesteps \[1\] for 2 images: give one to each, \[2\]"):
        plain(x, side.array([0]))
    with pytest.raises(ValueError, match="made without num_classes and takes no labels"):
        plain(x, t, t)
    with pytest.raises(ValueError, match=r"takes labels, 0 to 3 \(no class\), for each image"):
        classed(x, t)
    with pytest.raises(ValueError, match=r"labels \[1\] for 2 images"):
        classed(x, t, side.array([0]))
    with pytest.raises(TypeError, match="labels must be integers"):
        classed(x, t, side.array([0.0, 1.0]))
    for label in (-1, 4):  # MLX itself would read some other memory, and PyTorch says only "index"
        with pytest.raises(IndexError, match=f"label {label} is not one of 0 to 2, the classes"):
            classed(x, t, side.array([0, label]))
    with pytest.raises(ValueError, match="has no classes: make it with num_classes"):
        _ = plain.null_label


def test_weights_of_another_configuration_are_refused(tmp_path):
    """By MLX's strict loading, by PyTorch's, and by the kit; by name and by shape."""
    small = mlx_impl.unet.UNet(**SMALL)
    path = str(tmp_path / "unet.safetensors")
    small.save_weights(path)
    with pytest.raises(ValueError, match=r"Missing .* parameters"):
        mlx_impl.unet.UNet(**{**SMALL, "num_res_blocks": 2}).load_weights(path)
    with pytest.raises(ValueError, match=r"Expected shape .* but received shape"):
        mlx_impl.unet.UNet(**{**SMALL, "channels": 6}).load_weights(path)
    theirs = reference.unet.UNet(**SMALL)
    with pytest.raises(RuntimeError, match="size mismatch"):
        reference.unet.UNet(**{**SMALL, "channels": 6}).load_state_dict(theirs.state_dict())
    with pytest.raises(CarryError, match="the weights cannot all be carried"):
        carry(theirs, mlx_impl.unet.UNet(**{**SMALL, "num_res_blocks": 2}))
