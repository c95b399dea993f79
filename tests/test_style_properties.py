"""Style transfer on both sides: laws of its losses, what VGG sees, the loop around the step."""

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

import mlx_impl.style_transfer as mlx_style
import reference.style_transfer as torch_style
from mlx_impl.vgg import max_pool
from tests.frameworks import (
    EPS,
    MLX,
    TORCH,
    Side,
    assert_equal_but_for_rounding,
    assert_within,
    each_side,
)

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
"""(B, H, W, C)."""


def features(size: tuple[int, ...], seed: int) -> np.ndarray:
    """What a ReLU leaves, (B, H, W, C)."""
    return np.maximum(np.random.default_rng(seed).standard_normal(size), 0).astype(np.float32)


def gram(side: Side, nhwc: np.ndarray, normalize: str = "none") -> np.ndarray:
    found = side.style_transfer.gram_matrix(side.images(nhwc), normalize)
    return found.numpy() if side is TORCH else np.array(found)


def rounding(nhwc: np.ndarray) -> np.ndarray:
    """A bound on the rounding of each element of the Gram matrix: one for each term of its sum."""
    b, h, w, c = nhwc.shape
    f = np.abs(nhwc.reshape(b, h * w, c)).astype(np.float64)
    return (h * w + 2) * EPS * (f.transpose(0, 2, 1) @ f)


def style_loss(side: Side, style: np.ndarray, image: np.ndarray, normalize: str) -> float:
    lib = side.style_transfer
    target = {"a": lib.gram_matrix(side.images(style), normalize)}
    return lib.style_loss(target, {"a": side.images(image)}, {"a": 1.0}, normalize).item()


def is_near(a: np.ndarray, b: np.ndarray, bound: np.ndarray) -> bool:
    return bool((np.abs(a.astype(np.float64) - b) <= bound).all())


@each_side
@given(sizes, seeds)
def test_each_images_gram_is_its_own(side, size, seed):
    x = features(size, seed)
    whole = gram(side, x)
    for i in range(len(x)):
        alone = gram(side, x[i : i + 1])
        assert is_near(whole[i : i + 1], alone, 2 * rounding(x[i : i + 1]))


@each_side
@given(sizes, seeds)
def test_a_gram_is_symmetric_and_has_no_negative_eigenvalue(side, size, seed):
    x = features(size, seed)
    g = gram(side, x).astype(np.float64)
    assert is_near(g, g.transpose(0, 2, 1), 2 * rounding(x))
    slack = np.linalg.norm(rounding(x), axis=(1, 2))
    assert (np.linalg.eigvalsh((g + g.transpose(0, 2, 1)) / 2).min(axis=1) >= -slack).all()


@each_side
@given(sizes, seeds)
def test_a_gram_knows_no_places(side, size, seed):
    """Pixels in any order: style is what is left."""
    x = features(size, seed)
    b, h, w, c = size
    order = np.random.default_rng(seed).permutation(h * w)
    shuffled = x.reshape(b, h * w, c)[:, order].reshape(size)
    assert is_near(gram(side, x), gram(side, shuffled), 2 * rounding(x))


@each_side
@given(sizes, seeds, st.integers(-6, 6))
def test_style_loss_grows_with_the_fourth_power_of_the_features(side, size, seed, power):
    """Exactly so for a power of two, which no rounding sees."""
    a, b = features(size, seed), features(size, seed + 1)
    k = np.float32(2.0**power)
    assert style_loss(side, k * a, k * b, "none") == float(k) ** 4 * style_loss(side, a, b, "none")


@each_side
@pytest.mark.parametrize("times", [2, 4])
@given(sizes, seeds)
def test_only_a_normalised_gram_is_the_same_at_every_size(side, times, size, seed):
    """A texture repeated ``times`` in height and width: unnormalised, the loss is times^4."""
    x = features(size, seed)
    large = np.tile(x, (1, times, times, 1))
    many = times**2
    assert is_near(gram(side, large), many * gram(side, x), (many + 1) * rounding(large))
    hw = size[1] * size[2]
    slack = 2 * rounding(large) / (many * hw)
    assert is_near(gram(side, large, "hw"), gram(side, x, "hw"), slack)


@each_side
@pytest.mark.parametrize(("normalize", "power"), [("none", 4), ("hw", 0), ("chw", 0)])
@given(sizes, seeds, st.integers(0, 3))
def test_style_loss_of_a_larger_texture(side, normalize, power, size, seed, doublings):
    """k times in height and width: k^4 and k^0. Of whole numbers below 2^24 nothing rounds but the
    division by the size, and a power of two changes no rounding."""
    k = 2**doublings
    a, b = (whole(size, s) for s in (seed, seed + 1))
    large = [np.tile(x, (1, k, k, 1)) for x in (a, b)]
    found, base = (style_loss(side, *pair, normalize) for pair in (large, (a, b)))
    assert found == float(k) ** power * base


def whole(size: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, size).astype(np.float32)


@each_side
@given(sizes, seeds)
def test_normalisations_are_constant_multiples(side, size, seed):
    x = features(size, seed)
    _, h, w, c = size
    whole = gram(side, x).astype(np.float64)
    assert is_near(gram(side, x, "hw"), whole / (h * w), EPS * whole)
    assert is_near(gram(side, x, "chw"), whole / (c * h * w), EPS * whole)


@each_side
@given(sizes, seeds)
def test_style_loss_is_four_times_gatys_eq_4(side, size, seed):
    """E_l = 1 / (4 N^2 M^2) sum (G - A)^2, of N channels and M places: here of one image each."""
    a, b = (features((1, *size[1:]), s) for s in (seed, seed + 1))
    n, m = size[3], size[1] * size[2]
    grams = [x.reshape(m, n).astype(np.float64).T @ x.reshape(m, n) for x in (a, b)]
    e_l = ((grams[0] - grams[1]) ** 2).sum() / (4 * n**2 * m**2)
    # Each Gram matrix is off by its rounding, and the square of a difference by twice that.
    off = (rounding(a) + rounding(b))[0]
    off = (2 * np.abs(grams[0] - grams[1]) * off + off**2).sum() / (n**2 * m**2)
    slack = off + (n**2 + 4) * EPS * 4 * e_l
    assert abs(style_loss(side, a, b, "hw") - 4 * e_l) <= slack


@each_side
@given(sizes, seeds)
def test_content_loss_is_two_over_nm_times_gatys_eq_1(side, size, seed):
    a, b = (features((1, *size[1:]), s) for s in (seed, seed + 1))
    eq_1 = ((a.astype(np.float64) - b) ** 2).sum() / 2
    found = side.style_transfer.content_loss(side.images(a), side.images(b)).item()
    assert abs(found - 2 / a.size * eq_1) <= (a.size + 3) * EPS * 2 / a.size * eq_1


@each_side
def test_total_variation_of_pictures_that_one_can_count(side):
    def variation(nhwc: np.ndarray) -> float:
        return side.style_transfer.total_variation(side.images(nhwc)).item()

    assert variation(np.full((2, 4, 5, 3), 0.7, np.float32)) == 0
    assert variation(np.ones((1, 1, 1, 3), np.float32)) == 0  # no neighbours
    rows, columns = np.indices((4, 6))
    board = ((rows + columns) % 2).astype(np.float32)[None, :, :, None]
    assert variation(board) == pytest.approx((3 * 6 + 4 * 5) / 24, rel=4 * EPS)
    ramp = (2 * rows).astype(np.float32)[None, :, :, None]
    assert variation(ramp) == pytest.approx(4 * 3 * 6 / 24, rel=4 * EPS)


# What VGG sees


FIELDS = {"conv1_1": 3, "conv2_1": 10, "conv3_1": 24, "conv4_1": 68, "conv4_2": 84, "conv5_1": 156}


def positive_vgg(side: Side, tap: str):
    """A VGG-19 of one channel whose weights are all positive, so that nothing cancels."""
    lib = side.vgg
    plain = lib.Preprocessing(mean=(0.0, 0.0, 0.0))
    vgg = lib.VGG("vgg19", (tap,), "avg", (1,) * 5, plain)
    if side is TORCH:
        with torch.no_grad():
            for parameter in vgg.parameters():
                parameter.fill_(1 / 9)
    else:
        names = tree_flatten(vgg.parameters())
        vgg.load_weights([(name, mx.full(a.shape, 1 / 9)) for name, a in names])
    return vgg


@each_side
@pytest.mark.parametrize(("tap", "field"), FIELDS.items())
def test_receptive_fields(side, tap, field):
    """How many pixels, in height and in width, move the feature in the middle of a map."""
    vgg = positive_vgg(side, tap)
    images = np.full((1, 176, 176, 3), 0.5, np.float32)

    def middle(x):
        found = vgg(x)[tap]
        h, w = found.shape[1:3] if side is MLX else found.shape[2:]
        return found[0, h // 2, w // 2, 0] if side is MLX else found[0, 0, h // 2, w // 2]

    x = images if side is MLX else images.transpose(0, 3, 1, 2).copy()
    moved = side.grad(middle, x)[0] != 0
    moved = moved.any(axis=-1 if side is MLX else 0)
    assert (moved.any(axis=1).sum(), moved.any(axis=0).sum()) == (field, field)


@each_side
def test_number_of_parameters(side):
    def count(module) -> int:
        if side is TORCH:
            return sum(p.numel() for p in module.parameters())
        return sum(a.size for _, a in tree_flatten(module.parameters()))

    assert count(side.style_transfer.FeatureExtractor()) == 370_816
    assert count(side.style_transfer.ImageGenerator()) == 3_183_872
    assert count(side.vgg.VGG("vgg19")) == 20_024_384
    assert count(side.vgg.VGG("vgg16")) == 14_714_688


def test_the_classifier_that_is_left_out_makes_up_the_rest_of_torchvisions_vgg_19():
    from torchvision.models import vgg19

    with torch.device("meta"):  # no memory for the numbers themselves
        whole = vgg19()
    assert sum(p.numel() for p in whole.parameters()) == 143_667_240
    assert sum(p.numel() for p in whole.features.parameters()) == 20_024_384


@each_side
def test_nothing_is_computed_behind_the_deepest_tap(side):
    """relu2_1 of an image that is too small for the third block."""
    vgg = side.vgg.VGG("vgg19", ("relu2_1", "conv1_2"), channels=(2, 3, 1, 1, 1))
    found = vgg(side.images(np.full((1, 2, 2, 3), 0.5, np.float32)))
    assert list(found) == ["relu2_1", "conv1_2"]
    shape = (1, 1, 1, 3) if side is MLX else (1, 3, 1, 1)
    assert tuple(found["relu2_1"].shape) == shape


@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_pooling_has_pytorchs_gradient_among_equals(half_height, half_width, seed):
    """Whole numbers from 0 to 2 are full of ties; a gradient only moves numbers about."""
    rng = np.random.default_rng(seed)
    height, width = 2 * half_height + 1, 2 * half_width  # an odd row is left out
    x = rng.integers(0, 3, (2, height, width, 3)).astype(np.float32)
    cotangent = rng.standard_normal((2, half_height, half_width, 3)).astype(np.float32)
    ours = mx.grad(lambda x: (max_pool(x) * mx.array(cotangent)).sum())(mx.array(x))
    theirs = TORCH.images(x).requires_grad_()
    (F.max_pool2d(theirs, 2) * TORCH.images(cotangent)).sum().backward()
    assert np.array_equal(np.array(ours).transpose(0, 3, 1, 2), theirs.grad.numpy())


# The loop


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.2, 0.8, (*shape, 3)).astype(np.float32)


CONTENT, STYLE = pictures(1, 16, 24), pictures(1, 20, 9, seed=1)


def extractor(side: Side):
    if side is TORCH:
        torch.manual_seed(0)
    else:
        mx.random.seed(0)
    return side.style_transfer.FeatureExtractor((4, 5, 6))


def test_a_step_is_told_of_while_the_next_one_runs(monkeypatch):
    events, real = [], mlx_style.compile_step

    def spy(step, *parts):
        compiled = real(step, *parts)

        def watched(*targets):
            events.append("step")
            return compiled(*targets)

        return watched

    monkeypatch.setattr(mlx_style, "compile_step", spy)
    _, history = mlx_style.style_transfer(
        MLX.images(CONTENT),
        MLX.images(STYLE),
        extractor(MLX),
        mlx_style.DOCUMENT_003,
        steps=3,
        on_step=lambda step, losses: events.append(step),
    )
    assert events == ["step", "step", 0, "step", 1, 2]
    assert len(history) == 3


@each_side
@pytest.mark.parametrize("levels", [1, 2])
def test_the_picture_gets_nearer_to_both_and_stays_one(side, levels):
    lib, seen = side.style_transfer, []
    image, history = lib.style_transfer(
        side.images(CONTENT),
        side.images(STYLE),
        extractor(side),
        lib.Objective(lib.DOCUMENT_003.content, lib.DOCUMENT_003.style, variation_weight=1e-3),
        steps=12,
        start=side.images(pictures(1, 16, 24, seed=2)),
        levels=levels,
        on_step=lambda step, losses: seen.append((step, losses)),
    )
    assert tuple(image.shape) == tuple(side.images(CONTENT).shape)
    assert image.min().item() >= 0
    assert image.max().item() <= 1
    assert seen == list(enumerate(history))
    assert len(history) == 12 * levels
    for level in range(levels):
        first, last = history[12 * level], history[12 * level + 11]
        assert sum(last) < sum(first)
    assert all(len(losses) == 3 and min(losses) >= 0 for losses in history)


@each_side
def test_each_loss_has_its_weight(side):
    """Weights that are powers of two, which no rounding sees; of a layer as of the whole."""
    lib, model, image = (
        side.style_transfer,
        extractor(side),
        side.images(pictures(1, 16, 24, seed=2)),
    )
    pair = side.images(CONTENT), side.images(STYLE)

    def losses(content, style, variation, layer) -> np.ndarray:
        taps = {"relu3_1": layer}, {"relu2_1": layer}
        objective = lib.Objective(*taps, content, style, variation)
        targets = lib.style_targets(model, *pair, objective)
        found = lib.weighted_losses(model, image, targets, objective)
        return np.array([loss.item() for loss in found])

    one = losses(1.0, 1.0, 1.0, 1.0)
    assert (one > 0).all()
    assert np.array_equal(losses(2.0, 4.0, 8.0, 1.0), one * [2, 4, 8])
    assert np.array_equal(losses(1.0, 1.0, 1.0, 16.0), one * [16, 16, 1])


@each_side
@pytest.mark.parametrize("levels", [1, 2])
def test_it_starts_from_the_start_and_doubles(side, levels, monkeypatch):
    """Steps of nothing leave the start; with levels, what is left of it in the smallest size."""
    lib, sizes = side.style_transfer, []
    style_targets = lib.style_targets

    def spy(extractor, content, style, objective):
        sizes.append([nhwc(side, a).shape[1:3] for a in (content, style)])
        return style_targets(extractor, content, style, objective)

    monkeypatch.setattr(lib, "style_targets", spy)
    start = pictures(1, 8, 12, seed=2).repeat(2, axis=1).repeat(2, axis=2)
    image, _ = lib.style_transfer(
        side.images(CONTENT),
        side.images(STYLE),
        extractor(side),
        lib.DOCUMENT_003,
        steps=1,
        learning_rate=1e-30,
        start=side.images(start),
        levels=levels,
    )
    assert sizes == [[(16 >> i, 24 >> i), (20 >> i, 9 >> i)] for i in reversed(range(levels))]
    if levels == 1:
        assert np.array_equal(nhwc(side, image), start)
    else:  # halved it is itself, and doubled its corners are
        assert_within(nhwc(side, image)[:, ::15, ::23], start[:, ::15, ::23], 8 * EPS)


def nhwc(side: Side, images) -> np.ndarray:
    found = np.array(images) if side is MLX else images.detach().numpy()
    return found if side is MLX else found.transpose(0, 2, 3, 1)


def test_both_sides_paint_the_same_picture():
    """Three steps at each of two sizes, at nearby contents and styles."""
    theirs, ours = extractor(TORCH), extractor(MLX)
    weights = {k: v.detach().numpy() for k, v in theirs.named_parameters()}
    ours.load_weights(
        [(k, mx.array(v.transpose(0, 2, 3, 1) if v.ndim == 4 else v)) for k, v in weights.items()]
    )
    settings = {"steps": 3, "levels": 2}

    def paint_torch(point, dtype):
        images = [torch.tensor(point[n], dtype=dtype).permute(0, 3, 1, 2) for n in ("c", "s")]
        model = theirs.to(dtype)
        image, history = torch_style.style_transfer(
            *images, model, torch_style.DOCUMENT_003, **settings
        )
        picture = image.permute(0, 2, 3, 1).double().numpy()
        return {"picture": picture, "history": np.array(history)}

    def paint_mlx(point):
        images = [mx.array(point[n]) for n in ("c", "s")]
        image, history = mlx_style.style_transfer(*images, ours, mlx_style.DOCUMENT_003, **settings)
        return {"picture": np.array(image, np.float64), "history": np.array(history)}

    assert_equal_but_for_rounding(
        lambda p: paint_torch(p, torch.float64),
        lambda p: paint_torch(p, torch.float32),
        paint_mlx,
        {"c": CONTENT, "s": STYLE},
    )


@each_side
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"content": CONTENT[..., :1]}, r"content: images must be .*RGB.*grey channel three times"),
        ({"content": np.concatenate([CONTENT, CONTENT[..., :1]], -1)}, "drop an alpha channel"),
        ({"style": STYLE[0][None, None]}, "style: images must be"),
        ({"content": 255 * CONTENT}, r"content must be in \[0, 1\].*divide bytes by 255"),
        ({"style": 2 * STYLE - 1}, r"style must be in \[0, 1\].*unit_range"),
        ({"style": STYLE * np.float32("nan")}, r"style must be in \[0, 1\], got values from nan"),
        ({"start": pictures(1, 8, 8)}, "start .* must have the shape of content"),
        ({"style": pictures(3, 20, 9)}, "3 styles for 1 contents"),
        ({"normalize": "none"}, "differ in size.*normalize='hw'"),
        ({"content": pictures(1, 15, 24), "levels": 2}, "15 x 24 cannot be halved 1 times"),
        ({"content": pictures(1, 3, 24)}, "content: images of 3 x 24 are too small: at least 4"),
        ({"style": pictures(1, 7, 24), "levels": 2}, "style: images of 3 x 12 are too small"),
        ({"steps": 0}, "at least 1, got 0 and 1"),
        ({"content_layers": {"relu4_2": 1.0}}, "needs relu4_2, which the extractor does not tap"),
    ],
)
def test_what_does_not_fit_is_named(side, wrong, message):
    lib = side.style_transfer
    arrays = {"content": CONTENT, "style": STYLE, "start": None} | {
        k: v for k, v in wrong.items() if k in ("content", "style", "start")
    }
    images = {
        k: None if v is None else (side.array(v) if v.ndim != 4 else side.images(v))
        for k, v in arrays.items()
    }
    objective = lib.Objective(
        wrong.get("content_layers", lib.DOCUMENT_003.content),
        lib.DOCUMENT_003.style,
        normalize=wrong.get("normalize", "hw"),
    )
    with pytest.raises(ValueError, match=message):
        lib.style_transfer(
            images["content"],
            images["style"],
            extractor(side),
            objective,
            steps=wrong.get("steps", 1),
            start=images["start"],
            levels=wrong.get("levels", 1),
        )


@each_side
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"config": "vgg11"}, "config must be one of vgg16, vgg19, got 'vgg11'"),
        ({"taps": ("relu4_5",)}, "vgg19 has no tap relu4_5.*conv5_4 or relu5_4"),
        ({"taps": ()}, "none given"),
        ({"pooling": "mean"}, "'max' or 'avg', got 'mean'"),
        ({"channels": (1, 2, 3)}, "one number for each block"),
    ],
)
def test_a_vgg_that_there_is_not(side, wrong, message):
    with pytest.raises(ValueError, match=message):
        side.vgg.VGG(**{"channels": (1,) * 5, **wrong})


@each_side
def test_images_that_a_vgg_cannot_take(side):
    vgg = side.vgg.VGG(channels=(1,) * 5)
    with pytest.raises(ValueError, match=r"images of 15 x 40 are too small: conv5_1 needs .* 16"):
        vgg(side.images(pictures(1, 15, 40)))
    with pytest.raises(ValueError, match=r"RGB, got .*repeat a grey channel"):
        vgg(side.images(pictures(1, 16, 16)[..., :1]))


@each_side
def test_an_objective_that_there_is_not(side):
    with pytest.raises(ValueError, match="'none', 'hw' or 'chw', got 'wh'"):
        side.style_transfer.Objective(normalize="wh")
    with pytest.raises(ValueError, match="at least one layer"):
        side.style_transfer.Objective(content={}, style={})
