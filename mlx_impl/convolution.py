"""Two-dimensional convolutions whose gradients, of every order, stay on fast operations.

A convolution is linear in its image and in its kernel. Pair its result with a third array, and
``<conv(image, kernel), result>`` is linear in all three; its three partial derivatives are

    conv(image, kernel) -> result         a convolution,
    by_image(result, kernel) -> image     its adjoint: what a transposed convolution computes,
    by_kernel(image, result) -> kernel    the gradient of the kernel.

The derivatives of each of the three are the other two. So three fast operations, each with the
others as its gradients, are all that first derivatives need, and second ones (a gradient penalty),
and third. A transposed convolution is ``by_image`` with the kernel's channels exchanged. They are
not exchanged in memory, where it would take as long as the product: a kernel may come as it is
(:attr:`Geometry.turned`).

Each of the three can take one of several routes (:data:`ROUTES`). :func:`choose` picks one by the
backend and tells what is slow in MLX otherwise; :func:`cheapest` by the geometry, on a CPU.

Sources
    Dumoulin and Visin 2016, "A guide to convolution arithmetic for deep learning" (arXiv
    1603.07285): sizes, and the transposed convolution as an adjoint. Chellapilla et al. 2006, "High
    Performance Convolutional Neural Networks for Document Processing": patches times kernel.
    Vasudevan et al. 2017 (arXiv 1704.04428): one product for each tap of the kernel, no patches.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple, cast

import mlx.core as mx

from mlx_impl.precision import HALF, single_on_cpu

Pair = tuple[int, int]
BilinearMap = Callable[[mx.array, mx.array], mx.array]


class Geometry(NamedTuple):
    """What a convolution's index arithmetic depends on; every pair is (vertical, horizontal)."""

    image: Pair
    result: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    turned: bool = False
    """Whether the kernel is (C, K, L, O), a transposed convolution's, and not (O, K, L, C / G)."""

    def reach(self, axis: int) -> int:
        """Extent of the dilated kernel along one axis."""
        return self.dilation[axis] * (self.kernel[axis] - 1) + 1

    @property
    def folds(self) -> int:
        """How many neighbouring taps see different planes of the image only: 1 where none do.

        A kernel of whole strides, not dilated, is one with a tap for each stride, over an image
        whose blocks of S x T pixels are its channels.
        """
        whole = all(k % s == 0 for k, s in zip(self.kernel, self.stride, strict=True))
        return prod(self.stride) if whole and self.dilation == (1, 1) and self.groups == 1 else 1

    def results(self, axis: int) -> int:
        """How many results the whole image has along one axis; ``result`` may leave some out."""
        free = self.image[axis] + 2 * self.padding[axis] - self.reach(axis)
        return free // self.stride[axis] + 1

    def seen(self, axis: int) -> int:
        """How much of the padded image some result depends on, along one axis."""
        return self.stride[axis] * (self.result[axis] - 1) + self.reach(axis)


class Maps(NamedTuple):
    """The three maps of one convolution; images and results are (N, H, W, C), kernels MLX's."""

    conv: BilinearMap
    by_image: BilinearMap
    by_kernel: BilinearMap


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else cast(Pair, tuple(value))


# --- MLX's own operations -------------------------------------------------------------------------


def _adjoint_maps(g: Geometry) -> Maps:
    """Each of the three as the MLX operation that is fast on a GPU.

    Autodiff of ``mx.conv_transpose2d`` would make its kernel's gradient a convolution with a
    dilated kernel of the whole image's size, which no fast kernel takes. The gradient of
    ``mx.conv2d`` by its kernel is one that cuDNN knows.
    """

    def conv(image: mx.array, kernel: mx.array) -> mx.array:
        kernel = kernel.transpose(3, 1, 2, 0) if g.turned else kernel
        y = mx.conv2d(image, kernel, g.stride, g.padding, g.dilation, g.groups)
        return y[:, : g.result[0], : g.result[1]]

    def by_image(result: mx.array, kernel: mx.array) -> mx.array:
        return _vjp(lambda x: conv(x, kernel), _shape_of_image(g, result, kernel), result)

    def by_kernel(image: mx.array, result: mx.array) -> mx.array:
        return _vjp(lambda w: conv(image, w), _shape_of_kernel(g, image, result), result)

    return Maps(conv, by_image, by_kernel)


def _cudnn_maps(g: Geometry) -> Maps:
    """``adjoint`` with the kernel's gradient as cuDNN has it.

    Autodiff of ``mx.conv2d`` copies every patch of the image out and multiplies. The same gradient
    is a convolution of the image with the result for a kernel, channels and images exchanged; and
    of one so exchanged, with a "kernel" larger than its result, MLX's CUDA backend guesses what it
    is for, and asks cuDNN for a kernel's gradient.
    """
    adjoint = _adjoint_maps(g)

    def by_kernel(image: mx.array, result: mx.array) -> mx.array:
        ends = [
            g.stride[i] * (g.result[i] - 1) + g.reach(i) - g.image[i] - g.padding[i] for i in (0, 1)
        ]
        kernel = mx.conv_general(
            image.swapaxes(0, 3),  # (C, H, W, N)
            result.swapaxes(0, 3),  # (O, h, w, N)
            stride=g.dilation,
            padding=(list(g.padding), ends),
            kernel_dilation=g.stride,
        )  # (C, K, L, O)
        return mx.contiguous(kernel) if g.turned else kernel.swapaxes(0, 3)

    return adjoint._replace(by_kernel=by_kernel) if g.groups == 1 else adjoint


def _vjp(linear: Callable[[mx.array], mx.array], shape: list[int], cotangent: mx.array) -> mx.array:
    """The adjoint of a linear map. Where it is taken does not matter, and is never computed."""
    anywhere = mx.zeros(shape, cotangent.dtype)
    return mx.vjp(linear, [anywhere], [cotangent])[1][0]


def _shape_of_image(g: Geometry, result: mx.array, kernel: mx.array) -> list[int]:
    c, _ = _channels(g, kernel)
    return [result.shape[0], *g.image, c * g.groups]


def _shape_of_kernel(g: Geometry, image: mx.array, result: mx.array) -> list[int]:
    c, f = image.shape[3] // g.groups, result.shape[3]
    return [c, *g.kernel, f] if g.turned else [f, *g.kernel, c]


def _channels(g: Geometry, kernel: mx.array) -> Pair:
    """C / G, the image's channels that a result sees, and O."""
    first, *_, last = kernel.shape
    return (first, last) if g.turned else (last, first)


# --- Lowered to matrix products -------------------------------------------------------------------
#
# Trailing comments give shapes: N images of C channels, H x W; N results of O channels, h x w; K x
# L taps of the kernel; G groups; S x T strides.


def _fitted(image: mx.array, size: Pair, before: Pair) -> mx.array:
    """The image within ``size`` zeros, ``before`` from the top left; what lies outside is cut."""
    cut = [slice(max(0, -b), max(0, s - b)) for s, b in zip(size, before, strict=True)]
    image = image[:, cut[0], cut[1]]
    widths = [(0, 0)] * 4
    for axis in (0, 1):
        low = max(0, before[axis])
        widths[1 + axis] = (low, size[axis] - low - image.shape[1 + axis])
    return mx.pad(image, widths) if any(max(w) for w in widths) else image


def _patches_maps(g: Geometry) -> Maps:
    """One product: each result's patch of the image, laid out as a row, times the kernel."""
    (K, L), (S, T), (h, w) = g.kernel, g.stride, g.result
    H, W = g.seen(0), g.seen(1)

    def patches(image: mx.array) -> mx.array:
        N, C = image.shape[0], image.shape[3]
        padded = _fitted(image, (H, W), g.padding)  # (N, H, W, C)
        shape = [g.groups, N, h, w, K, L, C // g.groups]
        row = W * C
        steps = [C // g.groups, H * row, S * row, T * C, g.dilation[0] * row, g.dilation[1] * C, 1]
        rows = mx.as_strided(mx.contiguous(padded), shape, steps)  # (G, N, h, w, K, L, C / G)
        return rows.reshape(g.groups, N * h * w, -1)

    def grouped(result: mx.array) -> mx.array:
        flat = result.reshape(-1, g.groups, result.shape[3] // g.groups)
        return flat.swapaxes(0, 1)  # (G, N h w, O / G)

    def as_rows(kernel: mx.array) -> mx.array:
        """(G, O / G, K L C / G)."""
        if g.turned:
            return kernel.transpose(1, 2, 0, 3).reshape(1, -1, kernel.shape[3]).swapaxes(1, 2)
        return kernel.reshape(g.groups, kernel.shape[0] // g.groups, -1)

    def conv(image: mx.array, kernel: mx.array) -> mx.array:
        y = patches(image) @ as_rows(kernel).swapaxes(1, 2)
        return y.swapaxes(0, 1).reshape(image.shape[0], h, w, -1)

    def by_image(result: mx.array, kernel: mx.array) -> mx.array:
        N, (c, _) = result.shape[0], _channels(g, kernel)
        rows = grouped(result) @ as_rows(kernel)
        rows = rows.reshape(g.groups * N * h, w, K, L * c)
        # Patches overlap: add them up along one axis, then along the other.
        rows = rows.swapaxes(1, 2).reshape(g.groups, N, h, K, w * L * c)
        y = _overlap_add(rows, S, g.dilation[0]).reshape(g.groups, N, H, w, L, c)
        y = _overlap_add(y, T, g.dilation[1])  # (G, N, H, W, c)
        y = y.reshape(g.groups, N, H, W, c).transpose(1, 2, 3, 0, 4).reshape(N, H, W, g.groups * c)
        return _fitted(y, g.image, (-g.padding[0], -g.padding[1]))

    def by_kernel(image: mx.array, result: mx.array) -> mx.array:
        if g.turned:
            kernel = patches(image).swapaxes(1, 2) @ grouped(result)  # (1, K L C, O)
            whole = kernel.reshape(K, L, -1, result.shape[3]).transpose(2, 0, 1, 3)
            return mx.contiguous(whole)  # or Adam would read it so, three times
        kernel = grouped(result).swapaxes(1, 2) @ patches(image)  # (G, O / G, K L C / G)
        return kernel.reshape(_shape_of_kernel(g, image, result))

    return Maps(conv, by_image, by_kernel)


def _overlap_add(pieces: mx.array, stride: int, dilation: int) -> mx.array:
    """(..., n, taps, c) to (..., stride (n - 1) + dilation (taps - 1) + 1, c).

    Tap k of piece i is added at ``stride i + dilation k``. Places of one remainder by the stride
    are neighbours in a plane of their own, so that no addition skips through memory.
    """
    n, taps, c = pieces.shape[-3:]
    length = stride * (n - 1) + dilation * (taps - 1) + 1
    rows = -(-length // stride)
    lead = [(0, 0)] * (pieces.ndim - 3)
    planes: dict[int, mx.array] = {}
    for k in range(taps):
        shift, plane = divmod(dilation * k, stride)
        piece = mx.pad(pieces[..., k, :], [*lead, (shift, rows - n - shift), (0, 0)])
        planes[plane] = planes[plane] + piece if plane in planes else piece
    zero = mx.zeros_like(planes[0])
    stacked = mx.stack([planes.get(p, zero) for p in range(stride)], axis=-2)
    return stacked.reshape(*pieces.shape[:-3], rows * stride, c)[..., :length, :]


def _taps_maps(g: Geometry) -> Maps:
    """A product for each tap of the kernel, of the image's pixels as they lie in memory.

    With the pixels of all padded images counted through, a tap is a constant shift. Rows run on
    into the next row there, and what is computed across the border is dropped. A stride first
    sorts the pixels into planes by their remainders. Nothing is laid out K L times.
    """
    if g.folds > 1:
        return _folded_maps(g, _taps_maps)
    (K, L), (S, T), (h, w) = g.kernel, g.stride, g.result
    H, W = -(-g.seen(0) // S), -(-g.seen(1) // T)  # of one plane
    taps = []
    for i, j in product(range(K), range(L)):
        (down, s), (right, t) = divmod(g.dilation[0] * i, S), divmod(g.dilation[1] * j, T)
        taps.append((i, j, s, t, down * W + right))
    last = max(shift for *_, shift in taps)

    def planes(image: mx.array) -> mx.array:
        N, C = image.shape[0], image.shape[3] // g.groups
        padded = _fitted(image, (H * S, W * T), g.padding)
        split = padded.reshape(N, H, S, W, T, g.groups, C).transpose(2, 4, 5, 0, 1, 3, 6)
        return split.reshape(S, T, g.groups, N * H * W, C)

    def grid(result: mx.array, blank: int) -> mx.array:
        """(G, rows, O / G): the results at the top left of planes of zeros, after blank ones."""
        widths = [(blank, 0), (0, H - h), (0, W - w), (0, 0)]
        rows = mx.pad(result, widths).reshape(-1, g.groups, result.shape[3] // g.groups)
        return rows.swapaxes(0, 1) if g.groups == 1 else mx.contiguous(rows.swapaxes(0, 1))

    def by_tap(kernel: mx.array) -> mx.array:
        """(K, L, G, O / G, C / G)."""
        if g.turned:
            return mx.contiguous(kernel.transpose(1, 2, 0, 3))[:, :, None].swapaxes(3, 4)
        split = kernel.reshape(g.groups, -1, K, L, kernel.shape[3]).transpose(2, 3, 0, 1, 4)
        return mx.contiguous(split)

    def conv(image: mx.array, kernel: mx.array) -> mx.array:
        N, f = image.shape[0], _channels(g, kernel)[1] // g.groups
        x, of_tap = planes(image), by_tap(kernel)
        rows = N * H * W - last
        y: mx.array | None = None
        for i, j, s, t, shift in taps:
            a, b = x[s, t, :, shift : shift + rows], of_tap[i, j].swapaxes(1, 2)
            y = a @ b if y is None else mx.addmm(y, a, b)
        assert y is not None
        # The last pixel of the last result is the last row: a view leaves out what is not wanted.
        steps = [H * W * f, W * f, f, rows * f, 1]
        wanted = mx.as_strided(mx.contiguous(y), [N, h, w, g.groups, f], steps)
        return wanted.reshape(N, h, w, g.groups * f)

    def by_image(result: mx.array, kernel: mx.array) -> mx.array:
        N, (c, _) = result.shape[0], _channels(g, kernel)
        y, of_tap = grid(result, 1), by_tap(kernel)
        rows = N * H * W
        x: dict[Pair, mx.array] = {}
        for i, j, s, t, shift in taps:
            start = H * W - shift
            a, b = y[:, start : start + rows], of_tap[i, j]
            x[s, t] = mx.addmm(x[s, t], a, b) if (s, t) in x else a @ b
        blank = mx.zeros_like(x[0, 0])
        both = mx.stack([x.get((s, t), blank) for s in range(S) for t in range(T)])
        both = both.reshape(S, T, g.groups, N, H, W, c).transpose(3, 4, 0, 5, 1, 2, 6)
        whole = both.reshape(N, H * S, W * T, g.groups * c)
        return _fitted(whole, g.image, (-g.padding[0], -g.padding[1]))

    def by_kernel(image: mx.array, result: mx.array) -> mx.array:
        x, y = planes(image), grid(result, 0).swapaxes(1, 2)
        rows = y.shape[2] - last
        # Blocks of rows small enough for a core's cache, where every tap finds them again.
        block = max(1, _CACHED // (x.shape[4] + y.shape[1]))
        found: list[mx.array] = []
        for n, (_, _, s, t, shift) in enumerate(taps * -(-rows // block)):
            start, tap = divmod(n, len(taps))
            stop = min(rows, (start + 1) * block)
            a = y[:, :, start * block : stop]
            b = x[s, t, :, start * block + shift : stop + shift]
            if g.turned:
                a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
            if start == 0:
                found.append(a @ b)  # (G, O / G, C / G), or (1, C, O)
            else:
                found[tap] = mx.addmm(found[tap], a, b)
        return mx.stack(found, axis=2).reshape(_shape_of_kernel(g, image, result))

    return Maps(conv, by_image, by_kernel)


def _gathered_maps(g: Geometry) -> Maps:
    """``patches`` with the image gathered from patches of the result, not added up from its own.

    A GPU adds overlapping patches up in many small kernels. Without a stride the gradient by the
    image is itself a convolution, of the result with the kernel turned about; and a stride folds.
    """
    patches = _patches_maps(g)
    if g.groups > 1 or (g.stride != (1, 1) and g.folds == 1):
        return patches
    if g.folds > 1:
        return patches._replace(by_image=_folded_maps(g, _gathered_maps).by_image)
    padding = (g.reach(0) - 1 - g.padding[0], g.reach(1) - 1 - g.padding[1])
    adjoint = _patches_maps(
        g._replace(image=g.result, result=g.image, padding=padding, turned=False)
    )

    def by_image(result: mx.array, kernel: mx.array) -> mx.array:
        about = kernel[:, ::-1, ::-1]
        return adjoint.conv(result, about if g.turned else about.swapaxes(0, 3))

    return patches._replace(by_image=by_image)


def _folded_maps(g: Geometry, build: Callable[[Geometry], Maps]) -> Maps:
    """A strided convolution as one of stride 1 (:attr:`Geometry.folds`), as ``build`` does it."""
    (K, L), (S, T) = g.kernel, g.stride
    H, W = g.seen(0) // S, g.seen(1) // T
    inner = build(Geometry((H, W), g.result, (K // S, L // T), (1, 1), (0, 0), (1, 1), 1, g.turned))

    def fold(x: mx.array) -> mx.array:
        """(N, rows, columns, C) to (N, rows / S, columns / T, S T C): of images and of kernels."""
        N, rows, columns, C = x.shape
        blocks = x.reshape(N, rows // S, S, columns // T, T, C).swapaxes(2, 3)
        return blocks.reshape(N, rows // S, columns // T, S * T * C)

    def unfold(x: mx.array) -> mx.array:
        N, rows, columns, C = x.shape
        blocks = x.reshape(N, rows, columns, S, T, C // (S * T)).swapaxes(2, 3)
        return blocks.reshape(N, rows * S, columns * T, C // (S * T))

    def fold_kernel(kernel: mx.array) -> mx.array:
        if not g.turned:
            return fold(kernel)
        c, f = _channels(g, kernel)
        blocks = kernel.reshape(c, K // S, S, L // T, T, f).transpose(2, 4, 0, 1, 3, 5)
        return blocks.reshape(S * T * c, K // S, L // T, f)

    def unfold_kernel(folded: mx.array) -> mx.array:
        if not g.turned:
            return unfold(folded)
        blocks = folded.reshape(S, T, -1, K // S, L // T, folded.shape[3])
        return blocks.transpose(2, 3, 0, 4, 1, 5).reshape(-1, K, L, folded.shape[3])

    def planes(image: mx.array) -> mx.array:
        return fold(_fitted(image, (H * S, W * T), g.padding))

    def by_image(result: mx.array, kernel: mx.array) -> mx.array:
        whole = unfold(inner.by_image(result, fold_kernel(kernel)))
        return _fitted(whole, g.image, (-g.padding[0], -g.padding[1]))

    return Maps(
        lambda image, kernel: inner.conv(planes(image), fold_kernel(kernel)),
        by_image,
        lambda image, result: unfold_kernel(inner.by_kernel(planes(image), result)),
    )


_CACHED = 1 << 19  # floats: half of a usual core's second-level cache of a few MiB


# --- Which route ----------------------------------------------------------------------------------

_BUILD = {
    "adjoint": _adjoint_maps,
    "cudnn": _cudnn_maps,
    "patches": _patches_maps,
    "gathered": _gathered_maps,
    "taps": _taps_maps,
}

ROUTES = ("auto", "native", "cheapest", *_BUILD)
"""``native``: ``mx.conv2d`` and ``mx.conv_transpose2d`` with MLX's own gradients. The rest are the
three maps: ``adjoint`` and ``cudnn`` as MLX operations; ``patches``, ``gathered`` and ``taps`` as
matrix products; ``cheapest`` as whichever of these :func:`cheapest` or :func:`cheapest_on_cuda`
says, for each map. ``auto``: as :func:`choose` says."""

_forced = os.environ.get("CONVOLUTION_ROUTE", "auto")
if _forced not in ROUTES:
    raise ValueError(f"CONVOLUTION_ROUTE={_forced!r} is none of {', '.join(ROUTES)}")


@contextmanager
def route(name: str) -> Iterator[None]:
    """Send every convolution called within this context, and its gradients, one route.

    ``name`` is one of :data:`ROUTES`; all of them work on every backend. ValueError for another. A
    step compiled before keeps the routes of its trace. For a whole process there is the environment
    variable ``CONVOLUTION_ROUTE``.
    """
    global _forced
    if name not in ROUTES:
        raise ValueError(f"route {name!r} is none of {', '.join(ROUTES)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend() -> str:
    """Where MLX's default device is: cpu, cuda or metal."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def choose(backend: str, native_is_right: bool = True) -> str:
    """The fastest route that is right, by what ``benchmarks/test_convolution.py`` measures.

    Metal: native, until a measurement there says otherwise.

    CUDA: cheapest. MLX's gradient of ``conv_transpose2d`` by its kernel takes 9 to 41 ms on an H100
    at the sizes of a 64 x 64 GAN, where PyTorch takes half a millisecond for everything.

    CPU: cheapest. MLX multiplies patches with the kernel, which is fast, only where nothing is
    dilated. The gradient of a strided convolution by its image, a transposed convolution and its
    gradient by the kernel dilate one array by the stride, and run as a scalar loop.
    """
    if backend == "metal":
        return "native" if native_is_right else "adjoint"
    return "cheapest"


def cheapest_on_cuda(map_name: str, g: Geometry, tensor_cores: bool) -> str:
    """The route that CUDA takes for one map, a field of :class:`Maps`.

    As measured on an H200 at the layers of the models here. Where products are rounded to TF32 or
    are of halves, cuDNN's kernels run on tensor cores, and are fast: a kernel's gradient over 64
    images of 32 x 32 x 128 takes 0.12 ms, by patches 0.30. In full float32 what cuDNN's heuristics
    take first, often Fourier transforms with gigabytes of workspace, is slower than patches copied
    out and multiplied by cuBLAS: 97 ms to 84 for a U-Net's step, and a VGG's step has the memory.
    Of a gradient by the kernel they make a good choice (0.32 ms, by patches 0.55), unless the
    kernel is one pixel or strides.
    """
    if g.groups > 1:
        return "adjoint"
    if map_name == "by_kernel":
        recognised = g.result[1] > g.kernel[1]
        many_patches = g.stride == (1, 1) and g.kernel != (1, 1)
        return "cudnn" if recognised and (tensor_cores or many_patches) else "patches"
    if map_name == "by_image":
        gaps = any(g.reach(axis) < g.stride[axis] for axis in (0, 1))
        if gaps:  # pixels that no result sees came out of MLX 0.32 as nonsense once, not as zeros
            return "gathered"
        if g.stride != (1, 1) and g.folds == 1:
            return "adjoint"
    if tensor_cores:
        return "adjoint"
    return "gathered"


def _on_tensor_cores(dtype: mx.Dtype) -> bool:
    return dtype in HALF or os.environ.get("MLX_ENABLE_TF32", "1") != "0"


def cheapest(map_name: str, g: Geometry, batch: int, channels: Pair) -> str:
    """The route that a CPU takes for one map, a field of :class:`Maps`, at these sizes.

    ``channels`` are the image's and the result's. By a model of what each route does beside the
    multiplications that all do, in nanoseconds on one core (EPYC 9004, OpenBLAS): copy patches out,
    add patches up, or pass over both sides once a tap. Few channels on either side favour patches
    of that side; many on both favour taps.
    """
    (C, F), taps = channels, prod(g.kernel)
    pixels = batch * prod(g.result)
    kernel = taps * C * F // g.groups
    rows = batch * prod(-(-g.seen(axis) // g.stride[axis]) for axis in (0, 1))

    def copied(elements: int) -> float:
        """Beyond 32 MiB the allocator has every page from the system anew."""
        return elements * (1.1 if elements < 1 << 23 else 3.0)

    more_products = pixels * kernel * (rows / pixels - 1)
    costs = {
        # Its products are shorter, which makes them an eighth slower.
        "taps": 0.4 * taps * rows * (C + F / g.folds)
        + 0.015 * (more_products + pixels * kernel / 8)
        + kernel
    }
    if map_name == "by_image":
        costs["patches"] = 5.0 * pixels * taps * C
    else:
        costs["patches"] = copied(pixels * taps * C)
    if g.groups == 1 and g.dilation == (1, 1):  # elsewhere MLX runs its scalar loop
        if map_name != "by_image":
            # The same, in one operation; but it turns the kernel over, against its order in memory.
            costs["adjoint"] = 0.99 * costs["patches"] + (5.0 * kernel if g.turned else 0.0)
        elif g.stride == (1, 1):
            # Patches of the result; and the kernel turned over, against its order in memory.
            costs["adjoint"] = copied(batch * prod(g.image) * taps * F) + 5.0 * kernel
    return min(costs, key=lambda name: costs[name])


_stride_of_plan: dict[tuple[object, ...], Pair] = {}


def gets_anothers_plan(g: Geometry, batch: int, channels: Pair, dtype: mx.Dtype) -> bool:
    """Whether MLX 0.32 on CUDA would run this ``by_image`` with the plan of another stride.

    It keeps cuDNN's plans by shapes, paddings and the kernel's dilation, without the dilation of
    the input, which for this map is the stride. Of two transposed convolutions of one input shape
    and different strides, the second then fills a part of its result with nonsense. The first
    asked for here takes the plan; the answer for the others is True, for good.
    """
    paddings = []
    strides = []
    for axis in (0, 1):
        low = g.reach(axis) - 1 - g.padding[axis]
        results = g.results(axis)
        high = g.image[axis] - g.stride[axis] * (results - 1) + g.padding[axis] - 1
        paddings += [results, low, high]
        strides.append(g.stride[axis] if results > 1 else 1)  # one element has nothing between
    key = (batch, channels, g.kernel, g.dilation, g.groups, dtype, *paddings)
    stride = cast(Pair, tuple(strides))
    return _stride_of_plan.setdefault(key, stride) != stride


@lru_cache(maxsize=1024)
def _differentiable(g: Geometry, route: str) -> Maps:
    """The three maps, each with the other two as its gradients."""
    built = {name: build(g) for name, build in _BUILD.items()}

    def routed(map_name: str) -> BilinearMap:
        def run(a: mx.array, b: mx.array) -> mx.array:
            if map_name == "by_kernel":
                channels = a.shape[3], b.shape[3]
            else:
                c, f = _channels(g, b)
                channels = c * g.groups, f
            taken = route
            if route == "cheapest" and backend() == "cuda":
                taken = cheapest_on_cuda(map_name, g, _on_tensor_cores(a.dtype))
            elif route == "cheapest":
                taken = cheapest(map_name, g, a.shape[0], channels)
            by_mlx = taken in ("adjoint", "cudnn")
            risky = by_mlx and map_name == "by_image" and backend() == "cuda"
            if risky and gets_anothers_plan(g, a.shape[0], channels, mx.result_type(a, b)):
                taken = "gathered"
            return cast(mx.array, getattr(built[taken], map_name)(a, b))

        return run

    maps = Maps(*(cast(BilinearMap, mx.custom_function(routed(name))) for name in Maps._fields))

    def gradients(of: BilinearMap, by_first: BilinearMap, by_second: BilinearMap) -> None:
        def vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> object:
            return by_first(cotangent, primals[1]), by_second(primals[0], cotangent)

        of.vjp(vjp)  # type: ignore[attr-defined]

    conv, by_image, by_kernel = maps
    gradients(conv, by_image, by_kernel)
    gradients(by_image, conv, lambda result, image: by_kernel(image, result))
    gradients(by_kernel, lambda kernel, result: by_image(result, kernel), conv)
    return maps


def conv2d(
    x: mx.array,
    weight: mx.array,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> mx.array:
    """``mx.conv2d``: (N, H, W, C) and (O, K, L, C / groups) to (N, h, w, O).

    What MLX refuses is refused with MLX's own error.
    """
    s, p, d = _pair(stride), _pair(padding), _pair(dilation)
    fits = x.ndim == weight.ndim == 4 and min(*s, *d, groups) > 0 and min(p) >= 0
    fits = fits and x.shape[3] == weight.shape[3] * groups and weight.shape[0] % groups == 0
    taken = choose(backend()) if _forced == "auto" else _forced
    if not fits or taken == "native":
        return mx.conv2d(x, weight, s, p, d, groups)
    image, kernel = cast(Pair, x.shape[1:3]), cast(Pair, weight.shape[1:3])
    h, w = ((image[i] + 2 * p[i] - d[i] * (kernel[i] - 1) - 1) // s[i] + 1 for i in (0, 1))
    if min(h, w, x.size, weight.size) < 1:
        return mx.conv2d(x, weight, s, p, d, groups)
    g = Geometry(image, (h, w), kernel, s, p, d, groups)
    return single_on_cpu(_differentiable(g, taken).conv, x, weight)


def conv_transpose2d(
    x: mx.array,
    weight: mx.array,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    output_padding: int | Pair = 0,
) -> mx.array:
    """``mx.conv_transpose2d``: (N, h, w, O) and (C, K, L, O) to (N, H, W, C).

    What MLX refuses is refused with MLX's own error.
    """
    s, p, d, o = _pair(stride), _pair(padding), _pair(dilation), _pair(output_padding)
    fits = x.ndim == weight.ndim == 4 and min(*s, *d) > 0 and min(*p, *o) >= 0
    if not fits or x.shape[3] != weight.shape[3]:
        return mx.conv_transpose2d(x, weight, s, p, d, o)
    result, kernel = cast(Pair, x.shape[1:3]), cast(Pair, weight.shape[1:3])
    reach = [d[i] * (kernel[i] - 1) for i in (0, 1)]
    H, W = (s[i] * (result[i] - 1) - 2 * p[i] + reach[i] + 1 + o[i] for i in (0, 1))
    # MLX 0.32 gets the input's gradient wrong in the first case and the result in the second.
    right = all(o[i] <= p[i] <= reach[i] for i in (0, 1))
    taken = choose(backend(), right) if _forced == "auto" else _forced
    if min(H, W, x.size, weight.size) < 1 or taken == "native":
        return mx.conv_transpose2d(x, weight, s, p, d, o)
    g = Geometry((H, W), result, kernel, s, p, d, 1, turned=True)
    return single_on_cpu(_differentiable(g, taken).by_image, x, weight)
