"""Options, machine identity, and the report: one table, ``reports/bench.json``, the raw rounds."""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from rich.console import Console

from benchmarks import capture, contenders, history, machine, summary
from benchmarks.effort import Budget, effort
from benchmarks.summary import Rounds
from benchmarks.systems import Subject
from mlx_impl import process
from mlx_impl.data import load_images
from mlx_parity.blas import use_openblas

REPORTS = Path("reports")
BUSY = 0.1  # cores' worth of other processes beyond which the report warns
_rounds = pytest.StashKey[dict[str, Rounds]]()
_budget = pytest.StashKey[Budget]()
_peak = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("throughput")
    group.addoption("--data", default="digits", help="digits, mnist, or the path of an IDX file")
    group.addoption(
        "--quick", action="store_true", help="in a minute: the cheaper systems' steps, less of all"
    )
    group.addoption("--batch-size", type=_positive, help="images in a step (64, fewer on a CPU)")
    group.addoption(
        "--metal-capture",
        metavar="FOLDER",
        help="on a Mac: a GPU trace of one compiled step of each system, for Xcode; not timed",
    )
    group.addoption("--torch-compile", action="store_true", help="time torch.compile as well")
    group.addoption(
        "--bfloat16", action="store_true", help="time bfloat16 as well, as is done on a GPU anyway"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a batch of {text}: it must hold 1 image or more")
    return int(text)


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    process.tune()
    with warnings.catch_warnings(record=True) as caught:  # the report says it, in its place
        warnings.simplefilter("always", RuntimeWarning)
        config.stash[_blas] = use_openblas()
    machine.allow_torch_what_mlx_may()
    config.stash[_complaints] = [str(w.message) for w in caught]
    config.stash[_rounds] = {}
    config.stash[_budget] = Budget(effort(config))
    option = config.option
    if option.benchmark_enable:
        try:
            load_images(option.data, (28, 28))
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise pytest.UsageError(f"--data: {error}") from error
    if option.metal_capture:
        try:
            capture.check(option.metal_capture)
        except (OSError, RuntimeError) as error:
            raise pytest.UsageError(f"--metal-capture: {error}") from error
    if option.benchmark_storage == "file://./.benchmarks":
        option.benchmark_storage = f"file://./{REPORTS}/benchmarks"
    if option.benchmark_enable and not option.benchmark_save:
        option.benchmark_autosave = option.benchmark_autosave or "throughput"
        option.benchmark_save_data = True
    if not option.benchmark_verbose:
        option.benchmark_quiet = True  # its table has every block; ours has the result


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A step that is traced is not timed, and one that is timed is not traced."""
    tracing = bool(config.getoption("--metal-capture"))
    items[:] = [item for item in items if ("test_metal_capture" in item.name) == tracing]


_blas = pytest.StashKey[Any]()
_complaints = pytest.StashKey[list[str]]()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= machine.identity(config.stash[_blas])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """True, which pytest takes for "done": the block of a system that has had its time."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "block" not in params:
        return None
    return item.config.stash[_budget].is_over(params["subject"].name, params["block"]) or None


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> Budget:
    return request.config.stash[_budget]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep a block's seconds per step, and what else is known of its arm, for the report."""

    def keep(subject: Subject, arm: str, block: int, seconds: float, info: dict[str, Any]) -> None:
        rounds = request.config.stash[_rounds].setdefault(subject.name, Rounds(subject))
        rounds.seconds.setdefault(arm, {})[block] = seconds
        kept = rounds.info.setdefault(arm, {})
        busiest = max(kept.get("others_cpu", 0.0), info.get("others_cpu", 0.0))
        kept |= info | {"others_cpu": busiest}

    return keep


@pytest.fixture(autouse=True)
def _the_default_device() -> Iterator[None]:
    """A test that moves MLX to another device must not take the next one along."""
    device = mx.default_device()
    yield
    mx.set_default_device(device)


def _tf32(identity: dict[str, Any]) -> str:
    """A CPU has no TF32, whatever the setting."""
    if identity["mlx_backend"] == "CPU":
        return ""
    return f", TF32 {'on' if identity['mlx_tf32'] else 'off'}"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """pytest-benchmark cannot save a benchmark that was interrupted before its first round, and
    would take all the others, and our report, down with it."""
    config: Any = session.config  # to which pytest-benchmark adds its session, undeclared
    kept = config._benchmarksession.benchmarks
    kept[:] = [benchmark for benchmark in kept if benchmark.stats.data]


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["ratios"] = rows(config)


def rows(config: pytest.Config) -> list[dict[str, Any]]:
    """One row for each system that was timed. The peak is measured once, after everything else."""
    if not config.stash[_rounds]:
        return []
    peak = config.stash.setdefault(_peak, contenders.matmul_peak())
    return [
        summary.row(rounds, machine.device(), peak) for rounds in config.stash[_rounds].values()
    ]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.stash[_rounds]:
        return
    found = rows(config)
    REPORTS.mkdir(exist_ok=True)
    partial = REPORTS / "bench.partial"  # an interrupted run leaves the file of the run before
    partial.write_text(json.dumps(found, indent=2) + "\n")
    partial.replace(REPORTS / "bench.json")
    identity = machine.identity(config.stash[_blas])
    history.store(found, identity)

    console = Console(
        file=terminalreporter._tw._file, width=max(120, terminalreporter._tw.fullwidth)
    )
    console.print()
    for table in summary.tables(found):
        console.print(table)
    console.print(summary.EXPLANATION, highlight=False)
    console.print(
        f"{identity['mlx_device']}, {identity['cpus']} CPUs; MLX {identity['mlx_version']}, "
        f"BLAS {identity['mlx_blas']}{_tf32(identity)}; "
        f"PyTorch {identity['torch_version']} on {identity['torch_device']}, "
        f"{identity['torch_threads']} threads",
        highlight=False,
    )
    if shares := [row["harness_share"] for row in found if row["harness_share"] is not None]:
        console.print(f"the loop around a step took {max(shares):.2%} of it at most")
    complaints = config.stash[_complaints].copy()
    others = max(row["others_cpu"] for row in found)
    if others > BUSY:
        complaints.append(
            f"other processes took up to {others:.1f} cores while a block was timed: "
            "repeat this on an idle machine before believing a ratio"
        )
    for complaint in complaints:
        console.print(f"warning: {complaint}", style="bold red", highlight=False)
    console.print(
        f"{REPORTS}/bench.json; every round under {REPORTS}/benchmarks/; kept for nox -s report"
    )
