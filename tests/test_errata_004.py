"""Document 004: each defect shown as the document has it, and its repair as we have it.

ERRATA.md tells the story of each entry and names the test here or in test_diffusion_properties.py.
"""

import inspect
import io
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import mlx_impl.diffusion
import reference.diffusion
from mlx_impl.data import check_images
from mlx_impl.images import to_pixels
from tests.frameworks import EPS, MLX, TORCH, Side, assert_within, each_side

T = 1000
KEPT = np.linspace(1.0, 0.0, T)
"""``noise_schedule`` of the document: the share of the image that each of its steps keeps."""


def forward_as_documented(x0, noises, kept=KEPT):
    """``forward_diffusion_process``, told its noise."""
    x = x0
    for share, noise in zip(kept, noises, strict=True):
        x = float(share) * x + (1 - float(share)) * noise
    return x


def reverse_as_documented(x, model, timesteps=T):
    """``reverse_diffusion_process``."""
    for _ in reversed(range(timesteps)):
        x = x - model(x)
    return x


class TorchAsDocumented(torch.nn.Module):
    def __init__(self, channels=3, z_dim=100):
        super().__init__()
        self.fc = torch.nn.Linear(z_dim, 256)
        self.conv1 = torch.nn.Conv2d(channels, 128, kernel_size=3, stride=1, padding=1)
        self.conv2 = torch.nn.Conv2d(128, channels, kernel_size=3, stride=1, padding=1)

    def reshape(self, x):
        return F.relu(self.fc(x)).view(x.shape[0], 256, 8, 8)


class MLXAsDocumented(nn.Module):
    def __init__(self, channels=3, z_dim=100):
        super().__init__()
        self.fc = nn.Linear(z_dim, 256)
        self.conv1 = nn.Conv2d(channels, 128, kernel_size=3, stride=1, padding=1)
        self.conv2 = nn.Conv2d(128, channels, kernel_size=3, stride=1, padding=1)

    def reshape(self, x):
        return nn.relu(self.fc(x)).reshape(x.shape[0], 8, 8, 256)


AS_DOCUMENTED = {"torch": TorchAsDocumented, "mlx": MLXAsDocumented}
ERRORS = (RuntimeError, ValueError)  # torch's and MLX's


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def images(side: Side, n: int = 2, seed: int = 1):
    """Pictures (n, 4, 5, 3) in [-1, 1], in the side's layout."""
    return side.images(np.random.default_rng(seed).uniform(-1, 1, (n, 4, 5, 3)).astype(np.float32))


def numbers(array) -> np.ndarray:
    return np.asarray(array.detach() if isinstance(array, torch.Tensor) else array)


# E4 to E7: the network's shapes


@each_side
def test_a_generators_stem_takes_no_images(side):
    """E4: ``fc`` wants 100 numbers in a row; ours maps images to images of any size."""
    model = AS_DOCUMENTED[side.name]()
    with pytest.raises(ERRORS):
        model.fc(images(side))
    x, t = images(side), side.array(np.array([0, 999]))
    assert side.diffusion.Denoiser(3, 8)(x, t).shape == x.shape


@each_side
def test_256_numbers_are_no_16384(side):
    """E5."""
    z = side.array(noise(1, 100))
    with pytest.raises(ERRORS, match=r"invalid for input of size 256|array of size 256"):
        AS_DOCUMENTED[side.name]().reshape(z)


@each_side
def test_a_convolution_of_3_channels_takes_no_256(side):
    """E6."""
    with pytest.raises(ERRORS, match="channels"):
        AS_DOCUMENTED[side.name]().conv1(side.images(noise(1, 8, 8, 256)))


@each_side
def test_stride_1_keeps_8_by_8(side):
    """E7: nothing in the document's network makes 64 x 64 of it; ours keeps what it is given."""
    model = AS_DOCUMENTED[side.name]()
    out = model.conv2(model.conv1(side.images(noise(1, 8, 8, 3))))
    assert out.shape == side.images(noise(1, 8, 8, 3)).shape
    x = side.images(noise(1, 64, 64, 3))
    assert side.diffusion.Denoiser()(x, side.array(np.array([5]))).shape == x.shape


# E8: tanh


@each_side
def test_tanh_cannot_reach_a_third_of_the_noise(side):
    """A network that knew ε would still lose 0.151 of the 1.0 that answering 0 does."""
    assert 2 * stats.norm.sf(1) == pytest.approx(0.3173, abs=5e-5)
    e, step = np.linspace(-12, 12, 240_001, retstep=True)
    floor = np.trapezoid(np.maximum(np.abs(e) - 1, 0) ** 2 * stats.norm.pdf(e), e)
    assert floor == pytest.approx(2 * (2 * stats.norm.sf(1) - stats.norm.pdf(1)), abs=step**2)
    assert floor == pytest.approx(0.151, abs=5e-4)
    model = side.diffusion.Denoiser(3, 8)
    out = model(1000 * images(side), side.array(np.array([0, 999])))
    assert np.abs(numbers(out)).max() > 1


# E9: the timestep


def test_one_answer_for_every_noise_level_costs_a_quarter_more():
    """Pixels of variance 1 look alike at every step, so a network not told t answers the mean.

    E[ε | x, t] is √(1 - ᾱ) x: a hundredth of x at step 0, all of it at step 999.
    """
    kept = reference.diffusion.linear_schedule().alphas_cumprod
    best = np.sqrt(1 - kept)
    assert best[[0, -1]] == pytest.approx([0.01, 1.0], abs=5e-3)
    told, blind = kept.mean(), kept.mean() + best.var()
    assert (told, blind) == pytest.approx((0.276, 0.351), abs=5e-4)


@each_side
def test_our_denoiser_is_told_the_timestep(side):
    model, x = side.diffusion.Denoiser(3, 8), images(side, 1)
    early, late = (numbers(model(x, side.array(np.array([t])))) for t in (10, 900))
    assert np.abs(early - late).max() > 1e-3


def test_three_embeddings_that_differ():
    """Ho's; sines and cosines exchanged over half; MLX's layer, whose default scale is √(2/d)."""
    d, t = 128, np.arange(T)
    ours = np.array(mlx_impl.diffusion.sinusoidal_embedding(mx.array(t), d))
    angles = t[:, None] * 10000.0 ** (-np.arange(d // 2) / (d // 2))
    diffusers = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    assert np.abs(ours - diffusers).max() > 1.9
    mlxs = nn.SinusoidalPositionalEncoding(d)
    assert mlxs.scale == math.sqrt(2 / d)
    assert np.abs(np.array(mlxs(mx.array(t))) - ours).max() > 0.8
    same = nn.SinusoidalPositionalEncoding(d, min_freq=1e-4, max_freq=1, scale=1.0)
    # Both angles, up to 999, are rounded: in the layer after a power taken in float32.
    assert np.abs(np.array(same(mx.array(t))) - ours).max() < 8 * 999 * EPS


def test_mlx_groups_channels_in_strides_unless_told():
    """E9: two groups of four channels. PyTorch's are neighbours, MLX's every other one."""
    x = np.array([0, 1, 10, 12], np.float32).reshape(1, 1, 1, 4)
    expected = torch.nn.GroupNorm(2, 4)(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy()
    default = np.array(nn.GroupNorm(2, 4)(mx.array(x)))
    told = np.array(nn.GroupNorm(2, 4, pytorch_compatible=True)(mx.array(x)))
    np.testing.assert_allclose(told.ravel(), expected.ravel(), rtol=8 * EPS)
    assert np.sign(expected.ravel()).tolist() == [-1, 1, -1, 1]
    assert np.sign(default.ravel()).tolist() == [-1, -1, 1, 1]


# E11 to E14: the forward process


def test_the_first_step_keeps_everything_and_the_last_nothing():
    """E11."""
    assert (KEPT[0], KEPT[-1]) == (1.0, 0.0)
    ours = reference.diffusion.linear_schedule().alphas
    assert ours[0] == 1 - 1e-4
    assert ours[-1] == 1 - 0.02


@each_side
def test_nothing_of_the_image_is_left_as_documented(side):
    """E12: the product of all shares is 0, so the gradient by the image is 0 too."""
    assert KEPT.prod() == 0
    for steps, left, half_unit in ((50, 0.29, 5e-3), (100, 0.006, 5e-4), (200, 5e-10, 5e-11)):
        assert KEPT[:steps].prod() == pytest.approx(left, abs=half_unit)
    noises = [noise(1, 3, 4, 1, seed=i) for i in range(20)]
    kept = np.linspace(1.0, 0.0, 20)

    def last_sum(x0):
        return forward_as_documented(x0, [side.array(z) for z in noises], kept).sum()

    x0 = noise(1, 3, 4, 1, seed=20)
    assert (side.grad(last_sum, x0) == 0).all()
    five = forward_as_documented(
        np.full((64, 64, 3), 5.0), (noise(64, 64, 3, seed=i) for i in range(T))
    )
    assert (five.mean(), five.std()) == pytest.approx((0, 1), abs=5 / math.sqrt(five.size))

    d = side.diffusion
    schedule, t = d.linear_schedule(), side.array(np.array([T - 1]))

    def our_sum(x0):
        return d.q_sample(schedule, x0, t, side.array(noises[0])).sum()

    np.testing.assert_allclose(side.grad(our_sum, x0), 0.0063528, rtol=0, atol=5e-8)


def test_the_documents_noise_shrinks_the_image_and_ours_preserves_variance():
    """E13: (s, 1 - s) are no sine and cosine; (√(1 - β), √β) are."""
    variance, spread = 1.0, []
    for share in KEPT:
        variance = share**2 * variance + (1 - share) ** 2
        spread.append(math.sqrt(variance))
    assert np.argmin(spread) + 1 == 74
    assert min(spread) == pytest.approx(0.195, abs=5e-4)
    x0, e = noise(200_000, 1, seed=1), noise(200_000, 1, seed=2)
    schedule = mlx_impl.diffusion.linear_schedule()
    for step in (0, 250, 500, 999):
        t = mx.full(len(x0), step)
        x_t = np.array(mlx_impl.diffusion.q_sample(schedule, mx.array(x0), t, mx.array(e)))
        assert x_t.std() == pytest.approx(1, abs=5 / math.sqrt(2 * len(x0)))  # five deviations


def test_one_draw_has_the_distribution_of_all_steps():
    """E14: Ho Eq. 2, step after step, comes to Eq. 4."""
    schedule = reference.diffusion.linear_schedule()
    signal, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas):
        signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
        # A few roundings of 2^-53 in each step so far, in ᾱ and in both of these.
        off = 8 * (t + 1) * 2.0**-53
        assert signal == pytest.approx(math.sqrt(schedule.alphas_cumprod[t]), rel=off)
        assert variance == pytest.approx(1 - schedule.alphas_cumprod[t], abs=off)


@each_side
def test_the_loss_knows_its_timestep_and_its_noise(side):
    """E14: the document's function returns neither; here a step is told both, and calls once."""
    told = []

    def model(x, t):
        told.append([int(i) for i in t])
        return 0 * x

    d, x0 = side.diffusion, images(side)
    e = images(side, seed=3)
    loss = d.loss(model, d.linear_schedule(), x0, side.array(np.array([7, 900])), e)
    assert told == [[7, 900]]
    assert float(loss) == pytest.approx(float((numbers(e) ** 2).mean()), rel=8 * EPS)


# E15, E16: the reverse process


@each_side
def test_subtracting_all_the_noise_a_thousand_times_is_no_reverse_process(side):
    """Even a perfect answer takes the image to minus a thousand times the noise."""
    d, x0 = side.diffusion, images(side)
    e = side.images(noise(2, 4, 5, 3))
    schedule = d.linear_schedule()
    x_t = d.q_sample(schedule, x0, side.array(np.array([999, 999])), e)
    as_documented = numbers(reverse_as_documented(x_t, lambda x: e))
    left = math.sqrt(schedule.alphas_cumprod[-1])
    ends = left * numbers(x0) + (math.sqrt(1 - left**2) - T) * numbers(e).astype(np.float64)
    # On the way, each of a thousand differences is off by half a unit of what it has come to.
    assert_within(as_documented, ends, T * EPS / 2 * T * np.abs(numbers(e)) + 8 * EPS)
    assert round(-ends.std() / numbers(e).std()) == -999
    twenty = schedule.respaced(20)
    ours = numbers(d.ddim_sample(lambda x, t: e, twenty, x_t_at(side, 950, x0, e)))
    assert_within(ours, numbers(x0), rounding(twenty, x0, e))


def rounding(schedule, x0, e) -> float:
    """Of DDIM told the true noise: an error made at step i is divided by √ᾱ_i on its way to x_0."""
    size = np.abs(numbers(x0)).max() + 2 * np.abs(numbers(e)).max()
    return 8 * EPS * float((size / np.sqrt(schedule.alphas_cumprod)).sum())


def x_t_at(side, timestep, x0, e):
    t = side.array(np.full(2, timestep))
    return side.diffusion.q_sample(side.diffusion.linear_schedule(), x0, t, e)


@each_side
def test_the_step_before_is_the_next_in_the_sequence(side):
    """E15: five steps with both ends. Taken to lie 200 back, they leave 45 % of the image."""
    d, steps = side.diffusion, [999, 749, 500, 250, 0]
    schedule = d.linear_schedule()
    five = schedule.respaced(5, "linspace")
    assert list(five.timesteps[::-1]) == steps
    kept = np.append(schedule.alphas_cumprod, 1.0)  # [-1]: before the first step

    def sampled(previous):
        """The image's and the noise's share of the result, with the true noise told."""
        image, rest = math.sqrt(kept[999]), math.sqrt(1 - kept[999])
        for t, before in zip(steps, previous, strict=True):
            image = math.sqrt(kept[before]) * image / math.sqrt(kept[t])
            rest = math.sqrt(kept[before] / kept[t]) * (rest - math.sqrt(1 - kept[t]))
            rest += math.sqrt(1 - kept[before])
        return image, rest

    off = 8 * 2.0**-53 * len(steps) / math.sqrt(kept[999])  # of float64
    assert sampled([*steps[1:], -1]) == pytest.approx((1, 0), abs=off)
    assert sampled([max(t - 200, -1) for t in steps]) == pytest.approx((0.446, 0.342), abs=5e-4)
    x0, e = images(side), side.images(noise(2, 4, 5, 3))
    ours = numbers(d.ddim_sample(lambda x, t: e, five, x_t_at(side, 999, x0, e)))
    assert_within(ours, numbers(x0), rounding(five, x0, e))


@each_side
def test_a_row_of_100_less_an_image_is_no_shape(side):
    """E16, E26: sampling starts from noise in the shape of images."""
    z, image = side.array(noise(1, 100)), side.images(noise(1, 8, 8, 3))
    with pytest.raises(ERRORS, match=r"size of tensor|broadcast"):
        z - image
    d = side.diffusion
    model, schedule = d.Denoiser(3, 8), d.linear_schedule(4)
    assert d.ddim_sample(model, schedule, image).shape == image.shape
    with pytest.raises((RuntimeError, ValueError)):
        d.ddim_sample(model, schedule, z)


# E17, E18: training


def kept_for_backward(evaluations: int) -> int:
    """Bytes that PyTorch keeps to differentiate so many evaluations at 64 x 64."""
    model = reference.diffusion.Denoiser()
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros(1, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = reverse_as_documented(x, lambda x: model(x, torch.tensor([0])), evaluations)
        assert out.requires_grad
    return sum(kept.values())


def test_backward_through_the_reverse_process_keeps_every_evaluation():
    """E17: 2.1 MB an evaluation, 2.1 GB an image, 137 GB a batch of 64; here one evaluation."""
    each = (kept_for_backward(8) - kept_for_backward(4)) / 4
    assert each == pytest.approx(2.15e6, abs=5e3)
    calls = {"torch": 0, "mlx": 0}
    for side in (TORCH, MLX):
        d = side.diffusion

        class Counting(d.Denoiser):
            name = side.name

            def forward(self, x, t):
                calls[self.name] += 1
                return super().forward(x, t) if self.name == "torch" else super().__call__(x, t)

            if name == "mlx":
                __call__ = forward

        model = Counting(3, 4)
        batch = images(side), side.array(np.array([0, 999])), images(side, seed=2)
        d.train_step(model, d.make_optimizer(model), *batch, d.linear_schedule())
    assert calls == {"torch": 1, "mlx": 1}


@each_side
def test_the_documents_loss_is_least_at_the_mean_of_the_data(side):
    """E18: two images end as the same array, so no network tells them apart."""
    first, second = images(side, 1, seed=1), images(side, 1, seed=2)
    noises = [images(side, 1, seed=i) for i in range(3, 23)]
    kept = np.linspace(1.0, 0.0, 20)
    ends = [numbers(forward_as_documented(x, noises, kept)) for x in (first, second)]
    assert np.array_equal(*ends)

    def loss(answer):
        return sum(float(((answer - x) ** 2).mean()) for x in (first, second))

    mean = (first + second) / 2
    assert loss(mean) < min(loss(first), loss(second), loss(mean + 0.01), loss(0.99 * mean))
    t = side.array(np.array([500]))
    schedule = side.diffusion.linear_schedule()
    ours = [numbers(side.diffusion.q_sample(schedule, x, t, noises[0])) for x in (first, second)]
    assert np.abs(ours[0] - ours[1]).max() > 0.1


def test_the_documents_criterion_is_never_called():
    """E20: ``compute_loss`` reads the global one, so the parameter of that name is dead."""
    scope: dict = {}
    exec(
        "criterion = lambda a, b: 'the global one'\n"
        "def compute_loss(noisy_image, true_image):\n"
        "    return criterion(noisy_image, true_image)\n"
        "def train(criterion):\n"
        "    return compute_loss(0, 0)\n",
        scope,
    )
    assert scope["train"](lambda a, b: 1 / 0) == "the global one"


@each_side
def test_what_our_step_takes_it_uses(side):
    """E20: each target is another loss, and the names say what they hold."""
    d = side.diffusion
    assert list(inspect.signature(d.train_step).parameters)[2:5] == ["images", "timesteps", "noise"]
    model, t = d.Denoiser(3, 4), side.array(np.array([3, 600]))
    batch = images(side), t, side.images(noise(2, 4, 5, 3))
    losses = {
        float(numbers(d.loss(model, make(), *batch, target)))
        for make in (d.linear_schedule, d.cosine_schedule)
        for target in d.TARGETS
    }
    assert len(losses) == 6


@each_side
def test_denoisers_adam_starts_with_one_learning_rate(side):
    """E22: 2e-4, the document's, with the bias correction that MLX leaves out by default."""
    if side is MLX:
        model = nn.Linear(1, 1, bias=False)
        model.weight = mx.zeros((1, 1))
        side.diffusion.make_optimizer(model).update(model, {"weight": mx.ones((1, 1))})
    else:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        model.weight.grad = torch.ones(1, 1)
        side.diffusion.make_optimizer(model).step()
    assert -model.weight.item() / 2e-4 == pytest.approx(1, abs=EPS / (1 - 0.999))


def test_bytes_drown_the_noise():
    """E24: at the last step 255 is still 1.6 deviations of the noise; 1 is 0.006 of one."""
    left = math.sqrt(reference.diffusion.linear_schedule().alphas_cumprod[-1])
    assert 255 * left == pytest.approx(1.62, abs=5e-3)
    assert left == pytest.approx(0.00635, abs=5e-6)
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], got values from 0.0 to 255.0"):
        check_images(np.array([0, 255], np.float32).reshape(1, 1, 2, 1))


def test_an_epochs_loss_is_the_last_batchs_or_none_as_documented():
    """E25: and without a batch, a NameError. Ours returns each step's loss to the loop."""

    def epoch(batches):
        for batch in batches:
            loss = batch
        return loss

    assert epoch([3.0, 1.0]) == 1.0
    with pytest.raises(NameError):
        epoch([])
    for side in (TORCH, MLX):
        d = side.diffusion
        model, schedule = d.Denoiser(3, 4), d.linear_schedule()
        batch = images(side), side.array(np.array([0, 999])), images(side, seed=2)
        expected = float(numbers(d.loss(model, schedule, *batch)))
        assert float(d.train_step(model, d.make_optimizer(model), *batch, schedule)) == expected


# E27: showing what was made


def test_channels_last_needs_no_transpose_and_pixels_need_a_range():
    x = np.linspace(-1.2, 1.2, 2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3)  # (H, W, C)
    assert np.transpose(np.zeros((2, 5, 3)), (1, 2, 0)).shape == (5, 3, 2)  # no image any more
    pixels = to_pixels(x)
    assert pixels.shape == x.shape
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert (pixels[x < 0] < 128).all()  # matplotlib would cut all of these off at 0
    assert len(np.unique(pixels[x < 0])) > 5


def test_the_sampler_evaluates_every_step():
    """MLX is lazy: without it a thousand evaluations of the network would wait in one graph."""

    def operations(x) -> int:
        graph = io.StringIO()
        mx.export_to_dot(graph, x)
        return graph.getvalue().count("->")

    waiting = []

    def model(x, t):
        waiting.append(operations(x))
        return 0.1 * x

    d = mlx_impl.diffusion
    z = mx.array(noise(1, 2, 3, 1))
    mx.eval(z)
    d.ddim_sample(model, d.linear_schedule(6), z)
    assert waiting == [0] * 6
    waiting.clear()
    x = z
    for i in reversed(range(6)):  # what the sampler would be without
        x = d.ddim_step(model, d.linear_schedule(6), x, mx.array([i]))
    assert waiting[-1] > 5 * 5


# E29: what is missing, and the tables


def worst(found: np.ndarray, right: np.ndarray) -> float:
    use = right != 0
    return float(np.abs(found[use].astype(np.float64) / right[use] - 1).max())


def test_tables_made_in_float32_are_off():
    """Up to 2.3e-3 of themselves; made in float64 and rounded once, half a unit."""
    f = np.float32
    right = reference.diffusion.linear_schedule()
    betas = np.linspace(1e-4, 0.02, T, dtype=f)
    kept = np.cumprod(f(1) - betas, dtype=f)
    before = np.append(f(1), kept[:-1])
    assert worst(f(1) - kept, 1 - right.alphas_cumprod) == pytest.approx(1.7e-4, abs=5e-6)
    tilde = betas * (f(1) - before) / (f(1) - kept)
    assert worst(tilde, right.posterior_variance) == pytest.approx(1.6e-4, abs=5e-6)

    right = reference.diffusion.cosine_schedule()
    angles = (np.arange(T + 1, dtype=f) / f(T) + f(0.008)) / f(1.008) * f(math.pi / 2)
    falling = np.cos(angles) ** 2
    betas = np.minimum(f(1) - falling[1:] / falling[:-1], f(0.999))
    assert worst(betas, right.betas) > 1e-3  # cosines in float32 are the machine's own
    assert worst(f(1) - np.cumprod(f(1) - betas, dtype=f), 1 - right.alphas_cumprod) > 5e-4
    for table in (right.betas, 1 - right.alphas_cumprod, right.posterior_variance):
        assert worst(table.astype(f), table) <= EPS / 2


def test_mlx_reads_beside_the_table():
    """A timestep of 1000 has no entry, and MLX reads on; PyTorch raises, but not for -1."""
    d = mlx_impl.diffusion
    table = d.linear_schedule().alphas_cumprod.astype(np.float32)
    assert mx.array(table)[mx.array([T])].shape == (1,)
    with pytest.raises(IndexError):
        torch.tensor(table)[torch.tensor([T])]
    assert torch.tensor(table)[torch.tensor([-1])].item() == table[-1]
    x = mx.zeros((1, 2, 3, 1))
    for timestep in (T, -1):
        with pytest.raises(IndexError, match=f"timestep {timestep} is outside the schedule"):
            d.q_sample(d.linear_schedule(), x, mx.array([timestep]), x)


def test_a_schedule_is_no_parameter_of_the_module_that_holds_it():
    """As an array it would be one, and an optimizer that decays weights would move it."""
    module = nn.Module()
    module.betas = mx.array(mlx_impl.diffusion.linear_schedule().betas)
    assert list(module.trainable_parameters()) == ["betas"]
    module = nn.Module()
    module.schedule = mlx_impl.diffusion.linear_schedule()
    assert not module.trainable_parameters()
    names = set(dict(reference.diffusion.Denoiser().named_parameters()))
    assert names == {f"{n}.{p}" for n in ("fc", "conv1", "conv2") for p in ("weight", "bias")}
