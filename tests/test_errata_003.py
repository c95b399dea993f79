"""Document 003: each defect shown as the document has it, and its repair as we have it.

ERRATA.md tells the story of each entry and names the test here, or in ``test_style_properties.py``
and ``test_vgg_weights.py``.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from torchvision.models.vgg import cfgs, make_layers

import reference.style_transfer as torch_style
import reference.vgg as torch_vgg
from mlx_impl.vgg import max_pool
from tests.frameworks import EPS, MLX, TORCH, Side, each_side


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 0.9, (*shape, 3)).astype(np.float32)


def as_documented(size: tuple[int, int], generated: np.ndarray, style: np.ndarray) -> float:
    """l. 61-69: the Gram matrix of one image, not normalised, and the mean squared difference."""

    def gram(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(-1, size[0] * size[1]).astype(np.float64)
        return flat @ flat.T

    return float(((gram(style) - gram(generated)) ** 2).mean())


def whole_numbers(*shape: int, seed: int) -> np.ndarray:
    """Small enough that no product or sum of them rounds."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float64)


# E3 to E5: the network


def multiplications(layers: list[tuple[int, int, int]]) -> int:
    """Of 3 x 3 convolutions given as inputs, outputs and places."""
    return sum(9 * i * o * places for i, o, places in layers)


def test_without_pooling_the_document_costs_more_than_vgg19():
    """At 512 x 512, in operations, two for each multiplication."""
    places = 512**2
    flat = multiplications([(3, 64, places), (64, 128, places), (128, 256, places)])
    pooled = multiplications([(3, 64, places), (64, 128, places // 4), (128, 256, places // 16)])
    names = torch_vgg.convolutions("vgg19")
    widths = [3, *(torch_vgg.CHANNELS[int(name[4]) - 1] for name in names)]
    layers = [
        (i, o, places >> 2 * (int(name[4]) - 1))
        for i, o, name in zip(widths, widths[1:], names, strict=False)
    ]
    whole = multiplications(layers[: names.index("conv5_1") + 1])
    assert [round(2 * m / 1e9) for m in (flat, pooled, whole)] == [194, 20, 189]
    assert 4 * 256 * places == 256 * 2**20  # bytes of conv3_1's output


@each_side
def test_every_tap_of_the_extractor_is_half_as_large(side):
    found = side.style_transfer.FeatureExtractor()(side.images(pictures(2, 12, 20)))
    shapes = [tuple(x.shape) for x in found.values()]
    if side is MLX:
        assert shapes == [(2, 12, 20, 64), (2, 6, 10, 128), (2, 3, 5, 256)]
    else:
        assert shapes == [(2, 64, 12, 20), (2, 128, 6, 10), (2, 256, 3, 5)]


def test_taps_are_torchvisions_indices():
    features = make_layers(cfgs["E"])
    at = {"conv1_1": 0, "conv2_1": 5, "conv3_1": 10, "conv4_1": 19, "conv4_2": 21, "conv5_1": 28}
    ours = torch_vgg.VGG("vgg19")
    for name, i in at.items():
        assert features[i].weight.shape == getattr(ours, name).weight.shape
        assert isinstance(features[i + 1], torch.nn.ReLU)
    pools = [i for i, layer in enumerate(features) if isinstance(layer, torch.nn.MaxPool2d)]
    assert pools == [4, 9, 18, 27, 36]


@each_side
def test_images_for_other_weights_are_other_images(side):
    """The two conventions, undone: they differ in the order, the scale and the place of zero."""
    x = pictures(1, 4, 5)
    ours = side.vgg.TORCHVISION(side.images(x)), side.vgg.CAFFE(side.images(x))
    found = [np.asarray(a.tolist(), np.float64) for a in ours]
    if side is TORCH:
        found = [a.transpose(0, 2, 3, 1) for a in found]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    caffe = 255 * x[..., ::-1].astype(np.float64) - [103.939, 116.779, 123.68]
    # a few roundings of numbers up to 1 / 0.224, and up to 255
    assert np.abs(found[0] - (x - mean) / std).max() < 8 * EPS / 0.224
    assert np.abs(found[1] - caffe).max() < 4 * EPS * 255
    assert np.abs(found[1]).max() > 20 * np.abs(found[0]).max()


def test_content_and_style_come_from_different_layers():
    objective = torch_style.GATYS
    assert set(objective.content) == {"relu4_2"}
    assert objective.style == {f"relu{b}_1": 1 / 5 for b in range(1, 6)}
    assert {*objective.content, *objective.style} == set(torch_vgg.GATYS)


# E8 to E11: the style loss


def test_the_documents_gram_matrix_takes_one_image_only():
    x = torch.zeros(2, 4, 5, 6)
    _, c, h, w = x.size()
    with pytest.raises(RuntimeError, match=r"shape '\[4, 30\]' is invalid for input of size 240"):
        x.view(c, h * w)
    with pytest.raises(ValueError, match="reshape array of size 240"):
        mx.zeros((2, 5, 6, 4)).reshape(4, 30)


@each_side
def test_a_batch_flattened_into_one_matrix_mixes_its_images(side):
    """The other way to take a batch, as in PyTorch's tutorial: (2 C, 2 C)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 6, 4)).astype(np.float32)
    flat = x.transpose(0, 3, 1, 2).reshape(8, 30)
    mixed = flat @ flat.T
    assert np.abs(mixed[:4, 4:]).max() > 1  # one image's channels against the other's
    found = np.asarray(side.style_transfer.gram_matrix(side.images(x)).tolist())
    assert found.shape == (2, 4, 4)
    assert np.abs(found - [mixed[:4, :4], mixed[4:, 4:]]).max() < 30 * EPS * np.abs(mixed).max()


@each_side
def test_the_documents_loss_depends_on_the_size_of_the_picture(side):
    """Twice the size, 16 times the loss; and a texture is far from itself at another size."""
    a, b = (whole_numbers(1, 16, 16, 4, seed=s) for s in (0, 1))
    chw = [x.transpose(0, 3, 1, 2) for x in (a, b)]
    twice = [np.tile(x, (1, 1, 2, 2)) for x in chw]
    base = as_documented((16, 16), *chw)
    assert as_documented((32, 32), *twice) / base == 16
    four = [np.tile(x, (1, 1, 4, 4)) for x in chw]
    assert as_documented((64, 64), *four) / base == 256

    lib, x = side.style_transfer, a.astype(np.float32)
    large = side.images(np.tile(x, (1, 2, 2, 1)))

    def distance(normalize: str) -> float:
        target = {"a": lib.gram_matrix(side.images(x), normalize)}
        return lib.style_loss(target, {"a": large}, {"a": 1.0}, normalize).item()

    assert distance("none") > 1e3
    assert distance("hw") < (1024 * EPS) ** 2 * distance("none")


def test_the_documents_loss_is_4m2_times_gatys():
    a, b = (whole_numbers(4, 16, 16, seed=s) for s in (0, 1))
    n, m = 4, 256
    grams = [x.reshape(n, m) @ x.reshape(n, m).T for x in (a, b)]
    e_l = ((grams[0] - grams[1]) ** 2).sum() / (4 * n**2 * m**2)
    assert as_documented((16, 16), a, b) / e_l == 262_144


@each_side
def test_the_style_loss_weighs_its_layers(side):
    lib = side.style_transfer
    maps = {f"a{i}": side.images(pictures(1, 4, 5 + i, seed=i)) for i in range(2)}
    zero = {name: 0 * lib.gram_matrix(x) for name, x in maps.items()}
    each = [lib.style_loss(zero, maps, {name: 1.0}).item() for name in maps]
    both = lib.style_loss(zero, maps, {"a0": 0.25, "a1": 3.0}).item()
    assert both == pytest.approx(0.25 * each[0] + 3 * each[1], rel=8 * EPS)


def pull(size: int, normalize: str, seed: int) -> float:
    """How much harder content pulls the image than style does, both with weight 1."""
    torch.manual_seed(seed)
    extractor = torch_style.FeatureExtractor()
    content, style, image = (torch.rand(1, 3, size, size) for _ in range(3))
    found = extractor(image.requires_grad_())["relu3_1"]
    gram = torch_style.gram_matrix(extractor(style)["relu3_1"], normalize)
    losses = (
        torch_style.content_loss(extractor(content)["relu3_1"], found),
        torch_style.style_loss({"a": gram}, {"a": found}, {"a": 1.0}, normalize),
    )
    c, s = (torch.autograd.grad(loss, image, retain_graph=True)[0].norm() for loss in losses)
    return float(c / s)


@pytest.mark.parametrize("seed", range(3))
def test_the_documents_weights_leave_out_the_style_or_let_the_size_decide(seed):
    documented, ours = 1e4 / 1e2, 1 / torch_style.DOCUMENT_003.style_weight
    assert documented * pull(64, "hw", seed) > 9e4
    assert 0.5 < ours * pull(64, "hw", seed) < 5
    assert pull(64, "none", seed) > 4 * pull(128, "none", seed)


# E13 to E17: the loop


class Counted(torch_style.FeatureExtractor):
    calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images)


def test_the_documents_loop_computes_its_constants_in_every_step():
    """Three passes a step; ours makes one, and two before the first."""
    extractor = Counted((2, 2, 2))
    image = torch.from_numpy(pictures(1, 8, 8)).permute(0, 3, 1, 2)
    torch_style.style_transfer(image, image, extractor, torch_style.DOCUMENT_003, steps=5)
    assert extractor.calls == 5 + 2
    assert not any(p.requires_grad for p in extractor.parameters())


@each_side
def test_targets_carry_no_graph_and_no_promise(side):
    lib = side.style_transfer
    extractor = lib.FeatureExtractor((2, 3, 4))
    content, style = side.images(pictures(1, 8, 12)), side.images(pictures(1, 9, 8))
    targets = lib.style_targets(extractor, content, style, lib.DOCUMENT_003)
    assert len(targets) == 4
    if side is TORCH:
        assert not any(t.requires_grad for t in targets)


def trained(side: Side, start: float, steps: int, rate: float):
    """An image that is pulled towards white, as seen by a random network, and the last losses."""
    lib = side.style_transfer
    torch.manual_seed(0)
    mx.random.seed(0)
    extractor = lib.FeatureExtractor((3, 4, 5))
    white = side.images(np.ones((1, 8, 12, 3), np.float32))
    targets = [100 * t for t in lib.style_targets(extractor, white, white, lib.DOCUMENT_003)]
    generated = lib.GeneratedImage(side.images(np.full((1, 8, 12, 3), start, np.float32)))
    optimizer = lib.make_optimizer(generated, rate)
    for _ in range(steps):
        losses = lib.train_step(
            extractor, generated, optimizer, *targets, objective=lib.DOCUMENT_003
        )
    return np.asarray(generated.image.tolist()), losses


@each_side
def test_adam_moves_a_pixel_by_one_learning_rate_a_step(side):
    """500 steps of the document's 0.003 go as far as 1.5: enough for [0, 1], little of 255."""
    travels = [np.abs(trained(side, 0.5, n, 0.003)[0] - 0.5).max() for n in (1, 10)]
    assert travels[0] == pytest.approx(0.003, abs=EPS)  # two roundings of a number near 1 / 2
    assert 0.02 < travels[1] < 0.04


@each_side
def test_the_image_stays_a_picture(side):
    image, _ = trained(side, 0.9, steps=20, rate=0.1)
    assert image.min() >= 0
    assert image.max() <= 1
    assert (image == image.max()).sum() > 1  # without the clamp some would be beyond


@each_side
def test_the_losses_are_told_apart(side):
    _, losses = trained(side, 0.5, steps=1, rate=0.01)
    content, style, variation = (loss.item() for loss in losses)
    assert content > 0
    assert style > 0
    assert variation == 0  # the document has none


# E19 to E25: the generator and its images


@each_side
def test_the_generator_alone_makes_noise(side):
    """Untrained: neighbouring pixels know nothing of each other."""
    z = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)
    found = np.asarray(side.style_transfer.ImageGenerator()(side.array(z)).tolist())
    axis = 2 if side is MLX else 3
    assert found.shape == ((4, 64, 64, 3) if side is MLX else (4, 3, 64, 64))
    left, right = (np.take(found, range(i, 63 + i), axis).ravel() for i in range(2))
    assert abs(np.corrcoef(left, right)[0, 1]) < 0.05


def test_the_generators_rows_are_in_another_order():
    """fc_out makes (C, H, W) there and (H, W, C) here: copied weights give another picture."""
    theirs, ours = (side.style_transfer.ImageGenerator(2, 3, (4, 5)) for side in (TORCH, MLX))
    state = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    z = np.ones((1, 2), np.float32)
    right = theirs(torch.from_numpy(z)).detach().numpy().transpose(0, 2, 3, 1)
    ours.load_weights([(name, mx.array(a)) for name, a in state.items()])
    assert np.abs(np.array(ours(mx.array(z))) - right).max() > 0.1
    order = np.arange(60).reshape(3, 4, 5).transpose(1, 2, 0).ravel()
    permuted = {n: a[order] if n.startswith("fc_out") else a for n, a in state.items()}
    ours.load_weights([(name, mx.array(a)) for name, a in permuted.items()])
    assert np.abs(np.array(ours(mx.array(z))) - right).max() < 16 * EPS


@each_side
def test_a_generated_image_becomes_a_content(side):
    lib = side.style_transfer
    extractor = lib.FeatureExtractor((2, 3, 4))
    z = side.array(np.ones((1, 7), np.float32))
    images = lib.ImageGenerator(7, 5, (8, 12))(z)
    style = side.images(pictures(1, 8, 8))
    with pytest.raises(ValueError, match=r"content must be in \[0, 1\].*unit_range"):
        lib.style_transfer(images, style, extractor, lib.DOCUMENT_003, steps=1)
    content = lib.unit_range(images)
    image, _ = lib.style_transfer(content, style, extractor, lib.DOCUMENT_003, steps=1)
    assert tuple(image.shape) == tuple(images.shape)
    assert side is MLX or not content.requires_grad


@each_side
def test_a_picture_without_a_batch_is_refused(side):
    lib = side.style_transfer
    single = side.array(pictures(8, 8))
    with pytest.raises(ValueError, match=r"style: images must be \(B, .*got \(8, 8, 3\)"):
        lib.style_transfer(
            side.images(pictures(1, 8, 8)),
            single,
            lib.FeatureExtractor((1, 1, 1)),
            lib.DOCUMENT_003,
        )


# E28: max pooling


def test_mlx_splits_the_gradient_of_equal_maxima_and_pytorch_does_not():
    x = mx.ones((1, 2, 2, 1))
    mlxs = mx.grad(lambda x: nn.MaxPool2d(2, 2)(x).sum())(x)
    ours = mx.grad(lambda x: max_pool(x).sum())(x)
    theirs = torch.ones(1, 1, 2, 2, requires_grad=True)
    torch.nn.functional.max_pool2d(theirs, 2).sum().backward()
    assert mlxs.flatten().tolist() == [0.25] * 4
    assert ours.flatten().tolist() == theirs.grad.flatten().tolist() == [1, 0, 0, 0]


def test_behind_a_relu_an_empty_window_is_harmless():
    grad = mx.grad(lambda x: nn.MaxPool2d(2, 2)(nn.relu(x)).sum())
    assert grad(-mx.ones((1, 2, 2, 1))).flatten().tolist() == [0] * 4
