"""Mixed precision: products in bfloat16, and in float32 whatever cannot bear it.

Sources
    Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), section 3: master
    weights, sums in single precision. Kalamkar et al. 2019 (arXiv 1905.12322): bfloat16 has
    float32's range, so that the loss needs no scaling. ``torch.autocast``, whose rules these are.

Inside :func:`autocast` the layers of ``layers.py`` and the attention of ``unet.py`` round what they
multiply, inputs and weights, to bfloat16, and return bfloat16. What lies between them follows the
type of its input. In float32 stay the parameters, their gradients and the optimizer's moments (they
are cast where they are used, so their gradients come back cast the other way), the statistics of
norms, losses, timestep embeddings, and a sampler's own arithmetic. So nothing in a step, an
optimizer or a checkpoint needs to know.

Where ``torch.autocast`` has two rules, one for the CPU and one for CUDA, this takes:

- norms: statistics in float32, the result in the input's type (the CPU's rule, and cuDNN's batch
  norm; under CUDA's rule a group norm returns float32, which the next layer rounds anyway);
- losses: everything in float32, sums and softplus too (CUDA's rule; on the CPU ``softplus`` and a
  mean of squares stay in bfloat16).

And there is no cache of rounded weights. PyTorch's is not renewed where an optimizer updates the
weights inside the context, as a GAN's step does: its generator would be judged by the discriminator
of before (``tests/test_precision.py``). Give ``torch.autocast`` ``cache_enabled=False`` there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

HALF = (mx.bfloat16, mx.float16)

DTYPES = {"float32": None, "bfloat16": mx.bfloat16}
"""What can be asked for by name, and what :func:`autocast` is told."""

_computing: ContextVar[mx.Dtype | None] = ContextVar("computing", default=None)


@contextmanager
def autocast(dtype: mx.Dtype | None = mx.bfloat16) -> Iterator[None]:
    """Compute the products of layers called within in ``dtype``; None leaves all as it is.

    A compiled function keeps what was in force when it was traced: wrap what is compiled, by
    :func:`mixed`. Raises ValueError for another type than bfloat16.
    """
    if dtype is not None and dtype != mx.bfloat16:
        raise ValueError(
            f"autocast to {dtype}: only mx.bfloat16 has the range of float32. In float16 gradients "
            "below 6e-8 are zero unless the loss is scaled, which nothing here does"
        )
    token = _computing.set(dtype)
    try:
        yield
    finally:
        _computing.reset(token)


def mixed(function: Callable[..., Any], dtype: mx.Dtype | None = mx.bfloat16) -> Callable[..., Any]:
    """``function`` under :func:`autocast`, its results in float32: a step, a sampler, a model.

    Compile the result, do not make one of what is compiled.
    """

    @wraps(function)
    def computed(*args: Any, **kwargs: Any) -> Any:
        with autocast(dtype):
            results = function(*args, **kwargs)
        return tree_map(lambda x: raised(x) if isinstance(x, mx.array) else x, results)

    return function if dtype is None else computed


def lowered(*arrays: mx.array) -> tuple[mx.array, ...]:
    """What a layer multiplies, in the type in force; unchanged where none is."""
    dtype = _computing.get()
    return arrays if dtype is None else tuple(a.astype(dtype) for a in arrays)


def raised(x: mx.array) -> mx.array:
    """``x`` in float32 at least, of the same shape: for what is summed, or subtracted and kept."""
    return x.astype(mx.float32) if x.dtype in HALF else x


def single_on_cpu(function: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
    """``function(*arrays)``, computed in float32 and rounded once where halves are slow: on a CPU.

    Its products of bfloat16 are 5 to 20 times slower than float32's, which they are made of.
    """
    dtype = mx.result_type(*arrays)
    if mx.default_device().type != mx.DeviceType.cpu or dtype not in HALF:
        return function(*arrays)
    return function(*(a.astype(mx.float32) for a in arrays)).astype(dtype)
