"""The shapes that tests draw: small, bounded, odd, and never able to hide a swapped axis.

Sizes start at 1, where a reduction or a broadcast goes wrong unseen, and height, width and channels
all differ, so that no two layouts of an image have the same shape.
"""

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

batches = st.integers(1, 5)
widths = st.integers(1, 9)
latent_dims = st.integers(1, 7)


@st.composite
def images(draw: st.DrawFn, max_size: int = 7, max_channels: int = 4) -> dict[str, Any]:
    """``image_size`` (H, W) and ``channels``, all three different."""
    height = draw(st.integers(1, max_size))
    width = draw(st.integers(1, max_size).filter(lambda w: w != height))
    channels = draw(st.integers(1, max_channels).filter(lambda c: c not in (height, width)))
    return {"image_size": (height, width), "channels": channels}


@st.composite
def mlp_gans(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes of the fully connected GAN."""
    return {
        "batch": draw(batches),
        "latent_dim": draw(latent_dims),
        "widths": draw(st.tuples(widths, widths, widths)),
        **draw(images()),
    }


losses: SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({"batch": st.integers(1, 40)})
