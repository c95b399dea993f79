"""Convolutions by every route, and PyTorch's: the evidence for ``mlx_impl.convolution.choose``.

    python -m pytest benchmarks/test_convolution.py --benchmark-enable

The layers are those of the models, at their own sizes. All routes of a layer are timed in turn,
forth and back (ABBA), compiled, and the best round of each is shown: for one operation there is no
noise but what makes it longer. ``--quick``: only MLX's own, the route chosen, and PyTorch's.
"""

import os
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from mlx_impl import convolution

CHOSEN = {route: convolution.choose(route) for route in ("cpu", "cuda", "metal")}
ROUTES = tuple(r for r in convolution.ROUTES if r != "auto")
BLOCKS, ROUNDS = 2, 5
LONG = 0.5
"""Seconds; what takes longer is timed once a block."""
CPU_SHARE = 8
"""A CPU gets a batch this many times smaller."""


class Layer(NamedTuple):
    """(N, size, size, channels) to ``filters`` channels, square in all."""

    name: str
    transposed: bool
    batch: int
    size: int
    channels: int
    filters: int
    kernel: int
    stride: int
    padding: int


LAYERS = (
    Layer("000 conv1", False, 64, 64, 3, 128, 4, 2, 1),
    Layer("000 conv2", False, 64, 32, 128, 256, 4, 2, 1),
    Layer("000 deconv1", True, 64, 16, 256, 128, 4, 2, 1),
    Layer("000 deconv2", True, 64, 32, 128, 3, 4, 2, 1),
    Layer("DCGAN D 64-128", False, 64, 32, 64, 128, 4, 2, 1),
    Layer("DCGAN D 256-512", False, 64, 8, 256, 512, 4, 2, 1),
    Layer("DCGAN D logit", False, 64, 4, 512, 1, 4, 1, 0),
    Layer("DCGAN G first", True, 64, 1, 100, 512, 4, 1, 0),
    Layer("DCGAN G 512-256", True, 64, 4, 512, 256, 4, 2, 1),
    Layer("DCGAN G 128-64", True, 64, 16, 128, 64, 4, 2, 1),
    Layer("DCGAN G image", True, 64, 32, 64, 3, 4, 2, 1),
    Layer("U-Net 3x3 at 32", False, 64, 32, 64, 64, 3, 1, 1),
    Layer("U-Net 3x3 at 16", False, 64, 16, 128, 128, 3, 1, 1),
    Layer("U-Net down", False, 64, 32, 64, 64, 3, 2, 1),
    Layer("VGG conv1_1", False, 8, 256, 3, 64, 3, 1, 1),
    Layer("VGG conv1_2", False, 8, 256, 64, 64, 3, 1, 1),
    Layer("VGG conv3_1", False, 8, 64, 128, 256, 3, 1, 1),
    Layer("VGG conv4_2", False, 8, 32, 512, 512, 3, 1, 1),
)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Best = dict[tuple[str, str], dict[str, float]]  # by layer and what is timed, by arm, seconds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arm" not in metafunc.fixturenames:
        return
    quick = metafunc.config.getoption("--quick")
    chosen = CHOSEN[convolution.backend()]
    arms = ["native", *([chosen] if chosen != "native" else []), "torch"] if quick else [*ROUTES]
    arms += ["torch"] if not quick else []
    metafunc.parametrize(
        ("layer", "timed", "block", "arm"),
        [
            pytest.param(layer, timed, block, arm, id=f"{layer.name}-{timed}-{arm}-{block}")
            for layer, timed, block in product(LAYERS, ("forward", "gradients"), range(BLOCKS))
            for arm in (arms if block % 2 == 0 else arms[::-1])
        ],
    )


def arrays(layer: Layer) -> Arrays:
    """Input and kernel in MLX's layout, and a cotangent of the result's shape."""
    batch = layer.batch // (CPU_SHARE if convolution.backend() == "cpu" else 1)
    inner = layer.kernel - 2 * layer.padding
    if layer.transposed:
        out = layer.stride * (layer.size - 1) + inner
    else:
        out = (layer.size - inner) // layer.stride + 1
    rng = np.random.default_rng(0)
    shapes = (
        (batch, layer.size, layer.size, layer.channels),
        (layer.filters, layer.kernel, layer.kernel, layer.channels),
        (batch, out, out, layer.filters),
    )
    x, w, y = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return x, w / float(w[0].size) ** 0.5, y


def mlx_arm(layer: Layer, timed: str, route: str) -> Callable[[], Any]:
    x, w, cotangent = map(mx.array, arrays(layer))
    function = convolution.conv_transpose2d if layer.transposed else convolution.conv2d

    def forward(x: mx.array, w: mx.array) -> mx.array:
        with convolution.route(route):
            return function(x, w, layer.stride, layer.padding)

    def gradients(x: mx.array, w: mx.array) -> Any:
        return mx.vjp(forward, [x, w], [cotangent])  # the result as well

    mx.eval(x, w, cotangent)
    compiled = mx.compile(forward if timed == "forward" else gradients)
    return lambda: mx.eval(compiled(x, w))


def torch_arm(layer: Layer, timed: str) -> Callable[[], Any]:
    device = machine.torch_device()
    x, w, cotangent = (
        torch.tensor(a.transpose(0, 3, 1, 2).copy(), device=device) for a in arrays(layer)
    )
    if layer.transposed:
        w = w.transpose(0, 1).contiguous()
    functional = torch.nn.functional
    function = functional.conv_transpose2d if layer.transposed else functional.conv2d
    wait = torch.cuda.synchronize if device == "cuda" else torch.mps.synchronize
    if device == "cpu":
        wait = lambda: None  # noqa: E731

    def forward() -> None:
        with torch.no_grad():
            function(x, w, None, layer.stride, layer.padding)
        wait()

    def gradients() -> None:
        y = function(x.requires_grad_(), w.requires_grad_(), None, layer.stride, layer.padding)
        torch.autograd.grad(y, (x, w), cotangent)
        wait()

    return forward if timed == "forward" else gradients


@pytest.fixture(scope="module")
def best(request: pytest.FixtureRequest) -> Iterator[Best]:
    """What was timed, shown as a table when the last test is over."""
    found: Best = {}
    yield found
    if not found:
        return
    chosen = CHOSEN[convolution.backend()]
    share = CPU_SHARE if convolution.backend() == "cpu" else 1
    tf32 = os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    note = "" if share > 1 else f", TF32 {'on' if tf32 else 'off'}"
    table = Table(
        title=f"Convolutions, {machine.device()}{note}: milliseconds; here auto is {chosen}"
    )
    table.add_column("layer (batch)")
    table.add_column("timed")
    arms = list(dict.fromkeys(arm for row in found.values() for arm in row))
    arms.sort(key=(*ROUTES, "torch").index)
    for title in (*arms, "over\nnative", "over\ntorch"):
        table.add_column(title, justify="right", no_wrap=True)
    batches = {layer.name: layer.batch // share for layer in LAYERS}
    for (layer, timed), row in found.items():
        cells = [f"{1e3 * row[arm]:.2f}" if arm in row else "-" for arm in arms]
        ratios = [
            f"{row[arm] / row[chosen]:.2f}x" if arm in row and chosen in row else "-"
            for arm in ("native", "torch")
        ]
        table.add_row(f"{layer} ({batches[layer]})", timed, *cells, *ratios)
    plugins = request.config.pluginmanager
    reporter: Any = plugins.get_plugin("terminalreporter")
    capture: Any = plugins.get_plugin("capturemanager")
    console = Console(file=reporter._tw._file, width=max(110, reporter._tw.fullwidth))
    with capture.global_and_fixture_disabled():
        console.print()
        console.print(table)


# an arm that is skipped leaves the fixture unused
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
def test_convolution(
    benchmark: BenchmarkFixture, best: Best, layer: Layer, timed: str, block: int, arm: str
) -> None:
    if benchmark.disabled:
        pytest.skip("a timing: ask for it with --benchmark-enable")
    if arm == "torch" and machine.torch_device() is None:
        pytest.skip("PyTorch has no device of the class that MLX runs on")
    call = torch_arm(layer, timed) if arm == "torch" else mlx_arm(layer, timed, arm)
    call()  # compiles, and lets cuDNN choose
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    benchmark.group = f"{layer.name}: {timed}"
    benchmark.pedantic(call, rounds=1 if seconds > LONG else ROUNDS)
    row = best.setdefault((layer.name, timed), {})
    row[arm] = min(row.get(arm, np.inf), seconds, *benchmark.stats.stats.data)
    mx.clear_cache()
