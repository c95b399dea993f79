"""VGG-16 and VGG-19, every tap, both poolings, frozen and trained."""

from typing import Any

from hypothesis import strategies as st

import mlx_impl.vgg
import reference.vgg
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests.cases.common import Arrays, Rng, normal

PREPROCESSING = ("TORCHVISION", "CAFFE")


def block(tap: str) -> int:
    """Of conv4_2 or relu4_2 the 4."""
    return int(tap[4])


@st.composite
def vggs(draw: st.DrawFn, config: str) -> dict[str, Any]:
    """A narrow network, one to three taps, and images as small as the deepest allows or larger."""
    names = reference.vgg.convolutions(config)
    known = names + [name.replace("conv", "relu") for name in names]
    taps = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    least = 2 ** (max(map(block, taps)) - 1)
    sizes = st.integers(least, least + 4)
    height = draw(sizes.filter(lambda h: h != 3))
    return {
        "batch": draw(st.integers(1, 3)),
        "config": config,
        "taps": " ".join(taps),
        "pooling": draw(st.sampled_from(("max", "avg"))),
        "preprocessing": draw(st.sampled_from(PREPROCESSING)),
        "channels": draw(st.tuples(*[st.integers(2, 5)] * 5)),
        "image_size": (height, draw(sizes.filter(lambda w: w not in (3, height)))),
    }


def vgg(lib: Any, shape: Shape, frozen: bool) -> Any:
    return lib.VGG(
        shape["config"],
        tuple(shape["taps"].split()),
        shape["pooling"],
        shape["channels"],
        getattr(lib, shape["preprocessing"]),
        frozen,
    )


def features(lib: Any, shape: Shape) -> System:
    """The network alone, trained; its loss is every tap against a drawn cotangent."""
    extractor = vgg(lib, shape, frozen=False)

    def projection(images: Any, **cotangents: Any) -> Any:
        found = extractor(images)
        return sum((found[tap] * cotangents[f"d_{tap}"]).sum() for tap in found)

    return System(
        modules={"vgg": extractor},
        forward=lambda images, **cotangents: extractor(images),
        losses={"projection": Loss(projection, ("vgg",))},
    )


def inputs(shape: Shape, rng: Rng) -> Arrays:
    """Images in [0, 1], and a cotangent for each tap."""
    height, width = shape["image_size"]
    drawn = {"images": rng.uniform(0.1, 0.9, (shape["batch"], 3, height, width))}
    for tap in shape["taps"].split():
        b = block(tap) - 1
        size = (shape["channels"][b], height >> b, width >> b)
        drawn[f"d_{tap}"] = normal(rng, shape["batch"], *size)
    return drawn


TAPS = frozenset(
    kind + name.removeprefix("conv")
    for config in reference.vgg.BLOCKS
    for name in reference.vgg.convolutions(config)
    for kind in ("conv", "relu")
)

CASES = tuple(
    Case(
        name=name,
        side="canonical",
        shapes=vggs(name.replace("-", "").lower()),
        build=features,
        reference=reference.vgg,
        port=mlx_impl.vgg,
        inputs=inputs,
        images=frozenset({"images"}) | TAPS | {f"d_{tap}" for tap in TAPS},
        cost=10,
    )
    for name in ("VGG-16", "VGG-19")
)
