"""Denoising diffusion of document 004, in MLX: the process, its samplers, and a small denoiser.

Sources
    Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239), called Ho here.
    Nichol and Dhariwal 2021 (arXiv 2102.09672): the cosine schedule. Song et al. 2021 (arXiv
    2010.02502): DDIM. Salimans and Ho 2022 (arXiv 2202.00512): predicting v.
    Document 004, whose forward process keeps nothing of the image (004-E12), whose reverse process
    is none (004-E15) and whose loss is least at the mean of the data (004-E18); see ERRATA.md.

Steps count from 0, the paper's from 1: step 0 adds the first noise, and sampling ends with it.
Tables are made in float64 and rounded once, to the type of the images: made in float32 they are off
by up to 2.3e-3 of themselves (004-E29). Images and noise are (B, H, W, C), timesteps are integers
(B,), and a model is any callable of both that returns an array of the images' shape.

A timestep outside the schedule is an error wherever its value can be read. A compiled step cannot
read it, and MLX would read another number from beside the table; here it reads NaN, so that the
loss is NaN rather than wrong. A loop can call :func:`check_timesteps` before the compiled step.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_impl.layers import Conv2d, Linear, relu
from mlx_impl.optimizers import Adam
from mlx_impl.precision import raised

Model = Callable[[mx.array, mx.array], mx.array]
Target = Literal["epsilon", "x0", "v"]
Variance = Literal["beta", "beta_tilde"]
Spacing = Literal["leading", "linspace", "trailing"]

TARGETS = ("epsilon", "x0", "v")
VARIANCES = ("beta", "beta_tilde")
SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise each of T steps adds: the variances ``betas`` (T,), all in (0, 1).

    Every other table (T,) follows from them, in float64. No table is an array of the framework, so
    none can become a parameter of a module that holds a schedule. ``model_timesteps`` (T,) is what
    a model is told of each step, its number by default; :meth:`respaced` sets it.

    Raises ValueError: betas that are no such numbers, or leave nothing of the image in float32.
    """

    betas: np.ndarray
    model_timesteps: np.ndarray | None = None

    def __post_init__(self) -> None:
        betas = _read_only(np.array(self.betas, np.float64))
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(f"betas must be (T,) with T of at least 1, got shape {betas.shape}")
        wrong = np.flatnonzero(~((betas > 0) & (betas < 1)))
        if wrong.size:
            raise ValueError(
                f"betas must lie between 0 and 1, and be neither: number {wrong[0]} is "
                f"{betas[wrong[0]]}"
            )
        object.__setattr__(self, "betas", betas)
        if self.timesteps.shape != betas.shape:
            raise ValueError(f"{len(self.timesteps)} model_timesteps for {len(betas)} betas")
        left = math.sqrt(self.alphas_cumprod[-1])
        if left < np.finfo(np.float32).tiny:
            raise ValueError(
                f"these {len(betas)} betas leave {left:.1e} of the image, which is 0 in float32: "
                "take smaller ones or fewer"
            )

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def timesteps(self) -> np.ndarray:
        """What a model is told of each step, integers."""
        if self.model_timesteps is None:
            return _read_only(np.arange(len(self)))
        return _read_only(np.array(self.model_timesteps))

    @cached_property
    def alphas(self) -> np.ndarray:
        """1 - β (Ho, section 2)."""
        return _read_only(1 - self.betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ: the products of α up to each step, falling (Ho, section 2)."""
        return _read_only(np.cumprod(self.alphas))

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """ᾱ of the step before; 1 before the first."""
        return _read_only(np.append(1.0, self.alphas_cumprod[:-1]))

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """β̃, the variance of q(x_{t-1} | x_t, x_0): 0 at step 0 (Ho Eq. 7)."""
        return _read_only(self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod))

    @cached_property
    def posterior_mean_x0(self) -> np.ndarray:
        """What x_0 contributes to the mean of q(x_{t-1} | x_t, x_0) (Ho Eq. 7)."""
        return _read_only(
            self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        )

    @cached_property
    def posterior_mean_xt(self) -> np.ndarray:
        """What x_t contributes to the mean of q(x_{t-1} | x_t, x_0) (Ho Eq. 7)."""
        return _read_only(
            (1 - self.alphas_cumprod_prev) * np.sqrt(self.alphas) / (1 - self.alphas_cumprod)
        )

    def respaced(self, steps: int | Sequence[int], spacing: Spacing = "leading") -> "Schedule":
        """The same process in fewer steps: ``steps`` many, spaced evenly, or just these.

        Step i of the result leads from ``steps[i]`` to the step that follows it in the sequence,
        whatever the spacing, since it has that pair's own β: ``1 - ᾱ_t / ᾱ_previous``. A model
        goes on being told the steps of the schedule that it was trained with.

        "leading" counts up from step 0, as DDIM does, and leaves out the noisiest steps;
        "trailing" counts down from the last; "linspace" has both ends. A sequence is strictly
        falling, as a sampler goes through it. Raises ValueError, TypeError.
        """
        if isinstance(steps, int | np.integer):
            chosen = _spaced(len(self), int(steps), spacing)
        else:
            chosen = np.array(steps)
            check_timesteps(self, chosen)
            if (np.diff(chosen) >= 0).any():
                raise ValueError(f"timesteps must fall from each to the next, got {list(steps)}")
        chosen = chosen[::-1]
        kept = self.alphas_cumprod[chosen]
        return Schedule(1 - kept / np.append(1.0, kept[:-1]), self.timesteps[chosen])


def linear_schedule(
    timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Schedule:
    """β from ``beta_start`` to ``beta_end`` in equal steps (Ho, section 4). Raises ValueError."""
    _check_count(timesteps)
    return Schedule(np.linspace(beta_start, beta_end, timesteps, dtype=np.float64))


def cosine_schedule(timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """ᾱ falls as a squared cosine (Nichol and Dhariwal 2021, Eq. 17); β is cut off at ``max_beta``.

    ``s`` keeps the first β from being too small to learn from. Raises ValueError.
    """
    _check_count(timesteps)
    if not s >= 0:
        raise ValueError(f"s must not be negative, got {s}")
    f = np.cos((np.arange(timesteps + 1) / timesteps + s) / (1 + s) * np.pi / 2) ** 2
    return Schedule(np.minimum(1 - f[1:] / f[:-1], max_beta))


def check_timesteps(schedule: Schedule, timesteps: Any) -> None:
    """Raise unless ``timesteps`` (B,), of any library, are integers in 0 ... T - 1.

    TypeError: not integers. ValueError: not (B,). IndexError: outside the schedule. Values that
    are not known yet, inside a compiled step, pass.
    """
    dtype = str(getattr(timesteps, "dtype", type(timesteps).__name__))
    if "int" not in dtype:
        raise TypeError(f"timesteps must be an array of integers, got {dtype}")
    if timesteps.ndim != 1 or timesteps.shape[0] == 0:
        raise ValueError(
            f"timesteps must be (B,), one for each image, got shape {tuple(timesteps.shape)}"
        )
    try:
        values = np.array(timesteps)
    except ValueError:  # being compiled: MLX has no values yet
        return
    wrong = values[(values < 0) | (values >= len(schedule))]
    if wrong.size:
        raise IndexError(
            f"timestep {wrong[0]} is outside the schedule: its {len(schedule)} steps are 0 to "
            f"{len(schedule) - 1}"
        )


def q_sample(schedule: Schedule, x0: mx.array, timesteps: mx.array, noise: mx.array) -> mx.array:
    """``x_t = √ᾱ x_0 + √(1 - ᾱ) ε``: images after t + 1 steps of noise, at once (Ho Eq. 4).

    x0 and noise (B, ..., C), timesteps (B,). Raises as :func:`check_timesteps`, and ValueError for
    shapes that differ.
    """
    _check(schedule, x0, timesteps, noise=noise)
    return _signal(schedule, timesteps, x0) * x0 + _spread(schedule, timesteps, x0) * noise


def predict_x0(
    schedule: Schedule,
    x_t: mx.array,
    timesteps: mx.array,
    prediction: mx.array,
    target: Target = "epsilon",
) -> mx.array:
    """The x_0 that ``prediction`` of ε, x_0 or v implies at x_t; all (B, ..., C)."""
    _check(schedule, x_t, timesteps, prediction=prediction)
    signal, spread = _signal(schedule, timesteps, x_t), _spread(schedule, timesteps, x_t)
    if target == "epsilon":
        return (x_t - spread * prediction) / signal
    if target == "x0":
        return prediction
    if target == "v":
        return signal * x_t - spread * prediction
    raise _unknown("target", target, TARGETS)


def predict_epsilon(
    schedule: Schedule,
    x_t: mx.array,
    timesteps: mx.array,
    prediction: mx.array,
    target: Target = "epsilon",
) -> mx.array:
    """The noise ε that ``prediction`` of ε, x_0 or v implies at x_t; all (B, ..., C)."""
    _check(schedule, x_t, timesteps, prediction=prediction)
    signal, spread = _signal(schedule, timesteps, x_t), _spread(schedule, timesteps, x_t)
    if target == "epsilon":
        return prediction
    if target == "x0":
        return (x_t - signal * prediction) / spread
    if target == "v":
        return spread * x_t + signal * prediction
    raise _unknown("target", target, TARGETS)


def predict_v(
    schedule: Schedule,
    x_t: mx.array,
    timesteps: mx.array,
    prediction: mx.array,
    target: Target = "epsilon",
) -> mx.array:
    """The v that ``prediction`` of ε, x_0 or v implies at x_t; all (B, ..., C).

    ``v = √ᾱ ε - √(1 - ᾱ) x_0`` (Salimans and Ho 2022, section 4).
    """
    _check(schedule, x_t, timesteps, prediction=prediction)
    signal, spread = _signal(schedule, timesteps, x_t), _spread(schedule, timesteps, x_t)
    if target == "epsilon":
        return (prediction - spread * x_t) / signal
    if target == "x0":
        return (signal * x_t - prediction) / spread
    if target == "v":
        return prediction
    raise _unknown("target", target, TARGETS)


def training_target(
    schedule: Schedule,
    x0: mx.array,
    timesteps: mx.array,
    noise: mx.array,
    target: Target = "epsilon",
) -> mx.array:
    """What the model learns to return for ``q_sample(schedule, x0, timesteps, noise)``."""
    if target == "epsilon":
        return noise
    if target == "x0":
        return x0
    if target == "v":
        _check(schedule, x0, timesteps, noise=noise)
        return _signal(schedule, timesteps, x0) * noise - _spread(schedule, timesteps, x0) * x0
    raise _unknown("target", target, TARGETS)


def loss(
    model: Model,
    schedule: Schedule,
    x0: mx.array,
    timesteps: mx.array,
    noise: mx.array,
    target: Target = "epsilon",
) -> mx.array:
    """L_simple (Ho Eq. 14): the mean square of what ``model(x_t, t)`` is off from its target.

    x0 (B, ..., C) in [-1, 1], timesteps (B,), standard normal noise (B, ..., C); a scalar, the mean
    over images and elements. One call of the model. Raises as :func:`q_sample`, and ValueError for
    an unknown target or a model that returns another shape.
    """
    expected = training_target(schedule, x0, timesteps, noise, target)
    x_t = q_sample(schedule, x0, timesteps, noise)
    return (raised(_call(model, schedule, x_t, timesteps)) - expected).square().mean()


def posterior_mean_variance(
    schedule: Schedule, x0: mx.array, x_t: mx.array, timesteps: mx.array
) -> tuple[mx.array, mx.array]:
    """Mean (B, ..., C) and variance (B, 1, ...) of q(x_{t-1} | x_t, x_0): Ho Eq. 6 and 7."""
    _check(schedule, x_t, timesteps, x0=x0)
    mean = (
        _at(schedule, schedule.posterior_mean_x0, timesteps, x_t) * x0
        + _at(schedule, schedule.posterior_mean_xt, timesteps, x_t) * x_t
    )
    return mean, _at(schedule, schedule.posterior_variance, timesteps, x_t)


def ddpm_step(
    model: Model,
    schedule: Schedule,
    x_t: mx.array,
    timesteps: mx.array,
    noise: mx.array | None = None,
    variance: Variance = "beta_tilde",
    target: Target = "epsilon",
    clip_x0: bool = False,
) -> mx.array:
    """One step of ancestral sampling, x_t to x_{t-1} (Ho Algorithm 2, line 4); all (B, ..., C).

    ``variance`` of the noise is β or β̃ (Ho, section 3.2); step 0 adds none, and without ``noise``
    no step does. ``clip_x0`` cuts the x_0 that the model implies to [-1, 1], the range of images.
    The mean is Eq. 7's, which without clipping is Eq. 11's. Raises as :func:`predict_x0`.
    """
    prediction = _call(model, schedule, x_t, timesteps)
    x0 = predict_x0(schedule, x_t, timesteps, prediction, target)
    if clip_x0:
        x0 = mx.clip(x0, -1, 1)
    mean, _ = posterior_mean_variance(schedule, x0, x_t, timesteps)
    sigma = np.sqrt(_variance(schedule, variance))
    return _add_noise(schedule, mean, sigma, timesteps, noise)


def ddim_step(
    model: Model,
    schedule: Schedule,
    x_t: mx.array,
    timesteps: mx.array,
    noise: mx.array | None = None,
    eta: float = 0.0,
    target: Target = "epsilon",
    clip_x0: bool = False,
) -> mx.array:
    """One step of DDIM, x_t to the step before it in ``schedule`` (Song et al. 2021, Eq. 12, 16).

    All (B, ..., C). ``eta`` from 0, no noise, to 1, the noise of DDPM with β̃. With ``clip_x0`` the
    ε that goes with the clipped x_0 is taken, so that both still make up x_t, and eta = 1 still is
    DDPM. Raises as :func:`predict_x0`, and ValueError for eta outside [0, 1].
    """
    _check_eta(eta)
    prediction = _call(model, schedule, x_t, timesteps)
    x0 = predict_x0(schedule, x_t, timesteps, prediction, target)
    epsilon = predict_epsilon(schedule, x_t, timesteps, prediction, target)
    if clip_x0:
        x0 = mx.clip(x0, -1, 1)
        epsilon = predict_epsilon(schedule, x_t, timesteps, x0, "x0")
    kept = schedule.alphas_cumprod_prev
    # Of the variance at the step before, this share is drawn anew; ε points the way to the rest.
    share = np.minimum(eta**2 * schedule.betas / (1 - schedule.alphas_cumprod), 1)
    mean = (
        _at(schedule, np.sqrt(kept), timesteps, x_t) * x0
        + _at(schedule, np.sqrt((1 - kept) * (1 - share)), timesteps, x_t) * epsilon
    )
    return _add_noise(schedule, mean, np.sqrt((1 - kept) * share), timesteps, noise)


def ddpm_sample(
    model: Model,
    schedule: Schedule,
    noise: mx.array,
    step_noises: Iterable[mx.array],
    variance: Variance = "beta_tilde",
    target: Target = "epsilon",
    clip_x0: bool = False,
) -> mx.array:
    """Images from standard normal ``noise``, both (B, ..., C): Ho Algorithm 2, all T steps.

    ``step_noises`` yields the noise (B, ..., C) of every step but the last, T - 1 in all: a list, a
    stacked array, or a generator that draws it. Put the model in evaluation mode first. Each step
    is evaluated while the next is prepared, so that the graph stays as small as two; what can be
    compiled is the model, with :class:`mlx_impl.training.CompiledModel`.

    Raises as :func:`ddpm_step`; ValueError for noise that is not finite or ends too early;
    FloatingPointError where the samples cease to be finite.
    """
    _variance(schedule, variance)
    noises = iter(step_noises)

    def step(x: mx.array, timesteps: mx.array, last: bool) -> mx.array:
        z = None if last else _next(noises, len(schedule) - 1)
        return ddpm_step(model, schedule, x, timesteps, z, variance, target, clip_x0)

    return _sample(step, schedule, noise)


def ddim_sample(
    model: Model,
    schedule: Schedule,
    noise: mx.array,
    step_noises: Iterable[mx.array] = (),
    eta: float = 0.0,
    target: Target = "epsilon",
    clip_x0: bool = False,
) -> mx.array:
    """Images from standard normal ``noise``, both (B, ..., C), in all steps of ``schedule``.

    Usually a respaced one: ``ddim_sample(model, schedule.respaced(50), noise)``. ``step_noises`` as
    in :func:`ddpm_sample`, needed for eta above 0 only. Raises as :func:`ddim_step` and
    :func:`ddpm_sample`.
    """
    _check_eta(eta)
    noises = iter(step_noises)

    def step(x: mx.array, timesteps: mx.array, last: bool) -> mx.array:
        z = None if last or eta == 0 else _next(noises, len(schedule) - 1)
        return ddim_step(model, schedule, x, timesteps, z, eta, target, clip_x0)

    return _sample(step, schedule, noise)


def sinusoidal_embedding(timesteps: mx.array, dim: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Timesteps (B,) to (B, dim): sines, then cosines, of wavelengths from 2π to 20,000π.

    Ho's: frequencies ``10000^(-i / (half - 1))``, a last column of zeros where ``dim`` is odd. Not
    the only one about: others put the cosines first, or divide by ``half`` (004-E9). Raises
    ValueError for ``dim`` below 4, which has no two frequencies, and timesteps that are not (B,).
    """
    if dim < 4:
        raise ValueError(f"dim must be at least 4, two sines and two cosines, got {dim}")
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps must be (B,), got shape {timesteps.shape}")
    half = dim // 2
    frequencies = np.exp(-math.log(10000) / (half - 1) * np.arange(half))
    # In float32 at least: in half precision, neighbouring timesteps are one.
    angles = timesteps[:, None].astype(mx.float32) * mx.array(frequencies, dtype=mx.float32)
    embedding = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=1)  # (B, 2 * half)
    return mx.pad(embedding, [(0, 0), (0, dim % 2)]).astype(dtype)


class Denoiser(nn.Module):
    """Noisy images (B, H, W, C) and their timesteps (B,) to a prediction (B, H, W, C).

    The document's two convolutions, of 128 channels between them. Its ``fc`` took a noise vector
    of 100 numbers as a GAN's generator does (004-E4); here it takes the 100 numbers that tell the
    timestep, which the document left out (004-E9), and its result is added between the two. No
    tanh at the end: ε has no bounds (004-E8).
    """

    def __init__(self, channels: int = 3, width: int = 128, embedding_dim: int = 100):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.fc = Linear(embedding_dim, width)
        self.conv1 = Conv2d(channels, width, kernel_size=3, stride=1, padding=1)
        self.conv2 = Conv2d(width, channels, kernel_size=3, stride=1, padding=1)

    def __call__(self, x: mx.array, timesteps: mx.array) -> mx.array:
        t = self.fc(sinusoidal_embedding(timesteps, self.embedding_dim, x.dtype))  # (B, width)
        x = relu(self.conv1(x) + t[:, None, None, :])  # (B, H, W, width)
        return self.conv2(x)


class EMA(nn.Module):
    """A model whose weights are a running average of another's: Ho, appendix B.

    ``average`` starts as a copy of ``model`` and is what to sample with; calling this calls it. Its
    state goes in and out of a compiled step, and into a file, as any module's does. ``decay`` in
    [0, 1); raises ValueError.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.average = copy.deepcopy(model)
        self.average.freeze()
        self.average.eval()

    def __call__(self, *args: Any) -> Any:
        return self.average(*args)

    def update_parameters(self, model: nn.Module) -> None:
        """``average += (1 - decay) * (model - average)``; what is not trained is copied."""
        trained = dict(tree_flatten(model.trainable_parameters()))
        averages = dict(tree_flatten(self.average.parameters()))
        renewed = []
        for name, value in dict(tree_flatten(model.parameters())).items():
            a = averages[name]
            renewed.append((name, a + (1 - self.decay) * (value - a) if name in trained else value))
        self.average.update(tree_unflatten(renewed))


def make_optimizer(module: nn.Module) -> Adam:
    """Adam with the document's learning rate, which is also Ho's (appendix B)."""
    optimizer = Adam(learning_rate=2e-4)
    optimizer.init(module.trainable_parameters())  # before a compiled step captures its state
    return optimizer


def train_step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    images: mx.array,
    timesteps: mx.array,
    noise: mx.array,
    schedule: Schedule,
    target: Target = "epsilon",
) -> mx.array:
    """One step of Ho Algorithm 1 on images (B, H, W, C) in [-1, 1]; returns its loss.

    The loop draws ``timesteps`` (B,) evenly from the schedule's and standard normal ``noise``. To
    compile: ``compile_step(partial(train_step, schedule=schedule), model, optimizer)``. Raises as
    :func:`loss`.
    """

    def loss_fn(model: nn.Module) -> mx.array:
        return loss(model, schedule, images, timesteps, noise, target)

    value, grads = nn.value_and_grad(model, loss_fn)(model)
    optimizer.update(model, grads)
    return value


def ema_train_step(
    model: nn.Module,
    ema: EMA,
    optimizer: optim.Optimizer,
    images: mx.array,
    timesteps: mx.array,
    noise: mx.array,
    schedule: Schedule,
    target: Target = "epsilon",
) -> mx.array:
    """:func:`train_step`, after which the average follows the model."""
    value = train_step(model, optimizer, images, timesteps, noise, schedule, target)
    ema.update_parameters(model)
    return value


def _read_only(table: np.ndarray) -> np.ndarray:
    table.setflags(write=False)
    return table


def _check_count(timesteps: int) -> None:
    if not isinstance(timesteps, int | np.integer) or timesteps < 1:
        raise ValueError(f"timesteps must be an integer of at least 1, got {timesteps!r}")


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 (DDIM) to 1 (DDPM), got {eta}")


def _unknown(what: str, given: object, choices: Sequence[str]) -> ValueError:
    return ValueError(f"unknown {what} {given!r}: choose one of {', '.join(map(repr, choices))}")


def _spaced(timesteps: int, steps: int, spacing: Spacing) -> np.ndarray:
    """``steps`` of 0 ... timesteps - 1, falling."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must be from 1 to the schedule's {timesteps}, got {steps}")
    if spacing == "leading":
        return np.arange(steps)[::-1] * (timesteps // steps)
    if spacing == "linspace":
        down = np.arange(steps) * (timesteps - 1) / max(steps - 1, 1)
        return np.rint(timesteps - 1 - down).astype(int)
    if spacing == "trailing":
        return np.rint(timesteps - np.arange(steps) * timesteps / steps).astype(int) - 1
    raise _unknown("spacing", spacing, SPACINGS)


def _variance(schedule: Schedule, variance: Variance) -> np.ndarray:
    """The variance of the noise that each step of DDPM adds; none at step 0."""
    if variance == "beta":
        return np.append(0.0, schedule.betas[1:])
    if variance == "beta_tilde":
        return schedule.posterior_variance
    raise _unknown("variance", variance, VARIANCES)


def _check(schedule: Schedule, x: mx.array, timesteps: mx.array, **others: mx.array) -> None:
    check_timesteps(schedule, timesteps)
    if x.shape[0] != timesteps.shape[0]:
        raise ValueError(f"{timesteps.shape[0]} timesteps for {x.shape[0]} images")
    for name, other in others.items():
        if other.shape != x.shape:  # they might broadcast
            raise ValueError(f"{name} has shape {tuple(other.shape)}, the images {tuple(x.shape)}")


def _at(schedule: Schedule, table: np.ndarray, timesteps: mx.array, like: mx.array) -> mx.array:
    """The table's entries at ``timesteps``, (B, 1, ...) in the type of ``like``.

    NaN outside the table, where indexing would read whatever lies there.
    """
    padded = mx.array(np.concatenate([[np.nan], table, [np.nan]]), dtype=mx.float32)
    entries = padded[mx.clip(timesteps, -1, len(schedule)) + 1]
    return entries.astype(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _signal(schedule: Schedule, timesteps: mx.array, like: mx.array) -> mx.array:
    """√ᾱ."""
    return _at(schedule, np.sqrt(schedule.alphas_cumprod), timesteps, like)


def _spread(schedule: Schedule, timesteps: mx.array, like: mx.array) -> mx.array:
    """√(1 - ᾱ)."""
    return _at(schedule, np.sqrt(1 - schedule.alphas_cumprod), timesteps, like)


def _call(model: Model, schedule: Schedule, x_t: mx.array, timesteps: mx.array) -> mx.array:
    """The model's answer, told the timesteps that it was trained with."""
    _check(schedule, x_t, timesteps)
    told = mx.array(schedule.timesteps)[mx.clip(timesteps, 0, len(schedule) - 1)]
    prediction = model(x_t, told)
    if prediction.shape != x_t.shape:
        raise ValueError(
            f"the model returned shape {tuple(prediction.shape)} for images {tuple(x_t.shape)}"
        )
    return prediction


def _add_noise(
    schedule: Schedule,
    mean: mx.array,
    sigma: np.ndarray,
    timesteps: mx.array,
    noise: mx.array | None,
) -> mx.array:
    if noise is None:
        return mean
    _check(schedule, mean, timesteps, noise=noise)
    return mean + _at(schedule, sigma, timesteps, mean) * noise


def _next(noises: Iterator[mx.array], needed: int) -> mx.array:
    try:
        return next(noises)
    except StopIteration:
        raise ValueError(
            f"step_noises ended too early: these steps need {needed}, one for each but the last"
        ) from None


def _sample(
    step: Callable[[mx.array, mx.array, bool], mx.array], schedule: Schedule, noise: mx.array
) -> mx.array:
    """From noise through every step of the schedule, the last of which is step 0."""
    if not mx.isfinite(noise).all().item():
        raise ValueError("the noise to start from holds NaN or infinity")
    x, behind = noise, None
    for t in reversed(range(len(schedule))):
        x = step(x, mx.full(noise.shape[:1], t), t == 0)
        finite = mx.isfinite(x).all()
        mx.async_eval(x, finite)
        if behind is not None:  # this step runs while the one before is looked at
            _check_step(*behind, schedule)
        behind = finite, t
    assert behind is not None
    _check_step(*behind, schedule)
    return x


def _check_step(finite: mx.array, t: int, schedule: Schedule) -> None:
    if not finite.item():
        raise FloatingPointError(
            f"NaN or infinity after step {t} of {len(schedule)}: look at what the model "
            "returns, and at the noise of that step"
        )
