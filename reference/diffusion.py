"""Denoising diffusion of document 004, in PyTorch: the process, its samplers, and a small denoiser.

Sources
    Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239), called Ho here.
    Nichol and Dhariwal 2021 (arXiv 2102.09672): the cosine schedule. Song et al. 2021 (arXiv
    2010.02502): DDIM. Salimans and Ho 2022 (arXiv 2202.00512): predicting v.
    Document 004, whose forward process keeps nothing of the image (004-E12), whose reverse process
    is none (004-E15) and whose loss is least at the mean of the data (004-E18); see ERRATA.md.

Steps count from 0, the paper's from 1: step 0 adds the first noise, and sampling ends with it.
Tables are made in float64 and rounded once, to the type of the images: made in float32 they are off
by up to 2.3e-3 of themselves (004-E29). Images and noise are (B, C, H, W), timesteps are integers
(B,), and a model is any callable of both that returns an array of the images' shape.

A timestep outside the schedule is an error. PyTorch itself takes negative ones for steps counted
from the end.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = Callable[[Tensor, Tensor], Tensor]
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

    TypeError: not integers. ValueError: not (B,). IndexError: outside the schedule.
    """
    dtype = str(getattr(timesteps, "dtype", type(timesteps).__name__))
    if "int" not in dtype:
        raise TypeError(f"timesteps must be an array of integers, got {dtype}")
    if timesteps.ndim != 1 or timesteps.shape[0] == 0:
        raise ValueError(
            f"timesteps must be (B,), one for each image, got shape {tuple(timesteps.shape)}"
        )
    values = np.asarray(timesteps.cpu() if isinstance(timesteps, Tensor) else timesteps)
    wrong = values[(values < 0) | (values >= len(schedule))]
    if wrong.size:
        raise IndexError(
            f"timestep {wrong[0]} is outside the schedule: its {len(schedule)} steps are 0 to "
            f"{len(schedule) - 1}"
        )


def q_sample(schedule: Schedule, x0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """``x_t = √ᾱ x_0 + √(1 - ᾱ) ε``: images after t + 1 steps of noise, at once (Ho Eq. 4).

    x0 and noise (B, C, ...), timesteps (B,). Raises as :func:`check_timesteps`, and ValueError for
    shapes that differ.
    """
    _check(schedule, x0, timesteps, noise=noise)
    return _signal(schedule, timesteps, x0) * x0 + _spread(schedule, timesteps, x0) * noise


def predict_x0(
    schedule: Schedule,
    x_t: Tensor,
    timesteps: Tensor,
    prediction: Tensor,
    target: Target = "epsilon",
) -> Tensor:
    """The x_0 that ``prediction`` of ε, x_0 or v implies at x_t; all (B, C, ...)."""
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
    x_t: Tensor,
    timesteps: Tensor,
    prediction: Tensor,
    target: Target = "epsilon",
) -> Tensor:
    """The noise ε that ``prediction`` of ε, x_0 or v implies at x_t; all (B, C, ...)."""
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
    x_t: Tensor,
    timesteps: Tensor,
    prediction: Tensor,
    target: Target = "epsilon",
) -> Tensor:
    """The v that ``prediction`` of ε, x_0 or v implies at x_t; all (B, C, ...).

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
    x0: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    target: Target = "epsilon",
) -> Tensor:
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
    x0: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    target: Target = "epsilon",
) -> Tensor:
    """L_simple (Ho Eq. 14): the mean square of what ``model(x_t, t)`` is off from its target.

    x0 (B, C, ...) in [-1, 1], timesteps (B,), standard normal noise (B, C, ...); a scalar, the mean
    over images and elements. One call of the model. Raises as :func:`q_sample`, and ValueError for
    an unknown target or a model that returns another shape.
    """
    expected = training_target(schedule, x0, timesteps, noise, target)
    x_t = q_sample(schedule, x0, timesteps, noise)
    return (_call(model, schedule, x_t, timesteps) - expected).square().mean()


def posterior_mean_variance(
    schedule: Schedule, x0: Tensor, x_t: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean (B, C, ...) and variance (B, 1, ...) of q(x_{t-1} | x_t, x_0): Ho Eq. 6 and 7."""
    _check(schedule, x_t, timesteps, x0=x0)
    mean = (
        _at(schedule, schedule.posterior_mean_x0, timesteps, x_t) * x0
        + _at(schedule, schedule.posterior_mean_xt, timesteps, x_t) * x_t
    )
    return mean, _at(schedule, schedule.posterior_variance, timesteps, x_t)


def ddpm_step(
    model: Model,
    schedule: Schedule,
    x_t: Tensor,
    timesteps: Tensor,
    noise: Tensor | None = None,
    variance: Variance = "beta_tilde",
    target: Target = "epsilon",
    clip_x0: bool = False,
) -> Tensor:
    """One step of ancestral sampling, x_t to x_{t-1} (Ho Algorithm 2, line 4); all (B, C, ...).

    ``variance`` of the noise is β or β̃ (Ho, section 3.2); step 0 adds none, and without ``noise``
    no step does. ``clip_x0`` cuts the x_0 that the model implies to [-1, 1], the range of images.
    The mean is Eq. 7's, which without clipping is Eq. 11's. Raises as :func:`predict_x0`.
    """
    prediction = _call(model, schedule, x_t, timesteps)
    x0 = predict_x0(schedule, x_t, timesteps, prediction, target)
    if clip_x0:
        x0 = x0.clamp(-1, 1)
    mean, _ = posterior_mean_variance(schedule, x0, x_t, timesteps)
    sigma = np.sqrt(_variance(schedule, variance))
    return _add_noise(schedule, mean, sigma, timesteps, noise)


def ddim_step(
    model: Model,
    schedule: Schedule,
    x_t: Tensor,
    timesteps: Tensor,
    noise: Tensor | None = None,
    eta: float = 0.0,
    target: Target = "epsilon",
    clip_x0: bool = False,
) -> Tensor:
    """One step of DDIM, x_t to the step before it in ``schedule`` (Song et al. 2021, Eq. 12, 16).

    All (B, C, ...). ``eta`` from 0, no noise, to 1, the noise of DDPM with β̃. With ``clip_x0`` the
    ε that goes with the clipped x_0 is taken, so that both still make up x_t, and eta = 1 still is
    DDPM. Raises as :func:`predict_x0`, and ValueError for eta outside [0, 1].
    """
    _check_eta(eta)
    prediction = _call(model, schedule, x_t, timesteps)
    x0 = predict_x0(schedule, x_t, timesteps, prediction, target)
    epsilon = predict_epsilon(schedule, x_t, timesteps, prediction, target)
    if clip_x0:
        x0 = x0.clamp(-1, 1)
        epsilon = predict_epsilon(schedule, x_t, timesteps, x0, "x0")
    kept = schedule.alphas_cumprod_prev
    # Of the variance at the step before, this share is drawn anew; ε points the way to the rest.
    share = np.minimum(eta**2 * schedule.betas / (1 - schedule.alphas_cumprod), 1)
    mean = (
        _at(schedule, np.sqrt(kept), timesteps, x_t) * x0
        + _at(schedule, np.sqrt((1 - kept) * (1 - share)), timesteps, x_t) * epsilon
    )
    return _add_noise(schedule, mean, np.sqrt((1 - kept) * share), timesteps, noise)


@torch.no_grad()
def ddpm_sample(
    model: Model,
    schedule: Schedule,
    noise: Tensor,
    step_noises: Iterable[Tensor],
    variance: Variance = "beta_tilde",
    target: Target = "epsilon",
    clip_x0: bool = False,
) -> Tensor:
    """Images from standard normal ``noise``, both (B, C, ...): Ho Algorithm 2, all T steps.

    ``step_noises`` yields the noise (B, C, ...) of every step but the last, T - 1 in all: a list, a
    stacked array, or a generator that draws it. Put the model in evaluation mode first. Keeps no
    gradients.

    Raises as :func:`ddpm_step`; ValueError for noise that is not finite or ends too early;
    FloatingPointError where the samples cease to be finite.
    """
    _variance(schedule, variance)
    noises = iter(step_noises)

    def step(x: Tensor, timesteps: Tensor, last: bool) -> Tensor:
        z = None if last else _next(noises, len(schedule) - 1)
        return ddpm_step(model, schedule, x, timesteps, z, variance, target, clip_x0)

    return _sample(step, schedule, noise)


@torch.no_grad()
def ddim_sample(
    model: Model,
    schedule: Schedule,
    noise: Tensor,
    step_noises: Iterable[Tensor] = (),
    eta: float = 0.0,
    target: Target = "epsilon",
    clip_x0: bool = False,
) -> Tensor:
    """Images from standard normal ``noise``, both (B, C, ...), in all steps of ``schedule``.

    Usually a respaced one: ``ddim_sample(model, schedule.respaced(50), noise)``. ``step_noises`` as
    in :func:`ddpm_sample`, needed for eta above 0 only. Raises as :func:`ddim_step` and
    :func:`ddpm_sample`.
    """
    _check_eta(eta)
    noises = iter(step_noises)

    def step(x: Tensor, timesteps: Tensor, last: bool) -> Tensor:
        z = None if last or eta == 0 else _next(noises, len(schedule) - 1)
        return ddim_step(model, schedule, x, timesteps, z, eta, target, clip_x0)

    return _sample(step, schedule, noise)


def sinusoidal_embedding(timesteps: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
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
    precise = torch.promote_types(dtype, torch.float32)
    angles = timesteps[:, None].to(precise) * torch.tensor(
        frequencies, dtype=precise, device=timesteps.device
    )
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, 2 * half)
    return F.pad(embedding, (0, dim % 2)).to(dtype)


class Denoiser(nn.Module):
    """Noisy images (B, C, H, W) and their timesteps (B,) to a prediction (B, C, H, W).

    The document's two convolutions, of 128 channels between them. Its ``fc`` took a noise vector
    of 100 numbers as a GAN's generator does (004-E4); here it takes the 100 numbers that tell the
    timestep, which the document left out (004-E9), and its result is added between the two. No
    tanh at the end: ε has no bounds (004-E8).
    """

    def __init__(self, channels: int = 3, width: int = 128, embedding_dim: int = 100):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.fc = nn.Linear(embedding_dim, width)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=1, padding=1)
        self.conv2 = nn.Conv2d(width, channels, kernel_size=3, stride=1, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        t = self.fc(sinusoidal_embedding(timesteps, self.embedding_dim, x.dtype))  # (B, width)
        x = F.relu(self.conv1(x) + t[:, :, None, None])  # (B, width, H, W)
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
        self.average.requires_grad_(False)
        self.average.eval()

    def forward(self, *args: Any) -> Any:
        return self.average(*args)

    def update_parameters(self, model: nn.Module) -> None:
        """``average += (1 - decay) * (model - average)``; what is not trained is copied."""
        averages = dict(self.average.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                averages[name].lerp_(parameter, 1 - self.decay)
            for average, buffer in zip(self.average.buffers(), model.buffers(), strict=True):
                average.copy_(buffer)


def make_optimizer(module: nn.Module) -> torch.optim.Adam:
    """Adam with the document's learning rate, which is also Ho's (appendix B)."""
    return torch.optim.Adam(module.parameters(), lr=2e-4)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    schedule: Schedule,
    target: Target = "epsilon",
) -> Tensor:
    """One step of Ho Algorithm 1 on images (B, C, H, W) in [-1, 1]; returns its loss.

    The loop draws ``timesteps`` (B,) evenly from the schedule's and standard normal ``noise``.
    Raises as :func:`loss`.
    """
    value = loss(model, schedule, images, timesteps, noise, target)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.detach()


def ema_train_step(
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    schedule: Schedule,
    target: Target = "epsilon",
) -> Tensor:
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


def _check(schedule: Schedule, x: Tensor, timesteps: Tensor, **others: Tensor) -> None:
    check_timesteps(schedule, timesteps)
    if x.shape[0] != timesteps.shape[0]:
        raise ValueError(f"{timesteps.shape[0]} timesteps for {x.shape[0]} images")
    for name, other in others.items():
        if other.shape != x.shape:  # they might broadcast
            raise ValueError(f"{name} has shape {tuple(other.shape)}, the images {tuple(x.shape)}")


def _at(schedule: Schedule, table: np.ndarray, timesteps: Tensor, like: Tensor) -> Tensor:
    """The table's entries at ``timesteps``, (B, 1, ...) in the type of ``like``."""
    entries = torch.tensor(table, dtype=like.dtype, device=like.device)[timesteps]
    return entries.reshape(-1, *[1] * (like.ndim - 1))


def _signal(schedule: Schedule, timesteps: Tensor, like: Tensor) -> Tensor:
    """√ᾱ."""
    return _at(schedule, np.sqrt(schedule.alphas_cumprod), timesteps, like)


def _spread(schedule: Schedule, timesteps: Tensor, like: Tensor) -> Tensor:
    """√(1 - ᾱ)."""
    return _at(schedule, np.sqrt(1 - schedule.alphas_cumprod), timesteps, like)


def _call(model: Model, schedule: Schedule, x_t: Tensor, timesteps: Tensor) -> Tensor:
    """The model's answer, told the timesteps that it was trained with."""
    _check(schedule, x_t, timesteps)
    told = torch.tensor(schedule.timesteps, device=timesteps.device)[timesteps]
    prediction = model(x_t, told)
    if prediction.shape != x_t.shape:
        raise ValueError(
            f"the model returned shape {tuple(prediction.shape)} for images {tuple(x_t.shape)}"
        )
    return prediction


def _add_noise(
    schedule: Schedule,
    mean: Tensor,
    sigma: np.ndarray,
    timesteps: Tensor,
    noise: Tensor | None,
) -> Tensor:
    if noise is None:
        return mean
    _check(schedule, mean, timesteps, noise=noise)
    return mean + _at(schedule, sigma, timesteps, mean) * noise


def _next(noises: Iterator[Tensor], needed: int) -> Tensor:
    try:
        return next(noises)
    except StopIteration:
        raise ValueError(
            f"step_noises ended too early: these steps need {needed}, one for each but the last"
        ) from None


def _sample(
    step: Callable[[Tensor, Tensor, bool], Tensor], schedule: Schedule, noise: Tensor
) -> Tensor:
    """From noise through every step of the schedule, the last of which is step 0."""
    if not noise.isfinite().all():
        raise ValueError("the noise to start from holds NaN or infinity")
    x = noise
    for t in reversed(range(len(schedule))):
        x = step(x, torch.full(noise.shape[:1], t, device=noise.device), t == 0)
        if not x.isfinite().all():
            raise FloatingPointError(
                f"NaN or infinity after step {t} of {len(schedule)}: look at what the model "
                "returns, and at the noise of that step"
            )
    return x
