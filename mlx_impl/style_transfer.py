"""Neural style transfer by optimising the image, and document 003's two small networks, in MLX.

Sources
    Gatys, Ecker and Bethge 2016, "Image Style Transfer Using Convolutional Neural Networks" (CVPR),
    Eq. 1 to 7. Mahendran and Vedaldi 2015 (arXiv 1412.0035), the regulariser of section 3, for the
    total variation. Document 003, repaired: ERRATA.md lists what was wrong.

Repairs that show here: Gram matrices keep the batch and are divided by their size (003-E8, E9);
content and style have layers of their own (003-E5); their targets are computed once (003-E13); the
image is clamped after every step (003-E16); and the losses are told apart (003-E17).

Images are (B, H, W, 3), RGB in [0, 1]. An extractor maps images to a dictionary of features by tap,
lists its ``taps``, and is frozen: :class:`FeatureExtractor` here, ``VGG`` in ``vgg.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_impl.layers import Conv2d, Linear, relu
from mlx_impl.optimizers import Adam
from mlx_impl.precision import lowered, raised, single_on_cpu
from mlx_impl.training import compile_step
from mlx_impl.vgg import max_pool

Losses = tuple[float, float, float]


class Extractor(Protocol):
    """Images (B, H, W, 3) to features by tap, (B, H', W', C) each."""

    taps: tuple[str, ...]

    def __call__(self, images: mx.array) -> dict[str, mx.array]: ...


def content_loss(content: mx.array, generated: mx.array) -> mx.array:
    """Mean squared difference of two feature maps (B, H, W, C): a scalar.

    Document 003's, and ``2 / (H W C)`` times Gatys Eq. 1, which is half the sum (003-E6).
    """
    return ((raised(content) - raised(generated)) ** 2).mean()


def gram_matrix(features: mx.array, normalize: str = "none") -> mx.array:
    """Inner products of the channels, (B, H, W, C) to (B, C, C): Gatys Eq. 3, each image its own.

    ``normalize`` divides by nothing (``"none"``, as in the paper), by H W (``"hw"``, which makes it
    a mean over the places, the same for every size of a texture) or by C H W (``"chw"``, Johnson et
    al. 2016). Raises ValueError on another word.
    """
    b, h, w, c = features.shape
    (f,) = lowered(features.reshape(b, h * w, c))
    products = single_on_cpu(lambda f: f.transpose(0, 2, 1) @ f, f)
    return raised(products) / _gram_divisor(normalize, c, h, w)


def _gram_divisor(normalize: str, c: int, h: int, w: int) -> int:
    divisors = {"none": 1, "hw": h * w, "chw": c * h * w}
    if normalize not in divisors:
        raise ValueError(f"normalize must be 'none', 'hw' or 'chw', got {normalize!r}")
    return divisors[normalize]


def style_loss(
    targets: Mapping[str, mx.array],
    features: Mapping[str, mx.array],
    weights: Mapping[str, float],
    normalize: str = "hw",
) -> mx.array:
    """Weighted sum over layers of the mean squared difference of Gram matrices: a scalar.

    ``targets`` are the style's Gram matrices (B, C, C), or (1, C, C) for all images alike, with the
    same ``normalize``; ``features`` (B, H, W, C) are the image's. With ``"hw"`` a layer's term is
    four times Gatys Eq. 4, and with equal weights the sum is four times Eq. 5.
    """
    terms = [
        weight * ((gram_matrix(features[name], normalize) - targets[name]) ** 2).mean()
        for name, weight in weights.items()
    ]
    return mx.stack(terms).sum()


def total_variation(images: mx.array) -> mx.array:
    """Squared differences between neighbours of images (B, H, W, C), over the number of values.

    Mahendran and Vedaldi 2015 with beta = 2. A scalar; 0 for a constant image.
    """
    down = images[:, 1:] - images[:, :-1]
    right = images[:, :, 1:] - images[:, :, :-1]
    # An image one pixel wide has none to the right: compiled for CUDA, MLX 0.32.4 ends the process
    # on an empty array (docs/upstream.md).
    squares = [(d**2).sum() for d in (down, right) if d.size]
    return sum(squares, start=mx.zeros((), images.dtype)) / images.size


class FeatureExtractor(nn.Module):
    """Document 003's three convolutions, halved in between: images to features by tap.

    relu1_1 is (B, H, W, widths[0]), relu2_1 (B, H // 2, W // 2, widths[1]) and relu3_1
    (B, H // 4, W // 4, widths[2]). Its weights are random: it shows the method, not a style.
    """

    taps: tuple[str, ...] = ("relu1_1", "relu2_1", "relu3_1")

    def __init__(self, widths: tuple[int, int, int] = (64, 128, 256), frozen: bool = True):
        super().__init__()
        self.conv1_1 = Conv2d(3, widths[0], 3, padding=1)
        self.conv2_1 = Conv2d(widths[0], widths[1], 3, padding=1)
        self.conv3_1 = Conv2d(widths[1], widths[2], 3, padding=1)
        if frozen:
            self.freeze()

    def __call__(self, images: mx.array) -> dict[str, mx.array]:
        _check_images(images, at_least=4)
        relu1_1 = relu(self.conv1_1(images))
        relu2_1 = relu(self.conv2_1(max_pool(relu1_1)))
        relu3_1 = relu(self.conv3_1(max_pool(relu2_1)))
        return {"relu1_1": relu1_1, "relu2_1": relu2_1, "relu3_1": relu3_1}


class ImageGenerator(nn.Module):
    """Document 003's generator: noise (B, latent_dim) to images (B, H, W, 3) in [-1, 1].

    Untrained, it makes noise (003-E19). :func:`unit_range` makes its images a content.
    """

    def __init__(
        self, latent_dim: int = 100, width: int = 256, image_size: tuple[int, int] = (64, 64)
    ):
        super().__init__()
        self.image_shape = (*image_size, 3)
        self.fc = Linear(latent_dim, width)
        self.fc_out = Linear(width, image_size[0] * image_size[1] * 3)

    def __call__(self, z: mx.array) -> mx.array:
        x = mx.tanh(self.fc_out(relu(self.fc(z))))
        return x.reshape(-1, *self.image_shape)


def unit_range(images: mx.array) -> mx.array:
    """A generator's images in [-1, 1] as a content in [0, 1], with no gradient to the generator."""
    return (mx.stop_gradient(images) + 1) / 2


class GeneratedImage(nn.Module):
    """The image as the one parameter, (B, H, W, 3), started from ``start``."""

    def __init__(self, start: mx.array):
        super().__init__()
        self.image = start

    def __call__(self) -> mx.array:
        return self.image

    def clamp(self) -> None:
        """Back into [0, 1], where pictures are."""
        self.image = mx.clip(self.image, 0, 1)


@dataclass(frozen=True)
class Objective:
    """What is minimised: Gatys Eq. 7, and a total variation if it has a weight.

    ``content`` and ``style`` weigh the layers, by tap. ``normalize`` is :func:`gram_matrix`'s, and
    the weights only mean something together with it (003-E11), and with the scale of the features:
    content grows with their square, style with their fourth power.
    """

    content: Mapping[str, float] = field(default_factory=lambda: {"relu4_2": 1.0})
    style: Mapping[str, float] = field(
        default_factory=lambda: {f"relu{b}_1": 0.2 for b in range(1, 6)}
    )
    content_weight: float = 1.0
    style_weight: float = 1e3
    variation_weight: float = 0.0
    normalize: str = "hw"

    def __post_init__(self) -> None:
        _gram_divisor(self.normalize, 1, 1, 1)
        if not self.content and not self.style:
            raise ValueError("an objective needs at least one layer for content or style")


GATYS = Objective()
"""The layers of Gatys et al. section 3, w_l = 1/5, for features of the order of 1."""

DOCUMENT_003 = Objective(content={"relu3_1": 1.0}, style={f"relu{b}_1": 1 / 3 for b in range(1, 4)})
"""Document 003's three layers."""


def style_targets(
    extractor: Extractor, content: mx.array, style: mx.array, objective: Objective
) -> tuple[mx.array, ...]:
    """What the image is drawn to, once for all steps: content features, then style Gram matrices.

    ``content`` (B, H, W, 3) and ``style`` (B or 1, H', W', 3) may differ in size. In the order of
    ``objective.content`` and ``objective.style``.
    """
    content_features = _features(extractor, content, "content")
    style_features = _features(extractor, style, "style")
    features = [content_features[tap] for tap in objective.content]
    grams = [gram_matrix(style_features[tap], objective.normalize) for tap in objective.style]
    mx.eval(features, grams)  # or every step would compute them again
    return (*features, *grams)


def _features(extractor: Extractor, images: mx.array, name: str) -> dict[str, mx.array]:
    """Of one of the two images. Where the extractor refuses it, the error says which."""
    try:
        return extractor(images)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def weighted_losses(
    extractor: Extractor, images: mx.array, targets: tuple[mx.array, ...], objective: Objective
) -> tuple[mx.array, mx.array, mx.array]:
    """Content, style and total variation of images (B, H, W, 3), each with its weight: scalars.

    ``targets`` are :func:`style_targets`'. What is minimised is the sum of the three.
    """
    features = extractor(images)
    contents = dict(zip(objective.content, targets, strict=False))
    grams = dict(zip(objective.style, targets[len(objective.content) :], strict=True))
    content = mx.array(0.0)
    for tap, weight in objective.content.items():
        content = content + weight * content_loss(contents[tap], features[tap])
    style = mx.array(0.0)
    if objective.style:
        style = style_loss(grams, features, objective.style, objective.normalize)
    return (
        objective.content_weight * content,
        objective.style_weight * style,
        objective.variation_weight * total_variation(images),
    )


def make_optimizer(generated: GeneratedImage, learning_rate: float = 0.02) -> Adam:
    """Adam on the image. A step moves a pixel by about ``learning_rate``; the document's 0.003."""
    optimizer = Adam(learning_rate=learning_rate)
    optimizer.init(generated.trainable_parameters())  # before a compiled step captures its state
    return optimizer


def train_step(
    extractor: Extractor,
    generated: GeneratedImage,
    optimizer: optim.Optimizer,
    *targets: mx.array,
    objective: Objective = GATYS,
) -> tuple[mx.array, mx.array, mx.array]:
    """One step of the image towards ``targets``, and back into [0, 1].

    Returns :func:`weighted_losses` before the update.
    """

    def loss_fn(generated: GeneratedImage) -> tuple[mx.array, ...]:
        content, style, variation = weighted_losses(extractor, generated(), targets, objective)
        return content + style + variation, content, style, variation

    (_, *losses), grads = nn.value_and_grad(generated, loss_fn)(generated)
    optimizer.update(generated, grads)
    generated.clamp()
    content, style, variation = losses
    return content, style, variation


def style_transfer(
    content: mx.array,
    style: mx.array,
    extractor: Extractor,
    objective: Objective = GATYS,
    steps: int = 500,
    learning_rate: float = 0.02,
    start: mx.array | None = None,
    levels: int = 1,
    on_step: Callable[[int, Losses], None] | None = None,
) -> tuple[mx.array, list[Losses]]:
    """Paint ``content`` (B, H, W, 3) in the style of ``style`` (B or 1, H', W', 3), both in [0, 1].

    Starts from ``start``, or else from the content. With ``levels`` above 1 it starts at a size
    halved ``levels - 1`` times and doubles, with ``steps`` steps at each: brush strokes are then as
    large in a large picture. ``on_step(step, losses)`` is called after each step.

    Returns the image (B, H, W, 3) in [0, 1], and for each step the weighted content, style and
    total variation losses before it.

    Raises ValueError: shapes that do not fit together or cannot be halved, values outside [0, 1],
    taps that the extractor does not have.
    """
    start = content if start is None else start
    _check_transfer(content, style, start, extractor, objective, steps, levels)
    history: list[Losses] = []
    image = _halved(start, levels - 1)
    for level in reversed(range(levels)):
        pair = _halved(content, level), _halved(style, level)
        targets = style_targets(extractor, *pair, objective)
        generated = GeneratedImage(image)
        optimizer = make_optimizer(generated, learning_rate)
        step = partial(train_step, objective=objective)
        compiled = compile_step(step, extractor, generated, optimizer)
        waiting: tuple[mx.array, ...] | None = None
        for _ in range(steps):
            losses = compiled(*targets)
            mx.async_eval(losses, generated.state, optimizer.state)
            if waiting is not None:  # the next step runs while this one is told
                _tell(waiting, history, on_step)
            waiting = losses
        assert waiting is not None
        _tell(waiting, history, on_step)
        image = generated.image
        if level:
            image = nn.Upsample(scale_factor=2, mode="linear", align_corners=False)(image)
    return image, history


def _tell(
    losses: tuple[mx.array, ...],
    history: list[Losses],
    on_step: Callable[[int, Losses], None] | None,
) -> None:
    content, style, variation = (cast(float, loss.item()) for loss in losses)
    history.append((content, style, variation))
    if on_step is not None:
        on_step(len(history) - 1, history[-1])


def _halved(images: mx.array, times: int) -> mx.array:
    return nn.AvgPool2d(2**times)(images) if times else images


def _check_images(images: mx.array, at_least: int) -> None:
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images must be (B, H, W, 3), RGB, got {images.shape}: repeat a grey channel "
            "three times, drop an alpha channel"
        )
    h, w = images.shape[1:3]
    if min(h, w) < at_least:
        raise ValueError(f"images of {h} x {w} are too small: at least {at_least} x {at_least}")


def _check_transfer(
    content: mx.array,
    style: mx.array,
    start: mx.array,
    extractor: Extractor,
    objective: Objective,
    steps: int,
    levels: int,
) -> None:
    missing = {*objective.content, *objective.style} - set(extractor.taps)
    if missing:
        raise ValueError(
            f"the objective needs {', '.join(sorted(missing))}, which the extractor does not tap: "
            f"it has {', '.join(extractor.taps)}"
        )
    if steps < 1 or levels < 1:
        raise ValueError(f"steps and levels must be at least 1, got {steps} and {levels}")
    for name, images in (("content", content), ("style", style), ("start", start)):
        try:
            _check_images(images, at_least=2 ** (levels - 1))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        low, high = (cast(float, x.item()) for x in (images.min(), images.max()))
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"{name} must be in [0, 1], got values from {low} to {high}: divide bytes by 255, "
                "and use unit_range for a generator's images"
            )
    if start.shape != content.shape:
        raise ValueError(f"start {start.shape} must have the shape of content {content.shape}")
    if style.shape[0] not in (1, content.shape[0]):
        raise ValueError(
            f"{style.shape[0]} styles for {content.shape[0]} contents: give one, or one for each"
        )
    if objective.normalize == "none" and style.shape[1:3] != content.shape[1:3]:
        raise ValueError(
            "content and style differ in size, and Gram matrices that are not normalised cannot "
            "be compared then: use normalize='hw'"
        )
    if any(size % 2 ** (levels - 1) for size in content.shape[1:3]):
        h, w = content.shape[1:3]
        raise ValueError(
            f"content of {h} x {w} cannot be halved {levels - 1} times: crop it to multiples of "
            f"{2 ** (levels - 1)}"
        )
