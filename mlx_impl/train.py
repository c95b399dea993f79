"""Train a system into a folder, go on with what was interrupted, and load what was trained.

A run's folder holds ``config.json`` (every setting), ``losses.csv`` and ``losses.png`` (the mean of
each epoch), ``samples/`` (after each epoch from the same noise) and ``checkpoint/`` (all weights,
optimizers and the position, in one file). Each file is replaced whole, the checkpoint last, so that
a run that was killed goes on from the last checkpoint as if nothing had happened: the noise of step
n and the order of epoch n follow from the seed and n alone.

An epoch of digits takes a GPU a tenth of a second, less than writing a checkpoint does; plot and
checkpoint are therefore renewed at the first epoch's end that is ``SAVE_EVERY`` seconds after the
last time, and at the end.
"""

import csv
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from numpy.typing import NDArray

from mlx_impl.data import DATASETS, Dataset, batch_indices, load_dataset
from mlx_impl.images import (
    Images,
    grid,
    plot_losses,
    replacing,
    require_pillow,
    write_losses,
    write_png,
)
from mlx_impl.precision import DTYPES, mixed
from mlx_impl.systems import SYSTEMS, Settings, Training
from mlx_impl.training import compile_step

PREVIEW = 100  # images in a preview
PREVIEWS = 20  # at most in a run, unless it says how often
CHUNK = 100  # images that are sampled at a time

SAVE_EVERY = 10.0

LENGTH = ("epochs", "steps", "preview_every")  # what may change when a run goes on

_STEP, _PREVIEW = range(2)  # what a key is for


class Refused(Exception):
    """What was asked cannot be done; the message says why and what to do."""


class Failed(Exception):
    """Training went wrong by itself."""


@contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Turn ``errors`` of reading and building, whose messages are made for users, into Refused."""
    try:
        yield
    except errors as error:
        raise Refused(str(error)) from error


def random_key(seed: int, *path: int) -> mx.array:
    """The key of MLX's generator for one purpose, a function of its arguments alone."""
    return mx.array(np.random.SeedSequence([seed, *path]).generate_state(2))


@dataclass
class Position:
    """How far a run is: whole epochs, batches of the next one, and the sums of their losses."""

    epoch: int = 0
    batch: int = 0
    sums: list[float] = field(default_factory=list)


class Run:
    """A run's folder."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.config = self.folder / "config.json"
        self.losses = self.folder / "losses.csv"
        self.plot = self.folder / "losses.png"
        self.samples = self.folder / "samples"
        self.checkpoint = self.folder / "checkpoint" / "last.safetensors"

    def check_free(self, overwrite: bool = False) -> None:
        """Refused where there is something, unless it is a run to overwrite."""
        if self.folder.exists() and not self.folder.is_dir():
            raise Refused(f"{self.folder} is a file: give a folder for the run")
        if self.config.exists() and not overwrite:
            raise Refused(
                f"{self.folder} holds a run: go on with it (--resume), replace it "
                "(--overwrite), or give another folder"
            )
        if not self.config.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise Refused(f"{self.folder} is neither empty nor a run: give another folder")

    def create(self, config: Settings, overwrite: bool = False) -> None:
        """Make the folder, or empty it of the run to overwrite."""
        self.check_free(overwrite)
        self.config.unlink(missing_ok=True)  # first: what is left without it is never resumed
        for path in (self.samples, self.checkpoint.parent):
            shutil.rmtree(path, ignore_errors=True)
        self.losses.unlink(missing_ok=True)
        self.plot.unlink(missing_ok=True)
        self.write_config(config)

    def write_config(self, config: Settings) -> None:
        with replacing(self.config) as partial:
            partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def read_config(self) -> Settings:
        if not self.config.is_file():
            raise Refused(f"{self.folder} is no run: it holds no config.json")
        try:
            config = json.loads(self.config.read_text(encoding="utf-8"))
            system = config["system"]
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{self.config} is damaged: {error!r}") from error
        if system not in SYSTEMS:
            raise Refused(f"{self.config}: there is no system {system!r}: {', '.join(SYSTEMS)}")
        config = _with_tuples(config)
        config.setdefault("dtype", "float32")  # of runs from before there was a choice
        return config

    def read_losses(self, epochs: int) -> list[dict[str, float | int]]:
        """The rows of the first ``epochs`` epochs."""
        if not self.losses.is_file():
            return []
        with self.losses.open(encoding="utf-8", newline="") as file:
            rows = [
                {k: int(v) if k in ("epoch", "step") else float(v) for k, v in row.items()}
                for row in csv.DictReader(file)
            ]
        return [row for row in rows if row["epoch"] <= epochs]

    def save(self, training: Training, position: Position) -> None:
        """Replace the checkpoint by the present state, whole or not at all."""
        metadata = {"position": json.dumps(asdict(position))}
        with replacing(self.checkpoint) as partial:
            mx.save_safetensors(str(partial), _all_arrays(training), metadata)

    def load(self, training: Training) -> Position:
        """Put the checkpoint's state into ``training``, all of it or, when Refused, nothing."""
        if not self.checkpoint.is_file():
            raise Refused(
                f"{self.folder} has no checkpoint, since its first epoch was not finished: start "
                "it again with --overwrite"
            )
        try:
            loaded: Any = mx.load(str(self.checkpoint), return_metadata=True)
            arrays, metadata = loaded
            position = Position(**json.loads(metadata["position"]))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise Refused(f"{self.checkpoint} is not a run's checkpoint: {error}") from error
        mine = _all_arrays(training)
        for name in sorted(mine.keys() | arrays.keys()):
            here, there = mine.get(name), arrays.get(name)
            if here is None or there is None or here.shape != there.shape:
                raise Refused(
                    f"{self.checkpoint} is of another model: {name} is {_described(there)} there "
                    f"and {_described(here)} in the model of config.json"
                )
        for name, part in training.parts.items():
            _assign(part, {path: arrays[f"{name}.{path}"] for path in _arrays(part)})
        mx.eval([_arrays(part) for part in training.parts.values()])
        return position


def _with_tuples(value: Any) -> Any:
    """What JSON made of settings, with its lists as the tuples that they were."""
    if isinstance(value, dict):
        return {k: _with_tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _all_arrays(training: Training) -> dict[str, mx.array]:
    return {
        f"{name}.{path}": array
        for name, part in training.parts.items()
        for path, array in _arrays(part).items()
    }


def _arrays(part: Any) -> dict[str, mx.array]:
    """A part's arrays by name: a module's parameters and statistics, or an optimizer's state."""
    return dict(tree_flatten(part.parameters() if isinstance(part, nn.Module) else part.state))


def _assign(part: Any, arrays: dict[str, mx.array]) -> None:
    if isinstance(part, nn.Module):
        part.update(tree_unflatten(list(arrays.items())))
    else:
        part.state = tree_map_with_path(lambda path, _: arrays[path], part.state)


def _described(array: mx.array | None) -> str:
    return "missing" if array is None else f"of shape {tuple(array.shape)}"


def new_config(system: str, given: Settings) -> tuple[Settings, Dataset]:
    """All settings of a new run of ``system``, from the ``given`` ones, and its data."""
    entry = SYSTEMS[system]
    config: Settings = {
        "system": system,
        "data": "digits",
        "image_size": entry.image_size,
        "channels": None,
        "limit": None,
        "epochs": None,
        "steps": None if "epochs" in given else entry.steps,
        "batch_size": entry.batch_size,
        "learning_rate": None,
        "dtype": "float32",
        "seed": 0,
        "preview_every": None,
        **{option.name: option.default for option in entry.options},
        **given,
    }
    dataset = load(config)
    if config["data"] not in DATASETS:
        config["data"] = os.path.abspath(config["data"])
    config["channels"] = dataset.images.shape[-1]
    labels = dataset.labels
    config["classes"] = None if labels is None else int(labels.max()) + 1
    config["images"] = len(dataset.images)
    if config["preview_every"] is None:
        batches = max(config["images"] // config["batch_size"], 1)
        epochs = config["epochs"] or config["steps"] / batches
        config["preview_every"] = math.ceil(epochs / PREVIEWS)
    with refusing(ValueError):
        config |= entry.prepare(config, dataset)
    config["fingerprint"] = _fingerprint(dataset)
    config["versions"] = {
        "python": sys.version.split()[0],
        "mlx": version("mlx"),
        "numpy": version("numpy"),
    }
    return config, dataset


def old_config(run: Run, system: str, given: Settings) -> tuple[Settings, Dataset]:
    """The settings of a run to go on with, and its data. Refused if ``given`` ones differ."""
    config = run.read_config()
    if config["system"] != system:
        raise Refused(f"{run.folder} is a run of {config['system']}, not of {system}")
    if "data" in given and given["data"] not in DATASETS:
        given = given | {"data": os.path.abspath(given["data"])}
    for name in given.keys() - set(LENGTH):
        if config[name] != given[name]:
            raise Refused(
                f"{run.folder} was trained with {name} {_shown(name, config)}, not "
                f"{_shown(name, given)}: leave --{name.replace('_', '-')} out, or start another "
                "run with it"
            )
    if "epochs" in given or "steps" in given:
        config |= {"epochs": None, "steps": None}
    config |= {name: given[name] for name in LENGTH if name in given}
    dataset = load(config)
    if _fingerprint(dataset) != config["fingerprint"]:
        raise Refused(f"the images of {config['data']} are no longer those of {run.folder}")
    return config, dataset


def _shown(name: str, settings: Settings) -> str:
    """A setting as it is written on the command line."""
    value, between = settings[name], "x" if name == "image_size" else ","
    return between.join(map(str, value)) if isinstance(value, tuple) else str(value)


def load(config: Settings) -> Dataset:
    """The images of a run."""
    with refusing(ValueError, OSError, ImportError, RuntimeError):
        return load_dataset(
            config["data"],
            config["image_size"],
            config["channels"],
            limit=config["limit"],
            seed=config["seed"],
        )


def _fingerprint(dataset: Dataset) -> str:
    return hashlib.sha256(dataset.images.tobytes()).hexdigest()[:16]


def build(config: Settings) -> Training:
    """The system of a run with its initial weights, which the seed decides.

    They are float32 whatever it computes in, and so are its checkpoints.
    """
    mx.random.seed(config["seed"])
    with refusing(ValueError):
        training = SYSTEMS[config["system"]].build(config)
    dtype = DTYPES[config["dtype"]]
    training.step = mixed(training.step, dtype)
    training.sample = training.sample and mixed(training.sample, dtype)
    training.reconstruct = training.reconstruct and mixed(training.reconstruct, dtype)
    for optimizer in training.optimizers.values():
        if config["learning_rate"] is not None:
            optimizer.learning_rate = config["learning_rate"]
    mx.eval([_arrays(part) for part in training.parts.values()])
    return training


def train(
    run: Run,
    config: Settings,
    dataset: Dataset,
    *,
    resume: bool = False,
    overwrite: bool = False,
    compiled: bool = True,
    on_step: Callable[[Position, dict[str, float]], None] = lambda *_: None,
    on_epoch: Callable[[dict[str, float | int], float], None] = lambda *_: None,
) -> bool:
    """Train until the run's end and return True, or save and return False on Ctrl-C or SIGTERM.

    ``on_step(position, means)`` is told of every step, ``on_epoch(row, steps_per_second)`` of every
    epoch. Raises Refused, and Failed when a loss is no longer a number.
    """
    with refusing(ValueError, ImportError):
        require_pillow()
        batches = len(batch_indices(len(dataset.images), config["batch_size"], _rng(config, 0)))
    end = config["steps"] or config["epochs"] * batches
    training = build(config)
    training.compiled = compiled
    if resume:
        position = run.load(training)
        run.write_config(config)
    else:
        position = Position(sums=[0.0] * len(training.losses))
        with refusing(ValueError):
            training.start()
        run.create(config, overwrite)
    rows = run.read_losses(position.epoch) if resume else []

    parts = list(training.parts.values())
    step = compile_step(training.step, *parts) if compiled else _uncompiled(training.step, parts)
    for module in training.modules.values():
        module.train()

    saved_at = time.monotonic()
    with _StopSignals() as stop:
        while (done := position.epoch * batches + position.batch) < end:
            last = min(batches, end - position.epoch * batches)
            order = batch_indices(
                len(dataset.images), config["batch_size"], _rng(config, position.epoch)
            )
            taken = _batches(dataset, order[position.batch : last])
            keys = (random_key(config["seed"], _STEP, done + i) for i in range(batches))
            work = zip(taken, keys, strict=False)
            speed = _take_steps(training, step, work, position, stop, on_step)
            if position.batch < last:  # interrupted
                run.save(training, position)
                return False

            epoch, done = position.epoch + 1, position.epoch * batches + last
            rows.append({"epoch": epoch, "step": done, **_means(training, position)})
            write_losses(run.losses, rows)
            if epoch % config["preview_every"] == 0 or done == end:
                _preview(run, training, config, dataset, epoch)
            if last == batches:
                position = Position(epoch, 0, [0.0] * len(training.losses))
            if done == end or stop.asked or time.monotonic() - saved_at >= SAVE_EVERY:
                with suppress(ImportError):  # without matplotlib there is no plot
                    plot_losses(run.plot, rows)
                run.save(training, position)
                saved_at = time.monotonic()
            on_epoch(rows[-1], speed)
            if stop.asked:
                return done == end
    return True


def _take_steps(
    training: Training,
    step: Callable[..., Any],
    batches: Iterable[tuple[tuple[mx.array, mx.array | None], mx.array]],
    position: Position,
    stop: "_StopSignals",
    on_step: Callable[[Position, dict[str, float]], None],
) -> float:
    """Take a step on each batch, until asked to stop; return the steps a second after the first.

    The next step is prepared while the one before runs, and no more than these two are in memory.
    """
    state = [part.state for part in training.parts.values()]
    started, n, waiting = math.nan, 0, None
    for (images, labels), key in batches:
        losses = step(*training.draw(key, images, labels))
        losses = losses if isinstance(losses, tuple) else (losses,)
        mx.async_eval(losses, state)
        if waiting is not None:
            _count(training, position, waiting, on_step)
        waiting, n = losses, n + 1
        if n == 1:
            mx.eval(losses)
            started = time.perf_counter()  # the first step includes compiling
        if stop.asked:
            break
    if waiting is not None:
        _count(training, position, waiting, on_step)
    return (n - 1) / (time.perf_counter() - started) if n > 1 else math.nan


def _batches(
    dataset: Dataset, order: NDArray[np.intp]
) -> Iterator[tuple[mx.array, mx.array | None]]:
    """Images and labels by the rows of ``order``."""
    for chosen in order:
        labels = None if dataset.labels is None else mx.array(dataset.labels[chosen])
        yield mx.array(dataset.images[chosen]), labels


def _rng(config: Settings, epoch: int) -> np.random.Generator:
    return np.random.default_rng([config["seed"], epoch])


def _uncompiled(step: Callable[..., Any], parts: list[Any]) -> Callable[..., Any]:
    return lambda *arrays: step(*parts, *arrays)


def _count(
    training: Training,
    position: Position,
    losses: tuple[mx.array, ...],
    on_step: Callable[[Position, dict[str, float]], None],
) -> None:
    """Count a step once its losses are there."""
    values = [float(np.array(loss)) for loss in losses]
    position.batch += 1
    for name, value in zip(training.losses, values, strict=True):
        if not math.isfinite(value):
            raise Failed(
                f"{name} is {value} at step {position.batch} of epoch {position.epoch + 1}: try a "
                "smaller --learning-rate; the last checkpoint is from before"
            )
    position.sums = [a + b for a, b in zip(position.sums, values, strict=True)]
    on_step(position, _means(training, position))


def _means(training: Training, position: Position) -> dict[str, float]:
    return {
        name: total / max(position.batch, 1)
        for name, total in zip(training.losses, position.sums, strict=True)
    }


def _preview(run: Run, training: Training, config: Settings, dataset: Dataset, epoch: int) -> None:
    key = random_key(config["seed"], _PREVIEW)
    images = sample(training, PREVIEW, key, dataset.images)
    write_png(run.samples / f"epoch_{epoch:04d}.png", grid(images))


def sample(
    training: Training, n: int, key: mx.array, real: Images | None = None, **options: Any
) -> Images:
    """Draw images (n, H, W, C) in [-1, 1] from what was trained, some at a time.

    What makes images of images gives the first of the ``real`` ones, each before what it makes of
    it, ``n`` in all.
    """
    for module in training.modules.values():
        module.eval()
    try:
        made: list[Images] = []
        if training.reconstruct is not None and real is not None:
            for start in range(0, n // 2, CHUNK):
                images = real[start : min(start + CHUNK, n // 2)]
                again = np.array(training.reconstruct(mx.array(images)))
                made.append(np.stack([images, again], axis=1).reshape(-1, *images.shape[1:]))
        elif training.sample is not None:
            # Chunks of one size, or the last would be compiled anew; what is too much is left out.
            chunk = math.ceil(n / math.ceil(n / CHUNK))
            for _ in range(0, n, chunk):
                key, own = mx.random.split(key)
                made.append(np.array(training.sample(own, chunk, **options)))
        return np.concatenate(made)[:n]
    except FloatingPointError as error:  # of a sampler
        raise Failed(str(error)) from error
    finally:
        for module in training.modules.values():
            module.train()


def restore(run: Run, dtype: str | None = None) -> tuple[Settings, Training]:
    """A run's settings and its system with the weights of the checkpoint.

    It computes in ``dtype``, or in what it was trained in.
    """
    config = run.read_config()
    if dtype is not None:
        config["dtype"] = dtype
    training = build(config)
    run.load(training)
    return config, training


class _StopSignals:
    """Ctrl-C and SIGTERM as a wish, heard between two steps; a second one is obeyed at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_StopSignals":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
