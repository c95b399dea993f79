"""What holds of any diffusion process, over drawn schedules, on both sides; and numbers known.

Bounds follow from rounding. A table entry or an operation is off by half a unit in the last place
(``eps / 2``) of its own size, so a sum of a few products is off by a few ``eps`` of the sum of
their sizes: every bound below is 8 of them, times how far the formula stretches its inputs. PyTorch
computes in float64 here, MLX in float32. ``1 - ᾱ``, made in float64, is off by ``EPS64`` itself, so
by ``EPS64 / (1 - ᾱ)`` of itself, which counts only where both are float64.
"""

import copy
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mlx_impl.diffusion
import reference.diffusion
from mlx_impl.training import compile_step
from tests.frameworks import EPS, MLX, TORCH, Side, assert_within, compiles, each_side

EPS64 = 2.0**-52
TARGETS = reference.diffusion.TARGETS
TABLES = (
    "betas",
    "alphas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "posterior_variance",
    "posterior_mean_x0",
    "posterior_mean_xt",
    "timesteps",
)


@st.composite
def linear_settings(draw: st.DrawFn, max_steps: int = 1000) -> tuple[int, float, float]:
    """(T, β_1, β_T) that leave at least e^-10 of the image's variance, β rising or falling."""
    steps = draw(st.integers(1, max_steps))
    betas = st.floats(1e-5, min(0.5, 10 / steps))
    return steps, draw(betas), draw(betas)


def unit(side: Side) -> float:
    return EPS64 if side is TORCH else EPS


def give(side: Side, array: np.ndarray):
    """Float32 numbers, exactly: in float64 to PyTorch, in float32 to MLX; and integers."""
    if np.issubdtype(array.dtype, np.integer):
        return side.array(array)
    if side is TORCH:
        return torch.tensor(array, dtype=torch.float64)
    return mx.array(array.astype(np.float32))


def take(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def draws(seed: int, steps: int, number: int = 3) -> list[np.ndarray]:
    """Arrays (T, 3, 2, 1) of float32 numbers: one image for each step of a schedule."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((steps, 3, 2, 1)).astype(np.float32) for _ in range(number)]


def rows(table: np.ndarray) -> np.ndarray:
    """A table (T,) to multiply (T, 3, 2, 1) with."""
    return table[:, None, None, None]


seeds = st.integers(0, 2**32 - 1)


# The schedule


@given(linear_settings())
def test_both_sides_have_the_same_tables(settings):
    ours, theirs = (side.diffusion.linear_schedule(*settings) for side in (MLX, TORCH))
    for table in TABLES:
        assert np.array_equal(getattr(ours, table), getattr(theirs, table)), table
    steps = settings[0]
    ours, theirs = (side.diffusion.cosine_schedule(steps) for side in (MLX, TORCH))
    for table in TABLES:
        assert np.array_equal(getattr(ours, table), getattr(theirs, table)), table


@given(linear_settings())
def test_signal_falls_and_noise_fills_what_it_leaves(settings):
    s = reference.diffusion.linear_schedule(*settings)
    assert len(s) == settings[0]
    for table in TABLES:
        assert getattr(s, table).shape == (len(s),)
        assert not getattr(s, table).flags.writeable
    assert (np.diff(s.alphas_cumprod) < 0).all()
    assert (s.alphas_cumprod > 0).all()
    assert (s.alphas_cumprod < 1).all()
    assert s.alphas_cumprod_prev[0] == 1
    assert s.posterior_variance[0] == 0
    assert (s.posterior_variance <= s.betas).all()


@each_side
@given(settings=linear_settings())
def test_q_sample_preserves_variance(side, settings):
    """√ᾱ² + √(1 - ᾱ)² = 1, of the coefficients as q_sample applies them."""
    s = side.diffusion.linear_schedule(*settings)
    one, nothing, every = np.ones((len(s), 1)), np.zeros((len(s), 1)), np.arange(len(s))
    sample = partial(side.diffusion.q_sample, s)
    signal = take(sample(give(side, one), give(side, every), give(side, nothing)))
    spread = take(sample(give(side, nothing), give(side, every), give(side, one)))
    assert_within(signal**2 + spread**2, one, 8 * unit(side))
    assert_within(signal[:, 0] ** 2, s.alphas_cumprod, 8 * unit(side))


# Sampling


@each_side
@given(settings=linear_settings(), seed=seeds)
def test_eq_7_is_eq_11(side, settings, seed):
    """The posterior's mean with the x_0 that ε implies is Algorithm 2's, at every step at once."""
    s = side.diffusion.linear_schedule(*settings)
    x, e = draws(seed, len(s), 2)
    mean = side.diffusion.ddpm_step(
        lambda *_: give(side, e), s, give(side, x), give(side, np.arange(len(s)))
    )
    left = rows(1 - s.alphas_cumprod)
    eq_11 = (x - rows(s.betas) / np.sqrt(left) * e) / np.sqrt(rows(s.alphas))
    implied = (np.abs(x) + np.sqrt(left) * np.abs(e)) / np.sqrt(rows(s.alphas_cumprod))
    size = rows(s.posterior_mean_x0) * implied + rows(s.posterior_mean_xt) * np.abs(x)
    assert_within(take(mean), eq_11, 8 * (unit(side) + EPS64 / left) * size)


@each_side
@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@given(settings=linear_settings(), seed=seeds, kept=st.floats(0.1, 1))
def test_ddim_with_eta_1_is_ddpm(side, target, clip_x0, settings, seed, kept):
    """With β̃, at every step at once, over all steps of a process and over a part of them."""
    d = side.diffusion
    s = d.linear_schedule(*settings)
    s = s.respaced(max(1, int(kept * len(s))), "trailing")
    x, prediction, z = (give(side, a) for a in draws(seed, len(s)))
    arguments = (lambda *_: prediction, s, x, give(side, np.arange(len(s))), z)
    ddpm = take(d.ddpm_step(*arguments, "beta_tilde", target, clip_x0))
    ddim = take(d.ddim_step(*arguments, 1.0, target, clip_x0))
    before, left = rows(1 - s.alphas_cumprod_prev), rows(1 - s.alphas_cumprod)
    signal = np.sqrt(rows(s.alphas_cumprod))
    x, prediction, z = (np.abs(take(a)) for a in (x, prediction, z))
    x0 = (x + prediction) / (signal if target == "epsilon" else 1)
    epsilon = (x + x0) / np.sqrt(left)
    weight = np.sqrt(rows(s.alphas_cumprod_prev))
    size = weight * x0 + np.sqrt(before) * (epsilon + z) + x
    # The part of 1 - ᾱ_previous that is not drawn anew is α (1 - ᾱ_previous) / (1 - ᾱ) of it.
    stretch = EPS64 * (1 / left + 1 / np.where(before > 0, rows(s.alphas) * before, 1))
    assert_within(ddim, ddpm, 8 * (unit(side) + stretch) * size)


@each_side
@given(settings=linear_settings(), seed=seeds, eta=st.floats(0, 1))
def test_ddim_is_songs_eq_12(side, settings, seed, eta):
    """With σ = η √β̃ (Eq. 16), told the true noise: each coefficient, at every step at once."""
    d = side.diffusion
    s = d.linear_schedule(*settings)
    every = give(side, np.arange(len(s)))
    x0, e, z = draws(seed, len(s))
    x_t = d.q_sample(s, give(side, x0), every, give(side, e))
    found = take(d.ddim_step(lambda *_: give(side, e), s, x_t, every, give(side, z), eta))
    kept = rows(s.alphas_cumprod_prev)
    sigma = eta * np.sqrt(rows(s.posterior_variance))
    direction = np.sqrt(np.maximum(1 - kept - sigma**2, 0))
    expected = np.sqrt(kept) * x0 + direction * e + sigma * z
    signal, left = np.sqrt(rows(s.alphas_cumprod)), rows(1 - s.alphas_cumprod)
    size = (np.abs(x0) + 2 * np.abs(e)) / signal + np.abs(e) + np.abs(z)
    # 1 - ᾱ - σ² cancels where a step draws nearly all anew: its root is off by its error's root.
    assert_within(found, expected, 8 * (unit(side) + EPS64 / left) * size + np.sqrt(8 * EPS64))


@each_side
@pytest.mark.parametrize("spacing", reference.diffusion.SPACINGS)
@given(settings=linear_settings(), seed=seeds, kept=st.floats(0.001, 1))
def test_ddim_with_the_true_noise_recovers_the_image(side, spacing, settings, seed, kept):
    d = side.diffusion
    whole = d.linear_schedule(*settings)
    s = whole.respaced(max(1, min(20, int(kept * len(whole)))), spacing)
    x0, e = (a[:1] for a in draws(seed, 1, 2))
    last = np.array([s.timesteps[-1]])
    x_t = d.q_sample(whole, give(side, x0), give(side, last), give(side, e))
    recovered = take(d.ddim_sample(lambda *_: give(side, e), s, x_t))
    # An error made at step i is divided by √ᾱ_i on its way to x_0.
    signal = np.sqrt(s.alphas_cumprod)
    size = ((np.abs(x0).max() + 2 * np.abs(e).max()) / signal).sum()
    assert_within(recovered, x0.astype(np.float64), 8 * unit(side) * size + 8 * EPS64 * size)


@each_side
@given(settings=linear_settings(max_steps=8), seed=seeds)
def test_sampling_is_its_steps_in_turn(side, settings, seed):
    """Noise is used in order, once each, and the last step has none; the model hears every t."""
    d = side.diffusion
    s = d.linear_schedule(*settings)
    x, *noises = (give(side, a[:1]) for a in draws(seed, 1, len(s)))
    heard = []

    def model(x, t):
        heard.append(int(t[0]))
        return 0.1 * x

    sampled = d.ddpm_sample(model, s, x, iter(noises), variance="beta")
    assert heard == list(range(len(s)))[::-1]
    stacked = (torch if side is TORCH else mx).stack([*noises, x])
    again = d.ddpm_sample(model, s, x, stacked, variance="beta")
    assert np.array_equal(take(sampled), take(again))
    for t, z in zip(reversed(range(len(s))), [*noises, None], strict=True):
        x = d.ddpm_step(model, s, x, give(side, np.array([t])), z, variance="beta")
    assert np.array_equal(take(sampled), take(x))


@compiles
def test_sampling_takes_a_compiled_model():
    """One trace for all steps: the timestep is an array, not a number of Python's."""
    d, traces = mlx_impl.diffusion, []
    model, s = d.Denoiser(1, 4, 6), d.linear_schedule(1000).respaced(5)
    x = mx.array(draws(0, 2, 1)[0])

    def counted(x, t):
        traces.append(t)
        return model(x, t)

    sampled = d.ddim_sample(mx.compile(counted), s, x, clip_x0=True)
    assert len(traces) == 1
    assert sampled.shape == x.shape


@each_side
@pytest.mark.parametrize("step", ["ddpm_step", "ddim_step"])
def test_step_0_adds_no_noise(side, step):
    s = side.diffusion.linear_schedule(10)
    settings = {"eta": 1.0} if step == "ddim_step" else {"variance": "beta"}
    take_step = partial(getattr(side.diffusion, step), lambda x, t: x, s, **settings)
    x, z, _ = (give(side, a) for a in draws(0, 2))
    t = give(side, np.array([0, 1]))
    with_noise, without = take(take_step(x, t, z)), take(take_step(x, t))
    assert np.array_equal(with_noise[0], without[0])
    assert (with_noise[1] != without[1]).all()


@each_side
@given(settings=linear_settings(), data=st.data())
def test_a_respaced_schedule_is_the_same_process(side, settings, data):
    """ᾱ and what the model is told are the chosen steps', and each β spans its own pair.

    An α is 1 - β, and β 1 - α, both rounded at the size of 1: so it is off by EPS64 / α of itself,
    besides its division. In a product these add up.
    """
    s = side.diffusion.linear_schedule(*settings)
    chosen = data.draw(st.sets(st.integers(0, len(s) - 1), min_size=1, max_size=10))
    r = s.respaced(sorted(chosen, reverse=True))
    assert list(r.timesteps) == sorted(chosen)
    rounded = 8 * np.cumsum(EPS64 / r.alphas)
    assert_within(r.alphas_cumprod / s.alphas_cumprod[r.timesteps], np.ones(len(r)), rounded)
    twice = r.respaced([len(r) - 1])
    assert list(twice.timesteps) == [max(chosen)]
    for spacing in side.diffusion.SPACINGS:
        assert np.array_equal(s.respaced(len(s), spacing).timesteps, s.timesteps)


@each_side
def test_spacings(side):
    s = side.diffusion.linear_schedule(1000)
    assert list(s.respaced(4).timesteps) == [0, 250, 500, 750]
    assert list(s.respaced(4, "linspace").timesteps) == [0, 333, 666, 999]
    assert list(s.respaced(4, "trailing").timesteps) == [249, 499, 749, 999]
    assert list(s.respaced(1, "linspace").timesteps) == [999]
    assert list(s.respaced([999, 5]).timesteps) == [5, 999]


# Targets


@each_side
@pytest.mark.parametrize("given_", TARGETS)
@pytest.mark.parametrize("asked", TARGETS)
@given(settings=linear_settings(), seed=seeds)
def test_epsilon_x0_and_v_follow_from_each_other(side, given_, asked, settings, seed):
    d = side.diffusion
    s = d.linear_schedule(*settings)
    every = give(side, np.arange(len(s)))
    x0, e, _ = (give(side, a) for a in draws(seed, len(s)))
    x_t = d.q_sample(s, x0, every, e)
    predict = getattr(d, f"predict_{asked}")
    found = predict(s, x_t, every, d.training_target(s, x0, every, e, given_), given_)
    expected = d.training_target(s, x0, every, e, asked)
    stretch = {"epsilon": np.sqrt(s.alphas_cumprod), "x0": np.sqrt(1 - s.alphas_cumprod)}
    size = 2 * (np.abs(take(x0)) + np.abs(take(e)))
    own = given_ in ("v", asked)
    bound = 8 * unit(side) * size / (1 if own else rows(stretch[given_]))
    bound += 8 * EPS64 * size / rows(1 - s.alphas_cumprod)
    assert_within(take(found), take(expected), bound)


@each_side
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_of_a_perfect_model_is_zero(side, target):
    d = side.diffusion
    s = d.cosine_schedule(50)
    x0, e, _ = (give(side, a) for a in draws(1, 50))
    t = give(side, np.arange(50))
    right = d.training_target(s, x0, t, e, target)
    assert float(d.loss(lambda *_: right, s, x0, t, e, target)) == 0
    off = float(d.loss(lambda *_: right + 0.5, s, x0, t, e, target))
    assert off == pytest.approx(0.25, rel=8 * EPS * np.abs(take(right)).max())


# Numbers known elsewhere


@each_side
def test_pinned_tables(side):
    """To half a unit of the last digit printed; those that are cut off there, to a whole one."""
    s = side.diffusion.linear_schedule()
    assert 0 <= s.alphas_cumprod[-1] - 4.0358297e-5 < 1e-12
    assert np.sqrt(s.alphas_cumprod[-1]) == pytest.approx(0.0063528, abs=5e-8)
    assert s.posterior_variance[0] == 0
    assert s.posterior_variance[487] == pytest.approx(0.00979, abs=5e-6)
    assert s.posterior_variance[999] == pytest.approx(0.02, abs=5e-3)
    assert s.posterior_variance[999] == pytest.approx(0.01999998, abs=5e-9)
    for pair, variance in (((420, 400), 0.14771), ((980, 960), 0.32460)):
        assert 0 <= s.respaced(pair).posterior_variance[1] - variance < 1e-5
    c = side.diffusion.cosine_schedule()
    assert c.alphas_cumprod[-1] == pytest.approx(2.4288e-9, abs=5e-14)
    assert np.flatnonzero(c.betas == 0.999).tolist() == [999]


@each_side
@pytest.mark.parametrize(("target", "public"), [("epsilon", 258.9606), ("v", 202.0296)])
def test_ddpm_loop_of_the_public_test(side, target, public):
    """Σ|x| that the tests of huggingface/diffusers expect of a dummy model.

    To within 1e-2, as they do: their tables are made in float32, ours in float64.
    """
    sample, noises, model = public_test(side)
    s = side.diffusion.linear_schedule()
    x = side.diffusion.ddpm_sample(model, s, sample, noises, target=target, clip_x0=True)
    assert np.abs(take(x)).sum() == pytest.approx(public, abs=1e-2)


@each_side
@pytest.mark.parametrize(("target", "public"), [("epsilon", 172.0067), ("v", 52.5302)])
def test_ddim_loop_of_the_public_test(side, target, public):
    sample, _, model = public_test(side)
    s = side.diffusion.linear_schedule().respaced(10)
    x = side.diffusion.ddim_sample(model, s, sample, target=target, clip_x0=True)
    assert np.abs(take(x)).sum() == pytest.approx(public, abs=1e-2)


def public_test(side: Side):
    """A ramp of numbers for images (4, 3, 8, 8), seeded noise, and a model x t / (t + 1)."""
    size = 4 * 3 * 8 * 8
    ramp = (np.arange(size, dtype=np.float32) / size).reshape(3, 8, 8, 4).transpose(3, 1, 2, 0)
    generator = torch.Generator().manual_seed(0)

    def noises():
        while True:
            drawn = torch.randn(4, 3, 8, 8, generator=generator).numpy()
            yield side.images(drawn.transpose(0, 2, 3, 1).copy())

    def model(x, t):
        t = (t / (t + 1)).reshape(-1, 1, 1, 1)
        return x * t

    return side.images(ramp.copy()), noises(), model


# The embedding


@each_side
@given(dim=st.integers(4, 300), seed=seeds)
def test_embedding_is_hos(side, dim, seed):
    """Sines first, the exponent over half - 1. An angle t f is rounded: off by t f of a unit."""
    t = np.random.default_rng(seed).integers(0, 1000, 7)
    found = take(side.diffusion.sinusoidal_embedding(side.array(t), dim))
    half = dim // 2
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
    assert found.shape == (7, dim)
    assert_within(found[:, :half], np.sin(angles), 8 * EPS * (1 + angles))
    assert_within(found[:, half : 2 * half], np.cos(angles), 8 * EPS * (1 + angles))
    assert (found[:, 2 * half :] == 0).all()


# The average of the weights


def layer(side: Side, seed: int):
    rng = np.random.default_rng(seed)
    weight, bias = (rng.standard_normal(n).astype(np.float32) for n in ((3, 2), 3))
    if side is MLX:
        model = nn.Linear(2, 3)
        model.load_weights([("weight", mx.array(weight)), ("bias", mx.array(bias))])
        return model
    model = torch.nn.Linear(2, 3)
    model.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return model


def weight(model) -> np.ndarray:
    return take(model.weight.detach() if isinstance(model, torch.nn.Module) else model.weight)


@each_side
@given(decay=st.floats(0, 0.99999), seed=seeds, updates=st.integers(0, 5))
def test_ema_is_pytorchs(side, decay, seed, updates):
    """``AveragedModel``, whose first call only copies: what ours does when it is made."""
    model = layer(TORCH, seed)
    theirs = AveragedModel(model.double(), multi_avg_fn=get_ema_multi_avg_fn(decay))
    theirs.update_parameters(model)
    ours = side.diffusion.EMA(layer(side, seed), decay)
    for i in range(updates):
        theirs.update_parameters(layer(TORCH, seed + 1 + i).double())
        ours.update_parameters(layer(side, seed + 1 + i))
    assert_within(weight(ours.average), weight(theirs.module), 2 * (1 + updates) * EPS * 5)


def test_ema_copies_what_is_not_trained():
    for side in (TORCH, MLX):
        model = torch.nn.BatchNorm1d(2) if side is TORCH else nn.BatchNorm(2)
        ema = side.diffusion.EMA(model, 0.9)
        model.running_mean = side.array(np.array([3.0, 4.0], np.float32))
        model.weight = torch.nn.Parameter(torch.zeros(2)) if side is TORCH else mx.zeros(2)
        ema.update_parameters(model)
        assert take(ema.average.running_mean).tolist() == [3, 4]
        np.testing.assert_allclose(weight(ema.average), 0.9, rtol=2 * EPS)


@compiles
def test_ema_goes_through_a_compiled_step_and_a_file(tmp_path):
    """That the compiled step is the uncompiled one, is held in test_cli.py."""
    d, rng = mlx_impl.diffusion, np.random.default_rng(0)
    s = d.linear_schedule(10)
    arrays = [
        mx.array(rng.standard_normal((2, 3, 4, 1)).astype(np.float32)),
        mx.array([3, 9]),
        mx.array(rng.standard_normal((2, 3, 4, 1)).astype(np.float32)),
    ]
    plain = d.Denoiser(1, 4, 6)
    model = copy.deepcopy(plain)
    ema, optimizer = d.EMA(model, 0.5), d.make_optimizer(model)
    take_step = compile_step(partial(d.ema_train_step, schedule=s), model, ema, optimizer)
    for _ in range(3):
        mx.eval(take_step(*arrays), model.state, ema.state, optimizer.state)
    moved, model_moved = (
        np.abs(take(m.fc.weight) - take(plain.fc.weight)).max() for m in (ema.average, model)
    )
    assert 0 < moved < model_moved  # it follows
    ema.save_weights(str(tmp_path / "ema.safetensors"))
    again = d.EMA(plain, 0.5)
    again.load_weights(str(tmp_path / "ema.safetensors"))
    assert mx.array_equal(again(*arrays[:2]), ema(*arrays[:2]))


# Types


@each_side
def test_half_precision_stays_half(side):
    lib = torch if side is TORCH else mx
    cast = (lambda a: a.to(lib.bfloat16)) if side is TORCH else (lambda a: a.astype(lib.bfloat16))
    s = side.diffusion.linear_schedule()
    x, e, _ = (cast(give(side, a)) for a in draws(0, 2))
    t = side.array(np.array([500, 999]))
    assert side.diffusion.q_sample(s, x, t, e).dtype == lib.bfloat16
    assert side.diffusion.ddim_step(lambda x, _: x, s, x, t, e, eta=1.0).dtype == lib.bfloat16
    embedded = side.diffusion.sinusoidal_embedding(t, 8, lib.bfloat16)
    assert embedded.dtype == lib.bfloat16
    late = side.array(np.array([998, 999]))  # bfloat16 has 8 bits: both would be 1000
    near = take(cast_up(side.diffusion.sinusoidal_embedding(late, 8, lib.bfloat16)))
    assert np.abs(near[0] - near[1]).max() > 0.1


def cast_up(array):
    return array.float() if isinstance(array, torch.Tensor) else array.astype(mx.float32)


# Bad input


@each_side
@pytest.mark.parametrize(
    ("timesteps", "error", "message"),
    [
        ([0, 10], IndexError, "timestep 10 is outside the schedule: its 10 steps are 0 to 9"),
        ([-1, 3], IndexError, "timestep -1 is outside"),
        ([0.0, 1.0], TypeError, "array of integers, got .*float"),
        ([True, False], TypeError, "array of integers, got .*bool"),
        ([[0], [1]], ValueError, r"must be \(B,\), one for each image, got shape \(2, 1\)"),
        ([1], ValueError, "1 timesteps for 2 images"),
    ],
)
def test_bad_timesteps(side, timesteps, error, message):
    d = side.diffusion
    s = d.linear_schedule(10)
    t = side.array(np.array(timesteps))
    x, e, _ = (give(side, a) for a in draws(0, 2))
    for call in (
        lambda: d.q_sample(s, x, t, e),
        lambda: d.predict_x0(s, x, t, e),
        lambda: d.posterior_mean_variance(s, x, e, t),
        lambda: d.loss(lambda x, _: x, s, x, t, e),
        lambda: d.ddpm_step(lambda x, _: x, s, x, t, e),
        lambda: d.ddim_step(lambda x, _: x, s, x, t, e),
    ):
        with pytest.raises(error, match=message):
            call()
    if len(timesteps) == 2:
        with pytest.raises(error, match=message):
            d.check_timesteps(s, t)


def test_bad_timesteps_of_a_list():
    with pytest.raises(TypeError, match="array of integers, got list"):
        reference.diffusion.check_timesteps(reference.diffusion.linear_schedule(), [1, 2])


@each_side
def test_shapes_that_would_broadcast(side):
    d = side.diffusion
    s = d.linear_schedule(10)
    x, _, _ = (give(side, a) for a in draws(0, 2))
    t = side.array(np.array([0, 1]))
    for call in (
        lambda: d.q_sample(s, x, t, x[:1]),
        lambda: d.training_target(s, x, t, x[:1], "v"),
        lambda: d.predict_v(s, x, t, x[:, :1]),
        lambda: d.posterior_mean_variance(s, x[:1], x, t),
        lambda: d.ddpm_step(lambda x, _: x, s, x, t, x[:1]),
        lambda: d.loss(lambda x, _: x[:, :1], s, x, t, x),
    ):
        with pytest.raises(ValueError, match=r"shape \(.*\)"):
            call()


@each_side
def test_unknown_choices_are_named(side):
    d = side.diffusion
    s = d.linear_schedule(10)
    x, e, _ = (give(side, a) for a in draws(0, 2))
    t = side.array(np.array([0, 1]))
    for call, message in (
        (lambda: d.loss(lambda x, _: x, s, x, t, e, "eps"), "unknown target 'eps': choose one of"),
        (lambda: d.predict_x0(s, x, t, e, "x_0"), "unknown target 'x_0'"),
        (lambda: d.predict_epsilon(s, x, t, e, "x_0"), "unknown target 'x_0'"),
        (lambda: d.predict_v(s, x, t, e, "x_0"), "unknown target 'x_0'"),
        (
            lambda: d.ddpm_step(lambda x, _: x, s, x, t, e, "learned"),
            "unknown variance 'learned': choose one of 'beta', 'beta_tilde'",
        ),
        (lambda: d.ddpm_sample(lambda x, _: x, s, x, [], "small"), "unknown variance 'small'"),
        (lambda: s.respaced(3, "even"), "unknown spacing 'even': .* 'leading', 'linspace'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@each_side
def test_bad_schedules(side):
    d = side.diffusion
    for call, message in (
        (lambda: d.linear_schedule(0), "timesteps must be an integer of at least 1, got 0"),
        (lambda: d.cosine_schedule(2.5), "timesteps must be an integer of at least 1, got 2.5"),
        (lambda: d.linear_schedule(10, 0.0), "between 0 and 1, and be neither: number 0 is 0.0"),
        (lambda: d.linear_schedule(10, 0.1, 1.0), "number 9 is 1.0"),
        (lambda: d.linear_schedule(10, float("nan")), "number 0 is nan"),
        (lambda: d.linear_schedule(1000, 0.2, 0.9), "which is 0 in float32: take smaller ones"),
        (lambda: d.cosine_schedule(10, s=-0.1), "s must not be negative"),
        (lambda: d.Schedule(np.full((2, 2), 0.1)), r"betas must be \(T,\)"),
        (lambda: d.Schedule(np.array([])), "T of at least 1"),
        (lambda: d.Schedule(np.array([0.1]), np.arange(2)), "2 model_timesteps for 1 betas"),
        (lambda: d.linear_schedule(10).respaced(11), "from 1 to the schedule's 10, got 11"),
        (lambda: d.linear_schedule(10).respaced(0), "from 1 to the schedule's 10, got 0"),
        (lambda: d.linear_schedule(10).respaced([1, 5]), r"must fall .* got \[1, 5\]"),
        (lambda: d.linear_schedule(10).respaced([5, 5]), "must fall"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(IndexError, match="timestep 10 is outside"):
        d.linear_schedule(10).respaced([10, 5])
    with pytest.raises(TypeError, match="integers, got float64"):
        d.linear_schedule(10).respaced([5.5, 1.0])


def test_a_step_of_sampling_is_looked_at_while_the_next_one_runs():
    d, told = mlx_impl.diffusion, []

    def model(x, t):
        told.append(t[0].item())
        return x * (float("nan") if told[-1] == 6 else 1)

    x = mx.array(draws(0, 1, 1)[0])
    with pytest.raises(FloatingPointError, match="after step 6 of 10"):
        d.ddim_sample(model, d.linear_schedule(10), x)
    assert told == [9, 8, 7, 6, 5]


@each_side
def test_bad_samplers(side):
    d = side.diffusion
    s = d.linear_schedule(10)
    x, *noises = (give(side, a[:1]) for a in draws(0, 1, 10))
    broken = x * float("nan")
    for call, error, message in (
        (lambda: d.ddpm_sample(id_, s, x, noises[:4]), ValueError, "too early: .* need 9, one for"),
        (lambda: d.ddim_sample(id_, s, x, eta=0.5), ValueError, "step_noises ended too early"),
        (lambda: d.ddim_sample(id_, s, x, noises, eta=1.5), ValueError, "eta must be from 0"),
        (lambda: d.ddim_sample(id_, s, x, noises, eta=float("nan")), ValueError, "eta must be"),
        (lambda: d.ddim_sample(id_, s, broken), ValueError, "to start from holds NaN"),
        (
            lambda: d.ddim_sample(lambda x, t: x / (0 * x), s, x),
            FloatingPointError,
            "NaN or infinity after step 9 of 10: look at what the model returns",
        ),
        (lambda: d.ddpm_sample(id_, s, x, [broken] * 9), FloatingPointError, "noise of that step"),
        (lambda: d.EMA(d.Denoiser(1, 2, 4), 1.0), ValueError, "decay must be at least 0"),
        (lambda: d.sinusoidal_embedding(give(side, np.arange(2)), 3), ValueError, "at least 4"),
        (lambda: d.sinusoidal_embedding(x, 8), ValueError, r"must be \(B,\)"),
    ):
        with pytest.raises(error, match=message):
            call()


def id_(x, timesteps):
    return x


@compiles
@pytest.mark.parametrize("timestep", [-1, 10, 10**6])
def test_a_compiled_step_cannot_raise_and_gives_nan(timestep):
    """Beside the table MLX would read zeros or whatever is there; compiled code has no errors."""
    d = mlx_impl.diffusion
    s = d.linear_schedule(10)
    x, e, _ = (give(MLX, a) for a in draws(0, 2))
    t = mx.array([3, timestep])
    noised = take(mx.compile(partial(d.q_sample, s))(x, t, e))
    assert np.isfinite(noised[0]).all()
    assert np.isnan(noised[1]).all()
    model = d.Denoiser(1, 4, 6)
    loss = mx.compile(lambda x, t, e: d.loss(model, s, x, t, e))(x, t, e)
    assert np.isnan(loss.item())
    with pytest.raises(IndexError, match=f"timestep {timestep} is outside"):
        d.loss(model, s, x, t, e)
