"""The test of equality: its false-alarm rate, its power, and what it says."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as mnn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_parity import Finding, bound, compare, jitter
from mlx_parity.elementary import OfMLX
from mlx_parity.equality import ALPHA, JITTER, SKETCH, STAGES, Tensors

Function = Callable[..., object]


def t_of(d: np.ndarray) -> np.ndarray:
    """The whole-tensor t of differences (trials, points, size)."""
    k = d.shape[1]
    mean, spread = np.linalg.norm(d.mean(1), axis=1), np.linalg.norm(d.std(1, ddof=1), axis=1)
    return math.sqrt(k) * mean / np.where(spread > 0, spread, np.inf)  # no error at all: no bias


# ---------------------------------------------------------------------------- false alarms


@pytest.mark.parametrize("alpha", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("size", [1, 30])
@pytest.mark.parametrize(
    "errors",
    [
        lambda rng, shape: rng.uniform(-1, 1, shape),
        lambda rng, shape: rng.standard_t(1.5, shape),  # kinks: now and then a huge one
        lambda rng, shape: rng.choice([-1.0, 0.0, 1.0], shape, p=[0.02, 0.96, 0.02]),
        lambda rng, shape: np.repeat(rng.standard_normal(shape[:2])[..., None], shape[2], 2),
    ],
    ids=["uniform", "heavy tails", "rarely off by one", "elements all alike"],
)
def test_false_alarms_stay_below_alpha(errors: Callable, size: int, alpha: float):
    """Whatever the distribution and the dependence, if up is as likely as down."""
    trials, points = 20_000, STAGES[-1]
    t = np.concatenate(
        [t_of(errors(np.random.default_rng(i), (2_000, points, size))) for i in range(10)]
    )
    expected = alpha * trials
    assert (t > bound(points, alpha)).sum() <= expected + 4 * math.sqrt(expected)


def test_the_bound_is_the_stated_one():
    r2 = 2 * math.log(2 / ALPHA)
    assert bound(128) == pytest.approx(math.sqrt(r2 * 127 / (128 - r2)))
    assert round(bound(128), 1) == 10.0
    assert bound(8) == math.inf  # eight signs cannot show anything at 1e-12
    assert bound(128, 1e-15) > bound(128, 1e-12) > bound(512, 1e-12)


# ------------------------------------------------------------------------------- on real functions


def pair(
    theirs: Function, ours: Function, *arrays: np.ndarray, seed: int = 0, **options: object
) -> list[Finding]:
    """Hold an MLX function against a PyTorch one: value and gradients."""
    rng = np.random.default_rng(seed)
    base = {f"x{i}": a.astype(np.float32) for i, a in enumerate(arrays)}
    with torch.no_grad():
        shape = theirs(*[torch.from_numpy(a) for a in base.values()]).shape
    cotangent = rng.standard_normal(shape).astype(np.float32)

    def torch_side(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
        def evaluate(point: Tensors) -> Tensors:
            xs = [torch.tensor(a, dtype=dtype, requires_grad=True) for a in point.values()]
            with OfMLX():  # the kit's yardstick; float64 is not touched
                y = theirs(*xs)
            grads = torch.autograd.grad(y, xs, torch.tensor(cotangent, dtype=dtype))
            found = {"y": y, **{f"d{i}": g for i, g in enumerate(grads)}}
            return {k: v.detach().double().numpy() for k, v in found.items()}

        return evaluate

    def mlx_side(point: Tensors) -> Tensors:
        xs = [mx.array(a) for a in point.values()]
        (y,), grads = mx.vjp(ours, xs, [mx.array(cotangent)])
        found = {"y": y, **{f"d{i}": g for i, g in enumerate(grads)}}
        return {k: np.array(v, dtype=np.float64) for k, v in found.items()}

    return compare(
        torch_side(torch.float64),
        torch_side(torch.float32),
        mlx_side,
        lambda: jitter(base, rng),
        **options,
    )


RIGHT = {
    "exp": (torch.exp, mx.exp),
    "sigmoid": (torch.sigmoid, mx.sigmoid),
    "tanh": (torch.tanh, mx.tanh),
    "erf": (torch.erf, mx.erf),
    "gelu": (F.gelu, mnn.gelu),
    "silu": (F.silu, mnn.silu),
    "softplus": (F.softplus, lambda x: mx.logaddexp(x, 0.0)),
    "softmax": (lambda x: x.softmax(-1), lambda x: mx.softmax(x, axis=-1)),
    "layer norm": (
        lambda x: F.layer_norm(x, x.shape[-1:]),
        lambda x: mx.fast.layer_norm(x, None, None, 1e-5),
    ),
    "mean": (torch.mean, mx.mean),
}


@pytest.mark.parametrize("name", RIGHT)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(2, 40),
    scale=st.floats(0.1, 6.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_correct_functions_are_equal(name: str, rows: int, columns: int, scale: float, seed: int):
    x = scale * np.random.default_rng(seed).standard_normal((rows, columns))
    for finding in pair(*RIGHT[name], x, seed=seed):
        assert finding.ok, finding


def batch_norm(eps: float) -> Function:
    def f(x: mx.array, w: mx.array) -> mx.array:
        return (x - x.mean(0)) * mx.rsqrt(x.var(0) + eps) * w

    return f


def torch_batch_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, None, None, w, None, training=True, eps=1e-5)


def leaky(slope: float) -> Function:
    return lambda x, w: mnn.leaky_relu(x @ w, slope)


def torch_leaky(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x @ w, 0.2)


@pytest.mark.parametrize(
    ("theirs", "right", "wrong", "found"),
    [
        (torch_leaky, leaky(0.2), leaky(0.20001), 1.0),
        (torch_batch_norm, batch_norm(1e-5), batch_norm(1.2e-5), 1.0),
        (torch_batch_norm, batch_norm(1e-5), batch_norm(1.05e-5), 0.9),
        (
            lambda x, w: F.gelu(x @ w),
            lambda x, w: mnn.gelu(x @ w),
            lambda x, w: mnn.gelu_approx(x @ w),
            1.0,
        ),
    ],
    ids=["slope 0.20001", "eps 1.2e-5", "eps 1.05e-5", "tanh gelu"],
)
def test_power(theirs: Function, right: Function, wrong: Function, found: float):
    """Share of single draws in which a slip shows; a run has hundreds of draws."""
    trials, seen = 20, 0
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        x = 0.5 * rng.standard_normal((6, 5))
        w = rng.standard_normal(5) if theirs is torch_batch_norm else rng.standard_normal((5, 4))
        assert all(f.ok for f in pair(theirs, right, x, w, seed=seed))
        seen += not all(f.ok for f in pair(theirs, wrong, x, w, seed=seed))
    assert seen >= found * trials


def test_one_wrong_element_among_many_is_found_and_named():
    """Its share of the whole tensor's norm is far below the rounding of the others."""

    def ours(x: mx.array) -> mx.array:
        y = x @ mx.eye(100)
        return y + mx.zeros_like(y).at[41, 7].add(2e-5)

    x = np.random.default_rng(0).standard_normal((100, 100))
    y = pair(lambda x: x @ torch.eye(100, dtype=x.dtype), ours, x)[0]
    assert y.verdict == "different"
    assert y.worst == (41, 7)
    assert "worst at [41, 7]" in str(y)


# ------------------------------------------------------------------- what it says, and refuses


def findings(port: Callable[[np.ndarray], np.ndarray]) -> list[Finding]:
    rng = np.random.default_rng(0)
    base = {"x": rng.standard_normal(5).astype(np.float32)}
    return compare(
        lambda p: {"y": 2.0 * p["x"].astype(np.float64)},
        lambda p: {"y": (np.float32(2) * p["x"]).astype(np.float64)},
        lambda p: {"y": port(p["x"])},
        lambda: jitter(base, rng),
    )


def test_equal_bit_for_bit():
    (finding,) = findings(lambda x: (2 * x).astype(np.float64))
    assert finding.ok
    assert finding.bias == 0
    assert finding.points == STAGES[0]
    assert "would have been seen" in str(finding)


def test_a_constant_offset_has_no_noise_and_is_different():
    """No spread at all: only the size decides, and a unit in the last place is no difference."""
    (finding,) = findings(lambda x: 2.0 * x.astype(np.float64) + 1e-4)
    assert finding.verdict == "different"
    assert finding.relative_error > 1e-6
    (finding,) = findings(lambda x: 2.0 * x.astype(np.float64) * (1 + 2**-23))
    assert finding.ok


def test_missing_and_unknown_tensors_and_shapes():
    rng = np.random.default_rng(0)
    draw = lambda: {"x": rng.standard_normal(3).astype(np.float32)}  # noqa: E731
    one = {"a": np.ones(3), "b": np.ones(2)}
    other = {"a": np.ones((3, 1)), "c": np.ones(1)}
    found = compare(lambda p: one, lambda p: one, lambda p: other, draw)
    assert [str(f) for f in found] == [
        "a: shape: [3, 1] for the reference's [3]",
        "b: shape: the port does not compute it",
        "c: shape: the reference does not compute it",
    ]


def test_a_port_that_is_not_finite():
    (finding,) = findings(lambda x: np.where(np.arange(5) == 3, np.inf, x.astype(np.float64)))
    assert finding.verdict == "not finite"
    assert str(finding) == "y: not finite: inf at [3]"


def test_a_reference_that_is_not_finite_proves_nothing():
    nan = {"y": np.full(2, np.nan)}
    with pytest.raises(ValueError, match=r"the reference itself gives nan at \[0\] in 'y'"):
        compare(lambda p: nan, lambda p: nan, lambda p: nan, dict)


@given(st.integers(0, 2**32 - 1))
@example(0)
def test_jitter_is_relative_small_and_float32(seed: int):
    rng = np.random.default_rng(seed)
    point = {"x": rng.standard_normal(50).astype(np.float32), "labels": np.arange(3)}
    near = jitter(point, rng)
    assert near["x"].dtype == np.float32
    assert near["labels"] is point["labels"]
    relative = near["x"] / point["x"] - 1
    assert 0 < np.abs(relative).max() < 7 * JITTER


def rounding(scale: float, seed: int, of: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """A gradient that is zero but for rounding of this size, and what an optimizer makes of it."""
    rng = np.random.default_rng(seed)
    return lambda point: {"g": of(scale * rng.standard_normal(6))}


@pytest.mark.parametrize("of", [lambda g: g, np.square, np.sign], ids=["g", "g squared", "sign"])
@pytest.mark.parametrize("seed", range(5))
def test_a_gradient_of_rounding_is_equal_however_rough(of: Callable, seed: int):
    """As an attention's key bias has, and its moments and steps under Adam.

    Squares of rounding have a mean, but their spread is as large: t is about sqrt(K / 2), 8 at the
    last stage, which is below the bound. Relative to nothing, no difference has a size.
    """
    sides = (rounding(scale, seed + 10 * i, of) for i, scale in enumerate((1e-17, 1e-9, 1e-6)))
    (found,) = compare(*sides, dict)
    assert found.ok
    if of is not np.sign:
        assert (found.visible, found.relative_error) == (0, 0)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda d: None, False),
        (lambda d: d.__setitem__(..., d + 1e-6), True),
        (lambda d: d.__setitem__(77_777, d[77_777] + 1e-4), True),
    ],
    ids=["none", "everywhere", "in one element"],
)
def test_large_tensors_are_judged_by_sums_of_their_elements(fault: Callable, found: bool):
    """A third of a million numbers in fewer sums: nothing is lost, nothing invented."""
    size = SKETCH + 70_001
    rng = np.random.default_rng(0)
    value = rng.standard_normal(size)

    def rounded(point: Tensors) -> Tensors:
        return {"y": value + 3e-8 * rng.standard_normal(size)}

    def port(point: Tensors) -> Tensors:
        y = rounded(point)["y"]
        fault(y)
        return {"y": y}

    (finding,) = compare(lambda p: {"y": value}, rounded, port, dict)
    assert finding.size == size
    assert finding.ok is not found
    assert finding.noise == pytest.approx(1, abs=0.2)


def test_errors_that_are_the_same_at_every_point_do_not_cancel_out_of_the_yardstick():
    """The first step of Adam moves every weight by one learning rate, whose rounding is a constant.

    Where a large tensor's elements are added up with signs, PyTorch's two roundings may cancel and
    the port's not, being of the same size and other signs.
    """
    size = SKETCH + 70_001
    rng = np.random.default_rng(0)
    value = 2e-4 * rng.choice((-1.0, 1.0), size)
    theirs, ours = (4e-9 * rng.choice((-1.0, 1.0), size) for _ in range(2))

    def off(by: np.ndarray) -> Callable[[Tensors], Tensors]:
        return lambda point: {"y": value + by + 1e-13 * rng.standard_normal(size)}

    (finding,) = compare(lambda p: {"y": value}, off(theirs), off(ours), dict)
    assert finding.ok
