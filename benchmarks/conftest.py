"""Options, machine identity, and the report: one table, ``reports/bench.json``, the raw rounds."""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from mlx_impl.data import load_images
from mlx_parity.blas import use_openblas

REPORTS = Path("reports")
BUSY = 0.1  # cores' worth of other processes beyond which the report warns
_rounds = pytest.StashKey[dict[tuple[str, str], dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("throughput")
    group.addoption("--data", default="digits", help="digits, mnist, or the path of an IDX file")
    group.addoption("--quick", action="store_true", help="fewer rounds, a smaller parity gate")
    group.addoption("--batch-size", type=_positive, default=64, help="images in a step (64)")
    group.addoption("--torch-compile", action="store_true", help="time torch.compile as well")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a batch of {text}: it must hold 1 image or more")
    return int(text)


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    with warnings.catch_warnings(record=True) as caught:  # the report says it, in its place
        warnings.simplefilter("always", RuntimeWarning)
        config.stash[_blas] = use_openblas()
    config.stash[_complaints] = [str(w.message) for w in caught]
    config.stash[_rounds] = {}
    option = config.option
    if option.benchmark_storage == "file://./.benchmarks":
        option.benchmark_storage = f"file://./{REPORTS}/benchmarks"
    if option.benchmark_enable and not option.benchmark_save:
        option.benchmark_autosave = option.benchmark_autosave or "throughput"
        option.benchmark_save_data = True
    if not option.benchmark_verbose:
        option.benchmark_quiet = True  # its table has every block; ours has the result


_blas = pytest.StashKey[Any]()
_complaints = pytest.StashKey[list[str]]()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= machine.identity(config.stash[_blas])


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def batch_size(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--batch-size")


@pytest.fixture(scope="session")
def images(request: pytest.FixtureRequest) -> np.ndarray:
    try:
        return load_images(request.config.getoption("--data"), image_size=(28, 28))
    except (ImportError, OSError, ValueError) as error:
        pytest.exit(f"--data: {error}", returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep a block's seconds per step, and what else is known of its arm, for the report."""

    def keep(system: str, arm: str, seconds: list[float], info: dict[str, Any]) -> None:
        kept = request.config.stash[_rounds].setdefault((system, arm), {"seconds": [], **info})
        kept["seconds"] += seconds
        kept["others_cpu"] = max(kept.get("others_cpu", 0.0), info.get("others_cpu", 0.0))

    return keep


@pytest.fixture(autouse=True)
def _the_default_device() -> Iterator[None]:
    """A test that moves MLX to another device must not take the next one along."""
    device = mx.default_device()
    yield
    mx.set_default_device(device)


def summarise(
    rounds: dict[tuple[str, str], dict[str, Any]], batch_size: int, device: str
) -> list[dict[str, Any]]:
    """One row for each system: medians over all rounds, ratios of medians, null for no arm."""
    rows = []
    for system in dict.fromkeys(system for system, _ in rounds):
        arms = {arm: info for (of, arm), info in rounds.items() if of == system}
        ms = {arm: 1e3 * float(np.median(info["seconds"])) for arm, info in arms.items()}

        def ratio(arm: str, ms: dict[str, float] = ms) -> float | None:
            both = arm in ms and "mlx-compiled" in ms
            return ms[arm] / ms["mlx-compiled"] if both else None

        compiled = arms.get("mlx-compiled", {})
        rows.append(
            {
                "system": system,
                "device": device,
                "compiled_over_uncompiled": ratio("mlx-uncompiled"),
                "over_torch_eager": ratio("torch-eager"),
                "over_torch_compile": ratio("torch-compile"),
                "ms_compiled": ms.get("mlx-compiled"),
                "ms_uncompiled": ms.get("mlx-uncompiled"),
                "ms_torch_eager": ms.get("torch-eager"),
                "ms_torch_compile": ms.get("torch-compile"),
                "images_per_second": 1e3 * batch_size / ms["mlx-compiled"] if compiled else None,
                "peak_memory_mb": compiled.get("peak_memory_mb"),
                "first_call_ms": compiled.get("first_call_ms"),
                "traces": compiled.get("traces"),
            }
        )
    return rows


def _table(rows: list[dict[str, Any]], batch_size: int) -> Table:
    columns = {
        "MLX\nms": ("ms_uncompiled", "{:.1f}"),
        "comp.\nms": ("ms_compiled", "{:.1f}"),
        "torch\nms": ("ms_torch_eager", "{:.1f}"),
        "t.compile\nms": ("ms_torch_compile", "{:.1f}"),
        "over\nMLX": ("compiled_over_uncompiled", "{:.2f}x"),
        "over\ntorch": ("over_torch_eager", "{:.2f}x"),
        "over\nt.compile": ("over_torch_compile", "{:.2f}x"),
        "images\n/s": ("images_per_second", "{:,.0f}"),
        "peak\nMB": ("peak_memory_mb", "{:.0f}"),
        "traces": ("traces", "{}"),
    }
    shown = {k: v for k, v in columns.items() if any(row[v[0]] is not None for row in rows)}
    table = Table(
        title=f"A training step, batch {batch_size}: above 1x, compiled MLX is faster",
    )
    table.add_column("system")
    for column in shown:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = (("-" if row[k] is None else form.format(row[k])) for k, form in shown.values())
        table.add_row(row["system"], *cells)
    return table


def _tf32(identity: dict[str, Any]) -> str:
    """A CPU has no TF32, whatever the setting."""
    if identity["mlx_backend"] == "CPU":
        return ""
    return f", TF32 {'on' if identity['mlx_tf32'] else 'off'}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rounds = config.stash[_rounds]
    if not rounds:
        return
    batch_size = config.getoption("--batch-size")
    rows = summarise(rounds, batch_size, machine.device())
    REPORTS.mkdir(exist_ok=True)
    partial = REPORTS / "bench.partial"  # an interrupted run leaves the file of the run before
    partial.write_text(json.dumps(rows, indent=2) + "\n")
    partial.replace(REPORTS / "bench.json")

    console = Console(
        file=terminalreporter._tw._file, width=max(100, terminalreporter._tw.fullwidth)
    )
    console.print()
    console.print(_table(rows, batch_size))
    identity = machine.identity(config.stash[_blas])
    console.print(
        f"{identity['mlx_device']}, {identity['cpus']} CPUs; MLX {identity['mlx_version']}, "
        f"BLAS {identity['mlx_blas']}{_tf32(identity)}; "
        f"PyTorch {identity['torch_version']} on {identity['torch_device']}, "
        f"{identity['torch_threads']} threads",
        highlight=False,
    )
    complaints = list(config.stash[_complaints])
    others = max(info.get("others_cpu", 0.0) for info in rounds.values())
    if others > BUSY:
        complaints.append(
            f"other processes took up to {others:.1f} cores while a block was timed: "
            "repeat this on an idle machine before believing a ratio"
        )
    for complaint in complaints:
        console.print(f"warning: {complaint}", style="bold red", highlight=False)
    console.print(f"{REPORTS}/bench.json, and every round under {REPORTS}/benchmarks/")
