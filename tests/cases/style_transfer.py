"""Document 003: the losses of style transfer, its two networks, and the image that is trained."""

from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from hypothesis import strategies as st

import mlx_impl.style_transfer
import mlx_impl.vgg
import reference.style_transfer
import reference.vgg
from mlx_impl.training import compile_step
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests.cases.common import Arrays, Rng, normal, projection
from tests.strategies import batches, latent_dims, widths

NORMALIZE = ("none", "hw", "chw")


# Each loss alone


@st.composite
def feature_maps(draw: st.DrawFn) -> dict[str, Any]:
    """The sizes of a feature map, no two alike, and how its Gram matrix is normalised."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=3, max_size=3, unique=True))
    normalize = draw(st.sampled_from(NORMALIZE))
    return {"batch": draw(batches), "size": tuple(sizes), "normalize": normalize}


def _features(shape: Shape, rng: Rng, part: int = 0) -> np.ndarray:
    """What a ReLU leaves, about half of it zeros, in maps of (C, H, W)."""
    c, h, w = shape["size"]
    return np.maximum(normal(rng, shape["batch"], c + part, h, w), 0)


def _content(lib: Any, shape: Shape) -> System:
    return System(losses={"content": Loss(lib.content_loss)})


def _gram(lib: Any, shape: Shape) -> System:
    gram = partial(lib.gram_matrix, normalize=shape["normalize"])
    return System(
        forward=lambda x, cotangent: {"gram": gram(x)},
        losses={"projection": Loss(lambda x, cotangent: (gram(x) * cotangent).sum())},
    )


def _gram_inputs(shape: Shape, rng: Rng) -> Arrays:
    c = shape["size"][0]
    return {"x": _features(shape, rng), "cotangent": normal(rng, shape["batch"], c, c)}


def _style(lib: Any, shape: Shape) -> System:
    """Two layers of unequal weight."""
    weights = {"relu1_1": 0.3, "relu2_1": 1.7}

    def loss(relu1_1: Any, relu2_1: Any, gram1: Any, gram2: Any) -> Any:
        grams = {"relu1_1": gram1, "relu2_1": gram2}
        features = {"relu1_1": relu1_1, "relu2_1": relu2_1}
        return lib.style_loss(grams, features, weights, shape["normalize"])

    return System(losses={"style": Loss(loss)})


def _style_inputs(shape: Shape, rng: Rng) -> Arrays:
    c, n = shape["size"][0], shape["batch"]
    return {
        "relu1_1": _features(shape, rng),
        "relu2_1": _features(shape, rng, part=1),
        "gram1": normal(rng, n, c, c),
        "gram2": normal(rng, 1, c + 1, c + 1),  # one style for every image
    }


def _variation(lib: Any, shape: Shape) -> System:
    return System(losses={"variation": Loss(lib.total_variation)})


def loss_case(name: str, build: Any, inputs: Any, images: set[str]) -> Case:
    return Case(
        name=name,
        side="documented" if name == "content_loss" else "canonical",
        shapes=feature_maps(),
        build=build,
        reference=reference.style_transfer,
        port=mlx_impl.style_transfer,
        inputs=inputs,
        images=frozenset(images),
        cost=12,  # the divisor is a constant in the compiled kernel, so g++ runs for each shape
    )


LOSSES = (
    loss_case(
        "content_loss",
        _content,
        lambda shape, rng: {"content": _features(shape, rng), "generated": _features(shape, rng)},
        {"content", "generated"},
    ),
    loss_case("gram_matrix", _gram, _gram_inputs, {"x"}),
    loss_case("style_loss", _style, _style_inputs, {"relu1_1", "relu2_1"}),
    loss_case(
        "total_variation",
        _variation,
        lambda shape, rng: {"images": _features(shape, rng)},
        {"images"},
    ),
)


# The document's two networks


@st.composite
def small_images(draw: st.DrawFn, least: int, most: int) -> tuple[int, int]:
    """(H, W), both other than the three channels and than each other."""
    sizes = st.integers(least, most).filter(lambda size: size != 3)
    height = draw(sizes)
    return height, draw(sizes.filter(lambda w: w != height))


extractors = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "widths": st.tuples(*[st.integers(1, 6)] * 3),
        "image_size": small_images(4, 9),
    }
)


def _feature_extractor(lib: Any, shape: Shape) -> System:
    """Trained, so that its own gradients are held too; each tap against a drawn cotangent."""
    extractor = lib.FeatureExtractor(shape["widths"], frozen=False)

    def loss(images: Any, **cotangents: Any) -> Any:
        found = extractor(images)
        return sum((found[tap] * cotangents[f"d_{tap}"]).sum() for tap in extractor.taps)

    return System(
        modules={"extractor": extractor},
        forward=lambda images, **cotangents: extractor(images),
        losses={"projection": Loss(loss, ("extractor",))},
    )


def _taps(shape: Shape) -> dict[str, tuple[int, int, int]]:
    height, width = shape["image_size"]
    return {f"relu{i + 1}_1": (c, height >> i, width >> i) for i, c in enumerate(shape["widths"])}


FEATURE_EXTRACTOR = Case(
    name="003 feature extractor",
    side="documented",
    shapes=extractors,
    build=_feature_extractor,
    reference=reference.style_transfer,
    port=mlx_impl.style_transfer,
    inputs=lambda shape, rng: {
        "images": _image(shape, rng),
        **{f"d_{t}": normal(rng, shape["batch"], *size) for t, size in _taps(shape).items()},
    },
    images=frozenset(
        {"images", *(f"{d}relu{i}_1" for i in range(1, 4) for d in ("", "d_"))},
    ),
    cost=4,
)


IMAGE_GENERATOR = Case(
    name="003 image generator",
    side="documented",
    shapes=st.fixed_dictionaries(
        {
            "batch": batches,
            "latent_dim": latent_dims,
            "width": widths,
            "image_size": small_images(1, 7),
        }
    ),
    build=projection(
        "generator",
        lambda lib, shape: lib.ImageGenerator(
            shape["latent_dim"], shape["width"], shape["image_size"]
        ),
    ),
    reference=reference.style_transfer,
    port=mlx_impl.style_transfer,
    inputs=lambda shape, rng: {
        "x": normal(rng, shape["batch"], shape["latent_dim"]),
        "cotangent": normal(rng, shape["batch"], 3, *shape["image_size"]),
    },
    images=frozenset({"output", "cotangent"}),
    carry=lambda shape: {"generator": {"unflatten": {"fc_out": (3, *shape["image_size"])}}},
)


# The image as what is trained


def _image(shape: Shape, rng: Rng) -> np.ndarray:
    """Pixels clear of black and white: of a flat part, which clamping makes, rounding decides which
    of a window's maxima has the gradient."""
    return rng.uniform(0.2, 0.8, (shape["batch"], 3, *shape["image_size"]))


def side(style_transfer: ModuleType, vgg: ModuleType, array: Any) -> SimpleNamespace:
    """One framework's two files, and how it makes an image from an array (B, 3, H, W)."""
    return SimpleNamespace(**vars(style_transfer), vgg=vgg, array=array)


REFERENCE = side(reference.style_transfer, reference.vgg, lambda a: torch.from_numpy(a).float())
PORT = side(mlx_impl.style_transfer, mlx_impl.vgg, lambda a: mx.array(a.transpose(0, 2, 3, 1)))


def _transfer(lib: Any, shape: Shape, extractor: Any, objective: Any, rate: float) -> System:
    """An image that is drawn to targets, which are the step's inputs."""
    generated = lib.GeneratedImage(lib.array(_image(shape, np.random.default_rng(0))))

    def loss(term: int) -> Loss:
        def of_targets(**targets: Any) -> Any:
            return lib.weighted_losses(extractor, generated(), tuple(targets.values()), objective)[
                term
            ]

        return Loss(of_targets, ("generated",))

    return System(
        modules={"extractor": extractor, "generated": generated},
        forward=lambda **targets: extractor(generated()),
        losses={"content": loss(0), "style": loss(1), "variation": loss(2)},
        optimizers={"generated": lib.make_optimizer(generated, rate)},
        step=partial(lib.train_step, objective=objective),
    )


def _documented(lib: Any, shape: Shape) -> System:
    extractor = lib.FeatureExtractor(shape["widths"])
    return _transfer(lib, shape, extractor, lib.DOCUMENT_003, 0.003)


def _canonical(lib: Any, shape: Shape) -> System:
    extractor = lib.vgg.VGG("vgg19", lib.vgg.GATYS, shape["pooling"], shape["channels"])
    return _transfer(lib, shape, extractor, lib.Objective(variation_weight=0.5), 0.02)


def _grams(rng: Rng, channels: tuple[int, ...]) -> Arrays:
    """A Gram matrix for each layer, as large as that of what a ReLU leaves."""
    grams = {}
    for i, c in enumerate(channels, start=1):
        f = np.maximum(normal(rng, 1, c, 64), 0)
        grams[f"gram{i}"] = f @ f.transpose(0, 2, 1) / 64
    return grams


def _documented_targets(shape: Shape, rng: Rng) -> Arrays:
    size = _taps(shape)["relu3_1"]
    content = np.maximum(normal(rng, shape["batch"], *size), 0)
    return {"content": content, **_grams(rng, shape["widths"])}


def _canonical_targets(shape: Shape, rng: Rng) -> Arrays:
    size = (shape["channels"][3], *(n >> 3 for n in shape["image_size"]))
    content = np.maximum(normal(rng, shape["batch"], *size), 0)
    return {"content": content, **_grams(rng, shape["channels"])}


def transfer_case(name: str, **of_case: Any) -> Case:
    return Case(
        name=name,
        reference=REFERENCE,
        port=PORT,
        images=frozenset({"content", *reference.vgg.GATYS}),
        carry=lambda shape: {"generated": {"axes": {"image": (0, 2, 3, 1)}}},
        weights=lambda shape, rng: {"generated.image": _image(shape, rng)},
        compile_step=compile_step,
        **of_case,
    )


SYSTEMS = (
    transfer_case(
        "003 style transfer",
        side="documented",
        shapes=extractors,
        build=_documented,
        inputs=_documented_targets,
        cost=10,
        full_size={"widths": (64, 128, 256), "image_size": (64, 64)},
    ),
    transfer_case(
        "VGG style transfer",
        side="canonical",
        shapes=st.fixed_dictionaries(
            {
                "batch": st.integers(1, 2),
                "channels": st.tuples(*[st.integers(1, 4)] * 5),
                "pooling": st.sampled_from(("max", "avg")),
                "image_size": small_images(16, 20),
            }
        ),
        build=_canonical,
        inputs=_canonical_targets,
        cost=40,
        full_size={
            "channels": reference.vgg.CHANNELS,
            "pooling": "max",
            "image_size": (256, 256),
        },
    ),
)

CASES = (*SYSTEMS, FEATURE_EXTRACTOR, IMAGE_GENERATOR, *LOSSES)
