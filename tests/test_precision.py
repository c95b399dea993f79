"""bfloat16 with float32 master weights: what stays float32, and that the kit sees what does not."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import mlx_impl.diffusion
import mlx_impl.layers
import mlx_impl.losses
import mlx_impl.mlp_gan
import reference.mlp_gan
from mlx_impl.convolution import conv2d
from mlx_impl.diffusion import ddim_sample, linear_schedule
from mlx_impl.precision import autocast, mixed, raised
from mlx_impl.training import compile_step
from mlx_parity import Case, Loss, System, check, climb, compare, jitter
from mlx_parity.equality import EPS, ROUGH, rougher, spacing
from mlx_parity.ladder import Climb, Rung, _place
from mlx_parity.sides import in_precision
from tests.cases.mlp_gan import mlp_gan_case
from tests.cases.precision import CASES, in_bfloat16
from tests.frameworks import MLX, TORCH, Side, compiles, each_side

BF16 = mx.bfloat16
GAN = {"batch": 4, "latent_dim": 3, "widths": (4, 8, 16), "image_size": (4, 6), "channels": 2}
DENOISER = {
    "batch": 8,
    "width": 6,
    "embedding_dim": 8,
    "image_size": (10, 8),
    "channels": 3,
    "schedule": "linear",
    "steps": 1000,
    "betas": (1e-4, 0.02),
    "target": "epsilon",
}


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == f"{name} in bfloat16")


def faulty(rungs: list[Rung]) -> dict[str, str]:
    """Verdicts of the tensors that are not equal, of the first rung that has any."""
    found = [{f.tensor: f.verdict for f in rung.findings if not f.ok} for rung in rungs]
    return next((verdicts for verdicts in found if verdicts), {})


def below_training(case: Case, shape: dict[str, Any], seed: int = 0) -> dict[str, str]:
    climbing = Climb(case, shape, seed)
    assert climbing.structure()[0].ok
    return faulty(climbing.derivatives())


# ------------------------------------------------------------------------- what is cast, what not


def mlx_layers() -> dict[str, Any]:
    ours = mlx_impl.layers
    return {
        "linear": (ours.Linear(4, 3), (5, 4)),
        "linear without bias": (ours.Linear(4, 3, bias=False), (5, 4)),
        "linear, four axes": (ours.Linear(4, 3), (1, 2, 5, 4)),
        "conv": (ours.Conv2d(4, 3, 3), (2, 5, 6, 4)),
        "transposed conv": (ours.ConvTranspose2d(4, 3, 3, stride=2), (2, 5, 6, 4)),
    }


@pytest.mark.parametrize("name", mlx_layers())
def test_a_layer_multiplies_bfloat16_and_its_gradients_are_float32(name: str):
    """Rounded once: inputs and weights that bfloat16 holds make the nearest to float32's result."""
    layer, shape = mlx_layers()[name]
    half = lambda tree: {k: a.astype(BF16).astype(mx.float32) for k, a in tree.items()}  # noqa: E731
    layer.update(half(layer.parameters()))
    x = mx.random.normal(shape, key=mx.random.key(0)).astype(BF16).astype(mx.float32)

    def total(parameters: Any, x: mx.array) -> mx.array:
        layer.update(parameters)
        return raised(layer(x)).sum()

    held = layer.parameters()
    right = layer(x)
    with autocast():
        found = layer(x)
        of_parameters, of_x = mx.grad(total, (0, 1))(held, x)
    layer.update(held)
    assert found.dtype == BF16
    assert mx.abs(raised(found) - right).max() <= 2**-8 * mx.abs(right).max() * (
        2 if "bias" in layer and "conv" in name else 1  # there the bias is added after rounding
    )
    assert {a.dtype for _, a in tree_flatten([of_parameters, of_x])} == {mx.float32}
    assert layer(x).dtype == mx.float32  # and nothing stays behind


@pytest.mark.parametrize("make", [mlx_impl.norms.BatchNorm, mlx_impl.norms.GroupNorm])
def test_a_norm_returns_what_it_is_given(make: Callable):
    norm = make(4) if make is mlx_impl.norms.BatchNorm else make(2, 4)
    x = mx.random.normal((3, 5, 6, 4), key=mx.random.key(0)).astype(BF16)
    assert norm(x).dtype == BF16
    assert norm(raised(x)).dtype == mx.float32
    assert {a.dtype for _, a in tree_flatten(norm.parameters())} == {mx.float32}


def test_a_number_is_not_rounded_to_the_arrays_type():
    """MLX gives a Python number the array's type; PyTorch keeps it as it is."""
    x = mx.array([-2.015625], BF16)
    assert (0.2 * mx.ones(1, BF16)).item() == 0.2001953125
    assert (0.2 * x).item() == -0.404296875
    theirs = torch.nn.functional.leaky_relu(torch.tensor([-2.015625]).bfloat16(), 0.2)
    assert mlx_impl.layers.leaky_relu(x, 0.2).item() == theirs.item() == -0.40234375


def test_what_comes_out_of_a_mixed_function_is_float32():
    def f(x: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        y = conv2d(x.astype(BF16), mx.ones((1, 1, 1, 2), BF16))
        return y, {"labels": mx.zeros(2, mx.int32)}

    y, rest = mixed(f)(mx.ones((1, 2, 2, 2)))
    assert (y.dtype, rest["labels"].dtype) == (mx.float32, mx.int32)
    assert mixed(f, None) is f


def test_float16_is_refused():
    with (
        pytest.raises(ValueError, match="bfloat16 has the range of float32"),
        autocast(mx.float16),
    ):
        pass


@compiles
def test_a_compiled_step_is_the_uncompiled_one_bit_for_bit_and_its_state_float32():
    losses = []
    for compiled in (False, True):
        mx.random.seed(0)
        g = mlx_impl.mlp_gan.Generator(3, (4, 8, 16), (4, 6), 2)
        d = mlx_impl.mlp_gan.Discriminator((4, 8, 16), (4, 6), 2)
        state = [g, d, *map(mlx_impl.mlp_gan.make_optimizer, (g, d))]
        step = mixed(mlx_impl.mlp_gan.train_step)
        take = compile_step(step, *state) if compiled else partial(step, *state)
        real, noise = mx.random.normal((5, 4, 6, 2)), mx.random.normal((5, 3))
        losses.append([float(loss.item()) for _ in range(3) for loss in take(real, noise)])
        held = [m.parameters() for m in state[:2]] + [o.state for o in state[2:]]
        assert {a.dtype for _, a in tree_flatten(held)} <= {mx.float32, mx.uint64}
    assert losses[0] == losses[1]


def test_a_sampler_computes_in_float32_around_a_model_in_bfloat16():
    seen = []

    def model(x: mx.array, t: mx.array) -> mx.array:
        seen.append(x.dtype)
        return conv2d(x.astype(BF16), mx.eye(2)[:, None, None].astype(BF16))

    noise = mx.random.normal((1, 3, 4, 2), key=mx.random.key(0))
    found = mixed(ddim_sample)(model, linear_schedule(10), noise)
    assert {*seen, found.dtype} == {mx.float32}


# --------------------------------------------------------------- PyTorch's cache of rounded weights


def test_pytorchs_cache_of_rounded_weights_outlives_their_update():
    """Within one ``torch.autocast`` the generator is judged by the discriminator of before."""

    def generator_loss(context: Any) -> float:
        torch.manual_seed(0)
        g = reference.mlp_gan.Generator(3, (4, 8, 16), (4, 6), 2)
        d = reference.mlp_gan.Discriminator((4, 8, 16), (4, 6), 2)
        optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (g, d)]
        real, noise = torch.randn(5, 2, 4, 6), torch.randn(5, 3)
        with context:
            return reference.mlp_gan.train_step(g, d, *optimizers, real, noise)[1].item()

    right = generator_loss(nullcontext())
    cached, renewed = (
        abs(generator_loss(torch.autocast("cpu", torch.bfloat16, cache_enabled=c)) / right - 1)
        for c in (True, False)
    )
    assert renewed < EPS["bfloat16"]
    assert cached > 5 * EPS["bfloat16"]


# ------------------------------------------------------------------------------- the kit's verdicts


def test_points_are_so_far_apart_that_roundings_are_independent():
    """The mean of a million roundings of nearby numbers: no more than chance, at the spacing."""
    rng = np.random.default_rng(0)
    for precision in ("float16", "bfloat16"):
        x = np.full(1_000_000, 1.1, np.float32)
        near = jitter({"x": x}, rng, spacing(precision))["x"]
        error = (in_precision(near, precision) - near) / EPS[precision]
        assert abs(error.mean()) < 5 * error.std() / 1000
        close = jitter({"x": x}, rng, 0.05 * EPS[precision])["x"]
        error = (in_precision(close, precision) - close) / EPS[precision]
        assert abs(error.mean()) > 50 * error.std() / 1000


def test_rougher_needs_no_distribution_and_no_outlier_decides():
    rng = np.random.default_rng(0)
    a, b = abs(rng.standard_cauchy(128)), abs(rng.standard_cauchy(64))
    assert rougher(50 * a, b, 1e-12)
    assert not rougher(a, b, 1e-3)
    assert not rougher([*np.zeros(120), *np.full(8, 1e9)], b, 1e-3)
    assert not rougher([], [], 0.5)


@pytest.mark.parametrize("size", [1, 30])
def test_a_rough_port_is_called_so_and_an_unbiased_one_is_not_different(size: int):
    """Rounded to bfloat16 where the reference rounds to float16, whose unit is an eighth."""
    rng = np.random.default_rng(0)
    point = {"x": rng.standard_normal(size).astype(np.float32)}

    def rounded(precision: str) -> Callable:
        return lambda p: {"y": in_precision(p["x"], precision).astype(np.float64)}

    def verdict(port: str, **options: float) -> str:
        draw = lambda: jitter(point, rng, spacing("bfloat16"))  # noqa: E731
        exact = lambda p: {"y": p["x"].astype(np.float64)}  # noqa: E731
        (finding,) = compare(exact, rounded("float16"), rounded(port), draw, **options)
        return finding.verdict

    assert verdict("bfloat16", rough=ROUGH if size > 1 else 0.5) == "rough"
    assert verdict("float16", rough=ROUGH) == "equal"
    assert verdict("bfloat16") == "equal"  # in single precision noise is no verdict


@pytest.mark.parametrize(
    ("weight", "bias", "verdicts"),
    [
        (1, 1, ("equal", "equal")),
        (1, 20, ("equal", "equal")),  # 20 times PyTorch's own, twice what the weight's comes to
        (1, 200, ("equal", "rough")),
        (20, 1, ("rough", "equal")),
        (20, 200, ("rough", "rough")),
    ],
)
@pytest.mark.parametrize("exact", [0.0, 1e-17, 1e-4], ids=["never errs", "in float64", "errs"])
def test_a_null_direction_is_measured_by_the_errors_beside_it(
    weight: float, bias: float, verdicts: tuple[str, str], exact: float
):
    """PyTorch may err not at all in a gradient that is zero, and a port by 20 times as much."""
    rng = np.random.default_rng(0)
    value = rng.standard_normal((6, 4))

    def side(weight: float, bias: float) -> Callable:
        return lambda p: {
            "gradients l/net.other.bias": np.ones(3),
            "gradients l/net.k.weight": value + 1e-3 * weight * rng.standard_normal((6, 4)),
            "gradients l/net.k.bias": bias * rng.standard_normal(6),
        }

    def verdict(**options: Any) -> tuple[str, ...]:
        sides = side(0, 1e-17), side(1, exact), side(weight, 1e-4 * bias)
        found = compare(*sides, dict, rough=ROUGH, **options)
        return tuple(f.verdict for f in found[1:])

    assert verdict(place=_place) == verdicts
    if (weight, bias) == (1, 20):
        assert verdict() == ("equal", "rough")  # measured by itself


def test_kin_are_nearest_first_and_of_one_kind():
    assert _place("gradients loss/net.k.bias") == ("gradients loss ", "net", "k", "bias")
    assert _place("update net.k.bias exp_avg") == ("update  exp_avg", "net", "k", "bias")
    assert _place("forward y") == ("forward  ", "y")
    assert _place("gradients loss/x")[0] == _place("gradients loss/net.k.bias")[0]
    assert _place("gradients other/x")[0] != _place("gradients loss/x")[0]


class TorchAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.q(x) @ self.k(x).mT / 6**0.5, -1) @ self.v(x)


class Attention(nn.Module):
    """In bfloat16. Its softmax is written out, so that its derivatives cancel but for rounding."""

    def __init__(self, coarse: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.coarse = coarse

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (
            x.astype(BF16) @ layer.weight.astype(BF16).T + layer.bias.astype(BF16)
            for layer in (self.q, self.k, self.v)
        )
        if self.coarse:  # four bits, rounded up or down by chance: no bias
            v = v * mx.random.uniform(1 - 2**-4, 1 + 2**-4, v.shape).astype(BF16)
        weights = mx.exp(q @ k.swapaxes(1, 2) / 6**0.5)
        return weights / weights.sum(-1, keepdims=True) @ v


def attention_case(coarse: bool) -> Case:
    def build(make: Callable, shape: Any) -> System:
        net = make()

        def loss(x: Any, cotangent: Any) -> Any:
            return (net(x) * cotangent).sum()

        return System({"net": net}, lambda x, cotangent: {"y": net(x)}, {"l": Loss(loss, ("net",))})

    def inputs(shape: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        size = (8, shape["positions"], 6)
        return {"x": rng.standard_normal(size), "cotangent": rng.standard_normal(size)}

    return Case(
        name="attention",
        shapes=None,  # type: ignore[arg-type]
        build=build,
        reference=TorchAttention,
        port=partial(Attention, coarse),
        inputs=inputs,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("positions", [1, 2, 7])
def test_an_attentions_null_directions_are_not_rough(positions: int):
    """The key's bias moves all scores alike; of one position, nothing moves the only weight."""
    case = attention_case(coarse=False)
    assert below_training(case, {"positions": positions}) == {}


@pytest.mark.parametrize("positions", [1, 7])
def test_an_attention_in_too_low_a_precision_is_rough(positions: int):
    mx.random.seed(0)
    found = below_training(attention_case(coarse=True), {"positions": positions})
    assert found["forward y"] == "rough"


@pytest.mark.parametrize("name", ["002 GAN", "004 diffusion"])
def test_adam_on_weights_that_are_bfloat16_is_seen(name: str):
    """An update of 2e-4 is less than half a unit of most weights, and is lost."""
    case, shape = (named(name), GAN if name == "002 GAN" else DENOISER)

    def build(lib: Any, shape: Any) -> System:
        system = case.build(lib, shape)
        if lib is case.port:
            for module in system.modules.values():
                module.set_dtype(BF16)
        return system

    climbing = Climb(replace(case, build=build), shape, 0)
    assert climbing.structure()[0].ok
    found = faulty(climbing.training())
    assert {name.split(" ")[0] for name in found} == {"update"}
    assert set(found.values()) <= {"rough", "different"}
    assert len([name for name in found if name.endswith("weight")]) >= 3


def test_pytorch_without_master_weights_is_seen_as_well():
    """The same of the reference: its weights held in bfloat16 are no yardstick for float32 ones."""
    w = torch.full((100,), 0.5, dtype=torch.bfloat16, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=2e-4)
    for _ in range(50):
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert (w == 0.5).all()


def test_a_loss_reduced_in_bfloat16_is_seen(monkeypatch: pytest.MonkeyPatch):
    shape = {**GAN, "batch": 64}
    assert below_training(named("002 GAN"), shape) == {}
    monkeypatch.setattr(mlx_impl.losses, "raised", lambda x: x)
    assert "loss d_loss" in below_training(named("002 GAN"), shape)


def test_a_timestep_embedding_in_bfloat16_is_seen(monkeypatch: pytest.MonkeyPatch):
    """Of the steps from 512 to 1000 only every fourth is left."""

    def embedding(t: mx.array, dim: int, dtype: mx.Dtype) -> mx.array:
        half = dim // 2
        frequencies = mx.exp(-math.log(10000) / (half - 1) * mx.arange(half)).astype(BF16)
        angles = t[:, None].astype(BF16) * frequencies
        return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=1).astype(dtype)

    assert below_training(named("004 diffusion"), DENOISER) == {}
    monkeypatch.setattr(mlx_impl.diffusion, "sinusoidal_embedding", embedding)
    assert below_training(named("004 diffusion"), DENOISER) == {"forward output": "different"}


def test_batch_norm_statistics_in_bfloat16_are_seen():
    """MLX's own layer, given bfloat16. Behind a rounded convolution hardly anything is to be seen
    of it, whose own error of the mean is as large; so the layer is held alone."""
    rng = np.random.default_rng(0)
    x = 1 + rng.standard_normal((8, 3, 10, 12))
    point = {"x": x.astype(np.float32)}

    def reference(dtype: torch.dtype) -> Callable:
        def run(p: Any) -> dict[str, np.ndarray]:
            norm = torch.nn.BatchNorm2d(3)
            if dtype == torch.float64:
                norm.double()
            y = norm(torch.from_numpy(p["x"]).to(dtype))
            found = {"y": y, "mean": norm.running_mean, "variance": norm.running_var}
            return {k: a.detach().double().numpy() for k, a in found.items()}

        return run

    def port(make: Callable) -> Callable:
        def run(p: Any) -> dict[str, np.ndarray]:
            norm = make(3)
            y = norm(mx.array(p["x"]).astype(BF16).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            found = {"y": y, "mean": norm.running_mean, "variance": norm.running_var}
            return {k: np.array(raised(a)).astype(np.float64) for k, a in found.items()}

        return run

    def draw() -> dict[str, np.ndarray]:
        near = jitter(point, rng, spacing("bfloat16"))
        return {"x": in_precision(near["x"], "bfloat16")}

    sides = reference(torch.float64), reference(torch.bfloat16)
    right = compare(*sides, port(mlx_impl.norms.BatchNorm), draw, rough=ROUGH)
    assert [str(f) for f in right if not f.ok] == []
    wrong = compare(*sides, port(nn.BatchNorm), draw, rough=ROUGH)
    assert {f.tensor for f in wrong if not f.ok} >= {"mean", "variance"}


# --------------------------------------------------------------------------- half on both sides


def half_case(dtype: str, held: str, slope: float = 0.2) -> Case:
    """A linear layer and its leaky ReLU, in half precision throughout or around master weights."""
    kind = {"float16": mx.float16, "bfloat16": BF16}[dtype]

    def build(side: Side, shape: Any) -> System:
        if side is TORCH:
            layer: Any = torch.nn.Linear(6, 5)
            run = lambda x: torch.nn.functional.leaky_relu(layer(x), 0.2)  # noqa: E731
        else:
            layer = nn.Linear(6, 5)
            if held != "float32":
                layer.set_dtype(kind)

            def run(x: mx.array) -> mx.array:
                y = x.astype(kind) @ layer.weight.astype(kind).T + layer.bias.astype(kind)
                return mx.where(y > 0, y, (slope * raised(y)).astype(kind))

        def loss(x: Any, cotangent: Any) -> Any:
            return (run(x) * cotangent).sum()

        return System(
            modules={"layer": layer},
            forward=lambda x, cotangent: {"y": run(x)},
            losses={"projection": Loss(loss, ("layer",))},
        )

    return Case(
        name=f"{dtype}, {held} held",
        shapes=None,  # type: ignore[arg-type]
        build=build,
        reference=TORCH,
        port=MLX,
        inputs=lambda shape, rng: {
            "x": rng.standard_normal((9, 6)),
            "cotangent": rng.standard_normal((9, 5)),
        },
        dtype=dtype,  # type: ignore[arg-type]
        held=held,  # type: ignore[arg-type]
    )


HELD = [("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float32")]


@pytest.mark.parametrize(("dtype", "held"), [*HELD, ("bfloat16", "float32")])
def test_half_precision_is_judged_by_pytorchs_in_the_same(dtype: str, held: str):
    climb(half_case(dtype, held), {}, seed=0, compiled=False).assert_ok()
    wrong = climb(half_case(dtype, held, slope=0.25), {}, seed=0, compiled=False)
    assert not wrong.ok


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.GroupNorm(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self, compatible: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.group = nn.GroupNorm(4, 8, pytorch_compatible=compatible)

    def __call__(self, x: mx.array) -> mx.array:
        return nn.silu(self.group(self.stem(x)))


@pytest.mark.parametrize("port", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("reference", ["bfloat16", "float32"])
def test_check_judges_half_on_either_side(reference: str, port: str):
    theirs, ours = TorchNet().to(getattr(torch, reference)), Net()
    ours.set_dtype(getattr(mx, port))
    x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    report = check(theirs, ours, x.to(getattr(torch, reference)), explain=False)
    assert report.ok, str(report)
    throughout = f"the port holds {port} throughout" in str(report)
    assert throughout == (port != "float32")
    assert ours.stem.weight.dtype == getattr(mx, port)  # and it is left as it was


def test_check_names_the_guilty_module_of_a_half_port():
    port = Net(compatible=False)
    port.set_dtype(BF16)
    report = check(TorchNet(), port, torch.randn(2, 3, 7, 9))
    assert not report.ok
    assert [d.trap_id for d in report.diagnoses][:1] == ["norm-groups"]


def test_what_cannot_be_held_is_refused():
    with pytest.raises(ValueError, match="hold bfloat16 cannot compute in float16"):
        half_case("float16", "bfloat16")
    with pytest.raises(ValueError, match="hold float16 cannot compute in float32"):
        replace(half_case("float16", "float16"), dtype="float32")


def test_float32_where_bfloat16_was_declared_is_no_fault():
    """Less rounding than the yardstick's: neither biased nor rough."""
    case = mlp_gan_case("002", (4, 8, 16))
    plain = replace(in_bfloat16(case), build=case.build)
    assert below_training(plain, GAN) == {}


@each_side
def test_losses_of_bfloat16_logits_are_float32s(side: Side):
    """Where PyTorch raises them: on the CPU all but softplus."""
    logits = np.linspace(-3, 3, 7, dtype=np.float32)[:, None]
    half = torch.bfloat16 if side is TORCH else BF16
    make = lambda a: side.array(a).to(half) if side is TORCH else side.array(a).astype(half)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        loss = side.losses.discriminator_loss(make(logits), make(logits))
        two = side.losses.two_logit_loss(
            make(np.hstack([logits, -logits])), side.array(np.zeros(7, np.int64))
        )
    assert {str(loss.dtype).split(".")[-1], str(two.dtype).split(".")[-1]} == {"float32"}
