"""Paint a picture in the style of another: files and pixels around ``style_transfer.py``.

Gatys, Ecker and Bethge 2016 use VGG-19 as trained on ImageNet; its weights are not part of this
project. Random weights paint too, knowing less of what is in a picture: Ustyuzhaninov et al. 2016
(arXiv 1606.00021) make textures with them.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_impl.images import Pixels, cover, to_pixels
from mlx_impl.style_transfer import GATYS, Losses, style_transfer
from mlx_impl.vgg import BLOCKS, VGG, convolutions
from mlx_impl.vgg_weights import download_weights, make_vgg, read_weights

NAMES = ("content_loss", "style_loss", "variation_loss")


def paint(
    content: Pixels,
    style: Pixels,
    *,
    weights: str,
    size: int = 512,
    steps: int = 500,
    levels: int = 1,
    content_weight: float = 1.0,
    style_weight: float = 1e3,
    variation_weight: float = 0.0,
    learning_rate: float = 0.02,
    pooling: str = "avg",
    seed: int = 0,
    on_step: Callable[[int, Losses], None] | None = None,
) -> tuple[Pixels, list[dict[str, float | int]]]:
    """The picture, of the content's proportions, and the weighted losses before each step.

    ``content`` and ``style`` are bytes (H, W, 3) of any size; both are reduced to a longer side of
    ``size`` where they are larger. ``weights`` are those of :func:`make_extractor`.

    Raises ValueError: sizes or weights that cannot be, and as :func:`make_extractor`.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    least = 2**4 * 2 ** (levels - 1)  # VGG halves four times down to relu5_1
    if size < least:
        raise ValueError(f"size must be at least {least} with {levels} levels, got {size}")
    extractor = make_extractor(weights, pooling, seed)
    objective = replace(
        GATYS,
        content_weight=content_weight,
        style_weight=style_weight,
        variation_weight=variation_weight,
    )
    image, history = style_transfer(
        _reduced(content, size, 2 ** (levels - 1)),
        _reduced(style, size, 2 ** (levels - 1)),
        extractor,
        objective,
        steps,
        learning_rate,
        levels=levels,
        on_step=on_step,
    )
    rows: list[dict[str, float | int]] = [
        {"step": i + 1, **dict(zip(NAMES, losses, strict=True))} for i, losses in enumerate(history)
    ]
    return to_pixels(np.array(image[0]) * 2 - 1), rows


def make_extractor(weights: str, pooling: str, seed: int = 0) -> VGG:
    """VGG with the weights of a file, with torchvision's ("vgg16", "vgg19"), or "random" ones.

    Raises as :func:`read_weights` and :func:`download_weights`.
    """
    if weights == "random":
        extractor = VGG("vgg19", pooling=pooling)
        random_weights(extractor, seed)
        return extractor
    found = download_weights(weights) if weights in BLOCKS else read_weights(weights)
    return make_vgg(found, pooling=pooling)


def random_weights(extractor: VGG, seed: int) -> None:
    """He et al. 2015 (arXiv 1502.01852), Eq. 10: features keep their size from layer to layer."""
    key = mx.random.key(seed)
    drawn = []
    for name in convolutions(extractor.config):
        key, own = mx.random.split(key)
        shape = extractor[name].weight.shape  # (out, kernel, kernel, in)
        scale = math.sqrt(2 / math.prod(shape[1:]))
        drawn.append((f"{name}.weight", scale * mx.random.normal(shape, key=own)))
        drawn.append((f"{name}.bias", mx.zeros(shape[0])))
    extractor.update(tree_unflatten(drawn))


def _reduced(pixels: Pixels, size: int, multiple: int) -> mx.array:
    """Bytes (H, W, 3) as (1, H', W', 3) in [0, 1]: at most ``size``, divisible by ``multiple``."""
    h, w = pixels.shape[:2]
    scale = min(1.0, size / max(h, w))
    out = tuple(max(round(side * scale) // multiple, 1) * multiple for side in (h, w))
    return mx.array(cover(pixels, (out[0], out[1])).astype(np.float32) / 255)[None]
