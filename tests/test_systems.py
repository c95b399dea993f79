"""What the command line puts together: no setting is ignored, and what is drawn is drawn right."""

import io
import math
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from rich.console import Console

import mlx_impl.__main__ as cli
import mlx_impl.train as training
from mlx_impl import diffusion
from mlx_impl.data import Dataset
from mlx_impl.images import read_image, write_png
from mlx_impl.systems import SYSTEMS, Training

SMALL: dict[str, Any] = {"image_size": (8, 8), "limit": 50, "batch_size": 12, "steps": 4}
NET: dict[str, Any] = {"width": 4, "multipliers": (1, 1), "groups": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "mlp-gan": {"document": "001", "latent_dim": 3},
    "conv-gan": {"width": 2, "latent_dim": 3},
    "dcgan": {"width": 2, "stages": 1, "latent_dim": 3},
    "diffusion": {"width": 4, "timesteps": 5},
    "unet": {**NET, "blocks": 1, "timesteps": 5},
    "autoencoder": {**NET, "latent_channels": 2},
    "latent-diffusion": {**NET, "timesteps": 5},
}

BOTH, TRAINING = ("samples", "losses"), ("after",)
PROCESS = {
    "timesteps": (6, BOTH),
    "schedule": ("cosine", BOTH),
    "target": ("v", BOTH),
    "ema_decay": (0.5, TRAINING),
}
ANOTHER_NET = {"width": (6, BOTH), "multipliers": ((1, 2), BOTH), "groups": (1, BOTH)}
COMMON = {"seed": (1, ("first weights",)), "learning_rate": (0.1, TRAINING)}
CHANGED: dict[str, dict[str, tuple[Any, tuple[str, ...]]]] = {
    "mlp-gan": {"document": ("002", BOTH), "latent_dim": (4, BOTH)},
    "conv-gan": {"width": (3, BOTH), "latent_dim": (4, BOTH)},
    "dcgan": {"width": (3, BOTH), "stages": (2, BOTH), "latent_dim": (4, BOTH)},
    "diffusion": {"width": (5, BOTH), **PROCESS},
    "unet": {**ANOTHER_NET, "blocks": (2, BOTH), **PROCESS},
    "autoencoder": {**ANOTHER_NET, "latent_channels": (3, BOTH), "kl_weight": (1.0, TRAINING)},
    "latent-diffusion": {
        **ANOTHER_NET,
        "blocks": (2, BOTH),
        "drop": (1.0, ("losses",)),
        **{name: change for name, change in PROCESS.items() if name != "target"},
    },
}
"""Each option's other value, and what it has to change."""

DDPM = {"sampler": "ddpm"}
SAMPLED: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "sampler": [({}, DDPM)],
    "steps": [({}, {"steps": 2})],
    "spacing": [({"steps": 2}, {"steps": 2, "spacing": s}) for s in ("linspace", "trailing")],
    "eta": [({}, {"eta": 1.0})],
    "variance": [(DDPM, {**DDPM, "variance": "beta"})],
    "class_": [({}, {"class_": 3})],
    "guidance": [({}, {"guidance": 1.0})],
}
"""Pairs of sampling options that have to give different images."""


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    """A first stage's run."""
    folder = tmp_path_factory.mktemp("runs") / "autoencoder"
    config, dataset = training.new_config("autoencoder", SMALL | SETTINGS["autoencoder"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PREVIEW", 2)
        assert training.train(training.Run(folder), config, dataset, compiled=False)
    return str(folder)


def made(system: str, autoencoder: str, **changes: Any) -> tuple[dict[str, Any], Dataset, Training]:
    given = SMALL | SETTINGS[system] | changes
    if system == "latent-diffusion":
        given["autoencoder"] = autoencoder
    config, dataset = training.new_config(system, given)
    return config, dataset, training.build(config)


def fill(module: Any) -> None:
    """Weights that follow from their names and shapes, none of them zero as in a new U-Net."""
    drawn = []
    for path, array in training._arrays(module).items():
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        values = rng.standard_normal(array.shape) / math.sqrt(max(1, math.prod(array.shape[1:])))
        if path.endswith("running_var"):
            values = 0.5 + values**2
        drawn.append((path, mx.array(values.astype(np.float32))))
    module.update(tree_unflatten(drawn))


def digest(arrays: Any) -> list[bytes]:
    return [np.array(a).tobytes() for a in arrays]


def outcome(system: str, autoencoder: str, **changes: Any) -> dict[str, Any]:
    """First weights, samples, and the losses and the weights of two steps."""
    _, dataset, run = made(system, autoencoder, **changes)
    found: dict[str, Any] = {"first weights": digest(training._all_arrays(run).values())}
    for module in run.modules.values():
        fill(module)
    images = training.sample(run, 4, mx.random.key(0), dataset.images)
    found["samples"] = (images.shape, images.tobytes())
    order = training.batch_indices(len(dataset.images), 12, np.random.default_rng(0))
    losses = []
    for i, (real, labels) in enumerate(training._batches(dataset, order[:2])):
        inputs = run.draw(training.random_key(0, i), real, labels)
        losses.append(training._uncompiled(run.step, list(run.parts.values()))(*inputs))
    mx.eval(losses, [part.state for part in run.parts.values()])
    found["losses"] = [digest(x if isinstance(x, tuple) else (x,)) for x in losses]
    found["after"] = digest(training._all_arrays(run).values())
    return found


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_setting_is_ignored(system, autoencoder):
    base = outcome(system, autoencoder)
    assert outcome(system, autoencoder) == base
    for name, (value, effects) in (COMMON | CHANGED[system]).items():
        changed = outcome(system, autoencoder, **{name: value})
        for effect in effects:
            assert changed[effect] != base[effect], f"{name} changes no {effect}"


@pytest.mark.parametrize("system", [name for name, s in SYSTEMS.items() if s.sampling])
def test_no_sampling_option_is_ignored(system, autoencoder):
    _, _, run = made(system, autoencoder)
    for module in run.modules.values():
        fill(module)

    def sampled(options: dict[str, Any]) -> bytes:
        return training.sample(run, 4, mx.random.key(0), **options).tobytes()

    for option in SYSTEMS[system].sampling:
        for one, other in SAMPLED[option.name]:
            assert sampled(one) == sampled(one)
            assert sampled(one) != sampled(other), f"{other} is as {one}"


def test_the_tables_hold_every_option():
    assert CHANGED.keys() == SETTINGS.keys() == SYSTEMS.keys()
    for name, system in SYSTEMS.items():
        assert CHANGED[name].keys() == {o.name for o in system.options} - {"autoencoder"}
        assert {o.name for o in system.sampling} <= SAMPLED.keys()


def test_options_of_the_other_sampler_are_refused(autoencoder):
    _, _, run = made("diffusion", autoencoder)
    for options, message in (
        ({"sampler": "ddpm", "eta": 0.5}, "eta is ddim's: leave it out with ddpm, got 0.5"),
        ({"variance": "beta"}, "variance is ddpm's: leave it out with ddim, got beta"),
        ({"spacing": "even"}, "unknown spacing 'even'"),
    ):
        with pytest.raises(ValueError, match=message):
            training.sample(run, 4, mx.random.key(0), **options)


# What is drawn

MANY = 2000


def of_many(system: str, autoencoder: str, **changes: Any) -> tuple[mx.array, ...]:
    _, _, run = made(system, autoencoder, **changes)
    return run.draw(mx.random.key(0), mx.zeros((MANY, 8, 8, 1)), mx.zeros(MANY, mx.int32))


def assert_share(found: Any, share: float) -> None:
    """Of many, within six standard deviations."""
    off = abs(np.array(found).mean() - share)
    assert off <= 6 * math.sqrt(share * (1 - share) / MANY)


@pytest.mark.parametrize(("system", "at"), [("diffusion", 1), ("unet", 1), ("latent-diffusion", 2)])
def test_every_timestep_is_drawn_as_often(system, at, autoencoder):
    timesteps = np.array(of_many(system, autoencoder)[at])
    assert set(timesteps) == set(range(5))
    for t in range(5):
        assert_share(timesteps == t, 0.2)


@pytest.mark.parametrize("drop", [0.0, 0.1, 1.0])
def test_the_share_of_dropped_labels(drop, autoencoder):
    assert_share(of_many("latent-diffusion", autoencoder, drop=drop)[-1], drop)


@pytest.mark.parametrize("system", SYSTEMS)
def test_noise_is_standard_normal_and_each_its_own(system, autoencoder):
    """Of images and of their latents; the images themselves are zeros here."""
    noises = [
        np.array(a).ravel()
        for a in of_many(system, autoencoder)[1:]
        if mx.issubdtype(a.dtype, mx.floating)
    ]
    assert len(noises) == (2 if system == "latent-diffusion" else 1)
    for noise in noises:
        assert abs(noise.mean()) <= 6 / math.sqrt(noise.size)
        assert abs(noise.std() - 1) <= 6 / math.sqrt(2 * noise.size)
        assert len(np.unique(noise)) > 0.99 * noise.size
    if len(noises) == 2:
        assert abs((noises[0] * noises[1]).mean()) <= 6 / math.sqrt(noises[0].size)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_each_step_of_a_sampler_has_noise_of_its_own(sampler, autoencoder, monkeypatch):
    _, _, run = made("diffusion", autoencoder)
    seen: list[bytes] = []

    def spy(model, schedule, noise, step_noises, *rest, **options):
        drawn = [noise, *step_noises]
        assert len(drawn) == len(schedule) == 5
        seen.extend(digest(drawn))
        return noise

    monkeypatch.setattr(diffusion, f"{sampler}_sample", spy)
    training.sample(run, training.CHUNK + 1, mx.random.key(0), sampler=sampler)
    assert len(set(seen)) == len(seen) == 2 * 5  # of two chunks


def test_the_scale_of_the_latents_is_used(autoencoder):
    """In training and in sampling: what the first stage was measured to need."""
    config, dataset, _ = made("latent-diffusion", autoencoder)
    ((images, labels),) = training._batches(dataset, np.arange(12)[None])
    found = []
    for factor in (1, 2):
        run = training.build(config | {"latent_scale": factor * config["latent_scale"]})
        for module in run.modules.values():
            fill(module)
        sampled = training.sample(run, 2, mx.random.key(0), steps=2)
        arrays = run.draw(mx.random.key(0), images, labels)
        loss = training._uncompiled(run.step, list(run.parts.values()))(*arrays)
        found.append((sampled.tobytes(), loss.item()))
    (one, loss), (other, other_loss) = found
    assert one != other
    assert loss != other_loss


def test_labels_stay_with_their_images(autoencoder):
    _, dataset, _ = made("latent-diffusion", autoencoder)
    order = training.batch_indices(len(dataset.images), 12, np.random.default_rng(0))
    taken = list(training._batches(dataset, order))
    assert len(taken) == 4
    assert dataset.labels is not None
    for (images, labels), chosen in zip(taken, order, strict=True):
        assert np.array_equal(np.array(images), dataset.images[chosen])
        assert np.array_equal(np.array(labels), dataset.labels[chosen])


def test_samples_are_drawn_in_evaluation_mode(autoencoder):
    """Also from what is being trained, as a preview is: a batch norm keeps its statistics."""
    _, _, run = made("dcgan", autoencoder)
    for module in run.modules.values():
        module.train()
    before = digest(training._all_arrays(run).values())
    alone = training.sample(run, 1, mx.random.key(0))
    assert digest(training._all_arrays(run).values()) == before
    assert all(module.training for module in run.modules.values())
    for module in run.modules.values():
        module.eval()
    np.testing.assert_array_equal(training.sample(run, 1, mx.random.key(0)), alone)


# What is shown


def train(*arguments: str, out: Path) -> int:
    small = ["--image-size", "8", "--limit", "50", "--batch-size", "12", "--no-compile"]
    return cli.main(["train", "mlp-gan", "--out", str(out), *small, *arguments])


def test_every_preview_is_of_the_same_noise(tmp_path, monkeypatch):
    keys = []
    sample = training.sample

    def spy(run, n, key, *rest, **options):
        keys.append(tuple(np.array(key).tolist()))
        return sample(run, n, key, *rest, **options)

    monkeypatch.setattr(training, "PREVIEW", 2)
    monkeypatch.setattr(training, "sample", spy)
    monkeypatch.setattr(cli, "_use_fast_blas", lambda console: None)
    for seed in ("0", "1"):
        assert (
            train("--epochs", "3", "--preview-every", "1", "--seed", seed, out=tmp_path / seed) == 0
        )
    assert len(keys) == 6
    assert len(set(keys[:3])) == len(set(keys[3:])) == 1
    assert keys[0] != keys[3]


def test_columns_and_scale_of_a_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PREVIEW", 2)
    monkeypatch.setattr(cli, "_use_fast_blas", lambda console: None)
    assert train("--steps", "1", out=tmp_path / "run") == 0
    out = str(tmp_path / "a.png")
    given = ["--number", "5", "--columns", "3", "--scale", "2", "--out", out]
    assert cli.main(["sample", str(tmp_path / "run"), *given]) == 0
    assert read_image(out).shape == (2 * (16 + 2) + 2, 3 * (16 + 2) + 2, 1)


def test_a_terminal_shows_how_far_it_is(tmp_path, monkeypatch):
    """The epoch, its steps, the means so far; of a painting its steps and losses."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=150, color_system=None)
    monkeypatch.setattr(cli, "Console", lambda **_: terminal)
    monkeypatch.setattr(training, "PREVIEW", 2)
    monkeypatch.setattr(cli, "_use_fast_blas", lambda console: None)
    assert train("--epochs", "2", out=tmp_path / "run") == 0
    shown = screen.getvalue()
    assert "epoch 2" in shown
    assert "4/4" in shown
    assert "d_loss 1." in shown
    assert "g_loss 0." in shown
    write_png(tmp_path / "style.png", np.zeros((16, 16, 3), np.uint8))
    given = ["--weights", "document", "--steps", "2", "--out", str(tmp_path / "a.png")]
    assert cli.main(["stylize", "generated", str(tmp_path / "style.png"), *given]) == 0
    assert "2/2" in screen.getvalue()
    assert "content " in screen.getvalue()
