"""``python -m mlx_impl`` end to end, tiny: what is written, what is refused, what is repeated."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

import mlx_impl.__main__ as cli
import mlx_impl.train as training
from mlx_impl import diffusion
from mlx_impl.convolution import route
from mlx_impl.images import read_image, write_png
from mlx_impl.precision import autocast
from mlx_impl.systems import SYSTEMS
from tests.frameworks import assert_equal_but_for_rounding, compiles

ROOT = Path(__file__).parents[1]


class Tiny(NamedTuple):
    """A system as small as it gets: its options, its losses, and some ways to sample from it."""

    options: list[str]
    losses: list[str]
    samplings: list[list[str]]


SMALL = [
    *("--image-size", "8", "--limit", "50", "--batch-size", "12"),
    *("--preview-every", "1"),
]
PROCESS = ["--timesteps", "5", "--schedule", "cosine", "--ema-decay", "0.5"]
NET = ["--width", "4", "--multipliers", "1,1", "--groups", "2"]
TINY = {
    "mlp-gan": Tiny(["--document", "001", "--latent-dim", "3"], ["d_loss", "g_loss"], [[]]),
    "conv-gan": Tiny(["--width", "2", "--latent-dim", "3"], ["d_loss", "g_loss"], [[]]),
    "dcgan": Tiny(
        ["--width", "2", "--stages", "1", "--latent-dim", "3"], ["d_loss", "g_loss"], [[]]
    ),
    "diffusion": Tiny(
        ["--width", "4", *PROCESS],
        ["loss"],
        [[], ["--sampler", "ddpm"], ["--steps", "2", "--eta", "1"]],
    ),
    "unet": Tiny([*NET, "--blocks", "1", *PROCESS], ["loss"], [["--sampler", "ddpm"]]),
    "autoencoder": Tiny([*NET, "--latent-channels", "2"], ["reconstruction", "kl"], [[]]),
    "latent-diffusion": Tiny(
        [*NET, *PROCESS],
        ["loss"],
        [["--steps", "2", "--guidance", "1"], ["--class", "3", "--steps", "2", "--eta", "1"]],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def small_and_alone():
    """Small previews, and nothing that outlasts these tests: another BLAS would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PREVIEW", 4)
        patch.setattr(cli, "_use_fast_blas", lambda console: None)
        yield


def run(*arguments: str | os.PathLike[str]) -> int:
    try:
        return cli.main([os.fspath(a) for a in arguments])
    except SystemExit as error:  # argparse's own
        return int(error.code)


def train(out: Path, *more: str, system: str = "mlp-gan", compiled: bool = False) -> int:
    """Three epochs of four steps at 8 x 8, unless ``more`` says otherwise."""
    options = [*SMALL, "--epochs", "3", *TINY[system].options, *more]
    if not compiled:
        options.append("--no-compile")
    if system == "latent-diffusion":
        first_stage = out.parent / "autoencoder"
        if not first_stage.exists():
            assert train(first_stage, system="autoencoder") == 0
        options += ["--autoencoder", str(first_stage)]
    return run("train", system, "--out", out, *options)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, np.ndarray]:
    loaded = mx.load(str(folder / "checkpoint" / "last.safetensors"))
    return {name: np.array(array) for name, array in loaded.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run to read from; who writes takes :func:`copied`."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


# What a run leaves


@pytest.mark.parametrize("system", SYSTEMS)
def test_train_and_sample(tmp_path, capsys, system):
    folder = tmp_path / "runs" / "first"
    assert train(folder, system=system, compiled=system == "mlp-gan") == 0
    assert capsys.readouterr().out.endswith(f"{folder}\n")
    assert set(contents(folder)) == {
        "config.json",
        "losses.csv",
        "losses.png",
        "checkpoint/last.safetensors",
        *(f"samples/epoch_{i:04d}.png" for i in (1, 2, 3)),
    }
    with (folder / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "4"), ("2", "8"), ("3", "12")]
    assert list(rows[0])[2:] == TINY[system].losses
    config = json.loads((folder / "config.json").read_text())
    assert config["system"] == system
    assert (config["seed"], config["batch_size"], config["images"]) == (0, 12, 50)
    assert set(config["versions"]) == {"python", "mlx", "numpy"}
    samples = [read_image(folder / "samples" / f"epoch_{i:04d}.png") for i in (1, 3)]
    assert samples[0].shape == samples[1].shape
    assert (samples[0] != samples[1]).any()
    for i, options in enumerate(TINY[system].samplings):
        out = tmp_path / f"{i}.png"
        assert run("sample", folder, "--number", "4", "--out", out, *options) == 0
        assert capsys.readouterr().out == f"{out}\n"
        assert read_image(out).std() > 1


def test_the_table_of_tests_holds_every_system():
    assert set(TINY) == set(SYSTEMS)


def test_losses_are_the_means_of_an_epoch(tmp_path, monkeypatch):
    """Not those of its last batch; the batch that is not full is left out."""
    seen: list[tuple[int, float]] = []
    real = training.compile_step

    def spy(step, *parts):
        compiled = real(step, *parts)

        def watched(*arrays):
            losses = compiled(*arrays)
            seen.append((len(arrays[0]), float(np.array(losses[0]))))
            return losses

        return watched

    monkeypatch.setattr(training, "compile_step", spy)
    assert train(tmp_path / "run", compiled=True) == 0
    assert {n for n, _ in seen} == {12}
    with (tmp_path / "run" / "losses.csv").open() as file:
        means = [float(row["d_loss"]) for row in csv.DictReader(file)]
    losses = [loss for _, loss in seen]
    assert means == [sum(losses[i : i + 4]) / 4 for i in (0, 4, 8)]


@compiles
def test_a_run_traces_its_step_once(tmp_path, monkeypatch):
    """50 images are four batches of 12 and two more; a preview is drawn after each epoch."""
    traces, real = [], training.compile_step

    def spy(step, *parts):
        def counted(*arguments):
            traces.append(arguments)
            return step(*arguments)

        return real(counted, *parts)

    monkeypatch.setattr(training, "compile_step", spy)
    assert train(tmp_path / "run", compiled=True) == 0
    assert len(traces) == 1


def test_every_step_has_images_and_noise_of_its_own(tmp_path, monkeypatch):
    drawn: list[tuple[bytes, bytes]] = []
    real = training._uncompiled

    def spy(step, parts):
        uncompiled = real(step, parts)

        def watched(images, noise):
            drawn.append((np.array(images).tobytes(), np.array(noise).tobytes()))
            return uncompiled(images, noise)

        return watched

    monkeypatch.setattr(training, "_uncompiled", spy)
    assert train(tmp_path / "a") == train(tmp_path / "b", "--seed", "1") == 0
    images, noises = (set(column) for column in zip(*drawn, strict=True))
    assert len(images) == len(noises) == 2 * 12


def test_diffusion_is_sampled_from_the_averaged_weights(tmp_path):
    """The weights that are trained do not depend on the average's decay, the samples do."""
    for decay in ("0.5", "0.9"):
        assert train(tmp_path / decay, "--ema-decay", decay, system="diffusion") == 0
    a, b = (contents(tmp_path / decay) for decay in ("0.5", "0.9"))
    assert a["losses.csv"] == b["losses.csv"]
    assert a["samples/epoch_0003.png"] != b["samples/epoch_0003.png"]


def test_the_average_spans_the_end_of_a_run_of_any_length():
    for given, decay in (
        ({"steps": 1000}, 0.98),
        ({"epochs": 10, "limit": 640}, 0.8),
        ({"steps": 10}, 0.0),
        ({"steps": 10, "ema_decay": 0.5}, 0.5),
    ):
        config, _ = training.new_config("diffusion", {"image_size": (8, 8), **given})
        assert config["ema_decay"] == decay


def test_steps_end_a_run_within_an_epoch(tmp_path):
    assert train(tmp_path / "run", "--steps", "6", "--epochs", "3") == 2
    options = [*SMALL, *TINY["mlp-gan"].options, "--no-compile"]
    assert run("train", "mlp-gan", "--out", tmp_path / "run", "--steps", "6", *options) == 0
    text = (tmp_path / "run" / "losses.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in text[1:]] == [["1", "4"], ["2", "6"]]


def test_nothing_is_taken_for_granted_about_the_data(tmp_path, capsys):
    """A folder of colour pictures, not square."""
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), np.uint8)
        write_png(tmp_path / "pictures" / f"{i}.png", pixels)
    more = ["--data", str(tmp_path / "pictures"), "--image-size", "12x8", "--batch-size", "3"]
    assert train(tmp_path / "run", *more) == 0
    assert "6 images of 12 x 8 x 3" in capsys.readouterr().err
    assert read_image(tmp_path / "run" / "samples" / "epoch_0003.png").shape == (30, 22, 3)
    assert run("score", tmp_path / "run") == 2
    assert "images without labels" in capsys.readouterr().err


# The same again


def test_the_same_seed_gives_the_same_files(trained, tmp_path):
    assert train(tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(trained)
    assert train(tmp_path / "other", "--seed", "1") == 0
    mine, other = contents(trained), contents(tmp_path / "other")
    assert all(mine[name] != other[name] for name in mine)


def put(state: Any, arrays: dict[str, mx.array], path: str = "") -> None:
    """Arrays by their paths into a state, in place, as what was compiled with it needs."""
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, mx.array):
            state[key] = arrays[f"{path}{key}"]
        elif isinstance(value, dict | list):
            put(value, arrays, f"{path}{key}.")


@compiles
@pytest.mark.parametrize("system", ["diffusion", "latent-diffusion"])
def test_the_compiled_step_is_the_uncompiled_one(tmp_path, system):
    """Two steps from weights, moments and images near those of a run; in float64, what is right.

    These systems' steps are put together for the command line; the others climb the ladder as such.
    """
    assert train(tmp_path / "run", "--epochs", "1", system=system) == 0
    config, run_ = training.restore(training.Run(tmp_path / "run"))
    dataset = training.load(config)
    order = training.batch_indices(len(dataset.images), 12, np.random.default_rng(0))
    ((images, labels),) = training._batches(dataset, order[:1])
    state = {name: np.array(a) for name, a in training._all_arrays(run_).items()}
    drawn = run_.draw(mx.random.key(0), images, labels)
    inputs = {f"input {i}": np.array(a) for i, a in enumerate(drawn)}

    parts = list(run_.parts.values())
    uncompiled = training._uncompiled(run_.step, parts)
    compiled = training.compile_step(run_.step, *parts)

    def two_steps(point, step, dtype=mx.float32):
        def array(name):
            whole = not np.issubdtype(point[name].dtype, np.floating)
            return mx.array(point[name]) if whole else mx.array(point[name], dtype)

        for name, part in run_.parts.items():
            mine = {k.removeprefix(f"{name}."): k for k in state if k.startswith(f"{name}.")}
            put(part.state, {path: array(k) for path, k in mine.items()})
        found = {}
        for i in range(2):
            losses = step(*map(array, inputs))
            losses = losses if isinstance(losses, tuple) else (losses,)
            found |= {f"loss {j} of step {i}": loss for j, loss in enumerate(losses)}
        found |= training._all_arrays(run_)
        mx.eval(found)
        return {name: np.array(a).astype(np.float64) for name, a in found.items()}

    def oracle(point):
        # MLX has no convolution in float64 but this route, which is held to be PyTorch's.
        with mx.stream(mx.cpu), route("patches"):
            return two_steps(point, uncompiled, mx.float64)

    assert_equal_but_for_rounding(
        oracle,
        lambda point: two_steps(point, uncompiled),
        lambda point: two_steps(point, compiled),
        state | inputs,
    )


@pytest.mark.parametrize("system", ["dcgan", "diffusion", "autoencoder"])
def test_training_in_bfloat16_keeps_float32_and_samples_in_either(
    tmp_path, capsys, monkeypatch, system
):
    """To the last bit the steps of autocast, which the ladder proves; either reads their end."""
    for dtype in ("float32", "bfloat16"):
        assert train(tmp_path / dtype, "--dtype", dtype, system=system) == 0
    assert "in bfloat16" in capsys.readouterr().err
    arrays = mx.load(str(tmp_path / "bfloat16" / "checkpoint" / "last.safetensors"))
    assert mx.bfloat16 not in {a.dtype for a in arrays.values()}
    entry = SYSTEMS[system]

    def in_autocast(config: training.Settings) -> training.Training:
        made = entry.build(config)
        made.step = autocast()(made.step)
        return made

    monkeypatch.setitem(training.SYSTEMS, system, replace(entry, build=in_autocast))
    assert train(tmp_path / "autocast", system=system) == 0
    monkeypatch.undo()
    single, half, autocasted = (
        (tmp_path / name / "losses.csv").read_text() for name in ("float32", "bfloat16", "autocast")
    )
    assert single != half == autocasted
    np.testing.assert_equal(weights(tmp_path / "bfloat16"), weights(tmp_path / "autocast"))
    drawn = []
    for dtype in ("float32", "bfloat16", None):
        config, restored = training.restore(training.Run(tmp_path / "bfloat16"), dtype)
        real = training.load(config).images
        drawn.append(training.sample(restored, 4, mx.random.key(0), real))
    assert {images.dtype for images in drawn} == {np.dtype(np.float32)}
    assert (drawn[1] == drawn[2]).all()
    assert (drawn[0] != drawn[1]).any()
    assert run("sample", tmp_path / "bfloat16", "--number", "4", "--dtype", "float32") == 0


def test_a_run_from_before_there_was_a_choice_is_float32(copied, capsys):
    config = json.loads((copied / "config.json").read_text())
    assert config.pop("dtype") == "float32"
    (copied / "config.json").write_text(json.dumps(config))
    more = ("train", "mlp-gan", "--out", copied, "--resume", "--epochs", "4", "--no-compile")
    assert run(*more, "--dtype", "bfloat16") == 2
    assert "trained with dtype float32, not bfloat16" in " ".join(capsys.readouterr().err.split())
    assert run(*more) == 0


def test_sampling_moves_no_running_statistics(tmp_path):
    assert train(tmp_path / "run", "--epochs", "1", system="dcgan") == 0
    _, trained = training.restore(training.Run(tmp_path / "run"))
    before = {k: np.array(v) for k, v in training._all_arrays(trained).items()}
    training.sample(trained, 5, mx.random.key(0))
    np.testing.assert_equal(
        {k: np.array(v) for k, v in training._all_arrays(trained).items()}, before
    )


def test_samples_follow_from_their_seed(trained, tmp_path):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert run("sample", trained, "--seed", seed, "--out", tmp_path / f"{name}.png") == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


# Interruptions


def signalled_at(step: int, number: int):
    """`train`, with a signal after the ``step``-th step."""

    def wrapped(*arguments, on_step, **options):
        taken = iter(range(1, 1000))

        def on_step_and_signal(*told):
            on_step(*told)
            if next(taken) == step:
                os.kill(os.getpid(), number)

        return training.train(*arguments, on_step=on_step_and_signal, **options)

    return wrapped


@pytest.mark.parametrize(
    ("step", "number"),
    [(1, signal.SIGINT), (3, signal.SIGTERM), (4, signal.SIGINT), (6, signal.SIGINT)],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    trained, tmp_path, monkeypatch, capsys, step, number
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(cli, "train", signalled_at(step, number))
        assert train(folder) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert f"go on with: python -m mlx_impl train mlp-gan --out {folder} --resume" in said
    assert contents(folder) != contents(trained)
    assert run("train", "mlp-gan", "--out", folder, "--resume", "--no-compile") == 0
    assert contents(folder) == contents(trained)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_longer_run_is_the_same_as_one_gone_on_with(tmp_path, system):
    assert train(tmp_path / "long", system=system) == 0
    assert train(tmp_path / "short", "--epochs", "2", system=system) == 0
    assert train(tmp_path / "short", "--epochs", "3", "--resume", system=system) == 0
    assert contents(tmp_path / "short") == contents(tmp_path / "long")


def test_a_run_of_steps_goes_on_within_its_epoch(trained, tmp_path):
    options = [*SMALL, *TINY["mlp-gan"].options, "--no-compile"]
    folder = tmp_path / "run"
    assert run("train", "mlp-gan", "--out", folder, "--steps", "6", *options) == 0
    assert run("train", "mlp-gan", "--out", folder, "--epochs", "3", "--resume", *options) == 0
    assert contents(folder) == contents(trained)


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(trained, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    real = training.Run.save

    def killed(self, state, position):
        if position.epoch == 2:
            raise MemoryError("as good as a power cut")
        real(self, state, position)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "save", killed)
        with pytest.raises(MemoryError):
            train(folder)
    assert len((folder / "losses.csv").read_text().splitlines()) == 3  # one epoch too many
    assert run("train", "mlp-gan", "--out", folder, "--resume", "--no-compile") == 0
    assert contents(folder) == contents(trained)


def test_a_checkpoint_that_was_not_finished_leaves_the_one_before(trained, copied, monkeypatch):
    def half(path, *_):
        Path(path).write_bytes(b"half")
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", half)
        with pytest.raises(RuntimeError, match="disk"):
            run("train", "mlp-gan", "--out", copied, "--resume", "--epochs", "4", "--no-compile")
    np.testing.assert_equal(weights(copied), weights(trained))
    assert set(os.listdir(copied / "checkpoint")) == {"last.safetensors"}


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        training, "_uncompiled", lambda step, parts: lambda *a: (mx.array(1.0), mx.array(np.nan))
    )
    assert train(tmp_path / "run") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "stopped: g_loss is nan at step 1 of epoch 1: try a smaller --learning-rate" in said


# What is refused, with exit code 2 and one message


def refused(capsys, *arguments: str | os.PathLike[str]) -> str:
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.out == ""
    return " ".join(said.err.split())


def test_a_run_is_not_overwritten_unless_asked(copied, capsys):
    before = contents(copied)
    message = refused(capsys, "train", "mlp-gan", "--out", copied)
    assert "holds a run: go on with it (--resume), replace it (--overwrite)" in message
    assert contents(copied) == before
    (copied / "samples" / "epoch_0009.png").write_bytes(b"of a longer run")
    (copied / "notes.txt").write_text("mine")
    assert train(copied, "--seed", "1", "--overwrite") == 0
    after = contents(copied)
    assert after.pop("notes.txt") == b"mine"
    assert after.keys() == before.keys()
    assert after["losses.csv"] != before["losses.csv"]


def test_bad_settings_do_not_cost_the_run_that_is_there(copied, capsys):
    before = contents(copied)
    message = refused(
        capsys, "train", "mlp-gan", "--out", copied, "--overwrite", "--batch-size", "5000"
    )
    assert "batch_size 5000 is larger than the data set of 1797 images" in message
    assert contents(copied) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("all my work")
    for more in ([], ["--overwrite"]):
        message = refused(capsys, "train", "mlp-gan", "--out", tmp_path, *more)
        assert "is neither empty nor a run: give another folder" in message
    assert (tmp_path / "thesis.tex").read_text() == "all my work"
    message = refused(capsys, "train", "mlp-gan", "--out", tmp_path / "thesis.tex")
    assert "is a file: give a folder for the run" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--document", "002"], "was trained with document 001, not 002: leave --document out"),
        (["--image-size", "8x9"], "was trained with image_size 8x8, not 8x9"),
        (["--batch-size", "13"], "was trained with batch_size 12, not 13"),
        (["--data", "photos"], "was trained with data digits, not photos"),
    ],
)
def test_a_run_goes_on_with_its_own_settings(trained, capsys, given, message):
    before = contents(trained)
    assert message in refused(capsys, "train", "mlp-gan", "--out", trained, "--resume", *given)
    assert contents(trained) == before


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_checkpoint_of_another_model_is_refused_by_name(copied, capsys):
    edit_config(copied, document="002")
    for command in (["sample", copied], ["train", "mlp-gan", "--out", copied, "--resume"]):
        message = refused(capsys, *command)
        assert (
            "is of another model: discriminator.fc1.bias is of shape (512,) there and of shape "
            "(1024,) in the model of config.json" in message
        )


def test_changed_images_are_refused(copied, capsys):
    edit_config(copied, fingerprint="0" * 16)
    message = refused(capsys, "train", "mlp-gan", "--out", copied, "--resume")
    assert "the images of digits are no longer those of" in message


def test_damaged_runs_are_named(copied, tmp_path, capsys):
    assert "is no run: it holds no config.json" in refused(capsys, "sample", tmp_path)
    (copied / "checkpoint" / "last.safetensors").write_bytes(b"nothing of the kind")
    assert "is not a run's checkpoint" in refused(capsys, "sample", copied)
    (copied / "checkpoint" / "last.safetensors").unlink()
    message = refused(capsys, "train", "mlp-gan", "--out", copied, "--resume")
    assert "has no checkpoint, since its first epoch was not finished" in message
    (copied / "config.json").write_text("{")
    assert "config.json is damaged" in refused(capsys, "score", copied)
    edit = {"system": "gan"}
    (copied / "config.json").write_text(json.dumps(edit))
    assert "there is no system 'gan': mlp-gan" in refused(capsys, "sample", copied)


def test_bad_arguments(tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    assert "invalid choice: 'gan' (choose from" in refused(capsys, "train", "gan", *out)
    assert "the following arguments are required: --out" in refused(capsys, "train", "mlp-gan")
    for given, message in {
        "--image-size=28x": "'28x' is no size: give 28, or 28x20 (height x width)",
        "--epochs=0": "0 is not at least 1",
        "--epochs=some": "invalid whole number value: 'some'",
        "--learning-rate=0": "0 is not above 0",
        "--seed=-1": "-1 is negative",
        "--channels=2": "invalid choice: 2",
        "--data=minst": "unknown data set 'minst'",
        "--data=no/such.idx": "there is no image file no/such.idx",
        f"--data={ROOT / 'README.md'}": "README.md is not an IDX file",
        f"--data={ROOT}": "is neither .png, .jpg nor .jpeg: a folder of images",
        f"--data={tmp_path}": "nor any image file",
    }.items():
        assert message in refused(capsys, "train", "mlp-gan", *out, given), given
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("system", "given", "message"),
    [
        ("conv-gan", "--width=0", "0 is not at least 1"),
        ("mlp-gan", "--latent-dim=-3", "-3 is not at least 1"),
        ("dcgan", "--stages=0", "0 is not at least 1"),
        ("unet", "--groups=0", "0 is not at least 1"),
        ("unet", "--blocks=0", "0 is not at least 1"),
        ("unet", "--multipliers=1,0", "0 is not at least 1"),
        ("unet", "--multipliers=1,x", "invalid list of whole numbers value: '1,x'"),
        ("autoencoder", "--latent-channels=0", "0 is not at least 1"),
        ("autoencoder", "--kl-weight=nan", "nan is not a number from 0 on"),
        ("latent-diffusion", "--drop=2", "2 is not from 0 to 1"),
        ("diffusion", "--ema-decay=nan", "decay must be at least 0 and below 1, got nan"),
    ],
)
def test_numbers_that_cannot_be(tmp_path, capsys, system, given, message):
    assert message in refused(capsys, "train", system, "--out", tmp_path / "run", given)
    assert not (tmp_path / "run").exists()


def test_a_picture_is_not_overwritten_unless_asked(trained, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert run("sample", trained, "--out", out, "--number", "1") == 0
    small = out.read_bytes()
    capsys.readouterr()
    assert "is there already: replace it (--overwrite)" in refused(
        capsys, "sample", trained, "--out", out
    )
    assert out.read_bytes() == small
    assert run("sample", trained, "--out", out, "--overwrite") == 0
    assert out.read_bytes() != small
    capsys.readouterr()
    assert "does not end in .png" in refused(capsys, "sample", trained, "--out", tmp_path / "a.jpg")


@pytest.fixture(scope="module")
def diffused(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "diffusion"
    assert train(folder, "--epochs", "1", system="diffusion") == 0
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "6"], "steps must be from 1 to the schedule's 5, got 6"),
        (["--steps", "0"], "steps must be from 1 to the schedule's 5, got 0"),
        (["--eta", "1.5"], "eta must be from 0 (DDIM) to 1 (DDPM), got 1.5"),
        (["--sampler", "ddpm", "--eta", "0.5"], "eta is ddim's"),
        (["--sampler", "euler"], "invalid choice: 'euler'"),
    ],
)
def test_bad_sampling(diffused, tmp_path, capsys, given, message):
    assert message in refused(capsys, "sample", diffused, "--out", tmp_path / "a.png", *given)
    assert os.listdir(tmp_path) == []


@compiles
def test_sampling_traces_its_model_once(diffused, monkeypatch):
    """For all chunks, the last of which is not smaller, and for the weights of later epochs."""
    calls, denoise = [], diffusion.Denoiser.__call__

    def counted(model, x, timesteps):
        calls.append(len(x))
        return denoise(model, x, timesteps)

    monkeypatch.setattr(diffusion.Denoiser, "__call__", counted)
    monkeypatch.setattr(training, "CHUNK", 4)
    _, trained = training.restore(training.Run(diffused))
    calls.clear()
    images = training.sample(trained, 10, mx.random.key(0))
    assert len(images) == 10
    assert calls == [4]

    average = trained.modules["ema"].average
    average.update(tree_map(lambda a: a / 2, average.parameters()))
    halved = training.sample(trained, 10, mx.random.key(0))
    assert calls == [4]
    trained.compiled = False
    np.testing.assert_allclose(halved, training.sample(trained, 10, mx.random.key(0)), atol=1e-5)
    assert calls == [4] + [4] * 5 * 3
    assert np.abs(halved - images).max() > 0.1


def test_sampling_options_of_another_system(trained, capsys):
    message = refused(capsys, "sample", trained, "--eta", "0", "--steps", "3")
    assert "is a run of mlp-gan, which has no --eta, --steps" in message


def test_sizes_that_do_not_fit_are_refused_before_a_run_begins(tmp_path, capsys):
    for system, given, message in (
        ("conv-gan", "30", "image_size is 30 x 30: both must be multiples of 4"),
        ("dcgan", "30x28", "image_size is 30 x 28: both must be multiples of 4"),
        ("unet", "28x30", "H and W multiples of 4"),
        ("unet", "30", "image_size=30 cannot be halved 2 times"),
    ):
        options = ["--out", tmp_path / "run", "--image-size", given]
        assert message in refused(capsys, "train", system, *options), system
    assert not (tmp_path / "run").exists()


def test_latent_diffusion_wants_an_autoencoder_that_fits(trained, tmp_path, capsys):
    first, out = tmp_path / "autoencoder", ["--out", tmp_path / "run"]
    assert train(first, "--epochs", "1", system="autoencoder") == 0
    capsys.readouterr()
    command = ["train", "latent-diffusion", *out]
    assert "required: --autoencoder" in refused(capsys, *command)
    for given, message in (
        ([tmp_path], "is no run: it holds no config.json"),
        ([trained], "is a run of mlp-gan"),
        ([first], "was trained with image_size (8, 8), but here it is (32, 32)"),
        ([first, "--image-size", "8", "--data", "photos", "--channels", "1"], "have no labels"),
    ):
        assert message in refused(capsys, *command, "--autoencoder", *given), message
    assert not (tmp_path / "run").exists()


def test_latent_diffusion_keeps_its_autoencoder(tmp_path):
    """The first stage's weights do not move, and its folder is not needed any more."""
    assert train(tmp_path / "run", "--epochs", "1", system="latent-diffusion") == 0
    first, second = weights(tmp_path / "autoencoder"), weights(tmp_path / "run")
    kept = [name for name in first if name.startswith("autoencoder.")]
    assert kept
    for name in kept:
        np.testing.assert_array_equal(first[name], second[name])
    shutil.rmtree(tmp_path / "autoencoder")
    assert run("sample", tmp_path / "run", "--number", "2", "--out", tmp_path / "a.png") == 0


def test_one_class_or_each_in_turn(tmp_path, capsys):
    assert train(tmp_path / "run", "--epochs", "1", system="latent-diffusion") == 0
    capsys.readouterr()
    for label in ("10", "-1"):
        message = refused(capsys, "sample", tmp_path / "run", "--class", label)
        assert f"class must be from 0 to 9, got {label}" in message
    _, drawn = training.restore(training.Run(tmp_path / "run"))
    key = mx.random.key(0)
    each = training.sample(drawn, 20, key, steps=2)
    seven = training.sample(drawn, 20, key, steps=2, class_=7)
    same = (each == seven).all((1, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(same), [7, 17])


def test_an_autoencoder_shows_images_before_what_it_makes_of_them(tmp_path):
    assert train(tmp_path / "run", "--epochs", "1", system="autoencoder") == 0
    out = tmp_path / "a.png"
    assert run("sample", tmp_path / "run", "--number", "4", "--out", out) == 0
    from mlx_impl.data import load_dataset
    from mlx_impl.images import to_pixels

    shown, real = read_image(out), to_pixels(load_dataset("digits", (8, 8), limit=2).images)
    np.testing.assert_array_equal(shown[2:10, 2:10], real[0])
    np.testing.assert_array_equal(shown[12:20, 2:10], real[1])
    assert (shown[2:10, 12:20] != real[0]).any()


def test_bad_processes(tmp_path, capsys):
    for given, message in {
        "--timesteps=0": "0 is not at least 1",
        "--ema-decay=1": "decay must be at least 0 and below 1",
        "--target=x": "invalid choice: 'x'",
    }.items():
        assert message in refused(capsys, "train", "diffusion", "--out", tmp_path / "run", given)


# The machine


def test_without_a_compiler_it_is_said_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_on_linux_cpu", lambda: True)
    monkeypatch.setattr(cli.shutil, "which", lambda name: None)
    monkeypatch.setattr(training, "compile_step", None)  # would fail if called
    assert train(tmp_path / "run", compiled=True) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "MLX compiles for the CPU with g++, which is not installed" in said


def test_what_is_missing_is_said_before_training(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL.Image", None)
        message = refused(capsys, "train", "mlp-gan", "--out", tmp_path / "run", *SMALL)
        assert "image files need Pillow: python -m pip install pillow" in message
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(tmp_path / "run", "--epochs", "1") == 0
    assert "without losses.png, which needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "run" / "losses.png").exists()
    assert (tmp_path / "run" / "losses.csv").exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.Run, "save", full)
    assert train(tmp_path / "run", "--epochs", "1") == 1
    assert "stopped: [Errno 28] No space left on device" in capsys.readouterr().err


def python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join(map(str, [*([path] if path else []), ROOT]))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


def test_the_command_line_needs_neither_pytorch_nor_the_kit():
    code = (
        "import sys, mlx_impl.__main__ as m; m._use_fast_blas(m.Console()); "
        "print({'torch', 'mlx_parity', 'reference', 'matplotlib', 'PIL', 'sklearn'} "
        "& set(sys.modules))"
    )
    result = python("-c", code)
    assert (result.stdout, result.stderr) == ("set()\n", "")


def test_without_a_backend_the_command_says_what_to_install(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: not there')")
    result = python("-m", "mlx_impl", "train", "mlp-gan", "--out", "x", path=tmp_path)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert 'exactly one of "mlx[cpu]" or "mlx[cuda13]"' in result.stderr


def test_help_names_every_system_and_option(capsys):
    assert run("train", "--help") == 0
    said = capsys.readouterr().out
    assert all(name in said and system.about[:30] in said for name, system in SYSTEMS.items())
    for name, system in SYSTEMS.items():
        assert run("train", name, "--help") == 0
        said = capsys.readouterr().out
        assert all(f"--{o.name.replace('_', '-')}" in said for o in system.options)
    assert run("sample", "--help") == run("score", "--help") == run("--help") == 0
