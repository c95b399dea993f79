"""``python -m mlx_impl``: train the systems, draw from them, see how well they do."""

import argparse
import importlib.util
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlx_impl import process
from mlx_impl.data import PHOTOGRAPHS, load_picture
from mlx_impl.images import Images, grid, plot_losses, write_losses, write_png
from mlx_impl.precision import DTYPES
from mlx_impl.systems import NEEDED, SYSTEMS, Option, Settings, natural, positive, rate, weight
from mlx_impl.train import (
    Failed,
    Position,
    Refused,
    Run,
    load,
    new_config,
    old_config,
    random_key,
    refusing,
    restore,
    sample,
    train,
)

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_DRAWN_BY_USER = 3  # what the key of `sample` and `score` is for; training's are 0 and 1


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(argv))
    command = options.pop("command")
    console = Console(stderr=True)
    try:
        process.tune()
        _use_fast_blas(console)
        return COMMANDS[command](options, console)
    except Refused as error:
        console.print(f"python -m mlx_impl {command}: {error}", markup=False, soft_wrap=True)
        return BAD_INPUT
    except (Failed, OSError) as error:  # a folder that cannot be written, a full disk
        console.print(f"[red]stopped:[/] {escape(str(error))}", soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """All commands and options. Only what is given is in the namespace, so defaults stay apart."""
    top = argparse.ArgumentParser(prog="python -m mlx_impl", description=__doc__.split(": ")[1])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    training = commands.add_parser("train", help="train a system into a folder")
    systems = training.add_subparsers(dest="system", required=True, metavar="SYSTEM")
    for name, system in SYSTEMS.items():
        one = systems.add_parser(
            name,
            help=system.about,
            description=f"Train the {system.about}.",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        size = "x".join(map(str, system.image_size))
        _add(one, "system's own", system.options)
        _add(
            one,
            "data",
            (
                Option("data", "digits", "digits, mnist, photos, an IDX file or a folder", str),
                Option("image_size", size, "HEIGHTxWIDTH, or one number", _size),
                Option("channels", None, "convert to grey or colour", choices=(1, 3)),
                Option("limit", None, "use at most so many images", positive),
            ),
        )
        _add(
            one,
            "training",
            (
                Option("steps", system.steps, "when to stop", positive),
                Option("epochs", None, "or after so many times through the data", positive),
                Option("batch_size", system.batch_size, "images a step", positive),
                Option("learning_rate", None, "in place of the system's own", rate),
                COMPUTING,
                Option("seed", 0, "of the weights, the order and the noise", natural),
                Option(
                    "preview_every", None, "epochs from grid to grid (default: 20 grids)", positive
                ),
            ),
        )
        folder = one.add_argument_group("run")
        folder.add_argument("--out", required=True, metavar="DIR", help="the run's folder")
        how = folder.add_mutually_exclusive_group()
        how.add_argument("--resume", action="store_true", help="go on with the run in DIR")
        how.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
        folder.add_argument("--no-compile", action="store_true", help="run the step uncompiled")

    drawing = commands.add_parser(
        "sample",
        help="draw images from a run",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    drawing.add_argument("run", metavar="RUN", help="the folder of a training")
    _add(
        drawing,
        "images",
        (
            Option("number", 100, "how many", positive),
            Option("seed", 0, "of the noise", natural),
            DRAWING,
            Option("columns", None, "in a row of the grid", positive),
            Option("scale", 1, "enlarge each pixel so many times", positive),
        ),
    )
    _add_sampling(drawing)
    drawing.add_argument("--out", metavar="FILE.png", help="default: sample.png in RUN")
    drawing.add_argument("--overwrite", action="store_true", help="replace the file")

    scoring = commands.add_parser(
        "score",
        help="what a classifier of real digits makes of a run's images",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    scoring.add_argument("run", metavar="RUN", help="the folder of a training on labelled images")
    _add(
        scoring,
        "images",
        (
            Option("number", 500, "how many", positive),
            Option("seed", 0, "of the noise", natural),
            DRAWING,
        ),
    )
    _add_sampling(scoring)

    painting = commands.add_parser(
        "stylize",
        help="paint one picture in the style of another",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name in ("content", "style"):
        known = ", ".join((*PHOTOGRAPHS, *([GENERATED] if name == "content" else [])))
        painting.add_argument(name, metavar=name.upper(), help=f"an image file, or {known}")
    painting.add_argument(
        "--weights",
        required=True,
        metavar="WEIGHTS",
        help="a file of VGG's; vgg19 or vgg16 to let torchvision download them; random; or "
        "document, the three convolutions of document 003",
    )
    painting.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    painting.add_argument("--overwrite", action="store_true", help="replace the files")
    _add(painting, "painting", PAINTING)
    return top


def _add(
    to: argparse.ArgumentParser,
    title: str,
    options: Sequence[Option],
) -> None:
    group = to.add_argument_group(title)
    for option in options:
        flag, shown = _flag(option.name), option.default
        if isinstance(shown, tuple):
            shown = ",".join(map(str, shown))
        default = "" if shown in (None, NEEDED) else f" (default: {shown})"
        group.add_argument(
            flag,
            dest=option.name,
            required=shown == NEEDED,
            type=option.type,
            choices=option.choices,
            metavar=None if option.choices else option.name.rstrip("_").upper().split("_")[-1],
            help=option.help + default,
        )


def _flag(name: str) -> str:
    return f"--{name.rstrip('_').replace('_', '-')}"


def _add_sampling(to: argparse.ArgumentParser) -> None:
    """Each option of sampling once, under the systems that have it."""
    systems: dict[Option, list[str]] = {}
    for name, system in SYSTEMS.items():
        for option in system.sampling:
            systems.setdefault(option, []).append(name)
    for names in dict.fromkeys(map(tuple, systems.values())):
        mine = [option for option, having in systems.items() if tuple(having) == names]
        _add(to, f"runs of {', '.join(names)}", mine)


def _size(text: str) -> tuple[int, int]:
    try:
        numbers = [int(part) for part in text.lower().split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give 28, or 28x20 (height x width)")
    return numbers[0], numbers[-1]


COMPUTING = Option("dtype", "float32", "of the products; weights stay float32", str, tuple(DTYPES))
DRAWING = Option("dtype", None, "of the products (default: as trained)", str, tuple(DTYPES))

PAINTING = (
    Option("size", 512, "of the picture's longer side, at most", positive),
    Option("steps", 500, "at each size", positive),
    Option("levels", 1, "sizes, each twice the one before", positive),
    Option("start", "content", "what is painted over", str, ("content", "noise")),
    Option("content_weight", 1.0, "of the content's features", weight),
    Option("style_weight", 1e3, "of the style's Gram matrices", weight),
    Option("variation_weight", 0.0, "of the differences between neighbouring pixels", weight),
    Option("learning_rate", 0.02, "how far a step moves a pixel, of 1", rate),
    Option("pooling", None, "of VGG (default: avg, as the paper prefers)", str, ("avg", "max")),
    Option("seed", 0, "of random weights, of noise and of a generated content", natural),
    COMPUTING,
)

GENERATED = "generated"
"""In place of a content: the picture that document 003's untrained generator makes."""


def train_command(options: Settings, console: Console) -> int:
    system, run = options.pop("system"), Run(options.pop("out"))
    resume, overwrite = options.pop("resume", False), options.pop("overwrite", False)
    compiled = not options.pop("no_compile", False)
    if "epochs" in options and "steps" in options:
        raise Refused("give --epochs or --steps, not both")
    if resume:
        config, dataset = old_config(run, system, options)
    else:
        run.check_free(overwrite)
        config, dataset = new_config(system, options)
    if compiled and not _can_compile():
        console.print(
            "MLX compiles for the CPU with g++, which is not installed: the step runs uncompiled, "
            "and slower. Install g++ (Debian, Ubuntu: apt-get install g++), or say --no-compile."
        )
        compiled = False
    if importlib.util.find_spec("matplotlib") is None:
        console.print(
            "without losses.png, which needs matplotlib: python -m pip install matplotlib"
        )
    n, h, w, c = dataset.images.shape
    computed = "" if config["dtype"] == "float32" else f" in {config['dtype']}"
    console.print(f"{system} on {n} images of {h} x {w} x {c}, on {_device()}{computed}")
    if computed and mx.default_device().type == mx.DeviceType.cpu:
        console.print("MLX's CPU backend has no products of bfloat16: this is slower than float32")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[means]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", means="", total=max(n // config["batch_size"], 1))

        def on_step(position: Position, means: dict[str, float]) -> None:
            text = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
            epoch = f"epoch {position.epoch + 1}"
            bar.update(task, description=epoch, completed=position.batch, means=text)

        def on_epoch(row: dict[str, float | int], per_second: float) -> None:
            losses = {k: v for k, v in row.items() if k not in ("epoch", "step")}
            text = "  ".join(f"{name} {mean:.4f}" for name, mean in losses.items())
            speed = f"  {per_second:.1f} steps/s" if per_second == per_second else ""
            console.print(f"epoch {row['epoch']:>4}  {text}{speed}", highlight=False)

        finished = train(
            run,
            config,
            dataset,
            resume=resume,
            overwrite=overwrite,
            compiled=compiled,
            on_step=on_step,
            on_epoch=on_epoch,
        )
    if finished:
        print(run.folder)
        return DONE
    command = shlex.join(["train", system, "--out", str(run.folder), "--resume"])
    console.print(f"interrupted and saved; go on with: python -m mlx_impl {command}", markup=False)
    return INTERRUPTED


def sample_command(options: Settings, console: Console) -> int:
    run = Run(options.pop("run"))
    number, seed = options.pop("number", 100), options.pop("seed", 0)
    columns, scale = options.pop("columns", None), options.pop("scale", 1)
    out = Path(options.pop("out", run.folder / "sample.png"))
    overwrite = options.pop("overwrite", False)
    _check_output(overwrite, out)
    images, _ = _drawn(run, number, seed, options)
    with refusing(ValueError, ImportError):
        write_png(out, grid(images, columns, scale=scale))
    print(out)
    return DONE


def score_command(options: Settings, console: Console) -> int:
    from mlx_impl.quality import score

    run = Run(options.pop("run"))
    number, seed = options.pop("number", 500), options.pop("seed", 0)
    if run.read_config()["classes"] is None:
        raise Refused(f"{run.folder} was trained on images without labels, which cannot be told")
    images, config = _drawn(run, number, seed, options)
    real = load(config | {"limit": None})
    with refusing(ValueError, ImportError):
        print(score(images, real))
    return DONE


def _drawn(run: Run, number: int, seed: int, options: Settings) -> tuple[Images, Settings]:
    """Images from a run, by the sampling options given, and the run's settings."""
    config, training = restore(run, options.pop("dtype", None))
    allowed = {option.name for option in SYSTEMS[config["system"]].sampling}
    if wrong := sorted(options.keys() - allowed):
        flags = ", ".join(map(_flag, wrong))
        raise Refused(f"{run.folder} is a run of {config['system']}, which has no {flags}")
    real = None
    if training.reconstruct is not None:
        real = load(config).images
    with refusing(ValueError):
        key = random_key(seed, _DRAWN_BY_USER)
        return sample(training, number, key, real, **options), config


def stylize_command(options: Settings, console: Console) -> int:
    from mlx_impl.stylize import generated_picture, paint

    out, overwrite = Path(options.pop("out")), options.pop("overwrite", False)
    losses = out.with_name(f"{out.stem}-losses.csv")
    _check_output(overwrite, out, losses, losses.with_suffix(".png"))
    content, style = options.pop("content"), options.pop("style")
    given = {option.name: option.default for option in PAINTING} | options
    with refusing(ValueError, OSError, ImportError):
        pictures = [
            generated_picture(given["seed"]) if content == GENERATED else load_picture(content, 3),
            load_picture(style, 3),
        ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("{task.fields[losses]}"))
    with Progress(
        *columns, *times, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("step", losses="", total=given["steps"] * given["levels"])

        def on_step(number: int, losses: tuple[float, ...]) -> None:
            content, style, _ = losses
            text = f"content {content:.4g}  style {style:.4g}"
            bar.update(task, completed=number + 1, losses=text)

        with refusing(ValueError, OSError, ImportError, RuntimeError):
            picture, rows = paint(*pictures, on_step=on_step, **given)
    with refusing(ImportError):
        write_png(out, picture)
    write_losses(losses, rows)
    plot_losses(losses.with_suffix(".png"), rows, log=True)
    print(out)
    return DONE


COMMANDS = {
    "train": train_command,
    "sample": sample_command,
    "score": score_command,
    "stylize": stylize_command,
}


def _check_output(overwrite: bool, picture: Path, *others: Path) -> None:
    if picture.suffix.lower() != ".png":
        raise Refused(f"{picture} does not end in .png, the only format written")
    for path in (picture, *others):
        if path.exists() and not overwrite:
            raise Refused(
                f"{path} is there already: replace it (--overwrite), or give another --out"
            )


def _on_linux_cpu() -> bool:
    return sys.platform.startswith("linux") and mx.default_device().type == mx.DeviceType.cpu


def _can_compile() -> bool:
    """Whether ``mx.compile`` compiles: on Linux's CPU it calls g++, and without does nothing."""
    return not _on_linux_cpu() or shutil.which("g++") is not None


def _device() -> str:
    if mx.default_device().type == mx.DeviceType.cpu:
        return "the CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def _use_fast_blas(console: Console) -> None:
    """Give MLX an OpenBLAS on Linux's CPU, where its own products are many times slower.

    Done by the kit's ``blas.py`` where the kit is there, read as a file of its own: importing the
    package would import PyTorch, which nothing here needs.
    """
    kit = importlib.util.find_spec("mlx_parity")
    if not _on_linux_cpu() or kit is None or kit.origin is None:
        return
    spec = importlib.util.spec_from_file_location("_blas", Path(kit.origin).with_name("blas.py"))
    if spec is None or spec.loader is None:
        return
    blas: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = blas
    with suppress(OSError), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec.loader.exec_module(blas)
        blas.use_openblas()
    for warning in caught:
        console.print(str(warning.message), markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
