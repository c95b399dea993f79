"""Paint a picture in the style of another: files and pixels around ``style_transfer.py``.

Gatys, Ecker and Bethge 2016 use VGG-19 as trained on ImageNet; its weights are not part of this
project. Random weights paint too, knowing less of what is in a picture: Ustyuzhaninov et al. 2016
(arXiv 1606.00021) make textures with them. Document 003's own three convolutions are random as
well, and so is the generator whose picture its last section takes for a content.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_impl.images import Pixels, cover, to_pixels
from mlx_impl.precision import DTYPES, mixed
from mlx_impl.style_transfer import (
    DOCUMENT_003,
    GATYS,
    FeatureExtractor,
    ImageGenerator,
    Losses,
    style_transfer,
    unit_range,
)
from mlx_impl.vgg import BLOCKS, VGG
from mlx_impl.vgg_weights import download_weights, make_vgg, read_weights

NAMES = ("content_loss", "style_loss", "variation_loss")

STARTS = ("content", "noise")


def paint(
    content: Pixels,
    style: Pixels,
    *,
    weights: str,
    size: int = 512,
    steps: int = 500,
    levels: int = 1,
    start: str = "content",
    content_weight: float = 1.0,
    style_weight: float = 1e3,
    variation_weight: float = 0.0,
    learning_rate: float = 0.02,
    pooling: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    on_step: Callable[[int, Losses], None] | None = None,
) -> tuple[Pixels, list[dict[str, float | int]]]:
    """The picture, of the content's proportions, and the weighted losses before each step.

    ``content`` and ``style`` are bytes (H, W, 3) of any size; both are reduced to a longer side of
    ``size`` where they are larger. ``weights`` and ``pooling`` are :func:`make_extractor`'s.
    ``start`` is "content" or "noise", even in [0, 1] and drawn with ``seed``. ``dtype``, "float32"
    or "bfloat16", is what is multiplied in.

    Raises ValueError: sizes, weights or a start that cannot be, and as :func:`make_extractor`.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    documented = weights == "document"
    halvings = 2 if documented else 4  # down to the document's relu3_1, or to relu5_1
    least = 2**halvings * 2 ** (levels - 1)
    if size < least:
        raise ValueError(f"size must be at least {least} with {levels} levels, got {size}")
    extractor = make_extractor(weights, pooling, seed)
    objective = replace(
        DOCUMENT_003 if documented else GATYS,
        content_weight=content_weight,
        style_weight=style_weight,
        variation_weight=variation_weight,
    )
    content_image, style_image = (
        _reduced(pixels, size, 2 ** (levels - 1)) for pixels in (content, style)
    )
    noise = mx.random.uniform(shape=content_image.shape, key=mx.random.key(seed))
    image, history = mixed(style_transfer, DTYPES[dtype])(
        content_image,
        style_image,
        extractor,
        objective,
        steps,
        learning_rate,
        start=noise if start == "noise" else content_image,
        levels=levels,
        on_step=on_step,
    )
    rows: list[dict[str, float | int]] = [
        {"step": i + 1, **dict(zip(NAMES, losses, strict=True))} for i, losses in enumerate(history)
    ]
    return to_pixels(np.array(image[0]) * 2 - 1), rows


def make_extractor(
    weights: str, pooling: str | None = None, seed: int = 0
) -> VGG | FeatureExtractor:
    """VGG with the weights of a file, with torchvision's ("vgg16", "vgg19"), or "random" ones.

    Its ``pooling`` is "max" or "avg", which is the default: Gatys et al., section 2. "document" is
    no VGG but document 003's three convolutions, with random weights and its maximum pooling.
    Raises ValueError where a pooling is chosen for that, and as :func:`read_weights` and
    :func:`download_weights`.
    """
    if weights == "document" and pooling is not None:
        raise ValueError(
            f"pooling {pooling} was asked for, which only VGG lets you choose: the extractor of "
            "document 003 takes the maximum; leave pooling out, or take other weights"
        )
    pooling = pooling or "avg"
    if weights in ("random", "document"):
        made: VGG | FeatureExtractor = FeatureExtractor()
        if weights == "random":
            made = VGG("vgg19", pooling=pooling)
        random_weights(made, seed)
        return made
    if weights not in BLOCKS and not Path(weights).suffix and not Path(weights).exists():
        raise ValueError(
            f"there are no weights at {weights}, and it is none of {', '.join(BLOCKS)}, random "
            "and document"
        )
    found = download_weights(weights) if weights in BLOCKS else read_weights(weights)
    return make_vgg(found, pooling=pooling)


def random_weights(extractor: nn.Module, seed: int) -> None:
    """He et al. 2015 (arXiv 1502.01852), Eq. 10: features keep their size from layer to layer.

    ``extractor`` has nothing but convolutions. Their biases become 0.
    """
    key = mx.random.key(seed)
    drawn = []
    for name, array in dict(tree_flatten(extractor.parameters())).items():
        if array.ndim == 1:
            drawn.append((name, mx.zeros_like(array)))
            continue
        key, own = mx.random.split(key)
        scale = math.sqrt(2 / math.prod(array.shape[1:]))  # (out, kernel, kernel, in)
        drawn.append((name, scale * mx.random.normal(array.shape, key=own)))
    extractor.update(tree_unflatten(drawn))


def generated_picture(seed: int) -> Pixels:
    """Bytes (64, 64, 3) from document 003's generator, which nothing trains: coloured noise."""
    mx.random.seed(seed)
    made = ImageGenerator()(mx.random.normal((1, 100)))
    return to_pixels(np.array(unit_range(made)[0]) * 2 - 1)


def _reduced(pixels: Pixels, size: int, multiple: int) -> mx.array:
    """Bytes (H, W, 3) as (1, H', W', 3) in [0, 1]: at most ``size``, divisible by ``multiple``."""
    h, w = pixels.shape[:2]
    scale = min(1.0, size / max(h, w))
    out = tuple(max(round(side * scale) // multiple, 1) * multiple for side in (h, w))
    return mx.array(cover(pixels, (out[0], out[1])).astype(np.float32) / 255)[None]
