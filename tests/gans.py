"""What the tests of the convolutional GANs build and read, on either side."""

from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten

from tests.frameworks import Side

SHAPE: dict[str, Any] = {
    "batch": 3,
    "latent_dim": 4,
    "width": 2,
    "image_size": (8, 12),
    "channels": 2,
    "stages": 2,
}


def networks(side: Side, system: str, shape: dict[str, Any]) -> tuple[Any, Any]:
    """Generator and discriminator of a drawn shape, with the same first weights at every call."""
    torch.manual_seed(0)
    mx.random.seed(0)
    sizes = {k: v for k, v in shape.items() if k not in ("batch", "latent_dim")}
    lib = getattr(side, system)
    return lib.Generator(latent_dim=shape["latent_dim"], **sizes), lib.Discriminator(**sizes)


def drawn(side: Side, shape: dict[str, Any], seed: int = 0) -> tuple[Any, Any]:
    """Images in [-1, 1] and noise, the same numbers on both sides."""
    rng = np.random.default_rng(seed)
    n, size, channels = shape["batch"], shape["image_size"], shape["channels"]
    real = rng.uniform(-1, 1, (n, *size, channels)).astype(np.float32)
    noise = rng.standard_normal((n, shape["latent_dim"])).astype(np.float32)
    return side.images(real), side.array(noise)


def to_numpy(x: Any) -> np.ndarray:
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.array(x)


def tensors(model: Any) -> dict[str, np.ndarray]:
    """Parameters and running statistics by name, in the side's own layout."""
    if isinstance(model, torch.nn.Module):
        return {k: t.numpy().copy() for k, t in model.state_dict().items() if t.ndim}
    return {k: np.array(a) for k, a in tree_flatten(model.parameters())}


def statistics(model: Any) -> dict[str, np.ndarray]:
    return {k: a for k, a in tensors(model).items() if "running" in k}


def set_tensors(model: Any, new: dict[str, np.ndarray]) -> None:
    """Some of a model's tensors, by name."""
    if isinstance(model, torch.nn.Module):
        model.load_state_dict({k: torch.tensor(a) for k, a in new.items()}, strict=False)
    else:
        model.load_weights([(k, mx.array(a)) for k, a in new.items()], strict=False)


def normal_weights(model: Any, seed: int = 0) -> None:
    """Weights and biases large enough that hardly a unit sleeps."""
    rng = np.random.default_rng(seed)
    weights = {k: a for k, a in tensors(model).items() if "running" not in k}
    set_tensors(
        model, {k: 0.3 * rng.standard_normal(a.shape, np.float32) for k, a in weights.items()}
    )
